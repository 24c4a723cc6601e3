"""JAX's own paged attention kernels, with their signatures and their pages, on the engines of this package.

Code written for `jax.experimental.pallas.ops.tpu.ragged_paged_attention` or for the deprecated
`jax.experimental.pallas.ops.gpu.paged_attention` runs with another import, on CPU and CUDA; pages are read where they
lie. All that holds of `paged_attention` and `ragged_paged_attention` holds here: edges, gradients, `vmap`, export,
`explain`.

`write_interleaved_kv_pages` and `write_head_major_kv_pages` write such pages, in place where they are donated; the
latter also 8-bit ones with a scale per token and head.
"""

import functools
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_paged_attn import _checks, _modes, _options, _primitive
from jax_paged_attn._call import paged, ragged, write

__all__ = [
    "DEFAULT_MASK_VALUE",
    "amax_scales",
    "paged_attention",
    "ragged_paged_attention",
    "write_head_major_kv_pages",
    "write_interleaved_kv_pages",
]

# The default of both kernels.
DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)

# Scores do not come near it, so exp(mask_value − score) is 0 and the key has no weight.
_LARGEST_MASK_VALUE = -1e6


class _TpuOptions(_options.PageScales, _options.Sinks, _options.EngineChoice, total=False):
    """The keywords of the TPU kernel, and those that this package adds."""

    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    mask_value: float | None
    num_kv_pages_per_block: int | None
    num_queries_per_block: int | None
    vmem_limit_bytes: int | None


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
def ragged_paged_attention(
    q: ArrayLike,
    kv_pages: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_TpuOptions],
) -> Array: ...


@overload
def ragged_paged_attention(
    q: ArrayLike,
    kv_pages: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[_TpuOptions],
) -> tuple[Array, Array]: ...


@_options.keywords(_TpuOptions, sm_scale=1.0, mask_value=DEFAULT_MASK_VALUE, return_lse=False)
def ragged_paged_attention(
    q: ArrayLike,
    kv_pages: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """The call of `jax.experimental.pallas.ops.tpu.ragged_paged_attention`: causal, prompts and decode rows mixed.

    Letters as in `jax_paged_attn.paged_attention`. Rows that no sequence has are 0 here and undefined there.

    Args:
      q: `[T, N, H]` bfloat16, float16 or float32.
      kv_pages: `[P, S, 2K, H]`, dtype as q, or float8_e4m3fn, float8_e5m2, int8: key head k is head 2k, value head k is
        head 2k + 1.
      kv_lens: `[B]` int32, tokens in the cache, those of this call included.
      page_indices: `[B, M]` int32, the pages of each sequence.
      cu_q_lens: `[B + 1]` int32, the first row of each sequence, then the end.
      num_seqs: `[1]` or scalar int32, how many of the B sequences are live.
      sm_scale: multiplies the scores. A static number, as are window and cap. The default is 1, not 1/sqrt(H).
      sliding_window: w ≥ 1: the token at position i sees keys j with i − w < j ≤ i.
      soft_cap: c ≠ 0: scores become c·tanh(scores / c).
      mask_value: None or a number of at most −1e6. A masked key has no weight at all here, whatever it is.
      k_scale: key = stored × k_scale: a float, as there, or float32, scalar or `[K]`. None is 1.
      v_scale: likewise for values.
      num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes: block sizes of the TPU kernel, ignored here.
      sinks, return_lse, implementation, batch_invariant: as in `jax_paged_attn.ragged_paged_attention`; the TPU kernel
        has none of them.

    Returns:
      `[T, N, H]` in q's dtype; with `return_lse` a tuple of that and lse `[T, N]` float32.

    Raises:
      ValueError, TypeError: as `jax_paged_attn.ragged_paged_attention`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.compat import ragged_paged_attention
      >>> kv_pages = jnp.ones((3, 4, 2, 8))  # K = 1: head 0 has keys, head 1 has values
      >>> kv_lens, page_indices = jnp.array([5], jnp.int32), jnp.array([[2, 0]], jnp.int32)
      >>> rows, num_seqs = jnp.array([0, 3], jnp.int32), jnp.array([1], jnp.int32)
      >>> ragged_paged_attention(jnp.ones((3, 2, 8)), kv_pages, kv_lens, page_indices, rows, num_seqs).shape
      (3, 2, 8)
    """
    _check_mask_value(options["mask_value"])
    _check_counts(options, "num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes")
    cap = options["soft_cap"]
    cap = None if cap is None else abs(_checks.static_number("soft_cap", cap))  # tanh is odd
    kv_pages = _checks.as_array("kv_pages", kv_pages)
    operands = (q, kv_pages, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)
    options |= {"scale": options["sm_scale"], "soft_cap": cap, **_scales(options, kv_pages)}
    return ragged(_primitive.attention, *operands, options, layout="interleaved", tables_name="page_indices")


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
    **{"interpret": False, "debug": False, "mask_value": DEFAULT_MASK_VALUE, "return_lse": False},
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
    _check_mask_value(options["mask_value"])
    _check_counts(options, "block_h", "pages_per_compute_block", "k_splits", "num_warps", "num_stages")
    cap = options["attn_logits_soft_cap"]
    cap = None if cap is None else abs(_checks.static_number("attn_logits_soft_cap", cap))
    if cap == 0:
        raise ValueError("attn_logits_soft_cap: expected None or a number that is not 0, got 0")
    k_pages, v_pages = _checks.as_array("k_pages", k_pages), _checks.as_array("v_pages", v_pages)
    block_tables = _checks.as_int32("block_tables", block_tables)
    if lengths is None:
        dims = _checks.Dims()
        dims.match("block_tables", block_tables, "B M", ("int32",))
        dims.match("k_pages", k_pages, "K P S H", (str(k_pages.dtype),))
        lengths = jnp.full(dims["B"], dims["M"] * dims["S"], jnp.int32)
    options |= {"scale": 1.0, "sliding_window": None, "soft_cap": cap, **_scales(options, k_pages)}
    operands = (q, k_pages, v_pages, block_tables, lengths)
    scales = {"k_scales_pages": k_scales_pages, "v_scales_pages": v_scales_pages}
    return paged(_primitive.attention, *operands, options, layout="head_major", token_scales=scales)


def write_interleaved_kv_pages(
    kv_pages: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    slot_mapping: ArrayLike,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> Array:
    """`jax_paged_attn.write_kv_pages` for the pages of `ragged_paged_attention`; in place where they are donated.

    Args:
      kv_pages: `[P, S, 2K, H]` float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8: key head k is head 2k,
        value head k is head 2k + 1.
      k, v, slot_mapping, k_scale, v_scale: as in `jax_paged_attn.write_kv_pages`.

    Returns:
      The new pages.

    Raises:
      ValueError, TypeError: as `jax_paged_attn.write_kv_pages`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.compat import write_interleaved_kv_pages
      >>> write = jax.jit(write_interleaved_kv_pages, donate_argnums=0)
      >>> k, v = jnp.full((1, 1, 8), 2.0), jnp.full((1, 1, 8), 3.0)
      >>> kv_pages = write(jnp.zeros((3, 4, 2, 8)), k, v, jnp.array([5], jnp.int32))  # token 1 of page 1
      >>> kv_pages[1, 1, :, 0].tolist()
      [2.0, 3.0]
    """
    scales = (k_scale, v_scale)
    name = "write_interleaved_kv_pages"
    (kv_new,) = write(name, (kv_pages,), (k, v), slot_mapping, scales, layout="interleaved")
    return kv_new


@overload
def write_head_major_kv_pages(
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    slot_mapping: ArrayLike,
    k_scales_pages: None = None,
    v_scales_pages: None = None,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> tuple[Array, Array]: ...


@overload
def write_head_major_kv_pages(
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    slot_mapping: ArrayLike,
    k_scales_pages: ArrayLike,
    v_scales_pages: ArrayLike,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array]: ...


def write_head_major_kv_pages(
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    slot_mapping: ArrayLike,
    k_scales_pages: ArrayLike | None = None,
    v_scales_pages: ArrayLike | None = None,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> tuple[Array, ...]:
    """`jax_paged_attn.write_kv_pages` for the pages of `paged_attention`; in place where they are donated.

    Args:
      k_pages: `[K, P, S, H]` float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8.
      v_pages: as `k_pages`.
      k, v, slot_mapping: as in `jax_paged_attn.write_kv_pages`.
      k_scales_pages: None, or `[K, P, S]` float32, bfloat16 or float16: the scale of each token and head, written too.
      v_scales_pages: likewise; both or none.
      k_scale: without `k_scales_pages` as in `jax_paged_attn.write_kv_pages`. With them `[T, K]` float32, the scales of
        the new keys; None is `amax_scales` of them.
      v_scale: likewise for values.

    Returns:
      The new `(k_pages, v_pages)`; with scales per token `(k_pages, v_pages, k_scales_pages, v_scales_pages)`.

    Raises:
      ValueError, TypeError: as `jax_paged_attn.write_kv_pages`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.compat import write_head_major_kv_pages
      >>> write = jax.jit(write_head_major_kv_pages, donate_argnums=(0, 1, 5, 6))
      >>> pages, scales = (jnp.zeros((1, 3, 4, 8), jnp.int8) for _ in "kv"), (jnp.zeros((1, 3, 4)) for _ in "kv")
      >>> new, slots = jnp.full((1, 1, 8), -2.54), jnp.array([5], jnp.int32)  # token 1 of page 1
      >>> k_pages, v_pages, k_scales, v_scales = write(*pages, new, new, slots, *scales)
      >>> int(k_pages[0, 1, 1, 0]), round(float(k_scales[0, 1, 1]), 4)
      (-127, 0.02)
    """
    name, pools = "write_head_major_kv_pages", (k_pages, v_pages)
    if k_scales_pages is None and v_scales_pages is None:
        return write(name, pools, (k, v), slot_mapping, (k_scale, v_scale), layout="head_major")
    if k_scales_pages is None or v_scales_pages is None:
        missing = "k_scales_pages" if k_scales_pages is None else "v_scales_pages"
        raise ValueError(f"{missing}: expected an array, as the other scales per token are one, got None")
    dtype = _checks.as_array("k_pages", k_pages).dtype
    scales = (
        amax_scales(k, dtype) if k_scale is None else k_scale,
        amax_scales(v, dtype) if v_scale is None else v_scale,
    )
    arrays = {"k_scales_pages": k_scales_pages, "v_scales_pages": v_scales_pages}
    return write(name, pools, (k, v), slot_mapping, scales, layout="head_major", token_scales=arrays)


def amax_scales(values: ArrayLike, dtype: jax.typing.DTypeLike) -> Array:
    """The smallest scales per token and head that keep new keys or values in the range of 8-bit pages.

    Args:
      values: `[T, K, H]` float32, bfloat16 or float16.
      dtype: float8_e4m3fn, float8_e5m2 or int8.

    Returns:
      `[T, K]` float32: the largest magnitude of each token and head, divided by 448, 57344 or 127; 1 where all are 0.

    Raises:
      ValueError: another dtype or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.compat import amax_scales
      >>> amax_scales(jnp.array([[[254.0, -508.0]]]), jnp.int8).tolist()
      [[4.0]]
    """
    name, array = jnp.dtype(dtype).name, _checks.as_array("values", values)
    if name not in _checks.QUANTIZED_DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(_checks.QUANTIZED_DTYPES)}, got {name}")
    _checks.Dims().match("values", array, "T K H", _checks.COMPUTE_DTYPES)
    largest = 127.0 if name == "int8" else float(jnp.finfo(name).max)
    return _amax_scales(array, largest)


@functools.partial(_modes.compiled, static_argnums=1)
def _amax_scales(values: Array, largest: float) -> Array:
    amax = jnp.abs(values.astype(jnp.float32)).max(axis=-1, initial=0.0)
    scales = amax / largest
    return jnp.where(scales > 0, scales, 1.0)


def _check_mask_value(mask_value: float | None) -> None:
    if mask_value is not None and _checks.static_number("mask_value", mask_value) > _LARGEST_MASK_VALUE:
        raise ValueError(f"mask_value: expected None or a number of at most {_LARGEST_MASK_VALUE}, got {mask_value}")


def _check_counts(options: dict[str, Any], *names: str) -> None:
    for name in names:
        if options[name] is not None:
            _checks.static_count(name, options[name])


def _scales(options: dict[str, Any], pages: Array) -> dict[str, Any]:
    """The page scales: 1 where int8 pages have none, as both kernels read them."""
    default = 1.0 if pages.dtype == jnp.int8 else None
    return {name: default if options[name] is None else options[name] for name in ("k_scale", "v_scale")}
