"""The call of JAX's own GPU kernel for decode, which is deprecated."""

from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_paged_attn import _checks, _options, _primitive
from jax_paged_attn._call import paged
from jax_paged_attn.compat import _keywords


class _GpuOptions(_options.PageScales, _options.Sinks, _options.EngineChoice, total=False):
    """The keywords of the GPU kernel, and those that this package adds."""

    block_h: int
    pages_per_compute_block: int
    k_splits: int
    num_warps: int
    num_stages: int
    interpret: bool
    debug: bool
    mask_value: float
    attn_logits_soft_cap: float | None


@overload
def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    lengths: ArrayLike | None,
    k_scales_pages: ArrayLike | None = None,
    v_scales_pages: ArrayLike | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_GpuOptions],
) -> Array: ...


@overload
def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    lengths: ArrayLike | None,
    k_scales_pages: ArrayLike | None = None,
    v_scales_pages: ArrayLike | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_GpuOptions],
) -> tuple[Array, Array]: ...


@_options.keywords(
    _GpuOptions,
    **{"block_h": 16, "pages_per_compute_block": 8, "k_splits": 16, "num_warps": 8, "num_stages": 2},
    **{"interpret": False, "debug": False, "mask_value": _keywords.DEFAULT_MASK_VALUE, "return_lse": False},
)
def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    lengths: ArrayLike | None,
    k_scales_pages: ArrayLike | None = None,
    v_scales_pages: ArrayLike | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """The call of `jax.experimental.pallas.ops.gpu.paged_attention`, which JAX has deprecated: decode.

    Letters as in `jax_paged_attn.paged_attention`. Scores are not scaled: callers scale q, as they do there.

    Args:
      q: `[B, N, H]` bfloat16, float16 or float32.
      k_pages: `[K, P, S, H]`, dtype as q, or float8_e4m3fn, float8_e5m2, int8.
      v_pages: as `k_pages`.
      block_tables: `[B, M]` int32, the pages of each sequence.
      lengths: `[B]` int32, tokens in the cache; None is M·S for every sequence.
      k_scales_pages: `[K, P, S]` float32: one scale per token and head, key = stored × its scale × k_scale. None is 1.
        Engine "fused" does not take them. bfloat16 and float16 ones are converted whole in each call.
      v_scales_pages: likewise for values.
      block_h, pages_per_compute_block, k_splits, num_warps, num_stages: block sizes of that kernel, ignored here.
      interpret, debug: likewise ignored.
      mask_value: a number of at most −1e6. A masked key has no weight at all here, whatever it is.
      attn_logits_soft_cap: c ≠ 0: scores become c·tanh(scores / c).
      k_scale: positive, finite float32, scalar or `[K]`: key = stored × k_scale. None is 1. That kernel has none.
      v_scale: likewise for values.
      sinks, return_lse, implementation, batch_invariant: as in `jax_paged_attn.paged_attention`; that kernel has none
        of them.

    Returns:
      `[B, N, H]` in q's dtype; with `return_lse` a tuple of that and lse `[B, N]` float32.

    Raises:
      ValueError, TypeError: as `jax_paged_attn.paged_attention`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.compat import paged_attention
      >>> pages = jnp.ones((1, 3, 4, 8))  # [K, P, S, H]
      >>> block_tables, lengths = jnp.array([[2, 0]], jnp.int32), jnp.array([5], jnp.int32)
      >>> paged_attention(jnp.ones((1, 2, 8)) * 8**-0.5, pages, pages, block_tables, lengths).shape
      (1, 2, 8)
    """
    _keywords.check_mask_value(options["mask_value"])
    _keywords.check_counts(options, "block_h", "pages_per_compute_block", "k_splits", "num_warps", "num_stages")
    cap = _keywords.soft_cap("attn_logits_soft_cap", options["attn_logits_soft_cap"])
    k_pages, v_pages = _checks.as_array("k_pages", k_pages), _checks.as_array("v_pages", v_pages)
    block_tables = _checks.as_int32("block_tables", block_tables)
    if lengths is None:
        dims = _checks.Dims()
        dims.match("block_tables", block_tables, "B M", ("int32",))
        dims.match("k_pages", k_pages, "K P S H", (str(k_pages.dtype),))
        lengths = jnp.full(dims["B"], dims["M"] * dims["S"], jnp.int32)
    options |= {"scale": 1.0, "sliding_window": None, "soft_cap": cap, **_keywords.page_scales(options, k_pages)}
    operands = (q, k_pages, v_pages, block_tables, lengths)
    scales = {"k_scales_pages": k_scales_pages, "v_scales_pages": v_scales_pages}
    return paged(_primitive.attention, *operands, options, layout="head_major", token_scales=scales)
