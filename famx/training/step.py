"""The training state, where its arrays live, and one jitted step."""

from typing import Any

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from famx import state_passing as passing
from famx.metrics import Mean
from famx.models import MEMORY_COLLECTION, DecoderModel
from famx.modules import DecoderState
from famx.training.partitioning import BATCH_AXES, Rules, logical_to_sharding


@flax.struct.dataclass
class TrainState:
    """All that a run needs to go on, beside the position of its data.

    Attributes:
      step: int32 scalar, steps taken.
      params: the decoder's parameters.
      opt_state: optax state.
      flax_mutables: the memory kept by random state passing, empty otherwise.
      lanes: states of the continuous lanes, or the aged-state pool; None otherwise.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    flax_mutables: Any
    lanes: DecoderState | None

    def to_checkpoint(self) -> dict[str, Any]:
        """The tree that is saved; its first entries are named as t5x names them."""
        tree = {
            "target": self.params,
            "state": {"step": self.step, "param_states": self.opt_state},
            "flax_mutables": flax.core.unfreeze(self.flax_mutables),
        }
        return tree if self.lanes is None else {**tree, "lanes": self.lanes}

    @classmethod
    def from_checkpoint(cls, tree) -> "TrainState":
        state = tree["state"]
        mutables = flax.core.freeze(tree["flax_mutables"])
        return cls(state["step"], tree["target"], state["param_states"], mutables, tree.get("lanes"))


def make_initializer(model: DecoderModel, optimizer, mode: str, num_lanes: int, mesh, rules: Rules):
    """`(initialize, shardings)`: a jitted function of a key that makes a `TrainState` in place."""

    def initialize(key, unbox=True):
        shapes = {"decoder_input_tokens": (1, model.config.block_size)}
        variables = model.get_initial_variables(key, shapes)
        boxed = flax.core.unfreeze(variables["params"])
        params = nn.unbox(boxed)
        mutables = {k: v for k, v in variables.items() if k == MEMORY_COLLECTION}
        lanes = None
        if mode in ("continuous", "aged"):
            lanes = model.initial_state(params, num_lanes)
        state = TrainState(
            jnp.int32(0), params, optimizer.init(params), flax.core.freeze(mutables), lanes
        )
        return state if unbox else (state, boxed)

    abstract, boxed = jax.eval_shape(lambda key: initialize(key, unbox=False), jax.random.key(0))
    whole = NamedSharding(mesh, PartitionSpec())
    params = logical_to_sharding(boxed, mesh, rules)
    like = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s),
                        abstract.params, params)  # fmt: skip
    same = lambda leaf, p: p.sharding if leaf.shape == p.shape else whole  # factored moments differ
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, same, abstract.opt_state, like, transform_non_params=lambda _: whole
    )
    lanes = abstract.lanes and state_shardings(mesh)
    mutables = jax.tree.map(lambda _: whole, abstract.flax_mutables)
    shardings = TrainState(whole, params, opt_state, mutables, lanes)
    return jax.jit(initialize, out_shardings=shardings), shardings


def state_shardings(mesh) -> DecoderState:
    """A `DecoderState` of shardings: the batch axis is cut as the batch is."""
    wide = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    flat = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return DecoderState(wide, wide, wide, flat, flat, flat)


def make_train_step(model: DecoderModel, optimizer, mode: str, seed: int, shardings: TrainState):
    """The jitted `train_step(state, batch) -> (state, metrics)`; `state` is given away.

    A step whose gradient is not finite changes nothing but the step number, and counts in the
    metric `skipped`.
    """

    def objective(params, state: TrainState, batch, rng):
        if mode in ("none", "random"):
            loss, (metrics, mutables) = model.loss_fn(params, batch, rng, state.flax_mutables)
            return loss, (metrics, mutables, None)
        initial = model.initial_state(params, batch["decoder_input_tokens"].shape[0])
        if mode == "continuous":
            start = passing.continue_lanes(state.lanes, initial, batch["reset"])
        else:
            start = passing.continue_aged(state.lanes, initial, batch["lane"])
        loss, metrics, end = model.loss(params, batch, rng, start)
        lanes = jax.lax.stop_gradient(end) if mode == "continuous" else state.lanes
        return loss, (metrics, state.flax_mutables, lanes)

    def train_step(state: TrainState, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        gradient = jax.value_and_grad(objective, has_aux=True)
        (_, (metrics, mutables, lanes)), grads = gradient(state.params, state, batch, rng)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = (params, opt_state, mutables, lanes)
        old = (state.params, state.opt_state, state.flax_mutables, state.lanes)
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        metrics = {
            **jax.tree.map(lambda x: jnp.where(finite, x, 0), metrics),
            "gradient_norm": Mean.of(jnp.where(finite, norm, 0), finite),
            "skipped": Mean.of(1 - finite),
        }
        return TrainState(state.step + 1, *new), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
