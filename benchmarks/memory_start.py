"""How much a new memory disturbs a pretrained model: its loss block by block, before any training.

    famx convert --memory=none --from=MODEL.gguf --to=/tmp/famx/base
    python -m benchmarks.memory_start --checkpoint=/tmp/famx/base

reads English texts, by default documentation of Python that is installed with it, with each way in which
the memory can start. Rows are named by the fields of `Fam` and by what the prompt starts as.
"""

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks import command
from famx.base import tables
from famx.base.errors import ConfigError
from famx.evaluation.common import streamer_of
from famx.lora import combine
from famx.memories import Fam
from famx.model_dir.loading import TrainedModel, load_model
from famx.models.memory_start import MemoryStart
from famx.modules import Decoder, DecoderConfig, Memory
from famx.modules.memory import of_memory
from famx.scale.timing import machine

TOPICS = ("execmodel", "compound", "typesseq", "formatstrings")  # of pydoc, more than 2,000 tokens each
ORDINARY = {"first_residual": "ordinary"}
BIASED = ORDINARY | {"bias": "minus_log_length"}
CHOICES = (
    *(({}, prompt) for prompt in ("normal", "tokens", "text", "bos")),
    *((ORDINARY, prompt) for prompt in ("normal", "tokens", "text", "bos")),
    *((BIASED, prompt) for prompt in ("normal", "text", "bos")),
    ({"bias": "minus_log_length"}, "text"),
    ({"normalize": "measured"}, "text"),
    *((ORDINARY | {"normalize": "measured"}, prompt) for prompt in ("normal", "text")),
    (ORDINARY | {"normalize": True}, "text"),
    *((BIASED | {"normalize": "measured"}, prompt) for prompt in ("text", "bos")),
    *((ORDINARY | {"update": "gated"}, prompt) for prompt in ("text", "bos")),
    (BIASED | {"update": "gated"}, "bos"),
)


def label(fields: dict, prompt: str) -> str:
    """Name of a row, such as `first_residual=ordinary, prompt text`."""
    return ", ".join([*(f"{name}={value}" for name, value in fields.items()), f"prompt {prompt}"])


def losses(config: DecoderConfig, params, tokens: np.ndarray, size: int) -> np.ndarray:
    """The mean loss of every `size` tokens of texts `[B, L + 1]`, `[L / size]`."""
    streamer = streamer_of(Decoder(config))
    state = streamer.initial_state(params, len(tokens))
    (log_p, _), _ = streamer.score(params, state, tokens[:, :-1], tokens[:, 1:])
    return -log_p.reshape(len(tokens), -1, size).mean(axis=(0, 2))


def with_memory(trained: TrainedModel, config: DecoderConfig, start: MemoryStart, seed: int):
    """The model's parameters with those of a new memory."""
    params = trained.params

    @jax.jit
    def fresh(key):
        made = Decoder(config).init(key, jnp.zeros((1, config.block_size), jnp.int32))["params"]
        flat = flatten_dict(nn.unbox(made), sep="/")
        return {path: x for path, x in flat.items() if of_memory(path)}

    made = fresh(jax.random.key(seed))
    shapes = {path: x.shape for path, x in made.items()}
    table = lambda: np.asarray(params["embedding"])
    of_layer = lambda i: jax.tree.map(lambda x: x[i], params["layers"])
    layers = lambda: map(of_layer, range(config.num_layers))
    made |= start.parameters(config, shapes, seed, table, trained.model.vocabulary, layers)
    return combine(params, unflatten_dict(made, sep="/"))


def texts(trained: TrainedModel, files: Sequence[str], rows: int, length: int) -> np.ndarray:
    """The first `length + 1` tokens of texts, begin of text included, int32 `[rows, length + 1]`.

    Pages of the documentation that are too short are continued by the next ones.
    """
    if files:
        contents = [open(file, encoding="utf-8").read() for file in files]
    else:
        from pydoc_data.topics import topics

        pages = [topics[name] for name in TOPICS]
        contents = ["\n".join([*pages[i:], *pages[:i]]) for i in range(len(pages))]
    vocabulary = trained.model.vocabulary
    begin = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    found = [begin + vocabulary.encode(content) for content in contents[:rows]]
    if len(found) < rows or min(map(len, found)) <= length:
        raise ConfigError(
            f"{rows} texts of more than {length} tokens are needed: name longer files, or lower --rows,"
            " --blocks or --block_size."
        )
    return np.array([ids[: length + 1] for ids in found], np.int32)


def measure(trained: TrainedModel, tokens: np.ndarray, block_size: int, length: int, only: str):
    """Yields `(name, losses)` of each choice whose name matches `only`."""
    plain = dataclasses.replace(
        trained.model.config, block_size=block_size, memory_segments=0, memory=Memory()
    )
    if re.search(only, "no memory"):
        yield "no memory", losses(plain, trained.params, tokens, block_size)
    for fields, prompt in CHOICES:
        if re.search(only, label(fields, prompt)):
            config = dataclasses.replace(plain, memory=Fam(length, **fields))
            params = with_memory(trained, config, MemoryStart(prompt), seed=0)
            yield label(fields, prompt), losses(config, params, tokens, block_size)


def table(measured, rows: int, length: int) -> tables.Table:
    """The table of `(name, losses)`."""
    made = [
        {"memory": name}
        | {f"block {i}": f"{x:.2f}" for i, x in enumerate(row)}
        | {"mean": f"{row.mean():.3f}"}
        for name, row in measured
    ]
    notes = (f"Nats per token; memory of {length}, no past blocks; number of texts: {rows}",)
    return tables.Table("memory_start", "Loss of each block before training", notes, made)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints each row when it is measured, and then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="MODEL_DIR of a model without a memory")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--length", type=int, default=64, help="number of memory tokens")
    parser.add_argument("--rows", type=int, default=1, help="number of texts")
    parser.add_argument("--files", nargs="*", default=(), help="texts in place of the documentation")
    parser.add_argument("--only", default="", help="regular expression that names of rows contain")
    parser.add_argument("--markdown", type=pathlib.Path, help="page whose table is replaced")
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
    values = parser.parse_args(argv)
    trained = load_model(values.checkpoint)
    tokens = texts(trained, values.files, values.rows, values.block_size * values.blocks)
    measured = []
    for name, row in measure(trained, tokens, values.block_size, values.length, values.only):
        print(f"{name:70s}", *(f"{x:6.2f}" for x in row), f"  mean {row.mean():.3f}", flush=True)
        measured.append((name, row))
    done = table(measured, values.rows, values.length)
    print(done.text())
    if values.markdown:
        tables.fill_markdown(values.markdown, done)
    if values.json:
        tables.write_json(values.json, machine(), [done])


if __name__ == "__main__":
    with command.exit_on_bad_input():
        main()
