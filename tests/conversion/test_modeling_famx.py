"""Models in transformers, by the code of the export, say and write what they do in famx."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from exports import imported
from reference_models import CONFIGS

from famx.conversion.exporting import export
from famx.conversion.importing import plan_import, write_model
from famx.conversion.sources import open_source
from famx.decoding import Sampling, generate
from famx.decoding.generation import restrict
from famx.memories import Fam
from famx.model_dir.loading import TrainedModel, load_model

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

BLOCK, TOLERANCE = 8, 1e-4
LENGTH = 4 * BLOCK + 3
GATED = Fam(3, update="gated", normalize=True)
FAMILIES = [(name, i % 4, GATED if i % 2 else Fam(2)) for i, name in enumerate(sorted(CONFIGS))]
RULES = [
    Fam(BLOCK), Fam(1, update="gated"), Fam(3, normalize=True), Fam(3, update_scale=0.5),
    Fam(3, positions="float"), Fam(3, positions="zero"), Fam(3, start_from="prefix"),
    Fam(3, update="gated", update_scale=0.5, first_residual="ordinary"), Fam(3, bias="zero"),
    Fam(3, normalize="measured"), Fam(2, start_from="prefix", bias="zero", normalize="measured"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_cache_at_home(tmp_path_factory):
    """Code of models is copied to a cache before it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


def load(directory, **options):
    make = transformers.AutoModelForCausalLM.from_pretrained
    return make(directory, trust_remote_code=True, **options).eval()


def both(tmp_path, name="llama_biased", **fields):
    """A model in famx, and its export in transformers."""
    ours = imported(name, tmp_path, block_size=BLOCK, **fields)
    export(ours, tmp_path / "out", max_shard_size=20_000)
    return ours, load(tmp_path / "out")


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    return both(tmp_path_factory.mktemp("gated"), memory=GATED, memory_segments=2)


def read(ours, tokens):
    """Logits and state in famx."""
    call = jax.jit(lambda params, tokens: ours.model.module.apply({"params": params}, tokens))
    logits, state = call(ours.params, jnp.asarray(tokens))
    return np.asarray(logits), state


def logits_of(theirs, tokens, mask=None, **options):
    with torch.no_grad():
        mask = None if mask is None else torch.from_numpy(mask)
        return theirs(torch.from_numpy(tokens), mask, **options).logits.numpy()


def draw_tokens(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, 23, shape)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------ reading


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("name", "segments", "memory"), FAMILIES)
def test_every_family_has_our_logits_over_several_blocks(name, segments, memory, tmp_path):
    ours, theirs = both(tmp_path, name, memory=memory, memory_segments=segments)
    tokens = draw_tokens(2, LENGTH)
    logits, state = read(ours, tokens)
    assert np.abs(logits[0] - logits[1]).max() > 100 * TOLERANCE
    close(logits_of(theirs, tokens), logits)
    found = theirs.read(torch.from_numpy(tokens))
    close(torch.stack(found.memory).numpy(), state.memory)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("memory", RULES)
def test_every_rule_of_the_memory_has_our_logits(memory, tmp_path):
    ours, theirs = both(tmp_path, memory=memory, memory_segments=1)
    tokens = draw_tokens(1, LENGTH)
    close(logits_of(theirs, tokens), read(ours, tokens)[0])


def test_the_window_mask_has_our_logits(tmp_path):
    ours, theirs = both(tmp_path, memory=Fam(2), memory_segments=2, window_mask=True)
    tokens = draw_tokens(1, LENGTH)
    close(logits_of(theirs, tokens), read(ours, tokens)[0])
    theirs.c.window_mask = False
    assert np.abs(logits_of(theirs, tokens) - read(ours, tokens)[0]).max() > 100 * TOLERANCE


def test_a_text_in_pieces_has_the_logits_of_the_whole_and_the_state_does_not_grow(gated):
    theirs, tokens = gated[1], draw_tokens(2, 9 * BLOCK + 5)
    whole = logits_of(theirs, tokens)
    state, parts, sizes, at = None, [], set(), 0
    for size in (1, 6, 1, 1, 8, 13, 24, 7, 1, 15):
        with torch.no_grad():
            out = theirs(torch.from_numpy(tokens[:, at : at + size]), cache=state)
        state = out.get("cache", out.get("past_key_values"))
        parts.append(out.logits.numpy())
        sizes.add(sum(x.numel() for xs in (state.memory, state.keys, state.values) for x in xs))
        at += size
    assert at == tokens.shape[1] == state.get_seq_length() and len(sizes) == 1
    close(np.concatenate(parts, axis=1), whole)


def test_padding_may_be_anywhere_and_changes_nothing(gated):
    theirs, lengths = gated[1], (3, BLOCK, 2 * BLOCK + 1, LENGTH)
    texts = [draw_tokens(length, seed=length) for length in lengths]
    left, right, amid = (np.zeros((len(texts), LENGTH), int) for _ in range(3))
    masks = [np.zeros_like(left) for _ in range(3)]
    rng = np.random.default_rng(0)
    for i, text in enumerate(texts):
        places = (
            np.arange(LENGTH - len(text), LENGTH), np.arange(len(text)),
            np.sort(rng.choice(LENGTH, len(text), replace=False)),
        )  # fmt: skip
        for tokens, mask, place in zip((left, right, amid), masks, places):
            tokens[i, place], mask[i, place] = text, 1
    alone = [logits_of(theirs, text[None])[0] for text in texts]
    for tokens, mask in zip((left, right, amid), masks):
        found = logits_of(theirs, tokens, mask)
        for i in range(len(texts)):
            close(found[i][mask[i] == 1], alone[i])
        last = logits_of(theirs, tokens, mask, logits_to_keep=1)
        close(last[:, 0], [logits[-1] for logits in alone])
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\], with 0 at padding"):
        logits_of(theirs, left, masks[0][:, None, :, None])


# ------------------------------------------------------------------ writing


def written(ours, tokens, sampling):
    """Tokens that famx writes after `tokens [B, L]`."""
    logits, state = read(ours, tokens)
    run = jax.jit(lambda p, logits, state: generate(ours.model.module, p, logits, state, sampling).tokens)
    return np.asarray(run(ours.params, logits[:, -1], state))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("segments", [0, 2])
def test_greedy_generation_is_ours_over_several_blocks(segments, tmp_path):
    ours, theirs = both(tmp_path, "qwen3", memory=GATED, memory_segments=segments)
    tokens = draw_tokens(3, BLOCK + 5)
    greedy = dict(max_new_tokens=3 * BLOCK, do_sample=False)
    found = theirs.generate(torch.from_numpy(tokens), **greedy)[:, tokens.shape[1] :]
    wanted = written(ours, tokens, Sampling(3 * BLOCK))
    np.testing.assert_array_equal(found, wanted)
    again = theirs.generate(torch.from_numpy(tokens), use_cache=False, **greedy)[:, tokens.shape[1] :]
    np.testing.assert_array_equal(again, wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_lengths_are_continued_as_each_alone(side, gated):
    theirs, lengths = gated[1], (2, BLOCK - 1, BLOCK + 4)
    longest = max(lengths)
    tokens, mask = np.zeros((2, len(lengths), longest), int)
    for i, length in enumerate(lengths):
        place = slice(longest - length, None) if side == "left" else slice(length)
        tokens[i, place], mask[i, place] = draw_tokens(length, seed=i), 1
    tokens, mask = torch.from_numpy(tokens), torch.from_numpy(mask)
    options = dict(max_new_tokens=2 * BLOCK, do_sample=False)
    found = theirs.generate(tokens, attention_mask=mask, **options)[:, longest:]
    for i in range(len(lengths)):
        alone = theirs.generate(tokens[i][mask[i] == 1][None], **options)
        np.testing.assert_array_equal(found[i], alone[0, lengths[i] :])


def test_sampling_draws_from_our_distribution(gated):
    ours, theirs = gated
    tokens, count = draw_tokens(2, 5), 2 * BLOCK
    torch.manual_seed(0)
    out = theirs.generate(
        torch.from_numpy(tokens), max_new_tokens=count, do_sample=True, temperature=0.7, top_k=9,
        top_p=0.8, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    sequences = out.sequences.numpy()
    logits = read(ours, sequences)[0][:, tokens.shape[1] - 1 : -1]
    assert len({tuple(row) for row in sequences[:, tokens.shape[1] :]}) == 2
    for i, scores in enumerate(out.scores):
        wanted = jax.nn.softmax(restrict(jnp.asarray(logits[:, i] / 0.7), 9, 0.8))
        close(torch.softmax(scores, -1).numpy(), wanted)
        assert (np.take_along_axis(np.asarray(wanted), sequences[:, [5 + i]], 1) > 0).all()


def test_a_state_is_continued_as_often_as_one_likes(gated):
    theirs, text = gated[1], torch.from_numpy(draw_tokens(2, 3 * BLOCK + 2))
    options = dict(max_new_tokens=BLOCK, do_sample=False)
    state = theirs.read(text)
    for seed in (5, 6):
        tokens = torch.cat([text, torch.from_numpy(draw_tokens(2, 4, seed=seed))], 1)
        found = theirs.generate(tokens, state=copy.deepcopy(state), **options)
        np.testing.assert_array_equal(found, theirs.generate(tokens, **options))
    with pytest.raises(ValueError, match="generate.. needs the tokens read and the new ones"):
        theirs.generate(text[:, :3], state=copy.deepcopy(state), **options)


def test_beam_search_follows_its_beams(gated):
    theirs, tokens = gated[1], torch.from_numpy(draw_tokens(2, 5))
    options = dict(max_new_tokens=2 * BLOCK, num_beams=3, do_sample=False)
    found = theirs.generate(tokens, **options)
    np.testing.assert_array_equal(found, theirs.generate(tokens, use_cache=False, **options))


# ------------------------------------------------------------------ training, dtypes, and back


def test_the_loss_has_our_gradient(gated):
    ours, theirs = gated
    tokens = draw_tokens(2, LENGTH)

    def loss(params):
        logits = ours.model.module.apply({"params": params}, jnp.asarray(tokens))[0][:, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -jnp.mean(picked)

    wanted, gradient = jax.jit(jax.value_and_grad(loss))(ours.params)
    theirs.zero_grad()
    found = theirs(torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss
    found.backward()
    assert found.item() == pytest.approx(float(wanted), abs=1e-5)
    named = dict(theirs.named_parameters())
    scale = float(np.abs(gradient["memory"]["prompt"]).max())
    assert scale > 0
    prompt = named["model.memory.prompt"].grad.numpy()
    np.testing.assert_allclose(prompt, gradient["memory"]["prompt"], rtol=0, atol=1e-3 * scale)
    value = np.asarray(gradient["layers"]["value"]["kernel"][0])
    found = named["model.layers.0.self_attn.v_proj.weight"].grad.numpy().T.reshape(value.shape)
    np.testing.assert_allclose(found, value, rtol=0, atol=1e-3 * np.abs(value).max())


def test_in_bfloat16_the_memory_stays_in_float32(gated, tmp_path):
    ours, _ = gated
    export(ours, tmp_path / "out", "bfloat16")
    theirs, tokens = load(tmp_path / "out"), draw_tokens(1, LENGTH)
    assert theirs.dtype == torch.bfloat16
    prompt, state = theirs.model.memory.prompt, theirs.read(torch.from_numpy(tokens))
    assert prompt.dtype == state.memory[0].dtype == torch.float32
    np.testing.assert_array_equal(prompt.detach(), ours.params["memory"]["prompt"])
    config = dataclasses.replace(ours.model.config, dtype="bfloat16")
    wanted, _ = read(TrainedModel(_with(ours.model, config), ours.params, 0, ours.directory), tokens)
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens)).logits.float().numpy()
    exact = read(ours, tokens)[0]
    error = lambda logits: np.abs(logits.astype(np.float32) - exact).mean()
    assert error(found) < 2 * error(wanted)


def _with(model, config):
    return dataclasses.replace(model, module=type(model.module)(config))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_what_transformers_saves_is_imported_with_its_memory(name, tmp_path):
    ours, theirs = both(tmp_path, name, memory=GATED, memory_segments=2)
    with torch.no_grad():
        theirs.model.memory.prompt.mul_(2)  # as after a training
    theirs.save_pretrained(tmp_path / "saved")
    write_model(plan_import(open_source(tmp_path / "saved")), tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.model.config == ours.model.config
    doubled = {**ours.params, "memory": {"prompt": 2 * ours.params["memory"]["prompt"]}}
    tiny.assert_identical(again.params, doubled)
    close(logits_of(load(tmp_path / "saved"), draw_tokens(1, 20)), logits_of(theirs, draw_tokens(1, 20)))


def test_every_parameter_is_loaded_and_none_is_left(tmp_path):
    ours = imported("gemma3", tmp_path, memory=Fam(2, start_from="prefix"))
    export(ours, tmp_path / "out")
    make = transformers.AutoModelForCausalLM.from_pretrained
    theirs, report = make(tmp_path / "out", trust_remote_code=True, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    count = sum(p.numel() for p in theirs.parameters())
    assert count == sum(x.size for x in jax.tree.leaves(ours.params))


def test_it_is_not_loaded_without_its_code(gated):
    directory = gated[0].directory.parent.parent / "out"
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
