"""Faults while serving: the error comes out of `step` once, then everybody gets the tokens that they would have had.

Also drafts with sampling: the same tokens as without them, and the model's own distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_serving_schedule import (
    FEWEST_PAGES,
    MAX_NEW,
    MAX_SEQS,
    PAGE_SIZE,
    STEMS,
    HistoryModel,
    check_pages,
    make_engine,
    oracle,
)

from jax_paged_attn import StepMetadata
from jax_paged_attn.serving import Engine, Generation, Request

KINDS: list[dict[str, Any]] = [{}, {"decode_steps": 4}, {"num_drafts": 3}]
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory"


class Failure(Exception):
    """An error that a model or an `on_token` raises."""


def requests(**options: Any) -> list[Request]:
    """More than there are rows, with shared stems, and more than the smallest pool holds at once."""
    prompts = [(*STEMS[index % 2][: 3 * index], index) for index in range(7)]
    return [Request(prompt, MAX_NEW - index, **options) for index, prompt in enumerate(prompts)]


def run_through(engine: Engine, error: type[Exception], match: str) -> int:
    """Steps until all is done; returns how many steps raised, each of them this error."""
    raised: list[Exception] = []
    for _ in range(1000):  # many more than are needed
        try:
            if engine.has_work:
                engine.step()
        except error as caught:
            raised.append(caught)
    assert not engine.has_work
    assert all(match in str(caught) for caught in raised)
    return len(raised)


def check(engine: Engine, generations: list[Generation]) -> None:
    """Everybody has the oracle's tokens, and the engine every page and row; it goes on serving."""
    for generation in generations:
        request = generation.request
        assert generation.finish_reason == "length"
        assert generation.output == oracle(tuple(request.prompt), request.max_new_tokens)
    [again] = [engine.submit(Request((1, 2, 3), 5))]
    engine.run()
    assert again.output == oracle((1, 2, 3), 5)
    assert engine.pages_in_use == 0
    check_pages(engine)


# ---- a model that raises in Python


class FailsOnce(HistoryModel):
    """Raises while one of its traces is under way.

    Args:
      at: which trace, from 0.
    """

    def __init__(self, at: int):
        super().__init__()
        self.calls_left = at + 1

    def logits(self, weights: jax.Array, hidden: jax.Array) -> jax.Array:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise Failure("while traced")
        return super().logits(weights, hidden)


@pytest.mark.parametrize("at", [0, 1])
def test_a_model_that_raises_while_traced(at: int) -> None:
    """The second trace is that of a decode step, when results of the first steps are still in flight."""
    engine = Engine(FailsOnce(at), num_pages=FEWEST_PAGES, page_size=PAGE_SIZE, max_seqs=MAX_SEQS, buckets=(14,))
    generations = [engine.submit(request) for request in requests()]
    assert run_through(engine, Failure, "while traced") == 1
    assert engine.stats.preemptions > 0
    check(engine, generations)


def test_a_model_that_always_raises_keeps_its_requests() -> None:
    model = FailsOnce(0)
    engine = Engine(model, num_pages=FEWEST_PAGES, page_size=PAGE_SIZE, max_seqs=MAX_SEQS, buckets=(14,))
    generations = [engine.submit(request) for request in requests()]
    for _ in range(3):
        model.calls_left = 1
        with pytest.raises(Failure):
            engine.run()
        assert [generation.finish_reason for generation in generations] == [None] * len(generations)
    for generation in generations[::2]:
        engine.cancel(generation)
    engine.run()
    check(engine, generations[1::2])


# ---- a device that fails


class Unreadable:
    """Results of a step whose failure shows when they are read."""

    def copy_to_host_async(self) -> None: ...

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)


class FaultyPrograms:
    """The programs of an engine, some of whose calls fail as those of a device do.

    Args:
      fault: "refused", before the cache is donated; "lost", after; or "late", when results are read.
      at: which calls, from 0.
    """

    def __init__(self, programs: Any, fault: str, at: set[int]):
        self._programs, self._fault, self._at, self._calls = programs, fault, at, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._programs, name)

    def __call__(self, kind: Any) -> Callable:
        def program(weights: Any, cache: list[jax.Array], last: jax.Array, operand: np.ndarray) -> Any:
            fails = self._calls in self._at
            self._calls += 1
            if fails and self._fault != "late":
                for leaf in [*cache, last] if self._fault == "lost" else []:
                    leaf.delete()
                raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
            sampled, last, cache = self._programs(kind)(weights, cache, last, operand)
            if fails:
                sampled = sampled._replace(tokens=Unreadable())
                cache = [jnp.zeros_like(leaf) for leaf in cache]  # which nobody may trust
            return sampled, last, cache

        return program


def break_device(engine: Any, fault: str, at: set[int]) -> None:
    engine._programs = FaultyPrograms(engine._programs, fault, at)


@pytest.mark.parametrize("at", [{0}, {2}, {5, 6}, {3, 9, 21}], ids=str)
@pytest.mark.parametrize("fault", ["refused", "lost", "late"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_device_that_fails(options: dict[str, Any], fault: str, at: set[int]) -> None:
    engine = make_engine(num_pages=FEWEST_PAGES + 2, **options)
    break_device(engine, fault, at)
    seen: list[list[int]] = []
    for request in requests():
        seen.append([])
        engine.submit(Request(request.prompt, request.max_new_tokens, on_token=seen[-1].append))
    generations = list(engine._scheduler.waiting)
    raised = run_through(engine, jax.errors.JaxRuntimeError, OUT_OF_MEMORY)
    # Steps in flight go with the cache that they share: two late faults in a row may be one.
    assert raised == len(at) or (fault == "late" and 0 < raised < len(at))
    assert seen == [generation.output for generation in generations]
    check(engine, generations)


def test_a_lost_cache_is_not_searched_for_prefixes() -> None:
    engine = make_engine()
    first = engine.submit(Request(tuple(STEMS[0]), 3))
    engine.run()
    break_device(engine, "lost", {0})
    second = engine.submit(Request(tuple(STEMS[0]), 3))
    with pytest.raises(jax.errors.JaxRuntimeError):
        engine.step()
    found = engine.stats.cached_tokens
    assert found > 0
    engine.run()
    assert engine.stats.cached_tokens == found
    check(engine, [first, second])


def test_no_memory_for_a_new_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    generations = [engine.submit(request) for request in requests()]
    engine.step()
    make_cache, attempts = engine._model.make_cache, []

    def fail_twice(*sizes: Any) -> list[jax.Array]:
        attempts.append(sizes)
        if len(attempts) < 3:
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
        return make_cache(*sizes)

    monkeypatch.setattr(engine._model, "make_cache", fail_twice)
    break_device(engine, "late", {0})
    assert run_through(engine, jax.errors.JaxRuntimeError, OUT_OF_MEMORY) == 2
    assert len(attempts) == 3
    check(engine, generations)


class FailsOnDevice(HistoryModel):
    """Calls Python from the jitted step, and fails there at one of the calls."""

    def __init__(self, at: int):
        super().__init__()
        self.calls_left = at + 1

    def logits(self, weights: jax.Array, hidden: jax.Array) -> jax.Array:
        def passed(hidden: np.ndarray) -> np.ndarray:
            self.calls_left -= 1
            if self.calls_left == 0:
                raise Failure("on the device")
            return hidden

        hidden = jax.pure_callback(passed, jax.ShapeDtypeStruct(hidden.shape, hidden.dtype), hidden)
        return super().logits(weights, hidden)


@pytest.mark.parametrize("options", KINDS[:2], ids=str)
def test_a_jitted_step_that_fails_while_it_runs(options: dict[str, Any]) -> None:
    """Nothing is simulated: JAX says it at the dispatch, or when results are read."""
    pool: dict[str, Any] = {"num_pages": FEWEST_PAGES + 2, "page_size": PAGE_SIZE, "max_seqs": MAX_SEQS}
    engine = Engine(FailsOnDevice(4), buckets=(14,), **pool, **options)
    generations = [engine.submit(request) for request in requests()]
    assert 1 <= run_through(engine, Exception, "on the device") <= 2
    check(engine, generations)


# ---- an on_token that raises


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_an_on_token_that_raises_ends_its_own_request(options: dict[str, Any]) -> None:
    engine = make_engine(num_pages=FEWEST_PAGES + 2, **options)
    seen: list[list[int]] = []

    def failing(place: int) -> Callable[[int], None]:
        seen.append([])

        def take(token: int) -> None:
            seen[place].append(token)
            if len(seen[place]) == place + 1:
                raise Failure(place)

        return take

    bad = [engine.submit(Request(r.prompt, r.max_new_tokens, on_token=failing(i))) for i, r in enumerate(requests())]
    good = [engine.submit(request) for request in requests()]
    engine.run()
    for place, generation in enumerate(bad):
        assert generation.finish_reason == "error"
        assert isinstance(generation.error, Failure)
        assert generation.error.args == (place,)
        assert generation.output == seen[place] == oracle(tuple(generation.request.prompt), place + 1)
    check(engine, good)


# ---- drafts with sampling


class MarkovModel:
    """Its next token depends on the last one, with probabilities that are known; it needs no cache."""

    vocab_size, max_len = 4, 64
    probabilities = np.array(
        [[0.05, 0.7, 0.2, 0.05], [0.3, 0.1, 0.55, 0.05], [0.6, 0.1, 0.1, 0.2], [0.25, 0.25, 0.25, 0.25]], np.float32
    )

    def __init__(self):
        self.weights = jnp.log(self.probabilities)

    def make_cache(self, num_pages: int, page_size: int) -> jax.Array:
        return jnp.zeros(1)

    def hidden(
        self, weights: jax.Array, cache: jax.Array, tokens: jax.Array, step: StepMetadata
    ) -> tuple[jax.Array, jax.Array]:
        return tokens, cache

    def logits(self, weights: jax.Array, hidden: jax.Array) -> jax.Array:
        return weights[hidden]


def drawn(num_drafts: int, requests: list[Request]) -> tuple[Engine, list[list[int]]]:
    engine = Engine(MarkovModel(), num_pages=600, max_seqs=128, buckets=(640,), num_drafts=num_drafts)
    generations = [engine.submit(request) for request in requests]
    engine.run()
    return engine, [generation.tokens for generation in generations]


def test_drafts_change_no_draw_and_no_distribution() -> None:
    """Chi-square over the tokens after each token, of 400 seeds; no number is random here."""
    prompt = (0, 1, 2, 0, 1, 0, 1, 2, 3, 3, 0, 2, 1, 2, 0, 1)
    requests = [Request(prompt, 40, temperature=1.0, seed=seed) for seed in range(400)]
    _, plain = drawn(0, requests)
    engine, drafted = drawn(3, requests)
    assert drafted == plain
    stats = engine.stats
    assert 0.2 * stats.tokens < stats.accepted < 0.5 * stats.drafted  # many are confirmed, and many are not

    counts = np.zeros((4, 4))
    for tokens in drafted:
        np.add.at(counts, (tokens[len(prompt) - 1 : -1], tokens[len(prompt) :]), 1)
    expected = counts.sum(1, keepdims=True) * MarkovModel.probabilities
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = 4 * 3
    assert chi_square < degrees + 3 * math.sqrt(2 * degrees)
