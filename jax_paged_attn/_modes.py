"""Calls outside of `jit` under JAX's modes.

Under `jax.transfer_guard("disallow")` nothing may come from the host unasked, and each scalar of an eager operation
does: helpers of the public functions are compiled. Under `jax.debug_infs` JAX refuses every infinity that an operation
returns, but an lse of −inf is no overflow: it says that a row sees no key.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

# Not inlined: JAX would differentiate an inlined function operation by operation.
compiled = jax.jit


def zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    return _zeros(shape, dtype)


@functools.partial(compiled, static_argnums=(0, 1))
def _zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    return jnp.zeros(shape, dtype)


def allowing_rows_without_keys(attend: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`attend`, which returns `(out, lse)`, with a check under `jax.debug_infs` that lets an lse of −inf pass."""

    def checked(*operands: Any, **parameters: Any) -> Any:
        if not jax.config.jax_debug_infs:  # pyright: ignore[reportAttributeAccessIssue]
            return attend(*operands, **parameters)
        with jax.debug_infs(False):
            out, lse = attend(*operands, **parameters)
            overflow = not isinstance(out, Tracer) and (jnp.isinf(out).any() | jnp.isposinf(lse).any())
        if overflow:
            raise FloatingPointError(f"invalid value (inf) encountered in {name}")
        return out, lse

    return checked
