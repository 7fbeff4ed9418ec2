"""t5x's sharding rules, with rules for the logical axes of famx."""

from collections.abc import Sequence

from t5x import partitioning

from famx.base.errors import ConfigError
from famx.mesh import LOGICAL_AXES

_MODEL_AXES = ("heads", "kv_heads", "mlp", "vocab")


def logical_axis_rules(
    activation_partitioning_dims: int = 1,
    parameter_partitioning_dims: int = 1,
    may_replicate: Sequence[str] = (),
) -> list[tuple[str, str | None]]:
    """Rules for the logical axes of famx, followed by t5x's standard rules.

    Args:
      activation_partitioning_dims: 2 also splits the width of activations over `model`.
      parameter_partitioning_dims: 2 also splits the width of parameters over `data`.
      may_replicate: axes that are not split, such as "kv_heads" with fewer heads than `model`'s size.

    Raises:
      ConfigError: a name in `may_replicate` is not a logical axis.
    """
    for name in may_replicate:
        if name not in LOGICAL_AXES:
            raise ConfigError(
                f"There is no logical axis named {name!r}: choose from {', '.join(LOGICAL_AXES)}."
            )
    standard = partitioning.standard_logical_axis_rules(
        activation_partitioning_dims, parameter_partitioning_dims
    )
    standard = [rule for rule in standard if rule[0] not in may_replicate]
    known = {name for name, _ in standard}
    ours = {name: "model" if name in _MODEL_AXES else None for name in LOGICAL_AXES if name not in known}
    ours.update(dict.fromkeys(may_replicate))
    return [*ours.items(), *standard]
