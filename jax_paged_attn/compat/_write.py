"""Writes of new tokens into the pages that the calls of JAX's own kernels read."""

import functools
from typing import overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_paged_attn import _checks, _modes
from jax_paged_attn._call import write


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
