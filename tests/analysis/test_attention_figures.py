"""Figures show the numbers of the maps, whatever the texts hold."""

import functools
import io

import numpy as np
import pytest
from matplotlib import image as images
from matplotlib.colors import to_hex
from modules.helpers import config, random_params, random_tokens

from famx.analysis import AttentionReader, figures
from famx.memories import Fam
from famx.modules import Decoder, Memory

S, N, M = 8, 3, 2
TEXTS = ["a", "$x^2", "<b>", "</script>", "@DATA@", "a\\b", "&amp;", "c", "␣", '"', "梦", "$5", "x" * 40]
pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from")


@functools.cache
def make_maps(**changes):
    sizes = dict(block_size=S, memory=Fam(N), memory_segments=M, num_heads=4, head_dim=4)
    c = config(**{**sizes, **changes})
    tokens = random_tokens(1, 4 * S + 3)[0]
    return AttentionReader(Decoder(c)).read(random_params(c), [tokens], label=lambda i: TEXTS[i])


def drawn(figure):
    """The figure after it was drawn, and the shapes of its picture."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=60)
    file.seek(0)
    pixels = images.imread(file)
    assert pixels[..., :3].std() > 0.01
    return figure


def shown(axes):
    return np.ma.filled(axes.get_images()[0].get_array().astype(float), np.nan)


# ---------------------------------------------------------------- figures


def test_a_map_shows_probabilities_tokens_and_margins():
    maps = make_maps()
    picture = maps.as_picture(1, 0, 3)
    axes = drawn(figures.map_figure(picture)).axes[0]
    np.testing.assert_array_equal(shown(axes), picture.values)
    labels = [label.get_text().replace(r"\$", "$") for label in axes.get_yticklabels()]
    wanted = [text if len(text) <= 12 else text[:11] + "…" for text in picture.rows.labels]
    assert labels == wanted and len(axes.get_xticklabels()) == N + (M + 1) * S
    strips = [line for line in axes.get_lines() if line.get_linewidth() == figures._STRIP]
    colors = [to_hex(line.get_color()).upper() for line in strips]
    memory, past, own = figures.MEMORY, figures.PAST, figures.OWN
    assert colors == [memory, own, past, past, memory, own]
    assert [text.get_text() for text in axes.texts] == ["block 1", "block 2", "FAM", "block 3"]


def test_many_tokens_are_not_named_one_by_one(monkeypatch):
    monkeypatch.setattr(figures, "_LABELLED", 20)
    axes = drawn(figures.map_figure(make_maps().as_picture(0))).axes[0]
    blocks = [f"block {block}" for block in range(5)]
    assert [label.get_text() for label in axes.get_yticklabels()] == blocks
    assert axes.get_xticklabels() == []  # named above
    assert axes.get_xlabel().startswith("keys (FAM: as the block finds it;")
    names = [x for b in range(4) for x in ("FAM", f"block {b}")] + ["FAM", "4"]  # a narrow one
    assert [text.get_text() for text in axes.texts] == names


def test_a_very_large_map_shows_the_largest_of_neighbouring_cells(monkeypatch):
    monkeypatch.setattr(figures, "_DRAWN", 15)
    picture = make_maps().as_picture(0, 0, 3)  # 11 rows, 27 columns
    axes = drawn(figures.map_figure(picture)).axes[0]
    found = shown(axes)
    assert found.shape == (11, 14) and axes.get_images()[0].get_extent() == [-0.5, 26.5, 10.5, -0.5]
    for i in range(11):
        for j in range(14):
            part = picture.values[i, 2 * j : 2 * j + 2]
            part = part[~np.isnan(part)]
            assert found[i, j] == part.max() if part.size else np.isnan(found[i, j])


def test_heads_stand_side_by_side_on_one_scale():
    maps = make_maps()
    figure = drawn(figures.heads_figure(maps, 1, 2))
    assert [axes.get_title() for axes in figure.axes[:4]] == [f"head {head}" for head in range(4)]
    for head, axes in enumerate(figure.axes[:4]):
        np.testing.assert_array_equal(shown(axes), maps.as_picture(1, head, 2).values)
    tops = {axes.get_images()[0].norm.vmax for axes in figure.axes[:4]}
    assert tops == {max(maps.tokens[2, 1].max(), maps.memory[2, 1].max())}


def test_masses_are_stacked_to_one():
    summary = make_maps().summary
    left, right = drawn(figures.mass_figure(summary)).axes
    heights = lambda axes: np.array([bar.get_height() for bar in axes.patches]).reshape(-1, 2)
    parts = [summary.mean(name).mean(axis=1) for name in ("on_memory", "on_past", "on_block")]
    np.testing.assert_allclose(heights(left), parts)
    np.testing.assert_allclose(heights(right)[0], summary.mean("memory_on_memory").mean(axis=1))
    np.testing.assert_allclose(heights(right).sum(axis=0), 1)
    dots = left.collections[0].get_offsets()
    np.testing.assert_allclose(dots[:, 1], summary.mean("on_memory").ravel())


def test_entropy_and_travel_are_those_of_the_summary():
    summary = make_maps().summary
    for axes, name in zip(drawn(figures.entropy_figure(summary)).axes, ("entropy", "memory_entropy")):
        lines = [line.get_ydata() for line in axes.get_lines()]
        np.testing.assert_allclose(np.transpose(lines), getattr(summary, name).mean(axis=-1))
    found = drawn(figures.travel_figure(summary, 1)).axes
    for axes, name in zip(found[:3], ("read", "written", "place")):
        np.testing.assert_allclose(shown(axes), getattr(summary, name)[:, 1].T)
    assert len(shown(found[0]).T) == 5 and len(shown(found[1]).T) == 4  # the last block is incomplete
    assert {axes.get_xlim() for axes in found[:3]} == {(-0.5, 4.5)}


def test_sources_are_written_out():
    maps = make_maps()
    axes = drawn(figures.sources_figure(maps, 1, 2)).axes[0]
    texts = iter(text.get_text().replace(r"\$", "$") for text in axes.texts)
    for sources in maps.sources(1, 2):
        for slot, text, weight in sources:
            text = text if len(text) <= 12 else text[:11] + "…"
            assert next(texts) == f"{text}  [{slot}]  {weight:.2f}"


def test_weights_lie_over_the_image_on_one_scale():
    image, weights = np.eye(8), np.arange(3 * 6).reshape(3, 2, 3) / 20
    figure = drawn(figures.overlay_figure(image, weights, ["a", "b", "c"], across=2))
    assert [axes.get_title() for axes in figure.axes[:4]] == ["a", "b", "c", ""]
    for axes, wanted in zip(figure.axes, weights):
        below, above = axes.get_images()
        np.testing.assert_array_equal(below.get_array(), image)
        np.testing.assert_array_equal(above.get_array(), wanted)
        assert above.get_extent() == below.get_extent() and above.norm.vmax == weights.max()
        rgba = above.cmap(above.norm([0.0, weights.max()]))
        assert rgba[0, 3] == 0 and rgba[1, 3] > 0.5  # no weight leaves the image as it is
        assert to_hex(rgba[1]).upper() == figures.MEMORY
    assert not figure.axes[3].get_images()


def test_weights_on_a_series_are_drawn_beneath_it_on_one_scale():
    series, weights = np.arange(12.0).reshape(6, 2), np.arange(2 * 3 * 6).reshape(2, 3, 6) / 40
    figure = drawn(figures.series_figure(series, weights, ["a", "b"], [3], "bands"))
    top, *panels, bar = figure.axes
    np.testing.assert_array_equal(top.get_images()[0].get_array(), series.T)
    assert top.get_ylabel() == "bands" and bar.get_ylabel() == "weight"
    for axes, wanted, title in zip(panels, weights, "ab", strict=True):
        (image,) = axes.get_images()
        np.testing.assert_array_equal(image.get_array(), wanted)
        assert axes.get_title() == title and (image.norm.vmin, image.norm.vmax) == (0, weights.max())
    for axes in (top, *panels):
        assert axes.get_xlim() == top.get_xlim() and [x.get_xdata()[0] for x in axes.lines] == [2.5]


def test_what_does_not_exist_is_said_in_the_figure():
    without = make_maps(memory=Memory())
    sentences = lambda figure: {text.get_text() for axes in drawn(figure).axes for text in axes.texts}
    assert sentences(figures.mass_figure(without.summary)) == {"the memory attended to no block"}
    assert sentences(figures.entropy_figure(without.summary)) == {"the memory attended to no block"}
    assert sentences(figures.travel_figure(without.summary, 0)) == {"there are no memory tokens"}
    axes = drawn(figures.map_figure(without.as_picture(0, 0, 4))).axes[0]
    assert axes.get_xlabel() == "keys (grey: not seen by the query)"
    incomplete = make_maps(block_size=64)
    assert sentences(figures.travel_figure(incomplete.summary, 0)) == {"the memory attended to no block"}
