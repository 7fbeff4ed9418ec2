"""Parts of traced functions, and lists of real leaves and others."""

import jax.extend.core as jex
import jax.numpy as jnp


def variables_of(atoms) -> list:
    """The variables among operands or results of equations; the others are literals."""
    return [v for v in atoms if not isinstance(v, jex.Literal)]


def depends(eqns, given) -> set:
    """The variables `given`, and the results of `eqns` that depend on them."""
    found = set(given)
    for eqn in eqns:
        if any(v in found for v in variables_of(eqn.invars)):
            found.update(eqn.outvars)
    return found


def part(jaxpr, invars, outvars, eqns) -> jex.Jaxpr:
    """The function of `invars` that some equations of a jaxpr are."""
    debug_info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return jex.Jaxpr((), invars, outvars, eqns, debug_info=debug_info)


def by_kind(leaves) -> tuple[list, list]:
    """Real leaves and the others, each a list with None in place of the other kind."""
    is_real = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    pick = lambda kind: [x if real == kind else None for x, real in zip(leaves, is_real, strict=True)]
    return pick(True), pick(False)


def join(real, plain) -> list:
    """The inverse of `by_kind`."""
    return [y if x is None else x for x, y in zip(real, plain, strict=True)]
