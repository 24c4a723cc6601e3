"""The pages of live sequences: how they grow, are copied before a write, become findable and are given back."""

from __future__ import annotations

from collections import Counter, deque
from itertools import compress
from typing import Any

import numpy as np

from jax_paged_attn._allocator_pool import PagePool
from jax_paged_attn._allocator_rows import Rows


class SequencePages:
    """Moves pages between the pool and the rows of sequences. It checks nothing: callers have looked before.

    Args:
      rows, pool: which it changes.
      page_size, share, window: as for `PageAllocator`.
    """

    def __init__(self, rows: Rows, pool: PagePool, page_size: int, share: str, window: int | None):
        self._rows = rows
        self._pool = pool
        self._page_size = page_size
        self._share = share
        self._window = window

    def add(self, row: int, first: int, last: int) -> None:
        """Takes pages `first` to `last - 1` of a row; its length stays."""
        self._rows.widen(last)
        for i in range(first, last):
            self._rows.tables[row, i] = self._pool.take()

    def partial_pages(self, rows: np.ndarray, partial: np.ndarray, have: np.ndarray) -> tuple[int, np.ndarray]:
        """How many partly filled last pages will be copied, and which `rows` need `unshare`."""
        pages = self._rows.pages_at(rows, have - 1)
        unfit = (partial & (self._pool.claims[pages] > 1)).nonzero()[0]
        if not len(unfit):
            return 0, unfit
        # The last owner of a page keeps it.
        wanted = Counter(pages[unfit].tolist())
        return sum(min(number, self._pool.owners[page] - 1) for page, number in wanted.items()), unfit

    def unshare(self, row: int) -> tuple[int, int] | None:
        """Makes a partly filled last page fit to be written; returns the pair if that takes a copy."""
        pool, place = self._pool, (row, self._rows.num_pages(row) - 1)
        page = int(self._rows.tables[place])
        if pool.owners[page] == 1:
            pool.forget(page)  # it stayed findable, since it had other owners when it was truncated
            return None
        self._rows.tables[place] = copy = pool.take()
        pool.disown(page)
        return page, copy

    def is_whole(self, i: int, page: int) -> bool:
        """True if some sequence has all tokens of a page that is the i-th of its owners."""
        return bool((self._rows.length[self._rows.tables[:, i] == page] >= (i + 1) * self._page_size).any())

    def extend_known(self, rows: np.ndarray, told: np.ndarray, stop: np.ndarray, tokens: Any) -> None:
        """Takes note of appended tokens where they, and every token in front of them, are known."""
        if not told.all():
            tokens = tokens[told] if isinstance(tokens, np.ndarray) else list(compress(tokens, told.tolist()))
            rows, stop = rows[told], stop[told]
        known = list(map(self._rows.tokens.__getitem__, rows.tolist()))
        # Loops without bytecode; columns, since they make no list per sequence.
        if isinstance(tokens, np.ndarray):
            for column in tokens.T.tolist():
                deque(map(list.append, known, column), maxlen=0)
        else:
            deque(map(list.extend, known, tokens), maxlen=0)
        self._rows.known[rows] = stop

    def publish(self, row: int) -> None:
        """Makes those pages findable that are full, whose tokens are known, and that are in the cache."""
        r = self._rows
        known, written = int(r.known[row]), int(r.written[row])
        first, last = int(r.published[row]), (known if self._share == "allocated" else min(known, written))
        last //= self._page_size
        if last > first:
            r.published[row] = last
            self._enter(row, first, last)

    def mark(self, row: int, n: int) -> None:
        """Takes note that more tokens of a row are in the cache than was said before."""
        r = self._rows
        r.marked[row] = n
        if n > r.written[row]:
            r.written[row] = n
        self.publish(row)
        self._clear(row)

    def settle_batch(self, rows: np.ndarray) -> None:
        """Shares and gives back pages after more tokens of some rows were marked or told."""
        r = self._rows
        first, known, written = r.published[rows], r.known[rows], r.written[rows]
        last = (known if self._share == "allocated" else np.minimum(known, written)) // self._page_size
        r.published[rows] = np.maximum(first, last)
        for row, *pages in zip(rows.tolist(), first.tolist(), last.tolist(), strict=True):
            self._enter(row, *pages)
        if self._share == "allocated" or self._window is not None:
            for row in rows.tolist():
                self._clear(row)

    def _clear(self, row: int) -> None:
        """The rest, after `publish`: marked pages stay findable, and go if they lie in front of the window."""
        r = self._rows
        if self._share == "allocated":
            last = min(int(r.marked[row]) // self._page_size, int(r.published[row]))
            self._pool.vouch(r.tables[row, int(r.given_back[row]) : last][::-1].tolist())
        if self._window is None:
            return
        first, last = int(r.given_back[row]), (int(r.marked[row]) - self._window) // self._page_size
        if last > first:
            for page in r.tables[row, first:last].tolist():
                self._pool.disown(page)
            r.tables[row, first:last] = -1
            r.given_back[row] = last

    def _enter(self, row: int, first: int, last: int) -> None:
        """Makes pages `first` to `last - 1` of a row findable."""
        if last <= first:
            return
        r, size, computed = self._rows, self._page_size, self._share == "written"
        chain, tokens, enter = r.chains[row], r.tokens[row], self._pool.enter
        held = node = chain[-1]
        for i, page in enumerate(r.tables[row, first:last].tolist(), first):
            key = tuple(tokens[i * size : (i + 1) * size])
            # A page in front of the window may be given back before its tokens are told.
            node = enter(page, node, key, computed) if page >= 0 else self._pool.child(node, key)
            chain.append(node)
        self._pool.hold(node, instead_of=held)
