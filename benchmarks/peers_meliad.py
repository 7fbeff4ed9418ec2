"""meliad's entry in the comparison: its Block-Recurrent Transformer (google-research/meliad).

The middle layer is recurrent, with `N` state vectors. Windows have `S` tokens, and the sequence is one
segment, so that the gradient goes through all of it. The feed-forward has no gate; it is 1.5 times as
wide as the gated ones, which gives the same number of parameters and operations. No dropout.
"""

import functools
import sys

import gin
import jax
import jax.numpy as jnp
import optax

from benchmarks.peer_shape import Shape
from benchmarks.turns import LeftOut, Peer


def block_recurrent(shape: dict, path: str | None) -> Peer:
    """Builds the model of meliad's `configs/recurrent/bias_skip.gin` at the sizes of `shape`.

    Raises:
      LeftOut: `path`, the root of a clone of meliad, is None.
    """
    if path is None:
        raise LeftOut("pass a clone of google-research/meliad with --meliad PATH.")
    shape = Shape(**shape)
    model = _model(shape, path)
    inputs, targets = (jnp.asarray(x, jnp.int32) for x in shape.tokens())
    start = jnp.ones((shape.batch,), bool)
    batch = {"input_tokens": inputs, "target_tokens": targets, "start_of_sequence": start}
    apply = functools.partial(model.apply, global_info={}, mutable=["state"])
    variables = jax.jit(lambda key: model.init(key, batch, global_info={}))(jax.random.key(0))
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(params, rest):
        (logits, _), rest = apply({"params": params, **rest}, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.mean(losses), rest

    adam = optax.adamw(1e-4, b1=0.9, b2=0.99, weight_decay=0.0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(params, moments, rest):
        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params, rest)
        changes, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, changes), moments, rest, value

    @jax.jit
    def reach(params, rest):
        def last_block_loss(params):
            (logits, _), _ = apply({"params": params, **rest}, batch)
            return jnp.mean(jax.nn.logsumexp(logits[:, -shape.block :, : shape.landmark], -1))

        gradient = jax.grad(last_block_loss)(params)
        return jnp.linalg.norm(gradient["embed"]["embedding"][shape.landmark])

    facts = {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "reach": float(reach(params, rest)),
        "version": f"jax {jax.__version__}",
    }
    state = params, optimizer.init(params), rest

    def step():
        nonlocal state
        *state, value = update(*state)
        return float(value)

    return Peer(step, facts)


def _model(shape: Shape, path: str):
    sys.path.insert(0, path)
    from transformer import language_model, nn_components
    from transformer.memory import decoder_stack, transformer_layer

    mlp = functools.partial(nn_components.MLP, use_bias=False)
    for name, value in {
        "MemTransformerBase.attn_mlp_factory": functools.partial(
            mlp, num_layers=1, num_hidden_units=0, hidden_activation=None
        ),
        "MemTransformerBase.ffn_factory": functools.partial(mlp, num_layers=2),
        "nn_components.LayerNorm.use_mean": False,
        "nn_components.LayerNorm.use_bias": False,
    }.items():
        gin.bind_parameter(name, value)
    layer = functools.partial(
        transformer_layer.TransformerLayer, num_heads=shape.heads, head_size=shape.head_dim,
        mlp_dim=shape.feed_forward * 3 // 2, window_length=shape.block,
        relative_position_type="rotary", recurrent_num_states=shape.memory_length,
        recurrent_skip_ffn=True,
    )  # fmt: skip
    task = language_model.TransformerTaskConfig(
        sequence_length=shape.length, batch_size=shape.batch, vocab_size=shape.vocabulary
    )
    return decoder_stack.DecoderStack(
        mode="train", task_config=task, num_layers=shape.layers, embedding_size=shape.width,
        layer_factory=layer, recurrent_layer_indices=(shape.layers // 2,),
        feedback_recurrence=False,
    )  # fmt: skip
