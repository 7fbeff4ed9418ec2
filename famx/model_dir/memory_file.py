"""Memory files (`.famem`): the state of a model after reading, from which any process can continue.

A memory file is a safetensors file. Its arrays are the fields of one `DecoderState`, bit for bit, and
`logits`, those after the last token, from which generation continues. Its metadata holds a `Header` as
JSON. A file is refused if another model or other weights read the text, or if it was cut or altered.

Of the window, a file holds the slots that are not zero: `keys` and `values` are `[layers, B, n, K, Dh]`,
and `filled` (int32 `[n]`) names the slots, counted through all blocks of the window. Files of format 1
hold the whole window.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import ConfigDict, Field

import famx
from famx.base.checksums import checksum
from famx.base.errors import ConfigError
from famx.base.files import write_bytes
from famx.base.untrusted import Fields, Name, parse_object, parsed, shown
from famx.data.vocabularies import fingerprint
from famx.model_dir.identity import differing_fields, model_fingerprint
from famx.model_dir.loading import TrainedModel
from famx.modules import DecoderState

FORMAT = 2  # of files that are written; 1 is read, too
_WINDOW, _FILLED = ("keys", "values"), "filled"
_KEY = "famem"  # key of the header in the metadata of safetensors


@dataclasses.dataclass(frozen=True)
class Header:
    """Header of a memory file.

    Attributes:
      famx: version that wrote the file.
      model: `DecoderConfig.to_dict()` of the model that read the texts.
      model_fingerprint: fingerprint of that model and its weights.
      vocabulary_fingerprint: fingerprint of its vocabulary; None: it had none.
      sources: names of the texts, in the order of reading.
      position: number of tokens read, for each example.
      updates: number of memory updates, for each example.
      num_bytes: size of the state.
      sha256: checksum of the other fields and of the arrays.
      format: version of the format.
    """

    famx: str
    model: dict[str, Any]
    model_fingerprint: str
    vocabulary_fingerprint: str | None
    sources: list[str]
    position: list[int]
    updates: list[int]
    num_bytes: int
    sha256: str = ""
    format: int = FORMAT


_Count = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
_Counts = Annotated[list[_Count], Field(min_length=1, max_length=1 << 16)]
_Digest = Annotated[str, Field(max_length=128)]


class _Header(Fields):
    """`Header` as the JSON of a file has it."""

    model_config = ConfigDict(extra="forbid")

    famx: Name
    model: dict[str, Any]
    model_fingerprint: _Digest
    vocabulary_fingerprint: _Digest | None
    sources: Annotated[list[Annotated[str, Field(max_length=1 << 16)]], Field(max_length=1 << 16)]
    position: _Counts
    updates: _Counts
    num_bytes: Annotated[int, Field(ge=0, lt=1 << 60)]
    sha256: _Digest
    format: int


def save_memory(
    path: str | os.PathLike,
    trained: TrainedModel,
    logits: jax.Array,
    state: DecoderState,
    sources: Sequence[str] = (),
) -> Header:
    """Write the state of `trained` after reading; the file replaces an old one when it is complete.

    Args:
      path: path of the file.
      trained: the model that read the texts.
      logits: logits `[B, V]` after the last token, as `Streamer.read` returned them.
      state: state after the last token, of any batch size.
      sources: names of the texts that were read.

    Raises:
      ConfigError: the file cannot be written.
    """
    arrays = {**_packed(_named(state)), "logits": np.asarray(logits)}
    vocabulary = trained.model.vocabulary
    header = Header(
        famx=famx.__version__,
        model=json.loads(json.dumps(trained.model.config.to_dict())),
        model_fingerprint=model_fingerprint(trained.model.config, trained.params),
        vocabulary_fingerprint=vocabulary and fingerprint(vocabulary),
        sources=list(sources),
        position=arrays["position"].tolist(),
        updates=arrays["updates"].tolist(),
        num_bytes=state.num_bytes(),
    )
    return _write(path, header, arrays)


def with_memory(path: str | os.PathLike, out: str | os.PathLike, memory) -> Header:
    """Write a copy of the memory file `path` to `out` with another `DecoderState.memory`.

    The copy belongs to the same model; its logits are still those after the last token that was read.

    Raises:
      ConfigError: `path` is not a memory file, or was cut or altered; `out` cannot be written.
    """
    header, arrays = _read(path, load=True)
    return _write(out, header, {**arrays, **_named({"memory": memory})})


def _named(tree) -> dict[str, np.ndarray]:
    """Leaves of a tree as host arrays, by path: "keys", or "memory/matrix" if a memory has several."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _packed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a state, with only those slots of the window in which a bit is set."""
    joined = lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:])
    flat = {name: joined(arrays[name]) for name in _WINDOW}
    bits = lambda x: np.ascontiguousarray(x).reshape(*x.shape[:3], -1).view(np.uint8)
    filled = np.any([bits(x).any(axis=(0, 1, 3)) for x in flat.values()], axis=0)
    slots = np.flatnonzero(filled).astype(np.int32)
    return {**arrays, **{name: np.take(x, slots, axis=2) for name, x in flat.items()}, _FILLED: slots}


def _unpacked(path, arrays: Mapping[str, np.ndarray], wanted) -> dict[str, np.ndarray]:
    """The arrays of a state from those of a file; `wanted` is the state as ShapeDtypeStructs.

    Raises:
      ConfigError: the arrays of the window do not fit together, or not the model.
    """
    layers, batch, segments, size, *rest = wanted.keys.shape
    slots = arrays.get(_FILLED, np.zeros((), np.int32))  # without them: a scalar, which is refused
    ordered = slots.dtype == np.int32 and slots.ndim == 1
    if ordered and slots.size:
        ordered = bool(slots[0] >= 0 and slots[-1] < segments * size and np.all(np.diff(slots) > 0))
    shape = (layers, batch, slots.size if ordered else 0, *rest)
    if not ordered or any(name not in arrays or arrays[name].shape != shape for name in _WINDOW):
        raise ConfigError(f"{path} does not hold the window of this model: make the memory file again.")
    whole = {name: array for name, array in arrays.items() if name != _FILLED}
    for name in _WINDOW:
        flat = np.zeros((layers, batch, segments * size, *rest), arrays[name].dtype)
        flat[:, :, slots] = arrays[name]
        whole[name] = flat.reshape(layers, batch, segments, size, *rest)
    return whole


def _write(path, header: Header, arrays: Mapping[str, np.ndarray]) -> Header:
    import safetensors.numpy

    header = dataclasses.replace(header, sha256="")
    header = dataclasses.replace(header, sha256=_checksum(header, arrays))
    data = safetensors.numpy.save(dict(arrays), {_KEY: json.dumps(dataclasses.asdict(header))})
    write_bytes(path, data)
    return header


def read_header(path: str | os.PathLike) -> Header:
    """The header of a memory file; loads no array and does not verify the checksum.

    Raises:
      ConfigError: there is no such file, it is not a whole memory file, or of another format.
    """
    return _read(path)[0]


def check_memory(path: str | os.PathLike) -> Header:
    """The header of a memory file whose content fits its checksum.

    Raises:
      ConfigError: there is no such file, it was cut or altered, or it is of another format.
    """
    return _read(path, load=True)[0]


def load_memory(path: str | os.PathLike, trained: TrainedModel) -> DecoderState:
    """The state that `save_memory` wrote, for the model that read it; see `restore_memory`."""
    return restore_memory(path, trained)[1]


def restore_memory(path: str | os.PathLike, trained: TrainedModel) -> tuple[jax.Array, DecoderState]:
    """`(logits [B, V], state)` that `save_memory` wrote, as device arrays that may be donated.

    They are equal bit for bit, unless the model has another dtype than the one that wrote them; then they
    get its dtypes.

    Raises:
      ConfigError: there is no such file; it was cut, altered or has another format; another model,
        other weights or another vocabulary read the text.
    """
    header, arrays = _read(path, load=True)
    model = trained.model
    differing = differing_fields(header.model, model.config.to_dict())
    if differing:
        raise ConfigError(
            f"{path} is the memory of another model, differing in {differing}: load the checkpoint"
            " that made it."
        )
    if header.model_fingerprint != model_fingerprint(model.config, trained.params):
        raise ConfigError(
            f"{path} is the memory of this model with other weights: load the checkpoint that made it,"
            " or read the text again."
        )
    vocabulary = model.vocabulary
    if None not in (vocabulary, header.vocabulary_fingerprint):
        if header.vocabulary_fingerprint != fingerprint(vocabulary):
            raise ConfigError(
                f"{path} was read with another vocabulary than that of {trained.directory}: load the"
                " checkpoint that made it."
            )
    batch = len(header.position)
    wanted = jax.eval_shape(lambda params: model.initial_state(params, batch), trained.params)
    if header.format > 1:
        arrays = _unpacked(path, arrays, wanted)
    _check_arrays(path, header, arrays, wanted, model.config.vocab_size)
    load = lambda path, leaf: jnp.array(arrays[_name(path)], leaf.dtype)
    return jnp.array(arrays["logits"]), jax.tree_util.tree_map_with_path(load, wanted)


def _check_arrays(path, header: Header, arrays: Mapping[str, np.ndarray], wanted, vocab_size) -> None:
    """Check that the arrays are those of a state of this model, by names, shapes and types.

    A file may be whole and have the checksum that it should, and still hold another state than it says.

    Raises:
      ConfigError: they are not; names the array.
    """
    batch = len(header.position)
    leaves = {_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
    leaves["logits"] = jax.ShapeDtypeStruct((batch, vocab_size), np.float32)
    if differing := sorted(arrays.keys() ^ leaves.keys()):
        what = "lacks" if differing[0] in leaves else "has, beyond a state of this model,"
        raise ConfigError(f"{path} {what} {shown(differing[0])}: make the memory file again.")
    for name, leaf in leaves.items():
        array = arrays[name]
        both = jnp.issubdtype(leaf.dtype, jnp.floating), jnp.issubdtype(array.dtype, jnp.floating)
        fits = all(both) or array.dtype == leaf.dtype
        if array.shape != leaf.shape or not fits:
            raise ConfigError(
                f"{path} holds {name} of {array.dtype} {list(array.shape)}, where the model has"
                f" {leaf.dtype} {list(leaf.shape)}: make the memory file again."
            )
    for name in ("position", "updates"):
        if arrays[name].tolist() != getattr(header, name):
            raise ConfigError(f"{path} says another {name} than its state has: make it again.")


def _read(path, load: bool = False) -> tuple[Header, dict[str, np.ndarray]]:
    """The header and, with `load`, the arrays, after a comparison with the checksum."""
    if not os.path.isfile(path):
        raise ConfigError(f"There is no memory file {path}.")
    import safetensors  # not needed where no memory file is read or written

    try:
        with safetensors.safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ConfigError(f"{path} is a safetensors file, but not a memory of famx.")
            fields = parse_object(text, path)
            if fields.get("format") not in (1, FORMAT):
                wrote = shown(fields.get("famx")).strip("'")
                raise ConfigError(
                    f"{path} has format {shown(fields.get('format'))}, and this famx, {famx.__version__},"
                    f" reads the formats 1 and {FORMAT}: famx {wrote} wrote it."
                )
            header = Header(**parsed(_Header, fields, path).model_dump())
            arrays = {name: file.get_tensor(name) for name in file.keys()} if load else {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ConfigError:
        raise
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a whole memory file: make it again, or copy it again."
        ) from error
    if load and _checksum(header, arrays) != header.sha256:
        raise ConfigError(f"{path} is damaged, its checksum does not fit: make the memory file again.")
    return header, arrays


def _checksum(header: Header, arrays: Mapping[str, np.ndarray]) -> str:
    return checksum(dataclasses.asdict(dataclasses.replace(header, sha256="")), arrays)
