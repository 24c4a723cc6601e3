"""What the calls of the RPA v3 family share: their cache as a pool, the slots of new tokens, and the call itself.

The calls write the keys and values of their tokens, then attend. Their cache is one of our `interleaved` pools with
more axes, so that it is read and written where it lies.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_paged_attn import _call, _checks, _debug, _modes, _options, _primitive, _reference
from jax_paged_attn._donation import warn_of_eager_update
from jax_paged_attn._rows import rows_of_each
from jax_paged_attn.compat import _keywords

# The last axis of a cache is padded up to a multiple of it.
LANES = 128


@dataclasses.dataclass(frozen=True)
class Call:
    """The checked arrays of a call.

    Attributes:
      queries: `[T, N, H]`.
      keys: `[T, K, H]`, the new ones.
      values: `[T, K, H]`, likewise.
      cache: as it was given.
      pool_shape: that of an `interleaved` pool of the same bytes, `[P, S, 2K', H']`, K' ≥ K, H' ≥ H.
      kv_lens: `[B]`, clipped to [0, M·S].
      tables: `[B, M]`.
      starts: `[B]`, the first row of each sequence.
      counts: `[B]`, the rows of each sequence; 0 where it is not live.
      given: lengths, first rows and distribution as they were given.
    """

    queries: Array
    keys: Array
    values: Array
    cache: Array
    pool_shape: tuple[int, int, int, int]
    kv_lens: Array
    tables: Array
    starts: Array
    counts: Array
    given: tuple[Array, Array, Array]

    @classmethod
    def checked(
        cls,
        queries: ArrayLike,
        keys: ArrayLike,
        values: ArrayLike,
        kv_cache: ArrayLike,
        kv_lens: ArrayLike,
        page_indices: ArrayLike,
        cu_q_lens: ArrayLike,
        distribution: ArrayLike,
        *,
        side_by_side: bool | None,
        rounds_tokens: bool,
    ) -> "Call":
        """From a user's arguments; see `shape_of_pool` for `side_by_side`.

        `rounds_tokens` says whether keys and values may have the queries' dtype where the cache has 8 bits.
        """
        dims = _checks.Dims()
        named = {"queries": queries, "keys": keys, "values": values, "kv_cache": kv_cache}
        q, k, v, cache = (_checks.as_array(name, x) for name, x in named.items())
        dims.match("queries", q, "T N H", _checks.COMPUTE_DTYPES)
        dtypes = (str(q.dtype), *_checks.QUANTIZED_DTYPES)
        if str(cache.dtype) not in dtypes:
            raise ValueError(f"kv_cache: expected dtype {' or '.join(dtypes)}, got {cache.dtype}")
        dims.match("keys", k, "T K H", (str(cache.dtype), str(q.dtype)) if rounds_tokens else (str(cache.dtype),))
        dims.match("values", v, "T K H", (str(k.dtype),))
        shape = shape_of_pool(cache, dims["K"], dims["H"], side_by_side)
        _primitive.check_sizes(dims["N"], dims["K"], (dims["H"], dims["H"]), shape[1], ("kv_cache", "kv_cache"))

        where, given = sequences(dims, (kv_lens, page_indices, cu_q_lens, distribution), shape[1])
        return cls(q, k, v, cache, shape, *where, given=given)


def sequences(
    dims: _checks.Dims, arrays: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], page_size: int
) -> tuple[tuple[Array, Array, Array, Array], tuple[Array, Array, Array]]:
    """Checked arrays of the sequences of a call, and lengths, first rows and distribution as they were given.

    Args:
      dims: T is known.
      arrays: `kv_lens`, `page_indices`, `cu_q_lens` and `distribution`.
      page_size: S.

    Returns:
      Lengths, tables, first rows and row counts, as in `Call`; then see above.
    """
    names = {"kv_lens": "B", "page_indices": "B·M", "cu_q_lens": "B+1", "distribution": "3"}
    lens, flat, rows, ends = (_checks.as_int32(name, x) for name, x in zip(names, arrays, strict=True))
    for (name, letters), x in zip(names.items(), (lens, flat, rows, ends), strict=True):
        dims.match(name, x, letters, ("int32",))
    if dims["B"] == 0 or flat.shape[0] % dims["B"]:
        raise ValueError(
            f"page_indices: expected shape [B·M] for the {dims['B']} sequences of kv_lens, got {flat.shape}"
        )
    return _rows(lens, flat, rows, ends, dims["T"], page_size), (lens, rows, ends)


def shape_of_pool(cache: Array, kv_heads: int, head_dim: int, side_by_side: bool | None) -> tuple[int, int, int, int]:
    """The shape of an `interleaved` pool `[P, S, 2K', H']` with the bytes of a cache.

    Args:
      cache: `[P, S, heads, H']`, or with the heads in two axes, the inner one `pack` = 32 / bits of the dtype. There is
        a head for each key and each value, or for each pair of both.
      kv_heads: K. A cache may have more heads, up to the next multiple of `pack`.
      head_dim: H.
      side_by_side: whether a key and its value share a row of 2H numbers. None: yes for H = 64 where the shape allows.
    """
    pack = 4 // cache.dtype.itemsize
    if cache.ndim not in (4, 5) or (cache.ndim == 5 and cache.shape[3] != pack):
        raise ValueError(
            f"kv_cache: expected shape [P, S, heads / {pack}, {pack}, H'] or [P, S, heads, H'], got shape {cache.shape}"
        )
    pages, page_size, width = cache.shape[0], cache.shape[1], cache.shape[-1]
    heads = math.prod(cache.shape[2:-1])

    def fits(count: int) -> bool:
        return heads in (count, aligned(count, pack))

    pairs = fits(kv_heads) and width == 2 * head_dim
    if side_by_side is None:
        side_by_side = head_dim == LANES // 2 and pairs
    if side_by_side and pairs:
        return pages, page_size, 2 * heads, head_dim
    if side_by_side or not fits(2 * kv_heads) or width < head_dim:
        count, last = (kv_heads, f"{2 * head_dim}") if side_by_side else (2 * kv_heads, f"H' ≥ {head_dim}")
        raise ValueError(
            f"kv_cache: expected shape [P, S, {aligned(count, pack) // pack}, {pack}, {last}] or "
            f"[P, S, {count}, {last}] for {kv_heads} key/value heads, got shape {cache.shape}"
        )
    if heads % 2:
        raise ValueError(f"kv_cache: expected an even number of heads, got {heads}")
    return pages, page_size, heads, width


def aligned(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@functools.partial(_modes.compiled, static_argnums=(4, 5))
def _rows(
    kv_lens: Array, page_indices: Array, cu_q_lens: Array, distribution: Array, num_rows: int, page_size: int
) -> tuple[Array, Array, Array, Array]:
    """Lengths, tables, first rows and row counts of the sequences."""
    tables = page_indices.reshape(kv_lens.shape[0], -1)
    kv_lens = jnp.clip(kv_lens, 0, tables.shape[1] * page_size)
    return kv_lens, tables, *rows_of_each(cu_q_lens, distribution[2], num_rows)


def run(
    arrays: tuple[ArrayLike, ...],
    options: Mapping[str, Any],
    *,
    name: str,
    writes: bool,
    side_by_side: bool | None,
    rounds_tokens: bool,
    sinks: ArrayLike | None = None,
    chunk: int | None = None,
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """Writes and attends: `(out, cache)`, or with `return_lse` `(out, cache, lse)`.

    Args:
      arrays: the eight that all calls of the family have.
      options: the keywords that all have, by their names there.
      name: the public function, for warnings.
      writes: whether the new tokens are written.
      side_by_side, rounds_tokens: as in `Call.checked`.
      sinks: `attention_sink` of `ragged_paged_attention_v3`.
      chunk: its `attention_chunk_size`.
    """
    call = Call.checked(*arrays, side_by_side=side_by_side, rounds_tokens=rounds_tokens)
    return_lse = _checks.static_bool("return_lse", options["return_lse"])
    call, own = _own_options(call, options, sinks)
    scoring = _options.Scoring.checked(own, call.queries.shape[2])
    cache, (pages, page_size) = call.cache, call.pool_shape[:2]
    where = (call.kv_lens, call.tables, call.starts, call.counts)
    if writes:
        warn_of_eager_update(name, cache, stacklevel=6)
        cache = _write(call, slots_of(*where, call.keys.shape[0], pages, page_size))
    if chunk is not None and chunk < call.tables.shape[1] * page_size:
        if chunk % page_size:
            raise ValueError(f"attention_chunk_size: expected a multiple of the page size, {page_size}, got {chunk}")
        where = in_chunks(*where, chunk, page_size, call.queries.shape[0])
    out, lse = _attend(call, cache.reshape(call.pool_shape), where, scoring, own)
    if options["out_dtype"] is not None:
        out = out.astype(options["out_dtype"])
    return (out, cache, lse) if return_lse else (out, cache)


def _own_options(call: Call, options: Mapping[str, Any], sinks: ArrayLike | None) -> tuple[Call, dict[str, Any]]:
    """The keywords of `jax_paged_attn.ragged_paged_attention`, and the call with queries as `q_scale` makes them."""
    _keywords.check_mask_value(options["mask_value"])
    queries, cache = call.queries, call.cache
    scale, q_scale = _checks.static_number("sm_scale", options["sm_scale"]), options["q_scale"]
    page_scales = _keywords.page_scales(options, cache)
    divides = options.get("scale_rule") == "reference"
    if divides:
        page_scales = {name: _inverse(name, page_scale) for name, page_scale in page_scales.items()}
    if q_scale is not None:
        q_scale = _checks.static_positive("q_scale", q_scale)
        queries /= q_scale
        if not divides:
            scale *= q_scale
            queries = _reference.rounded(queries, cache.dtype)
    if sinks is not None:
        sinks = _checks.as_float32("attention_sink", sinks)
        _checks.Dims(N=queries.shape[1]).match("attention_sink", sinks, "N", ("float32",))
    return dataclasses.replace(call, queries=queries), {
        "scale": scale,
        "soft_cap": _keywords.soft_cap("soft_cap", options["soft_cap"]),
        "sliding_window": options["sliding_window"],
        "causal": _checks.static_bool("use_causal_mask", options["use_causal_mask"]),
        "sinks": sinks,
        "implementation": options["implementation"],
        "batch_invariant": options["batch_invariant"],
        **page_scales,
    }


def _inverse(name: str, scale: ArrayLike | None) -> ArrayLike | None:
    if scale is None:
        return None
    array = _checks.as_float32(name, scale)
    _checks.check_scales(name, scale, array)
    return 1.0 / array


@functools.partial(_modes.compiled, static_argnums=(4, 5, 6))
def slots_of(
    kv_lens: Array, tables: Array, starts: Array, counts: Array, num_tokens: int, num_pages: int, page_size: int
) -> Array:
    """The slot of each new token, `[T]`; −1 for those of no sequence, without a page, or in front of position 0."""
    rows = jnp.arange(num_tokens, dtype=jnp.int32)
    passed = (rows[:, None] >= (starts + counts)[None, :]).sum(axis=1, dtype=jnp.int32)
    sequence = jnp.minimum(passed, tables.shape[0] - 1)
    row = rows - starts[sequence]
    position = kv_lens[sequence] - counts[sequence] + row
    live = (passed < tables.shape[0]) & (row >= 0) & (position >= 0)
    position = jnp.where(live, position, 0)
    page = tables.at[sequence, position // page_size].get(mode="fill", fill_value=-1)
    live &= (page >= 0) & (page < num_pages)
    return jnp.where(live, jnp.where(live, page, 0) * page_size + position % page_size, -1)


@functools.partial(_modes.compiled, static_argnums=(4, 5, 6))
def in_chunks(
    kv_lens: Array, tables: Array, starts: Array, counts: Array, chunk: int, page_size: int, num_rows: int
) -> tuple[Array, Array, Array, Array]:
    """Sequences cut where chunks of positions end: lengths, tables, first rows and row counts of the parts.

    Inside a chunk attention is as always. So the rows of each chunk become a sequence of their own, whose table begins
    at the first page of the chunk. Rows in front of position 0 become one without keys. A sequence of n rows has at
    most ceil((n − 1) / chunk) + 1 parts, which bounds their number, B + B + T // chunk.
    """
    num_seqs, per_chunk = tables.shape[0], chunk // page_size
    position = kv_lens - counts  # of the first row
    first, last = (jnp.where(p < 0, -1, p // chunk) for p in (position, kv_lens - 1))
    parts = jnp.where(counts > 0, last - first + 1, 0)
    ends = jnp.cumsum(parts)

    numbers = jnp.arange(2 * num_seqs + num_rows // chunk, dtype=jnp.int32)
    passed = (numbers[:, None] >= ends[None, :]).sum(axis=1, dtype=jnp.int32)
    sequence = jnp.minimum(passed, num_seqs - 1)
    position, kv_lens, starts, counts = (x[sequence] for x in (position, kv_lens, starts, counts))
    which = first[sequence] + numbers - (ends - parts)[sequence]
    begin = which * chunk
    first_row = jnp.where(which == first[sequence], 0, begin - position)
    end_row = jnp.where(which == last[sequence], counts, begin + chunk - position)
    live = passed < num_seqs
    pages = jnp.maximum(which, 0)[:, None] * per_chunk + jnp.arange(per_chunk, dtype=jnp.int32)
    return (
        jnp.where(live & (which >= 0), jnp.minimum(chunk, kv_lens - begin), 0),
        tables.at[sequence[:, None], pages].get(mode="fill", fill_value=-1),
        jnp.where(live, starts + first_row, 0),
        jnp.where(live, end_row - first_row, 0),
    )


def _write(call: Call, slots: Array) -> Array:
    """The cache with the tokens in their slots. Numbers past H and heads past K become 0, as in the other kernels.

    It has its own shape: XLA would copy it if it was reshaped in front of a call that updates it in place.
    """
    keys, values = call.keys, call.values
    if str(keys.dtype) in _checks.QUANTIZED_DTYPES:
        # The write rounds floats to 8 bits, and bfloat16 has every number of 8 bits.
        keys, values = keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16)
    kept, width = call.pool_shape[2] // 2, call.pool_shape[3]
    keys, values = (_widened(x, kept, width) for x in (keys, values))
    no_scale = _modes.zeros((0, kept), jnp.float32)
    (cache,) = _primitive.write(call.cache, keys, values, slots, no_scale, no_scale, layout="interleaved")
    return cache


def _attend(
    call: Call, pool: Array, where: tuple[Array, ...], scoring: _options.Scoring, options: Mapping[str, Any]
) -> tuple[Array, Array]:
    """`(out [T, N, H], lse [T, N])` of sequences at `where`: lengths, tables, first rows and row counts."""
    kv_lens, tables, starts, counts = where
    _, num_heads, head_dim = call.queries.shape
    dims = _checks.Dims(N=num_heads, K=call.keys.shape[1])
    per_head = _call.operands_per_head(dims, pool, options)
    given_lens, cu_q_lens, distribution = call.given
    _debug.check_attention(
        call.queries, pool, pool, call.tables, given_lens, per_head, scoring, cu_q_lens=cu_q_lens,
        num_seqs=distribution[2], layout="interleaved", tables_name="page_indices", pools=("kv_cache", "kv_cache"),
        foreign_pages=tables is not call.tables,  # those in front of a chunk are not read
    )  # fmt: skip
    operands = (
        _widened(call.queries, num_heads, pool.shape[3]),
        pool,
        pool,
        tables,
        kv_lens,
        starts,
        counts,
        *per_head,
    )
    static = {"scoring": scoring, "decode": False, "layout": "interleaved", "token_scales": (False, False)}
    out, lse = _primitive.attention(*operands, **static, **_options.engine_choice(options))
    return out[..., :head_dim], lse


def _widened(x: Array, heads: int, width: int) -> Array:
    """`[T, heads, width]`: those of x with zeros behind their numbers, and heads of zeros behind them."""
    return jnp.pad(x, ((0, 0), (0, heads - x.shape[1]), (0, width - x.shape[2])))
