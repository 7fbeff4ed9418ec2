"""Compiler options for tests, whose programs take longer to compile than to run."""

import jax


def known(**options):
    """The options that the installed XLA knows; versions differ."""

    def is_known(name):
        try:
            jax.jit(lambda: 0, compiler_options={name: options[name]}).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    return {name: options[name] for name in options if is_known(name)}


# Three times faster to compile. jax 0.11 no longer has the second option.
COMPILE_FAST = known(xla_backend_optimization_level=0, xla_cpu_use_fusion_emitters=False)
