"""Results and errors of the allocator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class PageAllocatorError(Exception):
    """A `PageAllocator` refused a call; it is unchanged."""


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
      pages: page ids in the order of the tokens, at that time; -1 for pages in front of the window.
      cached_len: leading tokens whose keys and values are in shared pages already; computing starts after them.
    """

    id: int
    pages: tuple[int, ...]
    cached_len: int


@dataclass(frozen=True, eq=False)
class StepArrays:
    """The arrays of one step over T tokens of B sequences with tables of M pages. NumPy, int32.

    Attributes:
      positions: `[T]`, position of each token in its sequence, from 0; 0 for padding.
      slot_mapping: `[T]`, page · page_size + offset of each token; -1 for padding, which is not written.
      block_tables: `[B, M]`, page ids of each sequence, padded with -1.
      kv_lens: `[B]`, tokens of each sequence in the cache, the new ones included; 0 for padding.
      cu_q_lens: `[B + 1]`, first token of each sequence in the step, then the end, repeated for padding.
      num_seqs: scalar, how many of the B rows are live.
    """

    positions: np.ndarray
    slot_mapping: np.ndarray
    block_tables: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: np.ndarray


@dataclass(frozen=True)
class AllocatorStats:
    """The pages that a `PageAllocator` holds now, and its counts since it was made.

    Attributes:
      pages_in_use: pages with at least one owner.
      pages_cached: pages without an owner that can still be found by their tokens.
      pages_free: pages without an owner or content. The three add up to the pool.
      hits, misses: calls of `PageAllocator.allocate` that found a prefix, and those that found none.
      evictions: cached pages whose content was given up for other tokens.
      tokens_found: tokens found in the cache, the sum of every ``cached_len`` of `PageAllocator.allocate`.
    """

    pages_in_use: int
    pages_cached: int
    pages_free: int
    hits: int
    misses: int
    evictions: int
    tokens_found: int
