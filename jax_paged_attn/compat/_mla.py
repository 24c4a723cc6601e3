"""The call of tpu-inference and tokamax for multi-head latent attention, which writes the new latents itself."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_paged_attn import _call, _checks, _debug, _modes, _options, _primitive, _reference
from jax_paged_attn._donation import warn_of_eager_update
from jax_paged_attn.compat import _keywords, _rpa

_COUNTS = ("chunk_prefill_size", "vmem_limit_bytes", "decode_batch_size", "mixed_q_split")
_CACHE_DTYPES = ("float8_e4m3fn", "float8_e5m2")  # beside the dtype of the queries


# Theirs, and those of the keywords that are added here.
_DEFAULTS: dict[str, Any] = {
    "sm_scale": 1.0,
    "decode_batch_size": 1,
    "mixed_q_split": 1,
    "s_dtype": jnp.bfloat16,
    "transpose_kv_cache": False,
    "two_step_flash_attention": True,
    "p_same_dtype_as_v": True,
    "debug_mode": False,
    "heads_first": True,
    "return_lse": False,
}


class _MlaOptions(_options.EngineChoice, total=False):
    """The keywords of tpu-inference and tokamax, and those that this package adds."""

    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    mask_value: float | None
    q_scale: float | None
    k_scale: float | None
    v_scale: float | None
    chunk_prefill_size: int | None
    num_kv_pages_per_block: tuple[int, int, int] | int | None
    num_queries_per_block: tuple[int, int, int] | int | None
    vmem_limit_bytes: int | None
    decode_batch_size: int
    mixed_q_split: int
    s_dtype: DTypeLike
    transpose_kv_cache: bool
    two_step_flash_attention: bool
    p_same_dtype_as_v: bool
    debug_mode: bool
    heads_first: bool


@overload
def mla_ragged_paged_attention(
    ql_nope: ArrayLike,
    q_pe: ArrayLike,
    new_kv_c: ArrayLike,
    new_k_pe: ArrayLike,
    cache_kv: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    distribution: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_MlaOptions],
) -> tuple[Array, Array]: ...


@overload
def mla_ragged_paged_attention(
    ql_nope: ArrayLike,
    q_pe: ArrayLike,
    new_kv_c: ArrayLike,
    new_k_pe: ArrayLike,
    cache_kv: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    distribution: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[_MlaOptions],
) -> tuple[Array, Array, Array]: ...


@_options.keywords(_MlaOptions, **_DEFAULTS)
def mla_ragged_paged_attention(
    ql_nope: ArrayLike,
    q_pe: ArrayLike,
    new_kv_c: ArrayLike,
    new_k_pe: ArrayLike,
    cache_kv: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    distribution: ArrayLike,
    **options: Any,
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """The call of tpu-inference's MLA kernels and of tokamax's: writes new latents, then attends over the cache.

    Multi-head latent attention in its absorbed form (DeepSeek-AI 2024): one key per token serves all N heads, and its
    first L numbers, the latent, are the value. R numbers are rotated, and pack is 32 / bits of the cache's dtype. The
    cache is read where it lies, and updated in place where the jitted function around the call donates it. Token r of
    the n that a sequence has in this call goes to position kv_len − n + r, unless that is negative or its page is none
    of the pool.

    Args:
      ql_nope: queries after absorption, bfloat16, float16 or float32: `[N, T, L]`, as the second version of the kernel
        has it; `[T, N, L]` with `heads_first=False`, as the first version and `tokamax` do. With a cache of 8 bits they
        may have its dtype.
      q_pe: `[T, N, R]`, the rotated part, in the dtype of `ql_nope`.
      new_kv_c: `[T, L]`, latents of the new tokens in the cache's dtype: for 8 bits they are quantized before the call.
      new_k_pe: `[T, R]`, the rotated part of their keys, likewise.
      cache_kv: `[P, S / pack, pack, L' + R']`, L' and R' being L and R rounded up to 128. Its dtype is that of the
        queries, or float8_e4m3fn or float8_e5m2. Numbers past L and R must be finite, such as the zeros that this call
        writes there.
      kv_lens: `[B]` int32, tokens in the cache, those of this call included.
      page_indices: `[B·M]` int32, M pages per sequence, one sequence after the other.
      cu_q_lens: `[B + 1]` int32, the first row of each sequence, then the end.
      distribution: `[3]` int32; the last is how many of the B sequences are live, the others have no effect.
      sm_scale: multiplies q · k; 1 by default. A model's own, since it follows from another head dim than L + R.
      sliding_window, soft_cap, mask_value: as in `ragged_paged_attention`.
      q_scale, k_scale, v_scale: positive static numbers, None for 1. Scores are multiplied by the first two, and the
        output by the last. Queries, latents and keys are taken as they are given.
      heads_first: whether heads are the first axis of `ql_nope` and of the output.
      return_lse: return the log-sum-exp too, which those kernels have not.
      transpose_kv_cache: False. With True there a cache is `[P, L' + R', S]`, which no engine here reads.
      chunk_prefill_size, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes: for TPUs, ignored here.
      decode_batch_size, mixed_q_split, two_step_flash_attention, debug_mode: likewise.
      s_dtype, p_same_dtype_as_v: likewise; scores are float32 here.
      implementation, batch_invariant: as in `jax_paged_attn.paged_attention`.

    Returns:
      `(out, cache_kv)`: `[N, T, L]`, or `[T, N, L]` with `heads_first=False`, in the dtype of `ql_nope`, and the cache
      after the write. With `return_lse` also lse `[T, N]` float32. Rows that no sequence has are 0 here and undefined
      there.

    Raises:
      ValueError, TypeError: as `jax_paged_attn.ragged_paged_attention`, and for a cache of another shape or dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_paged_attn.compat import mla_ragged_paged_attention
      >>> step = jax.jit(mla_ragged_paged_attention, donate_argnames="cache_kv")
      >>> cache_kv = jnp.zeros((3, 2, 2, 640), jnp.bfloat16)  # pages of 4 tokens; 512 + 64 numbers, padded
      >>> queries = jnp.ones((8, 2, 512), jnp.bfloat16), jnp.ones((2, 8, 64), jnp.bfloat16)  # 8 heads, 2 tokens
      >>> new = jnp.ones((2, 512), jnp.bfloat16), jnp.ones((2, 64), jnp.bfloat16)
      >>> where = (jnp.array([2]), jnp.array([1]), jnp.array([0, 2]), jnp.array([0, 0, 1]))
      >>> out, cache_kv = step(*queries, *new, cache_kv, *where)
      >>> out.shape, cache_kv[:, :, :, 0].reshape(3, 4).astype(int).tolist()
      ((8, 2, 512), [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    """
    tokens = (ql_nope, q_pe, new_kv_c, new_k_pe, cache_kv)
    return _run(tokens, (kv_lens, page_indices, cu_q_lens, distribution), options)


def _run(
    tokens: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike, ArrayLike],
    sequences: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike],
    options: Mapping[str, Any],
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """Writes and attends: `(out, cache)`, or with `return_lse` `(out, cache, lse)`, from a user's arguments.

    Args:
      tokens: queries, new latents and keys, and the cache.
      sequences: `kv_lens`, `page_indices`, `cu_q_lens` and `distribution`.
      options: all keywords.
    """
    _check_options(options)
    heads_first = _checks.static_bool("heads_first", options["heads_first"])
    call = _Call.checked(*tokens, sequences, heads_first)
    return_lse = _checks.static_bool("return_lse", options["return_lse"])
    own = _own_options(options)
    scoring = _options.Scoring.checked(own, call.queries.shape[2])
    warn_of_eager_update("mla_ragged_paged_attention", call.cache, stacklevel=6)
    cache = _write(call)
    out, lse = _attend(call, cache.reshape(call.pool_shape), scoring, own)
    if str(out.dtype) != call.out_dtype:
        out = _reference.quantize(out.astype(jnp.float32), jnp.dtype(call.out_dtype))
    out = out.swapaxes(0, 1) if heads_first else out
    return (out, cache, lse) if return_lse else (out, cache)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The checked arrays of a call.

    Attributes:
      queries: `[T, N, L' + R]`.
      keys: `[T, 1, L' + R']`, the new ones, with zeros as padding.
      latent_dim: L.
      cache: as it was given.
      pool_shape: that of a pool of one key/value head of the same bytes, `[P, S, 1, L' + R']`.
      where: lengths, tables, first rows and row counts of the sequences, see `_rpa.Call`.
      given: lengths, first rows and distribution as they were given.
      out_dtype: of the output.
    """

    queries: Array
    keys: Array
    latent_dim: int
    cache: Array
    pool_shape: tuple[int, int, int, int]
    where: tuple[Array, Array, Array, Array]
    given: tuple[Array, Array, Array]
    out_dtype: str

    @classmethod
    def checked(
        cls,
        ql_nope: ArrayLike,
        q_pe: ArrayLike,
        new_kv_c: ArrayLike,
        new_k_pe: ArrayLike,
        cache_kv: ArrayLike,
        sequences: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike],
        heads_first: bool,
    ) -> "_Call":
        """From a user's arguments."""
        dims = _checks.Dims()
        named = {"ql_nope": ql_nope, "q_pe": q_pe, "new_kv_c": new_kv_c, "new_k_pe": new_k_pe, "cache_kv": cache_kv}
        q, q_pe, kv_c, k_pe, cache = (_checks.as_array(name, x) for name, x in named.items())
        stored = str(cache.dtype)
        dims.match(
            "ql_nope",
            q,
            "N T L" if heads_first else "T N L",
            (*_checks.COMPUTE_DTYPES, *[stored] * (stored in _CACHE_DTYPES)),
        )
        dims.match("q_pe", q_pe, "T N R", (str(q.dtype),))
        if stored not in (str(q.dtype), *_CACHE_DTYPES):
            raise ValueError(f"cache_kv: expected dtype {' or '.join((str(q.dtype), *_CACHE_DTYPES))}, got {stored}")
        dims.match("new_kv_c", kv_c, "T L", (stored,))
        dims.match("new_k_pe", k_pe, "T R", (stored,))
        for name in "NLR":
            if dims[name] < 1:
                raise ValueError(f"ql_nope, q_pe: expected {name} of at least 1, got {dims[name]}")
        shape = _shape_of_pool(cache, dims["L"], dims["R"])
        q = q.swapaxes(0, 1) if heads_first else q
        out_dtype = str(q.dtype)
        if out_dtype in _CACHE_DTYPES:  # bfloat16 has every number of theirs
            q, q_pe = q.astype(jnp.bfloat16), q_pe.astype(jnp.bfloat16)
        if stored in _CACHE_DTYPES:  # the write rounds floats to 8 bits
            kv_c, k_pe = kv_c.astype(jnp.bfloat16), k_pe.astype(jnp.bfloat16)
        where, given = _rpa.sequences(dims, sequences, shape[1])
        keys = _joined(kv_c, k_pe, shape[3])[:, None]
        return cls(_joined(q, q_pe), keys, dims["L"], cache, shape, where, given, out_dtype)


def _shape_of_pool(cache: Array, latent_dim: int, rotary_dim: int) -> tuple[int, int, int, int]:
    """`[P, S, 1, L' + R']`, the shape of a pool with the bytes of the cache."""
    pack = 4 // cache.dtype.itemsize
    width = _rpa.aligned(latent_dim, _rpa.LANES) + _rpa.aligned(rotary_dim, _rpa.LANES)
    if cache.ndim != 4 or cache.shape[2] % pack or cache.shape[3] != width or 0 in cache.shape[1:]:
        raise ValueError(
            f"cache_kv: expected shape [P, S / {pack}, {pack}, {width}] for {latent_dim} and {rotary_dim} numbers, "
            f"got shape {cache.shape}"
        )
    return cache.shape[0], cache.shape[1] * cache.shape[2], 1, width


@functools.partial(_modes.compiled, static_argnums=2)
def _joined(latents: Array, rotated: Array, width: int | None = None) -> Array:
    """Numbers as they stand in the cache: latents, zeros up to L', and rotated parts, then zeros up to `width`."""
    latents_width = _rpa.aligned(latents.shape[-1], _rpa.LANES)
    used = latents_width + rotated.shape[-1]
    none = [(0, 0)] * (latents.ndim - 1)
    latents = jnp.pad(latents, [*none, (0, latents_width - latents.shape[-1])])
    rotated = jnp.pad(rotated, [*none, (0, 0 if width is None else width - used)])
    return jnp.concatenate([latents, rotated], axis=-1)


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError for what is not there, and for what the other kernels would refuse."""
    _keywords.check_counts(options, *_COUNTS)
    for name in ("num_kv_pages_per_block", "num_queries_per_block"):
        given = options[name]
        for count in given if isinstance(given, tuple) else () if given is None else (given,):
            _checks.static_count(name, count)
    if _checks.static_bool("transpose_kv_cache", options["transpose_kv_cache"]):
        raise ValueError("transpose_kv_cache: expected False, since engines read the numbers of a token side by side")
    _keywords.check_mask_value(options["mask_value"])


def _own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `jax_paged_attn.ragged_paged_attention`.

    Latents have one scale there, that of keys, which are values too. So it is theirs of values, and scores are
    multiplied by the quotient of the two.
    """
    scales = {
        name: 1.0 if options[name] is None else _checks.static_positive(name, options[name])
        for name in ("q_scale", "k_scale", "v_scale")
    }
    scale = _checks.static_number("sm_scale", options["sm_scale"])
    return {
        "scale": scale * scales["q_scale"] * scales["k_scale"] / scales["v_scale"],
        "soft_cap": _keywords.soft_cap("soft_cap", options["soft_cap"]),
        "sliding_window": options["sliding_window"],
        "causal": True,
        "sinks": None,
        "implementation": options["implementation"],
        "batch_invariant": options["batch_invariant"],
        "k_scale": None if scales["v_scale"] == 1.0 else scales["v_scale"],
        "v_scale": None,
    }


def _write(call: _Call) -> Array:
    """The cache with the new keys in their slots.

    It has its own shape: XLA would copy it if it was reshaped in front of a call that updates it in place.
    """
    pages, page_size = call.pool_shape[:2]
    slots = _rpa.slots_of(*call.where, call.keys.shape[0], pages, page_size)
    no_values = _modes.zeros((*call.keys.shape[:2], 0), call.keys.dtype)
    no_scale = _modes.zeros((0, 1), jnp.float32)
    (cache,) = _primitive.write(call.cache, call.keys, no_values, slots, no_scale, no_scale, layout="values_in_keys")
    return cache


def _attend(call: _Call, pool: Array, scoring: _options.Scoring, options: Mapping[str, Any]) -> tuple[Array, Array]:
    """`(out [T, N, L], lse [T, N])`."""
    kv_lens, tables, starts, counts = call.where
    per_head = _call.operands_per_head(_checks.Dims(N=call.queries.shape[1], K=1), pool, options, "values_in_keys")
    values = _modes.zeros((0, *call.pool_shape[1:3], call.latent_dim), pool.dtype)
    given_lens, cu_q_lens, distribution = call.given
    _debug.check_attention(
        call.queries, pool, values, tables, given_lens, per_head, scoring, cu_q_lens=cu_q_lens,
        num_seqs=distribution[2], layout="values_in_keys", tables_name="page_indices", pools=("cache_kv", "cache_kv"),
    )  # fmt: skip
    static = {"scoring": scoring, "decode": False, "layout": "values_in_keys"}
    operands = (call.queries, pool, values, tables, kv_lens, starts, counts, *per_head)
    return _primitive.attention(*operands, **static, **_options.engine_choice(options))
