"""The HTTP server: OpenAI's own client gets what the engine alone gives, whatever goes wrong beside it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoint
import httpx
import jax
import jax.numpy as jnp
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_paged_attn.serving import ByteTokenizer, Engine, Generation, Request, Tokenizer
from jax_paged_attn.serving.server import ChatTemplate, create_app
from jax_paged_attn.serving.server._run import Server, make_server

FOLDER = Path(checkpoint.__file__).parent / "checkpoint"
TEMPLATE = ChatTemplate(
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ message.content }}\n{% endfor %}"
)
PROMPT = "The with statement is used to "
MOST_WAITING = 8


class CountingModel:
    """The next byte is the last one plus 1; no attention, so that little is compiled. It raises where it is told to."""

    vocab_size, max_len, weights = 256, 4096, ()

    def make_cache(self, num_pages: int, page_size: int) -> jax.Array:
        return jnp.zeros(num_pages)

    def hidden(self, weights: Any, cache: jax.Array, tokens: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        return tokens, cache

    def logits(self, weights: Any, hidden: jax.Array) -> jax.Array:
        return 100 * jax.nn.one_hot(hidden % 255 + 1, self.vocab_size)


class Running:
    """A server in a thread, and its engine, which is asked by the engine's own thread.

    Args:
      engine: nobody else's while the server runs.
      server: made for it.
    """

    def __init__(self, engine: Engine, server: Server):
        self.engine = engine
        self.server = server
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        while not server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=60, verify=False)  # whose certificates take long to load

    def _run(self) -> None:
        async def run() -> None:
            self._loop = asyncio.get_running_loop()
            await self.server.serve()

        asyncio.run(run())

    @property
    def service(self) -> Any:
        return self.server.service

    def ask(self, function: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(self.service.engine_thread.run(function), self._loop).result(300)

    def alone(self, *requests: Request) -> list[Generation]:
        """What the engine gives without the server."""

        def serve() -> list[Generation]:
            generations = [self.engine.submit(request) for request in requests]
            self.engine.run()
            return generations

        return self.ask(serve)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not self.ask(condition):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, body: Any, path: str = "completions") -> httpx.Response:
        body = {"model": "small", **body} if isinstance(body, dict) else body
        headers = {"content-type": "application/json"}
        return self.http.post(f"/v1/{path}", content=json.dumps(body), headers=headers)

    def stop(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def running(engine: Engine, tokenizer: Tokenizer, grace: float = 10.0, **options: Any) -> Iterator[Running]:
    options = {"model_name": "small", "log_level": "critical", "chat_template": TEMPLATE, **options}
    server = Running(engine, make_server(engine, tokenizer, host="127.0.0.1", port=0, grace=grace, **options))
    try:
        yield server
    finally:
        server.stop()
    assert engine.pages_in_use == 0


@contextlib.contextmanager
def running_small(**sizes: Any) -> Iterator[Running]:
    """A server of the committed checkpoint."""
    loaded = checkpoint.load(FOLDER, dtype="float32")
    engine = Engine(loaded.model.served(), max_len=192, tokenizer=loaded.tokenizer, **sizes)
    with running(engine, loaded.tokenizer, stop_tokens=[0]) as server:
        yield server


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    with running_small(num_pages=96, max_seqs=8, buckets=(64,), decode_buckets=(8,)) as server:
        yield server


@pytest.fixture
def client(small: Running) -> Iterator[openai.OpenAI]:
    with small.client() as client:
        yield client


@pytest.fixture(scope="module")
def counting_engine() -> Engine:
    return make_counting_engine(ByteTokenizer(bos=0))


def make_counting_engine(tokenizer: Tokenizer) -> Engine:
    sizes: dict[str, Any] = {"num_pages": 400, "max_seqs": 4, "buckets": (64,), "decode_buckets": (4,)}
    return Engine(CountingModel(), **sizes, max_waiting=MOST_WAITING, tokenizer=tokenizer)


@pytest.fixture
def counting(counting_engine: Engine) -> Iterator[Running]:
    with running(counting_engine, ByteTokenizer(bos=0)) as server:
        yield server


def counted(prompt: str, number: int) -> str:
    return "".join(chr((ord(prompt[-1]) - 1 + i) % 255 + 1) for i in range(1, number + 1))


# ---- what clients get


def test_completions_are_the_engines(small: Running, client: openai.OpenAI) -> None:
    [alone] = small.alone(
        Request([0, *PROMPT.encode()], 40, stop_tokens=[0], temperature=1.0, seed=5, top_p=0.9, top_k=40, min_p=0.01)
    )
    options: dict[str, Any] = {"seed": 5, "top_p": 0.9, "extra_body": {"top_k": 40, "min_p": 0.01}}
    whole = client.completions.create(model="small", prompt=PROMPT, max_tokens=40, **options)
    assert whole.choices[0].text == alone.text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (31, 40, 71)
    stream = client.completions.create(
        model="small", prompt=PROMPT, max_tokens=40, stream=True, stream_options={"include_usage": True}, **options
    )
    *events, last = list(stream)
    assert "".join(event.choices[0].text for event in events) == alone.text
    assert [event.choices[0].finish_reason for event in events] == [None] * (len(events) - 1) + ["length"]
    assert len({event.id for event in events}) == 1
    assert all(event.usage is None for event in events)
    assert (last.choices, last.usage) == ([], whole.usage)


def test_chats_are_the_templates(small: Running, client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "The statements"},
        {"role": "user", "content": [{"type": "text", "text": "are"}, {"type": "text", "text": "as follows"}]},
    ]
    prompt = list(b"The statements\nare\nas follows\n")
    [alone] = small.alone(Request(prompt, 30, stop_tokens=[0], temperature=1.0, seed=3))
    whole = client.chat.completions.create(model="small", messages=messages, max_tokens=30, seed=3)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == alone.text
    assert whole.usage
    assert whole.usage.prompt_tokens == len(prompt)
    events = list(
        client.chat.completions.create(
            model="small", messages=messages, max_completion_tokens=30, seed=3, stream=True, logprobs=True
        )
    )
    deltas = [event.choices[0].delta for event in events]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == alone.text
    assert events[-1].choices[0].finish_reason == "length"
    # Without a limit, a chat goes on to the end of the context.
    long = [{"role": "user", "content": "a" * 180}]
    rest = client.chat.completions.create(model="small", messages=long, seed=0)  # type: ignore[arg-type]
    assert rest.usage
    assert rest.usage.total_tokens == 192 or rest.choices[0].finish_reason == "stop"


def test_choices_have_seeds_and_prompts_of_their_own(small: Running, client: openai.OpenAI) -> None:
    tokens = [[0, *b"import "], [0, *b"class "]]
    requests = [Request(t, 12, stop_tokens=[0], temperature=1.0, seed=7 + i) for t in tokens for i in range(2)]
    texts = [generation.text for generation in small.alone(*requests)]
    for prompt in (tokens, ["import ", "class "]):
        whole = client.completions.create(model="small", prompt=prompt, max_tokens=12, n=2, seed=7)
        assert [choice.text for choice in whole.choices] == texts
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        assert whole.usage
        assert whole.usage.prompt_tokens == sum(map(len, tokens))
        streamed = ["" for _ in texts]
        for event in client.completions.create(model="small", prompt=prompt, max_tokens=12, n=2, seed=7, stream=True):
            for choice in event.choices:
                streamed[choice.index] += choice.text
        assert streamed == texts
    one = client.completions.create(model="small", prompt=tokens[0], max_tokens=12, seed=7 - 2**32)
    assert one.choices[0].text == texts[0]


def test_stop_strings_are_never_shown(small: Running, client: openai.OpenAI) -> None:
    """The tokens are bytes, so that every string goes over their borders."""
    options: dict[str, Any] = {"model": "small", "prompt": PROMPT, "max_tokens": 60, "seed": 2}
    free = client.completions.create(**options).choices[0].text
    stop = free[10:16]
    until = free[: free.index(stop)]
    for value in (stop, ["never there", stop + "!", stop]):
        whole = client.completions.create(**options, stop=value, logprobs=0)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (until, "stop")
        assert whole.choices[0].logprobs
        assert "".join(whole.choices[0].logprobs.tokens or []) == until
        texts = [event.choices[0].text for event in client.completions.create(**options, stop=value, stream=True)]
        assert "".join(texts) == until


def test_log_probabilities_are_the_engines(small: Running, client: openai.OpenAI) -> None:
    prompt = [0, *PROMPT.encode()]
    [alone] = small.alone(Request(prompt, 8, stop_tokens=[0], temperature=1.0, seed=1, logprobs=3))
    chosen = [entry.chosen for entry in alone.logprobs]
    found = (
        client.completions.create(model="small", prompt=prompt, max_tokens=8, seed=1, logprobs=3).choices[0].logprobs
    )
    assert found
    assert found.token_logprobs == pytest.approx(chosen, abs=1e-4)
    assert found.tokens
    assert "".join(found.tokens) == alone.text
    assert found.text_offset == [*range(8)]
    assert found.top_logprobs
    assert all(
        set(map(chr, dict(e.top))) <= set(top) for e, top in zip(alone.logprobs, found.top_logprobs, strict=True)
    )
    template = [{"role": "user", "content": PROMPT[:-1]}]
    options: dict[str, Any] = {"messages": template, "max_tokens": 8, "seed": 1, "logprobs": True, "top_logprobs": 2}
    chat = client.chat.completions.create(model="small", **options).choices[0]
    assert chat.logprobs
    assert chat.logprobs.content
    assert bytes(byte for entry in chat.logprobs.content for byte in entry.bytes or []).decode() == chat.message.content
    assert all(len(entry.top_logprobs) == 2 for entry in chat.logprobs.content)
    events = list(client.chat.completions.create(model="small", **options, stream=True))
    streamed = [
        entry for event in events if event.choices[0].logprobs for entry in event.choices[0].logprobs.content or []
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in chat.logprobs.content]


def test_characters_come_whole(counting: Running) -> None:
    """Bytes from 0xc2 on begin characters that never go on; the last one is held back, as it might."""
    with counting.client() as client:
        stream = client.completions.create(
            model="small", prompt=[0xC1], max_tokens=6, temperature=0, stream=True, logprobs=1
        )
        events = list(stream)
    assert "".join(event.choices[0].text for event in events) == "\ufffd" * 5
    found = [event.choices[0].logprobs for event in events if event.choices[0].logprobs]
    assert [token for one in found for token in one.tokens or []] == [
        f"bytes:\\x{byte:02x}" for byte in range(0xC2, 0xC8)
    ]
    assert [offset for one in found for offset in one.text_offset or []] == [0, 0, 1, 2, 3, 4]


def test_models_health_and_metrics(small: Running, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    assert small.http.get("/health").json() == {"status": "ok"}
    pool = small.http.get("/pool").json()
    assert pool == small.ask(small.engine.pool_view).as_dict()
    client.completions.create(model="small", prompt="x", max_tokens=2)
    lines = small.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    stats = small.engine.stats
    for name in ("steps", "tokens", "prompt_tokens", "cached_tokens", "preemptions"):
        assert float(values[f"jax_paged_attn_{name}_total"]) == getattr(stats, name)
    assert float(values["jax_paged_attn_pages_in_use"]) == float(values["jax_paged_attn_running"]) == 0
    assert float(values['jax_paged_attn_requests_total{outcome="completed"}']) >= 1
    assert float(values["jax_paged_attn_time_to_first_token_seconds_count"]) >= 1
    assert float(values["jax_paged_attn_time_per_token_seconds_count"]) >= 1


# ---- what is refused

REFUSED: list[tuple[str, Any, int, str | None]] = [
    ("completions", {"prompt": PROMPT, "model": "other"}, 404, "model"),
    ("completions", {"prompt": PROMPT, "model": None}, 400, "model"),
    ("completions", {}, 400, "prompt"),
    ("completions", {"prompt": []}, 400, "prompt"),
    ("completions", {"prompt": [1, "a"]}, 400, "prompt"),
    ("completions", {"prompt": [256]}, 400, "prompt"),
    ("completions", {"prompt": [[1], [-1]]}, 400, "prompt"),
    ("completions", {"prompt": "\ud800"}, 400, "prompt"),
    ("completions", {"prompt": "a" * 192}, 400, "prompt"),
    ("completions", {"prompt": "a", "max_tokens": 500}, 400, "prompt"),
    ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("completions", {"prompt": "a", "max_tokens": "1"}, 400, "max_tokens"),
    ("completions", {"prompt": "a", "n": 0}, 400, "n"),
    ("completions", {"prompt": ["a"] * 100, "n": 2}, 400, "n"),
    ("completions", {"prompt": "a", "best_of": 3}, 400, "best_of"),
    ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("completions", {"prompt": "a", "temperature": True}, 400, "temperature"),
    ("completions", {"prompt": "a", "top_p": 2}, 400, "top_p"),
    ("completions", {"prompt": "a", "top_k": 1.5}, 400, "top_k"),
    ("completions", {"prompt": "a", "min_p": 2}, 400, "min_p"),
    ("completions", {"prompt": "a", "seed": 0.5}, 400, "seed"),
    ("completions", {"prompt": "a", "logprobs": 6}, 400, "logprobs"),
    ("completions", {"prompt": "a", "stop": [""]}, 400, "stop"),
    ("completions", {"prompt": "a", "stop": 3}, 400, "stop"),
    ("completions", {"prompt": "a", "stop": ["x"] * 17}, 400, "stop"),
    ("completions", {"prompt": "a", "stream": 1}, 400, "stream"),
    ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("completions", {"prompt": "a", "stream": True, "stream_options": {"other": 1}}, 400, "stream_options"),
    ("completions", {"prompt": "a", "echo": True}, 400, "echo"),
    ("completions", {"prompt": "a", "logit_bias": {"1": 2}}, 400, "logit_bias"),
    ("completions", {"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ("completions", {"prompt": "a", "nonsense": 1}, 400, "nonsense"),
    ("completions", {"prompt": "a", "user": 1}, 400, "user"),
    ("chat/completions", {}, 400, "messages"),
    ("chat/completions", {"messages": ["a"]}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": 1}]}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, 400, "top_logprobs"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 9},
        400,
        "top_logprobs",
    ),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": 2}, 400, "logprobs"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "tools"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "response_format": 1},
        400,
        "response_format",
    ),
    ("completions", [], 400, None),
    ("other", {}, 404, None),
]


def test_what_is_wrong_is_named(small: Running) -> None:
    for path, body, status, param in REFUSED:
        answer = small.post(body, path)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), (body, error)
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert param is None or param in error["message"]


def test_fields_that_ask_for_nothing_are_taken(small: Running) -> None:
    nothing = {"echo": False, "suffix": None, "frequency_penalty": 0, "logit_bias": {}, "best_of": 1, "user": "me"}
    assert small.post({"prompt": "a", "max_tokens": 1, "top_p": 0, "top_k": -1, **nothing}).status_code == 200


def test_the_client_raises_its_own_errors(small: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model: expected 'small'") as caught:
        client.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"\+ 500") as refused:
        client.completions.create(model="small", prompt="a", max_tokens=500)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


def test_bodies_have_a_type_and_an_end(counting_engine: Engine) -> None:
    with running(counting_engine, ByteTokenizer(bos=0), max_body_bytes=1000, max_prompt_tokens=20) as server:
        url, headers = "/v1/completions", {"content-type": "application/json"}
        assert server.http.post(url, content=b"{}").status_code == 415
        assert server.http.post(url, content=b"{", headers=headers).status_code == 400
        assert server.http.post(url, content=b"[" * 900, headers=headers).status_code == 400
        assert server.http.post(url, content=b"[" * 1001, headers=headers).status_code == 413
        assert server.http.post(url, content=(b"[" * 100 for _ in range(20)), headers=headers).status_code == 413
        assert server.http.get(url).status_code == 405
        assert server.post({"prompt": "a" * 20}).json()["error"]["code"] == "context_length_exceeded"
        assert server.post({"prompt": "a" * 19}).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(width=32) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    *("prompt", "messages", "max_tokens", "n", "best_of", "stop", "seed", "temperature", "top_p", "top_k", "min_p"),
    *("logprobs", "top_logprobs", "stream", "stream_options", "user", "echo", "tools", "model", "response_format"),
)
BASE = {"model": "small", "prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


@given(
    path=st.sampled_from(["completions", "chat/completions"]), changes=st.dictionaries(st.sampled_from(FIELDS), JSON)
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_makes_the_server_fail(counting: Running, path: str, changes: dict[str, Any]) -> None:
    body = {
        name: value for name, value in BASE.items() if name not in ("prompt", "messages")[path == "completions" :][:1]
    }
    answer = counting.post({**body, **changes}, path)  # with NaN and infinities, which Python's JSON has
    assert answer.status_code in (200, 400, 404, 429), answer.text


def test_a_key_opens_all_but_the_health(counting_engine: Engine) -> None:
    with running(counting_engine, ByteTokenizer(bos=0), api_key="sesame") as server:
        assert server.http.get("/health").status_code == server.http.get("/").status_code == 200
        assert server.http.get("/pool").status_code == 401
        for header in ("", "sesame", "Bearer", "Bearer sesam", "Basic sesame", "Bearer sésame"):
            answer = server.http.get("/metrics", headers=[(b"authorization", header.encode())])
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        with server.client("wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with server.client("sesame") as client:
            assert (
                client.completions.create(model="small", prompt="a", max_tokens=2, temperature=0).choices[0].text
                == "bc"
            )


def test_a_full_queue_says_try_later(counting: Running) -> None:
    is_free = threading.Event()
    blocked = asyncio.run_coroutine_threadsafe(
        counting.service.engine_thread.run(lambda: is_free.wait(30)), counting._loop
    )
    answers: list[httpx.Response] = []
    body = {"prompt": "a", "max_tokens": 3, "temperature": 0}
    threads = [threading.Thread(target=lambda: answers.append(counting.post(body))) for _ in range(MOST_WAITING + 3)]
    for thread in threads:
        thread.start()
    while counting.service.engine_thread._inbox.qsize() < len(threads):
        time.sleep(0.01)
    is_free.set()
    for thread in threads:
        thread.join()
    assert blocked.result(30)
    assert sorted(answer.status_code for answer in answers) == [200] * MOST_WAITING + [429] * 3
    full = next(answer for answer in answers if answer.status_code == 429)
    assert full.headers["retry-after"] == "1"
    assert full.json()["error"]["code"] == "queue_full"


# ---- what goes wrong


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_pages(counting: Running, stream: bool) -> None:
    engine = counting.engine
    before = counting.ask(lambda: engine.stats.tokens)
    body = {"model": "small", "prompt": "a", "max_tokens": 4000, "temperature": 0, "stream": stream, "n": 2}
    with httpx.Client(base_url=counting.url, verify=False) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.2)
    counting.wait_for(lambda: engine.num_running == engine.pages_in_use == 0)
    assert engine.stats.tokens - before < 8000
    outcomes = counting.http.get("/metrics").text
    assert 'requests_total{outcome="cancelled"} 1.0' in outcomes


class Fragile(ByteTokenizer):
    """Raises for a token."""

    class _Stream:
        def __init__(self, inner: Any):
            self._inner = inner

        def add(self, token: int) -> str:
            if token == ord("!"):
                raise OSError("a fault in one request")
            return self._inner.add(token)

        def rest(self) -> str:
            return self._inner.rest()

    def stream(self, prompt: Any) -> Any:
        return self._Stream(super().stream(prompt))


@pytest.mark.parametrize("options", [{}, {"stop": ["never there"]}], ids=["the server's text", "the engine's text"])
def test_a_fault_of_one_request_is_its_own(options: dict[str, Any]) -> None:
    tokenizer = Fragile(bos=0)
    with running(make_counting_engine(tokenizer), tokenizer) as server, server.client() as client:
        fine = client.completions.create(model="small", prompt="A", max_tokens=50, temperature=0, stream=True)
        next(iter(fine))
        body = {"prompt": chr(ord("!") - 3), "max_tokens": 20, "temperature": 0, **options}
        failed = server.post(body)
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        assert "one request" not in failed.text  # details are for the log
        with pytest.raises(openai.APIError, match="failed to serve"):
            list(client.completions.create(model="small", stream=True, **body))
        assert "B" + "".join(event.choices[0].text for event in fine) == counted("A", 50)
        server.wait_for(lambda: server.engine.pages_in_use == 0)


def test_a_step_that_raises_is_tried_again_then_ends_the_newest(
    counting: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, step = counting.engine, counting.engine.step
    fails = {"once": 1}

    def failing() -> None:
        if fails["once"] or any(g.request.prompt[-1] == ord("?") for g in engine._scheduler.running):
            fails["once"] = 0
            raise RuntimeError("the device failed")
        step()

    monkeypatch.setattr(engine, "step", failing)
    with counting.client() as client:
        stream = client.completions.create(model="small", prompt="A", max_tokens=2000, temperature=0, stream=True)
        first = next(iter(stream))
        # The request has to hold pages before it can be a step's end.
        monkeypatch.setattr(engine, "step", lambda: (step(), monkeypatch.setattr(engine, "step", failing)))
        assert counting.post({"prompt": "?", "max_tokens": 5}).status_code == 500
        text = first.choices[0].text + "".join(event.choices[0].text for event in stream)
    assert text == bytes(i % 255 + 1 for i in range(65, 2065)).decode(errors="replace")
    assert counting.post({"prompt": "A", "max_tokens": 5}).status_code == 200


@pytest.mark.parametrize("grace", [30.0, 0.0])
def test_the_end_lets_requests_end_or_ends_them(counting_engine: Engine, grace: float) -> None:
    with running(counting_engine, ByteTokenizer(bos=0), grace=grace) as server, server.client() as client:
        number = 1500
        stream = client.completions.create(model="small", prompt="A", max_tokens=number, temperature=0, stream=True)
        first = next(iter(stream))
        server.server.should_exit = True
        if grace:
            text = "".join(event.choices[0].text for event in [first, *stream])
            assert text == bytes(i % 255 + 1 for i in range(65, 65 + number)).decode(errors="replace")
        else:
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        server.stop()
    assert counting_engine.num_running == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model_name": ""}, "^model_name: expected a string that is not empty"),
        ({"api_key": ""}, "^api_key: expected a string that is not empty"),
        ({"events_per_second": 0}, "^events_per_second: expected a positive number, got 0"),
    ],
)
def test_wrong_options_are_refused(counting_engine: Engine, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        create_app(counting_engine, ByteTokenizer(bos=0), **{"model_name": "small", **options})


def test_many_tokens_come_in_few_events(counting_engine: Engine) -> None:
    with running(counting_engine, ByteTokenizer(bos=0), events_per_second=1) as server, server.client() as client:
        stream = client.completions.create(model="small", prompt="!", max_tokens=60, temperature=0, stream=True)
        texts = [event.choices[0].text for event in stream]
    assert "".join(texts) == counted("!", 60)
    assert texts[0] == chr(ord("!") + 1)  # the first one does not wait
    assert len(texts) <= 4


# ---- the long tail


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_many_streams_of_which_a_third_is_killed() -> None:
    number, tokens = 120, 48
    prompts = [[0, *f"{index} is a number that ".encode()] for index in range(number)]
    requests = [Request(p, tokens, stop_tokens=[0], temperature=1.0, seed=i) for i, p in enumerate(prompts)]

    async def one(client: httpx.AsyncClient, index: int) -> str:
        body = {"model": "small", "prompt": prompts[index], "max_tokens": tokens, "seed": index, "stream": True}
        text = ""
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if index % 3 == 0 and len(text) > index % 20:
                    break
        return text

    async def all_of_them(url: str) -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, verify=False) as client:
            return await asyncio.gather(*(one(client, index) for index in range(number)))

    memory = []
    with running_small(num_pages=200, max_seqs=64, buckets=(256,), decode_buckets=(64,)) as server:
        engine = server.engine
        expected = [generation.text for generation in server.alone(*requests)]
        for _ in range(4):
            for index, text in enumerate(asyncio.run(all_of_them(server.url))):
                if index % 3:
                    assert text == expected[index]
                else:
                    assert expected[index].startswith(text)
            server.wait_for(lambda: engine.num_running == engine.num_waiting == engine.pages_in_use == 0)
            memory.append(resident_bytes())
    assert memory[-1] - memory[1] < 8 * 2**20
    everything = engine._groups.allocators[0].allocate([object() for _ in range(engine.num_pages * engine.page_size)])
    assert sorted(everything.pages) == list(range(engine.num_pages))


@pytest.mark.slow
def test_the_example_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    command = [sys.executable, FOLDER.parent / "serve.py", "--port", "0", "--max-seqs", "2", "--api-key", "sesame"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        url = next(match[0] for line in process.stderr if (match := re.search(r"http://127.0.0.1:\d+", line)))
        headers = {"authorization": "Bearer sesame"}
        body = {"model": "checkpoint", "prompt": "import ", "max_tokens": 400, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        process.communicate(timeout=60)
        # uvicorn gives the signal on once all has ended.
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()
