"""Continuous batching: what a request gives does not depend on what is served beside it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama import Llama, LlamaConfig
from serving import Engine, Generation, Request, _nucleus, _sample, _Sampling

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


def test_a_step_costs_three_calls_of_the_allocator(small_pool: Engine, monkeypatch: pytest.MonkeyPatch):
    allocator, calls = small_pool._allocator, []
    generations = [small_pool.submit(Request([token, token], 9)) for token in range(6)]
    small_pool.step()
    for name in ("allocate", "append", "append_batch", "mark_written", "mark_written_batch", "step", "free", "slots"):
        method = getattr(allocator, name)
        monkeypatch.setattr(allocator, name, lambda *a, n=name, m=method, **k: (calls.append(n), m(*a, **k))[1])
    small_pool.step()
    assert calls == ["append_batch", "step", "mark_written_batch"]
    small_pool.run()
    assert all(len(generation.output) == 9 for generation in generations)


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


# ---- one bad request never stops another

INF, NAN = float("inf"), float("nan")
MALFORMED = [
    ("request", None),
    ("request", {"prompt": [1], "max_new_tokens": 1}),
    ("prompt", []),
    ("prompt", None),
    ("prompt", 1),
    ("prompt", "ab"),
    ("prompt", b"ab"),
    ("prompt", {1: 2}),
    ("prompt", {1, 2}),
    ("prompt", [1.5, 2.0]),
    ("prompt", [1, True]),
    ("prompt", [1, None]),
    ("prompt", [[1, 2]]),
    ("prompt", [97]),
    ("prompt", [1, -1]),
    ("prompt", [2**63]),
    ("prompt", np.array([[1, 2]])),
    ("prompt", np.array(1)),
    ("prompt", np.array([1.0, 2.0])),
    ("prompt", np.array([True, False])),
    ("prompt", np.array([], np.int32)),
    ("prompt", np.array([1, 97], np.uint64)),
    ("prompt", jnp.array([1.0])),
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", 3.5),
    ("max_new_tokens", "3"),
    ("max_new_tokens", True),
    ("max_new_tokens", None),
    ("max_new_tokens", 10**30),
    ("stop_tokens", 2),
    ("stop_tokens", None),
    ("stop_tokens", "ab"),
    ("stop_tokens", {1: 2}),
    ("stop_tokens", [97]),
    ("stop_tokens", [-1]),
    ("stop_tokens", {1.5}),
    ("stop_tokens", [True]),
    ("stop_tokens", np.array([[1]])),
    ("temperature", NAN),
    ("temperature", INF),
    ("temperature", -1.0),
    ("temperature", 10**400),
    ("temperature", None),
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", [0.5]),
    ("top_p", NAN),
    ("top_p", 0.0),
    ("top_p", -0.5),
    ("top_p", 1.5),
    ("top_p", None),
    ("top_p", np.ones(1)),
    ("seed", -1),
    ("seed", 2**32),
    ("seed", None),
    ("seed", 1.5),
    ("seed", True),
    ("seed", np.float32(1)),
    ("on_token", 3),
    ("on_token", "print"),
]


def test_malformed_requests_are_refused_beside_good_ones(small_pool: Engine):
    requests = [dataclasses.replace(r, prompt=r.prompt[:10], max_new_tokens=9) for r in random_requests(6, seed=8)]
    expected = [serve(small_pool, [request])[0].output for request in requests]
    generations = [small_pool.submit(request) for request in requests]
    for field, value in MALFORMED:
        bad = value if field == "request" else dataclasses.replace(requests[0], **{field: value})
        with pytest.raises((ValueError, TypeError), match=rf"^(prompt, )?{field}\b.*expected .*, got ") as refusal:
            small_pool.submit(bad)
        assert "\n" not in str(refusal.value)
        small_pool.step()
    small_pool.run()
    assert [generation.output for generation in generations] == expected
    assert small_pool.pages_in_use == 0


def test_too_long_requests_are_refused(model: Llama, small_pool: Engine):
    with pytest.raises(ValueError, match="at most 96 tokens"):
        small_pool.submit(Request([1], 96))
    with pytest.raises(ValueError, match="at most 8 tokens"):
        make_engine(model, num_pages=2).submit(Request([1] * 5, 4))
    assert not small_pool.has_work


@pytest.mark.parametrize(
    "prompt",
    [(3, 1, 4), range(3, 6), np.array([3, 1, 4]), np.array([3, 1], np.uint8), jnp.array([3, 1, 4]), [np.int64(3)]],
    ids=lambda prompt: type(prompt).__name__,
)
def test_numbers_of_numpy_and_jax_are_taken(small_pool: Engine, prompt):
    plain = Request([int(token) for token in prompt], 6, stop_tokens=[5], temperature=0.5, top_p=0.5, seed=7)
    numbers: dict[str, Any] = {
        "max_new_tokens": np.int32(6),
        "stop_tokens": np.array([5]),
        "temperature": np.float32(0.5),
        "top_p": jnp.float32(0.5),
        "seed": np.uint32(7),
    }
    one, other = serve(small_pool, [plain, Request(prompt, **numbers)])
    assert one.output == other.output
    assert other.request == one.request


def test_a_request_is_a_copy(small_pool: Engine):
    prompt, stop_tokens = [9, 8], set(range(97))
    generation = small_pool.submit(Request(prompt, 5, stop_tokens=stop_tokens))
    prompt += [1, 2, 3]
    stop_tokens.clear()
    small_pool.run()
    assert (generation.output, generation.finish_reason) == ([], "stop")


class Refusal(Exception):
    pass


def test_an_on_token_that_raises_ends_its_own_request(small_pool: Engine):
    requests = random_requests(3, seed=9)
    expected = [serve(small_pool, [request])[0].output for request in requests]
    seen: list[int] = []

    def fail(token: int) -> None:
        seen.append(token)
        if len(seen) == 3:
            raise Refusal(token)

    def fail_at_the_end(token: int) -> None:
        if last.finish_reason is not None:
            raise Refusal(token)

    failing = small_pool.submit(Request([1, 2], 9, on_token=fail))
    last = small_pool.submit(Request([1, 2], 4, on_token=fail_at_the_end))
    generations = serve(small_pool, requests)
    assert [generation.output for generation in generations] == expected
    assert failing.output == seen == last.output[:3]
    for generation, length in ((failing, 3), (last, 4)):
        assert generation.finish_reason == "error"
        assert isinstance(generation.error, Refusal)
        assert len(generation.output) == length
    assert all(generation.error is None for generation in generations)
    assert small_pool.pages_in_use == 0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass_through_and_nothing_is_lost(small_pool: Engine, kind: type[BaseException]):
    requests = [dataclasses.replace(r, prompt=r.prompt[:10], max_new_tokens=8) for r in random_requests(5, seed=10)]
    expected = [serve(small_pool, [request])[0].output for request in requests]
    seen: list[list[int]] = [[] for _ in requests]

    def interrupt(index: int, token: int) -> None:
        seen[index].append(token)
        if index == 1 and len(seen[index]) in (1, 4):
            raise kind

    generations = [
        small_pool.submit(dataclasses.replace(request, on_token=functools.partial(interrupt, index)))
        for index, request in enumerate(requests)
    ]
    interrupts = 0
    while small_pool.has_work:
        try:
            small_pool.run()
        except kind:
            interrupts += 1
    assert interrupts == 2
    assert [generation.output for generation in generations] == expected == seen
    assert small_pool.pages_in_use == 0


def test_an_on_token_may_cancel_and_submit_but_not_step(small_pool: Engine):
    expected = serve(small_pool, [Request([5], 6)])[0].output
    later: list[Generation] = []

    def meddle(token: int) -> None:
        small_pool.cancel(victim)  # of the same step, whose token of this step is dropped
        small_pool.cancel(waiting)
        later.append(small_pool.submit(Request([5], 6)))
        if len(later) == 2:
            small_pool.cancel(meddler)
            raise Refusal

    meddler = small_pool.submit(Request([5], 6, on_token=meddle))
    victim = small_pool.submit(Request([6], 6))
    stepping = small_pool.submit(Request([7], 6, on_token=lambda token: small_pool.step()))
    bystander = small_pool.submit(Request([5], 6))
    others = [small_pool.submit(Request([5], 6)) for _ in range(2)]
    waiting = small_pool.submit(Request([5], 6))  # there are 6 rows
    small_pool.run()
    assert (meddler.finish_reason, meddler.output) == ("error", expected[:2])
    assert isinstance(meddler.error, Refusal)
    assert (victim.finish_reason, victim.output) == ("cancelled", [])
    assert (waiting.finish_reason, waiting.output) == ("cancelled", [])
    assert (stepping.finish_reason, len(stepping.output)) == ("error", 1)
    assert isinstance(stepping.error, RuntimeError)
    assert [generation.output for generation in (bystander, *others, *later)] == [expected] * 5
    assert small_pool.pages_in_use == 0


# ---- sampling


LOGITS = np.linspace(-30.0, 30.0, 8, dtype=np.float32)[[4, 1, 6, 2, 5, 7, 0, 3]][None]  # the best is 5


def sample(temperature: float, top_p: float, seeds: int = 64) -> list[int]:
    rows = (seeds, LOGITS.shape[1])
    options = (np.full(seeds, temperature, np.float32), np.full(seeds, top_p, np.float32))
    sampling = _Sampling(*options, np.arange(seeds, dtype=np.uint32))
    return np.asarray(_sample(jnp.broadcast_to(LOGITS, rows), np.full(seeds, 3, np.int32), sampling)).tolist()


@pytest.mark.parametrize("top_p", [1e-6, 1e-38, 1e-46])
def test_the_smallest_top_p_keeps_the_best_token(top_p: float):
    assert sample(1.0, top_p) == [5] * 64


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1.2e-38, 1e-38, 1e-42])
def test_the_smallest_temperature_is_greedy(temperature: float):
    assert sample(temperature, 1.0) == [5] * 64


def test_the_largest_temperature_is_uniform(small_pool: Engine):
    assert set(sample(float(np.finfo(np.float32).max), 1.0, seeds=256)) == set(range(8))
    hottest = serve(small_pool, [Request([1, 2], 30, temperature=1e300)])[0]
    assert len(set(hottest.output)) > 15


def test_a_top_p_of_one_keeps_every_token():
    logits = 10 * jnp.sin(jnp.arange(4096.0))[None]  # in float32 the 2688 likeliest have a sum of 1
    np.testing.assert_array_equal(_nucleus(logits, jnp.ones(1)), logits)
    half = np.asarray(_nucleus(logits, jnp.full(1, 0.5)))[0]
    probabilities = np.asarray(jax.nn.softmax(logits[0]))
    assert 0.4999 <= probabilities[np.isfinite(half)].sum() < 0.51


# ---- the engine's arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seqs": 0}, "max_seqs: expected an integer of at least 1, got 0"),
        ({"max_seqs": True}, "max_seqs: expected an integer, got True"),
        ({"max_seqs": 2.0}, "max_seqs: expected an integer, got 2.0"),
        ({"max_len": 0}, "max_len: expected an integer of at least 1, got 0"),
        ({"max_len": -5}, "max_len"),
        ({"page_size": 0}, "page_size"),
        ({"page_size": True}, "page_size"),
        ({"num_pages": 0}, "num_pages"),
        ({"num_pages": None}, "num_pages"),
        ({"buckets": (4,)}, "buckets: expected a largest of at least max_seqs = 8"),
        ({"buckets": ()}, "buckets"),
        ({"buckets": None}, "buckets"),
        ({"buckets": 64}, "buckets"),
        ({"buckets": "88"}, "buckets"),
        ({"buckets": (0, 8)}, r"buckets\[0\]: expected an integer of at least 1, got 0"),
        ({"buckets": (8, 64.0)}, r"buckets\[1\]: expected an integer, got 64.0"),
        ({"scales": [(1.0, 1.0)]}, "scales: expected one pair for each of 2 layers, got 1"),
    ],
)
def test_bad_engines_are_refused(model: Llama, options: dict[str, Any], message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        Engine(model, **{"num_pages": 4, "max_seqs": 8, **options})


def test_only_its_own_generations_can_be_cancelled(model: Llama, small_pool: Engine):
    other = make_engine(model, num_pages=4).submit(Request([1], 2))
    with pytest.raises(ValueError, match="another engine's"):
        small_pool.cancel(other)
    with pytest.raises(TypeError, match="expected a Generation, got int"):
        small_pool.cancel(0)  # pyright: ignore[reportArgumentType]
    assert other.finish_reason is None
