"""PyTorch entries in the comparison, each with its own recurrence and the gradient through all blocks.

Model sizes are set to those of the shape wherever a package offers them. All four feed-forwards are
gated; packages that derive the hidden width from a multiplier get the one that yields the shape's width.
Fused attention is used where available, and bfloat16 by autocast. Everything else is the package's
default, except for the residual streams of the Recurrent Memory Transformer: one, as in a plain
Transformer, instead of four.
"""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.peer_shape import Shape
from benchmarks.turns import Peer


def block_recurrent(shape: dict) -> Peer:
    """lucidrains' Block-Recurrent Transformer: `N` state vectors in the middle layer only."""
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    shape = _start(shape)
    model = BlockRecurrentTransformer(
        num_tokens=shape.vocabulary, dim=shape.width, depth=shape.layers, heads=shape.heads,
        dim_head=shape.head_dim, ff_mult=_multiple(shape), max_seq_len=shape.length,
        block_width=shape.block, num_state_vectors=shape.memory_length, use_flash_attn=True,
    )  # fmt: skip
    return _peer(model, lambda tokens: model(tokens)[0], shape)


def recurrent_memory(shape: dict) -> Peer:
    """lucidrains' Recurrent Memory Transformer: `N` memory tokens before and after each block."""
    from recurrent_memory_transformer_pytorch import (
        RecurrentMemoryTransformer,
        RecurrentMemoryTransformerWrapper,
    )

    shape = _start(shape)
    model = RecurrentMemoryTransformerWrapper(
        RecurrentMemoryTransformer(
            dim=shape.width, num_tokens=shape.vocabulary, depth=shape.layers, heads=shape.heads,
            dim_head=shape.head_dim, ff_mult=_multiple(shape), seq_len=shape.block,
            num_memory_tokens=shape.memory_length, use_flash_attn=True, num_residual_streams=1,
        )
    )  # fmt: skip
    return _peer(model, lambda tokens: model(tokens)[0], shape)


def infini(shape: dict) -> Peer:
    """lucidrains' Infini-attention: a fast-weight matrix per head in every layer."""
    from infini_transformer_pytorch import InfiniTransformer

    shape = _start(shape)
    model = InfiniTransformer(
        num_tokens=shape.vocabulary, dim=shape.width, depth=shape.layers, heads=shape.heads,
        dim_head=shape.head_dim, ff_mult=_multiple(shape),
    )  # fmt: skip

    def logits(tokens):
        memories, blocks = None, []
        for block in tokens.split(shape.block, dim=-1):
            block_logits, _, memories = model(block, past_memories=memories, return_new_memories=True)
            blocks.append(block_logits)
        return torch.cat(blocks, dim=1)

    return _peer(model, logits, shape)


def sliding_window(shape: dict, segments: int) -> Peer:
    """Mistral of transformers: sliding-window attention over `segments + 1` blocks, no recurrence."""
    import transformers

    shape = _start(shape)
    config = transformers.MistralConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, head_dim=shape.head_dim,
        intermediate_size=shape.feed_forward, max_position_embeddings=shape.length,
        sliding_window=(segments + 1) * shape.block, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config)
    facts = {"version": f"transformers {transformers.__version__}"}
    return _peer(model, lambda tokens: model(tokens).logits, shape, facts)


def _start(shape: dict) -> Shape:
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return Shape(**shape)


def _multiple(shape: Shape) -> float:
    """The multiplier `m` for which `int(width * m * 2 / 3) == feed_forward`."""
    return shape.feed_forward * 3 / 2 / shape.width


def _peer(
    model: torch.nn.Module,
    logits: Callable[[torch.Tensor], torch.Tensor],
    shape: Shape,
    facts: dict | None = None,
) -> Peer:
    model = model.to(shape.device)
    inputs, targets = (torch.tensor(x, device=shape.device) for x in shape.tokens())
    narrow = torch.autocast(shape.device, torch.bfloat16, enabled=shape.dtype == "bfloat16")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )

    def step():
        with narrow:
            scores = logits(inputs)
        value = F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten())
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    (table,) = (e for e in embeddings if e.shape == (shape.vocabulary, shape.width))
    with narrow:
        scores = logits(inputs)
    last = scores[:, -shape.block :, : shape.landmark].float().logsumexp(-1).mean()
    (gradient,) = torch.autograd.grad(last, table)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "reach": gradient[shape.landmark].norm().item(),
        "version": f"torch {torch.__version__}",
        **(facts or {}),
    }
    return Peer(step, facts)
