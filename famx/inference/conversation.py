"""Reading and answering in turns: whatever was read and said, the state keeps its size."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from famx.base.errors import ConfigError
from famx.decoding import Sampling, Streamer
from famx.inference.chat_template import ChatTemplate
from famx.inference.reading import encode_file
from famx.model_dir.loading import TrainedModel, check_model, load_model, split_checkpoint
from famx.model_dir.memory_file import read_header, restore_memory, save_memory

_FILE_BLOCKS = 64  # blocks that are read between two reports
_ANSWER_PIECE = 32  # tokens that are written before they are shown


def load_with_vocabulary(checkpoint: str | None, adapter: str | None = None) -> TrainedModel:
    """`load_model` for mains that read text.

    Raises:
      ConfigError: also if no checkpoint is named, or if it has no vocabulary or one that is too
        large for the model; this is known before the weights are read.
    """
    if not checkpoint:
        raise ConfigError("No model is named: add --checkpoint=MODEL_DIR or MODEL_DIR/checkpoint_STEP.")
    directory, _ = split_checkpoint(checkpoint)
    model = check_model(directory)
    vocabulary = model.vocabulary
    if vocabulary is None:
        raise ConfigError(
            f"{directory} has no vocabulary.json, so text cannot be read: put the vocabulary there with"
            " famx.data.vocabularies.save_vocabulary."
        )
    if vocabulary.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"The vocabulary in {directory} has {vocabulary.vocab_size} tokens, the model only"
            f" {model.config.vocab_size}: put the vocabulary there that it was trained with."
        )
    return load_model(checkpoint, adapter=adapter)


def check_template(template: str) -> None:
    """Raises ConfigError unless `template.format(message=...)` works and holds the message."""
    mark = "\0message\0"
    try:
        found = mark in template.format(message=mark)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError):
        found = False
    if not found:
        raise ConfigError(
            f"The template {template!r} cannot be used: it must hold {{message}} and no other field;"
            " a brace that is text is written twice."
        )


class Conversation:
    """One reader: what it has read, and how it answers.

    A message is put into the template, encoded and read; then the answer is written, and the state
    has read both. The first tokens ever read begin with the vocabulary's begin of text, unless a chat
    template says how a conversation begins. Whatever fails or is interrupted leaves the conversation
    as it was.

    Args:
      trained: the model, with its vocabulary.
      sampling: how to write; end of text ends an answer besides its stop tokens.
      template: what is read for a message, a format with the field `message` or the model's own; the
        latter also ends answers.
      stop: texts that end an answer, which is cut before them.
      seed: of the draws. What is drawn depends on it and on the place in the text alone, so the same
        question to the same state gets the same answer.
      fresh: every message is answered from the same state; neither it nor its answer is kept.

    Attributes:
      fresh: may be changed between messages.
      sources: names of the files read.
    """

    def __init__(
        self,
        trained: TrainedModel,
        sampling: Sampling = Sampling(),
        template: str | ChatTemplate = "{message}",
        stop: Sequence[str] = (),
        seed: int = 0,
        fresh: bool = False,
    ):
        if isinstance(template, str):
            check_template(template)
        self._trained, self._vocabulary = trained, trained.model.vocabulary
        self._streamer = Streamer(trained.model.module)
        self._template, self._stop, self._seed = template, tuple(filter(None, stop)), seed
        ends = {self._vocabulary.eos_id, getattr(template, "end_of_turn", None)} - {None}
        self._limit = sampling.max_new_tokens
        self._sampling = dataclasses.replace(
            sampling,
            max_new_tokens=min(_ANSWER_PIECE, self._limit),
            stop_tokens=sampling.stop_tokens + tuple(sorted(ends)),
        )
        self.fresh = fresh
        self.reset()

    @property
    def tokens(self) -> int:
        """How many were read, the answers' own included."""
        return int(self._state.position[0])

    @property
    def updates(self) -> int:
        """Of the memory."""
        return int(self._state.updates[0])

    @property
    def num_bytes(self) -> int:
        """Size of the state."""
        return self._state.num_bytes()

    # What was read.

    def reset(self) -> None:
        """As if nothing had been read."""
        self._go_to(None, self._streamer.initial_state(self._trained.params, 1))
        self.sources, self._file = [], None

    def load(self, path: str) -> None:
        """Goes on from a memory file, and forgets all else.

        Raises:
          ConfigError: see `restore_memory`; or the file holds several memories.
        """
        logits, state = restore_memory(path, self._trained)
        if state.batch_size != 1:
            raise ConfigError(
                f"{path} holds the memories of {state.batch_size} texts, and one can be gone on from."
            )
        self._go_to(logits, state)
        self.sources, self._file = read_header(path).sources, os.path.realpath(path)

    def save(self, path: str, overwrite: bool = False) -> None:
        """Writes a memory file.

        Raises:
          ConfigError: nothing was read, the file cannot be written, or it exists and is neither to be
            overwritten nor the one that was last loaded or saved.
        """
        if self._logits is None:
            raise ConfigError("Nothing was read yet, so there is no memory to save.")
        real = os.path.realpath(path)
        if os.path.exists(path) and not overwrite and real != self._file:
            raise ConfigError(f"{path} exists: choose another name, or remove it first.")
        save_memory(path, self._trained, self._logits, self._state, self.sources)
        self._file = real

    def back(self) -> None:
        """Takes the last exchange back, if nothing came after it; ConfigError if there is none."""
        if self._before is None:
            raise ConfigError("There is no exchange to take back.")
        self._go_to(*self._before)

    def _go_to(self, logits, state, ended=None, before=None) -> None:
        """`ended`: whether the last answer came to its end; None: there is no answer to go on from."""
        self._logits, self._state, self._ended, self._before = logits, state, ended, before

    # Reading.

    def read_file(self, path: str, report: Callable[[int, int], None] | None = None) -> int:
        """Reads a text file of any length, a piece at a time; see `encode_file`.

        Args:
          path: of the file.
          report: called now and then as `report(bytes encoded, tokens read)`.

        Returns:
          tokens read.

        Raises:
          ConfigError: the file cannot be read, or holds no text.
        """
        logits, state = self._read([])
        first = position = self.tokens
        waiting = np.array(self._start(), np.int32)
        unit = _FILE_BLOCKS * self._trained.model.config.block_size
        empty = True
        try:
            for done, ids in encode_file(path, self._vocabulary):
                empty = empty and not ids
                waiting = np.concatenate([waiting, np.array(ids, np.int32)])
                count = len(waiting) - (position + len(waiting)) % unit
                if count > 0:
                    logits, state = self._advance(state, waiting[:count])
                    position, waiting = position + count, waiting[count:]
                if report is not None:
                    report(done, position - first)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
        if empty:
            raise ConfigError(f"{path} holds no text.")
        if waiting.size:
            logits, state = self._advance(state, waiting)
        self._go_to(logits, state, self._ended)
        self.sources = [*self.sources, pathlib.Path(path).name]
        return position + waiting.size - first

    def _start(self) -> list[int]:
        """What comes before the first text."""
        bos = self._vocabulary.bos_id
        return [] if self._logits is not None or bos is None else [bos]

    def _read(self, ids: list[int]):
        """`(logits, state)` after `ids`; what this conversation has stays its own."""
        state = jax.tree.map(jnp.copy, self._state)
        if not ids:
            return self._logits, state
        return self._advance(state, np.array(ids, np.int32))

    def _advance(self, state, ids):
        """`(logits, state)` after `ids [n]`; the state is given away."""
        try:
            return self._streamer.read(self._trained.params, state, ids[None])
        except ValueError as error:  # positions end
            raise ConfigError(str(error)) from error

    # Answering.

    def exchange(
        self, message: str, show: Callable[[str], None], stop: Callable[[], bool] = lambda: False
    ) -> str:
        """Reads a message and writes the answer; Ctrl-C ends the answer where it is.

        Args:
          message: any text; if there is nothing to encode, the text before it is continued.
          show: called with each further part of the answer as soon as it is written.
          stop: asked after each part whether the answer ends there.

        Returns:
          The answer.

        Raises:
          ConfigError: nothing was read yet and the message has no token either.
        """
        prompt = self._prompt(message)
        if not prompt and self._logits is None:
            raise ConfigError("The message has no token, and nothing was read that could be continued.")
        before = self._logits, self._state, self._ended
        written: list[int] = []
        answer, text, shown, cut, logits, state = [], "", 0, None, None, None
        try:
            logits, state = self._read(prompt)
            for _ in range(0, self._limit, _ANSWER_PIECE):
                place = self.tokens + len(prompt) + len(written)
                seed = np.random.SeedSequence((self._seed, place)).generate_state(1)
                try:
                    out = self._streamer.generate(
                        self._trained.params, logits, state, self._sampling, seed
                    )
                except ValueError as error:  # positions end
                    raise ConfigError(str(error)) from error
                logits, state = out.logits, out.state
                written = written + np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()
                answer = written[: self._limit]
                text = self._decode(answer)
                cut = min((text.find(stop) for stop in self._stop if stop in text), default=None)
                if cut is not None or self._is_end(written):
                    break
                settled = _settled(text, self._stop)
                show(text[shown:settled])
                shown = max(shown, settled)
                if stop():
                    break
        except KeyboardInterrupt:
            state = None  # it may have been given away
        show(text[shown:cut])
        while cut is not None and len(self._decode(answer)) > cut:
            answer = answer[:-1]
        if not self.fresh and (answer or state is not None):
            if state is None or answer != written:
                logits, state = self._read(prompt + answer)
            self._go_to(logits, state, self._is_end(answer), before)
        return text[:cut]

    def _prompt(self, message: str) -> list[int]:
        """What is read for a message."""
        if isinstance(self._template, str):
            return self._start() + self._vocabulary.encode(self._template.format(message=message))
        if self._ended is None:
            return self._template.first(message, begin=self._logits is None)
        return self._template.next(message, self._ended)

    def _is_end(self, ids: list[int]) -> bool:
        """Whether the last of `ids` ended an answer."""
        return bool(ids) and ids[-1] in self._sampling.stop_tokens

    def _decode(self, ids: list[int]) -> str:
        """Text of an answer; what ended it and ids that the model has beyond the vocabulary are left
        out."""
        ids = ids[:-1] if self._is_end(ids) else ids
        return self._vocabulary.decode([i for i in ids if i < self._vocabulary.vocab_size])


def _settled(text: str, stop: Sequence[str]) -> int:
    """How much of an unfinished answer stays: no half character and no beginning of a stop text."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    begun = (n for end in stop for n in range(1, len(end)) if text.endswith(end[:n]))
    return len(text) - max(begun, default=0)
