"""The engine over many requests that come, and are cancelled, at random: no page is lost, no answer changes.

`make soak` does it with 10,000 requests per engine; as a test there are fewer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import Any

import numpy as np
import pytest
from models import Decoder
from test_serving import CONFIG, ENGINES, PAGE_SIZE, Oracle, make_engine, make_model, pool_pointers

from jax_paged_attn.serving import Generation, Request

REQUESTS = int(os.environ.get("JPA_SOAK", "300"))

NUM_PAGES = 36  # of which the longest request needs 20
# The first layer has a window, and so few pages that it often runs out of them first.
WITH_WINDOW = dataclasses.replace(CONFIG, sliding_windows=(7, None))
SOAKS = {**ENGINES, "windows": {"decode_steps": 4, "window_pages": 17}}


def random_request(draw: np.random.Generator, stems: list[list[int]], earlier: list[Request]) -> Request:
    """A new prompt, one that begins like others, or one that was there before; the pool holds each, but not all."""
    kind = draw.random()
    if kind < 0.1 and earlier:
        prompt = list(earlier[draw.integers(len(earlier))].prompt)
    else:
        stem = stems[draw.integers(len(stems))] if kind < 0.7 else []
        stem = stem[: draw.integers(len(stem) + 1)]
        prompt = [*stem, *draw.integers(0, CONFIG.vocab_size, draw.integers(1, 15)).tolist()]
    return Request(
        prompt,
        int(draw.integers(1, 25)),
        stop_tokens=draw.integers(0, CONFIG.vocab_size, 8).tolist() if draw.random() < 0.3 else (),
        temperature=float(draw.choice([0, 0, 0, 0.7])),
        top_p=float(draw.choice([0.9, 1])),
        seed=int(draw.integers(1000)),
        priority=int(draw.integers(-1, 2)),
        salt=str(draw.choice(["", "", "", "another tenant"])),
    )


class Failure(Exception):
    """The error that an `on_token` raises."""


class Soak:
    """An engine under load, and what is known of it from outside."""

    def __init__(self, model: Decoder, seed: int, **options: Any):
        self.engine = make_engine(model, NUM_PAGES, **options)
        self.engine.warm_up()
        self.draw = np.random.default_rng(seed)
        self.active: list[Generation] = []
        self.done: list[Generation] = []
        self.seen: dict[Generation, list[int]] = {}
        self.interrupts = 0

    def submit(self, request: Request) -> None:
        generation: Generation
        seen: list[int] = []
        cancel_at, fail_at, interrupt_at = (
            int(self.draw.integers(1, 25)) if self.draw.random() < 0.1 else None for _ in range(3)
        )

        def take(token: int) -> None:
            """Cancels a request of the step that is being handed out, this one or another one; fails; or interrupts."""
            seen.append(token)
            if len(seen) == cancel_at:
                self.engine.cancel(self.active[self.draw.integers(len(self.active))])
            if len(seen) == fail_at:
                raise Failure
            if len(seen) == interrupt_at:
                self.interrupts += 1
                raise KeyboardInterrupt

        generation = self.engine.submit(dataclasses.replace(request, on_token=take))
        self.active.append(generation)
        self.seen[generation] = seen

    def step(self) -> None:
        """Now and then cancels a request, waiting, preempted, half computed, generating, or finished; then steps."""
        while self.active and self.draw.random() < 0.06:
            self.engine.cancel(self.active[self.draw.integers(len(self.active))])
        with contextlib.suppress(KeyboardInterrupt):
            self.engine.step()
        self.done += [generation for generation in self.active if generation.finish_reason]
        self.active = [generation for generation in self.active if not generation.finish_reason]
        assert all(0 <= pool.pages_in_use <= pool.num_pages for pool in self.engine.pools)
        assert self.active or self.engine.pages_in_use == 0

    def serve(self, requests: int) -> None:
        """Requests come in bursts and pauses, so that the queue is long at times, and empty at others."""
        stems = [self.draw.integers(0, CONFIG.vocab_size, 40).tolist() for _ in range(8)]
        sent: list[Request] = []
        while len(sent) < requests or self.engine.has_work:
            burst = self.draw.integers(1, 12) if self.draw.random() < 0.15 and len(self.active) < 60 else 0
            for _ in range(min(burst, requests - len(sent))):
                sent.append(random_request(self.draw, stems, sent))
                self.submit(sent[-1])
            self.step()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("plain", "repeated"))) for name in SOAKS]
)
def test_soak(name: str) -> None:
    config = WITH_WINDOW if name == "windows" else CONFIG
    soak = Soak(make_model(config), seed=list(SOAKS).index(name), **SOAKS[name])
    engine, done = soak.engine, soak.done
    pointers, traces, began = pool_pointers(engine), engine.traces, time.perf_counter()
    soak.serve(REQUESTS)
    took = time.perf_counter() - began

    # Nothing was compiled or moved after the warm-up, and every page and row can be had again.
    assert engine.traces == traces
    assert pool_pointers(engine) == pointers
    assert engine.pages_in_use == engine.num_running == engine.num_waiting == 0
    for allocator in engine._groups.allocators:
        everything = allocator.allocate(range(allocator.num_pages * PAGE_SIZE))
        assert sorted(everything.pages) == list(range(allocator.num_pages))
    assert sorted(engine._scheduler._rows) == list(range(6))
    assert not engine._scheduler._lookups

    assert len(done) == engine.stats.finished == REQUESTS
    counts = {reason: sum(g.finish_reason == reason for g in done) for reason in ("cancelled", "error", "stop")}
    preempted = [generation for generation in done if generation.preemptions]
    assert counts["cancelled"] > REQUESTS / 10
    assert counts["stop"] > REQUESTS / 30
    assert counts["error"] > REQUESTS / 100
    assert all(isinstance(g.error, Failure) for g in done if g.finish_reason == "error")
    assert len(preempted) > REQUESTS / 100
    assert any(generation.finish_reason == "cancelled" for generation in preempted)
    assert soak.interrupts > REQUESTS / 100

    oracle = Oracle(config)
    ties = 0
    for generation in done:
        assert soak.seen[generation] == generation.output
        ties += oracle.check(generation)
    stats = engine.stats
    assert stats.tokens == sum(len(generation.output) for generation in done)
    print(
        f"\n{name}: {REQUESTS} requests in {took:.0f} s, {stats.steps} steps, {stats.tokens} tokens: {counts}, "
        f"{len(preempted)} preempted; the model's own answers but for {ties} near-ties"
    )
