"""Which requests run in the next step, and how many tokens of each: pages, the queue, preemption."""

from __future__ import annotations

import bisect
import dataclasses

from jax_paged_attn import OutOfPages
from jax_paged_attn.serving._drafts import PromptLookup
from jax_paged_attn.serving._groups import LayerGroups
from jax_paged_attn.serving._requests import Generation
from jax_paged_attn.serving._stats import Stats


class NeedsResults(Exception):
    """Pages ran out while steps are in flight: their results may end requests, whose pages then are free."""


@dataclasses.dataclass(slots=True)
class Chunk:
    """The tokens of one request in a step.

    Attributes:
      generation: whose they are.
      count: how many; or in how many of the steps of a repeated decode step the request takes part.
      samples: True if the request's next token follows from the last one of these.
      drafts: tokens that may come next, the last ones of the chunk; to be verified.
    """

    generation: Generation
    count: int
    samples: bool = True
    drafts: tuple[int, ...] = ()


@dataclasses.dataclass(slots=True)
class Plan:
    """A step to dispatch.

    Attributes:
      chunks: generating requests first.
      repeats: how many decode steps are to run in one dispatch.
    """

    chunks: list[Chunk]
    repeats: int

    @property
    def is_decode(self) -> bool:
        """True if each request has one token in it, from which the next one is sampled."""
        return self.repeats > 1 or all(c.count == 1 and c.samples and not c.drafts for c in self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


class Scheduler:
    """Gives pages and rows to requests. A step has a token of each generating request, then chunks of prompts.

    When pages run out, the running request that would go last gives up its pages and waits again. Its prompt and what
    it generated are computed anew later, less what the cache still holds of them.

    Args:
      groups: of the pages.
      max_seqs: rows, which is how many requests may run at once.
      budget: tokens that a step may have.
      decode_steps: decode steps in one dispatch, where nothing can change on the host in between.
      num_drafts: drafts per request and step.
      stats: where preemptions and the tokens of admitted prompts are counted.
    """

    def __init__(
        self,
        groups: LayerGroups,
        *,
        max_seqs: int,
        budget: int,
        decode_steps: int,
        num_drafts: int,
        stats: Stats,
    ):
        self.waiting: list[Generation] = []  # by rank
        self.running: list[Generation] = []  # in the order of admission
        self._groups = groups
        self._budget = budget
        self._decode_steps = decode_steps
        self._num_drafts = num_drafts
        self._rows = list(range(max_seqs))[::-1]  # vacant; the last one goes first
        self._stats = stats
        self._lookups: dict[Generation, PromptLookup] = {}

    # ---- requests

    def add(self, generation: Generation) -> None:
        """Queues a request behind those that go first."""
        bisect.insort(self.waiting, generation, key=_rank)

    def remove(self, generation: Generation) -> None:
        """Takes a request out, wherever it is, and frees its pages."""
        self._lookups.pop(generation, None)
        if generation.is_running:
            self._release(generation)
        elif generation in self.waiting:
            self.waiting.remove(generation)

    def requeue_all(self) -> None:
        """Puts all running requests back in the queue, as after the cache was lost."""
        for generation in list(self.running):
            self._preempt(generation)

    # ---- a step

    def plan(self, *, in_flight: bool) -> Plan | None:
        """The next step, whose tokens all have slots; None if nothing can run.

        Args:
          in_flight: True while the results of dispatched steps have not been read.

        Raises:
          NeedsResults: only what is in flight can say who gives up pages.
        """
        self._tell(self.running)
        generating = [g for g in self.running if g._pending == 1 and g._length < g._end]
        repeats = self._repeats(generating)
        chunks, preempted = self._grow(self._next_tokens(generating, repeats), in_flight)
        if repeats > 1 and all(chunk.count == 1 for chunk in chunks):
            repeats = 1
        # A step that took pages away admits nobody: they are for those who ran short.
        if not preempted:
            self._admit_waiting()
        if repeats == 1:
            chunks += self._prompts({id(c.generation) for c in chunks}, self._budget - sum(c.count for c in chunks))
            while not chunks and any(map(_has_prompt, self.running)):
                self._preempt_last(in_flight)
                chunks = self._prompts(set(), self._budget)
        return Plan(chunks, repeats) if chunks else None

    def commit(self, plan: Plan) -> None:
        """Says that a step was dispatched. Its tokens are in the cache for every step after it."""
        sure = [chunk for chunk in plan.chunks if not chunk.drafts]
        for chunk in sure:
            generation = chunk.generation
            generation._computed += chunk.count
            if chunk.samples:
                generation._in_flight += chunk.count if plan.repeats > 1 else 1
        self._mark([chunk.generation for chunk in sure])

    def confirm(self, chunk: Chunk, num_accepted: int) -> None:
        """Says how many drafts of a chunk the model confirmed; slots of the others are given back."""
        generation = chunk.generation
        generation._computed += 1 + num_accepted
        generation._slots = generation._computed
        generation._in_flight += 1 + num_accepted
        self._groups.truncate(generation._sequence, generation._computed)
        self._mark([generation])

    def _mark(self, generations: list[Generation]) -> None:
        self._groups.mark_written_batch([g._sequence for g in generations], [g._computed for g in generations])

    def _tell(self, generations: list[Generation]) -> None:
        """Tells the allocator the values of tokens that it knew by number only, so that others can find them."""
        new = [g for g in generations if g._told < len(g.tokens) and g._told < g._slots]
        if new:
            stops = [min(len(g.tokens), g._slots) for g in new]
            tokens = [g.tokens[g._told : stop] for g, stop in zip(new, stops, strict=True)]
            self._groups.tell_batch([g._sequence for g in new], tokens)
            for generation, stop in zip(new, stops, strict=True):
                generation._told = stop

    def _repeats(self, generating: list[Generation]) -> int:
        """How many decode steps can run before the host has to decide anything."""
        if self._decode_steps == 1 or self._num_drafts or not generating:
            return 1
        if any(g._pending > 1 for g in self.running):
            return 1  # prompts are still to be computed
        left = [g._end - g._length for g in generating]
        if self.waiting and (self._rows or min(left) < self._decode_steps):
            return 1  # a request waits for a row that is vacant, or soon will be
        return self._decode_steps if max(left) > 1 else 1

    def _next_tokens(self, generating: list[Generation], repeats: int) -> list[Chunk]:
        spare = self._budget - len(generating)
        chunks = []
        for generation in generating:
            left = generation._end - generation._length
            drafts: tuple[int, ...] = ()
            if (room := min(self._num_drafts, spare, left - 1)) > 0:
                lookup = self._lookups.setdefault(generation, PromptLookup())
                drafts = lookup.propose(generation.tokens, room)
                spare -= len(drafts)
            chunks.append(Chunk(generation, min(repeats, left) + len(drafts), drafts=drafts))
        return chunks

    def _grow(self, chunks: list[Chunk], in_flight: bool) -> tuple[list[Chunk], bool]:
        """Gives every token of these a slot; while pages run out, drops drafts and repeats, then preempts.

        Returns:
          The chunks of those that kept their pages, and whether any request was preempted.
        """
        preempted = False
        while True:
            counts = [max(c.generation._computed + c.count - c.generation._slots, 0) for c in chunks]
            try:
                # Whole pages alone are shared, so there is never a page to copy.
                self._groups.append_batch([c.generation._sequence for c in chunks], counts)
            except OutOfPages:
                if any(chunk.count > 1 for chunk in chunks):
                    chunks = [Chunk(chunk.generation, 1) for chunk in chunks]
                    continue
                last = self._preempt_last(in_flight)
                preempted = True
                chunks = [chunk for chunk in chunks if chunk.generation is not last]
            else:
                for chunk, count in zip(chunks, counts, strict=True):
                    chunk.generation._slots += count
                return chunks, preempted

    def _admit_waiting(self) -> None:
        while self.waiting and self._rows:
            generation = self.waiting[0]
            try:
                sequence, cached_len = self._groups.allocate(generation.tokens, generation.request.salt)
            except OutOfPages:
                return
            del self.waiting[0]
            generation._sequence, generation._row = sequence, self._rows.pop()
            generation._computed = cached_len
            generation._slots = generation._told = len(generation.tokens)
            self.running.append(generation)
            if not generation.preemptions:  # else its own tokens are found
                self._stats.prompt_tokens += len(generation.tokens)
                self._stats.cached_tokens += cached_len

    def _prompts(self, taken: set[int], budget: int) -> list[Chunk]:
        """Chunks of the prompts that are still to be computed, as far as the budget and the pages of windows go."""
        chunks = []
        for generation in self.running:
            if budget == 0:
                break
            if _has_prompt(generation) and id(generation) not in taken:
                computed, pending = generation._computed, generation._pending
                stop = computed + min(budget, pending)
                count = self._groups.reach(generation._sequence, generation.tokens, stop) - computed
                if count > 0:
                    chunks.append(Chunk(generation, count, samples=count == pending))
                    budget -= count
        return chunks

    def _preempt_last(self, in_flight: bool) -> Generation:
        """Preempts the running request that would go last, unless results in flight may give pages back."""
        if in_flight:
            raise NeedsResults from None
        last = max(self.running, key=_rank)
        self._preempt(last)
        return last

    def _preempt(self, generation: Generation) -> None:
        self._release(generation)
        generation.preemptions += 1
        self._stats.preemptions += 1
        self.add(generation)

    def _release(self, generation: Generation) -> None:
        self._tell([generation])
        self.running.remove(generation)
        self._groups.free(generation._sequence)
        self._rows.append(generation._row)
        generation._sequence, generation._row = (), -1
        generation._slots = generation._computed = generation._told = generation._in_flight = 0


def _has_prompt(generation: Generation) -> bool:
    """True if tokens of a running request are still to be computed before it can go on."""
    return generation._pending > 0 and generation._length < generation._end


def _rank(generation: Generation) -> tuple[int, int]:
    return generation._rank
