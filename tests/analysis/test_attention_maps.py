"""Attention maps against the oracle, which keeps every attention weight, and their summaries."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from memories_table import REMEMBERING
from modules.helpers import config, initial, precision, random_params, random_tokens, read
from modules.oracle import Oracle

from famx.analysis import AttentionMaps, AttentionReader
from famx.analysis.pictures import NO_TOKEN, memory_on_grid
from famx.memories import Fam
from famx.models import DecoderModel
from famx.modules import Decoder, Memory
from famx.modules.frontends import Frontend, Mixed, Vectors

S = 4
FLOAT64 = dict(dtype="float64", param_dtype="float64")
VARIANTS = {
    "plain": {},
    "GQA, M 2": dict(num_heads=4, num_kv_heads=2, head_dim=4, memory_segments=2),
    "gated": dict(memory=Fam(2, update="gated", normalize=True)),
    "MQA, softcap, QK norm": dict(num_kv_heads=1, attention_softcap=2.0, qk_norm=True),
    "window mask, M 2": dict(window_mask=True, memory_segments=2, memory=Fam(3)),
    "bias": dict(memory=Fam(2, bias="zero", adapter_rank=1), num_heads=4, num_kv_heads=2, head_dim=4),
    "BSWA": dict(memory=Memory(), memory_segments=2),
    "M 0, prefix, float positions": dict(
        memory_segments=0, memory=Fam(2, start_from="prefix", positions="float")
    ),
    "blocks of one token": dict(block_size=1, memory=Fam(1), memory_segments=2),
    "local and no positions": dict(rope_layers=("local", "none"), local_rope_base=100.0),
}


def tolerance(c, tokens: int) -> float:
    """What rounding may change in float32 maps of so many tokens: in scores, which reach 8 here."""
    return rounding.bound(rounding.of_decoder(c, tokens), scale=8)


class Watching(Oracle):
    """Notes the weights of every query, block after block and layer after layer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.notes = []

    def attend(self, *args):
        out = super().attend(*args)
        self.weights.append(out[1])
        return out

    def first_memories(self, offset):
        self.weights = []
        return super().first_memories(offset)

    def block(self, w, inputs, *args):
        self.weights = []
        out = super().block(w, inputs, *args)
        self.notes.append((self.weights[: len(inputs)], self.weights[len(inputs) :]))
        return out


def expected(c, params, tokens):
    """`(tokens [T, layers, H, S, X], memory [T, layers, H, N, N + S])` of one sequence."""
    oracle = Watching(c, params)
    oracle.read(tokens)
    n, past, size = c.memory_columns, c.memory_segments * c.block_size, c.block_size
    count = -(-len(tokens) // size)
    of_tokens = np.zeros((count, c.num_layers, c.num_heads, size, n + past + size))
    of_memory = np.zeros((count, c.num_layers, c.num_heads, n, n + size))
    for k, (weights, compressing) in enumerate(oracle.notes):
        t, layer = divmod(k, c.num_layers)
        for slot, found in enumerate(weights):
            row = of_tokens[t, layer, :, slot]
            row[:, :n] = found[:, :n]
            for position, weight in enumerate(found[:, n:].T):
                column = position - t * size + past
                assert column >= 0 or not weight.any()
                if column >= 0:
                    row[:, n + column] = weight
        if compressing:
            of_memory[t, layer] = np.swapaxes(compressing, 0, 1)
    return of_tokens, of_memory


@functools.cache
def reader(c, top=2):
    return AttentionReader(Decoder(c), top)


def read_maps(c, params, tokens, **choice):
    with precision(c):
        return reader(c).read(params, [tokens], **choice)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", VARIANTS)
def test_maps_are_those_of_the_oracle(name):
    c = config(**VARIANTS[name], **FLOAT64)
    params, tokens = random_params(c), random_tokens(1, 3 * S + 3)[0]
    maps = read_maps(c, params, tokens)
    of_tokens, of_memory = expected(c, params, tokens)
    # RoPE's frequencies are rounded to 2^-33 turns, 7e-10 radians, per token of distance.
    np.testing.assert_allclose(maps.tokens, of_tokens, atol=1e-9 * len(tokens))
    np.testing.assert_allclose(maps.memory, of_memory, atol=1e-9 * len(tokens))
    size, count = c.block_size, len(of_tokens)
    last = len(tokens) - (count - 1) * size
    assert maps.blocks == tuple(range(count)) and maps.layers == (0, 1)
    assert maps.slots.tolist() == [[0, size]] * (count - 1) + [[0, last]]
    np.testing.assert_allclose(maps.tokens[:-1].sum(-1), 1)
    np.testing.assert_allclose(maps.tokens[-1, ..., :last, :].sum(-1), 1)
    np.testing.assert_allclose(maps.memory[: len(tokens) // size].sum(-1), 1)
    assert not maps.memory[len(tokens) // size :].any()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", VARIANTS)
def test_summaries_are_the_means_of_the_maps(name):
    c = config(**VARIANTS[name], **FLOAT64)
    params, tokens = random_params(c), random_tokens(1, 3 * S + 3)[0]
    maps, n, past = read_maps(c, params, tokens), c.memory_columns, c.memory_segments * c.block_size
    found, size = maps.summary, c.block_size
    for t, (first, end) in enumerate(maps.slots):
        p = maps.tokens[t, :, :, first:end]
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = lambda x: -np.where(x > 0, x * np.log(x), 0).sum(-1).mean(-1)
            means = {
                "on_memory": p[..., :n].sum(-1).mean(-1),
                "on_past": p[..., n : n + past].sum(-1).mean(-1),
                "on_block": p[..., n + past :].sum(-1).mean(-1),
                "entropy": entropy(p),
                "read": p[..., :n].mean((1, 2)),
            }
            if n and end == size:
                m = maps.memory[t]
                sources = m[..., n:].mean(1)
                means |= {
                    "memory_on_memory": m[..., :n].sum(-1).mean(-1),
                    "memory_entropy": entropy(m),
                    "written": sources.sum(-1),
                    "place": (sources * np.arange(size)).sum(-1) / sources.sum(-1),
                    "source_weights": -np.sort(-sources, axis=-1)[..., :2],
                }
                slots = found.source_slots[t]
                picked = np.take_along_axis(sources, slots, axis=-1)
                np.testing.assert_allclose(picked, means["source_weights"])
                np.testing.assert_array_equal(found.source_ids[t], tokens[t * size :][slots])
        for figure, values in means.items():
            np.testing.assert_allclose(getattr(found, figure)[t], values, atol=1e-9, err_msg=figure)
    assert found.updates == (len(tokens) // size if n else 0)
    assert found.counts.tolist() == np.diff(maps.slots).ravel().tolist()
    mass = found.mean("on_memory") + found.mean("on_past") + found.mean("on_block")
    np.testing.assert_allclose(mass, 1)
    for figure in ("on_memory", "read"):  # every token counts the same
        values = getattr(found, figure)
        weighted = sum(n * v for n, v in zip(found.counts, values)) / len(tokens)
        np.testing.assert_allclose(found.mean(figure), weighted, atol=1e-9)
    assert (found.mean("written") is None) == (found.updates == 0)
    assert found.to_dict()["tokens"] == len(tokens)


@settings(max_examples=10)
@given(data=st.data())
def test_pieces_choices_and_places_to_go_on_from_change_no_number(data):
    c = config(memory_segments=2)
    params, tokens = random_params(c), random_tokens(1, 30)[0]
    whole = read_maps(c, params, tokens)
    draw = lambda strategy: data.draw(strategy)
    cut = draw(st.integers(0, 29))
    state = None
    if cut:
        state = initial(c, params, 1)
        valid = np.arange(30)[None] < cut
        _, state = read(c, params, np.where(valid, tokens, 0), state, valid)
    pieces = np.split(tokens[cut:], sorted(draw(st.lists(st.integers(0, 30 - cut), max_size=4))))
    pick = lambda values: st.lists(st.sampled_from(values), unique=True, min_size=1)
    blocks = draw(st.none() | pick(range(cut // S, 8)))
    if blocks is not None and draw(st.booleans()):
        blocks = [b - 8 for b in blocks]
    layers, heads = (draw(st.none() | pick((0, 1))) for _ in range(2))
    maps, near = reader(c).read(params, pieces, layers, heads, blocks, state), tolerance(c, 30)
    assert maps.blocks == tuple(sorted(b % 8 for b in blocks or range(cut // S, 8)))
    assert maps.layers == tuple(layers or (0, 1)) and maps.heads == tuple(heads or (0, 1))
    for i, block in enumerate(maps.blocks):
        first, end = max(cut - block * S, 0), min(30 - block * S, S)
        assert maps.slots[i].tolist() == [first, end]
        grid = np.ix_(maps.layers, maps.heads)
        np.testing.assert_allclose(
            maps.tokens[i][..., first:end, :], whole.tokens[block][grid][..., first:end, :], atol=near
        )
        assert not maps.tokens[i][..., :first, :].any()
        np.testing.assert_allclose(maps.memory[i], whole.memory[block][grid], atol=near)
        positions = (block - 2) * S + np.arange(3 * S)
        known = (positions >= cut) & (positions < 30)
        ids = np.where(known, tokens[np.clip(positions, 0, 29)], NO_TOKEN)
        np.testing.assert_array_equal(maps.ids[i], ids)
    here, there = maps.summary, whole.summary
    np.testing.assert_allclose(here.written, there.written[cut // S :], atol=near)
    positions = np.arange(here.first_block, 7)[:, None, None, None] * S + here.source_slots
    ids = np.where(positions >= cut, tokens[positions], NO_TOKEN)
    np.testing.assert_array_equal(here.source_ids, ids)
    assert maps.summary.blocks == range(cut // S, 8)


@pytest.mark.sampled(15)
@pytest.mark.parametrize("name", REMEMBERING)
def test_maps_of_every_memory_go_on_within_a_block(name):
    c = config(memory=REMEMBERING[name], num_layers=3)
    params, tokens = random_params(c), random_tokens(1, 14)[0]
    whole = reader(c).read(params, [tokens])
    _, state = read(c, params, tokens[None, :6])
    maps = reader(c).read(params, [tokens[6:]], state=state)
    assert maps.blocks == (1, 2, 3) and maps.memory.shape == whole.memory[1:].shape
    near = tolerance(c, 14)
    np.testing.assert_allclose(maps.tokens[0, ..., 2:, :], whole.tokens[1, ..., 2:, :], atol=near)
    np.testing.assert_allclose(maps.tokens[1:], whole.tokens[2:], atol=near)
    np.testing.assert_allclose(maps.memory, whole.memory[1:], atol=near)


def test_a_long_text_keeps_what_was_asked_for_and_compiles_nothing_again():
    c = config()
    params, fresh = random_params(c), AttentionReader(Decoder(c))
    for blocks in (2, 3, 60):
        arrays = []
        rows = (arrays.append(len(jax.live_arrays())) or row for row in random_tokens(blocks, S))
        maps = fresh.read(params, rows, [1], [0], [1, -1])
        assert max(arrays[-9:]) <= max(arrays[:4])  # nothing piles up on the device
        assert maps.blocks == tuple(sorted({1, blocks - 1})) and len(maps.summary.counts) == blocks
        assert maps.tokens.shape[1:3] == maps.memory.shape[1:3] == (1, 1)
        kept = maps.tokens.nbytes + maps.memory.nbytes + maps.rollout.nbytes
        assert kept == fresh.num_bytes(len(maps.blocks), 1, 1)
    assert fresh._step._cache_size() == fresh._maps._cache_size() == fresh._initial._cache_size() == 1


def test_far_into_a_text_maps_are_those_of_its_beginning():
    # Without a past and with the prompt as memory, distances are all that a map depends on.
    c = config(memory_segments=0)
    params, tokens = random_params(c), random_tokens(1, S)[0]
    near = reader(c).read(params, [tokens])
    state = initial(c, params, 1)
    far = 2**31 - 2 * S
    moved = state.replace(position=state.position + far)
    maps = reader(c).read(params, [tokens], state=moved)
    assert maps.blocks == (far // S,)
    np.testing.assert_allclose(maps.tokens, near.tokens, atol=tolerance(c, S))
    with pytest.raises(ValueError, match="positions end at 2,147,483,647"):
        reader(c).read(params, [np.tile(tokens, 3)], state=moved)


def of_vectors(c, params):
    """A model that reads one-hot vectors as the given one reads ids, and its parameters."""
    kernel = np.asarray(params["embedding"])
    frontend = {"kernel": kernel, "bias": np.zeros(kernel.shape[1], kernel.dtype)}
    changed = dataclasses.replace(c, frontend=Vectors("x", c.vocab_size))
    return changed, {**params, "frontend": frontend}


def test_maps_of_vectors_are_those_of_ids_with_the_same_embeddings():
    c = config(memory_segments=2)
    params, tokens = random_params(c), random_tokens(1, 3 * S + 2)[0]
    whole = read_maps(c, params, tokens)
    changed, changed_params = of_vectors(c, params)
    vectors = np.eye(c.vocab_size)[tokens]
    for cuts in ([], [1, 7, 7]):
        pieces = [{"x": piece} for piece in np.split(vectors, cuts)]
        maps = reader(changed).read(changed_params, pieces)
        for name in ("tokens", "memory", "rollout"):
            near = tolerance(c, len(tokens))
            np.testing.assert_allclose(getattr(maps, name), getattr(whole, name), atol=near)
        np.testing.assert_array_equal(maps.slots, whole.slots)
        np.testing.assert_array_equal(maps.records.predicted, whole.records.predicted)
        assert (maps.ids == NO_TOKEN).all() and not maps.records.rank.any()
        assert (maps.summary.source_ids == NO_TOKEN).all() and maps.sources(0, 0)[0][0][1] == "·"


def test_ids_among_the_features_of_a_mixture_are_kept():
    c = config(frontend=Mixed((Frontend(), Vectors("x", 2))))
    params = nn.unbox(jax.jit(DecoderModel(Decoder(c)).init_params)(jax.random.key(0)))
    tokens = random_tokens(1, 2 * S)[0]
    features = {"tokens": tokens, "x": np.ones((2 * S, 2)), "kinds": np.arange(2 * S) % 2}
    maps = reader(c).read(params, [features], label=lambda i: f"t{i}")
    np.testing.assert_array_equal(maps.ids.ravel()[-S:], tokens[S:])
    assert not maps.records.rank.any()
    with pytest.raises(ValueError, match="Token id 99 is not in the vocabulary"):
        reader(c).read(params, [features | {"tokens": np.full(2 * S, 99)}])


def test_what_a_model_does_not_read_is_refused():
    c = config(memory_segments=2)
    params = random_params(c)
    changed, changed_params = of_vectors(c, params)
    width = c.vocab_size
    for of, pieces, sentence in [
        (c, [{"x": np.zeros((S, width))}], "The model reads tokens alone: give ids, or set Decoder"),
        (changed, [[1, 2]], "The model reads 'x' ("),
        (changed, [{"y": np.zeros((S, width))}], "The model reads 'x' ("),
        (changed, [{"x": np.zeros((S, 3))}], "The feature 'x' has the shape [4, 3], but should have"),
    ]:
        with pytest.raises(ValueError) as caught:
            reader(of).read(changed_params if of is changed else params, pieces)
        assert str(caught.value).startswith(sentence)


def test_the_models_own_computation_settings_do_not_matter():
    c, tokens = config(), random_tokens(1, 18)[0]
    params = random_params(c)
    other = dataclasses.replace(c, blocks_per_chunk=3, remat="full", attention_backend="blockwise")
    first, second = (AttentionReader(Decoder(x)).read(params, [tokens]) for x in (c, other))
    np.testing.assert_allclose(first.tokens, second.tokens, atol=tolerance(c, 18))


# ---------------------------------------------------------------- pictures


def test_a_picture_puts_the_memory_before_each_block():
    c = config(memory_segments=2, window_mask=True)
    params, tokens = random_params(c), random_tokens(1, 4 * S + 3)[0]
    maps = read_maps(c, params, tokens, label=lambda i: f"t{i}", blocks=[2, 3, 4])
    n, past = c.memory_columns, 2 * S
    picture = maps.as_picture(1, 0)
    layout = lambda axis: [(b, m) for *_, b, m in axis.segments()]
    assert layout(picture.columns) == [
        (0, False), (1, False), (2, True), (2, False), (3, True), (3, False), (4, True), (4, False),
    ]  # fmt: skip
    # The last block is incomplete: the memory is not updated, but read.
    assert layout(picture.rows) == [(2, True), (2, False), (3, True), (3, False), (4, False)]
    seen = {}
    for row in range(len(picture.rows.block)):
        b, slot = picture.rows.block[row], picture.rows.slot[row]
        i = maps.blocks.index(b)
        for column in range(len(picture.columns.block)):
            value = picture.values[row, column]
            there, k = picture.columns.block[column], picture.columns.slot[column]
            if picture.rows.memory[row]:
                if there == b:
                    key = k if picture.columns.memory[column] else n + k
                    assert value == maps.memory[i, 1, 0, slot, key]
                else:
                    assert np.isnan(value)
            elif picture.columns.memory[column]:
                assert value == maps.tokens[i, 1, 0, slot, k] if there == b else np.isnan(value)
            else:
                distance = (b * S + slot) - (there * S + k)
                if 0 <= distance <= past and b - there <= 2:
                    assert value == maps.tokens[i, 1, 0, slot, n + (there - b + 2) * S + k]
                else:
                    assert np.isnan(value)
            seen[row] = seen.get(row, 0) + np.nan_to_num(value)
    np.testing.assert_allclose(list(seen.values()), 1, atol=1e-6)
    assert picture.columns.labels[:2] == (f"t{tokens[0]}", f"t{tokens[1]}")
    assert picture.columns.labels[2 * S : 2 * S + n] == ("F0", "F1") == picture.rows.labels[:n]
    assert picture.rows.labels[-1] == f"t{tokens[-1]}" and len(picture.rows.labels) == 2 * (n + S) + 3


def test_a_picture_of_one_block_and_the_mean_over_heads():
    c = config(memory_segments=2)
    maps = read_maps(c, random_params(c), random_tokens(1, 2 * S)[0])
    alone = maps.as_picture(0, blocks=1)
    assert [(b, m) for *_, b, m in alone.columns.segments()] == [(0, False), (1, True), (1, False)]
    heads = [maps.as_picture(0, head, 1).values for head in (0, 1)]
    np.testing.assert_allclose(alone.values, np.mean(heads, axis=0), atol=1e-6)
    assert alone.head is None


def test_the_memory_on_a_grid_has_the_weights_of_its_positions():
    c = config(block_size=8)
    maps = read_maps(c, random_params(c), random_tokens(1, 20)[0], layers=[1])
    n = c.memory_columns
    found = memory_on_grid(maps, 1, 1, (2, 3), first=1, head=1)
    assert found.shape == (n, 2, 3)
    for token, row, column in np.ndindex(n, 2, 3):
        slot = 1 + 3 * row + column
        assert found[token, row, column] == maps.memory[1, 0, 1, token, n + slot]
    heads = [memory_on_grid(maps, 1, 1, (4, 2), head=head) for head in (0, 1)]
    mean = memory_on_grid(maps, 1, 1, (4, 2))
    np.testing.assert_allclose(mean, np.mean(heads, axis=0), atol=1e-6)
    np.testing.assert_allclose(mean.sum((1, 2)), maps.summary.written[1, 1], atol=1e-5)
    for arguments, sentence in [
        (dict(layer=0, block=1), "There is no map of layer 0; kept layers: 1."),
        (dict(layer=1, block=2), "The memory did not attend to block 2, so there is nothing to draw."),
        (dict(layer=1, block=1, first=3), "A grid of 2 x 3 positions from slot 3 does not fit into a"),
        (dict(layer=1, block=1, first=-1), "A grid of 2 x 3 positions from slot -1 does not fit"),
    ]:
        with pytest.raises(ValueError) as caught:
            memory_on_grid(maps, shape=(2, 3), **arguments)
        assert str(caught.value).startswith(sentence)


def test_sources_are_named_with_their_texts():
    c = config()
    tokens = random_tokens(1, 3 * S)[0]
    maps = read_maps(c, random_params(c), tokens, label=lambda i: f"t{i}", blocks=())
    found = maps.sources(1, 2)
    assert len(found) == c.memory_columns and maps.blocks == ()
    for sources in found:
        assert [text for _, text, _ in sources] == [f"t{tokens[2 * S + slot]}" for slot, *_ in sources]
        assert sources[0][2] >= sources[1][2] > 0


def test_what_was_saved_is_loaded(tmp_path):
    c = config(memory_segments=2)
    maps = read_maps(c, random_params(c), random_tokens(1, 3 * S + 1)[0], blocks=[1, -1], label=chr)
    maps.save(tmp_path / "maps.npz")
    loaded = AttentionMaps.load(tmp_path / "maps.npz")
    flat = lambda x: jax.tree.leaves(dataclasses.asdict(x))
    for a, b in zip(flat(maps), flat(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.texts == maps.texts and loaded.blocks == (1, 3) and loaded.tokens.dtype == np.float32
    np.testing.assert_array_equal(loaded.as_picture(0, 1).values, maps.as_picture(0, 1).values)


# ---------------------------------------------------------------- bad input


def test_bad_input_is_told_in_one_sentence(tmp_path):
    c = config()
    params, tokens = random_params(c), random_tokens(1, 2 * S + 1)[0]
    for arguments, sentence in [
        (dict(layers=[2]), "There is no layer 2: the model has layers 0 to 1."),
        (dict(layers=[]), "No layer is selected: select at least one, or leave layers out for all."),
        (dict(heads=[-1]), "There is no head -1: the model has heads 0 to 1."),
        (dict(blocks=[3]), "There is no block 3: the text has the blocks 0 to 2."),
        (dict(blocks=[-4]), "There is no block -4: the text has the blocks 0 to 2."),
        (dict(state=initial(c, params, 2)), "Maps are of one text, but the state has 2 examples."),
    ]:
        with pytest.raises(ValueError) as caught:
            read_maps(c, params, tokens, **arguments)
        assert str(caught.value) == sentence
    for pieces, sentence in (([], "nothing to read"), ([[99]], "Token id 99 is not in the vocabulary")):
        with pytest.raises(ValueError, match=sentence):
            reader(c).read(params, pieces)
    with pytest.raises(ValueError, match="top must be at least 1, got 0."):
        AttentionReader(Decoder(c), top=0)
    maps = read_maps(c, params, tokens, layers=[1], blocks=[0])
    for call, sentence in [
        (lambda: maps.as_picture(0), "There is no map of layer 0; kept layers: 1."),
        (lambda: maps.as_picture(1, 7), "There is no map of head 7; kept heads: 0, 1."),
        (lambda: maps.as_picture(1, blocks=2), "There is no map of block 2; kept blocks: 0."),
        (lambda: maps.sources(1, 2), "The memory did not attend to block 2, so there are no sources."),
        (lambda: maps.sources(2, 0), "There is no layer 2: the model has layers 0 to 1."),
        (lambda: dataclasses.replace(maps, blocks=()).as_picture(1), "There is nothing to draw: no "),
    ]:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(sentence)
    (tmp_path / "x.npz").write_bytes(b"no maps")
    np.savez(tmp_path / "y.npz", a=1)
    for name in ("x.npz", "y.npz"):
        with pytest.raises(ValueError, match=f"{name} does not hold attention maps of this version"):
            AttentionMaps.load(tmp_path / name)
