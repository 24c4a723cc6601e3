"""The reference: paged attention and cache writes in plain `jnp`, one sequence after the other.

It works on the primitive's operands (see `docs/primitive.md`), computes in float32 and is written to be read, not
to be fast. Platforms without an engine of their own run it too.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jax_paged_attn._layouts import LAYOUTS, head_dim_of, keys_and_values
from jax_paged_attn._options import Scoring

# Products of float32 values would otherwise be rounded to tf32 or bfloat16 on GPUs and TPUs.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=("scoring", "decode", "layout", "token_scales"))
def attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    kv_lens: Array,
    q_starts: Array,
    q_counts: Array,
    sinks: Array,
    k_scale: Array,
    v_scale: Array,
    *scales_of_tokens: Array,
    scoring: Scoring,
    decode: bool,
    layout: str,
    token_scales: tuple[bool, bool],
) -> tuple[Array, Array]:
    """Returns `out [T, N, Hv]` in q's dtype and `lse [T, N]` float32, for the primitive's operands and parameters."""
    num_rows, num_heads, head_dim = q.shape
    num_seqs, kv_heads = block_tables.shape[0], k_scale.shape[1]
    out_shape = (num_rows, num_heads, v_pages.shape[-1])
    k_pages, v_pages = LAYOUTS[layout].split_both(k_pages, v_pages, kv_heads, head_dim)
    k_tokens, v_tokens = (
        LAYOUTS[layout].split_scales(scales, i, kv_heads)
        for i, scales in enumerate(keys_and_values(scales_of_tokens, token_scales))
    )
    nothing = (jnp.zeros(out_shape, jnp.float32), jnp.full((num_rows, num_heads), -jnp.inf, jnp.float32))
    if num_seqs == 0:  # under `jax.disable_jit` JAX refuses loops of zero steps
        return nothing[0].astype(q.dtype), nothing[1]
    per_sequence = (
        block_tables,
        kv_lens,
        q_starts,
        q_counts,
        row_of_each_sequence(sinks, num_seqs, num_heads, -jnp.inf),
        row_of_each_sequence(k_scale, num_seqs, kv_heads, 1.0),
        row_of_each_sequence(v_scale, num_seqs, kv_heads, 1.0),
    )

    def attend(rows: Array, row_ids: Array, sequence: tuple[Array, ...]) -> tuple[Array, Array]:
        table, kv_len, q_start, q_count, sink, k_mult, v_mult = sequence
        keys, valid = _gather(k_pages, v_pages.shape[0], table, kv_len, k_mult, k_tokens)
        values, _ = _gather(v_pages, k_pages.shape[0], table, kv_len, v_mult, v_tokens)
        capacity = keys.shape[0]

        position = jnp.clip(kv_len, 0, capacity) - q_count + (row_ids - q_start)
        key_ids = jnp.arange(capacity, dtype=jnp.int32)
        visible = valid[None, :] & scoring.sees(position[:, None], key_ids[None, :])

        grouped = rows.astype(jnp.float32).reshape(rows.shape[0], kv_heads, num_heads // kv_heads, head_dim)
        scores, _ = scoring.scores(_einsum("tkgh,skh->tkgs", grouped, keys))
        return _softmax_average(scores, visible[:, None, None, :], sink.reshape(kv_heads, -1), values)

    if decode:
        row_ids = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
        out, lse = jax.lax.map(lambda args: attend(*args), (q[:, None], row_ids, per_sequence))
        return out.reshape(out_shape).astype(q.dtype), lse.reshape(num_rows, num_heads)

    row_ids = jnp.arange(num_rows, dtype=jnp.int32)

    def step(state: tuple[Array, Array], sequence: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        _, _, q_start, q_count, *_ = sequence
        out, lse = attend(q, row_ids, sequence)
        mine = (row_ids >= q_start) & (row_ids < q_start + q_count)
        return (
            jnp.where(mine[:, None, None], out.reshape(out_shape), state[0]),
            jnp.where(mine[:, None], lse.reshape(num_rows, num_heads), state[1]),
        ), None

    (out, lse), _ = jax.lax.scan(step, nothing, per_sequence)
    return out.astype(q.dtype), lse


def row_of_each_sequence(rows: Array, num_seqs: int, width: int, absent: float) -> Array:
    """`[X, width]`, X dividing B or 0 -> `[B, width]`: the row of each sequence, `absent` where X is 0."""
    if rows.shape[0] == 0:
        return jnp.full((num_seqs, width), absent, jnp.float32)
    return jnp.repeat(rows, num_seqs // rows.shape[0], axis=0)


def _gather(
    pages: Array, other_pages: int, table: Array, kv_len: Array, scale: Array, token_scales: Array | None
) -> tuple[Array, Array]:
    """The keys (or values) of one sequence, `[M·S, K, H]` float32, and which of them are valid, `[M·S]`.

    Tokens past the length and tokens of ids outside the pool are 0 and not valid, whatever memory holds there.
    """
    num_pages, page_size, kv_heads, head_dim = pages.shape
    in_pool = (table >= 0) & (table < max(num_pages, other_pages))
    valid = jnp.repeat(in_pool, page_size) & (jnp.arange(table.shape[0] * page_size, dtype=jnp.int32) < kv_len)
    if num_pages == 0:
        return jnp.zeros((valid.shape[0], kv_heads, head_dim), jnp.float32), valid
    ids = jnp.where(in_pool, table, 0) % num_pages
    factors = scale[None, :, None]
    if token_scales is not None:
        factors = factors * jnp.where(valid[:, None, None], token_scales[ids].reshape(-1, kv_heads, 1), 1.0)
    tokens = pages[ids].reshape(-1, kv_heads, head_dim)
    return jnp.where(valid[:, None, None], tokens.astype(jnp.float32) * factors, 0.0), valid


def _softmax_average(scores: Array, visible: Array, sink: Array, values: Array) -> tuple[Array, Array]:
    """Softmax of `scores [T, K, G, S]` over the visible keys and the sink `[K, G]`, applied to `values [S, K, H]`."""
    top = jnp.max(scores, axis=-1, initial=-jnp.inf, where=visible)
    sink = sink[None]
    top = jax.lax.stop_gradient(jnp.maximum(top, sink))
    shift = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - shift[..., None], 0.0)), 0.0)
    total = weights.sum(axis=-1) + jnp.exp(sink - shift)
    some = total > 0
    divisor = jnp.where(some, total, 1.0)
    out = _einsum("tkgs,skh->tkgh", weights / divisor[..., None], values)
    return out, jnp.where(some, shift + jnp.log(divisor), -jnp.inf)


@functools.partial(jax.jit, static_argnames="layout")
def write(*operands: Array, layout: str = "split") -> tuple[Array, ...]:
    """Returns the pools with the tokens of `k`, `v` `[T, K, H]` stored at `slot_mapping [T]`."""
    *given, k, v, slot_mapping, k_scale, v_scale = operands
    pools = [pool.reshape(LAYOUTS[layout].shape_by_heads(pool, head_dim_of(k), k.shape[1])) for pool in given]
    k, v = (x if x.ndim == 3 else x[..., None] for x in (k, v))
    num_slots = LAYOUTS[layout].num_slots(pools[0])
    targets = jnp.where(last_writer(slot_mapping, num_slots), slot_mapping, num_slots)
    sides = ((k, k_scale),) if LAYOUTS[layout].values_in_keys else ((k, k_scale), (v, v_scale))
    stored = [_stored(x, scale, pools[0].dtype) for x, scale in sides]
    if LAYOUTS[layout].interleaved:
        stored = [jnp.stack(stored, axis=2).reshape(k.shape[0], 2 * k.shape[1], k.shape[2])]
    written = [_scatter(pool, tokens, targets, layout) for pool, tokens in zip(pools, stored, strict=True)]
    return tuple(x.reshape(pool.shape) for x, pool in zip(written, given, strict=True))


def last_writer(slots: Array, num_slots: int) -> Array:
    """True for a token whose value stays: its slot is in the pool and no later token has the same."""
    token_ids = jnp.arange(slots.shape[0], dtype=jnp.int32)
    in_pool = (slots >= 0) & (slots < num_slots)
    # Sorting by (slot, token) puts the last token of each slot at the end of its run.
    sorted_slots, order = jax.lax.sort((slots, token_ids), num_keys=2)
    ends_run = jnp.concatenate([sorted_slots[1:] != sorted_slots[:-1], jnp.ones(min(1, slots.shape[0]), bool)])
    return in_pool & jnp.zeros(slots.shape, bool).at[order].set(ends_run)


def _stored(tokens: Array, scale: Array, dtype: jnp.dtype) -> Array:
    """New tokens `[T, K, H]` as pages hold them."""
    scale = row_of_each_sequence(scale, tokens.shape[0], tokens.shape[1], 1.0)
    # The barrier keeps XLA from multiplying by a rounded reciprocal where it sees one divisor for many values.
    divisor = jax.lax.optimization_barrier(jnp.broadcast_to(scale[:, :, None], tokens.shape))
    return quantize(tokens.astype(jnp.float32) / divisor, dtype)


def _scatter(pool: Array, tokens: Array, targets: Array, layout: str) -> Array:
    """The pool with `tokens [T, heads, H]` in the slots `targets`; heads beyond those stay."""
    shape, page_axis = pool.shape, LAYOUTS[layout].page_axis
    flat = pool.reshape(*shape[:page_axis], LAYOUTS[layout].num_slots(pool), *shape[page_axis + 2 :])
    if page_axis:
        return flat.at[:, targets].set(tokens.swapaxes(0, 1), mode="drop").reshape(shape)
    heads = tokens.shape[1]
    where = targets if heads == flat.shape[1] else (targets, slice(heads))
    return flat.at[where].set(tokens, mode="drop").reshape(shape)


def quantize(values: Array, dtype: jnp.dtype) -> Array:
    """Rounds float32 to nearest even; 8-bit types saturate, NaN stays NaN in fp8 and becomes 0 in int8."""
    if dtype == jnp.int8:
        return jnp.nan_to_num(jnp.clip(jnp.round(values), -127, 127), nan=0.0).astype(jnp.int8)
    if jnp.finfo(dtype).bits == 8:
        # The conversion itself would turn values that are too large into NaN (e4m3) or infinity (e5m2).
        bound = float(jnp.finfo(dtype).max)
        return jnp.clip(values, -bound, bound).astype(dtype)
    return values.astype(dtype)


def rounded(values: Array, dtype: jnp.dtype) -> Array:
    """The values as pages of that dtype hold them, in a dtype of their own.

    Without the barrier XLA may leave out a conversion and its inverse, and with them the rounding.
    """
    return jax.lax.optimization_barrier(quantize(values.astype(jnp.float32), dtype)).astype(values.dtype)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def read_tokens(pool: Array, slots: Array, scale: Array, which: int, head_dim: int | None, layout: str) -> Array:
    """The key (`which` 0) or value (1) in the slot of each token, `[T, K, H]` float32, divided by its scale.

    It is 0 if the token is not there. As a linear map this is the transpose of the write. A key has all its numbers, a
    value the first `head_dim` ones, which are none where the values are in the keys.
    """
    pool = pool.reshape(LAYOUTS[layout].shape_by_heads(pool, head_dim, scale.shape[1]))
    pages = LAYOUTS[layout].split(pool, which, scale.shape[1])
    num_pages, page_size, kv_heads, width = pages.shape
    num_slots = num_pages * page_size
    targets = jnp.where(last_writer(slots, num_slots), slots, num_slots)
    tokens = pages.reshape(num_slots, kv_heads, width).at[targets].get(mode="fill", fill_value=0)
    tokens = tokens.astype(jnp.float32) / row_of_each_sequence(scale, slots.shape[0], kv_heads, 1.0)[:, :, None]
    return tokens[..., 0] if head_dim is None else tokens[..., :head_dim]
