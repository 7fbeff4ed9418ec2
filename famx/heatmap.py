"""Draws a heat map of a probe: accuracy over length, depth and seed, to a million tokens and more.

    famx heatmap --checkpoint=/tmp/famx/passkey_tiny --out=/tmp/famx/heatmap --probe=passkey \\
        --probe_options='{"header": false, "filler": "random_words"}' \\
        --lengths=1024,16384,131072 --depths=0,0.25,0.5,0.75,1 --seeds=1,2,3

Documents are streamed block by block with a state of constant size. Each cell is written to
heatmap.jsonl as soon as it is measured: the same command resumes one that was stopped, and further
lengths, depths or seeds are added to those that are there. heatmap.csv, .png and .html show them.
"""

from absl import flags

from famx.base import gin_utils
from famx.base.command_line import define, integers, json_object, numbers
from famx.base.ranges import Directory, Path, Positive
from famx.base.signals import exit_on_interrupt, interrupt_on_sigterm


def define_flags() -> None:
    define("checkpoint", Directory, None, "Model that reads: MODEL_DIR or MODEL_DIR/checkpoint_<step>.")
    define("out", Path, None, "Directory to write to; created if missing.")
    probe = "Name of a probe that has a depth, such as ruler_niah_single_1."
    flags.DEFINE_string("probe", "passkey", probe)
    flags.DEFINE_string("probe_options", "", 'Options of the probe as JSON, such as {"digits": 3}.')
    flags.DEFINE_list("lengths", ["1024", "4096", "16384", "65536"], "Tokens of the documents.")
    depths = "Places of what is asked for, as fractions of the text: 0 is its beginning, 1 its end."
    flags.DEFINE_list("depths", ["0", "0.25", "0.5", "0.75", "1"], depths)
    flags.DEFINE_list("seeds", ["1", "2", "3"], "Random seeds of the documents.")
    define("examples", Positive, 8, "Number of documents of each length, depth and seed.")
    define("batch_size", Positive, 32, "Largest number of documents that are read together.")


def main() -> None:
    values = flags.FLAGS
    options = json_object(values.probe_options, "probe_options")
    lengths, seeds = (integers(values[name].value, name) for name in ("lengths", "seeds"))
    depths = numbers(values.depths, "depths")

    from famx.evaluation.heatmap import Grid, make_heat_map

    grid = Grid(values.probe, lengths, depths, seeds, values.examples, options)
    with exit_on_interrupt("Stopped; the same command resumes."), interrupt_on_sigterm():
        cells = make_heat_map(values.checkpoint, values.out, grid, values.batch_size)
    right, all_ = (sum(cell[name] for cell in cells.values()) for name in ("right", "examples"))
    print(f"{values.out}: {len(cells)} cells, {right} of {all_} answers right; heatmap.png, .html, .csv")


if __name__ == "__main__":
    gin_utils.run(main, define_flags, gin_flags=False)
