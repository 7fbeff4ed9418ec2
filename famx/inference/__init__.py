"""Reads the prompts of a JSON-lines file, and writes what the model answers or how likely targets are.

A line is an object with `inputs`, a text (or with the fields that PROMPT_TEMPLATE names), or with
`input_ids`, a list of token ids. For scores it has `targets`, a text or a list of texts; inputs and
targets are encoded apart and no end of text is put after either. Its line in the output has the same
fields and these:

    predict            prediction: text, without the token that stopped it
    predict_with_aux   and aux: {scores: log-likelihood, tokens, num_tokens, finished: whether a stop
                       token ended it}
    score              score: log-likelihood of the targets given the inputs; num_tokens, of the targets

A prompt may be made the message of a user by the chat template of an instruct model (CHAT_TEMPLATE).
With several samples, each of these is a list, and with a list of targets so are `score` and
`num_tokens`. The tokens read are those of the prompt, with begin of text in front unless the ids
bring it or a memory goes before them.
"""

import dataclasses
import datetime
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import gin
import tqdm

import famx
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.signals import stop_signal
from famx.data.vocabularies import fingerprint
from famx.decoding import Sampling, Streamer
from famx.inference.answers import Answers
from famx.inference.chat_template import ChatTemplate
from famx.inference.jsonl import ResumableLines
from famx.inference.prompts import NEW_FIELDS, Lines, batches
from famx.model_dir.loading import check_model, load_model, model_fingerprint, split_checkpoint
from famx.models import DecoderModel

_WINDOW = 4  # batches among which lines of similar length are put together
_REPORT_SECONDS = 10


@gin.configurable
def infer(
    checkpoint_path: str,
    input_file: str,
    output_file: str,
    mode: str = "predict",
    batch_size: int = 8,
    model: DecoderModel | None = None,
    adapter: str | None = None,
    memory_file: str | None = None,
    prompt_template: str = "{inputs}",
    chat_template: bool = False,
    sampling: Sampling = Sampling(),
    stop_at_eos: bool = True,
    num_samples: int = 1,
    random_seed: int = 0,
) -> int:
    """Writes a line for each line of a file, or goes on where a stopped run with equal settings was.

    A line's result depends on its batch by rounding alone; its draws follow from the seed and its
    number. Neither the file nor a prompt of any length takes more memory than a few batches of text.

    Args:
      checkpoint_path: a `MODEL_DIR` (its newest checkpoint) or one `MODEL_DIR/checkpoint_<step>`.
      input_file, output_file: see the module. The output appears when it is complete.
      mode: one of `NEW_FIELDS`.
      batch_size: lines at once.
      model: what the checkpoint must hold; None: what its directory says.
      adapter: of the model, see `famx.model_dir.loading.load_model`.
      memory_file: a memory from which every prompt begins; None: they begin from nothing.
      prompt_template: a prompt's text, with fields of the line in braces.
      chat_template: whether each prompt is read as a user's message in the vocabulary's chat template,
        which then also ends continuations.
      sampling: how continuations are chosen and where they end.
      stop_at_eos: whether end of text ends them too.
      num_samples: continuations of each prompt.
      random_seed: of all draws.

    Returns:
      How many lines the output has so far.

    Raises:
      ConfigError: with one sentence, if the settings or a line make no sense.
    """
    # ---------------------------------------------------------------- checks
    if mode not in NEW_FIELDS:
        raise ConfigError(f"MODE is {mode!r}: it must be one of {', '.join(NEW_FIELDS)}.")
    for name, value, least in (
        ("BATCH_SIZE", batch_size, 1), ("NUM_SAMPLES", num_samples, 1), ("RANDOM_SEED", random_seed, 0)
    ):  # fmt: skip
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}.")
    if num_samples > 1 and sampling.temperature == 0:
        raise ConfigError(
            f"At temperature 0 all {num_samples} samples of a prompt are equal: raise TEMPERATURE."
        )
    if not os.path.isfile(input_file):
        raise ConfigError(f"INPUT_FILE {input_file} is not a file.")
    output = ResumableLines(output_file)
    definition = check_model(split_checkpoint(checkpoint_path)[0], model)
    vocabulary = definition.vocabulary
    if vocabulary is None:
        raise ConfigError(
            f"{checkpoint_path} has no vocabulary: put the vocabulary.json of its training beside"
            " model.json."
        )
    size = definition.config.vocab_size
    if not all(0 <= token < size for token in sampling.stop_tokens):
        raise ConfigError(f"STOP_TOKENS {sampling.stop_tokens} must be ids from 0 to {size - 1}.")
    chat = ChatTemplate(vocabulary) if chat_template else None
    ends = {vocabulary.eos_id, chat and chat.end_of_turn} - {None}
    if stop_at_eos and ends:
        stops = {*sampling.stop_tokens, *ends}
        sampling = dataclasses.replace(sampling, stop_tokens=tuple(sorted(stops)))
    gin_utils.check_all_used()
    begin = memory_file is None or _tokens_read(memory_file) == 0
    lines = Lines(input_file, mode, prompt_template, vocabulary, size, begin, chat)
    total = lines.check()
    settings = {
        "mode": mode,
        "input_file": _digest(input_file),
        "prompt_template": prompt_template,
        "vocabulary": fingerprint(vocabulary)[:16],
        "memory_file": memory_file and _digest(memory_file),
    }
    if chat is not None:
        settings["chat_template"] = hashlib.sha256(vocabulary.chat_template.encode()).hexdigest()[:16]
    if mode != "score":
        settings |= {**dataclasses.asdict(sampling), "num_samples": num_samples}
        settings["random_seed"] = random_seed if sampling.temperature else None
    output.finished(settings)

    # ---------------------------------------------------------------- model
    trained = load_model(checkpoint_path, model, adapter)
    memory = None
    if memory_file is not None:
        from famx.model_dir.memory_file import load_memory

        memory = load_memory(memory_file, trained)
    weights = model_fingerprint(trained.model.config, trained.params)[:16]
    settings |= {"step": trained.step, "weights": weights}
    if output.finished(settings):
        _say(f"{output_file} is finished already.")
        return total
    answers = Answers(
        Streamer(trained.model.module), vocabulary, memory, batch_size, sampling, num_samples, random_seed
    )
    answer = answers.score if mode == "score" else answers.predict

    # ---------------------------------------------------------------- lines
    notes = {"famx": famx.__version__, "checkpoint": str(trained.directory), "input": input_file}
    with output, stop_signal() as stop:
        done = output.open(settings, notes)
        if done:
            _say(f"Going on after {done} of {total} lines.")
        progress = Progress(total, done)
        window = _WINDOW * batch_size
        examples = lines.read(done - done % window)
        while some := list(itertools.islice(examples, window)):
            ready: dict[int, Mapping[str, Any]] = {}
            for batch in batches(some, batch_size):
                if all(example.line < done for example in batch):
                    continue  # batches are as they were before the run was stopped
                found, tokens = answer(trained.params, batch)
                for example, new in zip(batch, found):
                    kept = {name: new[name] for name in NEW_FIELDS[mode]}
                    ready[example.line] = {**example.fields, **kept}
                start = done
                while done in ready:
                    done += 1
                output.write(ready.pop(line) for line in range(start, done))
                progress.update(done, tokens)
                if stop() and done < total:
                    progress.close()
                    _say(f"Stopped after {done} of {total} lines; the same command goes on from there.")
                    return done
        progress.close()
        if done != total:
            raise ConfigError(f"{input_file} was changed during the run: begin anew.")
        output.finish()
    _say(f"Written: {output_file}, {total} lines.")
    return total


def _tokens_read(memory_file: str) -> int:
    from famx.model_dir.memory_file import read_header

    position = read_header(memory_file).position
    if len(position) != 1:
        raise ConfigError(f"{memory_file} holds {len(position)} memories: give a file that holds one.")
    return position[0]


# ---------------------------------------------------------------- reports


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere: lines, tokens/s, time left."""

    def __init__(self, total: int, done: int):
        self.total, self.first, self.tokens = total, done, 0
        self._began = self._said = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, initial=done, desc="infer", unit="line")

    def update(self, done: int, tokens: int) -> None:
        """`done` lines are written; `tokens` more were read or written."""
        self.tokens += tokens
        now = time.monotonic()
        speed = f"{self.tokens / (now - self._began):.4g}"
        if self._bar is not None:
            self._bar.set_postfix({"tokens/s": speed}, refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._said >= _REPORT_SECONDS or done == self.total:
            self._said = now
            elapsed = now - self._began
            eta = ""
            if done > self.first:
                left = elapsed * (self.total - done) / (done - self.first)
                eta = f"  eta {_clock(left)}"
            text = f"infer {done}/{self.total} lines  tokens/s {speed}  elapsed {_clock(elapsed)}{eta}"
            _say(text)

    def close(self) -> None:
        """Ends the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
