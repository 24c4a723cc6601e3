"""Context parallelism: the keys of long sequences spread over devices, merged through their log-sum-exps."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_paged_attn import _checks, _debug, _modes, _options
from jax_paged_attn._attention import merge_attention_states, paged_attention, ragged_paged_attention
from jax_paged_attn._call import operands_per_head, values_in

# A finite sink that adds nothing to any sum of exponentials.
_NO_SINK = float(jnp.finfo(jnp.float32).min)


@_options.keywords(_options.RaggedOptions)
def context_parallel_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    *,
    axis_name: str | tuple[str, ...],
    cu_q_lens: ArrayLike | None = None,
    num_seqs: ArrayLike | None = None,
    return_lse: bool = False,
    **options: Unpack[_options.RaggedOptions],
) -> Array | tuple[Array, Array]:
    """Attention over pages that are spread over the devices of a mesh axis; to be called inside `jax.shard_map`.

    Each device has a pool of its own, and block tables of all sequences with −1 for the pages of other devices. No two
    devices have the same page. Queries, lengths and results are the same on all devices. Each attends to its own pages,
    and the partial results (B·N·(Hv + 1) float32 numbers per device) meet in one all-gather and are merged as in
    Flash-Decoding (Dao et al. 2023). Letters as in `paged_attention`; P counts the pages of one device.

    Decode without a window reads the device's own pages only. Other calls walk over the places of missing pages too.

    Args:
      q: `[B, N, H]`, the newest token of each sequence; with `cu_q_lens` `[T, N, H]`.
      k_pages: `[P, S, K, H]`, this device's.
      v_pages: `[P, S, K, Hv]`, this device's; None as in `paged_attention`.
      block_tables: `[B, M]` int32: page of token t of sequence b is `block_tables[b, t // S]` in this device's pool; −1
        (or anything outside [0, P)) where another device has it.
      lengths: `[B]` int32, tokens of the whole sequences, on all devices together.
      axis_name: the mesh axis, or axes, that the pages are spread over.
      cu_q_lens: `[B + 1]` int32 as in `ragged_paged_attention`; None is decode.
      num_seqs: as in `ragged_paged_attention`, for calls with `cu_q_lens`.
      return_lse: return the log-sum-exp of the scores too.
      options: the other keywords are those of `ragged_paged_attention`, `causal` for calls with `cu_q_lens`. Sinks are
        the same on all devices and count once.

    Returns:
      `[B, N, Hv]` (`[T, N, Hv]`) in q's dtype; with `return_lse` a tuple of that and lse `[B, N]` (`[T, N]`) float32.

    Raises:
      ValueError: `axis_name` is no axis of an enclosing `shard_map`, `num_seqs` or `causal=False` without `cu_q_lens`,
        or as `paged_attention`.
      TypeError: as `paged_attention`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> attend = jax.shard_map(
      ...     lambda q, pages, tables: jpa.context_parallel_attention(
      ...         q, pages, pages, tables[0], jnp.array([5], jnp.int32), axis_name="pages"),
      ...     mesh=jax.make_mesh((1,), ("pages",), axis_types=(AxisType.Auto,)),
      ...     in_specs=(P(), P("pages"), P("pages")), out_specs=P())
      >>> jax.jit(attend)(jnp.ones((1, 2, 8)), jnp.ones((3, 4, 1, 8)), jnp.array([[[2, 0]]], jnp.int32)).shape
      (1, 2, 8)
    """
    return_lse = _checks.static_bool("return_lse", return_lse)
    out, lse = _own_part((q, k_pages, v_pages), block_tables, lengths, axis_name, cu_q_lens, num_seqs, {**options})
    # One array of both needs one collective instead of two.
    state = jnp.concatenate([out.astype(jnp.float32), lse[..., None]], axis=-1)
    # Where `shard_map` keeps no account of what varies (check_vma=False), it wants the transpose of the plain gather.
    accounted = bool(jax.typeof(state).manual_axis_type.varying)
    states = jax.lax.all_gather(state, axis_name, to="invarying" if accounted else "varying")
    merged, merged_lse = merge_attention_states(states[..., :-1], states[..., -1])
    merged = merged.astype(out.dtype)
    return (merged, merged_lse) if return_lse else merged


def _own_part(
    q_and_pages: tuple[ArrayLike, ArrayLike, ArrayLike | None],
    block_tables: ArrayLike,
    lengths: ArrayLike,
    axis_name: str | tuple[str, ...],
    cu_q_lens: ArrayLike | None,
    num_seqs: ArrayLike | None,
    options: dict[str, Any],
) -> tuple[Array, Array]:
    """`(out, lse)` of attention to this device's pages."""
    part = _part(axis_name)
    if options["sinks"] is not None:
        options["sinks"] = _sinks_of_first(part, _checks.as_array("sinks", options["sinks"]))
    tables, own_lengths = block_tables, lengths
    if cu_q_lens is None:
        if num_seqs is not None:
            raise ValueError(f"num_seqs: expected None without cu_q_lens, got {num_seqs}")
        if options["causal"] is not True:
            raise ValueError(f"causal: expected True without cu_q_lens, got {options['causal']}")
        if options["sliding_window"] is None:
            tables, own_lengths = _own_pages(q_and_pages[1], block_tables, lengths)
    with _debug.paused():  # it takes a page of another device for an error
        if cu_q_lens is None:
            decode = {name: value for name, value in options.items() if name != "causal"}
            out, lse = paged_attention(*q_and_pages, tables, own_lengths, return_lse=True, **decode)
        else:
            rows = (own_lengths, tables, cu_q_lens, num_seqs)
            out, lse = ragged_paged_attention(*q_and_pages, *rows, return_lse=True, **options)
    if _debug.active():
        _check_values(*q_and_pages, block_tables, lengths, cu_q_lens, num_seqs, options)
    return out, lse


def _part(axis_name: str | tuple[str, ...]) -> Array:
    """The index of this device along the axis."""
    try:
        return jax.lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(f"axis_name: expected an axis of the enclosing shard_map, got {axis_name!r}") from error


def _check_values(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    cu_q_lens: ArrayLike | None,
    num_seqs: ArrayLike | None,
    options: dict[str, Any],
) -> None:
    """The checks of `debug`, with tables in which pages of other devices are missing."""
    q, pages, block_tables, lengths = map(jnp.asarray, (q, k_pages, block_tables, lengths))
    layout = "values_in_keys" if v_pages is None else "split"
    values = values_in(pages, options["value_dim"]) if v_pages is None else jnp.asarray(v_pages)
    dims = _checks.Dims(N=q.shape[-2])
    dims.match("k_pages", pages, "P S K H", (str(pages.dtype),))
    per_head = operands_per_head(dims, pages, options, layout)
    scoring = _options.Scoring.checked(options, q.shape[-1])
    rows: Any = {} if cu_q_lens is None else {"cu_q_lens": jnp.asarray(cu_q_lens), "num_seqs": num_seqs}
    operands = (q, pages, values, block_tables, lengths)
    _debug.check_attention(*operands, per_head, scoring, **rows, layout=layout, foreign_pages=True)


def _own_pages(k_pages: ArrayLike, block_tables: ArrayLike, lengths: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
    """Tables with the pages in use that this device has moved to the front, and how many tokens these have.

    Their order stays: the last page, the only one that may be filled in part, comes last where a device has it.
    """
    pages, tables = _checks.as_array("k_pages", k_pages), _checks.as_int32("block_tables", block_tables)
    lens = _checks.as_int32("lengths", lengths)
    dims = _checks.Dims()
    dims.match("k_pages", pages, "P S K H", (str(pages.dtype),))
    dims.match("block_tables", tables, "B M", ("int32",))
    dims.match("lengths", lens, "B", ("int32",))
    return _own_first(tables, lens, dims["P"], dims["S"])


@functools.partial(_modes.compiled, static_argnums=(2, 3))
def _own_first(tables: Array, lengths: Array, num_pages: int, page_size: int) -> tuple[Array, Array]:
    places = jnp.arange(tables.shape[1], dtype=jnp.int32)
    tokens = jnp.clip(lengths[:, None] - places[None, :] * page_size, 0, page_size)
    missing = (tables < 0) | (tables >= num_pages) | (tokens == 0)
    _, own_first = jax.lax.sort((missing.astype(jnp.int32), tables), dimension=1, is_stable=True, num_keys=1)
    return own_first, jnp.where(missing, 0, tokens).sum(axis=1, dtype=jnp.int32)


@_modes.compiled
def _sinks_of_first(part: Array, sinks: Array) -> Array:
    """The sinks on the first device, what stands for none on the others."""
    return jnp.where(part == 0, sinks, jnp.asarray(_NO_SINK, sinks.dtype))
