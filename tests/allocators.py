"""Shared by the tests of the allocator: its whole state as plain values, and errors that leave it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jax_paged_attn._allocator import PageAllocator

SHARE_MODES = ("allocated", "written")


def snapshot(allocator: PageAllocator) -> dict[str, Any]:
    """All of the allocator's state: comparing it before and after an error shows that nothing changed."""
    state = {f"allocator.{name}": value for name, value in vars(allocator).items()}
    # The last batch is remembered for speed alone.
    for name in ("_pool", "_rows", "_last_batch"):
        del state[f"allocator.{name}"]
    state |= {f"pool.{name}": value for name, value in vars(allocator._pool).items()}
    state |= {f"rows.{name}": value for name, value in vars(allocator._rows).items()}
    paths: dict[int, Any] = {}
    pending = [((), root) for root in allocator._pool._roots.values()]
    while pending:
        path, node = pending.pop()
        paths[id(node)] = (*path, node.key)
        pending += [((*path, node.key), child) for child in node.children.values()]
        state[f"node {paths[id(node)]}"] = (list(node.pages), node.holders)
    del state["pool._roots"]
    state["pool._node_of"] = [None if node is None else paths[id(node)] for node in state["pool._node_of"]]
    state["rows.chains"] = [[paths[id(node)] for node in chain] for chain in state["rows.chains"]]
    return {name: _plain(value) for name, value in state.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype, value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return list(value.items()) if isinstance(value, dict) else value


def raises_unchanged(allocator: PageAllocator, error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    before = snapshot(allocator)
    with pytest.raises(error, match=match):
        call()
    assert snapshot(allocator) == before


def every_use(allocator: PageAllocator, id: int) -> list[Callable[[], Any]]:
    """Every method that takes an existing sequence."""
    return [
        lambda: allocator.append(id, 1),
        lambda: allocator.append(id, [1]),
        lambda: allocator.append_batch([id], [1]),
        lambda: allocator.append_batch([id], [[1]]),
        lambda: allocator.fork(id),
        lambda: allocator.free(id),
        lambda: allocator.truncate(id, 0),
        lambda: allocator.mark_written(id, 0),
        lambda: allocator.mark_written_batch([id], [0]),
        lambda: allocator.step([id], [0], num_tokens=1, max_seqs=1, max_pages=4),
        lambda: allocator.slots(id, 0, 0),
        lambda: allocator.block_tables([id], 4),
        lambda: allocator.pages(id),
        lambda: allocator.length(id),
    ]


def same_arrays(a: Any, b: Any) -> bool:
    """True if two dataclasses of arrays hold the same values in the same dtypes."""
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)
