"""SeqIO around our data: vocabularies, PassKey tasks, and the feature converter of FAM decoders.

The only module of `famx.data` that needs SeqIO and TensorFlow. Importing it registers every task of
`famx.data.names()` with SeqIO, but for those that need files of yours; `import famx.data` imports it
where SeqIO is imported already. Files are looked for when examples are asked for.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from famx.base.errors import ConfigError
from famx.data.formats import flan, gpt3
from famx.data.probes.passkey import PasskeyTask
from famx.data.rows.lanes import Documents, tokens_and_weights
from famx.data.tasks import registry
from famx.data.tasks.examples import TaskDocuments
from famx.data.tasks.text_task import TextTask
from famx.data.vocabularies import SentencePieceVocabulary
from famx.data.vocabularies.base import Vocabulary

TRAIN_EXAMPLES = 2**31 - 1
VALIDATION_EXAMPLES = 256
_EXAMPLES_PACKED_AT_ONCE = 64
_SPLITS = {"train": "train", "validation": "eval"}  # SeqIO's split -> PasskeyTask.split


class _SeqioVocabulary(seqio.Vocabulary):
    """One of our vocabularies with SeqIO's interface."""

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        self._vocabulary = vocabulary

    pad_id = property(lambda self: self._vocabulary.pad_id)
    bos_id = property(lambda self: self._vocabulary.bos_id)
    eos_id = property(lambda self: self._vocabulary.eos_id)
    unk_id = property(lambda self: self._vocabulary.unk_id)
    _base_vocab_size = property(lambda self: self._vocabulary.vocab_size)

    def _encode(self, s: str) -> Sequence[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self._vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: bytes | np.ndarray) -> np.ndarray:  # an array when run eagerly
            text = text.item() if isinstance(text, np.ndarray) else text
            return np.array(self._vocabulary.encode(text.decode("utf-8")), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> np.ndarray:
            flat = rows.reshape(-1, rows.shape[-1])
            texts = [self._vocabulary.decode(row).encode("utf-8") for row in flat]
            return np.array(texts, object).reshape(rows.shape[:-1])

        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        text.set_shape(ids.shape[:-1])
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SeqioVocabulary) and self._vocabulary == other._vocabulary

    def __hash__(self) -> int:
        return hash(self._vocabulary)


def as_seqio_vocabulary(vocabulary: Vocabulary) -> seqio.Vocabulary:
    """`vocabulary` as a `seqio.Vocabulary`; the ids stay the same.

    SeqIO's own converters pad with 0 and take every 0 for padding, whatever `pad_id` is. Where
    `pad_id` is not 0, use a converter that pads with `vocabulary.pad_id`: with SeqIO's, padding
    would become the token of id 0, and real tokens of this id would get no loss.
    """
    return _SeqioVocabulary(vocabulary)


def from_seqio_vocabulary(vocabulary: seqio.Vocabulary) -> Vocabulary | None:
    """Our vocabulary of the same ids, which can be saved beside a checkpoint; None if there is none."""
    if isinstance(vocabulary, _SeqioVocabulary):
        return vocabulary._vocabulary
    if isinstance(vocabulary, seqio.SentencePieceVocabulary) and not vocabulary.extra_ids:
        return SentencePieceVocabulary(vocabulary.sentencepiece_model_file)
    return None


class _IndexSource(seqio.DataSource):
    """Yields the numbers 0, 1, ...; examples are made from them, so they need no shuffling."""

    def __init__(self, num_input_examples: Mapping[str, int]):
        super().__init__(
            splits=tuple(num_input_examples),
            num_input_examples=num_input_examples,
            caching_permitted=False,
            performs_internal_shuffling=True,
        )

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def get_dataset(
        self, split="train", shuffle=True, seed=None, shard_info=None, **unused
    ) -> tf.data.Dataset:
        dataset = tf.data.Dataset.range(self.num_input_examples(split))
        if shard_info:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        is_train = split == "train"
        return dataset.map(lambda index: {"index": index, "is_train": is_train})


def register_passkey(name: str, task: PasskeyTask, validation_examples: int = VALIDATION_EXAMPLES):
    """Register `task` with SeqIO: features `targets` int32 and `loss_weights` float32, both [L].

    L is `sequence_length["targets"]`. Split `train` counts on without end, `validation` draws from
    the task's `eval` streams; example i is the task's example i whatever seed SeqIO is given (the
    seed is the task's own), and shard s of n holds the examples s, s + n, s + 2 n, ...

    Args:
      name: name of the task in SeqIO's registry.
      task: the examples; its own `split` does not matter.
      validation_examples: number of examples of the validation split.

    Returns:
      the `seqio.Task`.
    """
    tasks = [dataclasses.replace(task, split=split) for split in _SPLITS.values()]

    def make_examples(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None):
        if not sequence_length or not sequence_length.get("targets"):
            raise ValueError(
                f"Task '{name}' makes rows of the length asked for; give the length of 'targets'."
            )
        length = sequence_length["targets"]

        def example(index: np.ndarray, is_train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            row = tasks[0 if is_train else 1].example(int(index), length)
            return row["tokens"], row["weights"]

        def convert(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            tokens, weights = tf.numpy_function(
                example,
                [features["index"], features["is_train"]],
                (tf.int32, tf.float32),
                stateful=False,
            )
            tokens.set_shape([length])
            weights.set_shape([length])
            return {"targets": tokens, "loss_weights": weights}

        return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    return seqio.TaskRegistry.add(
        name,
        source=_IndexSource({"train": TRAIN_EXAMPLES, "validation": validation_examples}),
        preprocessors=[make_examples],
        output_features={
            "targets": seqio.Feature(as_seqio_vocabulary(task.vocab), add_eos=False),
            "loss_weights": seqio.Feature(
                seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.float32
            ),
        },
        shuffle_buffer_size=None,
    )


class FamFeatureConverter(seqio.FeatureConverter):
    """Decoder-only features with float loss weights.

    Takes `targets` int32 [n] and, where the task has them, `loss_weights` float32 [n] (else 1 on
    every token that is not padding) and `inputs` int32 [m], which come in front of the targets and
    weigh nothing. Makes, each [length]: decoder_input_tokens int32 (the targets one step later, bos
    in front), decoder_target_tokens int32 and decoder_loss_weights float32; of inputs and targets
    also decoder_causal_attention int32, 1 where bos and the inputs are read. The length is that of
    `targets` and, where it is given, of `inputs` together.

    Unpacked, every example is a row; of inputs that leave no room for their targets the start is cut
    off. Packed, rows are filled with one example after another, each with bos in front of its inputs,
    and nothing masks one from the next; an example that does not end with the row goes on in the next
    row. Only the last row of a dataset that ends is padded, and decoder_causal_attention is left out.
    No token or weight is changed, and the iterator can be saved. SeqIO itself cuts examples to the
    lengths before they come here, unless `seqio.get_dataset` is given `trim_output_features=False`.
    """

    TASK_FEATURES = {"targets": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)}
    MODEL_FEATURES = {
        "decoder_input_tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "decoder_target_tokens": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "decoder_loss_weights": seqio.FeatureConverter.FeatureSpec(dtype=tf.float32),
    }
    PACKING_FEATURE_DTYPES = {}

    def __init__(
        self,
        pack: bool = False,
        use_custom_packing_ops: bool = False,
        bos_id: int = 1,
        pad_id: int = 0,
        **kwargs,
    ):
        """
        Args:
          pack: whether to fill rows with several examples.
          use_custom_packing_ops: without meaning; packing here needs no ops of its own.
          bos_id: first input token of every example.
          pad_id: stands after the last token of a row, with weight 0.
          **kwargs: handed to `seqio.FeatureConverter`.
        """
        self.pad_id = pad_id
        super().__init__(
            pack=pack, use_custom_packing_ops=use_custom_packing_ops, bos_id=bos_id, **kwargs
        )

    def __call__(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]):
        converter, lengths = self, self._target_lengths(task_feature_lengths)
        if "inputs" in ds.element_spec:
            join = functools.partial(self._join, length=lengths["targets"])
            ds = ds.map(join, num_parallel_calls=tf.data.AUTOTUNE)
            if not self.pack:
                converter = copy.copy(self)
                mark = {"decoder_causal_attention": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)}
                converter.MODEL_FEATURES = {**self.MODEL_FEATURES, **mark}
        return super(FamFeatureConverter, converter).__call__(ds, lengths)

    def _target_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        lengths = dict(task_feature_lengths)
        # SeqIO's evaluator names the longest that it found: not more than the targets.
        if lengths.pop("loss_weights", 0) > lengths.get("targets", 0):
            raise ValueError("'loss_weights' must not be given more length than 'targets'.")
        if "inputs" in lengths:
            lengths["targets"] = lengths.get("targets", 0) + lengths.pop("inputs")
        return lengths

    def _join(self, features: Mapping[str, tf.Tensor], length: int) -> dict[str, tf.Tensor]:
        """Inputs and targets as targets, which weigh nothing where they are inputs."""
        inputs, targets = features["inputs"], features["targets"]
        weights = self._weights(features)
        if not self.pack:
            room = length - tf.maximum(tf.shape(targets)[0], 1)  # to predict one where there are none
            inputs = inputs[tf.shape(inputs)[0] - tf.clip_by_value(room, 0, tf.shape(inputs)[0]) :]
        weightless = tf.zeros_like(inputs, tf.float32)
        return {
            "targets": tf.concat([inputs, targets], axis=0),
            "loss_weights": tf.concat([weightless, weights], axis=0),
            "num_inputs": tf.shape(inputs)[0],
        }

    def _weights(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        if "loss_weights" in features:
            return features["loss_weights"]
        return tf.cast(features["targets"] != self.pad_id, tf.float32)

    def _validate_dataset(self, ds, expected_features, expected_lengths, strict, error_label):
        """SeqIO's checks; examples may be longer than a row, which is checked if `strict`."""
        lengths = expected_lengths if strict else {}
        return super()._validate_dataset(ds, expected_features, lengths, strict, error_label)

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]):
        length = task_feature_lengths["targets"]
        if self.pack:
            return self._pack_rows(ds, length)

        def convert(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            targets = _trim_and_pad(features["targets"], length, self.pad_id)
            row = {
                "decoder_input_tokens": tf.concat([[self.bos_id], targets[:-1]], axis=0),
                "decoder_target_tokens": targets,
                "decoder_loss_weights": _trim_and_pad(self._weights(features), length, 0.0),
            }
            if "num_inputs" in features:
                prompt = tf.range(length) <= features["num_inputs"]
                row["decoder_causal_attention"] = tf.cast(prompt, tf.int32)
            return row

        return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    def _pack_rows(self, ds: tf.data.Dataset, length: int) -> tf.data.Dataset:
        """Joins many examples at once to one stream and cuts it; the rest waits for the next ones."""
        task_features = [x for x in ("targets", "loss_weights") if x in ds.element_spec]

        def join(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            if not isinstance(features["targets"], tf.RaggedTensor):  # all have one static length
                features = {k: tf.RaggedTensor.from_tensor(v) for k, v in features.items()}
            examples, targets = features["targets"], features["targets"].flat_values
            starts = tf.boolean_mask(examples.row_starts(), examples.row_lengths() > 0)
            inputs = tf.concat([[self.bos_id], targets], axis=0)[:-1]
            inputs = tf.tensor_scatter_nd_update(
                inputs, starts[:, None], tf.fill(tf.shape(starts), self.bos_id))
            weights = features.get("loss_weights")
            if weights is None:
                weights = tf.cast(targets != self.pad_id, tf.float32)
            else:
                tf.debugging.assert_equal(
                    weights.row_splits, examples.row_splits,
                    "Every example needs as many loss_weights as targets.",
                )  # fmt: skip
                weights = weights.flat_values
            return {
                "decoder_input_tokens": inputs,
                "decoder_target_tokens": targets,
                "decoder_loss_weights": weights,
            }

        def cut(rest, element):
            stream, is_last = element
            joined = {k: tf.concat([rest[k], stream[k]], axis=0) for k in rest}
            size = tf.shape(joined["decoder_target_tokens"])[0]
            padding = tf.where(is_last, -size % length, 0)
            whole = (size + padding) // length * length
            fill = {k: 0 if v.dtype == tf.float32 else self.pad_id for k, v in joined.items()}
            joined = {
                k: tf.pad(v, [[0, padding]], constant_values=tf.cast(fill[k], v.dtype))
                for k, v in joined.items()
            }
            rows = {k: tf.reshape(v[:whole], [-1, length]) for k, v in joined.items()}
            return {k: v[whole:] for k, v in joined.items()}, rows

        nothing = {k: tf.zeros([0], v.dtype) for k, v in self.MODEL_FEATURES.items()}
        end = tf.data.Dataset.from_tensors((nothing, True))
        ds = ds.map(lambda features: {x: features[x] for x in task_features})
        ds = ds.ragged_batch(_EXAMPLES_PACKED_AT_ONCE)
        ds = ds.map(lambda features: (join(features), False)).concatenate(end)
        return ds.scan(nothing, cut).unbatch()

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        """Every feature is as long as `targets`, and `inputs` where their length is given."""
        length = self._target_lengths(task_feature_lengths)["targets"]
        return {name: length for name in self.MODEL_FEATURES}


def _trim_and_pad(x: tf.Tensor, length: int, value) -> tf.Tensor:
    x = x[:length]
    x = tf.pad(x, [[0, length - tf.shape(x)[0]]], constant_values=tf.cast(value, x.dtype))
    x.set_shape([length])
    return x


def rectangular(predict_fn: Callable, pad_id: int = 0) -> Callable:
    """`predict_fn` for `seqio.Evaluator`, which crashes on predictions of different lengths.

    Args:
      predict_fn: takes a dataset and returns pairs (index, tokens), alone or with auxiliary values.
      pad_id: is put behind the shorter predictions.

    Returns:
      the same function, whose predictions all have the length of the longest.
    """

    def predict(dataset):
        found = predict_fn(dataset)
        pairs, *rest = found if isinstance(found, tuple) else (found,)
        width = max((len(tokens) for _, tokens in pairs), default=0)
        pad = lambda x: np.pad(x, (0, width - len(x)), constant_values=pad_id)
        pairs = [(index, pad(np.asarray(tokens, np.int32))) for index, tokens in pairs]
        return (pairs, *rest) if rest else pairs

    return predict


# ------ Text tasks


class _TextSource(_IndexSource):
    """Yields the number and the split of every example that is there; these are what is shuffled."""

    def __init__(self, splits: Sequence[str], size: Callable[[str], int]):
        super().__init__(dict.fromkeys(splits, 0))
        self._caching_permitted = True
        self._size = size  # of a split: asked only when it is needed, for files may be missing

    def num_input_examples(self, split: str) -> int:
        return self._size(split)

    def get_dataset(
        self, split="train", shuffle=True, seed=None, shard_info=None, **unused
    ) -> tf.data.Dataset:
        size = self.num_input_examples(split)
        dataset = tf.data.Dataset.range(size)
        if shard_info:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            dataset = dataset.shuffle(size, seed)
        return dataset.map(lambda index: {"index": index, "split": split})


def register_text_task(
    task: TextTask, name: str | None = None, decoder_only: bool = False, lazy: bool = False
) -> seqio.Task:
    """Register `task` with SeqIO, for its own vocabulary; an example is read when it is asked for.

    Features `inputs` and `targets`, int32 tokens of the two texts, eos after the targets; for tasks of
    kind "documents", `targets` alone. `references`, the texts that count as right, go to the metrics,
    which are the task's own. With `decoder_only` they are the documents that `TextTask.documents` gives:
    `targets` int32 and `loss_weights` float32.

    Args:
      task: the task, with `data_dir`, `vocabulary`, `max_tokens` and `cut` as they are wanted.
        `max_tokens` counts with `decoder_only` and for "documents".
      name: name in SeqIO's registry; None: the task's name.
      decoder_only: whether inputs and targets are one sequence with loss weights.
      lazy: register without a look at the files, with every split that the task may have; what is
        missing is told when examples are asked for.

    Returns:
      the `seqio.Task`, with the splits whose files are there. One that importing this module
      registered under the name is replaced.

    Raises:
      ConfigError: no split is there; the sentence says what is needed.
    """
    name = name or task.name
    examples = functools.cache(task.examples)
    splits, absent = [], None
    for split in task.splits:
        try:
            lazy or examples(split)
            splits.append(split)
        except ConfigError as error:
            absent = absent or error
    if not splits:
        raise absent
    as_one = decoder_only or task.kind == "documents"

    @functools.cache
    def documents(split):
        return TaskDocuments(examples(split), task.kind, task.vocab, task.max_tokens, task.cut)

    def document(index: np.ndarray, split: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return documents(_text(split))[int(index)]

    def texts(index: np.ndarray, split: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        example = examples(_text(split))[int(index)]
        return tuple(_bytes(example[part]) for part in ("inputs", "targets", "references"))

    def convert(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        numbers = [features["index"], features["split"]]
        inputs, targets, references = tf.numpy_function(texts, numbers, [tf.string] * 3, stateful=False)
        for part, shape in ((inputs, []), (targets, []), (references, [None])):
            part.set_shape(shape)
        converted = {"references": references}
        if not as_one:
            return {**converted, "inputs": inputs, "targets": targets}
        tokens, weights = tf.numpy_function(document, numbers, (tf.int32, tf.float32), stateful=False)
        tokens.set_shape([None])
        weights.set_shape([None])
        weights = {"loss_weights": weights} if decoder_only else {}
        return {**converted, "targets": tokens, **weights}

    vocabulary = as_seqio_vocabulary(task.vocab)
    eos = task.vocab.eos_id is not None and not as_one  # documents have theirs already
    features = {"targets": seqio.Feature(vocabulary, add_eos=eos)}
    if decoder_only:
        weights = seqio.PassThroughVocabulary(size=0)
        features["loss_weights"] = seqio.Feature(weights, add_eos=False, dtype=tf.float32)
    elif not as_one:
        features["inputs"] = seqio.Feature(vocabulary, add_eos=False)

    def postprocess(output, example, is_target=False):
        return [x.decode() for x in example["references"]] if is_target else output

    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    _make_room(name)
    return seqio.TaskRegistry.add(
        name,
        source=_TextSource(splits, lambda split: len(examples(split))),
        preprocessors=[
            lambda dataset: dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE),
            seqio.CacheDatasetPlaceholder(),
            *(() if as_one else steps),
        ],
        output_features=features,
        postprocess_fn=postprocess,
        metric_fns=list(task.metrics),
        shuffle_buffer_size=None,
    )


def register_documents(
    name: str, documents: Mapping[str, Documents], vocabulary: Vocabulary
) -> seqio.Task:
    """Register documents with SeqIO: features `targets` int32 [n] and `loss_weights` float32 [n].

    Args:
      name: name in SeqIO's registry.
      documents: of each split; texts (`TextFiles`), or rows of a made task (`IndexedDocuments`).
      vocabulary: theirs.

    Returns:
      the `seqio.Task`, which can be cached.
    """

    def document(index: np.ndarray, split: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tokens_and_weights(documents[_text(split)][int(index)])

    def convert(features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        numbers = [features["index"], features["split"]]
        tokens, weights = tf.numpy_function(document, numbers, (tf.int32, tf.float32), stateful=False)
        tokens.set_shape([None])
        weights.set_shape([None])
        return {"targets": tokens, "loss_weights": weights}

    weights = seqio.PassThroughVocabulary(size=0)
    _make_room(name)
    return seqio.TaskRegistry.add(
        name,
        source=_TextSource(tuple(documents), lambda split: len(documents[split])),
        preprocessors=[
            lambda dataset: dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE),
            seqio.CacheDatasetPlaceholder(),
        ],
        output_features={
            "targets": seqio.Feature(as_seqio_vocabulary(vocabulary), add_eos=False),
            "loss_weights": seqio.Feature(weights, add_eos=False, dtype=tf.float32),
        },
        shuffle_buffer_size=None,
    )


def _text(value: bytes | np.ndarray) -> str:
    return (value.item() if isinstance(value, np.ndarray) else value).decode()


def _bytes(value: str | list[str]) -> np.ndarray:
    if isinstance(value, str):
        return np.array(value.encode(), object)
    return np.array([x.encode() for x in value], object)


# ------ Every task under its own name

_OURS: set[str] = set()  # registered below, and replaced when one of the name is registered by hand
_NEED_FILES = ("own_text", "own_jsonl")


def _make_room(name: str) -> None:
    if name in _OURS:
        _OURS.remove(name)
        seqio.TaskRegistry.remove(name)


def register_named(name: str, as_name: str | None = None, **options) -> seqio.Task:
    """Register `famx.data.get(name, **options)` with SeqIO under `as_name`; None: the same name."""
    task, as_name = registry.get(name, **options), as_name or name
    if isinstance(task, TextTask):
        return register_text_task(task, as_name, lazy=True)
    if hasattr(task, "batch"):
        return register_passkey(as_name, task)
    texts = {x: registry.get(name, **{**options, "split": x}) for x in ("train", "validation")}
    return register_documents(as_name, texts, task.vocab)


def _register_all() -> None:
    """Registers the tasks of `famx.data.names()`, with their default settings, under their names."""
    mixtures = {"xlsum": {}, "flan": {f"flan_{name}": rate for name, rate in flan.WEIGHTS.items()}}
    for name in registry.names():
        if name in mixtures or name in _NEED_FILES or registry.needs_options(name):
            continue
        task = registry.get(name)
        if isinstance(task, gpt3.Suite):
            mixtures[name] = {one.name: 1.0 for one in task.tasks}
            continue
        register_named(name)
        _OURS.add(name)
    languages = [name for name in registry.names() if name.startswith("xlsum_")]
    mixtures["xlsum"] = {name: seqio.mixing_rate_num_examples for name in languages}
    for name, rates in mixtures.items():
        seqio.MixtureRegistry.add(name, list(rates.items()))


_register_all()
