"""The call of JAX's own TPU kernel, which mixes prompts and decode rows."""

from typing import Any, Literal, Unpack, overload

from jax import Array
from jax.typing import ArrayLike

from jax_paged_attn import _checks, _options, _primitive
from jax_paged_attn._call import ragged
from jax_paged_attn.compat import _keywords


class _TpuOptions(_options.PageScales, _options.Sinks, _options.EngineChoice, total=False):
    """The keywords of the TPU kernel, and those that this package adds."""

    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    mask_value: float | None
    num_kv_pages_per_block: int | None
    num_queries_per_block: int | None
    vmem_limit_bytes: int | None


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


@_options.keywords(_TpuOptions, sm_scale=1.0, mask_value=_keywords.DEFAULT_MASK_VALUE, return_lse=False)
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
    _keywords.check_mask_value(options["mask_value"])
    _keywords.check_counts(options, "num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes")
    cap = _keywords.soft_cap("soft_cap", options["soft_cap"])
    kv_pages = _checks.as_array("kv_pages", kv_pages)
    operands = (q, kv_pages, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs)
    options |= {"scale": options["sm_scale"], "soft_cap": cap, **_keywords.page_scales(options, kv_pages)}
    return ragged(_primitive.attention, *operands, options, layout="interleaved", tables_name="page_indices")
