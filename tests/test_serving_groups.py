"""Layer groups: how many pages they take, that all of them agree, and what is refused.

Random traffic over two groups is in `test_serving_schedule.py`, attention over them in `test_serving_models.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_serving_schedule import MAX_NEW, MAX_SEQS, PAGE_SIZE, WINDOW, HistoryModel, make_engine, oracle, run

from jax_paged_attn import OutOfPages, StepMetadata
from jax_paged_attn.serving import Engine, Generation, Request, Stats, _groups, group_pages
from jax_paged_attn.serving._groups import LayerGroups
from jax_paged_attn.serving._schedule import Scheduler


class WatchedGroups(LayerGroups):
    """Fails if pages make a chunk shorter."""

    def reach(self, sequence: tuple[int, ...], tokens: Sequence[int], stop: int) -> int:
        assert super().reach(sequence, tokens, stop) == stop
        return stop


def scheduled(groups: LayerGroups, prompts: list[tuple[int, ...]], most: int, **sizes: int) -> Stats:
    """What the scheduler counts without a model: all tokens are random, and there at once."""
    draw, stats = np.random.default_rng(0), Stats()
    scheduler = Scheduler(groups, num_drafts=0, stats=stats, **sizes)
    for prompt in prompts:
        scheduler.add(Generation(Request(prompt, int(draw.integers(1, most))), list(prompt)))
    while scheduler.waiting or scheduler.running:
        plan = scheduler.plan(in_flight=False)
        assert plan is not None
        scheduler.commit(plan)
        for chunk in plan.chunks:
            if chunk.samples:
                number, generation = chunk.count if plan.repeats > 1 else 1, chunk.generation
                generation.tokens += draw.integers(0, 9, number).tolist()
                generation._in_flight -= number
                if len(generation.tokens) == generation._end:
                    scheduler.remove(generation)
    assert groups.pages_in_use == (0, 0)
    return stats


@pytest.mark.parametrize("seed", range(8))
def test_windows_never_run_out_of_the_pages_that_they_get(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is preempted, and no chunk is shorter, even without pages to keep."""
    monkeypatch.setattr(_groups, "_STEPS_KEPT", 0)
    draw = np.random.default_rng(seed)
    windows = (int(draw.integers(1, 40)), None)
    page_size, max_seqs, decode_steps = (int(draw.integers(1, most)) for most in (9, 7, 5))
    budget = max_seqs + int(draw.integers(0, 60))
    sizes = {"max_seqs": max_seqs, "decode_steps": decode_steps}
    pages = group_pages(windows, num_pages=10_000, page_size=page_size, step_tokens=budget, **sizes)
    assert pages[0] < pages[1] == 10_000
    stem = draw.integers(0, 9, 200).tolist()
    prompts = [
        (*stem[: draw.integers(200)], *draw.integers(0, 9, draw.integers(1, 100)).tolist()) for _ in range(3 * max_seqs)
    ]
    stats = scheduled(WatchedGroups(windows, pages, page_size), prompts, 100, budget=budget, **sizes)
    assert stats.preemptions == 0
    assert stats.cached_tokens > 0 or max_seqs == 1


def test_prefixes_of_busy_engines_are_found() -> None:
    """Nearly as often as if all pages were kept, and hardly ever without the pages for some more steps."""
    draw = np.random.default_rng(0)
    stems = [draw.integers(0, 30_000, 512).tolist() for _ in range(4)]
    prompts = [(*stems[i % 4], *draw.integers(0, 30_000, 100).tolist()) for i in range(48)]
    sizes = {"max_seqs": 16, "decode_steps": 1}
    rates = []
    for steps_kept in (0, 8, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_groups, "_STEPS_KEPT", steps_kept)
            pages = group_pages((128, None), num_pages=16 * 64, page_size=16, step_tokens=256, **sizes)
        rates.append(scheduled(LayerGroups((128, None), pages, 16), prompts, 120, budget=256, **sizes).hit_rate)
    assert rates[0] < 0.1 < 0.9 * rates[2] < rates[1], rates


# ---- the groups agree


def computed(groups: LayerGroups, tokens: list[int], chunk: int = 5) -> tuple[tuple[int, ...], int]:
    """A sequence whose tokens are computed in chunks, and how many of them were found."""
    sequence, found = groups.allocate(tokens, None)
    done = found
    while done < len(tokens):
        before, done = done, groups.reach(sequence, tokens, min(done + chunk, len(tokens)))
        assert done > before
        groups.mark_written_batch([sequence], [done])
    return sequence, found


def test_a_prefix_is_found_where_every_group_has_it() -> None:
    groups = LayerGroups((6, None), (6, 100), 4)
    prompt = list(range(40))
    sequence, found = computed(groups, prompt)
    assert (found, groups.pages_in_use) == (0, (2, 10))
    again, found = computed(groups, [*prompt[:38], 99])
    assert found == 36
    assert groups.pages_in_use == (3, 11)
    groups.free(again)
    groups.free(sequence)
    # Another prompt takes all pages with a window, and none of the others.
    groups.free(computed(groups, list(range(50, 90)), chunk=13)[0])
    other, found = computed(groups, prompt)
    assert found == 0
    groups.free(other)
    assert groups.pages_in_use == (0, 0)


def test_out_of_pages_changes_no_group() -> None:
    groups = LayerGroups((6, None), (6, 11), 4)
    sequence, _ = computed(groups, list(range(40)))
    before = groups.pages_in_use
    for _ in range(3):
        with pytest.raises(OutOfPages):
            groups.allocate(list(range(50, 60)), None)
        with pytest.raises(OutOfPages):
            groups.append_batch([sequence], [9])
        assert groups.pages_in_use == before
    groups.append_batch([sequence], [4])
    assert groups.pages_in_use == (3, 11)


def test_pages_of_windows_bound_a_chunk() -> None:
    groups = LayerGroups((6, None), (4, 100), 4)
    tokens = list(range(60))
    one, _ = groups.allocate(tokens, None)
    other, _ = groups.allocate([99, *tokens], None)
    assert groups.pages_in_use == (2, 31)
    # The last slot of three pages is for the token behind the chunk.
    assert groups.reach(one, tokens, 30) == 11
    assert groups.reach(other, [99, *tokens], 30) == 3
    groups.mark_written_batch([one], [11])
    assert groups.pages_in_use == (3, 31)


class OnlyWindows(HistoryModel):
    """One layer group, with a window."""

    windows = (WINDOW,)

    def make_cache(self, num_pages: Any, page_size: int) -> list[jax.Array]:
        [pages] = num_pages
        return super().make_cache(pages, page_size)

    def hidden(
        self, weights: jax.Array, cache: list[jax.Array], tokens: jax.Array, step: Any
    ) -> tuple[jax.Array, list[jax.Array]]:
        assert [type(each) for each in step] == [StepMetadata]
        return self.two_layers(cache, tokens, (*step, *step), (WINDOW, WINDOW))


def test_windows_alone_set_no_limit_to_a_sequence() -> None:
    engine = make_engine(model=OnlyWindows, num_pages=4)  # 16 tokens
    requests = [Request((1, 2, seed), MAX_NEW) for seed in range(3)]
    assert run(engine, requests) == [oracle((1, 2, seed), MAX_NEW, windows=(WINDOW, WINDOW)) for seed in range(3)]
    assert engine.stats.preemptions > 0
    [pool] = engine.pools
    assert (pool.window, pool.num_pages, pool.pages_in_use) == (WINDOW, 4, 0)
    with pytest.raises(
        ValueError, match=r"at most 8 tokens together \(max_len is 44, the pool has 2 pages of 4\), got 23"
    ):
        make_engine(model=OnlyWindows, num_pages=2).submit(requests[0])


def test_the_pools_of_an_engine() -> None:
    class TwoWindows(HistoryModel):
        windows = (None, WINDOW, 9)

        def make_cache(self, num_pages: Any, page_size: int) -> Any:
            return [jnp.zeros((pages, page_size), jnp.uint32) for pages in num_pages]

    sizes = {"num_pages": 100, "page_size": PAGE_SIZE, "max_seqs": MAX_SEQS, "buckets": (14,)}
    engine = Engine(TwoWindows(), **sizes, decode_steps=4)
    pages = group_pages(
        TwoWindows.windows, num_pages=100, page_size=PAGE_SIZE, max_seqs=MAX_SEQS, step_tokens=14, decode_steps=4
    )
    assert pages == (100, 47, 50)
    assert [(pool.window, pool.num_pages) for pool in engine.pools] == [(None, 100), (WINDOW, 47), (9, 50)]
    assert (engine.num_pages, engine.cache_bytes) == (197, 197 * PAGE_SIZE * 4)
    assert [pool.num_pages for pool in Engine(TwoWindows(), **sizes, window_pages=7).pools] == [100, 7, 7]
    sizes["num_pages"] = 12
    assert [pool.num_pages for pool in Engine(TwoWindows(), **sizes).pools] == [12, 12, 12]
    # Each group holds a request by itself, so their pages do not add up.
    sizes["num_pages"] = 10
    engine = Engine(TwoWindows(), **sizes)
    assert engine.longest == 10 * PAGE_SIZE < engine.max_len
    engine.submit(Request([1], engine.longest - 1))
    with pytest.raises(ValueError, match=f"expected at most {engine.longest} tokens together"):
        engine.submit(Request([1], engine.longest))


@pytest.mark.parametrize(
    ("windows", "options", "message"),
    [
        ((), {}, r"windows: expected a sequence of a window for each layer group, got \(\)"),
        (6, {}, "windows: expected a sequence .*, got 6"),
        ("6", {}, "windows: expected a sequence .*, got '6'"),
        ((None, 0), {}, r"windows\[1\]: expected an integer of at least 1, got 0"),
        ((6.0,), {}, r"windows\[0\]: expected an integer, got 6.0 \(float\)"),
        ((6, None, 6), {}, r"windows: expected each window once, .*, got \(6, None, 6\)"),
        ((6, None), {"window_pages": 0}, "window_pages: expected an integer of at least 1, got 0"),
        ((6, None), {"window_pages": 2.0}, r"window_pages: expected an integer, got 2.0 \(float\)"),
    ],
)
def test_bad_groups_are_refused(windows: Any, options: dict[str, Any], message: str) -> None:
    model = HistoryModel()
    model.windows = windows  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises((ValueError, TypeError), match=f"^{message}$"):
        Engine(model, num_pages=8, **options)
