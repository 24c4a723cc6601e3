"""The way from a user's arguments to the primitive, for pools of any layout: arrays checked and brought into shape."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_paged_attn import _checks, _debug, _modes, _options, _primitive, _reference
from jax_paged_attn._donation import warn_of_eager_update
from jax_paged_attn._layouts import LAYOUTS

Attend = Callable[..., tuple[Array, Array]]

# Scales per token and head of keys and of values, by what errors call them.
NO_TOKEN_SCALES: Mapping[str, None] = MappingProxyType({"k_token_scales": None, "v_token_scales": None})


def paged(
    attend: Attend,
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    options: Mapping[str, Any],
    layout: str = "split",
    token_scales: Mapping[str, ArrayLike | None] = NO_TOKEN_SCALES,
) -> Array | tuple[Array, Array]:
    """Decode through `attend`; `options` are those of `paged_attention`, each of them there."""
    dims = _checks.Dims()
    (q, k_pages, v_pages), layout = _query_and_pages(dims, "B N H", q, k_pages, v_pages, layout, options)
    block_tables = _int32(dims, "block_tables", block_tables, "B M")
    lengths = _int32(dims, "lengths", lengths, "B")
    arrays, per_head = (q, k_pages, v_pages, block_tables, lengths), operands_per_head(dims, k_pages, options, layout)
    scoring = _options.Scoring.checked(options, dims["H"])
    scales = _of_tokens((k_pages, v_pages), token_scales)
    _debug.check_attention(*arrays, per_head, scoring, layout=layout, token_scales=scales)
    static = {"scoring": scoring, "decode": True, "layout": layout}
    return _attend(attend, static, options, (*arrays, *_one_row_each(dims["B"]), *per_head), scales)


def ragged(
    attend: Attend,
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None,
    options: Mapping[str, Any],
    layout: str = "split",
    tables_name: str = "block_tables",
) -> Array | tuple[Array, Array]:
    """Ragged attention through `attend`; `tables_name` is the name of the tables in errors."""
    dims = _checks.Dims()
    (q, k_pages, v_pages), layout = _query_and_pages(dims, "T N H", q, k_pages, v_pages, layout, options)
    kv_lens = _int32(dims, "kv_lens", kv_lens, "B")
    block_tables = _int32(dims, tables_name, block_tables, "B M")
    cu_q_lens = _int32(dims, "cu_q_lens", cu_q_lens, "B+1")

    if num_seqs is not None:
        num_seqs = _checks.as_int32("num_seqs", num_seqs)
        num_seqs = _int32(dims, "num_seqs", num_seqs, "1" if num_seqs.ndim else "")
    arrays, per_head = (q, k_pages, v_pages, block_tables, kv_lens), operands_per_head(dims, k_pages, options, layout)
    scoring = _options.Scoring.checked(options, dims["H"])
    rows: Any = {"cu_q_lens": cu_q_lens, "num_seqs": num_seqs, "layout": layout, "tables_name": tables_name}
    _debug.check_attention(*arrays, per_head, scoring, **rows)
    static = {"scoring": scoring, "decode": False, "layout": layout, "cumulative": True}
    return _attend(attend, static, options, (*arrays, cu_q_lens, _at_most_one(num_seqs), *per_head))


def write(
    name: str,
    pools: Sequence[ArrayLike],
    k_and_v: tuple[ArrayLike, ArrayLike | None],
    slot_mapping: ArrayLike,
    scales: tuple[ArrayLike | None, ArrayLike | None],
    layout: str = "split",
    token_scales: Mapping[str, ArrayLike] = MappingProxyType({}),
) -> tuple[Array, ...]:
    """The pools of a layout, one or two, after a write; behind them arrays of scales per token, if there are any.

    Args:
      name: of the public function, for a warning.
      k_and_v: new keys and values; no values where the layout has them in the keys.
      scales: `k_scale` and `v_scale`; with arrays of scales per token, `[T, K]` each.
      token_scales: arrays of scales per token and head, as many as there are pools, by what errors call them.
    """
    dims, shapes = _checks.Dims(), (LAYOUTS[layout].shape, LAYOUTS[layout].value_shape)
    names = LAYOUTS[layout].pools[: len(pools)]
    pools = [_checks.as_array(pool_name, pool) for pool_name, pool in zip(names, pools, strict=True)]
    for which, (pool_name, pool) in enumerate(zip(names, pools, strict=True)):
        dims.match(pool_name, pool, shapes[which], (str(pools[0].dtype),) if which else _checks.PAGE_DTYPES)
    k, v = _new_tokens(dims, *k_and_v, layout)
    slot_mapping = _int32(dims, "slot_mapping", slot_mapping, "T")
    arrays = {}
    for scales_name, array in token_scales.items():
        arrays[scales_name] = _checks.as_array(scales_name, array)
        dims.match(scales_name, arrays[scales_name], shapes[0].removesuffix(" H"), _checks.COMPUTE_DTYPES)
    named = zip(("k_scale", "v_scale"), scales, strict=True)
    if arrays:
        stored = next(iter(arrays.values())).dtype
        k_scale, v_scale = (_scale_of_tokens(dims, scale_name, scale, stored) for scale_name, scale in named)
    elif LAYOUTS[layout].values_in_keys:
        refuse_v_scale(scales[1])
        k_scale, v_scale = page_scale(dims, "k_scale", scales[0], pools[0]), _modes.zeros((0, dims["K"]), jnp.float32)
    else:
        k_scale, v_scale = (page_scale(dims, scale_name, scale, pools[0]) for scale_name, scale in named)
    warn_of_eager_update(name, pools[0], stacklevel=5)
    _debug.check_write(LAYOUTS[layout].num_slots(pools[0]), k, v, slot_mapping, k_scale, v_scale)
    pools = _primitive.write(*pools, k, v, slot_mapping, k_scale, v_scale, layout=layout)
    if not arrays:
        return pools
    none = _modes.zeros((0, dims["K"]), jnp.float32)
    return (*pools, *_primitive.write(*arrays.values(), k_scale, v_scale, slot_mapping, none, none, layout=layout))


def _new_tokens(dims: _checks.Dims, k: ArrayLike, v: ArrayLike | None, layout: str) -> tuple[Array, Array]:
    """`[T, K, H]` and `[T, K, Hv]` as the primitive takes them: Hv is 0 where the values are in the keys."""
    k = _checks.as_array("k", k)
    dims.match("k", k, "T K H", _checks.COMPUTE_DTYPES)
    if LAYOUTS[layout].values_in_keys:
        if v is not None:
            raise ValueError("v: expected None where v_pages is None, since keys hold the values, got an array")
        return k, _modes.zeros((*k.shape[:2], 0), k.dtype)
    if v is None:
        raise ValueError("v: expected an array with v_pages, got None")
    v = _checks.as_array("v", v)
    dims.match("v", v, "T K H" if LAYOUTS[layout].interleaved else "T K Hv", (str(k.dtype),))
    return k, v


@functools.partial(_modes.compiled, static_argnums=0)
def _one_row_each(num_seqs: int) -> tuple[Array, Array]:
    """The first rows and the row counts of sequences with one row each."""
    return jnp.arange(num_seqs, dtype=jnp.int32), jnp.ones(num_seqs, jnp.int32)


def _at_most_one(num_seqs: Array | None) -> Array:
    """`num_seqs` as the primitive takes it: `[1]`, or `[0]` where all sequences live."""
    if num_seqs is None:
        return _modes.zeros((0,), jnp.int32)
    return num_seqs if num_seqs.ndim else _as_row(num_seqs)


@_modes.compiled
def _as_row(scalar: Array) -> Array:
    return scalar.reshape(1)


def _query_and_pages(
    dims: _checks.Dims,
    q_letters: str,
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    layout: str,
    options: Mapping[str, Any],
) -> tuple[tuple[Array, Array, Array], str]:
    """The first operands, and the layout: "values_in_keys" where the user gives no pool of values."""
    k_name, v_name = LAYOUTS[layout].pools
    q, k_pages = _checks.as_array("q", q), _checks.as_array(k_name, k_pages)
    dims.match("q", q, q_letters, _checks.COMPUTE_DTYPES)
    dims.match(k_name, k_pages, LAYOUTS[layout].shape, (str(q.dtype), *_checks.QUANTIZED_DTYPES))
    value_dim = options.get("value_dim")
    if v_pages is None:
        v_pages, layout = values_in(k_pages, value_dim), "values_in_keys"
    else:
        if value_dim is not None:
            raise ValueError(f"value_dim: expected None with {v_name}, whose last axis it is, got {value_dim}")
        v_pages = _checks.as_array(v_name, v_pages)
        dims.match(v_name, v_pages, LAYOUTS[layout].value_shape, (str(k_pages.dtype),))
    head_dims = (dims["H"], v_pages.shape[-1])
    _primitive.check_sizes(dims["N"], dims["K"], head_dims, dims["S"], (k_name, v_name))
    return (q, k_pages, v_pages), layout


def values_in(k_pages: Array, value_dim: int | None) -> Array:
    """What stands in the place of the pool of values where these are the first numbers of the keys: an empty one."""
    head_dim = k_pages.shape[-1]
    if value_dim is None:
        raise ValueError("value_dim: expected the head dim of values where v_pages is None, got None")
    value_dim = _checks.static_count("value_dim", value_dim)
    if value_dim > head_dim:
        raise ValueError(f"value_dim: expected at most the {head_dim} numbers of a key, got {value_dim}")
    return _modes.zeros((0, *k_pages.shape[1:-1], value_dim), k_pages.dtype)


def _int32(dims: _checks.Dims, name: str, x: ArrayLike, letters: str) -> Array:
    array = _checks.as_int32(name, x)
    dims.match(name, array, letters, ("int32",))
    return array


def operands_per_head(
    dims: _checks.Dims, k_pages: Array, options: Mapping[str, Any], layout: str = "split"
) -> tuple[Array, Array, Array]:
    """`sinks`, `k_scale`, `v_scale` as the primitive takes them: `[1, heads]`, or `[0, heads]` where absent.

    The scale of keys is that of values in them.
    """
    if options["sinks"] is None:
        sinks = _modes.zeros((0, dims["N"]), jnp.float32)
    else:
        sinks = _checks.as_float32("sinks", options["sinks"])
        dims.match("sinks", sinks, "N", ("float32",))
        sinks = sinks[None]
    if LAYOUTS[layout].values_in_keys:
        refuse_v_scale(options["v_scale"])
        scale = page_scale(dims, "k_scale", options["k_scale"], k_pages)
        return sinks, scale, scale
    k_scale, v_scale = (page_scale(dims, name, options[name], k_pages) for name in ("k_scale", "v_scale"))
    return sinks, k_scale, v_scale


def refuse_v_scale(v_scale: ArrayLike | None) -> None:
    """Raises ValueError if there is a scale of values that are in the keys."""
    if v_scale is not None:
        raise ValueError("v_scale: expected None where v_pages is None, since k_scale holds for values too, got one")


def page_scale(dims: _checks.Dims, name: str, scale: ArrayLike | None, pages: Array) -> Array:
    """A page scale as the primitives take it: `[1, K]` float32, or `[0, K]` where absent."""
    if scale is None:
        if pages.dtype == jnp.int8:
            raise ValueError(f"{name}: required for int8 pages, got None")
        return _modes.zeros((0, dims["K"]), jnp.float32)
    array = _checks.as_float32(name, scale)
    dims.match(name, array, "K" if array.ndim else "", ("float32",))
    _checks.check_scales(name, scale, array)
    return jnp.broadcast_to(array, (dims["K"],))[None]


def _scale_of_tokens(dims: _checks.Dims, name: str, scale: ArrayLike | None, stored: Any) -> Array:
    """Scales of new tokens `[T, K]`, rounded to normal numbers of the dtype in which they are stored."""
    if scale is None:
        raise ValueError(f"{name}: expected the scales of new tokens, got None")
    array = _checks.as_float32(name, scale)
    dims.match(name, array, "T K", ("float32",))
    _checks.check_scales(name, scale, array)
    limits = jnp.finfo(stored)
    return _reference.rounded(jnp.clip(array, float(limits.tiny), float(limits.max)), stored)


def _of_tokens(pools: tuple[Array, Array], token_scales: Mapping[str, ArrayLike | None]) -> dict[str, Array | None]:
    """Scales per token and head as the primitive takes them: a pool's shape without its last axis, float32."""
    checked: dict[str, Array | None] = {}
    for pool, (name, scales) in zip(pools, token_scales.items(), strict=True):
        array = None if scales is None else _checks.as_float32(name, scales)
        if array is not None:
            _checks.Dims().match(name, array, "a b c", _checks.COMPUTE_DTYPES)
            if array.shape != pool.shape[:-1]:
                raise ValueError(
                    f"{name}: expected the shape of the pages without H, {pool.shape[:-1]}, got {array.shape}"
                )
            array = array.astype(jnp.float32)
        checked[name] = array
    return checked


def _attend(
    attend: Attend,
    static: Mapping[str, Any],
    options: Mapping[str, Any],
    operands: tuple[Array, ...],
    token_scales: Mapping[str, Array | None] = NO_TOKEN_SCALES,
) -> Array | tuple[Array, Array]:
    return_lse = _checks.static_bool("return_lse", options["return_lse"])
    present = tuple(scales is not None for scales in token_scales.values())
    operands += tuple(scales for scales in token_scales.values() if scales is not None)
    out, lse = attend(*operands, **static, token_scales=present, **_options.engine_choice(options))
    return (out, lse) if return_lse else out
