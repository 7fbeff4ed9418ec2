"""Benchmark of streaming long inputs and of generation: `python -m benchmarks.inference`.

Functions are timed in turns in one process and compared by ratios within a round; tables show medians
with quartiles. See docs/benchmarks.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from benchmarks import command
from benchmarks.workloads import parameters, random_tokens
from famx.base.tables import Table
from famx.decoding import Sampling, Streamer, generate
from famx.memories import Fam
from famx.modules import Decoder, DecoderConfig, Memory
from famx.scale.timing import Spread, interleave, peak_memory

TINY = (("vocab_size", 128), ("num_layers", 2), ("embed_dim", 64), ("num_heads", 4), ("mlp_dim", 128))
_FULL_TOKENS = 32  # tokens generated with full attention, which is slow

SMALL = (
    ("vocab_size", 512), ("num_layers", 4), ("embed_dim", 256), ("num_heads", 4), ("mlp_dim", 1024),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark; `--quick` uses `QUICK`.

    Attributes:
      tiny: the model of `passkey_tiny.gin`: DecoderConfig fields, and `(S, M, N)`.
      small: a wider model, likewise.
      lengths: input lengths in tokens.
      batches: batch sizes for generation.
      contexts: tokens that full attention has read before it generates. It is measured at batch size 1
        only, because its cache for one example is as large as the states of many FAM examples.
    """

    tiny: tuple = (TINY, (32, 0, 8))
    small: tuple = (SMALL, (256, 1, 16))
    lengths: tuple[int, ...] = (16_384, 65_536, 262_144, 1_048_576)
    batches: tuple[int, ...] = (1, 16)
    contexts: tuple[int, ...] = (4096, 32_768)


QUICK = Sizes(
    tiny=((("vocab_size", 32), ("num_layers", 1), ("embed_dim", 16), ("num_heads", 2)), (8, 0, 2)),
    small=((("vocab_size", 32), ("num_layers", 1), ("embed_dim", 16), ("num_heads", 2)), (8, 1, 2)),
    lengths=(64, 256),
    batches=(1, 2),
    contexts=(32,),
)


def make_config(model: tuple, memory: tuple[int, int, int]) -> DecoderConfig:
    """Config from DecoderConfig fields and `(S, M, N)`."""
    size, segments, length = memory
    memory = Fam(length) if length else Memory()
    return DecoderConfig(**dict(model), block_size=size, memory_segments=segments, memory=memory)


def reading(sizes: Sizes, repeats: int) -> Table:
    """Table of time per token and peak memory of streaming, over the input length."""
    config = make_config(*sizes.tiny)
    streamer, params = Streamer(Decoder(config)), parameters(config)
    chunk = random_tokens(config, 1, sizes.lengths[0])

    def read(length):
        state = streamer.initial_state(params, 1)
        for _ in range(length // sizes.lengths[0]):
            logits, state = streamer.read(params, state, chunk)
        return logits, state

    def texts(length):
        # Each timing reads the same number of tokens, so that all are equally exposed to noise.
        return [read(length) for _ in range(sizes.lengths[-1] // length)]

    times = interleave({str(n): functools.partial(texts, n) for n in sizes.lengths}, repeats)
    first, rows, peaks = str(sizes.lengths[0]), [], {}
    for length in sizes.lengths:
        peak_memory(forget=True)
        state = jax.block_until_ready(read(length))[1]
        peaks[length] = peak_memory()
        rows.append({
            "tokens": length,
            "microseconds per token": times.spread(str(length), 1e6 / sizes.lengths[-1]),
            f"per token / {first}": times.ratio(str(length), first),
            "peak MiB": peaks[length],
            f"peak / {first}": peaks[length] / peaks[sizes.lengths[0]],
            "state KiB": state.num_bytes() / 2**10,
        })  # fmt: skip
    reading, _ = streamer.lower_read(params, streamer.initial_state(params, 1))
    step = reading.compile().memory_analysis()
    notes = (
        f"batch 1, read {sizes.lengths[0]} tokens at a time; peak: maximum memory of the process while"
        f" reading; every timing covers {sizes.lengths[-1]} tokens, in texts of the given length",
        f"temporaries of the compiled step, the same at every length:"
        f" {step.temp_size_in_bytes / 2**10:.1f} KiB",
    )
    notes = (_shape(config, repeats), *notes)
    return Table("reading", "Reading with a state of constant size", notes, rows)


def writing(sizes: Sizes, repeats: int) -> Table:
    """Table of generation speed: FAM, BSWA, and full attention with a growing cache."""
    rows, notes = [], []
    for model, memory in (sizes.tiny, sizes.small):
        fam = make_config(model, memory)
        bswa = dataclasses.replace(fam, memory=Memory())
        notes.append(_shape(fam, repeats))
        # A whole number of blocks, so that the memory updates are counted in full.
        block_tokens = max(fam.block_size, 256 // fam.block_size * fam.block_size)
        for batch in sizes.batches:
            runs = {"FAM": (fam, block_tokens, 0), "BSWA": (bswa, block_tokens, 0)}
            for context in sizes.contexts if batch == 1 else ():
                full = dataclasses.replace(bswa, memory_segments=0, block_size=context + _FULL_TOKENS)
                runs[f"full, {context} read"] = (full, _FULL_TOKENS, context)
            num_tokens = {name: tokens for name, (_, tokens, _) in runs.items()}
            functions = {name: _write(c, batch, *rest) for name, (c, *rest) in runs.items()}
            times = interleave(functions, repeats)
            for name, tokens in num_tokens.items():
                rows.append({
                    "S": fam.block_size,
                    "batch": batch,
                    "model": name,
                    "tokens/s": Spread.of(batch * tokens / times.seconds[name]),
                    "time per token / BSWA": times.ratio(name, "BSWA", num_tokens["BSWA"] / tokens),
                })  # fmt: skip
    notes.append("tokens/s of all examples together; FAM and BSWA generate whole blocks, greedily")
    notes.append("full: the whole context is one block, so that the cache holds all of it")
    return Table("writing", "Generation, token by token", tuple(notes), rows)


SECTIONS = {"reading": reading, "writing": writing}


def _write(config: DecoderConfig, batch: int, tokens: int, position: int = 0):
    """A compiled function that generates `tokens` tokens at position `position`."""
    module, params, sampling = Decoder(config), parameters(config), Sampling(tokens)
    initial = jax.jit(lambda p: module.apply({"params": p}, batch, method="initial_state"))(params)
    state = initial.replace(position=jnp.full((batch,), position, jnp.int32))
    logits = jnp.asarray(random_tokens(config, batch, config.vocab_size), jnp.float32)
    run = jax.jit(lambda p, l, s: generate(module, p, l, s, sampling).tokens)
    compiled = run.lower(params, logits, state).compile()
    return lambda: compiled(params, logits, state)


def _shape(c: DecoderConfig, repeats: int) -> str:
    return (
        f"S {c.block_size}, M {c.memory_segments}, N {c.memory_columns}; {c.num_layers} layers, width"
        f" {c.embed_dim}, {c.num_heads} heads of {c.head_dim}, vocabulary {c.vocab_size}; {c.dtype};"
        f" {repeats} repeats"
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark's command line."""
    command.run(
        "benchmarks.inference", __doc__.splitlines()[0], SECTIONS, Sizes(), QUICK, 7, argv
    )


if __name__ == "__main__":
    main()
