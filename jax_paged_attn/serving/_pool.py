"""The pool as a display shows it: who has which page, and how far each running request is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_paged_attn import PageAllocator
from jax_paged_attn.serving._groups import LayerGroups
from jax_paged_attn.serving._requests import Generation
from jax_paged_attn.serving._stats import Stats

_FREE, _CACHED = 0, -1


@dataclasses.dataclass(frozen=True)
class PoolRequest:
    """A running request in a `PoolView`.

    Attributes:
      number: its place among all requests of the engine, from 1; it keeps it after a preemption.
      prompt_len: tokens of its prompt.
      output_len: generated tokens that were handed out so far.
      num_pages: pages that it has.
      num_shared: how many of them other running requests have too.

    Example:
      >>> from jax_paged_attn.serving import PoolRequest
      >>> PoolRequest(number=1, prompt_len=40, output_len=3, num_pages=3, num_shared=2).num_shared
      2
    """

    number: int
    prompt_len: int
    output_len: int
    num_pages: int
    num_shared: int


@dataclasses.dataclass(frozen=True, eq=False)
class PoolView:
    """The pool of an engine at one moment, as `Engine.pool_view` returns it. It does not change afterwards.

    With layer groups, it has the pages of all groups: those of the second group behind those of the first one.

    Attributes:
      page_size: tokens per page.
      owners: int64 `[P]`, who has each page: the number of a running request, 0 for a free page, -1 for a page that
        only the prefix cache keeps. Where several requests share a page, the number is that of the one that runs
        longest.
      sharers: int32 `[P]`, how many running requests have each page.
      requests: the running requests, in the order of their admission.
      waiting: requests in the queue, those that were preempted included.
      stats: a copy of `Engine.stats`.

    Example:
      A request that runs on three pages, of which its first step has written two.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.serving import Engine, Request
      >>> class Counting:
      ...     vocab_size, max_len, weights = 100, 64, ()
      ...     def make_cache(self, num_pages, page_size):
      ...         return jnp.zeros(num_pages)
      ...     def hidden(self, weights, cache, tokens, step):
      ...         return tokens, cache
      ...     def logits(self, weights, hidden):
      ...         return jax.nn.one_hot(hidden + 1, self.vocab_size)
      >>> engine = Engine(Counting(), num_pages=5, page_size=2, max_seqs=2)
      >>> generation = engine.submit(Request([1, 2, 3, 4, 5], max_new_tokens=5))
      >>> engine.step()
      >>> engine.pool_view().owners.tolist()
      [1, 1, 1, 0, 0]
      >>> engine.cancel(generation)
      >>> view = engine.pool_view()
      >>> view.owners.tolist(), view.requests, view.stats.steps
      ([-1, -1, 0, 0, 0], (), 1)
    """

    page_size: int
    owners: np.ndarray
    sharers: np.ndarray
    requests: tuple[PoolRequest, ...]
    waiting: int
    stats: Stats

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return len(self.owners)

    @property
    def pages_in_use(self) -> int:
        """Pages that running requests have, each counted once."""
        return int(np.count_nonzero(self.sharers))

    @property
    def pages_cached(self) -> int:
        """Pages that only the prefix cache keeps. They are given away when no page is free."""
        return int(np.count_nonzero(self.owners == _CACHED))

    def as_dict(self) -> dict[str, Any]:
        """The view for `json.dumps`.

        The attributes and properties have their names, but ``"pages"`` stands for `owners` and `sharers`. It is a list
        of ``[owner, sharers, count]``: each says what `count` pages in a row have in common, and the counts add up to
        the pool. ``"stats"`` has `Stats.hit_rate` too.

        Example:
          >>> import numpy as np
          >>> from jax_paged_attn.serving import PoolView, Stats
          >>> owners, sharers = np.array([1, 1, 2, 0, 0]), np.array([2, 2, 1, 0, 0])
          >>> PoolView(16, owners, sharers, requests=(), waiting=0, stats=Stats()).as_dict()["pages"]
          [[1, 2, 2], [2, 1, 1], [0, 0, 2]]
        """
        starts = _starts_of_runs(self.owners, self.sharers)
        counts = np.diff(starts, append=self.num_pages)
        return {
            "num_pages": self.num_pages,
            "page_size": self.page_size,
            "pages": np.column_stack([self.owners[starts], self.sharers[starts], counts]).tolist(),
            "pages_in_use": self.pages_in_use,
            "pages_cached": self.pages_cached,
            "requests": [dataclasses.asdict(request) for request in self.requests],
            "waiting": self.waiting,
            "stats": dataclasses.asdict(self.stats) | {"hit_rate": self.stats.hit_rate},
        }


def view_pool(groups: LayerGroups, running: Sequence[Generation], *, waiting: int, stats: Stats) -> PoolView:
    """The view of the pages of running requests."""
    numbers = np.array([generation._arrival for generation in running], np.int64)
    views = [
        _view_group(allocator, [generation._sequence[group] for generation in running], numbers)
        for group, allocator in enumerate(groups.allocators)
    ]
    owners, sharers = (np.concatenate([view[i] for view in views]) for i in range(2))
    num_pages, num_shared = (np.sum([view[i] for view in views], axis=0).tolist() for i in (2, 3))
    requests = tuple(map(_request, running, num_pages, num_shared))
    owners.flags.writeable = sharers.flags.writeable = False
    return PoolView(groups.page_size, owners, sharers, requests, waiting, dataclasses.replace(stats))


def _view_group(allocator: PageAllocator, sequences: list[int], numbers: np.ndarray) -> tuple[np.ndarray, ...]:
    """Per page its owner and sharers; per sequence, whose requests have these numbers, its pages and shared ones."""
    longest = max(map(allocator.length, sequences), default=0)
    tables = allocator.block_tables(sequences, -(-longest // allocator.page_size))
    is_page = tables >= 0
    sharers = np.bincount(tables[is_page], minlength=allocator.num_pages).astype(np.int32)
    owners = np.full(allocator.num_pages, _FREE, np.int64)
    owners[list(allocator.cached_pages)] = _CACHED
    # Where a page comes several times, the last assignment stays, so the first request has to come last.
    owners[tables[::-1][is_page[::-1]]] = numbers[::-1].repeat(is_page[::-1].sum(1))
    return owners, sharers, is_page.sum(1), (is_page & (sharers[tables] > 1)).sum(1)


def _request(generation: Generation, num_pages: int, num_shared: int) -> PoolRequest:
    prompt_len = len(generation.request.prompt)
    return PoolRequest(generation._arrival, prompt_len, len(generation.tokens) - prompt_len, num_pages, num_shared)


def _starts_of_runs(*columns: np.ndarray) -> np.ndarray:
    """Indices at which one of the columns, of equal lengths, differs from the element in front; 0 is one."""
    differs = np.zeros(len(columns[0]), bool)
    differs[0] = True
    for column in columns:
        differs[1:] |= column[1:] != column[:-1]
    return differs.nonzero()[0]
