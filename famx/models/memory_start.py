"""How the memory of a pretrained model starts: its prompt, and what is measured on plain text."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from famx.base.errors import ConfigError
from famx.base.ranges import OneOf, Path
from famx.base.values import checked
from famx.modules import DecoderConfig, Memory, rope
from famx.modules.layer import Layer
from famx.modules.memory import is_measured, is_prompt
from famx.modules.window import ChunkContext

PROMPT_STARTS = ("normal", "tokens", "text", "bos")
PLAIN_TEXT = """\
The town lies where the river leaves the hills and turns towards the sea. In the morning the boats come \
in, and people walk down to the water to buy fish, bread and fruit. A road runs along the bank, past the \
old mill and the school, and then climbs slowly through fields of barley to the village above. Most of \
those who live there work in the valley. They leave early, and they come home when the lamps are lit. On \
Sundays the square is full of talk. Children play between the tables, and their parents speak of the \
weather, of the price of wool, and of friends who have moved away. In winter the snow can close the road \
for a week or more. Then everyone helps to clear it, and whoever has wood to spare brings some to those \
who are old or ill. When spring arrives, the water rises, the first flowers open under the trees, and \
the mill begins to turn again. It has been so for as long as anyone can remember, and nobody would wish \
it to be different.
"""
_MEASURED_TOKENS = 256


@checked
@dataclasses.dataclass(frozen=True)
class MemoryStart:
    """How parameters of the memory start in a pretrained model.

    Attributes:
      prompt: what prompts and prefixes start as, also where the checkpoint has some that fit: "normal",
        with standard deviation `D ** -0.5` as in a new model; "tokens", embeddings of random tokens,
        without repetition if there are enough; "text", embeddings of the first tokens of `text`, again
        from its beginning if it is too short; "bos", all the embedding of the begin-of-text token. None:
        those of the checkpoint, or "normal"; an import has "bos" then, if there is such a token.
      text: path of a plain text in the language of the model, which "text" and measured parameters
        read; None: an English text of ours, `PLAIN_TEXT`.
    """

    prompt: Annotated[str, OneOf(PROMPT_STARTS)] | None = None
    text: Path | None = None

    def parameters(
        self,
        config: DecoderConfig,
        shapes: Mapping[str, tuple[int, ...]],
        seed: int,
        embedding: Callable[[], Any],
        vocabulary: Any,
        layers: Callable[[], Iterable[Any]],
    ) -> dict[str, np.ndarray]:
        """The prompts and measured parameters among those of `shapes`, by path, float32.

        Args:
          config: the decoder's config.
          shapes: shapes of parameters of the memory, by path.
          seed, embedding, vocabulary: see `draw_prompt`.
          layers: returns the layers for `measure_rms`; called only if something is measured.

        Raises:
          ConfigError: see `draw_prompt` and `measure_rms`.
        """
        made = {
            path: self.draw_prompt(config, shape, seed, embedding, vocabulary)
            for path, shape in shapes.items()
            if is_prompt(path)
        }
        measured = [path for path in shapes if is_measured(path)]
        if measured:
            rms = self.measure_rms(config, vocabulary, embedding, layers())
            made |= dict.fromkeys(measured, rms)
        return made

    def draw_prompt(
        self,
        config: DecoderConfig,
        shape: tuple[int, ...],
        seed: int,
        embedding: Callable[[], Any],
        vocabulary: Any = None,
    ) -> np.ndarray:
        """A prompt `[N, D]`, or prefixes `[layers, N, D]`, float32, scaled as the first layer reads it.

        Args:
          config: the decoder's config.
          shape: shape of the result.
          seed: seed of random draws.
          embedding: returns the embedding table `[V, D]`; not called for "normal".
          vocabulary: the model's vocabulary, for "text" and "bos".

        Raises:
          ConfigError: the vocabulary is missing or has no such token, or the text cannot be read.
        """
        rng = np.random.default_rng(seed)
        if self.prompt in (None, "normal"):
            return rng.normal(0, config.embed_dim**-0.5, shape).astype(np.float32)
        count = math.prod(shape[:-1])
        if self.prompt == "tokens":
            table = embedding()
            rows = rng.choice(len(table), count, replace=count > len(table))
        elif self.prompt == "text":
            rows, table = np.resize(self.ids(vocabulary), shape[-2]), embedding()
        else:
            if getattr(vocabulary, "bos_id", None) is None:
                raise ConfigError("The model has no begin-of-text token for the prompt: choose another.")
            rows, table = np.full(count, vocabulary.bos_id), embedding()
        scale = math.sqrt(config.embed_dim) if config.scale_embeddings else 1
        rows = np.asarray(table[rows], np.float32).reshape(-1, *shape[-2:]) * np.float32(scale)
        return np.broadcast_to(rows, shape) if len(shape) == 3 else rows.reshape(shape)

    def ids(self, vocabulary: Any) -> np.ndarray:
        """Token ids of the text, int32, without a begin of text.

        Raises:
          ConfigError: there is no vocabulary, or the text is empty or cannot be read.
        """
        if vocabulary is None:
            raise ConfigError("The memory starts from a text, but the model has no tokenizer to read it.")
        text = PLAIN_TEXT
        if self.text is not None:
            try:
                with open(self.text, encoding="utf-8") as file:
                    text = file.read(1 << 16)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8"
                raise ConfigError(f"The plain text {self.text} cannot be read: {reason}.") from error
        ids = np.array(vocabulary.encode(text), np.int32)
        if not len(ids):
            raise ConfigError(f"The plain text {self.text} is empty: name another.")
        return ids

    def measure_rms(
        self,
        config: DecoderConfig,
        vocabulary: Any,
        embedding: Callable[[], Any],
        layers: Iterable[Any],
    ) -> np.ndarray:
        """RMS of each layer's input in plain text, the median of the tokens, float32 `[layers]`.

        A few tokens, such as the first of a text, have a far larger one, which the median leaves out.

        Args:
          config: the decoder's config.
          vocabulary: the model's vocabulary.
          embedding: returns the embedding table `[V, D]`.
          layers: parameters of each layer, made one after another.

        Raises:
          ConfigError: the vocabulary is missing, or the text cannot be read.
        """
        ids = self.ids(vocabulary)[:_MEASURED_TOKENS]
        if getattr(vocabulary, "bos_id", None) is not None:
            ids = np.insert(ids, 0, vocabulary.bos_id)
        scale = math.sqrt(config.embed_dim) if config.scale_embeddings else 1
        x = jnp.asarray(embedding()[ids], jnp.float32) * scale
        read = _layer_reader(_plain(config, len(ids)))
        rotations, measured = rope.rotations(config).token, []
        for params, rotation in zip(layers, rotations, strict=True):
            measured.append(np.median(np.sqrt(np.mean(np.square(np.asarray(x)), axis=-1))))
            x = read(params, x, rotation)
        return np.array(measured, np.float32)


def _plain(config: DecoderConfig, length: int) -> DecoderConfig:
    """The config that reads a text of this length as one block, without a memory."""
    return dataclasses.replace(
        config, memory=Memory(), block_size=length, memory_segments=0, window_mask=False,
        dtype="float32", blocks_per_chunk=None, remat="none", attention_backend="xla",
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def _layer_reader(config: DecoderConfig):
    """Jitted function of a layer's parameters, its input `[L, D]` and its rotation: its output."""
    layer, size = Layer(config), config.block_size
    zero = jnp.zeros((1,), jnp.int32)
    window = jnp.zeros((1, 1, size, config.num_kv_heads, config.head_dim), jnp.float32)

    @jax.jit
    def read(params, x, rotation):
        here = ChunkContext(zero, zero, zero, rotation=rope.Rotation(rotation))
        args = x[None, None], None, None, window, window, None, here
        return layer.apply({"params": params}, *args, method="read_chunk")[0][0, 0]

    return read
