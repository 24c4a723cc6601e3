"""EasyDeL's `unified_attention`, and its place in ejkernel's registry of kernels.

One call before the model is built, and EasyDeL's server and `ejkernel.modules.unified_attention` run on the engines of
this package, whatever platform they ask for:

    from jax_paged_attn.compat import ejkernel

    ejkernel.register()
"""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

import jax_paged_attn
from jax_paged_attn import _checks

__all__ = ["register", "unified_attention"]

_ALGORITHM = "unified_attention"
# Where EasyDeL and ejkernel look: the first two on GPUs, the last one elsewhere.
_PLATFORMS = ("triton", "cuda", "xla")


def unified_attention(
    queries: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    query_start_loc: ArrayLike,
    alibi_slopes: ArrayLike | None = None,
    qq_bias: ArrayLike | None = None,
    softmax_aux: ArrayLike | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    seq_threshold_3d: int | None = None,
    num_par_softmax_segments: int | None = None,
    block_dim: int = 128,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Array:
    """`ejkernel.modules.unified_attention`: any mix of prompts and decode rows over pages, read where they lie.

    Letters as in `jax_paged_attn.paged_attention`.

    Args:
      queries: `[T, N, H]` bfloat16, float16 or float32.
      key_cache: `[P, S, K, H]`, dtype as queries, or float8_e4m3fn, float8_e5m2. Over float32 pages, queries of 16 bits
        are attended in float32.
      value_cache: as `key_cache`.
      kv_lens: `[B]` int32, tokens in the cache, those of this call included.
      block_tables: `[B, M]` int32, the pages of each sequence.
      query_start_loc: `[B + 1]` int32, the first row of each sequence, then the end.
      alibi_slopes: must be None.
      qq_bias: must be None.
      softmax_aux: `[N]`, a logit per query head without a value; None is none.
      softmax_scale: multiplies the scores; None is 1/sqrt(H).
      causal: False lets every row see all keys of its sequence; ejkernel's own kernels have True only.
      sliding_window: w ≥ 1: the token at position i sees keys j with i − w < j ≤ i. None and 0 are none.
      logits_soft_cap: c > 0: scores become c·tanh(scores / c). None and 0 are none.
      seq_threshold_3d, num_par_softmax_segments, block_dim, num_warps, num_stages: sizes of ejkernel's kernels, ignored
        here.

    Returns:
      `[T, N, H]` in the dtype of the queries. Rows that no sequence has are 0.

    Raises:
      ValueError: for ALiBi slopes and biases; ejkernel's registry makes an EjkernelRuntimeError of it.
      ValueError, TypeError: as `jax_paged_attn.ragged_paged_attention`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.compat.ejkernel import unified_attention
      >>> cache = jnp.ones((3, 4, 1, 8))
      >>> kv_lens, block_tables = jnp.array([3, 6], jnp.int32), jnp.array([[1, -1], [2, 0]], jnp.int32)
      >>> query_start_loc = jnp.array([0, 3, 4], jnp.int32)
      >>> unified_attention(jnp.ones((4, 2, 8)), cache, cache, kv_lens, block_tables, query_start_loc).shape
      (4, 2, 8)
    """
    for name, x in (("alibi_slopes", alibi_slopes), ("qq_bias", qq_bias)):
        if x is not None:
            raise ValueError(f"{name}: expected None, got an array: biases of scores are not supported")
    q, keys = _checks.as_array("queries", queries), _checks.as_array("key_cache", key_cache)
    out = jax_paged_attn.ragged_paged_attention(
        q.astype(jnp.float32) if keys.dtype == jnp.float32 else q,
        keys,
        value_cache,
        kv_lens,
        block_tables,
        query_start_loc,
        scale=softmax_scale,
        causal=causal,
        sliding_window=sliding_window or None,
        soft_cap=logits_soft_cap or None,
        sinks=None if softmax_aux is None else _checks.as_array("softmax_aux", softmax_aux).astype(jnp.float32),
    )
    return out.astype(q.dtype)


def register(platforms: Sequence[str] = _PLATFORMS, *, priority: int = 100) -> None:
    """Puts `unified_attention` into ejkernel's registry, before its own kernels. A second call changes nothing.

    EasyDeL's server asks for the platform "triton"; `ejkernel.modules.unified_attention` takes "triton" or "cuda" on
    GPUs and "xla" elsewhere.

    Args:
      platforms: of "triton", "cuda" and "xla", those to register for.
      priority: ejkernel's own kernels have 0; the highest one runs.

    Raises:
      ImportError: ejkernel is not installed.
      ValueError: an unknown platform.

    Example:
      >>> from jax_paged_attn.compat import ejkernel
      >>> try:
      ...     ejkernel.register(["triton", "rocm"])
      ... except ValueError as error:
      ...     print(error)
      platforms: expected some of triton, cuda, xla, got rocm
    """
    unknown = sorted(set(platforms) - set(_PLATFORMS))
    if unknown:
        raise ValueError(f"platforms: expected some of {', '.join(_PLATFORMS)}, got {', '.join(unknown)}")
    try:
        importlib.import_module("ejkernel.kernels")  # which registers its own
        registry = importlib.import_module("ejkernel.kernels._registry").kernel_registry
    except ImportError as error:
        raise ImportError(f"register: ejkernel could not be imported ({error}); pip install ejkernel") from error
    registered = registry.list_implementations(_ALGORITHM)
    ours = {spec.platform for spec in registered if _is_ours(spec.implementation)}
    theirs = next(spec.implementation for spec in registered if not _is_ours(spec.implementation))
    for platform in platforms:
        if platform not in ours:
            registry.register(_ALGORITHM, platform, "any", priority)(_with_signature_of(theirs))


def _is_ours(implementation: Any) -> bool:
    return inspect.unwrap(implementation).__module__ == __name__


def _with_signature_of(theirs: Any) -> Any:
    """Our function with the annotations that ejkernel compares, which are jaxtyping's."""

    def implementation(*args: Any, **kwargs: Any) -> Array:
        return unified_attention(*args, **kwargs)

    implementation.__name__ = implementation.__qualname__ = _ALGORITHM
    implementation.__doc__ = unified_attention.__doc__
    vars(implementation)["__signature__"] = inspect.signature(theirs)
    return implementation
