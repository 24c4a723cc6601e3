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
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from llama import Llama
from request import Generation, Request, checked_request, integer

from jax_paged_attn import Explanation, OutOfPages, PageAllocator, explain
from jax_paged_attn.nnx import CacheVariable, StepMetadata

__all__ = ["Engine", "Generation", "Request"]

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_SMALLEST_FLOAT32 = float(np.finfo(np.float32).tiny)  # of those that are not denormal, which XLA may take for 0


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
      traces: how often the step was traced: once per bucket.

    Raises:
      ValueError, TypeError: a bad argument; the message names it, what was expected and what came.
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
        num_pages = integer("num_pages", num_pages, least=1)
        page_size = integer("page_size", page_size, least=1)
        self._max_seqs = integer("max_seqs", max_seqs, least=1)
        self._buckets = _checked_buckets(buckets, self._max_seqs)
        context = model.config.max_position_embeddings
        self.max_len = integer("max_len", context if max_len is None else max_len, least=1)
        self.steps = self.tokens = self.preemptions = self.peak_pages = self.traces = 0
        self._allocator = PageAllocator(num_pages, page_size, share="written")
        self._table_width = math.ceil(self.max_len / page_size)
        self._vocab_size = model.config.vocab_size
        self._is_stepping = False
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []  # in the order of admission
        self._undelivered: deque[tuple[Generation, int]] = deque()  # computed tokens, not yet handed out

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
          ValueError, TypeError: it could never be served: a field is malformed, see `Request`, or prompt and output
            need more tokens than `max_len` or the whole pool hold. The message names the field.
        """
        request = checked_request(request, self._vocab_size)
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
        """Stops a generation and frees its pages; does nothing if it has finished.

        Raises:
          TypeError: it is no `Generation`.
          ValueError: it is another engine's.
        """
        if not isinstance(generation, Generation):
            raise TypeError(f"generation: expected a Generation, got {type(generation).__name__}")
        if generation.finish_reason is not None:
            return
        if generation not in self._waiting and generation not in self._running:
            raise ValueError("generation: expected one that this engine's submit() returned, got another engine's")
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
        """Runs the model once over as many tokens as fit, and hands out the tokens that it gives.

        An `on_token` that raises an `Exception` ends its own request. `KeyboardInterrupt` and `SystemExit` pass
        through; the next step then begins with the tokens that were not handed out.

        Raises:
          RuntimeError: called by an `on_token`.
        """
        if self._is_stepping:
            raise RuntimeError("step: expected no call from on_token, whose step has not ended")
        self._is_stepping = True
        try:
            self._hand_out()
            scheduled = self._schedule()
            if scheduled:
                self._compute(scheduled)
                self._hand_out()
        finally:
            self._is_stepping = False

    def _schedule(self) -> list[tuple[Generation, int]]:
        """The requests of this step and how many tokens of each, generating ones first. Their pages are theirs."""
        generating, preempted = self._append([g for g in self._running if g._pending == 1])

        # A step that took pages away admits nobody: they are for those who ran short.
        while not preempted and self._waiting and len(self._running) < self._max_seqs:
            if not self._admit(self._waiting[0]):
                break
            self._running.append(self._waiting.popleft())
        scheduled = [(generation, 1) for generation in generating]
        budget = self._buckets[-1] - len(scheduled)
        if len(scheduled) < len(self._running):
            taken = set(generating)
            for generation in self._running:
                count = min(budget, generation._pending)
                if generation not in taken and count > 0:
                    scheduled.append((generation, count))
                    budget -= count
        return scheduled

    def _append(self, generating: list[Generation]) -> tuple[list[Generation], bool]:
        """Gives every token of these a slot. While pages run out, the one admitted last gives up its own.

        Returns:
          Those that kept their pages, and whether any request was preempted.
        """
        preempted = False
        while True:
            new = [g for g in generating if g._slots < len(g.tokens)]
            try:
                # Whole pages alone are shared, so there is never a page to copy.
                self._allocator.append_batch([g._sequence for g in new], [g.tokens[g._slots :] for g in new])
            except OutOfPages:
                last = self._running[-1]
                self._preempt(last)
                preempted = True
                generating = [generation for generation in generating if generation is not last]
            else:
                for generation in new:
                    generation._slots = len(generation.tokens)
                return generating, preempted

    def _admit(self, generation: Generation) -> bool:
        try:
            sequence = self._allocator.allocate(generation.tokens)
        except OutOfPages:
            return False
        generation._sequence, generation._computed = sequence.id, sequence.cached_len
        generation._slots = len(generation.tokens)
        return True

    def _preempt(self, generation: Generation) -> None:
        self._release(generation)
        generation.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(generation)

    def _compute(self, scheduled: list[tuple[Generation, int]]) -> None:
        """Runs the model over the scheduled tokens, and keeps the tokens that follow for `_hand_out`."""
        total = sum(count for _, count in scheduled)
        bucket = next(size for size in self._buckets if size >= total)
        next_tokens, self._cache = self._forward(self._cache, self._weights, *self._inputs(scheduled, bucket))
        self.steps += 1
        self.peak_pages = max(self.peak_pages, self.pages_in_use)
        for (generation, count), token in zip(scheduled, np.asarray(next_tokens).tolist(), strict=False):
            generation._computed += count
            if not generation._pending:
                self._undelivered.append((generation, token))
        self._allocator.mark_written_batch([g._sequence for g, _ in scheduled], [g._computed for g, _ in scheduled])

    def _hand_out(self) -> None:
        """Gives their tokens to the generations; what an interrupt leaves stays for the next call."""
        while self._undelivered:
            generation, token = self._undelivered.popleft()
            if generation.finish_reason is None:  # another one's on_token may have cancelled it
                self._advance(generation, token)

    def _advance(self, generation: Generation, token: int) -> None:
        request = generation.request
        if token in request.stop_tokens:
            self._finish(generation, "stop")
            return
        generation.tokens.append(token)
        self.tokens += 1
        if len(generation.tokens) == len(request.prompt) + request.max_new_tokens:
            self._finish(generation, "length")
        if request.on_token is not None:
            self._call_back(generation, request.on_token, token)

    def _call_back(self, generation: Generation, on_token: Callable[[int], object], token: int) -> None:
        """An exception of `on_token` is its own request's end and nobody else's."""
        try:
            on_token(token)
        except Exception as error:
            generation.error = error
            self._finish(generation, "error")

    def _finish(self, generation: Generation, reason: str) -> None:
        """Frees what the generation holds, if it still waits or runs, and says why it ended."""
        if generation in self._running:
            self._release(generation)
        elif generation in self._waiting:
            self._waiting.remove(generation)
        generation.finish_reason = reason

    def _release(self, generation: Generation) -> None:
        self._running.remove(generation)
        self._allocator.free(generation._sequence)
        generation._sequence, generation._slots, generation._computed = -1, 0, 0

    def _inputs(
        self, scheduled: list[tuple[Generation, int]], bucket: int
    ) -> tuple[np.ndarray, StepMetadata, _Sampling]:
        """The step's arrays: T = `bucket` tokens, B = `max_seqs` sequences, of which `len(scheduled)` are live."""
        generations, counts = [g for g, _ in scheduled], [count for _, count in scheduled]
        arrays = self._allocator.step(
            [generation._sequence for generation in generations],
            counts,
            num_tokens=bucket,
            max_seqs=self._max_seqs,
            max_pages=self._table_width,
        )
        tokens = np.zeros(bucket, np.int32)
        tokens[: sum(counts)] = [t for g, n in scheduled for t in g.tokens[g._computed : g._computed + n]]
        return tokens, StepMetadata.from_arrays(arrays), _sampling(generations, self._max_seqs)

    def _model_step(
        self, cache: nnx.State, weights: nnx.State, tokens: Array, step: StepMetadata, sampling: _Sampling
    ) -> tuple[Array, nnx.State]:
        """The jitted step: next token of each sequence `[B]` (of use where all its tokens are in), and the cache."""
        model = nnx.merge(self._graphdef, cache, weights)
        hidden = model.hidden(tokens, step)
        last_rows = jnp.maximum(step.cu_q_lens[1:] - 1, 0)
        next_tokens = _sample(model.logits(hidden[last_rows]), step.kv_lens, sampling)
        return next_tokens, nnx.state(model, CacheVariable)


def _sampling(generations: list[Generation], rows: int) -> _Sampling:
    """The sampling that requests ask for, padded with greedy rows."""
    live = len(generations)
    temperature, top_p = np.zeros(rows, np.float32), np.ones(rows, np.float32)
    seed = np.zeros(rows, np.uint32)
    temperature[:live] = [min(g.request.temperature, _LARGEST_FLOAT32) for g in generations]
    top_p[:live] = [g.request.top_p for g in generations]
    seed[:live] = [g.request.seed for g in generations]
    return _Sampling(temperature, top_p, seed)


def _checked_buckets(buckets: Sequence[int], max_seqs: int) -> list[int]:
    """The sizes in ascending order, each once."""
    if not isinstance(buckets, Sequence) or isinstance(buckets, str | bytes) or not buckets:
        raise TypeError(f"buckets: expected a sequence of at least one number of tokens, got {buckets!r}")
    sizes = sorted({integer(f"buckets[{index}]", size, least=1) for index, size in enumerate(buckets)})
    if sizes[-1] < max_seqs:
        raise ValueError(f"buckets: expected a largest of at least max_seqs = {max_seqs}, got {buckets}")
    return sizes


def _sample(logits: Array, lengths: Array | np.ndarray, sampling: _Sampling) -> Array:
    """int32 `[B]` from float32 logits `[B, vocab]`; a draw depends on the request's seed and length alone."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature = jnp.asarray(sampling.temperature)

    def draw() -> Array:
        # The largest becomes 0, so that no temperature divides it to infinity: exp(inf − inf) is NaN.
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled /= jnp.maximum(temperature, _SMALLEST_FLOAT32)[:, None]
        keys = jax.vmap(lambda seed, length: jax.random.fold_in(jax.random.key(seed), length))(sampling.seed, lengths)
        drawn = jax.vmap(jax.random.categorical)(keys, _nucleus(scaled, jnp.asarray(sampling.top_p)))
        return jnp.where(temperature > 0, drawn.astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)


def _nucleus(logits: Array, top_p: Array) -> Array:
    """`logits [B, vocab]` with −inf but for the likeliest that together have probability `top_p [B]`, at least one."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # A top_p of 0, which the smallest become in float32, keeps the best; the rounded sum may pass 1 before the end.
    kept = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    least = jnp.min(descending, axis=-1, initial=jnp.inf, where=kept.at[:, 0].set(True))
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)
