"""`debug`: checks of values that shapes cannot tell, on request; without it nothing is added to a program.

Each check has two halves. `_observe_*` is traceable and reduces the operands to small arrays on the device, so that no
pool travels to the host. `_report_*` reads those as NumPy arrays and raises. Concrete operands are reported at once;
traced ones by `jax.debug.callback`, which `vmap` calls for each copy and `shard_map` for each shard.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jax_paged_attn._layouts import LAYOUTS
from jax_paged_attn._options import Scoring


class _State(threading.local):
    """Per thread, as JAX's own contexts are. `JPA_DEBUG` is read when the package is imported."""

    active = os.environ.get("JPA_DEBUG", "0") not in ("", "0")


_state = _State()


@contextlib.contextmanager
def debug() -> Iterator[None]:
    """Checks the values of every call in the context, in `jit` too; also a decorator. `JPA_DEBUG=1` checks always.

    These are checked (docs/debugging.md):

    - `num_seqs`; `cu_q_lens` starts at 0 and does not decrease; lengths fit the table and the query rows;
    - ids of pages in use lie in the pool, and no two sequences have new tokens in one page;
    - slots and copied pages have targets of their own;
    - queries, live keys and values, page scales and sinks are finite.

    A jitted function is traced anew in the context and keeps its program for calls outside, where nothing is added. The
    context holds for the thread that entered it.

    Raises:
      ValueError: from a call on concrete arrays, if a value is wrong; it names the argument, the row and the value.
        From a compiled program it comes as the text of a `jax.errors.JaxRuntimeError`, when results are waited for.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> q, pages = jnp.ones((1, 2, 8)), jnp.ones((3, 4, 1, 8))
      >>> with jpa.debug():
      ...     out = jpa.paged_attention(q, pages, pages, jnp.array([[7]], jnp.int32), jnp.array([2], jnp.int32))
      Traceback (most recent call last):
        ...
      ValueError: block_tables: expected pages in [0, 3), got 7 at [0, 0], the page of tokens 0 to 3 of the 2 in row 0
    """
    with _set(True), set_xla_metadata(jax_paged_attn_debug="1"):  # the metadata are part of the key of `jit`
        yield


def active() -> bool:
    """True if calls are to be checked."""
    return _state.active


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No checks of the calls in the context, whose caller makes them."""
    with _set(False):
        yield


@contextlib.contextmanager
def _set(active: bool) -> Iterator[None]:
    before, _state.active = _state.active, active
    try:
        yield
    finally:
        _state.active = before


# ---- Attention -------------------------------------------------------------------------------------------------------


def check_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    lengths: Array,
    per_head: tuple[Array, Array, Array],
    scoring: Scoring,
    *,
    cu_q_lens: Array | None = None,
    num_seqs: ArrayLike | None = None,
    layout: str = "split",
    tables_name: str = "block_tables",
    pools: tuple[str, str] | None = None,
    foreign_pages: bool = False,
    token_scales: Mapping[str, Array | None] = MappingProxyType({}),
) -> None:
    """Checks one attention call; operands have the shapes that the call demands.

    Args:
      per_head: sinks `[0 or 1, N]`, then the scales of keys and values `[0 or 1, K]`.
      cu_q_lens, num_seqs: None for decode.
      tables_name: what errors call the tables.
      pools: what they call the pools; None is as the layout does.
      foreign_pages: ids outside the pool stand for pages of another device.
      token_scales: those of keys and of values per token and head, by what errors call them.
    """
    if not _state.active:
        return
    decode = cu_q_lens is None
    if cu_q_lens is None:
        cu_q_lens = jnp.arange(q.shape[0] + 1, dtype=jnp.int32)
    if num_seqs is None:
        num_seqs = jnp.int32(lengths.shape[0])
    present = tuple(name for name, scales in token_scales.items() if scales is not None)
    report = functools.partial(
        _report_attention,
        names=(*(pools or LAYOUTS[layout].pools), tables_name, "lengths" if decode else "kv_lens"),
        pool=(k_pages.shape[LAYOUTS[layout].page_axis], LAYOUTS[layout].page_size(k_pages)),
        scoring=scoring,
        decode=decode,
        foreign_pages=foreign_pages,
        token_scales=present,
    )
    operands = (q, k_pages, v_pages, block_tables, lengths, cu_q_lens, jnp.asarray(num_seqs).reshape(()))
    which = tuple(i for i, scales in enumerate(token_scales.values()) if scales is not None)
    arrays = (scales for scales in token_scales.values() if scales is not None)
    static = {"layout": layout, "scoring": scoring, "token_scales": tuple(zip(present, which, strict=True))}
    _check(_observe_attention, report, *operands, *per_head, *arrays, **static)


def _observe_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    lengths: Array,
    cu_q_lens: Array,
    num_seqs: Array,
    sinks: Array,
    k_scale: Array,
    v_scale: Array,
    *scales_of_tokens: Array,
    layout: str,
    scoring: Scoring,
    token_scales: tuple[tuple[str, int], ...],
) -> dict[str, Array]:
    """`token_scales`: of each array of them the name, and whether it is that of keys (0) or of values (1)."""
    block_tables, lengths, cu_q_lens = map(_whole, (block_tables, lengths, cu_q_lens))
    q_counts = cu_q_lens[1:] - cu_q_lens[:-1]
    first_used = scoring.first_key(lengths - q_counts)
    num_pages, page_size = k_pages.shape[LAYOUTS[layout].page_axis], LAYOUTS[layout].page_size(k_pages)
    positions = jnp.arange(block_tables.shape[1] * page_size, dtype=jnp.int32)[None]
    used = (positions >= first_used[:, None]) & (positions < lengths[:, None])
    known = (block_tables >= 0) & (block_tables < num_pages)

    def first_not_finite(pool: Array, which: int) -> Array:
        """The first position of each sequence whose key or value is not finite; −1 if all are."""
        if pool.dtype == jnp.int8 or not positions.size or not num_pages:
            return jnp.full(lengths.shape, -1, jnp.int32)
        if pool.ndim == 3:  # scales
            pool = pool[..., None]
        bad_slots = ~_whole(_finite(LAYOUTS[layout].split(pool, which, k_scale.shape[-1])))  # [P, S]
        bad = bad_slots[jnp.where(known, block_tables, 0)] & known[..., None]  # [B, M, S]
        bad = bad.reshape(used.shape) & used
        return jnp.where(bad.any(axis=1), bad.argmax(axis=1).astype(jnp.int32), jnp.int32(-1))

    nothing = jnp.full(lengths.shape, -1, jnp.int32)
    return {
        "num_seqs": num_seqs,
        "cu_q_lens": cu_q_lens,
        "lengths": lengths,
        "block_tables": block_tables,
        "finite_q": _finite(q),
        "bad_keys": first_not_finite(k_pages[..., : q.shape[-1]] if layout == "values_in_keys" else k_pages, 0),
        "bad_values": first_not_finite(v_pages, 1) if not LAYOUTS[layout].values_in_keys else nothing,
        "sinks": sinks.reshape(-1),
        "k_scale": k_scale,
        "v_scale": v_scale,
        **{
            name: first_not_finite(scales, which)
            for (name, which), scales in zip(token_scales, scales_of_tokens, strict=True)
        },
    }


def _report_attention(
    seen: dict[str, np.ndarray],
    *,
    names: tuple[str, str, str, str],
    pool: tuple[int, int],
    scoring: Scoring,
    decode: bool,
    foreign_pages: bool,
    token_scales: tuple[str, ...],
) -> None:
    """`token_scales`: the names of the arrays of scales per token."""
    k_name, v_name, tables_name, lengths_name = names
    num_pages, page_size = pool
    tables, (num_rows,) = seen["block_tables"], seen["finite_q"].shape
    num_seqs = _report_rows(seen["num_seqs"], seen["cu_q_lens"], num_rows, len(tables))
    lengths = seen["lengths"][:num_seqs].astype(np.int64)
    starts = seen["cu_q_lens"][: num_seqs + 1].astype(np.int64)
    q_counts = np.diff(starts)

    capacity = tables.shape[1] * page_size
    _fail_where(
        (lengths < 0) | (lengths > capacity),
        lambda b: (
            f"{lengths_name}: expected 0 to {capacity} tokens ({tables.shape[1]} pages of {page_size}), "
            f"got {lengths[b]} in row {b}"
        ),
    )
    if scoring.causal and not decode:  # decode pads with length 0
        _fail_where(
            q_counts > lengths,
            lambda b: (
                f"{lengths_name}: expected at least the {q_counts[b]} tokens of its query rows, "
                f"got {lengths[b]} in row {b}"
            ),
        )
    lengths = np.where(q_counts > 0, lengths, 0)  # without query rows nothing of a sequence is read
    q_counts = np.where(lengths > 0, q_counts, 0)
    first_used = scoring.first_key(lengths - q_counts)
    places = np.arange(tables.shape[1]) * page_size
    used = (places < lengths[:, None]) & (places + page_size > first_used[:, None])
    live = tables[:num_seqs]
    if not foreign_pages:
        _fail_where(
            used & ((live < 0) | (live >= num_pages)),
            lambda b, m: (
                f"{tables_name}: expected pages in [0, {num_pages}), got {live[b, m]} at [{b}, {m}], "
                f"the page of tokens {m * page_size} to {(m + 1) * page_size - 1} of the {lengths[b]} in row {b}"
            ),
        )
    if scoring.causal:  # the last tokens are new
        _report_shared_pages(tables_name, live, lengths, q_counts, page_size, num_pages)

    pools = [(k_name, "keys", "bad_keys"), (v_name, "values", "bad_values")]
    for name, kind, bad in (*pools, *((name, "scales", name) for name in token_scales)):
        at = np.where(lengths > 0, seen[bad][:num_seqs], -1)
        _fail_where(
            at >= 0,
            lambda b, name=name, kind=kind, at=at: (
                f"{name}: expected finite {kind}, got NaN or infinity at page "
                f"{live[b, at[b] // page_size]}, token {at[b] % page_size} of it, which is token {at[b]} in row {b}"
            ),
        )
    read = np.repeat(lengths > 0, np.diff(starts))  # query rows start at 0
    _fail_where(
        read & ~seen["finite_q"][: len(read)], lambda t: f"q: expected finite queries, got NaN or infinity in row {t}"
    )
    for name in ("k_scale", "v_scale"):
        _report_scale(name, seen[name])
    sinks = seen["sinks"]
    _fail_where(
        np.isnan(sinks) | np.isposinf(sinks), lambda n: f"sinks: expected numbers or -inf, got {sinks[n]} of head {n}"
    )


def _report_rows(num_seqs: np.ndarray, cu_q_lens: np.ndarray, num_rows: int, max_seqs: int) -> int:
    """The number of live sequences, after a look at where their query rows are."""
    count = int(num_seqs)
    if not 0 <= count <= max_seqs:
        raise ValueError(f"num_seqs: expected a number in [0, {max_seqs}], got {count}")
    ends = cu_q_lens[: count + 1]
    if ends[0] != 0:
        raise ValueError(f"cu_q_lens: expected 0, the first row of sequence 0, at index 0, got {ends[0]}")
    _fail_where(
        ends[1:] < ends[:-1],
        lambda b: f"cu_q_lens: expected at least the {ends[b]} at index {b}, got {ends[b + 1]} at index {b + 1}",
    )
    if ends[-1] > num_rows:
        raise ValueError(f"cu_q_lens: expected at most the {num_rows} rows of q, got {ends[-1]} at index {count}")
    return count


def _report_shared_pages(
    name: str, tables: np.ndarray, lengths: np.ndarray, q_counts: np.ndarray, page_size: int, num_pages: int
) -> None:
    """Raises if two sequences have new tokens, the last `q_counts` ones, in one page: one overwrites the other.

    Sequences of the same pages and length are let pass: attention to a shared prefix, which writes nothing. If they do
    write, `write_kv_pages` is told the same slot twice.
    """
    owner: dict[int, int] = {}
    for b in np.flatnonzero(q_counts):
        stop = -(-lengths[b] // page_size)
        for m in range(max(0, lengths[b] - q_counts[b]) // page_size, min(stop, tables.shape[1])):
            page = int(tables[b, m])
            other = owner.setdefault(page, int(b)) if 0 <= page < num_pages else int(b)
            same = lengths[other] == lengths[b] and np.array_equal(tables[other, :stop], tables[b, :stop])
            if other != b and not same:
                raise ValueError(
                    f"{name}: expected pages of their own for the new tokens of each sequence, got page {page} in row "
                    f"{b} at [{b}, {m}] and in row {other}"
                )


# ---- The cache -------------------------------------------------------------------------------------------------------


def check_write(num_slots: int, k: Array, v: Array, slot_mapping: Array, k_scale: Array, v_scale: Array) -> None:
    """Checks one write to pools of so many slots; scales are `[0, 1 or T, K]`."""
    if not _state.active:
        return
    report = functools.partial(_report_write, num_slots=num_slots)
    _check(_observe_write, report, k, v, slot_mapping, k_scale, v_scale)


def _observe_write(k: Array, v: Array, slots: Array, k_scale: Array, v_scale: Array) -> dict[str, Array]:
    finite = {"k": _finite(k), "v": _finite(v)}
    return {"slots": slots, **finite, "k_scale": k_scale, "v_scale": v_scale}


def _report_write(seen: dict[str, np.ndarray], *, num_slots: int) -> None:
    slots = seen["slots"]
    _report_slots(seen, num_slots=num_slots)
    for name in ("k", "v"):
        _fail_where(
            (slots >= 0) & ~seen[name],
            lambda t, name=name: f"{name}: expected finite numbers, got NaN or infinity in row {t}, of slot {slots[t]}",
        )
    for name in ("k_scale", "v_scale"):
        _report_scale(name, seen[name])


def check_slots(slot_mapping: ArrayLike, num_slots: int) -> None:
    """Checks the slots of a write before the offset of a layer hides them."""
    if _state.active:
        _check(_observe_slots, functools.partial(_report_slots, num_slots=num_slots), jnp.asarray(slot_mapping))


def _observe_slots(slots: Array) -> dict[str, Array]:
    return {"slots": slots}


def _report_slots(seen: dict[str, np.ndarray], *, num_slots: int) -> None:
    _report_targets("slot_mapping", "slots", seen["slots"], seen["slots"] >= 0, num_slots)


def check_copy(num_pages: int, src: ArrayLike, dst: ArrayLike) -> None:
    """Checks one copy of pages."""
    if _state.active:
        report = functools.partial(_report_copy, num_pages=num_pages)
        _check(_observe_copy, report, jnp.asarray(src), jnp.asarray(dst))


def _observe_copy(src: Array, dst: Array) -> dict[str, Array]:
    return {"src": src, "dst": dst}


def _report_copy(seen: dict[str, np.ndarray], *, num_pages: int) -> None:
    src, dst = seen["src"], seen["dst"]
    _report_range("src", "pages", src, num_pages)
    _report_targets("dst", "pages", dst, (src >= 0) & (dst >= 0), num_pages)


def check_layer(index: ArrayLike, num_layers: int) -> None:
    """Checks the number of a layer, which may be traced."""
    if _state.active:
        _check(_observe_layer, functools.partial(_report_layer, num_layers=num_layers), jnp.asarray(index))


def _observe_layer(index: Array) -> dict[str, Array]:
    return {"index": index}


def _report_layer(seen: dict[str, np.ndarray], *, num_layers: int) -> None:
    index = int(seen["index"])
    if not 0 <= index < num_layers:
        raise ValueError(f"index: expected a layer in [0, {num_layers}), got {index}")


def _report_range(name: str, kind: str, ids: np.ndarray, count: int) -> None:
    _fail_where(
        (ids < -1) | (ids >= count),
        lambda i: f"{name}: expected {kind} in [0, {count}), or -1 for none, got {ids[i]} in row {i}",
    )


def _report_targets(name: str, kind: str, ids: np.ndarray, live: np.ndarray, count: int) -> None:
    """Raises unless ids lie in range and those of live rows differ."""
    _report_range(name, kind, ids, count)
    rows = np.flatnonzero(live)
    order = rows[np.argsort(ids[rows], kind="stable")]
    _fail_where(
        ids[order][1:] == ids[order][:-1],
        lambda i: f"{name}: expected {kind} of their own, got {ids[order[i]]} in rows {order[i]} and {order[i + 1]}",
    )


# ---- Both ------------------------------------------------------------------------------------------------------------


def _check(
    observe: Callable[..., dict[str, Array]],
    report: Callable[[dict[str, np.ndarray]], None],
    *operands: Array,
    **static: Any,
) -> None:
    """Reports what is observed of the operands: now where they are concrete, else when they are known."""

    def ask(*operands: Array) -> None:
        seen = observe(*map(jax.lax.stop_gradient, operands), **static)
        jax.debug.callback(functools.partial(_on_host, report), {name: _whole(x) for name, x in seen.items()})

    if any(isinstance(x, Tracer) for x in operands):
        ask(*operands)
    elif all(x.is_fully_addressable for x in operands):
        report(jax.device_get(jax.jit(observe, static_argnames=tuple(static))(*operands, **static)))
    else:  # no process has all of them
        jax.jit(ask)(*operands)


def _on_host(report: Callable[[dict[str, np.ndarray]], None], seen: dict[str, Any]) -> None:
    report({name: np.asarray(x) for name, x in seen.items()})


def _finite(x: Array) -> Array:
    """True where all numbers of `x[i]`, or of `x[i, j]` of four axes, are finite."""
    axes = (2, 3) if x.ndim == 4 else (1, 2)
    return jnp.isfinite(x.astype(jnp.float32)).all(axis=axes)


def _whole(x: Array) -> Array:
    """On a mesh with explicit axes, the array on all devices."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def _report_scale(name: str, scale: np.ndarray) -> None:
    _fail_where(
        ~(np.isfinite(scale) & (scale > 0)),
        lambda x, k: f"{name}: expected positive, finite scales, got {scale[x, k]} of head {k}",
    )


def _fail_where(bad: np.ndarray, message: Callable[..., str]) -> None:
    """Raises with the message of the first index at which `bad` is True."""
    if bad.any():
        raise ValueError(message(*(int(i) for i in np.argwhere(bad)[0])))
