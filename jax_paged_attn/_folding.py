"""Batching by folding: a mapped call of a primitive is one larger call of it.

Mapped queries become more rows, mapped tables and lengths more sequences, mapped pools more pages. Each operand and
result has an `Axis` that says what its leading axis counts. It decides how a mapped one is folded and an unmapped one
is repeated.
"""

import enum
import functools
from collections.abc import Collection, Sequence

import jax.numpy as jnp
from jax import Array

from jax_paged_attn import _modes


class Axis(enum.Enum):
    """The kinds of things that leading axes of operands count; in a pool, the axis of its pages."""

    ROWS = enum.auto()  # query rows
    SEQUENCES = enum.auto()
    FIRST_ROWS = enum.auto()  # sequences; the values are row numbers
    CUMULATIVE = enum.auto()  # how many rows the sequences before have, or how many sequences live; never folded
    TABLES = enum.auto()  # sequences; the values are page ids
    TOKENS = enum.auto()  # new tokens
    SLOTS = enum.auto()  # new tokens; the values are slot numbers
    K_POOL = enum.auto()  # keys; their scales per token have all axes but the last
    V_POOL = enum.auto()
    SINKS = enum.auto()  # X rows, X dividing the number of sequences; 0 rows where absent
    SCALES = enum.auto()  # X rows, X dividing the number of sequences or tokens


POOLS = (Axis.K_POOL, Axis.V_POOL)

# Operands of these kinds must keep equal leading sizes among themselves: one mapped, all mapped.
_TIED = (*POOLS, Axis.SINKS)


def fold(
    axes: Sequence[Axis],
    operands: Sequence[Array],
    dims: Sequence[int | None],
    mapped: Collection[Axis] = (),
    page_axis: int = 0,
) -> tuple[list[Array], int]:
    """Folds the mapped axis `dims[i]` of each operand (None: not mapped) into its leading axis, of pools into pages.

    Args:
      axes, operands, dims: one entry per operand.
      mapped: kinds to treat as mapped even if no operand of theirs is, because results of that kind must be.
      page_axis: the axis of pools that counts pages; the next one counts the tokens of a page.

    Returns:
      The folded operands, and the size V of the mapped axis.
    """
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    return _folded(tuple(operands), size, tuple(axes), tuple(dims), frozenset(mapped), page_axis), size


@functools.partial(_modes.compiled, static_argnums=(1, 2, 3, 4, 5))
def _folded(
    operands: tuple[Array, ...],
    size: int,
    axes: tuple[Axis, ...],
    dims: tuple[int | None, ...],
    mapped: frozenset[Axis],
    page_axis: int,
) -> list[Array]:
    together = set(mapped) | {a for a, d in zip(axes, dims, strict=True) if d is not None and a in _TIED}
    shapes = [_without(d, x.shape) for x, d in zip(operands, dims, strict=True)]
    pages = {axis: shape[page_axis] for axis, shape in zip(axes, shapes, strict=True) if axis in POOLS}
    repeats = _repeats_of_smaller_pool(pages, together)

    folded: list[Array] = []
    for axis, x, d in zip(axes, operands, dims, strict=True):
        is_mapped = d is not None or axis in together
        stacked = jnp.moveaxis(x, d, 0) if d is not None else x[None]
        if axis in POOLS:
            if not is_mapped:
                folded.append(x)
                continue
            repeated = [repeats.get(axis, 1) if i == page_axis + 1 else 1 for i in range(stacked.ndim)]
            stacked = jnp.tile(stacked, repeated)
        if axis in (Axis.SINKS, Axis.SCALES) and not is_mapped and x.shape[0] in (0, 1):
            folded.append(x)  # one row serves every sequence already
            continue
        stacked = jnp.broadcast_to(stacked, (size, *stacked.shape[1:]))
        copies = jnp.arange(size, dtype=jnp.int32)
        if axis is Axis.FIRST_ROWS:
            stacked += (copies * shapes[axes.index(Axis.ROWS)][0])[:, None]
        elif axis in (Axis.TABLES, Axis.SLOTS) and together & set(POOLS):
            in_use = max(pages.values())
            if axis is Axis.SLOTS:
                in_use *= shapes[axes.index(Axis.K_POOL)][page_axis + 1]
            # Ids outside of the pool become -1 first: shifted, they could land in the pool of a neighbour.
            shift = jnp.expand_dims(copies * in_use, tuple(range(1, stacked.ndim)))
            stacked = jnp.where((stacked >= 0) & (stacked < in_use), stacked + shift, -1)
        folded.append(_merge(stacked, page_axis if axis in POOLS else 0))
    return folded


def unfold(
    axes: Sequence[Axis], results: Sequence[Array], size: int, page_axis: int = 0
) -> tuple[list[Array], list[int]]:
    """The inverse for results, `[V·n, ...]` -> `[V, n, ...]`; and which axis of each one is the mapped one."""
    dims = [page_axis if axis in POOLS else 0 for axis in axes]
    split = [
        x.reshape(*x.shape[:d], size, x.shape[d] // size, *x.shape[d + 1 :]) for x, d in zip(results, dims, strict=True)
    ]
    return split, dims


def _merge(stacked: Array, axis: int) -> Array:
    """Makes the leading axis and the one that is number `axis` behind it one axis."""
    x = jnp.moveaxis(stacked, 0, axis)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _without(dim: int | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one copy of a mapped operand."""
    return shape if dim is None else (*shape[:dim], *shape[dim + 1 :])


def _repeats_of_smaller_pool(pages: dict[Axis, int], together: set[Axis]) -> dict[Axis, int]:
    """How often a mapped pool must be repeated so that ids modulo its size stay right after the fold.

    A smaller pool is read modulo its size. Ids are shifted by whole multiples of the larger size. An unmapped smaller
    pool may stay as it is, and a mapped one must be brought to the larger size before it is folded.
    """
    largest = max(pages.values(), default=0)
    return {axis: largest // n for axis, n in pages.items() if axis in together and 0 < n < largest}
