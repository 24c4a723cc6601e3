"""The call of tokamax for ragged paged attention, which writes the new tokens itself."""

from typing import Any, Literal, Unpack, overload

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_paged_attn import _checks, _options
from jax_paged_attn.compat import _keywords, _rpa

# The only cache and the only keys of a row that are supported; tokamax has enums of these names.
_ONLY = {"kv_layout": "head_along_sublane", "attention_scope": "full"}


class _TokamaxOptions(_options.PageScales, _options.EngineChoice, total=False):
    """The keywords of tokamax, and those that this package adds."""

    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    mask_value: float | None
    q_scale: float | None
    scale_rule: Literal["kernel", "reference"]
    chunk_prefill_size: int | None
    decode_block_sizes: Any
    prefill_block_sizes: Any
    vmem_limit_bytes: int | None
    debug_mode: bool
    out_dtype: DTypeLike | None
    use_causal_mask: bool
    skip_kv_update: bool
    kv_layout: str
    decode_query_size: int
    cp_group_size: int | None
    cp_rank: ArrayLike | None
    attention_scope: str


@overload
def batched_ragged_paged_attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    kv_cache: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    distribution: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_TokamaxOptions],
) -> tuple[Array, Array]: ...


@overload
def batched_ragged_paged_attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    kv_cache: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    distribution: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[_TokamaxOptions],
) -> tuple[Array, Array, Array]: ...


@_options.keywords(
    _TokamaxOptions,
    sm_scale=1.0,
    scale_rule="kernel",
    debug_mode=False,
    use_causal_mask=True,
    skip_kv_update=False,
    kv_layout=_ONLY["kv_layout"],
    decode_query_size=1,
    attention_scope=_ONLY["attention_scope"],
    return_lse=False,
)
def batched_ragged_paged_attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    kv_cache: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    distribution: ArrayLike,
    **options: Any,
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """The call of `tokamax.ops.ragged_paged_attention`: writes the new keys and values, then attends.

    It differs from `ragged_paged_attention_v3`, whose arguments and edges it shares, in the cache for H = 64, in the
    name `skip_kv_update`, and in the scales.

    Args:
      queries: `[T, N, H]` bfloat16, float16 or float32.
      keys: `[T, K, H]` in the cache's dtype or in that of `queries`, which is rounded to the cache's, saturated.
      values: as `keys`.
      kv_cache: `[P, S, 2K, H']` or `[P, S, ceil(2K / pack), pack, H']`, H' ≥ H, for H = 64 too; see there.
      kv_lens, page_indices, cu_q_lens, distribution: as there.
      sm_scale, sliding_window, soft_cap, mask_value, out_dtype, use_causal_mask: as there. Their kernel is causal only.
      skip_kv_update: True: nothing is written, and all keys come from the cache.
      q_scale: a static number. How it and the next two count depends on `scale_rule`.
      k_scale: a float, as there, or float32, scalar or `[K]`. None is 1.
      v_scale: likewise for values.
      scale_rule: "kernel": as in tokamax's TPU kernel, and in `ragged_paged_attention_v3`: key = stored × k_scale, and
        queries / q_scale are rounded to the cache's dtype, with q_scale as a factor of the scores. "reference": as in
        tokamax's plain JAX: key = stored / k_scale, value = stored / v_scale, and queries are divided by q_scale.
      return_lse: return the log-sum-exp too.
      kv_layout: HEAD_ALONG_SUBLANE, as the enum or its name in any case.
      attention_scope: FULL, likewise.
      cp_group_size, cp_rank: None.
      chunk_prefill_size, decode_block_sizes, prefill_block_sizes, vmem_limit_bytes, debug_mode, decode_query_size: for
        TPUs, ignored here.
      implementation: one of this package: "mosaic_tpu" is none.
      batch_invariant: as in `jax_paged_attn.paged_attention`.

    Returns:
      `(out, kv_cache)`: `[T, N, H]` and the cache after the write. With `return_lse` also lse `[T, N]` float32. Rows
      that no sequence has are 0, with lse −inf.

    Raises:
      ValueError, TypeError: as `ragged_paged_attention_v3`, for another layout or scope, and for context parallelism.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.compat import batched_ragged_paged_attention
      >>> kv_cache, q, new = jnp.zeros((3, 4, 2, 128)), jnp.ones((2, 2, 64)), jnp.ones((2, 1, 64))
      >>> where = (jnp.array([2]), jnp.array([1]), jnp.array([0, 2]), jnp.array([0, 0, 1]))
      >>> out, kv_cache, lse = batched_ragged_paged_attention(q, new, new, kv_cache, *where, return_lse=True)
      >>> out.shape, kv_cache[:, :, 0, 0].astype(int).tolist(), lse.shape
      ((2, 2, 64), [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], (2, 2))
    """
    _keywords.check_counts(options, "chunk_prefill_size", "vmem_limit_bytes", "decode_query_size")
    _check_supported(options)
    return _rpa.run(
        (queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution),
        options,
        name="batched_ragged_paged_attention",
        writes=not _checks.static_bool("skip_kv_update", options["skip_kv_update"]),
        side_by_side=False,
        rounds_tokens=True,
    )


def _check_supported(options: dict[str, Any]) -> None:
    for name, only in _ONLY.items():
        if options[name] is not None and str(options[name]).lower() != only:
            raise ValueError(f"{name}: expected {only.upper()}, got {options[name]}")
    for name in ("cp_group_size", "cp_rank"):
        if options[name] is not None:
            raise ValueError(
                f"{name}: expected None, got {options[name]}; see jax_paged_attn.context_parallel_attention"
            )
    if options["scale_rule"] not in ("kernel", "reference"):
        raise ValueError(f"scale_rule: expected kernel or reference, got {options['scale_rule']!r}")
