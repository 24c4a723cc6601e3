"""The live sequences of an allocator as rows of NumPy arrays, so that a step handles all of them at once."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from jax_paged_attn._allocator_pool import Node

_MARKS = ("length", "written", "marked", "known", "published", "given_back")


class Rows:
    """One row per live sequence. The rows of freed sequences are used again.

    Attributes:
      tables: int32 `[R, W]`, page ids, then -1; also -1 for pages in front of the window.
      length: int64 `[R]`, tokens that have a slot.
      written: int64 `[R]`, leading tokens that are in the cache.
      marked: int64 `[R]`, those that the caller said are, for this sequence or for the one that it was forked from.
        Tokens found by `allocate` are not among them, nor, with ``share="allocated"``, are all those of a fork.
      known: int64 `[R]`, leading tokens whose values are known, which `tokens` lists; -1 after a reset of the prefix
        cache, since nothing of the sequence may then be found.
      published: int64 `[R]`, leading pages that others can find; those nodes follow the root in `chains`.
      given_back: int64 `[R]`, leading pages that were given back because they lie in front of the window.
      tokens, chains: per row, the known tokens; the root and the nodes of the published pages.
    """

    def __init__(self, page_size: int):
        self._page_size = page_size
        self._vacant: list[int] = []  # the last one goes first
        self.tables = np.full((0, 16), -1, np.int32)
        self.length = np.zeros(0, np.int64)
        self.written = np.zeros(0, np.int64)
        self.marked = np.zeros(0, np.int64)
        self.known = np.zeros(0, np.int64)
        self.published = np.zeros(0, np.int64)
        self.given_back = np.zeros(0, np.int64)
        self.tokens: list[list[Hashable]] = []
        self.chains: list[list[Node]] = []

    def add(self) -> int:
        """An empty row."""
        if not self._vacant:
            old, new = len(self.tokens), max(16, 2 * len(self.tokens))
            self.tables = _grown(self.tables, (new, self.tables.shape[1]), -1)
            for name in _MARKS:
                setattr(self, name, _grown(getattr(self, name), (new,), 0))
            self.tokens.extend([] for _ in range(old, new))
            self.chains.extend([] for _ in range(old, new))
            self._vacant.extend(reversed(range(old, new)))
        return self._vacant.pop()

    def remove(self, row: int) -> None:
        self.tables[row, : self.num_pages(row)] = -1
        for name in _MARKS:
            getattr(self, name)[row] = 0
        self.tokens[row], self.chains[row] = [], []
        self._vacant.append(row)

    def copy(self, source: int, target: int) -> None:
        """Makes an empty row the same as another."""
        num_pages = self.num_pages(source)
        self.tables[target, :num_pages] = self.tables[source, :num_pages]
        for name in _MARKS:
            marks = getattr(self, name)
            marks[target] = marks[source]
        self.tokens[target], self.chains[target] = list(self.tokens[source]), list(self.chains[source])

    def widen(self, num_pages: int) -> None:
        """Makes room for tables of `num_pages` pages."""
        if num_pages > self.tables.shape[1]:
            width = max(num_pages, 2 * self.tables.shape[1])
            self.tables = _grown(self.tables, (len(self.tables), width), -1)

    def num_pages(self, row: int) -> int:
        """Length of a row's table, the pages that were given back included."""
        return -(-int(self.length[row]) // self._page_size)

    def pages(self, row: int) -> list[int]:
        """A row's table: page ids, -1 for those given back."""
        return self.tables[row, : self.num_pages(row)].tolist()

    def slots(self, row: int, start: int, stop: int) -> np.ndarray:
        """int32 `[stop - start]`: page · page_size + offset of tokens; -1 where the page was given back."""
        pages, offsets = np.divmod(np.arange(start, stop, dtype=np.int32), np.int32(self._page_size))
        pages = self.tables[row, pages]
        slots = pages * np.int32(self._page_size) + offsets
        if self.given_back[row]:
            slots[pages < 0] = -1
        return slots

    def spread(self, rows: np.ndarray, start: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 positions and slots of `counts[i]` tokens from `start[i]` on of each row, `[sum of counts]` each."""
        if not (counts == 1).all():
            ends = counts.cumsum()
            rows = rows.repeat(counts)
            start = np.arange(len(rows)) + (start - ends + counts).repeat(counts)
        index = start // self._page_size
        slots = self.pages_at(rows, index) * np.int32(self._page_size)
        slots += (start - index * self._page_size).astype(np.int32)
        return start.astype(np.int32), slots

    def pages_at(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        """int32 `[n]`, one page of each of `rows`; anything where an index is -1."""
        return self.tables.ravel().take(rows * self.tables.shape[1] + index)


def _grown(array: np.ndarray, shape: tuple[int, ...], fill: int) -> np.ndarray:
    larger = np.full(shape, fill, array.dtype)
    larger[tuple(slice(n) for n in array.shape)] = array
    return larger
