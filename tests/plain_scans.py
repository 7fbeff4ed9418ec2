"""What the scans of `famx.modules` equal: the lifted scan of Flax, differentiated as it stands."""

import flax.linen as nn


def scan(module, method, carry, xs, *args, rematerialized=True):
    """`deferred.scan`."""
    step = lambda module, carry, x: getattr(module, method)(carry, x, *args)
    lifted = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
    return lifted(module, carry, xs)


def start(decoder, climb, context):
    """`Decoder._start`, for which a prompt goes up the layers by `climb.scan_layers`."""
    step = lambda layer, climb, _, here: decoder.config.memory.start(layer, climb, here)
    return decoder._scan_layers(step, climb, None, context)[1]
