"""A decoder with feedback attention memory (TransformerFAM, arXiv 2404.09173) for `transformers`.

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

Text is read in blocks of `S` tokens. A token attends to its layer's memory, `N` vectors `F`, to the `M`
blocks before its own, and to its own block up to itself. When a block is full, `F` attends to itself and
to the block, by the layer's own weights, and becomes the `F` of the next block. A `State` holds all that
is needed to read on; its size does not depend on the number of tokens read.

Letters: `B` batch, `L` tokens, `W` tokens of one block, `D` width, `H` query heads, `K` key/value heads,
`Dh` head width, `X = N + (M + 1) S` columns: memory, past blocks (the oldest first), the own block.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

_CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"  # the name varies
_wide = lambda dtype: torch.promote_types(dtype, torch.float32)
_parameters = lambda shapes: nn.ParameterDict({k: torch.zeros(size) for k, size in shapes.items()})


class FamxConfig(PretrainedConfig):
    """`famx` describes the model with its memory, `base` is the config of the model without."""

    model_type = "famx"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]


class State(SimpleNamespace):
    """What was read; reading updates it, `copy.deepcopy` keeps it, generate() takes it as its cache.

    Each layer's `memory [B, N, D]`, `keys` and `values [B, K, X, Dh]`; `position [B]`, the number of
    tokens read; and `columns`, the number of columns of `input_ids` read, with padding.
    """

    is_compileable, is_croppable, is_linear = False, False, (False,)  # generate() asks for these
    get_seq_length = lambda self, layer_idx=0: self.columns

    def reorder_cache(self, beam_idx):
        """Go on with the examples `beam_idx [B]`."""
        for arrays in (self.memory, self.keys, self.values):
            arrays[:] = [x[beam_idx.to(x.device)] for x in arrays]
        self.position = self.position[beam_idx.to(self.position.device)]


def normalize(x, epsilon):
    """`x` divided by its RMS over the last axis, float32 at least."""
    x = x.to(_wide(x.dtype))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


class Norm(nn.Module):
    """RMS norm; `norm_offset` is 1 for Gemma."""

    def __init__(self, c, width):
        super().__init__()
        self.offset, self.epsilon = c.norm_offset, c.norm_epsilon
        self.weight = nn.Parameter(torch.full((width,), 1.0 - c.norm_offset))

    def forward(self, x):
        """`x` normalised, times `weight + norm_offset`."""
        x = normalize(x, self.epsilon)
        return (x * (self.weight.to(x.dtype) + self.offset)).to(self.weight.dtype)


def rotate(x, angle):
    """`x [B, heads, W, Dh]` rotated by `angle [B, W, Dh / 2]`."""
    first, second = x.to(angle.dtype).chunk(2, -1)
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def attend(q, k, v, seen, c, bias=None):
    """Attention of `q [B, H, W, Dh]` to `k, v [B, K, X, Dh]` where `seen [B, W, X]`; None: to all.

    `bias [H]` is added to the scores of the memory's columns, which come first.
    Returns the attention `[B, W, H * Dh]` and the probabilities `[B, H, W, X]`.
    """
    rows = q.flatten(1, 2).unflatten(1, (k.shape[1], -1))
    scores = (rows @ k.transpose(2, 3)).to(_wide(q.dtype)) * c.query_scale
    scores = scores.flatten(1, 2).unflatten(1, q.shape[1:3])
    if bias is not None:
        scores[..., : c.memory.length] += bias[:, None, None]
    if c.attention_softcap is not None:
        scores = c.attention_softcap * torch.tanh(scores / c.attention_softcap)
    p = scores.softmax(-1) if seen is None else scores.masked_fill(~seen[:, None], -1e30).softmax(-1)
    result = p.to(v.dtype).flatten(1, 2).unflatten(1, (k.shape[1], -1)) @ v
    return result.flatten(1, 2).unflatten(1, q.shape[1:3]).transpose(1, 2).flatten(2), p


class Layer(nn.Module):
    """A Transformer layer; its memory uses the same weights as its tokens."""

    def __init__(self, c, index):
        super().__init__()
        self.c, self.index = c, index
        names = {"gelu_tanh": "gelu_pytorch_tanh", "squared_relu": "relu2"}  # others are called the same
        self.activation = ACT2FN[names.get(c.activation, c.activation)]
        d, f, n, q, kv = c.embed_dim, c.mlp_dim, c.memory.length, c.num_heads, c.num_kv_heads
        self.self_attn, self.mlp = nn.ModuleDict(), nn.ModuleDict()
        for name, heads in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            self.self_attn[name] = nn.Linear(d, heads * c.head_dim, bias=c.qkv_bias)
        self.self_attn["o_proj"] = nn.Linear(q * c.head_dim, d, bias=c.output_bias)
        for name in ("q_norm", "k_norm") if c.qk_norm else ():
            self.self_attn[name] = Norm(c, c.head_dim)
        for name, inner, outer in (("gate_proj", d, f), ("up_proj", d, f), ("down_proj", f, d)):
            self.mlp[name] = nn.Linear(inner, outer, bias=c.mlp_bias)
        self.input_layernorm, self.post_attention_layernorm = Norm(c, d), Norm(c, d)
        if c.post_norms:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = Norm(c, d), Norm(c, d)
        self.memory = _parameters(c.layer_parameters)
        # In units of 2^-32 turns, which are exact at any position; `between` lies between two positions.
        turns = np.array(c.frequencies[c.rope_layers[index] if c.rope_layers else "global"]) / (2 * np.pi)
        between = np.arange(1, n + 1)[:, None] / (n + 1) * turns * (c.memory.positions == "float")
        whole = lambda x: torch.from_numpy(np.round(x * 2.0**32)).long()
        self.turns, self.between = whole(turns), whole(between)

    def angles(self, positions, beyond=0):
        """Angles `[..., Dh / 2]` of positions `[...]` in radians; `beyond` is added to the turns."""
        phase = positions[..., None] * self.turns.to(positions.device) + beyond + 2**31
        phase = (phase % 2**32 - 2**31).to(_wide(self.input_layernorm.weight.dtype))
        return phase * (2 * np.pi / 2**32)

    def memory_angles(self, block):
        """Angles `[B, N, Dh / 2]` of the memory made from `block [B]`, which is -1 before the text."""
        end = (block[:, None] + 1) * self.c.block_size
        n = torch.arange(-self.c.memory.length, 0, device=block.device)
        places = {"last": end + n, "float": end - 1 + 0 * n, "zero": 0 * (end + n)}
        return self.angles(places[self.c.memory.positions], self.between.to(block.device))

    def project(self, x, angle):
        """Queries `[B, H, W, Dh]`, keys and values `[B, K, W, Dh]` of `x [B, W, D]`."""
        x, part = self.input_layernorm(x), self.self_attn
        parts = (part.q_proj, part.k_proj, part.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2) for p in parts)
        if self.c.qk_norm:
            q, k = part.q_norm(q), part.k_norm(k)
        return rotate(q, angle), rotate(k, angle), v

    def finish(self, attention, residual):
        """`FF(A) + A` with `A = attention + residual`."""
        post, attention = self.c.post_norms, self.self_attn.o_proj(attention)
        a = residual + (self.post_attention_layernorm(attention) if post else attention)
        x = (self.pre_feedforward_layernorm if post else self.post_attention_layernorm)(a)
        x = self.mlp.down_proj(self.activation(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))
        return a + (self.post_feedforward_layernorm(x) if post else x)

    def forward(self, x, here, state):
        """`x [B, W, D]` that stays within each example's block; updates the state (see `read_part`)."""
        i, n, size = self.index, self.c.memory.length, self.c.block_size
        q, k, v = self.project(x, self.angles(here.positions))
        for arrays, new in ((state.keys, k), (state.values, v)):
            if torch.is_grad_enabled():  # the backward pass needs the array as it was
                arrays[i] = arrays[i].clone()
            arrays[i][here.example, :, here.column] = new[here.example, :, here.token]
        bias = self.memory.get("bias")
        x = self.finish(attend(q, state.keys[i], state.values[i], here.seen, self.c, bias)[0], x)
        if len(here.full):  # the next memory, its columns, and the next window
            arrays, block = (state.memory, state.keys, state.values), here.block[here.full]
            memory, keys, values = (y[i][here.full] for y in arrays)
            memory = self.compress(memory, keys, values, block)
            _, k, v = self.project(memory, self.memory_angles(block))
            shift = lambda new, old: torch.cat([new, old[:, :, n + size :], old[:, :, -size:]], 2)
            for y, new in zip(arrays, (memory, shift(k, keys), shift(v, values))):
                y[i] = y[i].index_copy(0, here.full, new)
        return x

    def compress(self, memory, keys, values, block):
        """`F_t` from `F_{t-1} [B, N, D]` and the columns of the full block of index `block [B]`."""
        c, rule, n = self.c, self.c.memory, self.c.memory.length
        q = self.project(memory, self.memory_angles(block))[0]
        itself_and_block = (torch.cat([x[:, :, :n], x[:, :, -c.block_size :]], 2) for x in (keys, values))
        attention, probabilities = attend(q, *itself_and_block, None, c, self.memory.get("bias"))
        first = (block == 0)[:, None, None] & (rule.first_residual == "zero")  # the prompt knows nothing
        new = self.finish(attention, memory.masked_fill(first, 0)).to(memory.dtype)
        if rule.update_scale != 1.0:
            new = torch.where(first, new, memory + rule.update_scale * (new - memory))
        if rule.normalize:
            new = normalize(new, c.norm_epsilon) * self.memory.get("rms", torch.ones(())).detach()
        if rule.update == "gated":  # by the share of the attention on the block
            gate = 2 * probabilities[..., n:].sum(-1).mean(1)[..., None].to(memory.dtype) - 1
            gate = gate + (gate.clamp(min=0) - gate).detach()
            new = torch.where(first, new, memory + gate * (new - memory))
        return new


class FamxForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its memory; see the head of this file."""

    config_class = FamxConfig
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["memory"]
    _supports_default_dynamic_cache = classmethod(lambda cls: False)  # `forward` makes the State

    def __init__(self, config):
        super().__init__(config)
        self.c = c = SimpleNamespace(**{**config.famx, **config.famx["decoder"]})
        c.memory = SimpleNamespace(**c.memory)
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(c.vocab_size, c.embed_dim)
        self.model["layers"] = nn.ModuleList(Layer(c, i) for i in range(c.num_layers))
        self.model["norm"] = Norm(c, c.embed_dim)
        self.model["memory"] = _parameters(c.model_parameters)
        if not c.tied_embeddings:
            self.lm_head = nn.Linear(c.embed_dim, c.vocab_size, bias=False)
        self.post_init()

    def start(self, batch_size):
        """The `State` before the first token."""
        c, like = self.c, self.model.embed_tokens.weight
        empty = like.new_zeros(1, c.num_kv_heads, (c.memory_segments + 1) * c.block_size, c.head_dim)
        prompted, wide = "prompt" in c.model_parameters, _wide(like.dtype)
        climb = self.model["memory"].prompt[None].to(wide) if prompted else None
        layers, before = [], torch.full((1,), -1, device=like.device)
        for layer in self.model.layers:
            memory = climb if prompted else layer.memory.prefix[None].to(wide)
            q, k, v = layer.project(memory, layer.memory_angles(before))
            if prompted:  # the prompt runs up the layers, seeing itself alone
                climb = layer.finish(attend(q, k, v, None, c)[0], climb).to(wide)
            layers.append((memory, torch.cat([k, empty], 2), torch.cat([v, empty], 2)))
        memory, keys, values = ([x.repeat_interleave(batch_size, 0) for x in xs] for xs in zip(*layers))
        position = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        return State(memory=memory, keys=keys, values=values, position=position, columns=0)

    @torch.no_grad()
    def read(self, input_ids, state=None, attention_mask=None):
        """The `State` after tokens `[B, L]`."""
        return self(input_ids, attention_mask, state, logits_to_keep=1)[_CACHE]

    def generate(self, *args, state=None, **kwargs):
        """As in `transformers`; with the `State` of the first tokens only the others are read."""
        return super().generate(*args, **kwargs, **({} if state is None else {_CACHE: state}))

    def forward(self, input_ids, attention_mask=None, past_key_values=None, cache=None, labels=None,
                logits_to_keep=0, use_cache=True, **unused):  # fmt: skip
        """Logits `[B, L, V]`, or of the last columns, of tokens read from a `State`; None: the start.

        Padding, where `attention_mask` is 0, may be anywhere; its logits are those of the token before.
        """
        state, length = cache or past_key_values or self.start(len(input_ids)), input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -length:]
        if mask.shape != input_ids.shape:
            raise ValueError("attention_mask must be [batch, tokens], with 0 at padding.")
        tokens = input_ids.gather(1, (mask == 0).int().argsort(dim=1, stable=True))  # padding last
        read = (mask != 0).cumsum(1)
        total, done, kept = read[:, -1:], 0 * read[:, -1:], read[:, -logits_to_keep:] - 1
        hidden = self.model.embed_tokens.weight.new_zeros(*kept.shape, self.c.embed_dim)
        while (done < total).any():  # up to the end of each example's block
            room = self.c.block_size - state.position[:, None] % self.c.block_size
            count = torch.minimum(total - done, room)
            index = done + torch.arange(int(count.max()), device=done.device)
            x = self.read_part(tokens.gather(1, index.clamp(max=length - 1)), count, state)
            example, column = ((kept >= done) & (kept < done + count)).nonzero(as_tuple=True)
            hidden[example, column] = x[example, (kept - done)[example, column]]
            done = done + count
        state.columns += length
        head = self.model.embed_tokens if self.c.tied_embeddings else self.lm_head
        logits, cap = self.model.norm(hidden) @ head.weight.T, self.c.logit_softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        loss = None if labels is None else self.loss_function(logits, labels, self.c.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **({_CACHE: state} if use_cache else {}))

    def read_part(self, tokens, count, state):
        """The last layer's output for `tokens [B, W]` of one block, of which `count [B, 1]` are read."""
        c, size, past = self.c, self.c.block_size, self.c.memory_segments * self.c.block_size
        slot = torch.arange(tokens.shape[1], device=tokens.device)
        block, row = state.position[:, None] // size, state.position[:, None] % size + slot
        column = torch.arange(-past - c.memory.length, size, device=tokens.device)
        seen = (column <= row[..., None]) & (column >= -size * block[..., None])
        seen &= (column >= row[..., None] - past) | (not c.window_mask)
        example, token = (slot < count).nonzero(as_tuple=True)
        state.position = state.position + count[:, 0]
        full = ((count[:, 0] > 0) & (state.position % size == 0)).nonzero()[:, 0]
        here = SimpleNamespace(
            positions=block * size + row, seen=seen | (column < -past), block=block[:, 0], full=full,
            example=example, token=token, column=row[example, token] + past + c.memory.length,
        )  # fmt: skip
        x = self.model.embed_tokens(tokens)
        x = x * torch.tensor(c.embed_dim**0.5 if c.scale_embeddings else 1.0, dtype=x.dtype)
        for layer in self.model.layers:
            x = layer(x, here, state)
        return x

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, cache_position=None,
                                      **kwargs):  # fmt: skip
        """What `forward` reads next: the last columns, as many as are new."""
        count = input_ids.shape[1] if cache_position is None else len(cache_position)
        count = count if next_sequence_length is None else next_sequence_length
        if count < 1:
            raise ValueError("After a state, generate() needs the tokens read and the new ones.")
        return {"input_ids": input_ids[:, -count:], **kwargs}
