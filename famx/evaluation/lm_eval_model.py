"""A famx checkpoint as a model of lm-evaluation-harness, registered with it as `famx`.

Importing this module registers the model; it needs the extra `[lm-eval]`. Texts of any length are
streamed, nothing is truncated, and what several requests begin with is read once.
"""

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import simple_parse_args_string

import famx
from famx.base.errors import ConfigError
from famx.base.gin_checks import nearest
from famx.data.vocabularies import Vocabulary
from famx.data.vocabularies.chat_template import ChatTemplate
from famx.decoding import Sampling
from famx.evaluation.common import streamer_of
from famx.inference.conversation import model_with_vocabulary
from famx.inference.prefixes import PrefixReader
from famx.mesh import make_mesh, make_rules, on_mesh
from famx.model_dir.identity import weights_fingerprint
from famx.model_dir.loading import TrainedModel, load_model
from famx.model_dir.memory_file import load_memory, read_header

_BATCH_SIZE = 8  # of batch_size=auto
_GENERATION = ("do_sample", "max_gen_toks", "temperature", "top_k", "top_p", "until")

logger = logging.getLogger(__name__)


@register_model("famx")
class FamxLM(TemplateLM):
    """A famx checkpoint that answers the requests of lm-evaluation-harness.

    A context is encoded together with what follows it, special tokens included, as `--model hf` does. An
    empty context is the prefix token. Rolling log-likelihoods read a document from its first token to its
    last in one stream, after the prefix token.

    Args:
      checkpoint: a `MODEL_DIR` or one `MODEL_DIR/checkpoint_<step>`; or a loaded model.
      memory: memory file (`.famem`) whose state every text starts from.
      adapter: saved adapter for the checkpoint.
      batch_size: number of texts per batch, or "auto", which is 8; results depend on it only by rounding.
      add_bos_token: whether a text begins with the begin-of-text token. None: as the tokenizer's file
        says, and never after a memory.
      prefix_token_id: token of an empty context; None: begin of text, or else end of text.
      max_gen_toks: number of tokens of an answer for tasks that do not set it.
      zero_memory: whether the memory is zeroed before every piece that is read, to measure what it
        contributes.
      seed: seed of sampled answers.
      device, max_batch_size: not used; lm-eval's command gives them to every model, and jax finds the
        devices.

    Raises:
      ConfigError: an argument is not known or not valid, or the checkpoint has no vocabulary. The weights
        are loaded with the first request, after the data of the tasks.
    """

    def __init__(
        self,
        checkpoint: str | TrainedModel | None = None,
        memory: str | None = None,
        adapter: str | None = None,
        batch_size: int | str = 1,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        zero_memory: bool = False,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        del device, max_batch_size
        for name in unknown:
            known = ("checkpoint", "memory", "adapter", "batch_size", "add_bos_token", "prefix_token_id",
                     "max_gen_toks", "zero_memory", "seed")  # fmt: skip
            hint = nearest(name, known) or f" Known are {', '.join(known)}."
            raise ConfigError(f"The model famx has no argument {name}.{hint}")
        self._checkpoint, self._adapter, self._memory = checkpoint, adapter, memory
        self._zero_memory, self._seed, self._max_gen_toks = zero_memory, int(seed), int(max_gen_toks)
        self.batch_size = _batch_size(batch_size)
        if not checkpoint:
            raise ConfigError("The model famx needs a checkpoint: --model_args checkpoint=MODEL_DIR.")
        given = isinstance(checkpoint, TrainedModel)
        vocabulary = (checkpoint.model if given else model_with_vocabulary(str(checkpoint))).vocabulary
        if memory is not None and len(read_header(memory).position) != 1:
            raise ConfigError(f"{memory} holds several memories: give a file that holds one.")
        if add_bos_token is None:
            add_bos_token = vocabulary.adds_bos and memory is None
        self._bos = [vocabulary.bos_id] if add_bos_token and vocabulary.bos_id is not None else []
        self._prefix = prefix_token_id
        self.vocabulary = vocabulary
        self._encode = functools.lru_cache(maxsize=16)(functools.partial(_encode, vocabulary))
        if self.prefix_token_id is None:
            raise ConfigError(
                "The vocabulary has no begin-of-text and no end-of-text token: set prefix_token_id."
            )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "FamxLM":
        """The model of `--model_args`, which override flags of lm-eval such as `--batch_size`."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**flags, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "FamxLM":
        """As `create_from_arg_obj`, of a text NAME=VALUE,..."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ------ The model

    @functools.cached_property
    def trained(self) -> TrainedModel:
        """The model with its weights, which are loaded when they are first needed."""
        if isinstance(self._checkpoint, TrainedModel):
            return self._checkpoint
        return load_model(str(self._checkpoint), adapter=self._adapter)

    @functools.cached_property
    def _reader(self) -> PrefixReader:
        start = None if self._memory is None else load_memory(self._memory, self.trained)
        streamer = streamer_of(self.trained.model.module, self._zero_memory)
        return PrefixReader(streamer, self.batch_size, start)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes about the model into its results."""
        config = self.trained.model.config
        return {
            "model_num_parameters": sum(leaf.size for leaf in jax.tree.leaves(self.trained.params)),
            "model_dtype": str(config.dtype),
            "model_sha": weights_fingerprint(self.trained.params),
            "model_step": self.trained.step,
            "model_memory": config.memory.kind,
            "famx": famx.__version__,
        }

    # ------ Texts and tokens

    @property
    def eot_token_id(self) -> int | None:
        """Id of end of text, or None."""
        return self.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        """Id of the token that stands for an empty context."""
        ids = (self._prefix, self.vocabulary.bos_id, self.vocabulary.eos_id)
        return next((i for i in ids if i is not None), None)

    @property
    def tokenizer_name(self) -> str:
        """Name of the vocabulary and its chat template in the file names of lm-eval's request cache."""
        template = hashlib.sha256((self.vocabulary.chat_template or "").encode()).hexdigest()
        return f"famx-{self.vocabulary.kind}-{self.vocabulary.fingerprint[:16]}-{template[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text. Begin of text is put before it unless `add_special_tokens` is False, or it is
        None and the text has one."""
        ids = list(self._encode(string))
        if add_special_tokens is False or (add_special_tokens is None and ids[:1] == self._bos):
            return ids
        return self._bos + ids

    def _context(self, text: str) -> np.ndarray:
        return np.array(self.tok_encode(text) or [self.prefix_token_id], np.int32)

    def _text(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, without special ones and those that the vocabulary lacks."""
        hidden = set(self.vocabulary.special_tokens.values())
        known = [i for i in ids if i < self.vocabulary.vocab_size and i not in hidden]
        return self.vocabulary.decode(known)

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        if not self.vocabulary.chat_template:
            raise ConfigError(
                "The model's vocabulary has no chat template: leave out --apply_chat_template."
            )
        return ChatTemplate(self.vocabulary)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template of the vocabulary, which holds one; None for False.

        Raises:
          ConfigError: the vocabulary has none.
        """
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            logger.warning("The vocabulary has one chat template, which is used for %r.", chat_template)
        self._template  # noqa: B018, raises if there is none
        return self.vocabulary.chat_template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; the system message is left out if the template refuses it."""
        try:
            return self._template.text(chat_history, add_generation_prompt)
        except ConfigError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            logger.warning("The chat template refuses the system message, which is left out.")
            return self._template.text(rest, add_generation_prompt)

    # ------ Requests

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [
            (np.array(context or [self.prefix_token_id], np.int32), np.array(continuation, np.int32))
            for _, context, continuation in requests
        ]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)  # of an empty continuation
        for number, *result in self._scores(pairs, "loglikelihood", disable_tqdm):
            results[number] = tuple(result)
            self.cache_hook.add_partial("loglikelihood", requests[number][0], results[number])
        return results

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text after the prefix token, which is not scored itself."""
        texts = [request.args[0] for request in requests]
        prefix = np.array([self.prefix_token_id], np.int32)
        encode = lambda text: np.array(self.tok_encode(text, add_special_tokens=False), np.int32)
        results = [0.0] * len(texts)
        pairs = [(prefix, encode(text)) for text in texts]
        for number, score, _ in self._scores(pairs, "loglikelihood_rolling", disable_tqdm):
            results[number] = score
            self.cache_hook.add_partial("loglikelihood_rolling", (texts[number],), score)
        return results

    def _scores(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], kind: str, quiet: bool):
        """Yield `(number, log-likelihood, greedy)` of the pairs that have a continuation."""
        numbers = [i for i, (_, continuation) in enumerate(pairs) if len(continuation)]
        if not numbers:
            return
        with on_mesh(make_mesh(), make_rules()):
            found = self._reader.log_likelihoods(self.trained.params, [pairs[i] for i in numbers])
            for i, score, greedy in tqdm.tqdm(found, kind, len(numbers), disable=quiet):
                yield numbers[i], score, greedy

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the end of text, a string of `until` or `max_gen_toks` tokens.

        Raises:
          ConfigError: a generation argument is not known.
        """
        groups: dict[tuple[Sampling, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._how(request.args[1]), []).append(i)
        results = [""] * len(requests)
        bar = tqdm.tqdm(desc="generate_until", total=len(requests), disable=disable_tqdm)
        with bar, on_mesh(make_mesh(), make_rules()):
            for (sampling, until), numbers in groups.items():
                prompts = [self._context(requests[i].args[0]) for i in numbers]
                ended = lambda ids, until=until: any(end in self._text(ids) for end in until if end)
                found = self._reader.continuations(
                    self.trained.params, prompts, sampling, self._seed, ended
                )
                for k, ids in found:
                    text = self._text(ids[:-1] if ids[-1] in sampling.stop_tokens else ids)
                    results[numbers[k]] = postprocess_generated_text(text, list(until), None)
                    self.cache_hook.add_partial(
                        "generate_until", requests[numbers[k]].args, results[numbers[k]]
                    )
                    bar.update()
        return results

    def _how(self, gen_kwargs: Mapping[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        """How an answer is written, and the texts that end it; special tokens end it as tokens."""
        given = normalize_gen_kwargs(dict(gen_kwargs), self._max_gen_toks)
        for name in given:
            if name not in _GENERATION:
                raise ConfigError(
                    f"The model famx cannot generate with {name}={given[name]!r}: known are"
                    f" {', '.join(_GENERATION)}."
                )
        special, eos = self.vocabulary.special_tokens, self.vocabulary.eos_id
        name_of_eos = next((text for text, i in special.items() if i == eos and text), None)
        until = handle_stop_sequences(list(given["until"]), eos=name_of_eos)
        stops = {special[text] for text in until if text in special}
        stops |= set(self.vocabulary.end_ids)
        sampled = given["do_sample"]
        try:
            sampling = Sampling(
                given["max_gen_toks"],
                float(given.get("temperature", 1.0)) if sampled else 0.0,
                given.get("top_k") or None,
                float(given.get("top_p") or 1.0),
                tuple(sorted(stops)),
            )
        except ValueError as error:
            raise ConfigError(f"The task's generation_kwargs cannot be used: {error}") from error
        return sampling, tuple(until)


def _encode(vocabulary: Vocabulary, text: str) -> tuple[int, ...]:
    """Ids of a text, in which special tokens may be spelled out."""
    special = {"special": True} if vocabulary.special_tokens else {}
    return tuple(vocabulary.encode(text, **special))


def _batch_size(value: int | str) -> int:
    if str(value).split(":")[0] == "auto":
        return _BATCH_SIZE
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"batch_size must be a whole number of at least 1 or auto, not {value!r}.")
    return size
