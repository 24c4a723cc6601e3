"""Continuous batching: what a request gives does not depend on what is served beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama import Llama, LlamaConfig
from serving import Engine, Generation, Request

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=96,
)
PAGE_SIZE = 4


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def small_pool(model: Llama) -> Engine:
    """An engine that has to preempt where several long requests meet; compiled once for all tests."""
    return make_engine(model, num_pages=36)


def make_engine(model: Llama, num_pages: int, **options) -> Engine:
    return Engine(model, num_pages=num_pages, page_size=PAGE_SIZE, max_seqs=6, buckets=(6, 24), **options)


def random_requests(count: int, seed: int = 0, **options) -> list[Request]:
    draw = np.random.default_rng(seed)
    return [
        Request(
            draw.integers(0, CONFIG.vocab_size, draw.integers(1, 40)).tolist(), int(draw.integers(1, 30)), **options
        )
        for _ in range(count)
    ]


def serve(engine: Engine, requests: list[Request]) -> list[Generation]:
    generations = [engine.submit(request) for request in requests]
    engine.run()
    return generations


def top_two_gap(model: Llama, tokens: list[int]) -> float:
    first, second = np.sort(np.asarray(model(jnp.asarray(tokens, jnp.int32))[-1]))[::-1][:2]
    return float(first - second)


def test_batched_equals_alone_under_preemption(model: Llama, small_pool: Engine):
    requests = random_requests(16)
    batched = serve(small_pool, requests)
    assert small_pool.preemptions >= 1
    assert any(g.preemptions and len(g.output) > 1 for g in batched)

    alone_engine = make_engine(model, num_pages=36)
    alone = [serve(alone_engine, [request])[0] for request in requests]
    assert alone_engine.preemptions == 0
    for one, other in zip(batched, alone, strict=True):
        assert one.finish_reason == "length"
        assert len(one.output) == len(other.output) == one.request.max_new_tokens
        differs = [i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b]
        # In another bucket sums may be rounded differently: that decides near-ties, and with them all that follows.
        assert not differs or top_two_gap(model, one.tokens[: differs[0]]) < 1e-4
    assert small_pool.pages_in_use == alone_engine.pages_in_use == 0


def test_greedy_tokens_are_the_models_own(model: Llama, small_pool: Engine):
    [generation] = serve(small_pool, random_requests(1, seed=3))
    logits = np.asarray(model(jnp.asarray(generation.tokens, jnp.int32)))
    start = len(generation.request.prompt)
    assert generation.output == logits[start - 1 : -1].argmax(-1).tolist()


def test_nothing_is_traced_or_moved_after_warm_up(model: Llama):
    def pointers(engine: Engine) -> list[int]:
        return sorted(pages.unsafe_buffer_pointer() for pages in jax.tree.leaves(engine._cache))

    engine = make_engine(model, num_pages=36)
    engine.warm_up()
    assert engine.traces == 2
    before = pointers(engine)
    serve(engine, random_requests(8, seed=1) + random_requests(8, seed=2, temperature=0.7, top_p=0.9))
    assert engine.preemptions >= 1
    assert engine.traces == 2
    assert pointers(engine) == before


def test_sampling_depends_on_the_seed_alone(small_pool: Engine):
    request = Request([5, 6, 7], 20, temperature=1.0, seed=11)
    others = random_requests(5, seed=5, temperature=1.0)
    [alone] = serve(small_pool, [request])
    beside = serve(small_pool, [*others, request])[-1]
    [reseeded] = serve(small_pool, [dataclasses.replace(request, seed=12)])
    assert alone.output == beside.output
    assert alone.output != reseeded.output


def test_small_top_p_is_greedy(small_pool: Engine):
    greedy, nucleus = serve(small_pool, [Request([1, 2, 3], 15), Request([1, 2, 3], 15, temperature=2.0, top_p=1e-6)])
    assert greedy.output == nucleus.output


def test_a_shared_prefix_is_computed_once(model: Llama, small_pool: Engine):
    request = Request([*range(50, 50 + 9 * PAGE_SIZE), 1, 2], 4)
    first = small_pool.submit(request)
    small_pool.step()
    assert not first.output  # a step has room for 24 tokens of 38
    small_pool.run()
    second = small_pool.submit(request)
    small_pool.step()
    assert len(second.output) == 1
    small_pool.run()
    logits = np.asarray(model(jnp.asarray(second.tokens, jnp.int32)))
    assert first.output == second.output == logits[len(request.prompt) - 1 : -1].argmax(-1).tolist()


def test_cancelling_frees_pages_and_spares_the_others(small_pool: Engine):
    requests = [dataclasses.replace(r, prompt=r.prompt[:10], max_new_tokens=8) for r in random_requests(7, seed=7)]
    expected = serve(small_pool, requests)
    generations = [small_pool.submit(request) for request in requests]
    small_pool.step()
    in_use = small_pool.pages_in_use
    small_pool.cancel(generations[0])
    small_pool.cancel(generations[6])  # still waiting: there are 6 rows
    assert small_pool.pages_in_use < in_use
    small_pool.run()
    small_pool.cancel(generations[1])
    assert [g.finish_reason for g in generations] == ["cancelled", *["length"] * 5, "cancelled"]
    assert [g.output for g in generations[1:6]] == [g.output for g in expected[1:6]]
    assert small_pool.pages_in_use == 0


def test_tokens_stream_as_they_come_and_a_callback_may_cancel(small_pool: Engine):
    seen: list[int] = []
    generation: Generation

    def take(token: int) -> None:
        seen.append(token)
        if len(seen) == 5:
            small_pool.cancel(generation)

    generation = small_pool.submit(Request([3, 1], 20, on_token=take))
    other = small_pool.submit(Request([2], 9))
    small_pool.run()
    assert seen == generation.output
    assert len(seen) == 5
    assert generation.finish_reason == "cancelled"
    assert len(other.output) == 9
    assert small_pool.pages_in_use == 0


def test_stop_tokens_end_the_output(small_pool: Engine):
    [free] = serve(small_pool, [Request([9, 8], 20)])
    [stopped] = serve(small_pool, [Request([9, 8], 20, stop_tokens={free.output[4]})])
    assert stopped.finish_reason == "stop"
    assert stopped.output == free.output[: free.output.index(free.output[4])]


BAD_REQUESTS = [
    (Request([], 1), "prompt"),
    (Request([97], 1), "token ids"),
    (Request([1], 0), "max_new_tokens"),
    (Request([1], 96), "at most 96 tokens"),
    (Request([1], 1, temperature=-1.0), "temperature"),
    (Request([1], 1, top_p=0.0), "top_p"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_REQUESTS)
def test_bad_requests_are_refused(small_pool: Engine, bad: Request, message: str):
    with pytest.raises(ValueError, match=message):
        small_pool.submit(bad)
    assert not small_pool.has_work


def test_bad_engines_are_refused(model: Llama):
    with pytest.raises(ValueError, match="buckets"):
        Engine(model, num_pages=4, max_seqs=8, buckets=(4,))
    with pytest.raises(ValueError, match="max_seqs"):
        Engine(model, num_pages=4, max_seqs=0)
    with pytest.raises(ValueError, match="at most 8 tokens"):
        make_engine(model, num_pages=2).submit(Request([1] * 5, 4))
