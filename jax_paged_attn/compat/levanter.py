"""The paged attention of marin's Levanter, for its named arrays and for plain ones.

In `levanter/layers/attention.py` this import takes the place of the function of the same name; in
`levanter/layers/kv_cache.py` the other one does:

    from jax_paged_attn.compat.levanter import ragged_paged_attention
    from jax_paged_attn.compat.levanter import kv_update_unified_prefix

Pages lie as JAX's TPU kernel has them, `[P, S, 2K, H]`, and are read where they lie. Levanter marks pages, slots,
lengths and counts that are not there with −1 or 2,000,000; both are understood here.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_paged_attn import _checks, _primitive
from jax_paged_attn._call import ragged
from jax_paged_attn.compat._write import write_interleaved_kv_pages

__all__ = ["kv_update_unified_prefix", "ragged_paged_attention"]

# Levanter's second mark of an entry that is not there.
_INVALID = 2_000_000
# Levanter has no scales, which int8 pages would need.
_FP8 = ("float8_e4m3fn", "float8_e5m2")


def ragged_paged_attention(
    q: Any,
    kv_pages: Any,
    kv_lens: Any,
    page_indices: Any,
    cu_q_lens: Any,
    num_seqs: ArrayLike,
    sm_scale: ArrayLike = 1.0,
    soft_cap: float | None = None,
    *,
    implementation: str | None = None,
) -> Any:
    """Levanter's `ragged_paged_attention`: causal, prompts and decode rows mixed, query heads as `[K, G]`.

    K key/value heads, each with G query heads; the other letters as in `jax_paged_attn.paged_attention`. Arguments are
    arrays, or named ones (objects with `array` and `axes`, as haliax has them) whose axes are in this order.

    Args:
      q: `[T, K, G, H]` bfloat16, float16 or float32.
      kv_pages: `[P, S, 2K, H]`, dtype as q, or float8_e4m3fn, float8_e5m2: key head k is head 2k, value head k is head
        2k + 1.
      kv_lens: `[B]` int32, tokens in the cache, those of this call included.
      page_indices: `[B, M]` int32, the pages of each sequence.
      cu_q_lens: `[B + 1]` int32, the first row of each sequence, then the end.
      num_seqs: scalar or `[1]` int32, how many of the B sequences are live.
      sm_scale: multiplies the scores: a number, or a scalar that may be traced. A traced one multiplies q in float32,
        and the product is rounded once to q's dtype.
      soft_cap: c > 0: scores become c·tanh(scores / c).
      implementation: as in `jax_paged_attn.ragged_paged_attention`; Levanter's function has none.

    Returns:
      `[T, K, G, H]` in q's dtype, named as q is. Rows that no sequence has are 0.

    Raises:
      ValueError, TypeError: as `jax_paged_attn.ragged_paged_attention`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_paged_attn.compat.levanter import ragged_paged_attention
      >>> q, kv_pages = jnp.ones((3, 1, 2, 8)), jnp.ones((3, 4, 2, 8))
      >>> kv_lens, page_indices = jnp.array([5, -1], jnp.int32), jnp.array([[2, 0], [-1, -1]], jnp.int32)
      >>> rows, num_seqs = jnp.array([0, 3, 3], jnp.int32), jnp.array([1], jnp.int32)
      >>> attend = jax.jit(ragged_paged_attention)  # the scale is traced
      >>> attend(q, kv_pages, kv_lens, page_indices, rows, num_seqs, 8**-0.5).shape
      (3, 1, 2, 8)
    """
    queries = _checks.as_array("q", _plain(q))
    dims = _checks.Dims()
    dims.match("q", queries, "T K G H", _checks.COMPUTE_DTYPES)
    queries, scale = _scaled(queries, sm_scale)
    pages = _checks.as_array("kv_pages", _plain(kv_pages))
    dims.match("kv_pages", pages, "P S 2K H", (str(queries.dtype), *_FP8))
    lens, tables = (_checks.as_int32(n, _plain(x)) for n, x in (("kv_lens", kv_lens), ("page_indices", page_indices)))
    operands = (
        queries.reshape(dims["T"], -1, dims["H"]),
        *(pages, pages),
        jnp.where(lens == _INVALID, 0, lens),
        jnp.where(tables == _INVALID, -1, tables),
        _plain(cu_q_lens),
        _plain(num_seqs),
    )
    options = {"scale": scale, "sliding_window": None, "soft_cap": soft_cap, "sinks": None, "k_scale": None}
    options |= {"v_scale": None, "return_lse": False, "implementation": implementation, "batch_invariant": False}
    out: Any = ragged(_primitive.attention, *operands, options, layout="interleaved", tables_name="page_indices")
    return _named_as(q, out.reshape(queries.shape))


def kv_update_unified_prefix(
    kv_pages: ArrayLike, t_pages: ArrayLike, t_slots: ArrayLike, new_k: ArrayLike, new_v: ArrayLike, K: ArrayLike
) -> Array:
    """Levanter's write into its pages, all tokens at once; in place where the pages are donated, as Levanter does.

    Args:
      kv_pages: `[P, S, 2K, H]` bfloat16, float16, float32, float8_e4m3fn or float8_e5m2.
      t_pages: `[T]` int32, the page of each new token. Tokens without a page in the pool are not written.
      t_slots: `[T]` int32, the place in that page.
      new_k: `[T, K, H]` bfloat16, float16 or float32, cast to the dtype of the pages.
      new_v: likewise.
      K: how many of the T tokens are written, the first ones; may be traced.

    Returns:
      The pages with the tokens in them.

    Raises:
      ValueError, TypeError: for shapes and dtypes that do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.compat.levanter import kv_update_unified_prefix
      >>> where = jnp.array([1, -1], jnp.int32), jnp.array([3, -1], jnp.int32)
      >>> pages = kv_update_unified_prefix(jnp.zeros((2, 4, 2, 8)), *where, *jnp.ones((2, 2, 1, 8)), 1)
      >>> pages[1, 3].sum(), pages.sum()
      (Array(16., dtype=float32), Array(16., dtype=float32))
    """
    pages, k, v = (_checks.as_array(n, x) for n, x in (("kv_pages", kv_pages), ("new_k", new_k), ("new_v", new_v)))
    page_ids, places, count = (
        _checks.as_int32(n, x) for n, x in (("t_pages", t_pages), ("t_slots", t_slots), ("K", K))
    )
    dims = _checks.Dims()
    dims.match("kv_pages", pages, "P S 2K H", (*_checks.COMPUTE_DTYPES, *_FP8))
    for name, x in (("new_k", k), ("new_v", v)):
        dims.match(name, x, "T K H", _checks.COMPUTE_DTYPES)
    for name, x in (("t_pages", page_ids), ("t_slots", places)):
        dims.match(name, x, "T", ("int32",))
    if str(pages.dtype) not in _FP8:
        k, v = k.astype(pages.dtype), v.astype(pages.dtype)
    num_pages, page_size = dims["P"], dims["S"]
    written = (jnp.arange(dims["T"]) < count) & (page_ids >= 0) & (page_ids < num_pages)
    written &= (places >= 0) & (places < page_size)
    slots = jnp.where(written, page_ids, 0) * page_size + jnp.where(written, places, 0)
    return write_interleaved_kv_pages(pages, k, v, jnp.where(written, slots, -1))


def _plain(x: Any) -> Any:
    return x.array if hasattr(x, "axes") and hasattr(x, "array") else x


def _named_as(q: Any, out: Array) -> Any:
    return type(q)(out, q.axes) if _plain(q) is not q else out


def _scaled(q: Array, scale: ArrayLike) -> tuple[Array, float]:
    """Queries and the static factor of scores, which together scale by `scale`."""
    if not isinstance(scale, Tracer):
        return q, _checks.static_number("sm_scale", scale)
    if scale.ndim:
        raise ValueError(f"sm_scale: expected a scalar, got shape {scale.shape}")
    return (q.astype(jnp.float32) * scale.astype(jnp.float32)).astype(q.dtype), 1.0
