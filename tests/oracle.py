"""The specification as a loop: float64 NumPy, one query row and one KV head at a time.

Every engine, the pure-JAX reference included, is measured against this file, so it takes nothing from the
package and nothing from JAX: only NumPy, and ml_dtypes for the rounding of 8-bit floats.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

SATURATION = {
    np.dtype(ml_dtypes.float8_e4m3fn): 448.0,
    np.dtype(ml_dtypes.float8_e5m2): 57344.0,
    np.dtype(np.int8): 127.0,
}


def _per_head(scale: ArrayLike | None, num_heads: int, dtype: Any) -> Array:
    """A scale given as None, scalar or `[K]`, as `[K]`."""
    return np.broadcast_to(np.asarray(1.0 if scale is None else scale, dtype), (num_heads,))


def ragged_paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array | None,
    kv_lens: Array,
    block_tables: Array,
    cu_q_lens: Array,
    num_seqs: ArrayLike | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    k_token_scales: Array | None = None,
    v_token_scales: Array | None = None,
    value_dim: int | None = None,
) -> tuple[Array, Array]:
    """Attention of ragged query rows over paged keys: `(out [T, N, Hv], lse [T, N])`, both float64.

    Without pages of values these are the first `value_dim` numbers of each key, scales included.
    """
    if v_pages is None:
        v_pages, v_scale = k_pages[..., :value_dim], k_scale
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_pages.shape
    batch, max_pages = block_tables.shape
    group = num_heads // num_kv_heads
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    k_scales = _per_head(k_scale, num_kv_heads, np.float64)
    v_scales = _per_head(v_scale, num_kv_heads, np.float64)
    live = batch if num_seqs is None else int(np.clip(int(np.asarray(num_seqs).reshape(())), 0, batch))
    starts = np.maximum.accumulate(np.clip(np.asarray(cu_q_lens, np.int64), 0, num_tokens))

    out = np.zeros((num_tokens, num_heads, v_pages.shape[-1]))
    lse = np.full((num_tokens, num_heads), -np.inf)
    for b in range(live):
        kv_len = int(np.clip(int(kv_lens[b]), 0, max_pages * page_size))
        first, count = int(starts[b]), int(starts[b + 1] - starts[b])
        if count == 0:
            continue
        # The keys of one sequence are gathered and converted once, since that takes longer than all that follows.
        places = np.arange(kv_len)
        pages, offsets = block_tables[b, places // page_size], places % page_size
        there = (pages >= 0) & (pages < num_pages)
        keys, values = (np.zeros((num_kv_heads, kv_len, pool.shape[-1])) for pool in (k_pages, v_pages))
        sides = ((k_pages, k_scales, k_token_scales, keys), (v_pages, v_scales, v_token_scales, values))
        for pool, scales, token_scales, mine in sides:
            where = pages[there], offsets[there]
            tokens = pool[where].astype(np.float64) * scales[:, None]  # [keys, K, H]
            if token_scales is not None:
                tokens *= token_scales[where][..., None]
            mine[:, there] = np.moveaxis(tokens, 0, 1)
        for row in range(count):
            position = kv_len - count + row
            last_key = position if causal or position < 0 else kv_len - 1
            first_key = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen = first_key + np.flatnonzero(there[first_key : last_key + 1]) if last_key >= 0 else []
            for kv_head in range(num_kv_heads):
                heads = slice(kv_head * group, (kv_head + 1) * group)
                scores = q[first + row, heads].astype(np.float64) @ keys[kv_head, seen].T * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                sink = np.full(group, -np.inf) if sinks is None else sinks[heads].astype(np.float64)
                top = np.maximum(scores.max(axis=-1, initial=-np.inf), sink)
                top_or_zero = np.where(np.isneginf(top), 0.0, top)  # a row without a key and without a sink
                weights = np.exp(scores - top_or_zero[:, None])
                total = weights.sum(axis=-1) + np.exp(sink - top_or_zero)
                some = total > 0
                out[first + row, heads][some] = (weights @ values[kv_head, seen])[some] / total[some, None]
                lse[first + row, heads][some] = top[some] + np.log(total[some])
    return out, lse


def paged_attention(
    q: Array, k_pages: Array, v_pages: Array | None, block_tables: Array, lengths: Array, **keywords: Any
) -> tuple[Array, Array]:
    """Decode: every sequence has one query row, which stands at its last token."""
    return ragged_paged_attention(
        q, k_pages, v_pages, lengths, block_tables, np.arange(q.shape[0] + 1, dtype=np.int32), **keywords
    )


def store(values: Array, scales: Array, dtype: Any) -> Array:
    """`values [K, H]` as pages of `dtype` hold them: divided in float32, saturated, rounded to nearest even."""
    dtype = np.dtype(dtype)
    scaled = values.astype(np.float32) / scales[:, None]
    limit = SATURATION.get(dtype)
    if limit is not None:
        scaled = np.clip(scaled, -limit, limit)
    if dtype == np.int8:
        scaled = np.rint(np.where(np.isnan(scaled), np.float32(0), scaled))
    return scaled.astype(dtype)


def write_kv_pages(
    k_pages: Array,
    v_pages: Array | None,
    k: Array,
    v: Array | None,
    slot_mapping: Array,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> tuple[Array, Any]:
    """Copies of the pools with token t at slot `page · S + offset`; the last of equal slots wins.

    There may be no values, if they are in the keys.
    """
    num_pages, page_size, num_kv_heads, _ = k_pages.shape
    sides = [(k_pages.copy(), k, _per_head(k_scale, num_kv_heads, np.float32))]
    if v_pages is not None and v is not None:
        sides.append((v_pages.copy(), v, _per_head(v_scale, num_kv_heads, np.float32)))
    for token, slot in enumerate(slot_mapping.tolist()):
        if 0 <= slot < num_pages * page_size:
            page, offset = divmod(slot, page_size)
            for pages, tokens, scales in sides:
                pages[page, offset] = store(tokens[token], scales, pages.dtype)
    return sides[0][0], None if v_pages is None else sides[1][0]


def copy_kv_pages(k_pages: Array, v_pages: Array | None, src: Array, dst: Array) -> tuple[Array, Any]:
    """Copies of the pools with page `src[i]` in place of page `dst[i]`; sources are read before any write."""
    num_pages = k_pages.shape[0]
    pools = [(k_pages, k_pages.copy())] + ([] if v_pages is None else [(v_pages, v_pages.copy())])
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        if 0 <= source < num_pages and 0 <= target < num_pages:
            for old, new in pools:
                new[target] = old[source]
    return pools[0][1], None if v_pages is None else pools[1][1]


def merge_attention_states(outs: Array, lses: Array) -> tuple[Array, Array]:
    """Partial results over disjoint keys, parts on the leading axis, as one float64 `(out, lse)`."""
    lses = lses.astype(np.float64)
    outs = np.where(np.isneginf(lses)[..., None], 0.0, outs.astype(np.float64))
    top = np.max(lses, axis=0)
    shift = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(lses - shift)
    total = weights.sum(axis=0)
    empty = total == 0
    out = np.einsum("p...,p...h->...h", weights, outs) / np.where(empty, 1.0, total)[..., None]
    with np.errstate(divide="ignore"):
        return out, shift + np.log(total)
