"""Derivatives of attention, recomputed from lse one block of scores at a time.

A block is a window of query rows of one sequence against a few of its pages. Blocks are visited in a fixed order,
sequence after sequence and page after page, so sums have the same bits every time, also where sequences share pages.
The equations are those of FlashAttention's backward pass (Dao et al. 2022, section 3.1), soft cap and sinks added.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_paged_attn._layouts import LAYOUTS, keys_and_values
from jax_paged_attn._options import Scoring
from jax_paged_attn._reference import row_of_each_sequence

_ROW_WINDOW = 64  # 64 x 128 scores per head keep a block in cache
_KEYS_PER_BLOCK = 128

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Saved:
    """The residuals of the backward pass: the primitive's operands and its results."""

    q: Array
    k_pages: Array
    v_pages: Array
    block_tables: Array
    kv_lens: Array
    q_starts: Array
    q_counts: Array
    sinks: Array
    k_scale: Array
    v_scale: Array
    out: Array
    lse: Array
    k_token_scales: Array | None = None
    v_token_scales: Array | None = None

    @classmethod
    def of(cls, residuals: Sequence[Array], token_scales: tuple[bool, bool]) -> "Saved":
        """From the operands, as many as the call has, and the results behind them."""
        *operands, out, lse = residuals
        fields: tuple[Any, ...] = (*operands[:10], out, lse, *keys_and_values(operands[10:], token_scales))
        return cls(*fields)


@dataclasses.dataclass(frozen=True)
class _Block:
    """One block of scores: R rows x C·S keys, heads grouped as [K, G]."""

    rows: Array  # [R] row numbers, T where the window reaches past the sequence
    pages: tuple[Array, Array]  # [C] page of K and of V, past the pool where masked
    keys: Array  # [C·S, K, H] float32, dequantised
    values: Array  # [C·S, K, Hv] float32
    probs: Array  # [R, K, G, C·S], 0 where masked
    slope: Array  # [R, K, G, C·S] d capped score / d score
    k_scale: Array  # [C·S, K]
    v_scale: Array  # [C·S, K]


def tangent(
    q_dot: Array | None,
    k_dot: Array | None,
    v_dot: Array | None,
    sinks_dot: Array | None,
    saved: Saved,
    *,
    scoring: Scoring,
    decode: bool,
    layout: str,
) -> tuple[Array, Array]:
    """Tangents `(out_dot [T, N, Hv], lse_dot [T, N])`; an argument that is None has no tangent."""
    kv_heads = saved.k_scale.shape[1]
    value_dim = saved.out.shape[-1]
    k_dot, v_dot = (None if x is None else LAYOUTS[layout].split(x, i, kv_heads) for i, x in enumerate((k_dot, v_dot)))
    if LAYOUTS[layout].values_in_keys:
        k_dot = None if k_dot is None else k_dot[..., : saved.q.shape[-1]]
        v_dot = None if k_dot is None else k_dot[..., :value_dim]
    saved = _split(saved, layout)
    num_rows, heads, _ = saved.q.shape
    group = (kv_heads, heads // kv_heads)
    q = _grouped(saved.q, kv_heads)
    q_dots = None if q_dot is None else _grouped(q_dot, kv_heads)

    def visit(block: _Block, state: tuple[Array, Array]) -> tuple[Array, Array]:
        weighted, total = state  # sums of p·s_dot·v + p·v_dot, and of p·s_dot
        score_dot = jnp.zeros(block.probs.shape, jnp.float32)
        if q_dots is not None:
            score_dot += _einsum("rkgh,skh->rkgs", _take(q_dots, block.rows), block.keys)
        if k_dot is not None:
            dots = _tokens(k_dot, block.pages[0]) * block.k_scale[..., None]
            score_dot += _einsum("rkgh,skh->rkgs", _take(q, block.rows), dots)
        weight_dot = block.probs * block.slope * score_dot * scoring.scale
        step = _einsum("rkgs,skh->rkgh", weight_dot, block.values)
        if v_dot is not None:
            dots = _tokens(v_dot, block.pages[1]) * block.v_scale[..., None]
            step += _einsum("rkgs,skh->rkgh", block.probs, dots)
        return (
            weighted.at[block.rows].add(step, mode="drop"),
            total.at[block.rows].add(weight_dot.sum(axis=-1), mode="drop"),
        )

    zeros = (jnp.zeros((num_rows, *group, value_dim), jnp.float32), jnp.zeros((num_rows, *group), jnp.float32))
    weighted, lse_dot = _for_each_block(visit, zeros, saved, scoring, decode)
    if sinks_dot is not None:
        share = _sink_share(saved) * _sink_of_each_row(sinks_dot, saved)
        lse_dot += share.reshape(num_rows, *group)
    out_dot = weighted - lse_dot[..., None] * _grouped(saved.out, kv_heads)
    return out_dot.reshape(saved.out.shape).astype(saved.out.dtype), lse_dot.reshape(num_rows, heads)


def cotangent(
    out_bar: Array,
    lse_bar: Array,
    saved: Saved,
    wrt: tuple[bool, bool, bool, bool],
    *,
    scoring: Scoring,
    decode: bool,
    layout: str,
) -> list[Array]:
    """Cotangents of those of q, k_pages, v_pages and sinks that `wrt` names, in that order, in their dtypes.

    The cotangent of keys that hold the values is the sum of both uses, added up in float32.
    """
    pools, values_in_keys = (saved.k_pages, saved.v_pages), LAYOUTS[layout].values_in_keys
    saved = _split(saved, layout)
    kv_heads = saved.k_pages.shape[2]
    q, out_bars = _grouped(saved.q, kv_heads), _grouped(out_bar, kv_heads)
    # d score = p · (out_bar·v − out_bar·out + lse_bar): the last two are one number per row and head.
    row_term = (out_bar.astype(jnp.float32) * saved.out.astype(jnp.float32)).sum(axis=-1) - lse_bar
    row_terms = row_term.reshape(*q.shape[:-1])

    def visit(block: _Block, state: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
        q_bar, k_bar, v_bar = state
        bars = _take(out_bars, block.rows)
        score_bar = block.probs * (
            _einsum("rkgh,skh->rkgs", bars, block.values) - _take(row_terms, block.rows)[..., None]
        )
        score_bar *= block.slope * scoring.scale
        if q_bar is not None:
            q_bar = q_bar.at[block.rows].add(_einsum("rkgs,skh->rkgh", score_bar, block.keys), mode="drop")

        def of_values() -> Array:
            return _einsum("rkgs,rkgh->skh", block.probs, bars) * block.v_scale[..., None]

        if k_bar is not None:
            k_step = _einsum("rkgs,rkgh->skh", score_bar, _take(q, block.rows)) * block.k_scale[..., None]
            if values_in_keys:
                k_step = k_step.at[..., : block.values.shape[-1]].add(of_values())
            k_bar = _add_pages(k_bar, block.pages[0], k_step)
        if v_bar is not None:
            v_bar = _add_pages(v_bar, block.pages[1], of_values())
        return q_bar, k_bar, v_bar

    like = (q, saved.k_pages, saved.v_pages)
    asked = (*wrt[:2], wrt[2] and not values_in_keys)
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) if w else None for x, w in zip(like, asked, strict=True))
    q_bar, *pool_bars = _for_each_block(visit, zeros, saved, scoring, decode) if any(asked) else zeros
    results = [] if q_bar is None else [q_bar.reshape(saved.q.shape).astype(saved.q.dtype)]
    for which, (bar, pool) in enumerate(zip(pool_bars, pools, strict=True)):
        if bar is not None:
            results.append(LAYOUTS[layout].merge(bar.astype(pool.dtype), which, pool))
    if wrt[2] and values_in_keys:  # of the empty array in the place of their pool
        results.append(jnp.zeros_like(pools[1]))
    if wrt[3]:
        results.append(_sinks_bar(-_sink_share(saved) * row_term, saved))
    return results


def _split(saved: Saved, layout: str) -> Saved:
    """With pools `[P, S, K, H]`, whatever the layout."""
    kv_heads, pools = saved.k_scale.shape[1], (saved.k_pages, saved.v_pages)
    k_pages, v_pages = LAYOUTS[layout].split_both(*pools, kv_heads, saved.q.shape[-1])
    scales = (saved.k_token_scales, saved.v_token_scales)
    k_scales, v_scales = (LAYOUTS[layout].split_scales(x, i, kv_heads) for i, x in enumerate(scales))
    pages = {"k_pages": k_pages, "v_pages": v_pages}
    return dataclasses.replace(saved, **pages, k_token_scales=k_scales, v_token_scales=v_scales)


def _for_each_block(
    visit: Callable[[_Block, Any], Any], state: Any, saved: Saved, scoring: Scoring, decode: bool
) -> Any:
    """Folds `visit` over every block that holds a visible key, in order."""
    num_rows = saved.q.shape[0]
    num_seqs, max_pages = saved.block_tables.shape
    k_pool, page_size, kv_heads, _ = saved.k_pages.shape
    v_pool = saved.v_pages.shape[0]
    if 0 in (num_rows, num_seqs, max_pages, k_pool, v_pool):
        return state
    window = 1 if decode else _ROW_WINDOW
    pages_per_block = max(1, min(_KEYS_PER_BLOCK // page_size, max_pages))
    block_size = pages_per_block * page_size
    q, lse = _grouped(saved.q, kv_heads), saved.lse.reshape(num_rows, kv_heads, -1)
    k_scales = row_of_each_sequence(saved.k_scale, num_seqs, kv_heads, 1.0)
    v_scales = row_of_each_sequence(saved.v_scale, num_seqs, kv_heads, 1.0)

    def block(seq: Array, first_row: Array, first_page: Array) -> _Block:
        length = jnp.clip(saved.kv_lens[seq], 0, max_pages * page_size)
        offsets = first_row + jnp.arange(window, dtype=jnp.int32)
        rows = jnp.where(offsets < saved.q_counts[seq], saved.q_starts[seq] + offsets, num_rows)
        position = (length - saved.q_counts[seq] + offsets)[:, None]

        slots = first_page + jnp.arange(pages_per_block, dtype=jnp.int32)
        ids = jnp.where(slots < max_pages, saved.block_tables[seq, jnp.minimum(slots, max_pages - 1)], -1)
        in_pool = (ids >= 0) & (ids < max(k_pool, v_pool)) & (slots * page_size < length)
        pages = (jnp.where(in_pool, ids % k_pool, k_pool), jnp.where(in_pool, ids % v_pool, v_pool))

        key_ids = first_page * page_size + jnp.arange(block_size, dtype=jnp.int32)
        valid = jnp.repeat(in_pool, page_size) & (key_ids < length)
        visible = valid[None, :] & scoring.sees(position, key_ids[None, :])

        keep = valid[:, None, None]
        k_scale = _factors(k_scales[seq], saved.k_token_scales, pages[0], valid)
        v_scale = _factors(v_scales[seq], saved.v_token_scales, pages[1], valid)
        keys = jnp.where(keep, _tokens(saved.k_pages, pages[0]) * k_scale[..., None], 0.0)
        values = jnp.where(keep, _tokens(saved.v_pages, pages[1]) * v_scale[..., None], 0.0)
        scores, slope = scoring.scores(_einsum("rkgh,skh->rkgs", _take(q, rows), keys))
        row_lse = lse.at[rows].get(mode="fill", fill_value=-jnp.inf)[..., None]
        seen = visible[:, None, None, :] & ~jnp.isneginf(row_lse)
        probs = jnp.where(seen, jnp.exp(jnp.where(seen, scores - row_lse, 0.0)), 0.0)
        return _Block(rows, pages, keys, values, probs, jnp.broadcast_to(slope, probs.shape), k_scale, v_scale)

    def visit_pages(seq: Array, first_row: Array, state: Any) -> Any:
        length = jnp.clip(saved.kv_lens[seq], 0, max_pages * page_size)
        position = length - saved.q_counts[seq] + first_row  # of the window's first row
        start = scoring.first_key(position)
        stop = scoring.end_key(position + window - 1, length).clip(0, length)
        blocks = (start // block_size, (stop + block_size - 1) // block_size)
        return jax.lax.fori_loop(*blocks, lambda i, s: visit(block(seq, first_row, i * pages_per_block), s), state)

    def visit_sequence(seq: Array, state: Any) -> Any:
        windows = (saved.q_counts[seq] + window - 1) // window
        return _repeat(windows, lambda i, s: visit_pages(seq, i * window, s), state)

    return _repeat(num_seqs, visit_sequence, state)


def _repeat(count: int | Array, body: Callable[[Array, Any], Any], state: Any) -> Any:
    """`fori_loop` from 0 with an int32 index, also where x64 is enabled."""
    return jax.lax.fori_loop(jnp.int32(0), jnp.asarray(count, jnp.int32), body, state)


def _grouped(rows: Array, kv_heads: int) -> Array:
    """`[T, N, H]` -> `[T, K, G, H]` float32."""
    num_rows, heads, head_dim = rows.shape
    return rows.astype(jnp.float32).reshape(num_rows, kv_heads, heads // kv_heads, head_dim)


def _take(rows: Array, ids: Array) -> Array:
    return rows.at[ids].get(mode="fill", fill_value=0)


def _tokens(pages: Array, ids: Array) -> Array:
    """The tokens of some pages, `[C·S, K, H]` float32; pages past the pool are zeros."""
    return pages.at[ids].get(mode="fill", fill_value=0).reshape(-1, *pages.shape[2:]).astype(jnp.float32)


def _factors(scale: Array, token_scales: Array | None, ids: Array, valid: Array) -> Array:
    """`[C·S, K]`: the factors of the tokens of some pages, from `[K]` and maybe `[P, S, K, 1]`."""
    if token_scales is None:
        return jnp.broadcast_to(scale, (valid.shape[0], scale.shape[0]))
    return jnp.where(valid[:, None], scale * _tokens(token_scales, ids)[..., 0], 0.0)


def _add_pages(pool: Array, ids: Array, tokens: Array) -> Array:
    """Adds `tokens [C·S, K, width]` to the pages, one page after the other: a table may name one page twice."""
    pages = tokens.reshape(ids.shape[0], *pool.shape[1:])
    return _repeat(ids.shape[0], lambda i, p: p.at[ids[i]].add(pages[i], mode="drop"), pool)


def _sequence_of_each_row(saved: Saved) -> Array:
    """`[T]` int32: which sequence claims a row; B where none does."""
    rows = jnp.arange(saved.q.shape[0], dtype=jnp.int32)
    num_seqs = saved.block_tables.shape[0]
    nobodys = jnp.full(rows.shape, num_seqs, jnp.int32)
    if num_seqs == 0:  # JAX would trace the loop's body even so, and refuses to index an empty array
        return nobodys

    def claim(seq: Array, owner: Array) -> Array:
        start = saved.q_starts[seq]
        return jnp.where((rows >= start) & (rows < start + saved.q_counts[seq]), seq, owner)

    return _repeat(num_seqs, claim, nobodys)


def _sink_of_each_row(sinks: Array, saved: Saved) -> Array:
    num_seqs, (num_rows, heads, _) = saved.block_tables.shape[0], saved.q.shape
    if num_seqs == 0:
        return jnp.zeros((num_rows, heads), jnp.float32)
    each = row_of_each_sequence(sinks, num_seqs, heads, 0.0)
    return each.at[_sequence_of_each_row(saved)].get(mode="fill", fill_value=0)


def _sink_share(saved: Saved) -> Array:
    """`[T, N]`: the share of the softmax that goes to the sink."""
    seen = ~jnp.isneginf(saved.lse)
    return jnp.where(seen, jnp.exp(jnp.where(seen, _sink_of_each_row(saved.sinks, saved) - saved.lse, 0.0)), 0.0)


def _sinks_bar(bar_of_rows: Array, saved: Saved) -> Array:
    """Sums `[T, N]` into the `[X, N]` rows that the sinks came from."""
    num_seqs, num_sinks = saved.block_tables.shape[0], saved.sinks.shape[0]
    owner = _sequence_of_each_row(saved)
    row_of = owner // max(num_seqs // num_sinks, 1)
    # As a product with a one-hot matrix the sum has a fixed order, unlike a scatter-add with equal targets.
    belongs = (row_of[None, :] == jnp.arange(num_sinks, dtype=jnp.int32)[:, None]) & (owner < num_seqs)[None, :]
    return _einsum("xt,tn->xn", belongs.astype(jnp.float32), bar_of_rows)
