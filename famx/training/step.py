"""The training state with its shardings, and the jitted training step."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from famx.base.xla_options import compiler_options
from famx.lora import combine
from famx.mesh import logical_to_sharding, moment_sharding
from famx.models.metrics import Mean
from famx.training import state_passing as passing
from famx.training.run import Run


@flax.struct.dataclass
class TrainState:
    """Everything that a run needs to resume, except the position in its data.

    Attributes:
      step: int32 scalar, number of steps taken.
      params: the decoder's parameters.
      opt_state: optax state.
      kept: states that are carried between steps, see `famx.training.state_passing`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    kept: dict[str, Any] = flax.struct.field(default_factory=dict)

    def to_checkpoint(self) -> dict[str, Any]:
        """The tree that is saved; all entries but `lanes` and `start` have t5x's names."""
        tree = {
            "target": self.params,
            "state": {"step": self.step, "param_states": self.opt_state},
            passing.MUTABLES: {},
        }
        return tree | self.kept

    @classmethod
    def from_checkpoint(cls, tree) -> "TrainState":
        """The state from a tree that `to_checkpoint` made."""
        kept = {name: part for name, part in tree.items() if name not in ("target", "state")}
        if not kept[passing.MUTABLES]:
            del kept[passing.MUTABLES]
        return cls(tree["state"]["step"], tree["target"], tree["state"]["param_states"], kept)


def make_initializer(run: Run):
    """Makes the initializer of the training state of a run that is `ready`.

    Returns:
      `(initialize, abstract)`: a jitted function `(key, pretrained, loaded)` that makes a sharded
      `TrainState`, and that state as ShapeDtypeStructs with shardings. `pretrained` is a tree of some of
      the parameters, or empty; it replaces their initial values and is donated. `loaded` is the result of
      `run.state_passing.load`, or None.
    """
    model, states, trainable = run.model, run.state_passing, run.trainable
    mesh, rules, optimizer = run.mesh, run.rules, run.optimizer

    def initialize(key, pretrained={}, loaded=None, unbox=True):  # noqa: B006, nothing changes it
        boxed = model.init_params(key)
        pretrained_and_fresh = combine(nn.unbox(boxed), pretrained)
        boxed = trainable.freeze(nn.meta.replace_boxed(boxed, pretrained_and_fresh))
        params = nn.unbox(boxed)
        kept = states.initial(model, params, run.data.batch_size, loaded)
        opt_state = optimizer.init(states.part(trainable, params, kept))
        state = TrainState(jnp.int32(0), params, opt_state, kept)
        return state if unbox else (state, boxed)

    key = jax.random.key(0)
    abstract, boxed = jax.eval_shape(lambda key: initialize(key, unbox=False), key)
    replicated = NamedSharding(mesh, PartitionSpec())
    params = logical_to_sharding(boxed, mesh, rules)
    kept = states.shardings(model, abstract.kept, mesh, rules)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    like = jax.tree.map(
        place,
        states.part(trainable, abstract.params, abstract.kept),
        states.part(trainable, params, kept),
    )
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, moment_sharding, abstract.opt_state, like, transform_non_params=lambda _: replicated
    )
    shardings = TrainState(replicated, params, opt_state, kept)
    abstract = jax.tree.map(place, abstract, shardings)
    return jax.jit(initialize, out_shardings=shardings, donate_argnums=1), abstract


def with_new_states(run: Run, state: TrainState, abstract: TrainState) -> TrainState:
    """`state` with the kept states that `run` begins with; the rest carries on.

    Args:
      run: a run that is `ready`, which does not begin from a memory file.
      state: state of a run of the same model and optimizer. Its own kept states are not used.
      abstract: the state of `run`, as `make_initializer` describes it.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.kept)
    initial = lambda params: run.state_passing.initial(run.model, params, run.data.batch_size)
    return state.replace(kept=jax.jit(initial, out_shardings=shardings)(state.params))


def make_gradient(run: Run):
    """The function `(part, state, batch, rng) -> (gradient, (metrics, kept))` of a training step.

    With several microbatches, the gradient of the batch is summed over its parts, computed one after
    another; losses are divided by the weights of the whole batch, so the result is the same.

    Returns:
      That function: `part` are the values that learn (`run.state_passing.part`), `state` a `TrainState`,
      `rng` the result of `step_key`. Its results are the gradient of `part`, the metrics, and the kept
      states after the step, None if they stay as they are.
    """
    model, states, trainable = run.model, run.state_passing, run.trainable

    def objective(part, state: TrainState, batch, rng, normalizer=None, microbatch=None):
        params, kept = states.put(trainable, state.params, state.kept, part)
        fresh = model.initial_state(params, batch["decoder_target_tokens"].shape[0])
        start, rng = states.start(kept, fresh, batch, rng)
        if microbatch is not None:  # parts draw independently, except for the initial states
            rng = jax.random.fold_in(rng, microbatch)
        loss, metrics, end = model.loss(params, batch, rng, start, normalizer, aligned=states.aligned)
        return loss, (metrics, states.end(kept, end))

    gradient = jax.grad(objective, has_aux=True)

    def accumulated(part, state: TrainState, batch, rng):
        """`gradient` of the whole batch, computed part by part."""
        n = run.microbatches
        normalizer = model.weight(batch)

        def one(xs):
            index, batch, kept = xs
            part_state = state if kept is None else state.replace(kept=kept)
            grads, (metrics, end) = gradient(part, part_state, batch, rng, normalizer, index)
            return (grads, metrics), end

        def step(total, xs):
            new, end = one(xs)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, new), end

        batch = jax.tree.map(lambda x: passing.cut(x, n), batch)
        xs = (jnp.arange(n, dtype=jnp.int32), batch, states.cut(state.kept, n))
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], xs))[0]
        wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
        (grads, metrics), ends = jax.lax.scan(step, jax.tree.map(wide, shapes), xs)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, part)
        return grads, (metrics, states.join(state.kept, ends))

    return gradient if run.microbatches == 1 else accumulated


def step_key(run: Run, step: jax.Array) -> jax.Array:
    """The random key of a step, int32 `step` counted from 0."""
    return jax.random.fold_in(jax.random.key(run.random_seed), step)


def make_train_step(run: Run, abstract: TrainState):
    """The jitted `train_step(state, batch) -> (state, metrics)`; `state`, as `abstract`, is donated.

    Parameters that do not learn are returned unchanged, without a copy. A step whose gradient is not
    finite changes only the step number, and counts in the metric `skipped`.
    """
    states, trainable, compute = run.state_passing, run.trainable, make_gradient(run)

    def train_step(state: TrainState, batch):
        rng = step_key(run, state.step)
        part = states.part(trainable, state.params, state.kept)
        grads, (metrics, end) = compute(part, state, batch, rng)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        updates, opt_state = run.optimizer.update(grads, state.opt_state, part)
        new = (optax.apply_updates(part, updates), opt_state, end)
        old = (part, state.opt_state, None if end is None else state.kept)
        part, opt_state, end = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        kept = state.kept if end is None else end
        params, kept = states.put(trainable, state.params, kept, part)
        metrics = {
            **jax.tree.map(lambda x: jnp.where(finite, x, 0), metrics),
            "gradient_norm": Mean.of(jnp.where(finite, norm, 0), finite),
            "skipped": Mean.of(1 - finite),
        }
        return TrainState(state.step + 1, params, opt_state, kept), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    options = compiler_options(run.xla_options, run.mesh.devices.flat[0].platform, run.mesh.shape)
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options or None
    )
