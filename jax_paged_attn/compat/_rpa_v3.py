"""The call of RPA v3, the TPU kernel of vLLM's tpu-inference, which writes the new tokens itself."""

from typing import Any, Literal, Unpack, overload

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_paged_attn import _checks, _options
from jax_paged_attn.compat import _keywords, _rpa

_COUNTS = ("chunk_prefill_size", "num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes")


class _V3Options(_options.PageScales, _options.EngineChoice, total=False):
    """The keywords of both kernels of tpu-inference, and those that this package adds."""

    use_causal_mask: bool
    update_kv_cache: bool
    skip_kv_mask: bool
    sm_scale: float
    sliding_window: int | None
    attention_chunk_size: int | None
    soft_cap: float | None
    out_dtype: DTypeLike | None
    mask_value: float | None
    q_scale: float | None
    side_by_side: bool | None
    chunk_prefill_size: int | None
    d_block_sizes: tuple[int, ...] | None
    p_block_sizes: tuple[int, ...] | None
    m_block_sizes: tuple[int, ...] | None
    num_kv_pages_per_block: int | None
    num_queries_per_block: int | None
    vmem_limit_bytes: int | None
    debug_mode: bool
    disable_bounds_checks: bool
    disable_semaphore_checks: bool


@overload
def ragged_paged_attention_v3(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    kv_cache: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    distribution: ArrayLike,
    attention_sink: ArrayLike | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_V3Options],
) -> tuple[Array, Array]: ...


@overload
def ragged_paged_attention_v3(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    kv_cache: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    distribution: ArrayLike,
    attention_sink: ArrayLike | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_V3Options],
) -> tuple[Array, Array, Array]: ...


@_options.keywords(
    _V3Options,
    use_causal_mask=True,
    update_kv_cache=True,
    skip_kv_mask=False,
    sm_scale=1.0,
    return_lse=False,
    debug_mode=False,
    disable_bounds_checks=True,
    disable_semaphore_checks=True,
)
def ragged_paged_attention_v3(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    kv_cache: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    distribution: ArrayLike,
    attention_sink: ArrayLike | None = None,
    **options: Any,
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """The call of tpu-inference's RPA v3: writes the new keys and values, then attends, prompts and decode rows mixed.

    It takes the calls of `ragged_paged_attention` and of `ragged_paged_attention_hd64`, its kernel for head dim 64.
    Letters as in `jax_paged_attn.paged_attention`; pack is 32 / bits of the cache's dtype. The cache is read where it
    lies, and updated in place where the jitted function around the call donates it. Token r of the n that a sequence
    has in this call goes to position kv_len − n + r, unless that is negative or its page is none of the pool.

    Args:
      queries: `[T, N, H]` bfloat16, float16 or float32.
      keys, values: `[T, K, H]` in the cache's dtype: for 8 bits they are quantized before the call, as there.
      kv_cache: `[P, S, ceil(2K / pack), pack, H']`, H' ≥ H, there H rounded up to 128. Its dtype is that of `queries`,
        or float8_e4m3fn, float8_e5m2, int8. Key head k is head 2k, value head k is head 2k + 1. For H = 64 also
        `[P, S, ceil(K / pack), pack, 128]`, see `side_by_side`. The two axes of heads may be one. Numbers past H must
        be finite, such as the zeros that this call writes there.
      kv_lens: `[B]` int32, tokens in the cache, those of this call included.
      page_indices: `[B·M]` int32, M pages per sequence, one sequence after the other.
      cu_q_lens: `[B + 1]` int32, the first row of each sequence, then the end.
      distribution: `[3]` int32; the last is how many of the B sequences are live, the others have no effect.
      attention_sink: None or `[N]` float32: one more logit per head, without a value; of any head dim here.
      use_causal_mask: False: a token sees all keys of its sequence, with a window those behind i − w.
      update_kv_cache: False: nothing is written, and all keys come from the cache.
      sm_scale, sliding_window, soft_cap, mask_value: as in `ragged_paged_attention`. The scale is 1 by default.
      attention_chunk_size: c, a multiple of S: the token at position i sees keys j with j // c = i // c only (Llama 4).
        Not there: layers of tpu-inference give theirs as the kernel's `sliding_window`.
      out_dtype: dtype of the output; None is that of `queries`.
      q_scale: a static number. Queries become round(queries / q_scale) in the cache's dtype, saturated, and scores are
        multiplied by it.
      k_scale, v_scale: key = stored × k_scale, value = stored × v_scale: floats, as there, or float32, scalar or `[K]`.
        None is 1. Keys and values are stored as they are given, without a division.
      return_lse: return the log-sum-exp too, which that kernel has not.
      side_by_side: True: head k of the cache is a key of 64 numbers, then its value. False: as for other head dims.
        None: True for H = 64 if the shape fits, as their layers choose the kernel.
      skip_kv_mask, chunk_prefill_size, d_block_sizes, p_block_sizes, m_block_sizes: for TPUs, ignored here.
      num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes: likewise.
      debug_mode, disable_bounds_checks, disable_semaphore_checks: likewise.
      implementation, batch_invariant: as in `jax_paged_attn.paged_attention`.

    Returns:
      `(out, kv_cache)`: `[T, N, H]` and the cache after the write. With `return_lse` also lse `[T, N]` float32. Rows
      that no sequence has are 0 here and undefined there.

    Raises:
      ValueError, TypeError: as `jax_paged_attn.ragged_paged_attention`, and for a cache of another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_paged_attn.compat import ragged_paged_attention_v3
      >>> step = jax.jit(ragged_paged_attention_v3, donate_argnames="kv_cache")
      >>> kv_cache = jnp.zeros((3, 4, 1, 2, 128), jnp.bfloat16)  # pack = 2, K = 1
      >>> q, new = jnp.ones((2, 2, 128), jnp.bfloat16), jnp.ones((2, 1, 128), jnp.bfloat16)
      >>> where = (jnp.array([2]), jnp.array([1]), jnp.array([0, 2]), jnp.array([0, 0, 1]))
      >>> out, kv_cache = step(q, new, new, kv_cache, *where)
      >>> kv_cache[:, :, 0, 0, 0].astype(int).tolist()
      [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    """
    arrays = (queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution)
    return _rpa.run(arrays, options, sinks=attention_sink, **_checked(options))


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `_rpa.run` that follow from those of the call."""
    _keywords.check_counts(options, *_COUNTS)
    side_by_side, chunk = options["side_by_side"], options["attention_chunk_size"]
    return {
        "name": "ragged_paged_attention_v3",
        "writes": _checks.static_bool("update_kv_cache", options["update_kv_cache"]),
        "side_by_side": None if side_by_side is None else _checks.static_bool("side_by_side", side_by_side),
        "rounds_tokens": False,
        "chunk": None if chunk is None else _checks.static_count("attention_chunk_size", chunk),
    }
