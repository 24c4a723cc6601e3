"""Which page belongs to which sequence: reference counts, shared prefixes, copy-on-write. Host side, no JAX.

A pool of ``num_pages`` pages of ``page_size`` tokens is given to sequences. Four rules keep it right:

* **A page with several owners is never written.** Its owners either share a whole, finished page, or have it in
  common since a fork. The first of them to append gets a copy of a last page that is not full.
* **Whole pages are found again by their tokens**, which are compared; equal hashes alone never match.
* **A page is found only while it holds the tokens that it is found by.** A sequence that truncates into a page, or
  appends to one that was truncated, first makes it unfindable.
* **A freed page keeps its content until it is needed.** Blank pages go first, then the findable page that was freed
  longest ago, tails before their prefixes. This is the eviction order of vLLM's prefix cache.

Every operation looks first and then acts, so an error leaves the allocator as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any, Literal

import numpy as np

from jax_paged_attn import _allocator_arguments as arguments
from jax_paged_attn._allocator_pages import SequencePages
from jax_paged_attn._allocator_pool import Node, PagePool
from jax_paged_attn._allocator_rows import Rows
from jax_paged_attn._allocator_types import (
    AllocatorStats,
    DoubleFree,
    ForeignPage,
    OutOfPages,
    PageAllocatorError,
    Sequence,
    StepArrays,
)

__all__ = [
    "AllocatorStats",
    "DoubleFree",
    "ForeignPage",
    "OutOfPages",
    "PageAllocator",
    "PageAllocatorError",
    "Sequence",
    "StepArrays",
]


class PageAllocator:
    """Gives the pages of a paged key/value cache to sequences, and finds prefixes again that are in the cache.

    Args:
      num_pages: P, pages in the pool, ≥ 1.
      page_size: S, tokens per page, ≥ 1. Slots are int32, so P · S must not exceed 2³¹ − 1.
      share: when a whole page becomes shareable.

        ``"written"``: once `mark_written` covered it. A page that was never computed is never found, whatever is
        sampled, rejected, preempted or cancelled.

        ``"allocated"``: as soon as its tokens have slots, so that prompts that arrive together share. The caller
        then has to write tokens and copy pages in the order of the calls that asked for it. It must not free or
        truncate a sequence whose tokens another one found before they were written. Once nobody owns a page, it
        stays findable only if `mark_written` covered it.
      window: w ≥ 1, for layers whose attention has ``sliding_window`` ≤ w. Pages wholly in front of the last w tokens
        that `mark_written` covered are given back; tables have -1 there. None keeps all.

    Allocating and freeing a page takes constant time, whatever the size of the pool. Not thread-safe.

    Raises:
      ValueError, TypeError: a bad argument.

    Example:
      Two prompts with the same first page; the second one finds it, since it was marked as written.

      >>> import numpy as np
      >>> import jax_paged_attn as jpa
      >>> allocator = jpa.PageAllocator(num_pages=8, page_size=4)
      >>> first = allocator.allocate([1, 2, 3, 4, 5])
      >>> allocator.mark_written(first.id, 5)  # after the prefill
      >>> second = allocator.allocate([1, 2, 3, 4, 9, 9])
      >>> second.pages, second.cached_len
      ((0, 2), 4)

      A step of decode for both, after their next tokens were sampled:

      >>> allocator.mark_written(second.id, 6)
      >>> ids, sampled = [first.id, second.id], np.array([7, 8], np.int32)
      >>> slots, copies = allocator.append_batch(ids, sampled[:, None])
      >>> arrays = allocator.step(ids, [1, 1], num_tokens=2, max_seqs=2, max_pages=4)
      >>> arrays.positions.tolist(), arrays.slot_mapping.tolist(), arrays.kv_lens.tolist()
      ([5, 6], [5, 10], [6, 7])
      >>> allocator.mark_written_batch(ids, arrays.kv_lens)  # after the model ran
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        share: Literal["allocated", "written"] = "written",
        window: int | None = None,
    ):
        self._num_pages = arguments.integer("num_pages", num_pages, at_least=1)
        self._page_size = arguments.integer("page_size", page_size, at_least=1)
        num_slots = self._num_pages * self._page_size
        if num_slots > arguments.LARGEST:
            raise ValueError(f"num_pages * page_size: expected at most 2**31 - 1 (slots are int32), got {num_slots}")
        if not isinstance(share, str) or share not in ("allocated", "written"):
            raise ValueError(f"share: expected 'allocated' or 'written', got {share!r}")
        self._share = share
        self._window = None if window is None else arguments.integer("window", window, at_least=1)
        self._pool = PagePool(self._num_pages)
        self._rows = Rows(self._page_size)
        self._sequence_pages = SequencePages(self._rows, self._pool, self._page_size, self._share, self._window)
        self._row_of: dict[int, int] = {}
        self._last_batch: tuple[np.ndarray, list[int]] | None = None  # rows and ids, until one is freed
        self._next_id = 0
        self._hits = self._misses = self._tokens_found = 0

    # ---- sequences

    def allocate(
        self, tokens: Iterable[Hashable], salt: Hashable = None, *, max_cached_len: int | None = None
    ) -> Sequence:
        """A new sequence with pages for `tokens`, sharing the whole pages of a known prefix.

        Args:
          tokens: the prompt: integers (an iterable or a 1-d integer array) or any hashable values, compared with
            ``==``. An empty prompt owns no page yet; `append` gives it some.
          salt: prefixes are shared among equal salts only: one per tenant keeps tenants apart, one per version of the
            weights keeps versions apart. Any hashable value.
          max_cached_len: the longest prefix to share, in tokens. The allocators of a model's groups of layers have to
            agree on it: see `find_prefix`.

        Returns:
          The sequence. ``cached_len`` is a multiple of the page size and less than the number of tokens (0 for an empty
          prompt). The last token has to be computed for its logits, so its page is never shared. With a window, the
          pages of the last w tokens before ``cached_len`` are shared, and -1 stands in front of them.

        Raises:
          OutOfPages: too few free pages.
          TypeError, ValueError: an argument is not as above.
        """
        known = arguments.token_tuple("tokens", tokens)
        nodes, shared = self._find(known, salt, max_cached_len)
        pool, rows = self._pool, self._rows
        num_pages = self._pages_for(len(known))
        pool.require(num_pages - len(nodes), reserved=sum(not pool.owners[page] for page in shared))

        chain = [pool.root(salt), *nodes]
        pool.hold(chain[-1])  # before pages are taken, which forgets nodes
        for page in shared:
            pool.own(page)
        rows.widen(num_pages)
        row = rows.add()
        first, found = len(nodes) - len(shared), len(nodes)
        rows.tables[row, first:found] = shared
        rows.tables[row, found:num_pages] = [pool.take() for _ in range(num_pages - found)]
        rows.length[row] = rows.known[row] = len(known)
        rows.written[row] = cached_len = found * self._page_size
        rows.published[row], rows.given_back[row] = found, first
        rows.tokens[row], rows.chains[row] = list(known), chain
        self._hits += found > 0
        self._misses += found == 0
        self._tokens_found += cached_len
        self._sequence_pages.publish(row)
        return self._admit(row, cached_len)

    def find_prefix(
        self, tokens: Iterable[Hashable], salt: Hashable = None, *, max_cached_len: int | None = None
    ) -> int:
        """The ``cached_len`` that `allocate` would give with the same arguments. Nothing changes.

        Raises:
          TypeError, ValueError: an argument is not as for `allocate`.
        """
        nodes, _ = self._find(arguments.token_tuple("tokens", tokens), salt, max_cached_len)
        return len(nodes) * self._page_size

    def append(self, id: int, n: int | Iterable[Hashable]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Makes room for new tokens at the end of a sequence.

        Args:
          id: the sequence.
          n: the new tokens, or just their number. Given by number their values are unknown: neither the page they
            start in nor any later one can be found by others, until `tell_batch` says which they are or `truncate`
            takes them away. Tokens behind unknown ones count as unknown too, even if given here.

        Returns:
          ``(slots, copies)``: slots int32 ``[n]``, page · page_size + offset of each new token; and the
          ``(source page, destination page)`` pairs that the caller has to copy with `copy_kv_pages` before it writes
          the tokens: one pair if the last page was partly filled and shared, else none. Pairs of several appends can
          be copied together, unless a fork, a free or a truncation came between them: then one may read or overwrite
          what the other wrote.

        Raises:
          OutOfPages, DoubleFree, ForeignPage: see there.
          TypeError, ValueError: `n` is negative, or neither a number nor tokens.
        """
        row = self._row(id)
        count, tokens = arguments.number_or_tokens("n", n)
        if count == 0:
            return np.empty(0, np.int32), []
        rows = self._rows
        start, num_pages = int(rows.length[row]), rows.num_pages(row)
        stop = start + count
        partial = start % self._page_size != 0
        must_copy = partial and self._pool.owners[rows.tables[row, num_pages - 1]] > 1
        self._pool.require(self._pages_for(stop) - num_pages + bool(must_copy))

        copy = self._sequence_pages.unshare(row) if partial else None
        self._sequence_pages.add(row, num_pages, self._pages_for(stop))
        rows.length[row] = stop
        if tokens is not None and rows.known[row] == start:
            rows.tokens[row].extend(tokens)
            rows.known[row] = stop
        self._sequence_pages.publish(row)
        return rows.slots(row, start, stop), [] if copy is None else [copy]

    def append_batch(
        self, ids: Iterable[int], tokens_or_counts: Iterable[int | Iterable[Hashable]] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`append` for many sequences at once; all of them or, after an error, none.

        Args:
          ids: B sequences, none of them twice.
          tokens_or_counts: the new tokens of each sequence (a list of lists, or an integer array ``[B, n]``), or their
            numbers (a list of integers, or an integer array ``[B]``).

        Returns:
          ``(slots, copies)``: slots int32 ``[sum of counts]``, those of the first sequence first; and the
          (source page, destination page) pairs to be copied before the tokens are written, int32 ``[c, 2]``.

        Raises:
          OutOfPages, DoubleFree, ForeignPage: see there.
          TypeError, ValueError: an argument is not as above.
        """
        rows, _ = self._batch(ids)
        counts, tokens, told = arguments.numbers_or_tokens("tokens_or_counts", tokens_or_counts, len(rows))
        r, pool, size = self._rows, self._pool, self._page_size
        start = r.length[rows]
        stop = start + counts
        have = -(-start // size)
        new_pages = -(-stop // size) - have
        shared, unfit = self._sequence_pages.partial_pages(rows, (start % size != 0) & (counts > 0), have)
        pool.require(int(new_pages.sum()) + shared)

        # Python only where a page fills, is shared, or was truncated.
        copies = [copy for row in rows[unfit].tolist() if (copy := self._sequence_pages.unshare(row)) is not None]
        growing = new_pages.nonzero()[0]
        for row, *new in zip(*(x[growing].tolist() for x in (rows, have, have + new_pages)), strict=True):
            self._sequence_pages.add(row, *new)
        r.length[rows] = stop
        if told is not None:
            self._sequence_pages.extend_known(rows, told & (r.known[rows] == start), stop, tokens)
        if self._share == "allocated":
            for row in rows[r.known[rows] // size > r.published[rows]].tolist():
                self._sequence_pages.publish(row)
        slots = r.spread(rows, start, counts)[1]
        return slots, np.array(copies, np.int32).reshape(-1, 2)

    def tell_batch(self, ids: Iterable[int], tokens: Iterable[Iterable[Hashable]] | np.ndarray) -> None:
        """Says which tokens were appended by number: the first ones of each sequence whose values are unknown.

        A server that samples on the device appends the next token by number, before it has read its value. Once the
        values are told, pages can be found by them as if they had been known from the start. All are told or, after
        an error, none.

        A fork has to be told the same as its original about the tokens that they share. After `reset_prefix_cache`,
        what is told about sequences from before is checked, but never found.

        Args:
          ids: B sequences, none of them twice.
          tokens: those of each sequence, in order: a list of lists, or an integer array ``[B, n]``.

        Raises:
          DoubleFree, ForeignPage: see there.
          TypeError, ValueError: an argument is not as above, or more tokens than a sequence has unknown ones.

        Example:
          >>> import jax_paged_attn as jpa
          >>> allocator = jpa.PageAllocator(num_pages=4, page_size=2)
          >>> id = allocator.allocate([5]).id
          >>> slots, copies = allocator.append_batch([id], [2])  # two tokens, still on the device
          >>> allocator.mark_written(id, 3)
          >>> allocator.find_prefix([5, 6, 7])
          0
          >>> allocator.tell_batch([id], [[6, 7]])
          >>> allocator.find_prefix([5, 6, 7])
          2
        """
        rows, items = self._batch(ids)
        counts, values, told = arguments.numbers_or_tokens("tokens", tokens, len(rows))
        if len(rows) and (told is None or not told.all()):
            raise TypeError("tokens: expected the tokens of each sequence, got their number")
        r, size = self._rows, self._page_size
        known = r.known[rows]
        unknown = r.length[rows] - np.maximum(known, 0)
        if (counts > unknown).any():
            i = int((counts > unknown).argmax())
            raise ValueError(
                f"tokens: expected at most {unknown[i]}, the tokens of sequence {items[i]} that are unknown, "
                f"got {counts[i]}"
            )
        if told is None:
            return
        self._sequence_pages.extend_known(rows, known >= 0, known + counts, values)
        if (due := (known + counts) // size > np.maximum(known, 0) // size).any():
            self._sequence_pages.settle_batch(rows[due])

    def truncate(self, id: int, length: int) -> None:
        """Drops the last tokens of a sequence, as after rejected drafts, so that it has `length` tokens.

        Pages that become empty are given back. What could be found under dropped tokens is found no more, unless
        another sequence holds it. Dropped tokens count as not written: appended again, they have to be computed again.

        Raises:
          DoubleFree, ForeignPage: see there.
          ValueError: `length` is negative, more than the sequence's length, or so small that the next token would see
            keys whose pages were given back because of the window. `mark_written` before `truncate` does that; the
            other order does not. Zero is always possible.
        """
        row = self._row(id)
        length = arguments.integer("length", length, at_least=0)
        r, pool, size = self._rows, self._pool, self._page_size
        if length > r.length[row]:
            raise ValueError(f"length: expected at most {r.length[row]}, the length of sequence {id}, got {length}")
        if length == r.length[row]:
            return
        least = 0 if self._window is None else int(r.given_back[row]) * size + max(self._window - 1, 1)
        if r.given_back[row] and 0 < length < least:
            raise ValueError(
                f"length: expected 0 or at least {least}, since the first {r.given_back[row]} pages of sequence {id} "
                f"were given back with window {self._window}, got {length}"
            )
        keep, whole = self._pages_for(length), length // size
        table, chain = r.pages(row), r.chains[row]
        dropped = chain[whole + 1 :]
        if dropped:
            pool.hold(chain[whole])
        r.length[row] = length
        for i in reversed(range(whole, len(table))):
            if table[i] >= 0 and not self._sequence_pages.is_whole(i, table[i]):
                pool.forget(table[i])
            if table[i] >= 0 and i >= keep:
                pool.disown(table[i])
        for node in dropped:  # pages in front of the window
            pool.forget_free(node)
        if dropped:
            pool.let_go(dropped[-1])
            del chain[whole + 1 :]
        del r.tokens[row][length:]
        r.tables[row, keep : len(table)] = -1
        for marks in (r.written, r.marked, r.known):
            marks[row] = min(marks[row], length)
        if length == 0:
            r.known[row] = 0  # nothing is left from before a reset
        r.published[row] = min(r.published[row], whole)
        r.given_back[row] = min(r.given_back[row], keep)

    def fork(self, id: int) -> Sequence:
        """A second sequence with the same tokens, which shares every page, a partly filled last one too.

        Whoever of the two appends first gets a copy of such a page (see `append`). ``cached_len`` is the number of
        tokens that the original has in the cache: those marked, or with ``share="allocated"`` all.

        Raises:
          DoubleFree, ForeignPage: see there.
        """
        row = self._row(id)
        new, r = self._rows.add(), self._rows
        pages = r.pages(row)
        for page in pages:
            if page >= 0:
                self._pool.own(page)
        r.copy(row, new)
        self._pool.hold(r.chains[new][-1])
        if self._share == "allocated":
            r.written[new] = r.length[new]
        return self._admit(new, int(r.written[new]))

    def free(self, id: int) -> None:
        """Gives up a sequence. Pages without another owner become free; shareable ones stay findable until reused.

        Raises:
          DoubleFree, ForeignPage: see there.
        """
        row = self._row(id)
        del self._row_of[int(id)]
        self._last_batch = None
        # The tail first: a prefix without its tail is still of use, a tail without its prefix is not.
        for page in reversed(self._rows.pages(row)):
            if page >= 0:
                self._pool.disown(page)
        self._pool.let_go(self._rows.chains[row][-1])
        self._rows.remove(row)

    def mark_written(self, id: int, n: int) -> None:
        """Says that the first `n` tokens of a sequence are in the cache, so that their whole pages can be shared.

        With a window, gives back the pages in front of the last w of them. Less than what was said before changes
        nothing.

        Raises:
          DoubleFree, ForeignPage: see there.
          ValueError: `n` is negative or more than the sequence's length.
        """
        row = self._row(id)
        n = arguments.integer("n", n, at_least=0)
        length = int(self._rows.length[row])
        if n > length:
            raise ValueError(f"n: expected at most {length}, the length of sequence {id}, got {n}")
        if n > self._rows.marked[row]:
            self._sequence_pages.mark(row, n)

    def mark_written_batch(self, ids: Iterable[int], lengths: Iterable[int] | np.ndarray) -> None:
        """`mark_written` for many sequences at once; all of them or, after an error, none.

        Args:
          ids: B sequences, none of them twice.
          lengths: how many leading tokens of each are in the cache: a list of integers or an integer array ``[B]``.

        Raises:
          DoubleFree, ForeignPage: see there.
          TypeError, ValueError: an argument is not as above, or more than the sequence's length.
        """
        rows, items = self._batch(ids)
        new = arguments.counts("lengths", lengths, len(rows))
        r, size = self._rows, self._page_size
        too_long = new > r.length[rows]
        if too_long.any():
            i = int(too_long.argmax())
            raise ValueError(
                f"lengths: expected at most {r.length[rows[i]]}, the length of sequence {items[i]}, got {new[i]}"
            )
        old = r.marked[rows]
        r.marked[rows] = np.maximum(old, new)
        r.written[rows] = np.maximum(r.written[rows], new)
        due = new // size > old // size
        if self._window is not None:
            due |= (new - self._window) // size > r.given_back[rows]
        if (due := due & (new > old)).any():
            self._sequence_pages.settle_batch(rows[due])

    # ---- arrays for the caller

    def step(
        self,
        ids: Iterable[int],
        counts: Iterable[int] | np.ndarray,
        *,
        num_tokens: int,
        max_seqs: int,
        max_pages: int,
    ) -> StepArrays:
        """The arrays of a step that computes the next ``counts[i]`` tokens of each sequence after its written ones.

        Args:
          ids: the sequences, none of them twice, in the order of their tokens in the step.
          counts: tokens of each sequence: a list of integers or an integer array. They have slots already.
          num_tokens, max_seqs, max_pages: T, B, M, the static shapes.

        Returns:
          `StepArrays`; `jax_paged_attn.nnx.StepMetadata.from_arrays` takes them.

        Raises:
          DoubleFree, ForeignPage: see there.
          TypeError, ValueError: more tokens, sequences or pages than fit, or tokens without slots.
        """
        num_tokens = arguments.integer("num_tokens", num_tokens, at_least=0)
        max_seqs = arguments.integer("max_seqs", max_seqs, at_least=0)
        max_pages = arguments.integer("max_pages", max_pages, at_least=0)
        rows, items = self._batch(ids)
        added = arguments.counts("counts", counts, len(rows))
        r = self._rows
        number, total = len(rows), int(added.sum())
        if number > max_seqs:
            raise ValueError(f"ids: expected at most max_seqs = {max_seqs} sequences, got {number}")
        if total > num_tokens:
            raise ValueError(f"counts: expected at most num_tokens = {num_tokens} tokens together, got {total}")
        first = r.written[rows]
        last = first + added
        if (last > (lengths := r.length[rows])).any():
            i = int((last > lengths).argmax())
            raise ValueError(
                f"counts: expected at most {lengths[i] - first[i]}, the tokens of sequence {items[i]} that have slots "
                f"and are not written, got {added[i]}"
            )
        longest = int(last.max(initial=0))
        if (width := self._pages_for(longest)) > max_pages:
            id = items[int(last.argmax())]
            raise ValueError(f"max_pages: expected at least {width}, the pages of sequence {id}, got {max_pages}")

        tokens = np.zeros((2, num_tokens), np.int32)
        tokens[1, total:] = -1
        tokens[0, :total], tokens[1, :total] = r.spread(rows, first, added)
        tables = np.full((max_seqs, max_pages), -1, np.int32)
        tables[:number, :width] = r.tables.take(rows, axis=0)[:, :width]
        kv_lens, cu_q_lens = np.zeros(max_seqs, np.int32), np.full(max_seqs + 1, total, np.int32)
        kv_lens[:number] = last
        cu_q_lens[0] = 0
        np.cumsum(added, out=cu_q_lens[1 : number + 1])
        return StepArrays(tokens[0], tokens[1], tables, kv_lens, cu_q_lens, np.array(number, np.int32))

    def slots(self, id: int, start: int, stop: int) -> np.ndarray:
        """int32 ``[stop - start]``: page · page_size + offset of a sequence's tokens ``start … stop - 1``.

        For writing the prompt, chunk by chunk, from ``cached_len`` on. -1 for tokens in front of the window.

        Raises:
          DoubleFree, ForeignPage: see there.
          ValueError: not ``0 <= start <= stop <= length``.
        """
        row = self._row(id)
        start, stop = (arguments.integer(*pair, at_least=0) for pair in (("start", start), ("stop", stop)))
        if not start <= stop <= self._rows.length[row]:
            limits = f"start <= stop <= {self._rows.length[row]}, the length of sequence {id}"
            raise ValueError(f"start, stop: expected {limits}, got {start}, {stop}")
        return self._rows.slots(row, start, stop)

    def block_tables(self, ids: Iterable[int], M: int) -> np.ndarray:
        """int32 ``[len(ids), M]``: the page ids of each sequence, padded with -1.

        Raises:
          DoubleFree, ForeignPage: see there.
          TypeError, ValueError: `ids` is no list of integers; a sequence has more than `M` pages.
        """
        items = arguments.integer_list("ids", ids)
        M = arguments.integer("M", M, at_least=0)
        rows = self._find_rows(items)
        lengths = self._rows.length[rows]
        width = self._pages_for(int(lengths.max(initial=0)))
        if width > M:
            id = items[int(lengths.argmax())]
            raise ValueError(f"M: expected at least {width}, the pages of sequence {id}, got {M}")
        tables = np.full((len(rows), M), -1, np.int32)
        tables[:, :width] = self._rows.tables[rows, :width]
        return tables

    def pages(self, id: int) -> tuple[int, ...]:
        """The page ids of a sequence, in the order of its tokens; -1 in front of the window.

        Raises:
          DoubleFree, ForeignPage: see there.
        """
        return tuple(self._rows.pages(self._row(id)))

    def length(self, id: int) -> int:
        """The number of tokens of a sequence. Raises DoubleFree, ForeignPage."""
        return int(self._rows.length[self._row(id)])

    # ---- the pool

    def reset_prefix_cache(self) -> None:
        """Forgets every prefix, as after a change of the weights.

        Live sequences stay, but neither what they hold nor what is appended to them is found by others.
        """
        self._pool.reset()
        r = self._rows
        for row in self._row_of.values():
            root = self._pool.root(r.chains[row][0].key)
            self._pool.hold(root)
            r.tokens[row], r.chains[row] = [], [root]
            r.known[row], r.published[row] = -1 if r.length[row] else 0, 0

    def check(self, cache: Any) -> None:
        """Compares the pool with a cache's, anything with ``num_pages`` and ``page_size``.

        Raises:
          ValueError: they differ; slots and tables would mean other places there.
          TypeError: `cache` lacks one of the two.
        """
        for name in ("num_pages", "page_size"):
            mine, other = getattr(self, name), getattr(cache, name, None)
            if other is None:
                arguments.reject("cache", f"a cache with {name}", cache)
            if other != mine:
                raise ValueError(f"cache: expected {name} {mine}, as the allocator has, got {other}")

    @property
    def stats(self) -> AllocatorStats:
        """Pages in use, cached and free now, and what was counted so far."""
        pool = self._pool
        return AllocatorStats(
            pages_in_use=self.pages_in_use,
            pages_cached=pool.num_cached,
            pages_free=pool.num_blank,
            hits=self._hits,
            misses=self._misses,
            evictions=pool.evictions,
            tokens_found=self._tokens_found,
        )

    @property
    def cached_pages(self) -> tuple[int, ...]:
        """Pages without an owner that can still be found by their tokens, in the order in which they are evicted.

        Example:
          >>> import jax_paged_attn as jpa
          >>> allocator = jpa.PageAllocator(num_pages=4, page_size=2)
          >>> sequence = allocator.allocate([5, 6, 7, 8, 9])
          >>> allocator.mark_written(sequence.id, 5)
          >>> allocator.free(sequence.id)
          >>> allocator.cached_pages  # the third one was not full
          (1, 0)
        """
        return self._pool.cached

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def window(self) -> int | None:
        return self._window

    @property
    def num_free(self) -> int:
        """Pages without an owner, those that can still be found by their tokens included."""
        return self._pool.num_blank + self._pool.num_cached

    @property
    def pages_in_use(self) -> int:
        """Pages with at least one owner."""
        return self._num_pages - self.num_free

    def __repr__(self) -> str:
        window = "" if self._window is None else f", window={self._window}"
        return (
            f"PageAllocator({self._num_pages}, {self._page_size}, share={self._share!r}{window}):"
            f" {len(self._row_of)} sequences, {self.pages_in_use} pages in use"
        )

    # ---- inside

    def _find(self, tokens: tuple[Hashable, ...], salt: Any, max_cached_len: Any) -> tuple[list[Node], list[int]]:
        """The prefix to share: its nodes, and its last pages, as many as are needed."""
        arguments.hashable("salt", salt)
        head = tokens[:-1]  # the last token has to be computed
        if max_cached_len is not None:
            head = head[: arguments.integer("max_cached_len", max_cached_len, at_least=0)]
        at_hand = None if self._window is None else self._pages_for(self._window)
        return self._pool.find(salt, head, self._page_size, at_hand)

    def _admit(self, row: int, cached_len: int) -> Sequence:
        id = self._next_id
        self._next_id += 1
        self._row_of[id] = row
        return Sequence(id, tuple(self._rows.pages(row)), cached_len)

    def _row(self, id: int) -> int:
        id = arguments.integer("id", id)
        row = self._row_of.get(id)
        if row is None:
            if 0 <= id < self._next_id:
                raise DoubleFree(f"sequence {id} was freed before")
            raise ForeignPage(f"sequence {id} is not of this allocator")
        return row

    def _find_rows(self, ids: list[int]) -> np.ndarray:
        try:
            return np.fromiter(map(self._row_of.__getitem__, ids), np.intp, len(ids))
        except KeyError:
            return np.array([self._row(id) for id in ids], np.intp)

    def _batch(self, ids: Any) -> tuple[np.ndarray, list[int]]:
        """Rows and ids of sequences, none of which may come twice."""
        items = arguments.integer_list("ids", ids)
        if self._last_batch is not None and items == self._last_batch[1]:  # a step names the same ones three times
            return self._last_batch
        rows = self._find_rows(items)
        if len(set(items)) < len(items):
            twice = Counter(items).most_common(1)[0][0]
            raise ValueError(f"ids: expected each sequence once, got sequence {twice} twice")
        self._last_batch = rows, items
        return rows, items

    def _pages_for(self, length: int) -> int:
        return -(-length // self._page_size)
