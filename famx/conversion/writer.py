"""Writing a checkpoint piece by piece, so that not even one array has to fit in memory.

The result is an ordinary orbax checkpoint. Each array is stored in zarr chunks that span one layer and
follow the shards of a mesh, so that a device reads only its own part.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType

from famx.base.errors import ConfigError
from famx.mesh import (
    LOGICAL_AXES,
    MESH_AXES,
    PRESETS,
    Rules,
    logical_to_sharding,
    without_boxes,
)
from famx.model_dir.commit import CUSTOM_METADATA
from famx.model_dir.digested_commit import CommitWithDigests
from famx.modules import Decoder, DecoderConfig

CHUNK_BYTES = 1 << 25

LeafPath = tuple[str, ...]
Pieces = Iterable[tuple[int | None, Callable[[], np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class LeafShape:
    """One array of a checkpoint: its shape, dtype, and the shape of its chunks."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Uncompressed size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def leaf_shapes(
    config: DecoderConfig, mesh: Mapping[str, int] | None = None
) -> dict[LeafPath, LeafShape]:
    """The parameters of a decoder by path, chunked for a mesh.

    Args:
      config: the decoder's config.
      mesh: sizes of mesh axes, 1 by default. An axis of an array that they do not divide is not cut.

    Raises:
      ConfigError: a name is not a mesh axis, or a size is not positive.
    """
    sizes = dict.fromkeys(MESH_AXES, 1) | dict(mesh or {})
    if unknown := sorted(sizes.keys() - set(MESH_AXES)):
        raise ConfigError(
            f"A mesh has no axis {unknown[0]}; its axes are {', '.join(MESH_AXES)}."
        )
    if least := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
        raise ConfigError(f"The sizes of a mesh must be at least 1, not {least[0]}.")
    devices = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    rules = Rules(PRESETS["fsdp_tensor"], LOGICAL_AXES)
    tokens = jax.ShapeDtypeStruct((1, config.block_size), jnp.int32)
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    placed = logical_to_sharding(boxed, devices, rules)
    shardings = traverse_util.flatten_dict(placed)
    leaves = {}
    for path, leaf in traverse_util.flatten_dict(without_boxes(boxed)).items():
        shard = shardings[path].shard_shape(leaf.shape)
        first = 1 if path[0] == "layers" else shard[0]
        chunks = chunk_shape(leaf.shape, (first, *shard[1:]), leaf.dtype.itemsize)
        leaves[path] = LeafShape(leaf.shape, np.dtype(leaf.dtype), chunks)
    return leaves


def chunk_shape(shape: tuple[int, ...], shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Divide the shard until it has at most `CHUNK_BYTES`; no chunk crosses a border between shards."""
    chunks = list(shard)
    while math.prod(chunks) * itemsize > CHUNK_BYTES:
        axis = max(range(len(chunks)), key=chunks.__getitem__)
        size = chunks[axis]
        if shard[axis] == shape[axis]:  # there is no other shard along this axis
            chunks[axis] = -(-size // 2)
        else:
            chunks[axis] = size // next(p for p in itertools.count(2) if size % p == 0)
    return tuple(chunks)


def write_checkpoint(
    directory: str | os.PathLike,
    leaves: Mapping[LeafPath, LeafShape],
    pieces: Mapping[LeafPath, Pieces],
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write `directory/checkpoint_0`, with only the parameters; it appears when it is complete.

    Leftovers of an earlier call that was killed are removed first. One piece and about two chunks are in
    memory at a time.

    Args:
      directory: absolute path; created if missing.
      leaves: the arrays of the checkpoint.
      pieces: for each leaf, pairs `(layer, make)`: `make()` returns the values at that index of the first
        axis, or of the whole leaf if `layer` is None, in any dtype.
      on_bytes: called after each chunk with its size in bytes.

    Raises:
      ValueError: the pieces do not make up the leaf.
      OSError: the checkpoint cannot be written.
    """
    for path, leaf in leaves.items():
        given = [layer for layer, _ in pieces.get(path, ())]
        if given != [None] and given != list(range(leaf.shape[0])):
            raise ValueError(f"{'/'.join(path)} of shape {leaf.shape} cannot be made of {given}.")
    directory = Path(directory)
    for left in directory.glob("checkpoint_0.orbax-checkpoint-tmp*"):
        shutil.rmtree(left)
    tree = {path: _Streamed(leaf, pieces[path], on_bytes) for path, leaf in leaves.items()}
    registry = ocp.type_handlers.create_type_handler_registry((_Streamed, _StreamedHandler()))
    options = ocp.CheckpointManagerOptions(
        step_prefix="checkpoint",
        enable_async_checkpointing=False,
        temporary_path_class=CommitWithDigests,
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # orbax warns about attributes that only its own arrays have
    try:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        with ocp.CheckpointManager(
            directory, options=options, item_handlers={"state": handler}
        ) as manager:
            item = ocp.args.PyTreeSave({"target": traverse_util.unflatten_dict(tree)})
            args = ocp.args.Composite(state=item)
            manager.save(0, args=args, force=True, custom_metadata=CUSTOM_METADATA)
    finally:
        logging.set_verbosity(verbosity)


@dataclasses.dataclass(frozen=True, eq=False)
class _Streamed:
    """Stands for an array in the tree that orbax saves; `_StreamedHandler` writes it."""

    leaf: LeafShape
    pieces: Pieces
    on_bytes: Callable[[int], None] | None


class _StreamedHandler(ocp.type_handlers.TypeHandler):
    """Type handler that writes a `_Streamed` where and as orbax reads a numpy array."""

    def typestr(self):
        return "np.ndarray"

    async def metadata(self, infos):
        raise NotImplementedError("This handler only writes.")

    async def deserialize(self, infos, args=None):
        raise NotImplementedError("This handler only writes.")

    async def serialize(self, values, infos, args=None):
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            await _write(value, str(info.path))
        return []


async def _write(value: _Streamed, path: str) -> None:
    leaf = value.leaf
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "dtype": leaf.dtype.name,
        "metadata": {
            "shape": leaf.shape,
            "chunks": leaf.chunks,
            "compressor": {"id": "zstd", "level": 1},
        },
        "store_data_equal_to_fill_value": True,  # tells a missing chunk from one of zeros
    }
    with _system_errors(path):
        array = await tensorstore.open(spec, create=True)
    for layer, make in value.pieces:
        target = array if layer is None else array[layer]
        chunks = leaf.chunks[len(leaf.shape) - target.rank :]
        values = np.asarray(make())
        if values.shape != tuple(target.shape):
            raise ValueError(f"{path} takes pieces of shape {target.shape}, not {values.shape}.")
        for region in _regions(values.shape, chunks):
            block = np.asarray(values[region], leaf.dtype, order="C")
            # The block is not changed any more, so tensorstore does not have to copy it.
            with _system_errors(path):
                await target[region].write(block, can_reference_source_data_indefinitely=True)
            if value.on_bytes:
                value.on_bytes(block.nbytes)


@contextlib.contextmanager
def _system_errors(path: str) -> Iterator[None]:
    """Turn a ValueError of tensorstore that reports a system error into the OSError."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"\[os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), path) from error


def _regions(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Iterable[tuple[slice, ...]]:
    """The index of each chunk of an array."""
    cuts = [
        [slice(start, min(start + step, size)) for start in range(0, size, step)]
        for size, step in zip(shape, chunks, strict=True)
    ]
    return itertools.product(*cuts)
