"""Continuous batching over one paged cache, with the host hidden behind the device.

Each call of `Engine.step` dispatches a step and then reads the results of the one before it, which the device computed
in the meantime. Sampled tokens stay on the device, where the next step finds them; the host learns them a step late.
So a request that a stop token ends may have one more dispatch behind it, whose tokens nobody sees.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_paged_attn import Explanation, explain
from jax_paged_attn.serving._drafts import accepted
from jax_paged_attn.serving._groups import LayerGroups, checked_windows, group_pages
from jax_paged_attn.serving._model import GroupedModel, Model, grouped
from jax_paged_attn.serving._pool import PoolView, view_pool
from jax_paged_attn.serving._programs import Kind, Programs, Sampled
from jax_paged_attn.serving._requests import Generation, QueueFull, Request, TokenLogprobs, checked_request, integer
from jax_paged_attn.serving._schedule import NeedsResults, Plan, Scheduler
from jax_paged_attn.serving._stats import Stats
from jax_paged_attn.serving._text import OutputText, Tokenizer


@dataclasses.dataclass
class _Ticket:
    """A dispatched step whose results the host has not read."""

    plan: Plan
    sampled: Sampled


@dataclasses.dataclass(frozen=True)
class Pool:
    """The pages of a layer group: each of its layers has a pool of so many.

    Attributes:
      window: of the group's layers, in tokens; None if they see everything.
      num_pages: pages in the pool.
      pages_in_use: pages that running requests hold now.

    Example:
      >>> from jax_paged_attn.serving import Pool
      >>> Pool(window=1024, num_pages=2398, pages_in_use=0).window
      1024
    """

    window: int | None
    num_pages: int
    pages_in_use: int


class Engine:
    """Serves requests with a model.

    Shapes are static: a step has as many tokens as the smallest of a few buckets that holds them, the rest is padding.
    So nothing is compiled after `warm_up`, or after the first step of each kind.

    Args:
      model: see `Model`, and `GroupedModel` for layers with different windows.
      num_pages, page_size: the pool of every layer, but for those of layer groups with a window.
      window_pages: the pool of every layer of a layer group with a window; by default what `group_pages` says. With
        fewer pages, requests may be preempted; with more, prefixes stay longer in the cache.
      max_seqs: requests that may run at once.
      max_len: prompt and output of a request together; by default the model's context.
      buckets: numbers of tokens that a step with prompts may have, the largest at least `max_seqs`. The largest is the
        budget of a step: what is left of it after one token per generating request goes to chunks of prompts.
      decode_buckets: numbers of sequences that a step without prompts may have; those below `max_seqs` count, and
        `max_seqs` is added.
      decode_steps: decode steps that run in one dispatch while no request can come, go or be preempted. Tokens then
        arrive in as many at a time. With drafts it is always one step.
      num_drafts: tokens per request and step that are proposed by prompt lookup and verified by the model. With drafts
        the host reads each step before the next one, so they pay where they are often right, as in code and quotes.
      max_waiting: requests that may wait; None for any number.
      max_logprobs: the most likely tokens of which a request may ask log probabilities.
      tokenizer: for stop strings and `Generation.text`.
      compiler_options: XLA's, as `jax.jit` takes them, for all steps.

    Attributes:
      stats: what was counted so far.
      max_len: see above.

    Raises:
      ValueError, TypeError: a bad argument; the message names it, what was expected and what came.

    Example:
      A model that counts, which needs no attention; see `Model` for one that does.

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
      >>> engine = Engine(Counting(), num_pages=16, max_seqs=2)
      >>> generations = [engine.submit(Request([first], max_new_tokens=3)) for first in (10, 20)]
      >>> engine.run()
      >>> [generation.output for generation in generations]
      [[11, 12, 13], [21, 22, 23]]
      >>> engine.stats.tokens
      6
    """

    def __init__(
        self,
        model: Model | GroupedModel,
        *,
        num_pages: int,
        page_size: int = 16,
        window_pages: int | None = None,
        max_seqs: int = 8,
        max_len: int | None = None,
        buckets: Sequence[int] = (8, 64, 256),
        decode_buckets: Sequence[int] = (1, 8, 64),
        decode_steps: int = 1,
        num_drafts: int = 0,
        max_waiting: int | None = None,
        max_logprobs: int = 5,
        tokenizer: Tokenizer | None = None,
        compiler_options: Mapping[str, Any] | None = None,
    ):
        _check_members("model", model, Model, ("vocab_size", "max_len", "weights", "make_cache", "hidden", "logits"))
        if tokenizer is not None:
            _check_members("tokenizer", tokenizer, Tokenizer, ("encode", "decode", "stream"))
        num_pages = integer("num_pages", num_pages, least=1)
        page_size = integer("page_size", page_size, least=1)
        self._max_seqs = integer("max_seqs", max_seqs, least=1)
        self._buckets = _checked_buckets("buckets", buckets)
        if self._buckets[-1] < self._max_seqs:
            raise ValueError(f"buckets: expected a largest of at least max_seqs = {self._max_seqs}, got {buckets}")
        fitting = [size for size in _checked_buckets("decode_buckets", decode_buckets) if size < self._max_seqs]
        self._decode_buckets = [*fitting, self._max_seqs]
        self.max_len = integer("max_len", model.max_len if max_len is None else max_len, least=1)
        self._num_drafts = integer("num_drafts", num_drafts, least=0)
        self._max_waiting = None if max_waiting is None else integer("max_waiting", max_waiting, least=0)
        self._max_logprobs = min(integer("max_logprobs", max_logprobs, least=0), model.vocab_size)
        self._decode_steps = integer("decode_steps", decode_steps, least=1)
        self._model = grouped(model)
        self._tokenizer = tokenizer
        self.stats = Stats()
        self._groups = self._make_groups(num_pages, page_size, window_pages)
        self._scheduler = Scheduler(
            self._groups,
            max_seqs=self._max_seqs,
            budget=self._buckets[-1],
            decode_steps=self._decode_steps,
            num_drafts=self._num_drafts,
            stats=self.stats,
        )
        self._submitted = 0
        self._is_stepping = False
        self._tickets: deque[_Ticket] = deque()
        self._undelivered: deque[tuple[Generation, int, TokenLogprobs | None]] = deque()

        # The cache comes first: a module may keep its scales among its weights.
        self._cache, cache_tree = jax.tree.flatten(self._model.make_cache(self._groups.num_pages, page_size))
        leaves, weights_tree = jax.tree.flatten(model.weights)
        self._weights = [jnp.asarray(leaf) for leaf in leaves]  # else NumPy's would go to the device in each step
        self._programs = Programs(
            self._model,
            self._cache,
            cache_tree,
            weights_tree,
            page_size=page_size,
            table_width=math.ceil(self.max_len / page_size),
            max_seqs=self._max_seqs,
            num_drafts=self._num_drafts,
            max_logprobs=self._max_logprobs,
            compiler_options=compiler_options,
        )
        self._last = self._no_tokens()

    def _make_groups(self, num_pages: int, page_size: int, window_pages: int | None) -> LayerGroups:
        windows = checked_windows(self._model.windows)
        if window_pages is None:
            sizes = {"max_seqs": self._max_seqs, "step_tokens": self._buckets[-1], "decode_steps": self._decode_steps}
            pages = group_pages(windows, num_pages=num_pages, page_size=page_size, **sizes)
        else:
            window_pages = integer("window_pages", window_pages, least=1)
            pages = tuple(num_pages if window is None else window_pages for window in windows)
        return LayerGroups(windows, pages, page_size)

    @property
    def num_pages(self) -> int:
        """Pages of the pool; those of all layer groups together."""
        return sum(self._groups.num_pages)

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self._groups.page_size

    @property
    def longest(self) -> int:
        """The most tokens that prompt and output of a request may have: as many as `max_len` and each pool hold."""
        in_pools = self._groups.longest
        return self.max_len if in_pools is None else min(self.max_len, in_pools)

    @property
    def pages_in_use(self) -> int:
        """Pages that running requests hold; those of all layer groups together."""
        return sum(self._groups.pages_in_use)

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The pages of each layer group, in the order of the model's windows."""
        return tuple(Pool(a.window, a.num_pages, a.pages_in_use) for a in self._groups.allocators)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, of all layers and devices together."""
        return sum(leaf.nbytes for leaf in self._cache)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return len(self._scheduler.running)

    @property
    def traces(self) -> int:
        """How often a step was traced: once per kind."""
        return self._programs.traces

    @property
    def has_work(self) -> bool:
        """True while some request has not ended."""
        return bool(self._scheduler.waiting or self._scheduler.running or self._undelivered)

    def pool_view(self) -> PoolView:
        """Who has which page now, and what was counted so far; for a display. Not while `step` runs in another thread.

        The time that it takes grows with the pages in use, and does not touch the device.
        """
        return view_pool(self._groups, self._scheduler.running, waiting=self.num_waiting, stats=self.stats)

    def explain(self) -> Explanation:
        """Which attention engine steps with prompts run on, and why on no other."""
        kind = Kind(self._buckets[0], 0, samples=False, logprobs=False)
        operand = self._programs.operand(kind, None, self._groups)
        return explain(self._programs.function(kind), self._weights, self._cache, self._last, operand)

    # ---- requests

    def submit(self, request: Request) -> Generation:
        """Queues a request.

        Raises:
          ValueError, TypeError: it could never be served: a field is malformed, see `Request`, or prompt and output
            need more tokens than `max_len` or the whole pool hold. The message names the field.
          QueueFull: `max_waiting` requests wait already.
        """
        request = checked_request(
            request,
            self._model.vocab_size,
            max_logprobs=self._max_logprobs,
            has_tokenizer=self._tokenizer is not None,
        )
        length = len(request.prompt) + request.max_new_tokens
        if length > self.longest:
            pages = " and ".join(map(str, self._groups.num_pages))
            raise ValueError(
                f"prompt, max_new_tokens: expected at most {self.longest} tokens together (max_len is {self.max_len}, "
                f"the pool has {pages} pages of {self._groups.page_size}), got {length}"
            )
        if self._max_waiting is not None and self.num_waiting >= self._max_waiting:
            raise QueueFull(f"request: expected fewer than max_waiting = {self._max_waiting} requests in the queue")
        text = None if self._tokenizer is None else OutputText(self._tokenizer, list(request.prompt), request.stop)
        self._submitted += 1
        generation = Generation(
            request,
            list(request.prompt),
            _text=text,
            _decoded=len(request.prompt),
            _arrival=self._submitted,
            _submitted=time.monotonic(),
        )
        self._scheduler.add(generation)
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
        if generation not in self._scheduler.waiting and generation not in self._scheduler.running:
            raise ValueError("generation: expected one that this engine's submit() returned, got another engine's")
        self._finish(generation, "cancelled")

    def update_weights(self, weights: Any) -> None:
        """Takes new weights from the next step on, and forgets all prefixes.

        Running requests go on, over the keys and values that the old weights gave them.

        Args:
          weights: a pytree as `Model.weights`, with the same shapes and dtypes; placed where the old ones are.

        Raises:
          ValueError: another structure, shape or dtype.
        """
        leaves, tree = jax.tree.flatten(weights)
        if tree != (expected := self._programs.weights_tree):
            raise ValueError(f"weights: expected the structure {expected}, got {tree}")
        for index, (old, new) in enumerate(zip(self._weights, leaves, strict=True)):
            if (np.shape(new), jnp.result_type(new)) != (old.shape, old.dtype):
                raise ValueError(
                    f"weights: expected leaf {index} as {old.dtype}{list(old.shape)}, "
                    f"got {jnp.result_type(new)}{list(np.shape(new))}"
                )
        self._weights = [jax.device_put(new, old.sharding) for old, new in zip(self._weights, leaves, strict=True)]
        self._groups.reset_prefix_cache()

    def run(self) -> None:
        """Steps until every request has finished."""
        while self.has_work:
            self.step()

    def warm_up(self, *, samples: bool | None = None, logprobs: bool = False) -> None:
        """Compiles the steps of all sizes, with steps that hold no token.

        Args:
          samples: True for steps in which some request has a temperature, False for greedy ones, None for both.
          logprobs: True for steps in which some request wants log probabilities.
        """
        repeats = {1} if self._num_drafts else {1, self._decode_steps}
        sizes = [(size, 0) for size in self._buckets] + [(s, r) for s in self._decode_buckets for r in sorted(repeats)]
        for draws in (False, True) if samples is None else (samples,):
            for size, repeat in sizes:
                kind = Kind(size, repeat, draws, logprobs)
                operand = self._programs.operand(kind, None, self._groups)
                _, self._last, self._cache = self._programs(kind)(self._weights, self._cache, self._last, operand)

    # ---- one step

    def step(self) -> None:
        """Dispatches the next step, then waits for the one before it and hands out its tokens.

        An `on_token` that raises an `Exception` ends its own request. `KeyboardInterrupt` and `SystemExit` pass
        through; the next step then begins with the tokens that were not handed out.

        Raises:
          RuntimeError: called by an `on_token`.
          Exception: what the model or the device raised. No request is lost: those that ran are computed anew if the
            cache is gone, and the next call goes on.
        """
        if self._is_stepping:
            raise RuntimeError("step: expected no call from on_token, whose step has not ended")
        self._is_stepping = True
        began, waited = time.perf_counter(), self.stats.wait_seconds
        try:
            self._hand_out()
            if not self._cache:
                self._renew_cache()
            if self._num_drafts:
                self._read_all()  # the next drafts depend on what was sampled
            plan = self._plan()
            if plan is not None:
                self._dispatch(plan)
            while len(self._tickets) > (0 if plan is None or self._num_drafts else 1):
                self._read()
        finally:
            self._is_stepping = False
            waited = self.stats.wait_seconds - waited
            self.stats.host_seconds += time.perf_counter() - began - waited

    def _plan(self) -> Plan | None:
        while True:
            try:
                return self._scheduler.plan(in_flight=bool(self._tickets))
            except NeedsResults:
                self._read_all()

    def _dispatch(self, plan: Plan) -> None:
        requests = [chunk.generation.request for chunk in plan.chunks]
        samples = any(request.temperature > 0 for request in requests)
        logprobs = any(request.logprobs is not None for request in requests)
        if plan.is_decode:
            size, repeats = _smallest(self._decode_buckets, len(plan.chunks)), plan.repeats
        else:
            size, repeats = _smallest(self._buckets, plan.num_tokens), 0
        kind = Kind(size, repeats, samples, logprobs)
        operand = self._programs.operand(kind, plan, self._groups)
        try:
            sampled, self._last, self._cache = self._programs(kind)(self._weights, self._cache, self._last, operand)
        except Exception:
            self._recover()
            raise
        self._scheduler.commit(plan)
        for leaf in jax.tree.leaves(sampled):
            leaf.copy_to_host_async()
        self._tickets.append(_Ticket(plan, sampled))
        self.stats.dispatches += 1
        self.stats.steps += max(repeats, 1)
        self.stats.peak_pages = max(self.stats.peak_pages, self.pages_in_use)

    def _read_all(self) -> None:
        while self._tickets:
            self._read()

    def _read(self) -> None:
        """Waits for the oldest step and hands out its tokens, before the next one, whose error may requeue all."""
        ticket, began = self._tickets[0], time.perf_counter()
        try:
            tokens, logprobs = jax.tree.map(np.asarray, tuple(ticket.sampled))
        except Exception:
            self._recover(lost=True)
            raise
        finally:
            self.stats.wait_seconds += time.perf_counter() - began
        self._tickets.popleft()
        is_decode, repeats = ticket.plan.is_decode, ticket.plan.repeats
        columns = tokens.T.tolist() if is_decode else tokens.tolist()
        for index, chunk in enumerate(ticket.plan.chunks):
            generation = chunk.generation
            if generation.finish_reason is not None or not chunk.samples:
                continue
            if chunk.drafts:
                number = accepted(chunk.drafts, columns[index])
                self._scheduler.confirm(chunk, number)
                self.stats.drafted += len(chunk.drafts)
                self.stats.accepted += number
                number += 1
            else:
                number = chunk.count if repeats > 1 else 1
            for place, token in enumerate(columns[index][:number]):
                at = (place, index) if is_decode else (index, place)
                self._undelivered.append((generation, token, _logprobs_at(generation, logprobs, at)))
        self._hand_out()

    def _recover(self, *, lost: bool = False) -> None:
        """After an error of a step: where it took the cache with it, makes a new one and queues all that ran."""
        lost = lost or any(leaf.is_deleted() for leaf in [*self._cache, self._last])
        if not lost:
            return
        self._tickets.clear()
        self._scheduler.requeue_all()
        self._groups.reset_prefix_cache()
        self._cache = []  # its memory is needed for the new one
        self._renew_cache()

    def _renew_cache(self) -> None:
        """Makes an empty cache in place of a lost one. If there is no memory for it now, the next step tries again."""
        pool = self._groups.num_pages, self._groups.page_size
        self._cache = jax.tree.leaves(self._model.make_cache(*pool))
        self._last = self._no_tokens()

    def _no_tokens(self) -> Array:
        tokens = np.zeros(self._max_seqs, np.int32)
        return jax.device_put(tokens, self._programs.replicated or self._cache[0].sharding)

    # ---- handing out

    def _hand_out(self) -> None:
        """Gives their tokens to the generations; what an interrupt leaves stays for the next call."""
        while self._undelivered:
            generation, token, logprobs = self._undelivered.popleft()
            if generation.finish_reason is None:  # a stop token in front, or another one's on_token, may have ended it
                generation._in_flight -= 1
                self._advance(generation, token, logprobs)

    def _advance(self, generation: Generation, token: int, logprobs: TokenLogprobs | None) -> None:
        request = generation.request
        if token in request.stop_tokens:
            self._finish(generation, "stop")
            return
        generation.tokens.append(token)
        if logprobs is not None:
            generation.logprobs.append(logprobs)
        self.stats.tokens += 1
        self._time(generation)
        if request.stop and self._guarded(generation, generation._decode):
            self._finish(generation, "stop")
        elif generation.finish_reason is None and len(generation.tokens) == generation._end:
            self._finish(generation, "length")
        if request.on_token is not None:
            self._guarded(generation, request.on_token, token)

    def _time(self, generation: Generation) -> None:
        now, stats = time.monotonic(), self.stats
        if len(generation.tokens) == len(generation.request.prompt) + 1:
            stats.first_tokens += 1
            stats.first_token_seconds += now - generation._submitted
        else:
            stats.later_tokens += 1
            stats.later_token_seconds += now - generation._last_token
        generation._last_token = now

    def _guarded(self, generation: Generation, call: Callable[..., Any], *arguments: Any) -> Any:
        """Calls an `on_token` or a tokenizer: their exception is that request's end and nobody else's."""
        try:
            return call(*arguments)
        except Exception as error:
            generation.error = error
            self._finish(generation, "error")

    def _finish(self, generation: Generation, reason: str) -> None:
        """Frees what the generation holds, if it still waits or runs, and says why it ended."""
        self._scheduler.remove(generation)
        self.stats.finished += generation.finish_reason is None
        generation.finish_reason = reason


def _logprobs_at(generation: Generation, logprobs: Any, at: tuple[int, int]) -> TokenLogprobs | None:
    number = generation.request.logprobs
    if number is None:
        return None
    top = zip(logprobs.top_tokens[at][:number].tolist(), logprobs.top[at][:number].tolist(), strict=True)
    return TokenLogprobs(float(logprobs.chosen[at]), tuple(top))


def _smallest(sizes: list[int], least: int) -> int:
    return next(size for size in sizes if size >= least)


def _check_members(name: str, value: Any, protocol: type, members: Sequence[str]) -> None:
    """Raises `TypeError` for what cannot be meant; the types of members are not looked at."""
    if not all(hasattr(value, member) for member in members):
        listed = ", ".join(map(repr, members))
        raise TypeError(f"{name}: expected a {protocol.__name__}, which has {listed}, got {reprlib.repr(value)}")


def _checked_buckets(name: str, buckets: Sequence[int]) -> list[int]:
    """The sizes in ascending order, each once."""
    if not isinstance(buckets, Sequence) or isinstance(buckets, str | bytes) or not buckets:
        raise TypeError(f"{name}: expected a sequence of at least one number of tokens, got {buckets!r}")
    return sorted({integer(f"{name}[{index}]", size, least=1) for index, size in enumerate(buckets)})
