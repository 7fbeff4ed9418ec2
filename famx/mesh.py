"""The mesh of devices, and rules that split logical axes of arrays over its axes.

Modules name the axes of their parameters ("embed", "heads", ...); rules map these to mesh axes. `data`
splits the batch; `fsdp` splits the batch and the weights; `tensor` splits heads, feed-forward and
vocabulary; `context` splits the length.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import gin
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from famx.base.errors import ConfigError
from famx.base.ranges import Expected, OneOf, Positive
from famx.base.values import checked
from famx.modules import DecoderConfig

MESH_AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
LOGICAL_AXES = (
    *("batch", "context_batch", "length", "blocks", "block", "segments", "memory", "layers"),
    *("embed", "mlp", "heads", "kv_heads", "kv", "vocab", "lora_rank"),
)

_BATCHES = ("batch", "context_batch")
_MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes by logical axis; an axis without an entry is not split.

    Construction raises ConfigError for a name that is no logical or mesh axis.
    """

    axes: Mapping[str, _MeshAxes]
    may_replicate: tuple[str, ...] = ()  # axes that are not split if the mesh does not divide their size

    def __post_init__(self):
        for name in (*self.axes, *self.may_replicate):
            _known(name, LOGICAL_AXES, "logical axis")
        for name in (axis for mesh_axes in self.axes.values() for axis in mesh_axes):
            _known(name, MESH_AXES, "mesh axis")

    def spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """The mesh axes of an array with these logical axes.

        In an array with a batch axis, no other axis is split over the mesh axes of the batch:
        activations keep their full width where FSDP splits the width of weights. Raises ConfigError if
        two axes claim the same mesh axis otherwise, and for an unknown logical axis.
        """
        cut = [self._mesh_axes(name) for name in names]
        batch = next((name for name in names if name in _BATCHES), None)
        if batch is not None:
            taken = set(self._mesh_axes(batch))
            cut = [
                axes if name == batch else tuple(a for a in axes if a not in taken)
                for name, axes in zip(names, cut, strict=True)
            ]
        owner: dict[str, str] = {}
        for name, axes in zip(names, cut, strict=True):
            for axis in axes:
                if axis in owner:
                    raise ConfigError(
                        f"The axes {owner[axis]} and {name} of one array [{_join(names)}] are both"
                        f" cut over the mesh axis {axis}: change one of the two rules."
                    )
                owner[axis] = str(name)
        return PartitionSpec(*(_entry(axes) for axes in cut))

    def pairs(self) -> list[tuple[str, _MeshAxes | str | None]]:
        """The rules for `nn.logical_axis_rules`; the batch comes first and wins in activations."""
        ordered = sorted(LOGICAL_AXES, key=lambda name: name not in _BATCHES)
        return [(name, _entry(self._mesh_axes(name))) for name in ordered]

    def _mesh_axes(self, name: str | None) -> _MeshAxes:
        if name is None:
            return ()
        _known(name, LOGICAL_AXES, "logical axis")
        return tuple(self.axes.get(name, ()))


# Shards of the length that are read in parallel are folded into the batch, see ChunkContext.
_DATA = {"batch": BATCH_AXES, "context_batch": ("context", *BATCH_AXES), "length": ("context",)}
_FSDP = {**_DATA, "embed": ("fsdp",)}
_TENSOR = dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), ("tensor",))
PRESETS = {"data": _DATA, "fsdp": _FSDP, "fsdp_tensor": {**_FSDP, **_TENSOR}}


@gin.configurable
@checked
def make_rules(
    preset: Annotated[str, OneOf(tuple(PRESETS))] = "fsdp_tensor",
    may_replicate: Sequence[Annotated[str, OneOf(LOGICAL_AXES)]] = (),
) -> Rules:
    """Rules by name: `data` (weights are not split), `fsdp` or `fsdp_tensor`.

    `may_replicate` lists logical axes that are not split if the mesh does not divide their size, such as
    "kv_heads" with a single head; for other axes that is a ConfigError.
    """
    return Rules(PRESETS[preset], tuple(may_replicate))


_Size = Annotated[Positive | Literal[-1], Expected("a whole number of at least 1, or -1 for the rest")]


@gin.configurable
@checked
def make_mesh(
    data: _Size = -1,
    fsdp: _Size = 1,
    tensor: _Size = 1,
    context: _Size = 1,
    dcn_data: Positive | None = None,
    dcn_fsdp: Positive | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all `devices` (default: every device of every process).

    One size may be -1: the number of devices divided by the other sizes. Several slices are joined by a
    slower network (DCN), and only `data` and `fsdp` cross it: `dcn_data` x `dcn_fsdp` is the number of
    slices, and the rest of each size is within a slice. If one of these two is None, it follows from the
    other; if both are, `data` crosses as many slices as it can.

    Raises ConfigError if the sizes do not multiply to the number of devices, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor, context), strict=True))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"At most one size of the mesh may be -1 (the rest): {_show(sizes)}.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise ConfigError(
            f"A mesh of {_show(sizes)} does not fit {len(devices)} device(s): its sizes must"
            f" {'divide' if free else 'multiply to'} that number."
        )
    for name in free:
        sizes[name] = len(devices) // fixed
    across = _across_slices(sizes, devices, dcn_data, dcn_fsdp)
    within = [size // across[name] for name, size in sizes.items()]
    if math.prod(across.values()) == 1:
        placed = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_hybrid_device_mesh(
            within, list(across.values()), devices, allow_split_physical_axes=True
        )
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """A context in which programs are traced, compiled and run for `mesh`.

    Modules look at the mesh and the rules of this context: the attention backend `auto` fits the devices
    of `mesh`, and kernels are split over it by `rules`. Without it several devices compute attention by
    the dense formula. A batch need not be divided by the mesh; it is then replicated.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.pairs()):
        yield


def _across_slices(sizes, devices, dcn_data: int | None, dcn_fsdp: int | None) -> dict[str, int]:
    """Number of slices that each axis crosses."""
    counts = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    slices = len(counts)
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"The {slices} slices have {_join(sorted(counts.values()))} devices: a mesh needs the same"
            " number in each slice."
        )
    if dcn_data is None:
        dcn_data = math.gcd(sizes["data"], max(slices // (dcn_fsdp or 1), 1))
    if dcn_fsdp is None:
        dcn_fsdp = max(slices // max(dcn_data, 1), 1)
    if dcn_data * dcn_fsdp != slices:
        raise ConfigError(
            f"dcn_data {dcn_data} x dcn_fsdp {dcn_fsdp} must multiply to the {slices} slice(s) of the"
            " devices."
        )
    for name, across in (("data", dcn_data), ("fsdp", dcn_fsdp)):
        if sizes[name] % across:
            raise ConfigError(
                f"A mesh of {_show(sizes)} over {slices} slices has no place for dcn_{name} {across}:"
                f" {name} must be a multiple of it; tensor and context stay within a slice."
            )
    return {"data": dcn_data, "fsdp": dcn_fsdp, "tensor": 1, "context": 1}


def logical_to_sharding(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """A NamedSharding for each leaf of `tree`.

    Args:
        tree: arrays or ShapeDtypeStructs; those boxed by `nn.with_logical_partitioning` are split, others
            are replicated. Or PartitionSpecs of logical names, whose sizes are not checked.
        mesh: a mesh of `make_mesh`.
        rules: rules from logical to mesh axes.

    Raises:
        ConfigError: two axes of an array claim a mesh axis, or a size is not divided by its mesh axes.
    """

    def sharding(path, leaf):
        if isinstance(leaf, PartitionSpec):
            return NamedSharding(mesh, rules.spec(tuple(leaf)))
        spec = nn.get_partition_spec(leaf)
        return NamedSharding(mesh, _divisible(path, spec, without_boxes(leaf).shape, mesh, rules))

    def is_leaf(node):
        return isinstance(node, (PartitionSpec, nn.meta.AxisMetadata))

    return jax.tree_util.tree_map_with_path(sharding, tree, is_leaf=is_leaf)


def without_boxes(tree: Any) -> Any:
    """The values of boxed leaves; `nn.unbox` also constrains their shardings inside `on_mesh`."""
    return nn.meta.map_axis_meta(lambda box: box.unbox(apply_constraint=False), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding that splits the first axis of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shard(mesh: Mesh, process: int) -> tuple[int, int]:
    """`(index, count)`: `process` makes part `index` of `count` equal parts of a batch.

    Processes that differ only in their places along `tensor` and `context` make the same part.

    Raises ConfigError if the parts of two processes overlap.
    """
    size = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows = collections.defaultdict(set)
    for (data, fsdp, *_), device in np.ndenumerate(mesh.devices):
        rows[device.process_index].add(data * mesh.shape["fsdp"] + fsdp)
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(map(len, parts)) != size or len(set(map(len, parts))) > 1:
        raise ConfigError(
            f"A mesh of {_show(mesh.shape)} gives processes parts of the batch that overlap: let tensor x"
            " context divide the devices of a process, or be a multiple of them."
        )
    return parts.index(tuple(sorted(rows[process]))), len(parts)


def check_batch_size(
    batch_size: int, mesh: Mesh, num_microbatches: int = 1, setting: str = "BATCH_SIZE"
) -> None:
    """Raise ConfigError unless devices divide each microbatch evenly, and processes the batch.

    `setting` is the name of the batch size in the sentence.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        raise ConfigError(
            f"{setting} {batch_size} cannot be divided over {parts} devices (data"
            f" {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}): use a multiple of {parts}."
        )
    if batch_size % (parts * num_microbatches):
        raise ConfigError(
            f"{setting} {batch_size} cannot be cut into {num_microbatches} microbatches over {parts}"
            f" device(s): use a multiple of {parts * num_microbatches}."
        )
    if batch_size % jax.process_count():
        raise ConfigError(
            f"{setting} {batch_size} cannot be divided over {jax.process_count()} processes: use a"
            f" multiple of {jax.process_count()}."
        )


def check_blocks(length: int, config: DecoderConfig, mesh: Mesh) -> None:
    """Raise ConfigError unless `context` splits rows of `length` tokens into whole blocks."""
    parts, size = mesh.shape["context"], config.block_size
    if length % (parts * size) and parts > 1:
        raise ConfigError(
            f"TASK_FEATURE_LENGTHS targets {length} cannot be cut over {parts} devices (mesh axis"
            f" context) by whole blocks of {size}: use a multiple of {parts * size}."
        )
    chunk = config.blocks_per_chunk
    if chunk is not None and (chunk % parts or length // size % chunk) and parts > 1:
        raise ConfigError(
            f"The chunks of {chunk} blocks that rows of {length} tokens are read in cannot be cut over"
            f" {parts} devices (mesh axis context): let DecoderConfig.blocks_per_chunk be a multiple of"
            f" {parts} that divides {length // size}, or None."
        )


def state_sharding(state: Any, config: DecoderConfig, mesh: Mesh, rules: Rules) -> Any:
    """A NamedSharding for each field of a `DecoderState` of arrays or ShapeDtypeStructs.

    Keys and values are split by heads as their weights are, unless there are too few heads. The state of
    a single example, from which every example of a batch may begin, is replicated.
    """
    batch = "batch" if state.batch_size > 1 else None
    box = lambda leaf, names: nn.LogicallyPartitioned(leaf, names)
    window = ("layers", batch, "segments", "block", "kv_heads", "kv")
    names = {
        "keys": window, "values": window, "features": (*window[:4], *config.memory.feature_axes)
    }  # fmt: skip
    boxed = {
        field.name: box(getattr(state, field.name), names.get(field.name, (batch,)))
        for field in dataclasses.fields(state)
        if field.name != "memory" and getattr(state, field.name) is not None
    }
    boxed["memory"] = jax.tree.map(
        lambda leaf, names: box(leaf, ("layers", batch, *names)), state.memory, config.memory.axes()
    )
    rules = dataclasses.replace(rules, may_replicate=(*rules.may_replicate, "kv_heads"))
    return logical_to_sharding(type(state)(**boxed), mesh, rules)


def moment_sharding(leaf, parameter) -> NamedSharding:
    """Sharding of an optimiser's array that belongs to `parameter`, which has a sharding.

    An array of the same shape has the same sharding; an array without one of the axes, a factored
    moment, is split along the other axes like the parameter; any other array is replicated.
    """
    sharding, shape = parameter.sharding, parameter.shape
    if leaf.shape == shape:
        return sharding
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    for axis in range(len(shape)):
        if leaf.shape == shape[:axis] + shape[axis + 1 :]:
            return NamedSharding(sharding.mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return NamedSharding(sharding.mesh, PartitionSpec())


def _divisible(path, logical, shape, mesh: Mesh, rules: Rules) -> PartitionSpec:
    spec = rules.spec(tuple(logical))
    entries = list(spec)
    for i, (name, entry) in enumerate(zip(logical, spec, strict=True)):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if shape[i] % parts == 0:
            continue
        if name not in rules.may_replicate:
            raise ConfigError(
                f"Axis {name} of {jax.tree_util.keystr(path, simple=True, separator='/')} has size"
                f" {shape[i]}, which cannot be divided over {parts} devices (mesh axis"
                f" {_join(axes)}): change the mesh, or add {name!r} to make_rules.may_replicate."
            )
        entries[i] = None
    return PartitionSpec(*entries)


def _entry(axes: _MeshAxes) -> _MeshAxes | str | None:
    return None if not axes else axes[0] if len(axes) == 1 else axes


def _known(name: str, names: Sequence[str], kind: str) -> None:
    if name not in names:
        raise ConfigError(f"There is no {kind} named {name!r}: choose from {_join(names)}.")


def _join(names: Sequence[str | None]) -> str:
    return ", ".join(map(str, names))


def _show(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items())
