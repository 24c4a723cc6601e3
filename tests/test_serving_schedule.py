"""The engine's schedule: random traffic over a model whose tokens tell at once where a page was lost or mixed up.

`HistoryModel` computes a hash of all tokens so far from what it finds in the cache, and `oracle` computes the same
without a cache. Whatever is submitted, cancelled, preempted or found, each output has to be a prefix of the oracle's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jax_paged_attn import StepMetadata
from jax_paged_attn.serving import Engine, Generation, QueueFull, Request

VOCAB = 13
PAGE_SIZE = 4
MAX_PROMPT, MAX_NEW = 24, 20
MAX_SEQS = 4
MAX_WAITING = 6
MOST_PAGES, FEWEST_PAGES = 24, 11  # the longest request needs 11
WINDOW = 6  # of the first layer, where the model has layer groups
ALWAYS, RARELY = 8, 1  # in how many of 8 cases the hash decides


def mix(x: Any) -> Any:
    """A hash in [0, 2³²) of a Python integer, or of each element of a uint32 array."""
    number = int if isinstance(x, int) else np.uint32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * number(factor)) & number(0xFFFFFFFF)
    return x ^ (x >> 16)


class HistoryModel:
    """Its next token is a function of all tokens so far, which it knows from the cache alone.

    As a transformer of two layers: a slot of the first layer has a hash of a token and its position, a slot of the
    second one a hash of all that the first layer has up to it. So a page that is missing, stale, in another place, or
    of another history changes what follows.

    Args:
      surprise: in how many of 8 cases the hash is the token; the others have a period of 5, which drafts can guess.
    """

    vocab_size = VOCAB
    max_len = MAX_PROMPT + MAX_NEW

    def __init__(self, surprise: int = ALWAYS):
        self.weights = jnp.uint32(surprise)

    def make_cache(self, num_pages: int, page_size: int) -> list[jax.Array]:
        """Has the pages of the largest pool, so that pools of all sizes run the same programs."""
        return [jnp.zeros((max(num_pages, MOST_PAGES), page_size), jnp.uint32) for _ in range(2)]

    def hidden(
        self, weights: jax.Array, cache: list[jax.Array], tokens: jax.Array, step: StepMetadata
    ) -> tuple[jax.Array, list[jax.Array]]:
        return self.two_layers(cache, tokens, (step, step), (None, None))

    def two_layers(
        self,
        cache: list[jax.Array],
        tokens: jax.Array,
        steps: tuple[StepMetadata, StepMetadata],
        windows: tuple[int | None, int | None],
    ) -> tuple[jax.Array, list[jax.Array]]:
        positions = jnp.asarray(steps[0].positions)
        first, sums = attend(cache[0], mix((tokens * 1000 + positions + 1).astype(jnp.uint32)), steps[0], windows[0])
        second, sums = attend(cache[1], mix(sums), steps[1], windows[1])
        return jnp.stack([sums, positions.astype(jnp.uint32)], axis=1), [first, second]

    def logits(self, weights: jax.Array, hidden: jax.Array) -> jax.Array:
        return jax.nn.one_hot(next_token(hidden[:, 0], hidden[:, 1], weights, jnp.where), VOCAB)


class WindowedHistoryModel(HistoryModel):
    """The same with two layer groups: the first layer has a window. So it forgets nothing, but must keep its pages."""

    windows = (WINDOW, None)

    def make_cache(self, num_pages: tuple[int, ...], page_size: int) -> list[jax.Array]:
        assert len(num_pages) == 2
        return super().make_cache(max(num_pages), page_size)

    def hidden(
        self,
        weights: jax.Array,
        cache: list[jax.Array],
        tokens: jax.Array,
        steps: tuple[StepMetadata, StepMetadata],
    ) -> tuple[jax.Array, list[jax.Array]]:
        return self.two_layers(cache, tokens, steps, self.windows)


def attend(layer: jax.Array, values: jax.Array, step: StepMetadata, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The layer `[P, S]` with the values `[T]` of a step, and for each of these the sum over what it sees, `[T]`."""
    number, (pages, page_size) = len(values), layer.shape
    slots = jnp.where(step.slot_mapping >= 0, step.slot_mapping, pages * page_size)
    if step.cu_q_lens is None:
        rows, positions = jnp.arange(number), step.kv_lens - 1
    else:
        index = jnp.arange(number)
        rows = jnp.clip(jnp.searchsorted(step.cu_q_lens, index, side="right") - 1, 0, len(step.kv_lens) - 1)
        positions = step.kv_lens[rows] - (step.cu_q_lens[rows + 1] - index)
    tables = jnp.where(step.block_tables < 0, pages, step.block_tables)[rows]
    places = jnp.arange(tables.shape[1] * page_size, dtype=jnp.uint32)
    is_seen = places <= positions[:, None]
    if window is not None:
        is_seen &= places.astype(jnp.int32) > positions[:, None] - window
    layer = layer.reshape(-1).at[slots].set(values, mode="drop").reshape(layer.shape)
    keys = layer.at[tables].get(mode="fill", fill_value=0).reshape(number, -1)
    return layer, jnp.sum(jnp.where(is_seen, mix(keys + places), 0), axis=1, dtype=jnp.uint32)


def next_token(sums: Any, position: Any, surprise: Any, where: Callable) -> Any:
    number = mix(sums)
    return where(number % 8 < surprise, (number >> 8) % VOCAB, position % 5)


def oracle(
    prompt: tuple[int, ...],
    count: int,
    surprise: int = ALWAYS,
    windows: tuple[int | None, int | None] = (None, None),
) -> list[int]:
    """The `count` tokens after a prompt, without a cache."""
    tokens, layers = list(prompt), ([], [])
    for position in range(len(prompt) + count - 1):
        sums = tokens[position] * 1000 + position + 1
        for keys, window in zip(layers, windows, strict=True):
            keys.append(mix((mix(sums) + position) & 0xFFFFFFFF))
            sums = sum(keys if window is None else keys[-window:]) & 0xFFFFFFFF
        if position >= len(prompt) - 1:
            tokens.append(int(next_token(sums, position, surprise, np.where)))
    return tokens[len(prompt) :]


_PROGRAMS: dict[tuple[Any, int], dict] = {}


def make_engine(
    surprise: int = ALWAYS,
    num_pages: int = MOST_PAGES,
    num_drafts: int = 0,
    model: Any = HistoryModel,
    **options: Any,
) -> Engine:
    """An engine whose programs are compiled once for all engines of the model with as many drafts."""
    engine = Engine(
        model(surprise),
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_seqs=MAX_SEQS,
        buckets=(MAX_SEQS, 14),
        decode_buckets=(MAX_SEQS,),
        num_drafts=num_drafts,
        **options,
    )
    engine._programs._programs = _PROGRAMS.setdefault((model, num_drafts), engine._programs._programs)
    return engine


class Failure(Exception):
    """An error of an `on_token`."""


class Interrupt(BaseException):
    """As a `KeyboardInterrupt`: it passes through the engine."""


@dataclasses.dataclass(eq=False)
class Sent:
    """A request as the test knows it.

    Attributes:
      place: how many were sent before.
      expected: what it would give if nothing ended it.
      at, action: what its `on_token` does with how many tokens.
      seen: the tokens that `on_token` was given.
    """

    place: int
    expected: list[int]
    at: int
    action: str | None
    seen: list[int] = dataclasses.field(default_factory=list)
    is_cancelled: bool = False
    generation: Generation = dataclasses.field(init=False)

    @property
    def rank(self) -> tuple[int, int]:
        return self.generation.request.priority, self.place

    def check(self) -> None:
        """The output has no wrong token and none too many, and the reason is the right one."""
        generation, reason = self.generation, self.generation.finish_reason
        stop_tokens, most = generation.request.stop_tokens, generation.request.max_new_tokens
        stops = [index for index, token in enumerate(self.expected) if token in stop_tokens]
        output = generation.output
        assert output == self.seen == self.expected[: len(output)]
        assert len(output) <= min([most, *stops])
        failed = self.action == "fail" and len(self.seen) >= self.at
        if self.is_cancelled or failed:
            assert reason in ("cancelled", "error")
            assert reason == "cancelled" or (failed and isinstance(generation.error, Failure))
        else:
            assert reason in (None, "length", "stop")
            assert (reason == "length") == (len(output) == most)
            assert reason != "stop" or len(output) == min(stops)


PRIORITIES = st.sampled_from([0, 0, 0, -1, 1])
STOP_TOKENS = st.sampled_from([(), (), (), (), (3,), (5, 8)])
ACTIONS = st.sampled_from([None, None, None, None, "cancel", "cancel another", "fail", "submit", "interrupt"])
TOKENS = st.integers(0, VOCAB - 1)
STEMS = [oracle((stem,), MAX_PROMPT - 4) for stem in range(2)]


# The last one has so few pages for windows that they often run out.
WITH_WINDOW = {"model": WindowedHistoryModel}
GROUPS = [{}, {**WITH_WINDOW, "window_pages": 16}, {**WITH_WINDOW, "window_pages": 5}]


class Traffic(RuleBasedStateMachine):
    """Requests come and go at random, over pools that hold few of them."""

    @initialize(
        surprise=st.sampled_from([ALWAYS, RARELY]),
        num_pages=st.sampled_from([FEWEST_PAGES, FEWEST_PAGES + 3, MOST_PAGES]),
        decode_steps=st.sampled_from([1, 4]),
        num_drafts=st.sampled_from([0, 3]),
        groups=st.sampled_from(GROUPS),
    )
    def start(self, surprise: int, num_pages: int, decode_steps: int, num_drafts: int, groups: dict[str, Any]) -> None:
        options = {"decode_steps": decode_steps, "max_waiting": MAX_WAITING, **groups}
        self.engine = make_engine(surprise, num_pages, num_drafts, **options)
        self.surprise, self.windows = surprise, (WINDOW, None) if groups else (None, None)
        self.sent: list[Sent] = []

    # ---- rules

    @rule(
        copies=st.sampled_from([1, 1, 3]),
        start=st.integers(0, 5),
        stem=st.sampled_from([0, 7, 8, 13, MAX_PROMPT - 4]),
        tail=st.lists(TOKENS, min_size=1, max_size=4),
        most=st.sampled_from([MAX_NEW, MAX_NEW, 12, 5, 1]),
        priority=PRIORITIES,
        salt=st.sampled_from([None, None, "tenant"]),
        stop_tokens=STOP_TOKENS,
        action=ACTIONS,
        at=st.integers(1, 5),
    )
    def submit(
        self,
        copies: int,
        start: int,
        stem: int,
        tail: list[int],
        action: str | None,
        at: int,
        most: int,
        **options: Any,
    ) -> None:
        """Prompts that begin like others, or as an earlier request with its answer."""
        stems = [*STEMS, *(each.generation.tokens for each in self.sent[-4:])]
        prompt = (*stems[start % len(stems)][:stem], *tail)
        for copy in range(copies):
            self.submit_one((*prompt[:-1], (prompt[-1] + copy) % VOCAB), most, action, at, **options)

    def submit_one(self, prompt: tuple[int, ...], most: int, action: str | None, at: int, **options: Any) -> None:
        sent = Sent(len(self.sent), oracle(prompt, most, self.surprise, self.windows), at, action)

        def take(token: int) -> None:
            sent.seen.append(token)
            if len(sent.seen) == at:
                self.act(sent)

        request = Request(prompt, most, on_token=take, **options)
        before = self.engine.num_waiting, self.engine.pages_in_use
        if self.engine.num_waiting >= MAX_WAITING:
            with pytest.raises(QueueFull, match=f"max_waiting = {MAX_WAITING}"):
                self.engine.submit(request)
            assert (self.engine.num_waiting, self.engine.pages_in_use) == before
        else:
            sent.generation = self.engine.submit(request)
            self.sent.append(sent)

    def act(self, sent: Sent) -> None:
        """Something that an `on_token` does while tokens are handed out."""
        action = sent.action
        if action == "cancel":
            self.cancel_one(sent)
        elif action == "cancel another":
            self.cancel_one(self.sent[(sent.place * 7 + sent.at) % len(self.sent)])
        elif action == "submit":
            self.submit_one((*STEMS[0][: 4 * sent.at], sent.at), sent.at, None, 0)
        elif action == "fail":
            raise Failure
        elif action == "interrupt":
            raise Interrupt

    @precondition(lambda self: self.sent)
    @rule(choice=st.integers(0, 30))
    def cancel(self, choice: int) -> None:
        """One of the latest, in whatever state it is."""
        self.cancel_one(self.sent[-1 - choice % min(len(self.sent), 8)])

    def cancel_one(self, sent: Sent) -> None:
        sent.is_cancelled |= sent.generation.finish_reason is None
        self.engine.cancel(sent.generation)
        assert sent.generation.finish_reason is not None

    @rule()
    def update_weights(self) -> None:
        """Prefixes are forgotten while requests run."""
        self.engine.update_weights(jnp.uint32(self.surprise))

    @rule(count=st.sampled_from([1, 2, 3, 8]))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.step_once()

    def step_once(self) -> None:
        scheduler = self.engine._scheduler
        by_id = {id(each.generation): each for each in self.sent}
        waiting, running = ([by_id[id(g)] for g in gs] for gs in (scheduler.waiting, scheduler.running))
        preemptions = {each: each.generation.preemptions for each in running}
        try:
            self.engine.step()
        except Interrupt:
            self.check()
        still_waiting = [each.rank for each in waiting if each.generation in scheduler.waiting]
        admitted = [each.rank for each in waiting if each.generation in scheduler.running]
        assert not (admitted and still_waiting) or max(admitted) < min(still_waiting)
        preempted = [each.rank for each in running if each.generation.preemptions > preemptions[each]]
        still_running = [each.rank for each in running if each.generation in scheduler.running]
        assert not (preempted and still_running) or max(still_running) < min(preempted)

    # ---- invariants

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine, stats = self.engine, self.engine.stats
        for sent in self.sent:
            sent.check()
        ended = [sent for sent in self.sent if sent.generation.finish_reason is not None]
        assert engine.has_work == (len(ended) < len(self.sent)) or engine._undelivered
        assert engine.num_running <= MAX_SEQS
        assert engine.num_waiting + engine.num_running == len(self.sent) - len(ended)
        # Nobody holds more than its whole length needs.
        lengths = [len(g.request.prompt) + g.request.max_new_tokens for g in engine._scheduler.running]
        most = sum(math.ceil(length / PAGE_SIZE) for length in lengths)
        assert all(pool.pages_in_use <= min(most, pool.num_pages) for pool in engine.pools)
        assert stats.finished == len(ended)
        assert stats.tokens == sum(len(sent.seen) for sent in self.sent)
        assert 0 <= stats.accepted <= stats.drafted
        if not engine.num_running:
            assert engine.pages_in_use == 0
            assert len(engine._scheduler._rows) == MAX_SEQS

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(100 * (len(self.sent) + 1)):
            if self.engine.has_work:
                self.step_once()
        self.check()
        assert not self.engine.has_work
        check_pages(self.engine)


def check_pages(engine: Engine) -> None:
    """No page is lost: a prompt of new tokens takes each once."""
    for allocator in engine._groups.allocators:
        everything = allocator.allocate([object() for _ in range(allocator.num_pages * PAGE_SIZE)])
        assert sorted(everything.pages) == list(range(allocator.num_pages))


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)


# ---- single cases, which random traffic may miss


def run(engine: Engine, requests: list[Request]) -> list[list[int]]:
    generations = [engine.submit(request) for request in requests]
    engine.run()
    return [generation.output for generation in generations]


def test_drafts_and_repeated_steps_save_dispatches() -> None:
    prompts = [tuple(oracle((start,), 15, RARELY)) for start in range(MAX_SEQS)]
    requests = [Request(prompt, MAX_NEW) for prompt in prompts]
    engines = {name: make_engine(RARELY, **{name: count}) for name, count in (("decode_steps", 4), ("num_drafts", 3))}
    engines["plain"] = make_engine(RARELY)
    for engine in engines.values():
        assert run(engine, requests) == [oracle(prompt, MAX_NEW, RARELY) for prompt in prompts]
    plain, repeated, drafted = (engines[name].stats for name in ("plain", "decode_steps", "num_drafts"))
    assert (plain.drafted, repeated.drafted) == (0, 0)
    assert 0 < drafted.accepted < drafted.drafted
    assert drafted.steps < 0.7 * plain.steps
    assert plain.dispatches == plain.steps
    assert repeated.dispatches < 0.75 * repeated.steps  # fewer are repeated where pages run short
    assert plain.tokens == repeated.tokens == drafted.tokens == MAX_SEQS * MAX_NEW


@pytest.mark.parametrize(("decode_steps", "dispatches"), [(1, MAX_NEW), (4, 1 + math.ceil((MAX_NEW - 1) / 4))])
def test_each_step_is_dispatched_before_the_one_in_front_is_read(decode_steps: int, dispatches: int) -> None:
    engine = make_engine(decode_steps=decode_steps)
    generation = engine.submit(Request((1, 2, 3), MAX_NEW))
    for call in range(dispatches):
        engine.step()
        assert engine.stats.dispatches == call + 1
        assert len(generation.output) == (0 if call == 0 else 1 + (call - 1) * decode_steps)
    engine.step()
    assert engine.stats.dispatches == dispatches
    assert generation.output == oracle((1, 2, 3), MAX_NEW)


def test_a_full_queue_refuses_until_a_step_admits() -> None:
    engine = make_engine(max_waiting=2)
    request = Request((1, 2, 3), 4)
    generations = [engine.submit(request) for _ in range(2)]
    for _ in range(3):
        with pytest.raises(QueueFull, match=r"^request: expected fewer than max_waiting = 2 requests in the queue"):
            engine.submit(request)
    engine.step()
    generations += [engine.submit(request) for _ in range(2)]
    engine.run()
    assert [generation.output for generation in generations] == [oracle((1, 2, 3), 4)] * 4


def test_urgent_requests_overtake_and_keep_their_pages() -> None:
    engine = make_engine(num_pages=FEWEST_PAGES)
    order: list[int] = []

    def send(priority: int, prompt: tuple[int, ...]) -> Generation:
        def on_token(token: int) -> None:
            if priority not in order:
                order.append(priority)

        return engine.submit(Request(prompt, MAX_NEW, priority=priority, on_token=on_token))

    generations = [send(priority, (priority, 1)) for priority in (3, 5, 4, 6, 7, 2, 1, 0)]
    engine.run()
    assert order == sorted(order)
    assert all(g.output == oracle(tuple(g.request.prompt), MAX_NEW) for g in generations)
    by_priority = sorted(generations, key=lambda generation: generation.request.priority)
    assert by_priority[0].preemptions == 0
    assert sum(g.preemptions for g in by_priority[1:]) == engine.stats.preemptions > 0
