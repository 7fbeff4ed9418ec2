"""Figures of runs show the numbers that the runs wrote."""

import json

import numpy as np
import pytest

from famx.base import palette
from famx.base.errors import ConfigError
from famx.evaluation import figures

ONE = {"hold": {"4": 1.0, "64": 0.5}, "overwrite": {"64": 0.25}}
TWO = {"hold": {"4": 0.0, "64": 0.125}, "overwrite": {"64": 0.75}}


def write_run(folder, exact_match, metrics=()):
    folder.mkdir()
    about = {"block_size": 16, "train_blocks": 8, "exact_match": exact_match}
    (folder / "passkey.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def lines(axes):
    """`{label: (x, y)}` of an axes."""
    return {line.get_label(): tuple(map(np.asarray, line.get_data())) for line in axes.get_lines()}


def drawn(figure):
    figure.canvas.draw()
    return figure.axes


def test_passkey_figure_has_a_panel_for_each_probe_and_a_line_for_each_run(tmp_path):
    runs = {"one": write_run(tmp_path / "1", ONE), "two": write_run(tmp_path / "2", TWO)}
    assert figures.passkey_results(runs["one"])["exact_match"]["hold"] == {4: 1.0, 64: 0.5}
    figure = figures.passkey_figure(runs)
    hold, overwrite = drawn(figure)
    assert (hold.get_title(), overwrite.get_title()) == ("hold", "overwrite")
    for axes, probe in ((hold, "hold"), (overwrite, "overwrite")):
        found = lines(axes)
        for name, table in (("one", ONE), ("two", TWO)):
            x, y = found[name]
            assert dict(zip(map(str, x), y)) == table[probe]
        assert list(found["the curriculum's longest"][0]) == [8, 8]
        marked = [label.get_text() for label in axes.get_xticklabels()]
        assert marked == (["4", "64"] if probe == "hold" else ["64"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two", "the curriculum's longest"]
    assert "16 tokens" in hold.get_xlabel() and "16 tokens" in overwrite.get_xlabel()


FAM_ZEROED = "FAM, memory set to zero"
TWIN = "the same model without a memory"


def write_kind(folder, kind, exact_match, zeroed=None, block_size=16):
    write_run(folder, exact_match)
    memory = {f"zeroed/{name}": score for name, score in (zeroed or {}).items()} | {"rms/update_1": 1.0}
    about = json.loads((folder / "passkey.json").read_text())
    about |= {"memory_config": {"kind": kind}, "memory": memory, "block_size": block_size}
    (folder / "passkey.json").write_text(json.dumps(about))
    return folder


def test_what_a_run_remembers_is_shown_beside_its_zeroed_memory_and_its_twin(tmp_path):
    zeroed = {"hold/4": 0.25, "hold/64": 0.0, "overwrite/64": 0.125}
    fam = write_kind(tmp_path / "run", "fam", ONE, zeroed)
    alone, _ = drawn(figures.recall_figure(fam))
    assert set(lines(alone)) == {"FAM", FAM_ZEROED, "longest text in training"}
    twin = write_kind(tmp_path / "run_bswa", "none", {"hold": {"4": 0.5, "64": 0.125}})
    for folder in (fam, twin):
        figure = figures.recall_figure(folder)
        hold = drawn(figure)[0]
        assert hold.get_title() == "One key, then random words"
        found = lines(hold)
        assert [list(found[name][1]) for name in ("FAM", FAM_ZEROED, TWIN)] == [
            [1.0, 0.5], [0.25, 0.0], [0.5, 0.125]
        ]  # fmt: skip
        colors = {line.get_label(): line.get_color() for line in hold.get_lines()}
        assert (colors["FAM"], colors[TWIN]) == (palette.MEMORY, palette.PAST)
        assert figure.get_suptitle().startswith("How often is the key repeated")
    (overwrite,) = drawn(figures.recall_figure(fam))[1:]
    assert set(lines(overwrite)) == {"FAM", FAM_ZEROED, "longest text in training"}


@pytest.mark.parametrize("content", ["{", "{}", '{"exact_match": {"hold": {"4": 1}}}', None])
def test_a_directory_that_is_no_twin_is_left_out(tmp_path, content):
    fam = write_kind(tmp_path / "run", "fam", ONE)
    other = write_kind(tmp_path / "run_bswa", "none", ONE, block_size=32)
    if content is not None:
        (other / "passkey.json").write_text(content)
    hold, _ = drawn(figures.recall_figure(fam))
    assert set(lines(hold)) == {"FAM", "longest text in training"}


def test_colours_of_the_runs_differ(tmp_path):
    panels = {"hold": {str(i): {4: i / 9} for i in range(9)}}
    (axes,) = drawn(figures.lengths_figure(panels, 16, None))
    assert len({str(line.get_color()) for line in axes.get_lines()}) == 9
    assert len(lines(axes)) == 9  # no mark of a longest document


def test_a_line_has_one_style_in_all_panels_and_the_legend():
    """Also if a panel lacks some of the lines, as those of memories that are zeroed lack BSWA."""
    panels = {"all": {"a": {1: 0.1}, "b": {1: 0.2}}, "some": {"b": {1: 0.3}, "c": {1: 0.4}}}
    figure = figures.lengths_figure(panels, 16, None)
    first, second = drawn(figure)
    style = lambda line: (str(line.get_color()), line.get_marker())
    by_name = {line.get_label(): style(line) for line in first.get_lines()}
    others = {line.get_label(): style(line) for line in second.get_lines()}
    assert by_name["b"] == others["b"] and len({*by_name.values(), others["c"]}) == 3
    (legend,) = figure.legends
    shown = {text.get_text(): style(line) for text, line in zip(legend.get_texts(), legend.get_lines())}
    assert shown == by_name | others


def test_learning_figure_draws_training_alone(tmp_path):
    metrics = [
        {"step": 10, "split": "train", "time": 0.0, "loss": 2.0, "exact_match": 0.5},
        {"step": 10, "split": "eval", "time": 0.0, "loss": 9.0},
        {"step": 20, "split": "train", "time": 1.0, "loss": 1.0},
    ]
    runs = {"one": write_run(tmp_path / "1", ONE, metrics), "empty": write_run(tmp_path / "2", TWO)}
    loss, match = drawn(figures.learning_figure(runs))
    assert [x.tolist() for x in lines(loss)["one"]] == [[10, 20], [2.0, 1.0]]
    assert [x.tolist() for x in lines(match)["one"]] == [[10], [0.5]]
    assert lines(loss)["empty"][0].size == 0
    assert (loss.get_ylabel(), match.get_ylabel()) == ("loss", "exact match")
    (only,) = drawn(figures.learning_figure(runs, ("loss",)))
    assert only.get_ylabel() == "loss"


def test_a_run_without_results_is_named(tmp_path):
    with pytest.raises(ConfigError, match="passkey.json"):
        figures.passkey_results(tmp_path)
