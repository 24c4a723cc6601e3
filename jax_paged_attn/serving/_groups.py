"""Layer groups: layers with the same window share page ids, so those with a window hold the pages of windows only.

Each group has an allocator, and each of its layers a pool, of the group's own size. All groups have the same sequences
of the same tokens, and find the same prefixes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from jax_paged_attn import OutOfPages, PageAllocator, StepArrays
from jax_paged_attn.serving._requests import integer

Ids = tuple[int, ...]  # a sequence: what each group's allocator calls it

# Without these, pages in front of a window are overwritten at once, and few prefixes are found. With a window of 128,
# 160 requests, 32 at a time, that shared four prompts of 2048 tokens found 2 % of their tokens in place of 75 %.
_STEPS_KEPT = 8


def group_pages(
    windows: Sequence[int | None],
    *,
    num_pages: int,
    page_size: int,
    max_seqs: int,
    step_tokens: int,
    decode_steps: int = 1,
) -> tuple[int, ...]:
    """The pages that an `Engine` gives each layer of a layer group, where `window_pages` does not say it.

    A group with a window gets what `max_seqs` windows and the new tokens of a step can hold at most, so it never runs
    out before a group without one does. It also gets pages for the tokens of 8 more steps: as many stay in the cache in
    front of windows, where prefixes are found.

    Args:
      windows: the window of each group in tokens; None for layers that see everything.
      num_pages: pages of a group without a window, and the most for one with a window.
      page_size, max_seqs, decode_steps: as for `Engine`.
      step_tokens: the most tokens of a step, the largest of `buckets`.

    Returns:
      As many numbers as there are groups.

    Example:
      Gemma 3 27B has 10 layers that see everything and 52 with a window of 1024 tokens; 32 sequences of 16k tokens.

      >>> from jax_paged_attn.serving import group_pages
      >>> sizes = {"page_size": 16, "max_seqs": 32, "step_tokens": 512}
      >>> full, window = group_pages([None, 1024], num_pages=32 * 1024, **sizes)
      >>> full, window
      (32768, 2398)
      >>> page_bytes = 2 * 16 * 16 * 128 * 2  # keys and values of 16 tokens, 16 heads of 128 columns, bf16
      >>> round((10 + 52) * full * page_bytes / 1e9), round((10 * full + 52 * window) * page_bytes / 1e9)  # GB
      (266, 59)
    """
    return tuple(
        num_pages if window is None else min(num_pages, _most(window, page_size, max_seqs, step_tokens, decode_steps))
        for window in windows
    )


def _most(window: int, page_size: int, max_seqs: int, step_tokens: int, decode_steps: int) -> int:
    """Pages that all sequences hold at most, and those to keep: n tokens in a row are in at most (n − 2) // S + 2."""
    tokens = max_seqs * (window + decode_steps - 2) + (1 + _STEPS_KEPT) * step_tokens
    return tokens // page_size + 2 * max_seqs


class LayerGroups:
    """The allocators of a model's layer groups, which get the same calls.

    A group without a window has slots for a whole prompt once a request is admitted. One with a window would need too
    many pages for that. It has slots up to the token after the computed ones, and `reach` adds those of a chunk. So all
    groups have the same slots when the first token is sampled.

    Args:
      windows: see `group_pages`.
      num_pages: pages of each group.
      page_size: S.
    """

    def __init__(self, windows: Sequence[int | None], num_pages: Sequence[int], page_size: int):
        pools = zip(windows, num_pages, strict=True)
        self.allocators = tuple(PageAllocator(pages, page_size, window=window) for window, pages in pools)
        self.page_size = page_size
        with_window = [group for group, window in enumerate(windows) if window is not None]
        self._with_window = with_window
        self._windows_first = [*with_window, *(g for g in range(len(self.allocators)) if g not in with_window)]

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages of each group."""
        return tuple(allocator.num_pages for allocator in self.allocators)

    @property
    def pages_in_use(self) -> tuple[int, ...]:
        """Pages of each group that have an owner."""
        return tuple(allocator.pages_in_use for allocator in self.allocators)

    @property
    def longest(self) -> int | None:
        """The longest sequence that fits if it is alone; None if there is no limit."""
        return min((pages for allocator in self.allocators if (pages := _longest(allocator)) is not None), default=None)

    # ---- sequences

    def allocate(self, tokens: Sequence[int], salt: Hashable) -> tuple[Ids, int]:
        """A new sequence, and how many of its tokens were found in the cache of every group.

        Raises:
          OutOfPages: some group has too few; no group has the sequence.
        """
        limit = self._found(tokens, salt)
        ids, cached_len = [-1] * len(self.allocators), 0
        # These need few pages, so whatever was cached stays so if a group without a window has too few.
        for place, group in enumerate(self._windows_first):
            allocator = self.allocators[group]
            known = tokens if allocator.window is None else tokens[: limit + 1]
            try:
                sequence = allocator.allocate(known, salt, max_cached_len=limit)
            except OutOfPages:
                for other in self._windows_first[:place]:
                    self.allocators[other].free(ids[other])
                raise
            ids[group], cached_len = sequence.id, sequence.cached_len
        return tuple(ids), cached_len

    def _found(self, tokens: Sequence[int], salt: Hashable) -> int:
        """The longest prefix that every group has; any larger number where no group has a window."""
        limit, agreed = len(tokens), not self._with_window
        while not agreed:  # of a shorter prefix, another window has to be there
            found = min(a.find_prefix(tokens, salt, max_cached_len=limit) for a in self.allocators)
            limit, agreed = found, found == limit
        return limit

    def reach(self, sequence: Ids, tokens: Sequence[int], stop: int) -> int:
        """Gives slots to the tokens in front of `stop` where they have none, as far as there are pages.

        Args:
          tokens: all that the sequence will have before it generates, of which `stop` may be computed next.

        Returns:
          How many tokens may be computed, at most `stop`.
        """
        if not self._with_window:
            return stop
        end = min(stop + 1, len(tokens))
        groups = [(self.allocators[group], sequence[group]) for group in self._with_window]
        for allocator, id in groups:
            whole_pages = -(-allocator.length(id) // self.page_size) + allocator.num_free
            end = min(end, whole_pages * self.page_size)
        for allocator, id in groups:
            allocator.append(id, tokens[allocator.length(id) : end])
        return min(stop, end if end == len(tokens) else end - 1)

    def append_batch(self, sequences: Sequence[Ids], counts: Sequence[int]) -> None:
        """Gives slots to the next tokens of sequences that have the same slots in every group.

        Raises:
          OutOfPages: no group has changed.
        """
        # Each group needs as many pages. If the one with the fewest free ones has them, so have the others.
        for group in sorted(range(len(self.allocators)), key=lambda group: self.allocators[group].num_free):
            self.allocators[group].append_batch(_of(sequences, group), counts)

    def tell_batch(self, sequences: Sequence[Ids], tokens: Sequence[Sequence[int]]) -> None:
        """See `PageAllocator.tell_batch`."""
        for group, allocator in enumerate(self.allocators):
            allocator.tell_batch(_of(sequences, group), tokens)

    def mark_written_batch(self, sequences: Sequence[Ids], lengths: Sequence[int]) -> None:
        """Says which tokens are in the cache for every step that is dispatched from now on.

        With a window, pages in front of it may go to another sequence at once, even if a step that reads them has not
        run yet. The device runs steps in the order of their dispatch, since each takes the cache that the one before
        it gives. Only a later one writes to these pages.
        """
        for group, allocator in enumerate(self.allocators):
            allocator.mark_written_batch(_of(sequences, group), lengths)

    def truncate(self, sequence: Ids, length: int) -> None:
        """See `PageAllocator.truncate`. Tokens that may be dropped must not have been marked as written."""
        for allocator, id in zip(self.allocators, sequence, strict=True):
            allocator.truncate(id, length)

    def free(self, sequence: Ids) -> None:
        """Gives up a sequence."""
        for allocator, id in zip(self.allocators, sequence, strict=True):
            allocator.free(id)

    def reset_prefix_cache(self) -> None:
        """See `PageAllocator.reset_prefix_cache`."""
        for allocator in self.allocators:
            allocator.reset_prefix_cache()

    def step(self, sequences: Sequence[Ids], counts: np.ndarray, **shapes: int) -> list[StepArrays]:
        """The arrays of a step for each group; only slots and block tables differ. See `PageAllocator.step`."""
        return [a.step(_of(sequences, group), counts, **shapes) for group, a in enumerate(self.allocators)]


def checked_windows(windows: Any) -> tuple[int | None, ...]:
    """The windows of a model's layer groups.

    Raises:
      TypeError, ValueError: they are no sequence of windows, each there once.
    """
    if not isinstance(windows, Sequence) or isinstance(windows, str) or not windows:
        raise TypeError(f"windows: expected a sequence of a window for each layer group, got {windows!r}")
    checked = tuple(w if w is None else integer(f"windows[{i}]", w, least=1) for i, w in enumerate(windows))
    if len(set(checked)) < len(checked):
        raise ValueError(f"windows: expected each window once, since its layers are one group, got {windows!r}")
    return checked


def _longest(allocator: PageAllocator) -> int | None:
    """The longest sequence that one group can hold."""
    window, size = allocator.window, allocator.page_size
    # A step needs the window in front of a token, the token, and the slot behind it, see `LayerGroups`.
    if window is not None and allocator.num_pages >= window // size + 2:
        return None
    return allocator.num_pages * size


def _of(sequences: Sequence[Ids], group: int) -> list[int]:
    return [sequence[group] for sequence in sequences]
