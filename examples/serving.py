"""Continuous batching over one paged cache.

Each step of the engine runs the model once, over tokens of many requests in one row: first one token of every request
that is generating, then chunks of the prompts that are still to be computed, as far as the step has room. Shapes are
static: a step has as many tokens as the smallest of a few buckets that holds them, the rest is padding with slot −1, so
that nothing is compiled after the first step of each bucket.

When pages run out, the request admitted last gives up its pages and waits at the head of the queue; its prompt and what
it generated are computed anew when it is admitted again, less what the cache still holds of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from llama import Llama

from jax_paged_attn import Explanation, OutOfPages, PageAllocator, explain
from jax_paged_attn.nnx import CacheVariable, StepMetadata


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: at most this many are generated.
      stop_tokens: ids that end the generation; they are not part of the output.
      temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
      top_p: draw from the likeliest tokens only that together have this probability.
      seed: of the draws; the same request gives the same tokens, whatever else is served.
      on_token: called with each new token.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_tokens: Collection[int] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    on_token: Callable[[int], None] | None = None


@dataclasses.dataclass(eq=False)
class Generation:
    """A request and how far it is.

    Attributes:
      tokens: the prompt, then what was generated.
      finish_reason: "length", "stop" or "cancelled"; None while there is more to come.
      preemptions: how often its pages were taken away.
    """

    request: Request
    tokens: list[int]
    finish_reason: str | None = None
    preemptions: int = 0
    _sequence: int = -1  # the allocator's id, while admitted
    _computed: int = 0  # leading tokens that are in the cache

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def _pending(self) -> int:
        return len(self.tokens) - self._computed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sampling:
    """How to choose the next token of each sequence of a step, `[B]` each."""

    temperature: Array | np.ndarray
    top_p: Array | np.ndarray
    seed: Array | np.ndarray


class Engine:
    """Serves requests with a model.

    Args:
      model: weights; the engine gives it a cache.
      num_pages, page_size: the pool of every layer.
      max_seqs: B, requests that may be in one step.
      max_len: prompt and output of a request together; by default the model's context.
      buckets: numbers of tokens that a step may have, the largest at least `max_seqs`.
      cache_dtype, scales: see `Llama.init_cache`.

    Attributes:
      steps, tokens, preemptions, peak_pages: counted since the engine was made; tokens are generated ones.
      traces: how often the step was traced: once a bucket.
    """

    def __init__(
        self,
        model: Llama,
        *,
        num_pages: int,
        page_size: int = 16,
        max_seqs: int = 8,
        max_len: int | None = None,
        buckets: Sequence[int] = (8, 64, 256),
        cache_dtype: DTypeLike | None = None,
        scales: Sequence[tuple[ArrayLike, ArrayLike]] | None = None,
    ):
        if max_seqs < 1:
            raise ValueError(f"max_seqs: expected at least 1, got {max_seqs}")
        if not buckets or min(buckets) < 1 or max(buckets) < max_seqs:
            raise ValueError(f"buckets: expected sizes with a largest of at least max_seqs = {max_seqs}, got {buckets}")
        self.max_len = max_len or model.config.max_position_embeddings
        self.steps = self.tokens = self.preemptions = self.peak_pages = self.traces = 0
        self._allocator = PageAllocator(num_pages, page_size, share="written")
        self._max_seqs = max_seqs
        self._table_width = math.ceil(self.max_len / page_size)
        self._buckets = sorted(buckets)
        self._vocab_size = model.config.vocab_size
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []  # in the order of admission

        model.init_cache(num_pages, page_size, cache_dtype, scales)
        self._graphdef, self._cache, self._weights = nnx.split(model, CacheVariable, ...)

        def counted(*arguments) -> tuple[Array, nnx.State]:
            self.traces += 1  # Python runs this when JAX traces it
            return self._model_step(*arguments)

        self._forward = jax.jit(counted, donate_argnums=0)

    @property
    def num_pages(self) -> int:
        return self._allocator.num_pages

    @property
    def pages_in_use(self) -> int:
        return self._allocator.pages_in_use

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def explain(self) -> Explanation:
        """Which attention engine the steps run on, and why on no other."""
        return explain(self._model_step, self._cache, self._weights, *self._inputs([], self._buckets[0]))

    # ---- requests

    def submit(self, request: Request) -> Generation:
        """Queues a request.

        Raises:
          ValueError: it could never be served: an empty prompt, ids outside the vocabulary, or more tokens than
            `max_len` or the whole pool hold.
        """
        if not request.prompt:
            raise ValueError("prompt: expected at least one token, got none")
        if not all(0 <= token < self._vocab_size for token in request.prompt):
            raise ValueError(f"prompt: expected token ids in [0, {self._vocab_size})")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {request.max_new_tokens}")
        if request.temperature < 0 or not 0 < request.top_p <= 1:
            raise ValueError(
                f"temperature, top_p: expected at least 0 and in (0, 1], got {request.temperature}, {request.top_p}"
            )
        length = len(request.prompt) + request.max_new_tokens
        room = min(self.max_len, self._allocator.num_pages * self._allocator.page_size)
        if length > room:
            raise ValueError(
                f"prompt, max_new_tokens: expected at most {room} tokens together (max_len is {self.max_len}, the pool "
                f"has {self._allocator.num_pages} pages of {self._allocator.page_size}), got {length}"
            )
        generation = Generation(request, list(request.prompt))
        self._waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Stops a generation and frees its pages; does nothing if it has finished."""
        if generation in self._waiting:
            self._waiting.remove(generation)
            generation.finish_reason = "cancelled"
        elif generation in self._running:
            self._finish(generation, "cancelled")

    def run(self) -> None:
        """Steps until every request has finished."""
        while self.has_work:
            self.step()

    def warm_up(self) -> None:
        """Compiles the step for every bucket, with steps that hold no token."""
        for bucket in self._buckets:
            _, self._cache = self._forward(self._cache, self._weights, *self._inputs([], bucket))

    # ---- one step

    def step(self) -> None:
        """Runs the model once over as many tokens as fit, and hands out the tokens that it gives."""
        scheduled = self._schedule()
        if not scheduled:
            return
        total = sum(count for _, count in scheduled)
        bucket = next(size for size in self._buckets if size >= total)
        next_tokens, self._cache = self._forward(self._cache, self._weights, *self._inputs(scheduled, bucket))
        self.steps += 1
        self.peak_pages = max(self.peak_pages, self.pages_in_use)
        for (generation, count), token in zip(scheduled, np.asarray(next_tokens).tolist(), strict=False):
            if generation.finish_reason is None:  # another one's on_token may have cancelled it
                self._advance(generation, count, token)

    def _schedule(self) -> list[tuple[Generation, int]]:
        """The requests of this step and how many tokens of each, generating ones first. Their pages are theirs."""
        scheduled: list[tuple[Generation, int]] = []
        preempted = False
        for generation in list(self._running):
            if generation._pending != 1:
                continue
            while generation in self._running and not self._has_slot(generation):
                self._preempt(self._running[-1])
                preempted = True
            if generation in self._running:
                scheduled.append((generation, 1))

        # A step that took pages away admits nobody: they are for those who ran short.
        while not preempted and self._waiting and len(self._running) < self._max_seqs:
            if not self._admit(self._waiting[0]):
                break
            self._running.append(self._waiting.popleft())
        budget = self._buckets[-1] - len(scheduled)
        generating = {generation for generation, _ in scheduled}
        for generation in self._running:
            count = min(budget, generation._pending)
            if generation not in generating and count > 0:
                scheduled.append((generation, count))
                budget -= count
        return scheduled

    def _has_slot(self, generation: Generation) -> bool:
        """Makes sure that every token of the generation has a slot; False if no page is left."""
        known = self._allocator.length(generation._sequence)
        try:
            # Whole pages alone are shared, so there is never a page to copy.
            self._allocator.append(generation._sequence, generation.tokens[known:])
        except OutOfPages:
            return False
        return True

    def _admit(self, generation: Generation) -> bool:
        try:
            sequence = self._allocator.allocate(generation.tokens)
        except OutOfPages:
            return False
        generation._sequence, generation._computed = sequence.id, sequence.cached_len
        return True

    def _preempt(self, generation: Generation) -> None:
        self._release(generation)
        generation.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(generation)

    def _advance(self, generation: Generation, count: int, next_token: int) -> None:
        """Takes note that `count` tokens were computed and, if these were all, of the token that follows them."""
        generation._computed += count
        self._allocator.mark_written(generation._sequence, generation._computed)
        if generation._pending:
            return
        request = generation.request
        if next_token in request.stop_tokens:
            self._finish(generation, "stop")
            return
        generation.tokens.append(next_token)
        self.tokens += 1
        if len(generation.output) == request.max_new_tokens:
            self._finish(generation, "length")
        if request.on_token is not None:
            request.on_token(next_token)

    def _finish(self, generation: Generation, reason: str) -> None:
        self._release(generation)
        generation.finish_reason = reason

    def _release(self, generation: Generation) -> None:
        self._running.remove(generation)
        self._allocator.free(generation._sequence)
        generation._sequence, generation._computed = -1, 0

    def _inputs(
        self, scheduled: list[tuple[Generation, int]], bucket: int
    ) -> tuple[np.ndarray, StepMetadata, _Sampling]:
        """The step's arrays: T = `bucket` tokens, B = `max_seqs` sequences, of which `len(scheduled)` are live."""
        rows = self._max_seqs
        tokens = np.zeros(bucket, np.int32)
        positions = np.zeros(bucket, np.int32)
        slots = np.full(bucket, -1, np.int32)
        tables = np.full((rows, self._table_width), -1, np.int32)
        kv_lens = np.zeros(rows, np.int32)
        cu_q_lens = np.zeros(rows + 1, np.int32)
        temperature, top_p = np.zeros(rows, np.float32), np.ones(rows, np.float32)
        seed = np.zeros(rows, np.uint32)

        tables[: len(scheduled)] = self._allocator.block_tables([g._sequence for g, _ in scheduled], self._table_width)
        end = 0
        for row, (generation, count) in enumerate(scheduled):
            first, last = generation._computed, generation._computed + count
            begin, end = end, end + count
            tokens[begin:end] = generation.tokens[first:last]
            positions[begin:end] = np.arange(first, last)
            slots[begin:end] = self._allocator.slots(generation._sequence, first, last)
            kv_lens[row] = last
            cu_q_lens[row + 1 :] = end
            temperature[row] = generation.request.temperature
            top_p[row] = generation.request.top_p
            seed[row] = generation.request.seed
        step = StepMetadata(positions, slots, tables, kv_lens, cu_q_lens, np.array(len(scheduled), np.int32))
        return tokens, step, _Sampling(temperature, top_p, seed)

    def _model_step(
        self, cache: nnx.State, weights: nnx.State, tokens: Array, step: StepMetadata, sampling: _Sampling
    ) -> tuple[Array, nnx.State]:
        """The jitted step: next token of each sequence `[B]` (of use where all its tokens are in), and the cache."""
        model = nnx.merge(self._graphdef, cache, weights)
        hidden = model.hidden(tokens, step)
        last_rows = jnp.maximum(step.cu_q_lens[1:] - 1, 0)
        next_tokens = _sample(model.logits(hidden[last_rows]), step.kv_lens, sampling)
        return next_tokens, nnx.state(model, CacheVariable)


def _sample(logits: Array, lengths: Array | np.ndarray, sampling: _Sampling) -> Array:
    """int32 `[B]` from float32 logits `[B, vocab]`; a draw depends on the request's seed and length alone."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature = jnp.asarray(sampling.temperature)

    def draw() -> Array:
        scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        descending = jnp.sort(scaled, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = before < jnp.asarray(sampling.top_p)[:, None]
        least = jnp.min(descending, axis=-1, initial=jnp.inf, where=kept)
        keys = jax.vmap(lambda seed, length: jax.random.fold_in(jax.random.key(seed), length))(sampling.seed, lengths)
        drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(scaled >= least[:, None], scaled, -jnp.inf))
        return jnp.where(temperature > 0, drawn.astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)
