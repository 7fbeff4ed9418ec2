"""A conversation with a model: files and messages are read into one state of constant size."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from famx.base.errors import ConfigError
from famx.base.signals import interruptible
from famx.data.vocabularies.chat_template import ChatTemplate
from famx.decoding import Sampling, Streamer
from famx.inference.reading import encode_file
from famx.mesh import make_mesh, make_rules, on_mesh
from famx.model_dir.identity import split_checkpoint
from famx.model_dir.loading import TrainedModel, check_model, load_model
from famx.model_dir.memory_file import read_header, restore_memory, save_memory
from famx.models import DecoderModel
from famx.models.inputs import check_reads_text

_FILE_BLOCKS = 64  # blocks read between two progress reports
_ANSWER_PIECE = 32  # tokens generated before they are shown
# Tokens per call within a block: one number, so that no later message compiles another program.
_WIDTHS = (32,)


def model_with_vocabulary(checkpoint: str) -> DecoderModel:
    """The definition of a model that can read text, without its weights.

    Raises:
      ConfigError: `checkpoint` is not valid, or it has no vocabulary or one that is too large for the
        model.
    """
    directory, _ = split_checkpoint(checkpoint)
    model = check_model(directory)
    check_reads_text(model, "Texts and conversations")
    vocabulary = model.vocabulary
    if vocabulary is None:
        raise ConfigError(
            f"{directory} has no vocabulary.json, so text cannot be encoded: save the model's vocabulary"
            " there with famx.data.vocabularies.save_vocabulary."
        )
    if vocabulary.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"The vocabulary in {directory} has {vocabulary.vocab_size} tokens, the model only"
            f" {model.config.vocab_size}: replace it by the vocabulary that the model was trained with."
        )
    return model


def load_with_vocabulary(checkpoint: str | None, adapter: str | None = None) -> TrainedModel:
    """Load a model that can read text; see `load_model`.

    The vocabulary is checked before the weights are read, which may take minutes.

    Raises:
      ConfigError: `checkpoint` is not set, or see `model_with_vocabulary`.
    """
    if not checkpoint:
        raise ConfigError(
            "--checkpoint is not set: add --checkpoint=MODEL_DIR or MODEL_DIR/checkpoint_<step>."
        )
    model_with_vocabulary(checkpoint)
    return load_model(checkpoint, adapter=adapter)


def check_template(template: str) -> None:
    """Check that `template.format(message=...)` works and contains the message.

    Raises:
      ConfigError: it does not.
    """
    mark = "\0message\0"
    try:
        valid = mark in template.format(message=mark)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError):
        valid = False
    if not valid:
        raise ConfigError(
            f"The template {template!r} is not valid: it must contain {{message}} and no other field;"
            " write a literal brace twice."
        )


class Conversation:
    """A model's state and the messages exchanged with it.

    A message is formatted, encoded and read, and then an answer is generated; the state has then read
    both. The first text starts with the vocabulary's begin-of-text token, unless a chat template decides
    how a conversation starts. An operation that fails or is interrupted leaves the state as it was.

    Args:
      trained: the model, with its vocabulary.
      sampling: how tokens are chosen; an answer ends at its stop tokens and at end of text.
      template: format of a message: a string with the field `message`, or a chat template, whose
        end-of-turn token then also ends answers.
      stop: strings that end an answer; they are not part of it.
      seed: seed of all draws. A draw depends only on the seed and the position in the text, so the same
        question to the same state gets the same answer.
      fresh: answer every message from the same state; keep neither the message nor the answer.

    Attributes:
      fresh: see above; may be changed between messages.
      sources: names of the files that the state has read.
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
        self._mesh, self._rules = make_mesh(), make_rules()
        self._streamer = Streamer(trained.model.module, widths=_WIDTHS)
        self._template, self._stop, self._seed = template, tuple(filter(None, stop)), seed
        ends = {*self._vocabulary.end_ids, getattr(template, "end_of_turn", None)} - {None}
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
        """Number of tokens that the state has read, including its own answers."""
        return int(np.asarray(self._state.position)[0])  # waits for no other program

    @property
    def updates(self) -> int:
        """Number of memory updates so far."""
        return int(np.asarray(self._state.updates)[0])

    @property
    def num_bytes(self) -> int:
        """Size of the state in bytes; it does not depend on how much was read."""
        return self._state.num_bytes()

    # ------ The state

    def reset(self) -> None:
        """Return to the initial state."""
        with on_mesh(self._mesh, self._rules):
            state = self._streamer.initial_state(self._trained.params, 1)
        self._go_to(None, state)
        self.sources = []

    def load(self, path: str) -> None:
        """Replace the state by that of a memory file.

        Raises:
          ConfigError: see `restore_memory`; or the file holds more than one memory.
        """
        logits, state = restore_memory(path, self._trained)
        if state.batch_size != 1:
            raise ConfigError(
                f"{path} holds {state.batch_size} memories, but a conversation can load only one."
            )
        self._go_to(logits, state)
        self.sources = read_header(path).sources

    def save(self, path: str, overwrite: bool = False) -> None:
        """Write the state to a memory file.

        Args:
          path: the file.
          overwrite: whether an existing file may be replaced.

        Raises:
          ConfigError: nothing has been read, the file exists and must not be replaced, or it cannot be
            written.
        """
        if self._logits is None:
            raise ConfigError("Nothing has been read yet, so there is no memory to save.")
        if os.path.exists(path) and not overwrite:
            raise ConfigError(f"{path} already exists: choose another name, or remove it first.")
        save_memory(path, self._trained, self._logits, self._state, self.sources)

    def back(self) -> None:
        """Undo the last exchange.

        Raises:
          ConfigError: the state has changed since in another way, or there was no exchange.
        """
        if self._before is None:
            raise ConfigError("There is no exchange to undo.")
        self._go_to(*self._before)

    def _go_to(self, logits, state, ended=None, before=None) -> None:
        """Set the state.

        Args:
          logits: `[1, V]` after the last token; None if nothing has been read.
          state: the `DecoderState`.
          ended: whether the last answer includes its end token; None if there was none since the state
            was reset or loaded.
          before: arguments that `back` returns to; None if there is nothing to undo.
        """
        self._logits, self._state, self._ended, self._before = logits, state, ended, before

    # ------ Reading

    def read_file(self, path: str, report: Callable[[int, int], None] | None = None) -> int:
        """Read a text file of any length; see `encode_file`.

        Args:
          path: the text file.
          report: called as `report(bytes encoded, tokens read)` after each piece.

        Returns:
          Number of tokens read.

        Raises:
          ConfigError: the file cannot be read or contains no text.
        """
        logits, state = self._read([])
        first = position = self.tokens
        pending = np.array(self._start(), np.int32)
        unit = _FILE_BLOCKS * self._trained.model.config.block_size
        empty = True
        try:
            for done, ids in encode_file(path, self._vocabulary):
                empty = empty and not ids
                pending = np.concatenate([pending, np.array(ids, np.int32)])
                count = len(pending) - (position + len(pending)) % unit
                if count > 0:
                    logits, state = self._advance(state, pending[:count])
                    position, pending = position + count, pending[count:]
                if report is not None:
                    report(done, position - first)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
        if empty:
            raise ConfigError(f"{path} contains no text.")
        if pending.size:
            logits, state = self._advance(state, pending)
        self._go_to(logits, state, self._ended)
        self.sources = [*self.sources, pathlib.Path(path).name]
        return position + pending.size - first

    def _start(self) -> list[int]:
        """Ids before the next text: begin of text if it is the first."""
        bos = self._vocabulary.bos_id
        return [] if self._logits is not None or bos is None else [bos]

    def _read(self, ids: list[int], stop: Callable[[], bool] = lambda: False):
        """`(logits, state)` after `ids`, from a copy of the current state."""
        state = jax.tree.map(jnp.copy, self._state)
        if not ids:
            return self._logits, state
        return self._advance(state, np.array(ids, np.int32), stop)

    def _advance(self, state, ids, stop: Callable[[], bool] = lambda: False):
        """`(logits, state)` after `ids [n]`; the buffers of `state` are donated."""
        read = lambda: self._streamer.read(self._trained.params, state, ids[None])
        return self._run(lambda: jax.block_until_ready(read()), stop)

    def _run(self, program: Callable[[], Any], stop: Callable[[], bool]):
        """The result of a program of the streamer; see `interruptible`."""

        def run():
            with on_mesh(self._mesh, self._rules):
                return program()

        try:
            return interruptible(run, stop)
        except ValueError as error:  # the last position is reached
            raise ConfigError(str(error)) from error

    # ------ Answering

    def exchange(
        self, message: str, show: Callable[[str], None], stop: Callable[[], bool] = lambda: False
    ) -> str:
        """Read a message and generate the answer; Ctrl-C ends the answer early.

        Args:
          message: the message; if it encodes to no tokens, the text read so far is continued.
          show: called with each new part of the answer.
          stop: asked all the while; True ends the answer after what was shown.

        Returns:
          The answer.

        Raises:
          ConfigError: the message has no tokens and nothing has been read, the chat template rejects the
            message, or the last position is reached.
        """
        prompt = self._prompt(message)
        if not prompt and self._logits is None:
            raise ConfigError("The message has no tokens, and there is no text before it to continue.")
        before = self._logits, self._state, self._ended
        written: list[int] = []
        answer, text, shown, cut, logits, state = [], "", 0, None, None, None
        reached: Any = None  # logits and state after `written`
        try:
            logits, state = self._read(prompt, stop)
            for _ in range(0, self._limit, _ANSWER_PIECE):
                position = self.tokens + len(prompt) + len(written)
                reached = logits, jax.tree.map(jnp.copy, state)  # if the next piece is stopped
                tokens, *reached = self._write(logits, state, position, stop)
                (logits, state), written = reached, written + tokens
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
            logits, state = reached if written else (None, None)
        show(text[shown:cut])
        while cut is not None and len(self._decode(answer)) > cut:
            answer = answer[:-1]
        if not self.fresh and (answer or state is not None):
            if state is None or answer != written:  # the state has not read exactly this
                logits, state = self._read(prompt + answer)
            self._go_to(logits, state, self._is_end(answer), before)
        return text[:cut]

    def _write(self, logits, state, position: int, stop: Callable[[], bool]):
        """`(tokens, logits, state)` of the next piece of an answer; `state` is donated."""
        seed = np.random.SeedSequence((self._seed, position)).generate_state(1)

        def write():
            out = self._streamer.generate(self._trained.params, logits, state, self._sampling, seed)
            length = int(np.asarray(out.lengths)[0])
            return np.asarray(out.tokens)[0, :length].tolist(), out.logits, out.state

        return self._run(write, stop)

    def _prompt(self, message: str) -> list[int]:
        """Ids that are read for a message."""
        if isinstance(self._template, str):
            return self._start() + self._vocabulary.encode(self._template.format(message=message))
        if self._ended is None:
            return self._template.first(message, begin=self._logits is None)
        return self._template.next(message, self._ended)

    def _is_end(self, ids: list[int]) -> bool:
        """Whether the last of `ids` is a token that ends an answer."""
        return bool(ids) and ids[-1] in self._sampling.stop_tokens

    def _decode(self, ids: list[int]) -> str:
        """Text of an answer, without its end token and without ids beyond the vocabulary."""
        ids = ids[:-1] if self._is_end(ids) else ids
        return self._vocabulary.decode([i for i in ids if i < self._vocabulary.vocab_size])


def _settled(text: str, stop: Sequence[str]) -> int:
    """Length of the part of an unfinished answer that later tokens cannot change.

    It excludes an incomplete character at the end and the beginning of a stop string.
    """
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    partial = (n for end in stop for n in range(1, len(end)) if text.endswith(end[:n]))
    return len(text) - max(partial, default=0)
