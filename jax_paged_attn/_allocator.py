"""Which page belongs to which sequence: reference counts, shared prefixes, copy-on-write. Host side, no JAX.

A pool of ``num_pages`` pages of ``page_size`` tokens is dealt out to sequences. Three rules keep it right:

* **A page with several owners is never written.** Its owners either share a whole, finished page, or are forks
  of one another; the first of them to append gets a copy of a last page that is not full.
* **Whole pages are found again by their tokens.** Every known prefix is a node of a tree; a page's key is (node of
  the prefix before it, its tokens), so a dict lookup compares tokens, and equal hashes alone never match.
  Node numbers are never used twice: what hung below a forgotten node cannot be found through a new one.
* **A freed page keeps its content until it is needed.** Blank pages go first, then the findable page that was freed
  longest ago, tails before the prefixes they hang on (the eviction order of vLLM's prefix cache).

Every operation looks first and then acts, so an error leaves the allocator as it was.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import numpy as np

__all__ = ["DoubleFree", "ForeignPage", "OutOfPages", "PageAllocator", "PageAllocatorError", "Sequence"]

_LARGEST_SLOT = 2**31 - 1


class PageAllocatorError(Exception):
    """What a `PageAllocator` refuses to do; the allocator is unchanged."""


class OutOfPages(PageAllocatorError):
    """More pages are needed than are free: preempt a sequence or wait.

    Attributes:
      needed: pages that the call had to take.
      free: pages that it could have taken; for `PageAllocator.allocate` without those that it would have shared.
    """

    def __init__(self, needed: int, free: int):
        super().__init__(f"out of pages: {needed} needed, {free} free")
        self.needed = needed
        self.free = free

    def __reduce__(self):
        return type(self), (self.needed, self.free)


class DoubleFree(PageAllocatorError):
    """The sequence was freed before: it cannot be used or freed again."""


class ForeignPage(PageAllocatorError):
    """This allocator never gave out that sequence id, so its pages belong to someone else."""


@dataclass(frozen=True)
class Sequence:
    """A sequence as it was when it was allocated or forked.

    Attributes:
      id: what the allocator's methods take; never used twice.
      pages: page ids in the order of the tokens, at that time.
      cached_len: leading tokens whose keys and values are in shared pages already; computing starts after them.
    """

    id: int
    pages: tuple[int, ...]
    cached_len: int


@dataclass(frozen=True)
class _Root:
    """The empty prefix of one salt."""

    salt: Hashable


_Prefix = int | _Root
_Key = tuple[_Prefix, tuple[Hashable, ...]]


@dataclass
class _Node:
    """A known prefix that ends on a page boundary.

    Its pages all hold the same content: either each has an owner, or there is a single one and it is free.
    """

    number: int
    key: _Key
    pages: dict[int, None] = field(default_factory=dict)


@dataclass
class _State:
    """A live sequence. Its tokens are known up to ``published · page_size + len(tail)``."""

    pages: list[int]
    length: int
    written: int  # leading tokens that are in the cache
    prefix: _Prefix  # node of the pages published so far
    published: int  # leading pages that allocate() can find
    tail: list[Hashable]  # known tokens after those
    all_known: bool = True  # False for good after an append by number


class PageAllocator:
    """Deals the pages of a paged key/value cache out to sequences.

    Args:
      num_pages: P, pages in the pool, ≥ 1.
      page_size: S, tokens a page, ≥ 1. Slots are int32, so P · S must not exceed 2³¹ − 1.
      share: when a whole page becomes shareable.

        ``"allocated"``: as soon as its tokens have slots. Right if sequences are computed in the order in which they
        were allocated and appended to. Do not free a sequence before its tokens were written: its pages stay findable
        and would pass on whatever stood in them.

        ``"written"``: once `mark_written` covered it. For servers with chunked prefill, preemption or cancellation.

    Allocating and freeing a page takes constant time, whatever the size of the pool. Not thread-safe.

    Raises:
      ValueError, TypeError: a bad argument.
    """

    def __init__(self, num_pages: int, page_size: int, *, share: Literal["allocated", "written"] = "allocated"):
        self._num_pages = _integer("num_pages", num_pages, at_least=1)
        self._page_size = _integer("page_size", page_size, at_least=1)
        num_slots = self._num_pages * self._page_size
        if num_slots > _LARGEST_SLOT:
            raise ValueError(f"num_pages * page_size: expected at most 2**31 - 1 (slots are int32), got {num_slots}")
        if share not in ("allocated", "written"):
            raise ValueError(f"share: expected 'allocated' or 'written', got {share!r}")
        self._share = share
        self._owners = [0] * self._num_pages
        self._node_of: list[_Node | None] = [None] * self._num_pages
        self._blank = list(range(self._num_pages))[::-1]  # free, content worthless; the last one goes first
        self._cached: OrderedDict[int, None] = OrderedDict()  # free but findable, freed longest ago first
        self._nodes: dict[_Key, _Node] = {}
        self._next_node = 0
        self._states: dict[int, _State] = {}
        self._next_id = 0

    # ---- sequences

    def allocate(self, tokens: Iterable[Hashable], salt: Hashable = None) -> Sequence:
        """A new sequence with pages for `tokens`, sharing the whole pages of a known prefix.

        Args:
          tokens: the prompt: integers (an iterable or a 1-d integer array) or any hashable values, compared with
            ``==``. An empty prompt owns no page yet; `append` gives it some.
          salt: prefixes are shared among equal salts only: one a tenant keeps tenants apart. Any hashable value.

        Returns:
          The sequence. ``cached_len`` is a multiple of the page size and less than the number of tokens (0 for an empty
          prompt): the last token has to be computed for its logits, so its page is never shared.

        Raises:
          OutOfPages: too few free pages.
          TypeError, ValueError: `tokens` or `salt` is not as above.
        """
        known = _token_tuple("tokens", tokens)
        prefix: _Prefix = _Root(_hashable("salt", salt))
        shared: list[int] = []
        for start in range(0, len(known) - self._page_size, self._page_size):
            node = self._nodes.get((prefix, known[start : start + self._page_size]))
            if node is None:
                break
            shared.append(next(iter(node.pages)))
            prefix = node.number
        needed = self._pages_for(len(known)) - len(shared)
        self._require(needed, reserved=sum(not self._owners[page] for page in shared))

        for page in shared:
            self._own(page)
        cached_len = len(shared) * self._page_size
        state = _State(
            pages=shared + [self._take() for _ in range(needed)],
            length=len(known),
            written=cached_len,
            prefix=prefix,
            published=len(shared),
            tail=list(known[cached_len:]),
        )
        self._publish(state)
        return self._admit(state, cached_len)

    def append(self, id: int, n: int | Iterable[Hashable]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Makes room for new tokens at the end of a sequence.

        Args:
          id: the sequence.
          n: the new tokens, or just their number. Given by number their content is unknown, and neither the page they
            start in nor any later page of this sequence can be found by others.

        Returns:
          ``(slots, copies)``: slots int32 ``[n]``, page · page_size + offset of each new token; and the
          ``(source page, destination page)`` pairs that the caller has to copy with `copy_kv_pages` before it writes
          the tokens: one pair if the last page was partly filled and shared with a fork, else none. Pairs of several
          appends can be copied together, unless a fork or a free came between them: then one may read or overwrite
          what the other wrote.

        Raises:
          OutOfPages, DoubleFree, ForeignPage: see there.
          TypeError, ValueError: `n` is negative, or neither a number nor tokens.
        """
        state = self._state(id)
        tokens: tuple[Hashable, ...] | None = None
        if isinstance(n, (int, np.integer)):
            count = _integer("n", n, at_least=0)
        else:
            tokens = _token_tuple("n", n)
            count = len(tokens)
        if count == 0:
            return np.empty(0, np.int32), []
        start, stop = state.length, state.length + count
        must_copy = start % self._page_size != 0 and self._owners[state.pages[-1]] > 1
        new_pages = self._pages_for(stop) - len(state.pages)
        self._require(new_pages + must_copy)

        copies: list[tuple[int, int]] = []
        if must_copy:
            source, state.pages[-1] = state.pages[-1], self._take()
            self._disown(source)
            copies.append((source, state.pages[-1]))
        state.pages.extend(self._take() for _ in range(new_pages))
        state.length = stop
        state.all_known = state.all_known and tokens is not None
        if state.all_known and tokens is not None:
            state.tail.extend(tokens)
        self._publish(state)
        return self._slots(state, start, stop), copies

    def fork(self, id: int) -> Sequence:
        """A second sequence with the same tokens, which shares every page, a partly filled last one too.

        Whoever of the two appends first gets a copy of such a page (see `append`). ``cached_len`` is the number of
        tokens that the original has in the cache: all of them, or with ``share="written"`` those marked.

        Raises:
          DoubleFree, ForeignPage: see there.
        """
        state = self._state(id)
        for page in state.pages:
            self._own(page)
        return self._admit(replace(state, pages=list(state.pages), tail=list(state.tail)), state.written)

    def free(self, id: int) -> None:
        """Gives up a sequence. Pages without another owner become free; shareable ones stay findable until reused.

        Raises:
          DoubleFree, ForeignPage: see there.
        """
        state = self._state(id)
        del self._states[id]
        # The tail first: a prefix without its tail is still of use, a tail without its prefix is not.
        for page in reversed(state.pages):
            self._disown(page)

    def mark_written(self, id: int, n: int) -> None:
        """Says that the first `n` tokens of a sequence are in the cache, so that their whole pages can be shared.

        Less than what was said before changes nothing, nor does any call with ``share="allocated"``.

        Raises:
          DoubleFree, ForeignPage: see there.
          ValueError: `n` is negative or more than the sequence's length.
        """
        state = self._state(id)
        n = _integer("n", n, at_least=0)
        if n > state.length:
            raise ValueError(f"n: expected at most {state.length}, the length of sequence {id}, got {n}")
        state.written = max(state.written, n)
        self._publish(state)

    # ---- what the caller's arrays are made of

    def slots(self, id: int, start: int, stop: int) -> np.ndarray:
        """int32 ``[stop - start]``: page · page_size + offset of a sequence's tokens ``start … stop - 1``.

        For writing the prompt, chunk by chunk, from ``cached_len`` on.

        Raises:
          DoubleFree, ForeignPage: see there.
          ValueError: not ``0 <= start <= stop <= length``.
        """
        state = self._state(id)
        start, stop = _integer("start", start, at_least=0), _integer("stop", stop, at_least=0)
        if not start <= stop <= state.length:
            limits = f"start <= stop <= {state.length}, the length of sequence {id}"
            raise ValueError(f"start, stop: expected {limits}, got {start}, {stop}")
        return self._slots(state, start, stop)

    def block_tables(self, ids: Collection[int], M: int) -> np.ndarray:
        """int32 ``[len(ids), M]``: the page ids of each sequence, padded with -1.

        Raises:
          DoubleFree, ForeignPage: see there.
          ValueError: a sequence has more than `M` pages.
        """
        M = _integer("M", M, at_least=0)
        rows = [self._state(id).pages for id in ids]
        for id, row in zip(ids, rows, strict=True):
            if len(row) > M:
                raise ValueError(f"M: expected at least {len(row)}, the pages of sequence {id}, got {M}")
        tables = np.full((len(rows), M), -1, np.int32)
        for table, row in zip(tables, rows, strict=True):
            table[: len(row)] = row
        return tables

    def pages(self, id: int) -> tuple[int, ...]:
        """The page ids of a sequence, in the order of its tokens. Raises DoubleFree, ForeignPage."""
        return tuple(self._state(id).pages)

    def length(self, id: int) -> int:
        """The number of tokens of a sequence. Raises DoubleFree, ForeignPage."""
        return self._state(id).length

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def num_free(self) -> int:
        """Pages without an owner, those that can still be found by their tokens included."""
        return len(self._blank) + len(self._cached)

    @property
    def pages_in_use(self) -> int:
        """Pages with at least one owner."""
        return self._num_pages - self.num_free

    def __repr__(self) -> str:
        return (
            f"PageAllocator({self._num_pages}, {self._page_size}, share={self._share!r}):"
            f" {len(self._states)} sequences, {self.pages_in_use} pages in use"
        )

    # ---- sequences, inside

    def _admit(self, state: _State, cached_len: int) -> Sequence:
        id = self._next_id
        self._next_id += 1
        self._states[id] = state
        return Sequence(id, tuple(state.pages), cached_len)

    def _state(self, id: int) -> _State:
        id = _integer("id", id)
        if not 0 <= id < self._next_id:
            raise ForeignPage(f"sequence {id} is not of this allocator")
        if id not in self._states:
            raise DoubleFree(f"sequence {id} was freed before")
        return self._states[id]

    def _pages_for(self, length: int) -> int:
        return -(-length // self._page_size)

    def _slots(self, state: _State, start: int, stop: int) -> np.ndarray:
        size, first_page = self._page_size, start // self._page_size
        pages = np.asarray(state.pages[first_page : self._pages_for(stop)], np.int32)
        positions = np.arange(start, stop, dtype=np.int32)
        return pages[positions // size - first_page] * np.int32(size) + positions % size

    def _publish(self, state: _State) -> None:
        """Makes those pages findable that are full, whose tokens are known, and that are in the cache."""
        if self._share == "allocated":
            state.written = state.length
        size = self._page_size
        count = min(state.written // size - state.published, len(state.tail) // size)
        for i in range(count):
            page = state.pages[state.published + i]
            state.prefix = self._enter(page, (state.prefix, tuple(state.tail[i * size : (i + 1) * size])))
        if count > 0:
            state.published += count
            del state.tail[: count * size]

    # ---- pages, inside: blank → owned → (findable) → free, cached or blank → …

    def _require(self, needed: int, reserved: int = 0) -> None:
        """Raises unless `needed` pages can be taken while `reserved` free ones stay."""
        free = self.num_free - reserved
        if needed > free:
            raise OutOfPages(needed, free)

    def _take(self) -> int:
        """A free page with one owner; forgets the content of the least recently used one if none is blank."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._owners[page] = 1
        return page

    def _own(self, page: int) -> None:
        """One more owner for a page with content."""
        if self._owners[page] == 0:
            del self._cached[page]
        self._owners[page] += 1

    def _disown(self, page: int) -> None:
        self._owners[page] -= 1
        if self._owners[page] > 0:
            return
        node = self._node_of[page]
        if node is None:
            self._blank.append(page)
        elif len(node.pages) > 1:
            self._discard(page)
        else:
            self._cached[page] = None

    def _enter(self, page: int, key: _Key) -> int:
        """Makes an owned page findable; returns its node's number. A free page with the same content is now useless."""
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = _Node(self._next_node, key)
            self._next_node += 1
        other = next(iter(node.pages), page)
        node.pages[page] = None
        self._node_of[page] = node
        if self._owners[other] == 0:
            del self._cached[other]
            self._discard(other)
        return node.number

    def _discard(self, page: int) -> None:
        """Blanks a free page whose content an owned page holds too."""
        self._forget(page)
        self._blank.append(page)

    def _forget(self, page: int) -> None:
        """Makes a page unfindable."""
        node = self._node_of[page]
        if node is None:
            return
        self._node_of[page] = None
        del node.pages[page]
        if not node.pages:
            del self._nodes[node.key]


# ---- arguments


def _integer(name: str, value: Any, at_least: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        _reject(name, "an integer", value)
    if at_least is not None and number < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {number}")
    return number


def _hashable(name: str, value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        _reject(name, "hashable values", value)
    return value


def _token_tuple(name: str, tokens: Any) -> tuple[Hashable, ...]:
    if hasattr(tokens, "__array__"):
        array = np.asarray(tokens)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name}: expected a 1-d integer array, got {array.dtype}{list(array.shape)}")
        return tuple(array.tolist())
    if not isinstance(tokens, Iterable):
        _reject(name, "an iterable of tokens", tokens)
    items = tuple(tokens)
    _hashable(name, items)  # here, so that nothing is half done when a token has no hash
    return items


def _reject(name: str, expected: str, value: Any) -> NoReturn:
    raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}") from None
