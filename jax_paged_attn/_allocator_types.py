"""Results and errors of the allocator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class PageAllocatorError(Exception):
    """A `PageAllocator` refused a call and is unchanged: the base of `OutOfPages`, `DoubleFree` and `ForeignPage`.

    Example:
      >>> import jax_paged_attn as jpa
      >>> try:
      ...     jpa.PageAllocator(num_pages=1, page_size=4).free(0)
      ... except jpa.PageAllocatorError as error:
      ...     print(type(error).__name__, error)
      ForeignPage sequence 0 is not of this allocator
    """


class OutOfPages(PageAllocatorError):
    """More pages are needed than are free: preempt a sequence or wait.

    Attributes:
      needed: pages that the call had to take.
      free: pages that it could have taken; for `PageAllocator.allocate` without those that it would have shared.

    Example:
      >>> import jax_paged_attn as jpa
      >>> jpa.PageAllocator(num_pages=1, page_size=4).allocate(range(5))
      Traceback (most recent call last):
        ...
      jax_paged_attn._allocator_types.OutOfPages: out of pages: 2 needed, 1 free
    """

    def __init__(self, needed: int, free: int):
        super().__init__(f"out of pages: {needed} needed, {free} free")
        self.needed = needed
        self.free = free

    def __reduce__(self):
        return type(self), (self.needed, self.free)


class DoubleFree(PageAllocatorError):
    """The sequence was freed before: it cannot be used or freed again.

    Example:
      >>> import jax_paged_attn as jpa
      >>> allocator = jpa.PageAllocator(num_pages=1, page_size=4)
      >>> id = allocator.allocate([1, 2, 3]).id
      >>> allocator.free(id)
      >>> allocator.free(id)
      Traceback (most recent call last):
        ...
      jax_paged_attn._allocator_types.DoubleFree: sequence 0 was freed before
    """


class ForeignPage(PageAllocatorError):
    """This allocator never gave out that sequence id, so its pages belong to someone else.

    Example:
      >>> import jax_paged_attn as jpa
      >>> jpa.PageAllocator(num_pages=1, page_size=4).pages(3)
      Traceback (most recent call last):
        ...
      jax_paged_attn._allocator_types.ForeignPage: sequence 3 is not of this allocator
    """


@dataclass(frozen=True)
class Sequence:
    """A sequence as it was when it was allocated or forked.

    Attributes:
      id: what the allocator's methods take; never used twice.
      pages: page ids in the order of the tokens, at that time; -1 for pages in front of the window.
      cached_len: leading tokens whose keys and values are in shared pages already; computing starts after them.

    Example:
      >>> import jax_paged_attn as jpa
      >>> jpa.PageAllocator(num_pages=4, page_size=4).allocate([5, 6, 7, 8, 9])
      Sequence(id=0, pages=(0, 1), cached_len=0)
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

    Example:
      A prompt of three tokens, in a step of at most four tokens and two sequences.

      >>> import jax_paged_attn as jpa
      >>> allocator = jpa.PageAllocator(num_pages=4, page_size=2)
      >>> id = allocator.allocate([5, 6, 7]).id
      >>> arrays = allocator.step([id], [3], num_tokens=4, max_seqs=2, max_pages=3)
      >>> arrays.slot_mapping.tolist(), arrays.block_tables.tolist(), arrays.cu_q_lens.tolist()
      ([0, 1, 2, -1], [[0, 1, -1], [-1, -1, -1]], [0, 3, 3])
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

    Example:
      >>> import jax_paged_attn as jpa
      >>> allocator = jpa.PageAllocator(num_pages=4, page_size=4)
      >>> sequence = allocator.allocate([5, 6, 7, 8, 9])
      >>> allocator.stats.pages_in_use, allocator.stats.pages_free, allocator.stats.misses
      (2, 2, 1)
    """

    pages_in_use: int
    pages_cached: int
    pages_free: int
    hits: int
    misses: int
    evictions: int
    tokens_found: int
