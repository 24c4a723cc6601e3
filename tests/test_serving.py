"""Continuous batching: what a request gives does not depend on what is served beside it."""

import dataclasses
import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import Decoder, DecoderConfig

from jax_paged_attn.serving import ByteTokenizer, Engine, Generation, Request, Sampling, sample

CONFIG = DecoderConfig(
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
# Sums are rounded as the step's size has it, which decides between two tokens that are as likely.
NEAR_TIE = 1e-4
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {"decode_buckets": (2,)},
    "repeated": {"decode_steps": 4},
    "drafting": {"num_drafts": 3},
}


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make_model()


@pytest.fixture(scope="module", params=ENGINES)
def small_pool(request: pytest.FixtureRequest, model: Decoder) -> Engine:
    """Engines that have to preempt where several long requests meet; each is compiled once for all tests."""
    engine = make_engine(model, num_pages=36, tokenizer=ByteTokenizer(bos=0), **ENGINES[request.param])
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def alone(model: Decoder) -> Engine:
    """An engine for one request at a time, without repeats and drafts."""
    return Engine(model.served(), num_pages=24, page_size=PAGE_SIZE, max_seqs=1, buckets=(24,))


def make_model(config: DecoderConfig = CONFIG) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(0))


def make_engine(model: Decoder, num_pages: int, **options) -> Engine:
    sizes: dict[str, Any] = {"page_size": PAGE_SIZE, "max_seqs": 6, "buckets": (6, 24), "decode_buckets": (6,)}
    return Engine(model.served(), num_pages=num_pages, **(sizes | options))


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


def pool_pointers(engine: Engine) -> list[int]:
    return sorted(pages.unsafe_buffer_pointer() for pages in jax.tree.leaves(engine._cache))


class Oracle:
    """The model without a cache, in one call per request: what comes after each of its tokens."""

    def __init__(self, config: DecoderConfig = CONFIG):
        self._length = config.max_position_embeddings  # padding comes after the tokens, which do not see it
        self._logits = nnx.jit(lambda model, tokens: model(tokens))
        self._model = make_model(config)  # of its own, since an engine takes the cache of its model away
        self._sample = jax.jit(sample)

    def check(self, generation: Generation) -> bool:
        """Fails if the model would not have given these tokens, this end, or these log probabilities.

        Returns:
          True if a token is the model's but for a near-tie.
        """
        request, tokens = generation.request, generation.tokens
        padded = np.zeros(self._length, np.int32)
        padded[: len(tokens)] = tokens
        logits = self._logits(self._model, padded)
        rows = {"temperature": request.temperature, "min_p": request.min_p, "top_p": request.top_p}
        sampling = Sampling(
            **{name: np.full(self._length, value, np.float32) for name, value in rows.items()},
            top_k=np.full(self._length, request.top_k, np.int32),
            seed=np.full(self._length, request.seed, np.uint32),
        )
        expected = np.asarray(self._sample(logits, np.arange(1, self._length + 1, dtype=np.int32), sampling))
        logits, start = np.asarray(logits)[len(request.prompt) - 1 :], len(request.prompt)
        expected = expected[start - 1 :]
        differs = [i for i, token in enumerate(generation.output) if token != expected[i]]
        for i in differs:
            assert request.temperature == 0, (i, generation)
            assert logits[i, expected[i]] - logits[i, generation.output[i]] < NEAR_TIE, (i, generation)
        if generation.finish_reason == "length":
            assert len(generation.output) == request.max_new_tokens
        if generation.finish_reason == "stop" and request.stop_tokens:
            assert set(expected[[len(generation.output)]]) <= set(request.stop_tokens)
        assert not set(generation.output) & set(request.stop_tokens)
        if request.logprobs is not None:
            want = np.asarray(jax.nn.log_softmax(logits[: len(generation.output)]))
            assert len(generation.logprobs) == len(want)
            for row, token, found in zip(want, generation.output, generation.logprobs, strict=True):
                assert found.chosen == pytest.approx(row[token], abs=1e-3)
                assert [value for _, value in found.top] == pytest.approx(
                    np.sort(row)[::-1][: request.logprobs], abs=1e-3
                )
                assert [row[top] for top, _ in found.top] == pytest.approx([value for _, value in found.top], abs=1e-3)
        return bool(differs)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def test_batched_equals_alone_under_preemption(small_pool: Engine, alone: Engine, oracle: Oracle):
    requests = random_requests(12) + random_requests(4, seed=1, temperature=0.9, top_p=0.9, min_p=0.01, top_k=40)
    preemptions = small_pool.stats.preemptions
    batched = serve(small_pool, requests)
    assert small_pool.stats.preemptions > preemptions
    assert any(g.preemptions and len(g.output) > 1 for g in batched)
    singles = [serve(alone, [request])[0] for request in requests]
    assert alone.stats.preemptions == 0
    for one, other in zip(batched, singles, strict=True):
        assert one.finish_reason == other.finish_reason == "length"
        assert oracle.check(one) | oracle.check(other) or one.tokens == other.tokens
    assert small_pool.pages_in_use == alone.pages_in_use == 0


def test_greedy_tokens_are_the_models_own(model: Decoder, small_pool: Engine):
    [generation] = serve(small_pool, random_requests(1, seed=3))
    logits = np.asarray(model(jnp.asarray(generation.tokens, jnp.int32)))
    start = len(generation.request.prompt)
    assert generation.output == logits[start - 1 : -1].argmax(-1).tolist()


def test_nothing_is_traced_or_moved_after_warm_up(small_pool: Engine):
    before, traces, preemptions = pool_pointers(small_pool), small_pool.traces, small_pool.stats.preemptions
    serve(small_pool, random_requests(8, seed=1) + random_requests(8, seed=2, temperature=0.7, top_p=0.9))
    assert small_pool.stats.preemptions > preemptions
    assert small_pool.traces == traces
    assert pool_pointers(small_pool) == before


@pytest.mark.parametrize(
    ("options", "kinds"),
    [({}, 3), ({"decode_steps": 4}, 5), ({"num_drafts": 2}, 3), ({"num_drafts": 2, "decode_steps": 4}, 3)],
)
def test_a_warm_up_traces_each_kind_once(model: Decoder, options: dict[str, int], kinds: int):
    """One size with prompts, two without, once or twice."""
    engine = make_engine(model, num_pages=4, max_seqs=2, buckets=(2,), decode_buckets=(1,), **options)
    for _ in range(2):
        engine.warm_up(samples=False)
        assert engine.traces == kinds
    serve(engine, [Request([1, 2, 3], 9), Request([4], 9)])
    assert engine.traces == kinds


@pytest.mark.parametrize("small_pool", ["plain", "repeated"], indirect=True)
def test_a_step_costs_four_calls_of_the_allocator(small_pool: Engine, monkeypatch: pytest.MonkeyPatch):
    allocator, calls = small_pool._groups.allocators[0], []
    generations = [small_pool.submit(Request([token, token], 11)) for token in range(6)]
    small_pool.step()
    small_pool.step()  # the first result is here
    for name in (name for name in dir(allocator) if not name.startswith("_")):
        if callable(method := getattr(allocator, name)):
            monkeypatch.setattr(allocator, name, lambda *a, n=name, m=method, **k: (calls.append(n), m(*a, **k))[1])
    small_pool.step()
    assert calls == ["tell_batch", "append_batch", "step", "mark_written_batch"]
    small_pool.run()
    assert all(len(generation.output) == 11 for generation in generations)


def test_drafts_and_repeats_save_steps(small_pool: Engine, oracle: Oracle, request: pytest.FixtureRequest):
    """Requests that quote their prompts: many drafts come true."""
    before, stats = dataclasses.replace(small_pool.stats), small_pool.stats
    generations = serve(small_pool, [Request([token, token] * 8, 40, salt="quotes") for token in (3, 4)])
    assert not any(oracle.check(generation) for generation in generations)
    steps, dispatches = stats.steps - before.steps, stats.dispatches - before.dispatches
    match request.node.callspec.params["small_pool"]:
        case "plain":
            assert steps == dispatches == 2 + 39  # 24 of the prompts' 32 tokens, the others, and the outputs
        case "repeated":
            assert dispatches <= 2 + 39 / 4 + 2
        case "drafting":
            assert steps <= 30
            assert 0 < stats.accepted - before.accepted < stats.drafted - before.drafted


def test_sampling_depends_on_the_seed_alone(small_pool: Engine, alone: Engine):
    request = Request([5, 6, 7], 20, temperature=1.0, seed=11)
    others = random_requests(5, seed=5, temperature=1.0)
    [single] = serve(alone, [request])
    beside = serve(small_pool, [*others, request])[-1]
    [reseeded] = serve(small_pool, [dataclasses.replace(request, seed=12)])
    assert single.output == beside.output
    assert single.output != reseeded.output


def test_small_top_p_is_greedy(small_pool: Engine):
    greedy, nucleus = serve(small_pool, [Request([1, 2, 3], 15), Request([1, 2, 3], 15, temperature=2.0, top_p=1e-6)])
    assert greedy.output == nucleus.output


def test_log_probabilities_are_the_models_own(small_pool: Engine, oracle: Oracle):
    requests = random_requests(2, seed=4, logprobs=2) + random_requests(2, seed=6, temperature=0.9, logprobs=5)
    longest = [Request([1], 30, logprobs=0, temperature=1.0), Request([1], 30, temperature=1.0)]  # to the last step
    generations = serve(small_pool, requests + longest)
    for generation in generations:
        oracle.check(generation)
    assert generations[-2].output == generations[-1].output
    assert generations[-1].logprobs == []


def test_a_shared_prefix_is_computed_once(small_pool: Engine, oracle: Oracle):
    def steps_to_the_first_token(generation: Generation) -> int:
        steps = 0
        while not generation.output:
            small_pool.step()
            steps += 1
        small_pool.run()
        return steps

    request, stats = Request([*range(50, 50 + 9 * PAGE_SIZE), 1, 2], 4), small_pool.stats
    cached = stats.cached_tokens
    first = small_pool.submit(request)
    first_steps = steps_to_the_first_token(first)  # a step has room for 24 tokens of 38
    assert stats.cached_tokens == cached
    second = small_pool.submit(request)
    assert steps_to_the_first_token(second) == first_steps - 1
    assert stats.cached_tokens == cached + 9 * PAGE_SIZE
    salted = small_pool.submit(dataclasses.replace(request, salt="another tenant"))
    assert steps_to_the_first_token(salted) == first_steps
    assert stats.cached_tokens == cached + 9 * PAGE_SIZE
    assert not oracle.check(first)
    assert first.output == second.output == salted.output


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


def test_stop_strings_end_the_text(small_pool: Engine):
    request = Request([3, 1, 4, 1, 5], 25, temperature=1.0, seed=2)
    [free] = serve(small_pool, [request])
    string = free.text[6:8]
    end = free.text.index(string)
    seen: list[int] = []
    [stopped, bystander] = serve(
        small_pool, [dataclasses.replace(request, stop=["none of it", string], on_token=seen.append), request]
    )
    assert (stopped.finish_reason, stopped.text) == ("stop", free.text[:end])
    assert stopped.output == seen == free.output[: len(seen)]
    assert ByteTokenizer(bos=0).decode(seen).endswith(string)  # and nothing behind it was shown
    assert (bystander.finish_reason, bystander.output) == ("length", free.output)
    assert small_pool.pages_in_use == 0


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
    ("min_p", NAN),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("min_p", None),
    ("min_p", True),
    ("top_k", -1),
    ("top_k", 1.0),
    ("top_k", None),
    ("top_k", True),
    ("stop", "ab"),
    ("stop", b"ab"),
    ("stop", {"ab"}),
    ("stop", None),
    ("stop", [""]),
    ("stop", ["ab", 3]),
    ("logprobs", -1),
    ("logprobs", 6),
    ("logprobs", 1.0),
    ("logprobs", True),
    ("priority", None),
    ("priority", 0.5),
    ("priority", "high"),
    ("priority", True),
    ("salt", [1]),
    ("salt", {"tenant": 1}),
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


def test_too_long_requests_are_refused(model: Decoder, alone: Engine):
    with pytest.raises(ValueError, match="at most 96 tokens"):
        alone.submit(Request([1], 96))
    with pytest.raises(ValueError, match="at most 8 tokens"):
        make_engine(model, num_pages=2).submit(Request([1] * 5, 4))
    assert not alone.has_work


def test_text_needs_a_tokenizer(alone: Engine):
    with pytest.raises(ValueError, match=r"^stop: expected none, since the engine has no tokenizer, got \('a',\)"):
        alone.submit(Request([1], 2, stop=("a",)))
    [generation] = serve(alone, [Request([1], 2)])
    with pytest.raises(ValueError, match=r"^text: expected an engine with a tokenizer"):
        _ = generation.text


@pytest.mark.parametrize(
    "prompt",
    [(3, 1, 4), range(3, 6), np.array([3, 1, 4]), np.array([3, 1], np.uint8), jnp.array([3, 1, 4]), [np.int64(3)]],
    ids=lambda prompt: type(prompt).__name__,
)
def test_numbers_of_numpy_and_jax_are_taken(small_pool: Engine, prompt):
    options: dict[str, Any] = {"temperature": 0.5, "top_p": 0.5, "min_p": 0.25, "top_k": 50, "seed": 7, "priority": 1}
    plain = Request([int(token) for token in prompt], 6, stop_tokens=[5], **options)
    numbers: dict[str, Any] = {
        "max_new_tokens": np.int32(6),
        "stop_tokens": np.array([5]),
        "temperature": np.float32(0.5),
        "top_p": jnp.float32(0.5),
        "min_p": np.float64(0.25),
        "top_k": np.int64(50),
        "seed": np.uint32(7),
        "priority": jnp.int32(1),
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


class RefusingTokenizer(ByteTokenizer):
    def stream(self, prompt: Sequence[int]) -> Any:
        def refuse(token: int) -> str:
            raise Refusal(token)

        return SimpleNamespace(add=refuse, rest=lambda: "")


def test_a_tokenizer_that_raises_ends_its_own_request(small_pool: Engine, monkeypatch: pytest.MonkeyPatch):
    [expected] = serve(small_pool, [Request([1, 2], 9)])
    beside = small_pool.submit(Request([1, 2], 9, stop=["never found"]))
    monkeypatch.setattr(small_pool, "_tokenizer", RefusingTokenizer(bos=0))
    failing = [small_pool.submit(Request([1, 2], length, stop=["x"])) for length in (1, 9)]
    silent = small_pool.submit(Request([1, 2], 9))  # whose text nobody asks for
    small_pool.run()
    for generation in failing:
        assert (generation.finish_reason, generation.output) == ("error", expected.output[:1])
        assert isinstance(generation.error, Refusal)
    assert beside.output == silent.output == expected.output
    assert beside.finish_reason == silent.finish_reason == "length"
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


class Faulty:
    """A result of the device that raises where the host reads it."""

    def __init__(self, error: BaseException):
        self._error = error

    def __array__(self, *_, **__):
        raise self._error


def test_an_interrupted_wait_and_a_lost_step_change_no_answer(small_pool: Engine, oracle: Oracle):
    """An interrupt leaves two steps in flight; then the first one's tokens come, and the second one's do not."""
    seen: list[int] = []
    generations = [
        small_pool.submit(dataclasses.replace(request, prompt=request.prompt[:8], max_new_tokens=40, on_token=on_token))
        for request, on_token in zip(random_requests(3, seed=12), (None, seen.append, None), strict=True)
    ]
    for _ in range(5):
        small_pool.step()
    if small_pool._tickets:  # with drafts, none is in flight between two calls
        first = small_pool._tickets[0]
        results, first.sampled = first.sampled, first.sampled._replace(tokens=Faulty(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            small_pool.step()
        first.sampled = results
        second = small_pool._tickets[1]
        second.sampled = second.sampled._replace(tokens=Faulty(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            small_pool.step()
    small_pool.run()
    for generation in generations:
        oracle.check(generation)
        assert len(generation.output) == 40
    assert seen == generations[1].output
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
        ({"decode_buckets": ()}, "decode_buckets: expected a sequence"),
        ({"decode_buckets": 1}, "decode_buckets: expected a sequence"),
        ({"decode_buckets": (1, 0)}, r"decode_buckets\[1\]: expected an integer of at least 1, got 0"),
        ({"decode_steps": 0}, "decode_steps: expected an integer of at least 1, got 0"),
        ({"decode_steps": 1.5}, "decode_steps: expected an integer, got 1.5"),
        ({"num_drafts": -1}, "num_drafts: expected an integer of at least 0, got -1"),
        ({"num_drafts": True}, "num_drafts: expected an integer, got True"),
        ({"max_waiting": -1}, "max_waiting: expected an integer of at least 0, got -1"),
        ({"max_waiting": "many"}, "max_waiting: expected an integer, got 'many'"),
        ({"max_logprobs": -1}, "max_logprobs: expected an integer of at least 0, got -1"),
        ({"max_logprobs": None}, "max_logprobs: expected an integer, got None"),
        (
            {"tokenizer": "tokenizer.json"},
            "tokenizer: expected a Tokenizer, which has 'encode', .*, got 'tokenizer.json'",
        ),
        ({"model": None}, "model: expected a Model, which has 'vocab_size', .*, got None"),
    ],
)
def test_bad_engines_are_refused(model: Decoder, options: dict[str, Any], message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        Engine(**{"model": model.served(), "num_pages": 4, "max_seqs": 8, **options})


def test_as_many_scales_as_layers_are_expected(model: Decoder):
    with pytest.raises(ValueError, match="scales: expected those of 2 layers, got 1"):
        Engine(model.served(scales=[{"k_scale": 1.0, "v_scale": 1.0}]), num_pages=4)


def test_only_its_own_generations_can_be_cancelled(model: Decoder, small_pool: Engine):
    other = make_engine(model, num_pages=4).submit(Request([1], 2))
    with pytest.raises(ValueError, match="another engine's"):
        small_pool.cancel(other)
    with pytest.raises(TypeError, match="expected a Generation, got int"):
        small_pool.cancel(0)  # pyright: ignore[reportArgumentType]
    assert other.finish_reason is None
