"""The serving loop over many requests that come, and are cancelled, at random: no page is lost, no answer changes.

`make soak` does it with 10,000 requests; as a test there are fewer.
"""

from __future__ import annotations

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from llama import Llama
from serving import Generation, Request
from test_serving import CONFIG, PAGE_SIZE, make_engine

REQUESTS = int(os.environ.get("JPA_SOAK", "300"))

NUM_PAGES = 36  # of which the longest request needs 20
# Greedy answers may differ where two tokens are as likely, since sums are rounded as the step's size has it.
NEAR_TIE = 1e-4


def random_request(draw: np.random.Generator, stems: list[list[int]], earlier: list[Request]) -> Request:
    """A new prompt, one that begins like others, or one that was there before; the pool holds each, but not all."""
    kind = draw.random()
    if kind < 0.1 and earlier:
        prompt = list(earlier[draw.integers(len(earlier))].prompt)
    else:
        stem = stems[draw.integers(len(stems))] if kind < 0.7 else []
        stem = stem[: draw.integers(len(stem) + 1)]
        prompt = [*stem, *draw.integers(0, CONFIG.vocab_size, draw.integers(1, 15)).tolist()]
    return Request(prompt, int(draw.integers(1, 25)))


class Failure(Exception):
    """The error that an `on_token` raises."""


class Soak:
    """An engine under load, and what is known of it from outside."""

    def __init__(self, model: Llama, seed: int):
        self.engine = make_engine(model, NUM_PAGES)
        self.engine.warm_up()
        self.draw = np.random.default_rng(seed)
        self.active: list[Generation] = []
        self.done: list[Generation] = []

    def pool_pointers(self) -> list[int]:
        return sorted(pages.unsafe_buffer_pointer() for pages in jax.tree.leaves(self.engine._cache))

    def submit(self, request: Request) -> None:
        cancel_at, fail_at = (int(self.draw.integers(1, 25)) if self.draw.random() < 0.1 else None for _ in range(2))
        generation: Generation

        def take(token: int) -> None:
            """Cancels a request of the step that is being handed out: this one, or another one; or fails."""
            if len(generation.output) == cancel_at:
                self.engine.cancel(self.active[self.draw.integers(len(self.active))])
            if len(generation.output) == fail_at:
                raise Failure

        generation = self.engine.submit(Request(request.prompt, request.max_new_tokens, on_token=take))
        self.active.append(generation)

    def step(self) -> None:
        """Now and then cancels a request, waiting, preempted, half computed, generating, or finished; then steps."""
        while self.active and self.draw.random() < 0.06:
            self.engine.cancel(self.active[self.draw.integers(len(self.active))])
        self.engine.step()
        self.done += [generation for generation in self.active if generation.finish_reason]
        self.active = [generation for generation in self.active if not generation.finish_reason]
        assert 0 <= self.engine.pages_in_use <= self.engine.num_pages
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


def test_soak() -> None:
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    soak = Soak(model, seed=0)
    pointers, traces, began = soak.pool_pointers(), soak.engine.traces, time.perf_counter()
    soak.serve(REQUESTS)
    took = time.perf_counter() - began
    engine, done = soak.engine, soak.done

    # Nothing was compiled or moved after the warm-up, and every page can be had again.
    assert engine.traces == traces
    assert soak.pool_pointers() == pointers
    assert engine.pages_in_use == 0
    everything = engine._allocator.allocate(range(engine.num_pages * PAGE_SIZE))
    assert sorted(everything.pages) == list(range(engine.num_pages))

    assert len(done) == REQUESTS
    cancelled = [generation for generation in done if generation.finish_reason == "cancelled"]
    failed = [generation for generation in done if generation.finish_reason == "error"]
    preempted = [generation for generation in done if generation.preemptions]
    assert len(cancelled) > REQUESTS / 10
    assert len(failed) > REQUESTS / 100
    assert all(isinstance(generation.error, Failure) for generation in failed)
    assert len(preempted) > REQUESTS / 100
    assert any(generation.preemptions for generation in cancelled)

    alone = make_engine(model, NUM_PAGES)
    ties = 0
    for generation in done:
        request = generation.request
        assert generation.finish_reason in ("length", "cancelled", "error")
        if generation.finish_reason == "length":
            assert len(generation.output) == request.max_new_tokens
        want = alone.submit(Request(request.prompt, max(len(generation.output), 1)))
        alone.run()
        differs = [i for i, (a, b) in enumerate(zip(generation.tokens, want.tokens, strict=False)) if a != b]
        if differs:
            logits = np.asarray(model(jnp.asarray(want.tokens[: differs[0]], jnp.int32))[-1])
            first, second = logits[[generation.tokens[differs[0]], want.tokens[differs[0]]]]
            assert abs(first - second) < NEAR_TIE, generation
            ties += 1
    print(
        f"\n{REQUESTS} requests in {took:.0f} s, {engine.steps} steps, {engine.tokens} tokens: {len(cancelled)} "
        f"cancelled, {len(failed)} failed, {len(preempted)} preempted; answers as alone but for {ties} near-ties"
    )
