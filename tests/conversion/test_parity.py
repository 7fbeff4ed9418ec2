"""The logits of every family are those of `transformers`, recorded and live."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from flax.traverse_util import unflatten_dict
from modules.oracle import Oracle
from reference_models import CONFIGS, RECORDED, TOKENS, WINDOW, draw, is_gemma, torch_logits, torch_model

from famx.conversion import families
from famx.memories import Fam
from famx.modules import Decoder, DecoderState, Memory

BLOCK, SEGMENTS, TOLERANCE = 8, 3, 1e-4
LENGTH = TOKENS.shape[1]
ALL = sorted(CONFIGS)
PLAIN = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "smollm3"]


def decoder_config(name, **memory):
    """Blocks of 8, of which all that TOKENS fill are seen; the windowed Mistral by the window mask."""
    memory = {"block_size": BLOCK, "memory_segments": SEGMENTS, "memory": Memory(), **memory}
    if name == "mistral_window":
        memory |= {"window_mask": True, "memory_segments": (WINDOW - 1) // BLOCK}
    return families.decoder_config(CONFIGS[name], **memory)


@functools.cache
def params(name, length=0):
    """The drawn weights in our tree, and a prompt."""
    hf, leaves = CONFIGS[name], {}
    config = decoder_config(name, memory=Fam(length) if length else Memory())
    for tensor in families.tensors(hf, config):
        array = tensor.to_ours(draw(tensor.name, tensor.shape, is_gemma(hf)))
        leaves.setdefault(tensor.path, []).append(array)
    stack = lambda path, arrays: np.stack(arrays) if path[0] == "layers" else arrays[0]
    tree = unflatten_dict({path: stack(path, arrays) for path, arrays in leaves.items()})
    if length:
        prompt = np.random.default_rng(0).standard_normal((length, config.embed_dim))
        tree["memory"] = {"prompt": prompt.astype(np.float32)}
    return tree


@functools.cache
def reader(config):
    call = lambda params, tokens, state: Decoder(config).apply({"params": params}, tokens, state)
    return jax.jit(call)


def read(config, params, tokens, state=None):
    logits, state = reader(config)(params, jnp.asarray(tokens), state)
    return np.asarray(logits), state


def stream(config, params, tokens, size):
    """Logits of tokens that a model without memory reads `size` at a time."""
    state = DecoderState.initial(config, len(tokens), jnp.zeros((config.num_layers, 0, config.embed_dim)))
    parts = []
    for start in range(0, tokens.shape[1], size):
        part, state = read(config, params, tokens[:, start : start + size], state)
        parts.append(part)
    return np.concatenate(parts, axis=1)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    gap = np.abs(ours - theirs).max()
    assert gap <= TOLERANCE, f"differs by {gap:.3g}"


@functools.cache
def recorded(name):
    with np.load(RECORDED) as file:
        return file[name][None]


def test_the_record_holds_every_model_and_is_small():
    with np.load(RECORDED) as file:
        assert sorted(file.files) == ALL
    assert RECORDED.stat().st_size < 100_000


def test_every_family_has_a_model():
    named = {hf["architectures"][0] for hf in CONFIGS.values()}
    assert named | {"Gemma3ForConditionalGeneration"} == set(families.SUPPORTED)


@pytest.mark.parametrize("name", ALL)
def test_a_whole_sequence_of_several_blocks_has_the_recorded_logits(name):
    close(read(decoder_config(name), params(name), TOKENS)[0], recorded(name))


@pytest.mark.parametrize("name", ALL)
def test_streaming_has_the_recorded_logits(name):
    close(stream(decoder_config(name), params(name), TOKENS, 5), recorded(name))


@pytest.mark.parametrize("name", ["llama", "gemma3", "smollm3", "mistral_window"])
def test_token_by_token_has_the_recorded_logits(name):
    close(stream(decoder_config(name), params(name), TOKENS, 1), recorded(name))


def test_within_one_block_the_memory_segments_are_nothing_and_the_original_is_met():
    one = TOKENS[:, :BLOCK]
    without, _ = read(decoder_config("llama", memory_segments=0), params("llama"), one)
    with_segments, _ = read(decoder_config("llama"), params("llama"), one)
    near = rounding.bound(rounding.of_decoder(decoder_config("llama"), BLOCK), np.abs(without).max())
    np.testing.assert_allclose(without, with_segments, rtol=0, atol=near)
    close(without, recorded("llama")[:, :BLOCK])


class PromptUnseen(Oracle):
    """The oracle of FAM, but that block tokens do not see the memory."""

    def attend(self, q, keys, values, mask, *bias):
        n = self.c.memory_columns
        return super().attend(q, keys, values, mask if len(mask) == n else [False] * n + mask[n:], *bias)


@pytest.mark.parametrize("name", ["llama_biased", "gemma2", "gemma3", "smollm3"])
def test_with_fam_the_first_block_differs_from_the_original_in_its_attention_to_the_prompt_alone(name):
    config, tree = decoder_config(name, memory=Fam(2)), params(name, 2)
    original = recorded(name)[0, :BLOCK]
    close(PromptUnseen(config, tree).read(TOKENS[0, :BLOCK])[0], original)
    ours = read(config, tree, TOKENS[:, :BLOCK])[0][0]
    close(ours, Oracle(config, tree).read(TOKENS[0, :BLOCK])[0])
    assert np.abs(ours - original).max(axis=-1).min() > 100 * TOLERANCE  # at every token


def test_a_sliding_window_of_w_is_a_window_mask_of_w_minus_one_tokens_before():
    # Without the mask whole blocks are seen: the same until the window is full, then more.
    config = decoder_config("mistral_window")
    assert config.memory_segments * config.block_size + 1 == WINDOW
    blocks = families.decoder_config(
        CONFIGS["mistral_window"], block_size=BLOCK, memory_segments=SEGMENTS, memory=Memory()
    )
    ours, theirs = read(blocks, params("mistral_window"), TOKENS)[0], recorded("mistral_window")
    close(ours[:, :WINDOW], theirs[:, :WINDOW])
    assert np.abs(ours - theirs)[:, WINDOW:].max() > 100 * TOLERANCE


# ------------------------------------------------------------------ live, where torch is installed


@functools.cache
def live(name):
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    return torch_model(CONFIGS[name])


@pytest.mark.parametrize("name", ALL)
def test_the_record_is_what_transformers_says(name):
    wanted = recorded(name)  # on another machine
    near = rounding.bound(rounding.of_decoder(decoder_config(name), LENGTH), np.abs(wanted).max())
    np.testing.assert_allclose(torch_logits(live(name), TOKENS), wanted, rtol=0, atol=near)


@pytest.mark.parametrize("name", PLAIN)
def test_a_batch_of_an_odd_length_has_the_logits_of_transformers(name):
    tokens = np.random.default_rng(1).integers(0, 23, (3, 2 * BLOCK + 3))
    close(read(decoder_config(name), params(name), tokens)[0], torch_logits(live(name), tokens))


@pytest.mark.parametrize("name", ALL)
def test_names_and_shapes_are_those_of_transformers(name):
    hf, model = CONFIGS[name], live(name)
    theirs = {key: tuple(p.shape) for key, p in model.named_parameters()}
    ours = {tensor.name: tensor.shape for tensor in families.tensors(hf, decoder_config(name))}
    assert ours == theirs
    assert all(key in ours or families.ignored(hf, key) for key in model.state_dict())


@pytest.mark.parametrize("name", ALL)
def test_a_config_that_transformers_rewrites_says_the_same_decoder(name):
    rewritten = live(name).config.to_dict() | {"architectures": CONFIGS[name]["architectures"]}
    assert families.decoder_config(rewritten) == families.decoder_config(CONFIGS[name])


def test_the_text_part_of_a_multimodal_gemma_has_the_logits_of_transformers():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    text = {key: value for key, value in CONFIGS["gemma3"].items() if key != "architectures"}
    vision = dict.fromkeys(("hidden_size", "intermediate_size", "image_size", "patch_size"), 8)
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 1, "vision_use_head": False}
    outer = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    model = transformers.Gemma3ForConditionalGeneration._from_config(
        outer, attn_implementation="eager", dtype=torch.float32
    ).eval()
    hf = outer.to_dict() | {"architectures": ["Gemma3ForConditionalGeneration"]}
    assert families.decoder_config(hf) == families.decoder_config(CONFIGS["gemma3"])
    config = decoder_config("gemma3")
    wanted = {tensor.name for tensor in families.tensors(hf, config)}
    with torch.no_grad():
        found = {families.standard_name(n): p for n, p in model.named_parameters()}
        for name in wanted:
            found[name].copy_(torch.from_numpy(draw(name, found[name].shape, True)))
    extra = {n for n in model.state_dict() if families.standard_name(n) not in wanted}
    assert extra and all(families.ignored(hf, name) for name in extra)
    close(read(config, params("gemma3"), TOKENS)[0], torch_logits(model, TOKENS))
