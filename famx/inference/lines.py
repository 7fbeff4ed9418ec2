"""Continuations of the prompts of a JSON-lines file, or log-likelihoods of given targets.

An input line is an object with `inputs`, a text (or with the fields named by PROMPT_TEMPLATE), or with
`input_ids`, a list of token ids. For scores it also has `targets`, a text or a list of texts; inputs and
targets are encoded separately, without an end-of-text token. An output line has the fields of the input
line and, depending on the mode:

    predict            prediction: text, without the token that stopped it
    predict_with_aux   prediction, and aux: {scores: log-likelihood, tokens, num_tokens, finished: whether
                       a stop token ended it}
    score              score: log-likelihood of the targets given the inputs; num_tokens of the targets

With CHAT_TEMPLATE a prompt is a user message in the chat template of an instruct model. With several
samples each field is a list, and with a list of targets so are `score` and `num_tokens`. The
begin-of-text token is read before a prompt, unless `input_ids` start with it or a memory file has text.
"""

import dataclasses
import datetime
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import gin

import famx
from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.base.progress import Progress
from famx.base.ranges import Directory, Name, OneOf, Path, Positive, Seed
from famx.base.signals import graceful_stop
from famx.base.values import checked
from famx.data.vocabularies import Vocabulary, fingerprint
from famx.data.vocabularies.chat_template import ChatTemplate
from famx.decoding import Sampling, Streamer
from famx.inference.answers import Answers
from famx.inference.jsonl import ResumableLines
from famx.inference.prompts import NEW_FIELDS, Lines, batches
from famx.mesh import make_mesh, make_rules, on_mesh
from famx.model_dir.identity import model_fingerprint, split_checkpoint
from famx.model_dir.loading import check_model, load_model
from famx.model_dir.memory_file import load_memory, read_header
from famx.models import DecoderModel
from famx.models.inputs import check_reads_text

_WINDOW = 4  # number of batches within which lines are sorted by length


@gin.configurable(module="famx.inference")
@checked
def infer(
    checkpoint_path: Directory,
    input_file: Path,
    output_file: Path,
    mode: Annotated[str, OneOf(tuple(NEW_FIELDS))] = "predict",
    batch_size: Positive = 8,
    model: DecoderModel | None = None,
    adapter: Directory | None = None,
    memory_file: Path | None = None,
    prompt_template: Name = "{inputs}",
    chat_template: bool = False,
    sampling: Sampling = Sampling(),
    stop_at_eos: bool = True,
    num_samples: Positive = 1,
    random_seed: Seed = 0,
) -> int:
    """Write an output line for each input line, or resume an interrupted run with equal settings.

    The result of a line depends on its batch only by rounding; its draws depend only on the seed and the
    line number. Memory use does not grow with the file, and with a prompt only by the size of its text.

    Args:
      checkpoint_path: a `MODEL_DIR` (its newest checkpoint) or one `MODEL_DIR/checkpoint_<step>`.
      input_file, output_file: see the module. The output appears when it is complete.
      mode: a key of `NEW_FIELDS`.
      batch_size: number of lines per batch.
      model: definition that the checkpoint must hold; None: the one in its directory.
      adapter: saved adapter, see `famx.model_dir.loading.load_model`.
      memory_file: memory file whose state every prompt starts from; None: the initial state.
      prompt_template: text of a prompt, with fields of the line in braces.
      chat_template: whether each prompt is a user message in the vocabulary's chat template, whose
        end-of-turn token then also ends continuations.
      sampling: how tokens are chosen and what ends a continuation.
      stop_at_eos: whether the end-of-text token (and that of the chat template) ends it too.
      num_samples: number of continuations per prompt.
      random_seed: seed of all draws.

    Returns:
      Number of lines written so far.

    Raises:
      ConfigError: a setting or a line is not valid.
    """
    if num_samples > 1 and sampling.temperature == 0:
        raise ConfigError(
            f"At temperature 0 all {num_samples} samples of a prompt are equal: raise TEMPERATURE."
        )
    if not os.path.isfile(input_file):
        raise ConfigError(f"INPUT_FILE {input_file} is not a file.")
    output = ResumableLines(output_file)
    definition = check_model(split_checkpoint(checkpoint_path)[0], model)
    check_reads_text(definition, "Prompts")
    vocabulary, size = _vocabulary(definition, checkpoint_path), definition.config.vocab_size
    chat = ChatTemplate(vocabulary) if chat_template else None
    sampling = _with_stops(sampling, size, {*vocabulary.end_ids, chat and chat.end_of_turn}, stop_at_eos)
    mesh, rules = make_mesh(), make_rules()
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
        "chat_template": chat and hashlib.sha256(vocabulary.chat_template.encode()).hexdigest()[:16],
    }
    if mode != "score":
        settings |= {**dataclasses.asdict(sampling), "num_samples": num_samples}
        settings["random_seed"] = random_seed if sampling.temperature else None
    output.finished(settings)

    with on_mesh(mesh, rules):
        trained = load_model(checkpoint_path, model, adapter)
        memory = None if memory_file is None else load_memory(memory_file, trained)
        weights = model_fingerprint(trained.model.config, trained.params)[:16]
        settings |= {"step": trained.step, "weights": weights}
        if output.finished(settings):
            _say(f"{output_file} is finished already.")
            return total
        streamer = Streamer(trained.model.module)
        answers = Answers(streamer, vocabulary, memory, batch_size, sampling, num_samples, random_seed)
        answer = answers.score if mode == "score" else answers.predict
        notes = {"famx": famx.__version__, "checkpoint": str(trained.directory), "input": input_file}
        with output, graceful_stop() as stop:
            done = output.open(settings, notes)
            batch_answers = lambda batch: answer(trained.params, batch)
            done = _write_lines(lines, output, batch_answers, batch_size, done, total, stop)
            if done < total:
                return done
            output.finish()
    _say(f"Written: {output_file}, {total} lines.")
    return total


def _write_lines(
    lines: Lines,
    output: ResumableLines,
    answer: Callable[..., tuple[list[dict[str, Any]], int]],
    batch_size: int,
    done: int,
    total: int,
    stop: Callable[[], bool],
) -> int:
    """Answer the lines from `done` on, until all are written or `stop()`; return the number written."""
    if done:
        _say(f"Resuming after {done} of {total} lines.")
    window = _WINDOW * batch_size
    examples = lines.read(done - done % window)
    with LineProgress(total, done) as progress:
        while group := list(itertools.islice(examples, window)):
            ready: dict[int, Mapping[str, Any]] = {}
            for batch in batches(group, batch_size):
                if all(example.line < done for example in batch):
                    continue  # written before the run was resumed, which makes the same batches
                answers, tokens = answer(batch)
                for example, new in zip(batch, answers):
                    chosen = {name: new[name] for name in NEW_FIELDS[lines.mode]}
                    ready[example.line] = {**example.fields, **chosen}
                start = done
                while done in ready:
                    done += 1
                output.write(ready.pop(line) for line in range(start, done))
                progress.advance(done, tokens)
                if stop() and done < total:
                    progress.close()
                    _say(f"Stopped after {done} of {total} lines; the same command resumes from there.")
                    return done
    if done != total:
        raise ConfigError(f"{lines.path} was changed during the run: start again.")
    return done


# ---------------------------------------------------------------- checks


def _vocabulary(model: DecoderModel, checkpoint: str) -> Vocabulary:
    if model.vocabulary is None:
        raise ConfigError(
            f"{checkpoint} has no vocabulary: put the vocabulary.json of its training next to model.json."
        )
    return model.vocabulary


def _with_stops(
    sampling: Sampling, vocab_size: int, ends: set[int | None], stop_at_eos: bool
) -> Sampling:
    """`sampling` with `ends` among its stop tokens, if `stop_at_eos`."""
    if not all(0 <= token < vocab_size for token in sampling.stop_tokens):
        raise ConfigError(f"STOP_TOKENS {sampling.stop_tokens} must be ids from 0 to {vocab_size - 1}.")
    ends = ends - {None}
    if not stop_at_eos or not ends:
        return sampling
    stops = {*sampling.stop_tokens, *ends}
    return dataclasses.replace(sampling, stop_tokens=tuple(sorted(stops)))


def _tokens_read(memory_file: str) -> int:
    position = read_header(memory_file).position
    if len(position) != 1:
        raise ConfigError(f"{memory_file} holds {len(position)} memories: give a file that holds one.")
    return position[0]


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# ---------------------------------------------------------------- reports


class LineProgress(Progress):
    """Progress in lines, with the tokens per second that were read and written.

    Args:
      total: number of lines of the file.
      done: number of lines that an earlier run wrote.
    """

    def __init__(self, total: int, done: int):
        super().__init__("infer", total, done, "line", last_line=True)
        self._tokens = 0

    def advance(self, done: int, tokens: int) -> None:
        """Show that `done` lines are written, and that `tokens` more tokens were read or written."""
        self._tokens += tokens
        self.update(done, lambda: f"tokens/s={self._speed()}", self._line)

    def _speed(self) -> str:
        return f"{self._tokens / max(self.working, 1e-9):.4g}"

    def _line(self) -> str:
        clock = lambda seconds: datetime.timedelta(seconds=round(seconds))
        eta = "" if self.remaining is None else f"  eta {clock(self.remaining)}"
        place = f"infer {self.done}/{self.total} lines"
        return f"{place}  tokens/s {self._speed()}  elapsed {clock(self.elapsed)}{eta}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
