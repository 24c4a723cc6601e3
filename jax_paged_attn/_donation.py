"""Warnings of caches that are not updated in place, where that can be known: outside of `jit`, and once compiled."""

import math
import re
import warnings
from typing import Any

import jax
from jax import Array
from jax.core import Tracer

from jax_paged_attn._warnings import PagedAttentionWarning, warn_once

# Copies of smaller pools go unnoticed.
_LARGE = 64 << 20

# XLA's names of the dtypes of pages.
_XLA_NAMES = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float8_e4m3fn": "f8e4m3fn",
    "float8_e5m2": "f8e5m2",
    "int8": "s8",
}


def warn_of_eager_update(function: str, pages: Array, stacklevel: int = 4) -> None:
    """Warns once if the function updates a large pool outside of `jit`, where nothing can be donated.

    Args:
      stacklevel: 4 where the public function calls this, one more for each function between.
    """
    if not isinstance(pages, Tracer) and pages.nbytes >= _LARGE:
        warn_once(
            f"{function} outside of jit",
            f"{function}: outside of jax.jit it copies its pools, of {pages.nbytes >> 20} MiB each; "
            "call it in a jitted function that donates them (jax.jit(..., donate_argnums=...))",
            stacklevel=stacklevel,
        )


def check_in_place(compiled: jax.stages.Compiled, cache: Any) -> None:
    """Warns if a compiled step copies the pools of a cache instead of reusing their memory.

    JAX itself warns of donated arrays whose memory no result can use. It does not see that the old pages are read after
    a write, which makes XLA copy them, nor that a result has another dtype or sharding than the donated pool.

    Args:
      compiled: `jax.jit(step, donate_argnums=...).lower(...).compile()`.
      cache: the donated cache, as it is given to the step: a `PagedKVCache`, `nnx` state, or any pytree of arrays or
        `jax.ShapeDtypeStruct`s. Its leaves of four or five axes are the pools.

    Warns:
      PagedAttentionWarning: fewer bytes are reused than the pools have, or the module has copies of a pool's shape.

    Raises:
      ValueError: the cache has no pools.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> cache = jpa.PagedKVCache.create(1, 4, 4, 1, 8, jnp.float32)
      >>> new, slots = jnp.ones((1, 1, 8)), jnp.array([0], jnp.int32)
      >>> step = jax.jit(lambda cache: cache.write(0, new, new, slots), donate_argnums=0)
      >>> jpa.check_in_place(step.lower(cache).compile(), cache)  # no warning
    """
    pools = [x for x in jax.tree.leaves(cache) if len(x.shape) in (4, 5)]
    if not pools:
        raise ValueError("cache: expected arrays of four or five axes, its pools, got none")
    shapes = [x.shape if x.sharding is None else x.sharding.shard_shape(x.shape) for x in pools]
    size = sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, pools, strict=True))
    analysis, text = compiled.memory_analysis(), compiled.as_text() or ""
    reused = size if analysis is None else analysis.alias_size_in_bytes
    found = []
    if reused < size:
        found.append(
            f"expected results to reuse {size} bytes of pools, got {reused}: pools are not donated, not returned, or "
            "returned in another dtype, shape or sharding"
        )
    names = {f"{_XLA_NAMES[str(x.dtype)]}[{','.join(map(str, s))}]" for s, x in zip(shapes, pools, strict=True)}
    for name in sorted(names):
        pool = re.escape(name)
        copies = len(re.findall(rf"= (?:{pool}\S* copy|\({pool}[^=\n]* copy-start)\(", text))
        if copies:
            found.append(
                f"expected no copies of pools, got {copies} of {name}: pools are not donated, or the old pages are "
                "used after a write"
            )
    if found:
        warnings.warn(f"cache: {'; '.join(found)}", PagedAttentionWarning, stacklevel=2)
