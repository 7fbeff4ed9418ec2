"""The training state, where its arrays live, and one jitted step."""

from typing import Any

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from famx.lora import combine
from famx.mesh import (
    Rules,
    logical_to_sharding,
    moment_sharding,
    state_sharding,
)
from famx.models import MEMORY_COLLECTION, DecoderModel, loss_weights
from famx.models.metrics import Mean
from famx.modules import DecoderState
from famx.training import state_passing as passing
from famx.training.trainable import Trainable


@flax.struct.dataclass
class TrainState:
    """All that a run needs to go on, beside the position of its data.

    Attributes:
      step: int32 scalar, steps taken.
      params: the decoder's parameters.
      opt_state: optax state.
      flax_mutables: the memory kept by random state passing, empty otherwise.
      lanes: states of the continuous lanes, or the aged-state pool; None otherwise.
      start: the saved state of one text from which every example begins; None: they begin anew.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    flax_mutables: Any
    lanes: DecoderState | None
    start: DecoderState | None = None

    def to_checkpoint(self) -> dict[str, Any]:
        """The tree that is saved; its first entries are named as t5x names them."""
        tree = {
            "target": self.params,
            "state": {"step": self.step, "param_states": self.opt_state},
            "flax_mutables": flax.core.unfreeze(self.flax_mutables),
        }
        states = {"lanes": self.lanes, "start": self.start}
        return tree | {name: state for name, state in states.items() if state is not None}

    @classmethod
    def from_checkpoint(cls, tree) -> "TrainState":
        """The state of a tree that `to_checkpoint` made."""
        state = tree["state"]
        mutables = flax.core.freeze(tree["flax_mutables"])
        states = tree.get("lanes"), tree.get("start")
        return cls(state["step"], tree["target"], state["param_states"], mutables, *states)


def make_initializer(
    model: DecoderModel,
    optimizer,
    mode: str,
    num_lanes: int,
    mesh,
    rules: Rules,
    trainable: Trainable = Trainable(),
    with_start: bool = False,
):
    """How a training state is made.

    Returns:
      `(initialize, abstract)`: a jitted function `(key, pretrained, start)` that makes a `TrainState`
      in place, and that state as ShapeDtypeStructs with shardings. `pretrained`, a tree of some of the
      parameters, takes their place and is given away; it may be empty. `start` is a `DecoderState` of
      one text, or None.
    """
    shapes = {"decoder_input_tokens": (1, model.config.block_size)}

    def initialize(key, pretrained={}, start=None, unbox=True):  # noqa: B006, nothing changes it
        variables = model.get_initial_variables(key, shapes)
        boxed = flax.core.unfreeze(variables["params"])
        taken = combine(nn.unbox(boxed), pretrained)
        boxed = trainable.freeze(nn.meta.replace_boxed(boxed, taken))
        params = nn.unbox(boxed)
        mutables = {k: v for k, v in variables.items() if k == MEMORY_COLLECTION}
        lanes = None
        if mode in ("continuous", "aged"):
            lanes = model.initial_state(params, num_lanes)
        state = TrainState(jnp.int32(0), params, None, flax.core.freeze(mutables), lanes, start)
        state = state.replace(opt_state=optimizer.init(trainable.part(state)))
        return state if unbox else (state, boxed)

    start, key = None, jax.random.key(0)
    if with_start:
        params = nn.unbox(model.abstract_params())
        start = jax.eval_shape(lambda params: model.initial_state(params, 1), params)
    abstract, boxed = jax.eval_shape(lambda key: initialize(key, {}, start, unbox=False), key)
    whole = NamedSharding(mesh, PartitionSpec())
    params = logical_to_sharding(boxed, mesh, rules)
    start, lanes = (
        state and state_sharding(state, model.config, mesh, rules)
        for state in (abstract.start, abstract.lanes)
    )
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        trainable.part(abstract),
        trainable.part(abstract.replace(params=params, start=start)),
    )
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, moment_sharding, abstract.opt_state, like, transform_non_params=lambda _: whole
    )
    mutables = flax.core.unfreeze(abstract.flax_mutables)
    if MEMORY_COLLECTION in mutables:
        kept = mutables[MEMORY_COLLECTION]
        box = lambda leaf, names: nn.LogicallyPartitioned(leaf, ("layers", *names))
        memory = jax.tree.map(box, kept["memory"], model.config.memory.axes())
        mutables = {MEMORY_COLLECTION: {**kept, "memory": memory}}
    mutables = flax.core.freeze(logical_to_sharding(mutables, mesh, rules))
    shardings = TrainState(whole, params, opt_state, mutables, lanes, start)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract, shardings,
    )  # fmt: skip
    return jax.jit(initialize, out_shardings=shardings, donate_argnums=1), abstract


def make_train_step(
    model: DecoderModel,
    optimizer,
    mode: str,
    seed: int,
    abstract: TrainState,
    trainable: Trainable = Trainable(),
    num_microbatches: int = 1,
):
    """The jitted `train_step(state, batch) -> (state, metrics)`; `state`, as `abstract`, is given away.

    With several microbatches, the gradient of the batch is summed over so many parts of it, read one
    after another; losses are divided by the weights of the whole batch, so the step is the same.

    What does not learn comes back as it is, without a copy. A step whose gradient is not finite
    changes nothing but the step number, and counts in the metric `skipped`.
    """

    def objective(part, state: TrainState, batch, rng, normalizer=None, microbatch=None):
        state = trainable.put(state, part)
        own = rng if microbatch is None else jax.random.fold_in(rng, microbatch)
        params, examples = state.params, batch["decoder_input_tokens"].shape[0]
        if state.start is not None:
            start = state.start.take(jnp.zeros((examples,), jnp.int32))
            loss, metrics, _ = model.loss(params, batch, own, start, normalizer, aligned=False)
            return loss, (metrics, state.flax_mutables, None)
        if mode in ("none", "random"):
            loss, (metrics, mutables) = model.loss_fn(
                params, batch, rng, state.flax_mutables, normalizer, microbatch
            )
            return loss, (metrics, mutables, None)
        initial = model.initial_state(params, examples)
        if mode == "continuous":
            start = passing.continue_lanes(state.lanes, initial, batch["reset"])
        else:
            start = passing.continue_aged(state.lanes, initial, batch["lane"])
        loss, metrics, end = model.loss(params, batch, own, start, normalizer)
        lanes = jax.lax.stop_gradient(end) if mode == "continuous" else state.lanes
        return loss, (metrics, state.flax_mutables, lanes)

    gradient = jax.grad(objective, has_aux=True)

    def accumulated(part, state: TrainState, batch, rng):
        """`gradient` of the whole batch, by parts; part `i` has the rows `i`, `i + n`, ..."""
        n = num_microbatches
        normalizer = jnp.sum(loss_weights(batch, model.pad_id))
        cut = lambda x, axis=0: jnp.moveaxis(
            x.reshape(*x.shape[:axis], -1, n, *x.shape[axis + 1 :]), axis + 1, 0
        )
        join = lambda x, axis: jnp.moveaxis(x, 0, axis + 1).reshape(
            *x.shape[1 : axis + 1], -1, *x.shape[axis + 2 :]
        )

        def one(xs):
            index, batch, lanes = xs
            here = state.replace(lanes=lanes) if mode == "continuous" else state
            grads, (metrics, mutables, lanes) = gradient(part, here, batch, rng, normalizer, index)
            return (grads, metrics), (mutables, lanes if mode == "continuous" else None)

        def step(total, xs):
            new, kept = one(xs)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, new), kept

        lanes = state.lanes.map_examples(cut) if mode == "continuous" else None
        xs = (jnp.arange(n, dtype=jnp.int32), jax.tree.map(cut, batch), lanes)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], xs))[0]
        wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
        (grads, metrics), (mutables, lanes) = jax.lax.scan(step, jax.tree.map(wide, shapes), xs)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, part)
        if mode == "continuous":
            lanes = state.lanes.map_examples(lambda _, parts, axis: join(parts, axis), lanes)
        else:
            lanes = state.lanes
        return grads, (metrics, jax.tree.map(lambda x: x[0], mutables), lanes)

    def train_step(state: TrainState, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        part = trainable.part(state)
        compute = gradient if num_microbatches == 1 else accumulated
        grads, (metrics, mutables, lanes) = compute(part, state, batch, rng)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, part)
        new = (optax.apply_updates(part, updates), opt_state, mutables, lanes)
        old = (part, state.opt_state, state.flax_mutables, state.lanes)
        part, opt_state, mutables, lanes = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        metrics = {
            **jax.tree.map(lambda x: jnp.where(finite, x, 0), metrics),
            "gradient_norm": Mean.of(jnp.where(finite, norm, 0), finite),
            "skipped": Mean.of(1 - finite),
        }
        state = trainable.put(state, part).replace(
            step=state.step + 1, opt_state=opt_state, flax_mutables=mutables, lanes=lanes
        )
        return state, metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
