"""Writes of new tokens into the pages that the calls of JAX's own kernels read."""

from jax import Array
from jax.typing import ArrayLike

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


def write_head_major_kv_pages(
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    slot_mapping: ArrayLike,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """`jax_paged_attn.write_kv_pages` for the pages of `paged_attention`; in place where they are donated.

    Args:
      k_pages: `[K, P, S, H]` float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8.
      v_pages: as `k_pages`.
      k, v, slot_mapping, k_scale, v_scale: as in `jax_paged_attn.write_kv_pages`.

    Returns:
      The new `(k_pages, v_pages)`.

    Raises:
      ValueError, TypeError: as `jax_paged_attn.write_kv_pages`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.compat import write_head_major_kv_pages
      >>> write = jax.jit(write_head_major_kv_pages, donate_argnums=(0, 1))
      >>> k_pages, v_pages, new = jnp.zeros((1, 3, 4, 8)), jnp.zeros((1, 3, 4, 8)), jnp.ones((1, 1, 8))
      >>> k_pages, v_pages = write(k_pages, v_pages, new, new, jnp.array([5], jnp.int32))  # token 1 of page 1
      >>> float(k_pages[0, 1, 1, 0])
      1.0
    """
    scales = (k_scale, v_scale)
    name = "write_head_major_kv_pages"
    k_new, v_new = write(name, (k_pages, v_pages), (k, v), slot_mapping, scales, layout="head_major")
    return k_new, v_new
