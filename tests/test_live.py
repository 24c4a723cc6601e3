"""The pool as a display shows it, the routes of the page, and the page itself in a browser where there is one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from browser import Page, find_chromium, open_page
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jax_paged_attn.serving import Engine, Generation, PoolRequest, PoolView, Request, Stats
from jax_paged_attn.serving.server._live import live_routes

PAGE_SIZE = 2
VIEW = PoolView(
    page_size=PAGE_SIZE,
    owners=np.array([7, 7, 7, 9, -1, 0, 0], np.int32),
    sharers=np.array([2, 2, 1, 1, 0, 0, 0], np.int32),
    requests=(PoolRequest(7, 4, 1, 3, 2), PoolRequest(9, 5, 0, 3, 2)),
    waiting=1,
    stats=Stats(tokens=12, prompt_tokens=9, cached_tokens=4),
)


class Counting:
    """A model without attention: each token is the one before, plus one."""

    vocab_size, max_len, weights = 64, 64, ()

    def make_cache(self, num_pages: int, page_size: int) -> jax.Array:
        return jnp.zeros(num_pages)

    def hidden(self, weights: Any, cache: jax.Array, tokens: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        return tokens, cache

    def logits(self, weights: Any, hidden: jax.Array) -> jax.Array:
        return jax.nn.one_hot((hidden + 1) % self.vocab_size, self.vocab_size)


def make_engine(num_pages: int) -> Engine:
    return Engine(Counting(), num_pages=num_pages, page_size=PAGE_SIZE, max_seqs=3, buckets=(12,), decode_buckets=(3,))


def check(engine: Engine, generations: list[Generation]) -> PoolView:
    """The view, compared page by page with what the allocator says of each running request."""
    view, stats = engine.pool_view(), engine._groups.allocators[0].stats
    running = sorted((g for g in generations if g.is_running), key=engine._scheduler.running.index)
    holders: dict[int, list[int]] = {}
    for generation in running:
        for page in engine._groups.allocators[0].pages(generation._sequence[0]):
            holders.setdefault(page, []).append(generations.index(generation) + 1)
    for page, (owner, sharers) in enumerate(zip(view.owners.tolist(), view.sharers.tolist(), strict=True)):
        numbers = holders.get(page, [])
        assert sharers == len(numbers)
        assert owner == numbers[0] if numbers else owner in (0, -1)
    assert Counter(np.minimum(view.owners, 1).tolist()) == +Counter(
        {1: stats.pages_in_use, -1: stats.pages_cached, 0: stats.pages_free}
    )
    assert (view.num_pages, view.pages_in_use, view.pages_cached) == (
        (engine.num_pages, engine.pages_in_use, stats.pages_cached)
    )
    assert [r.number for r in view.requests] == [generations.index(g) + 1 for g in running]
    for request, generation in zip(view.requests, running, strict=True):
        pages = engine._groups.allocators[0].pages(generation._sequence[0])
        assert request.prompt_len == len(generation.request.prompt)
        assert request.output_len == len(generation.output)
        assert request.num_pages == len(pages)
        assert request.num_shared == sum(len(holders[page]) > 1 for page in pages)
    assert view.waiting == engine.num_waiting
    assert view.stats == engine.stats
    return view


def test_view_of_each_kind_of_page() -> None:
    engine = make_engine(num_pages=16)
    first = engine.submit(Request([1, 2, 3, 4, 5], max_new_tokens=12))
    engine.step()
    assert engine.pool_view().owners.tolist() == [1] * 3 + [0] * 13
    second = engine.submit(Request([1, 2, 3, 4, 9], max_new_tokens=3))
    engine.step()
    before = check(engine, [first, second])
    assert before.owners.tolist() == [1, 1, 1, 2, *[0] * 12]
    assert before.sharers.tolist() == [2, 2, 1, 1, *[0] * 12]
    assert [(r.number, r.num_pages, r.num_shared) for r in before.requests] == [(1, 3, 2), (2, 3, 2)]
    assert before.stats.hit_rate == 4 / 10

    engine.cancel(first)
    after = check(engine, [first, second])
    assert after.owners.tolist()[:4] == [2, 2, -1, 2]  # the third page is full by now
    engine.run()
    assert check(engine, [first, second]).requests == ()
    assert engine.pool_view().owners.tolist() == [-1] * 4 + [0] * 12
    assert before.sharers.tolist() == [2, 2, 1, 1, *[0] * 12]
    assert before.stats.finished == 0
    with pytest.raises(ValueError, match="read-only"):
        before.owners[0] = 5


def test_view_under_random_traffic() -> None:
    """Shared prefixes, preemptions, cancelled requests and new weights."""
    draw = np.random.default_rng(0)
    engine = make_engine(num_pages=20)
    generations: list[Generation] = []
    seen = Counter()
    for step in range(150):
        if engine.num_waiting < 3:
            prompt = [*range(int(draw.integers(1, 9))), *draw.integers(0, 3, 2).tolist()]
            generations.append(engine.submit(Request(prompt, int(draw.integers(1, 24)), priority=-step)))
        if draw.random() < 0.1:
            engine.cancel(generations[int(draw.integers(len(generations)))])
        if step == 100:
            engine.update_weights(())
        engine.step()
        view = check(engine, generations)
        seen.update(
            shared=int((view.sharers > 2).any()),
            cached=int(view.pages_cached > 0),
            full=int(view.pages_in_use == view.num_pages),
            again=int(any(generations[r.number - 1].preemptions for r in view.requests)),
        )
    assert min(seen[name] for name in ("shared", "cached", "full", "again")) > 5, seen
    engine.run()
    assert check(engine, generations).pages_in_use == 0


def test_dict_of_a_view_has_all_pages_in_runs() -> None:
    said = json.loads(json.dumps(VIEW.as_dict()))
    assert said["pages"] == [[7, 2, 2], [7, 1, 1], [9, 1, 1], [-1, 0, 1], [0, 0, 2]]
    assert said["requests"][1] == {"number": 9, "prompt_len": 5, "output_len": 0, "num_pages": 3, "num_shared": 2}
    assert {name: said[name] for name in ("num_pages", "page_size", "pages_in_use", "pages_cached", "waiting")} == (
        {"num_pages": 7, "page_size": 2, "pages_in_use": 4, "pages_cached": 1, "waiting": 1}
    )
    assert said["stats"]["hit_rate"] == pytest.approx(4 / 9)


# ---- routes


async def some_view() -> dict[str, Any]:
    return VIEW.as_dict()


def get(path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Starlette(routes=live_routes(some_view)))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_pool_is_json_that_nobody_keeps() -> None:
    response = get("/pool")
    assert response.json() == VIEW.as_dict()
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"


def test_page_needs_nothing_from_elsewhere() -> None:
    response = get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", policy[name]) for name in ("script-src", "style-src"))
    assert not re.search(r"""(src|href)="(?!data:)|innerHTML|<\w+[^>]* (style|on\w+)=""", response.text)


# ---- the page in a browser


class Server:
    """The page's routes beside a `/v1/completions` that says what the test wants, in a thread.

    Attributes:
      url: where it is.
      answers: False makes `/pool` fail.
      was_left: set once a client left in the middle of a text.
    """

    def __init__(self):
        self.answers = True
        self.was_left = threading.Event()
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/models", self._models),
        ]
        uvicorn = pytest.importorskip("uvicorn")
        config = uvicorn.Config(Starlette(routes=[*live_routes(self._view), *routes]), port=0, log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _view(self) -> dict[str, Any]:
        if not self.answers:
            raise RuntimeError("no view")
        return VIEW.as_dict()

    async def _models(self, request: HttpRequest) -> Response:
        return JSONResponse({"data": [{"id": "small"}]})

    async def _completions(self, request: HttpRequest) -> Response:
        body = await request.json()
        assert (body["model"], body["stream"]) == ("small", True)
        if body["prompt"] == "refuse":
            return JSONResponse({"error": {"message": "prompt: too rude"}}, 400)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        texts = ["<b>bold</b>", " é", f" at {body['temperature']}"]
        choices: list[dict[str, Any]] = [{"index": 0, "text": text, "finish_reason": None} for text in texts]
        try:
            while body["prompt"] == "for ever":
                yield f"data: {json.dumps({'choices': choices[:1]})}\r\n\r\n".encode()
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.was_left.set()
            raise
        choices.append({"index": 0, "text": "", "finish_reason": "length"})
        events: list[dict[str, Any]] = [{"choices": [choice]} for choice in choices]
        events.append({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        data = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events).encode()
        for start in range(0, len(data), 7):  # cuts through lines and characters
            yield data[start : start + 7]
            await asyncio.sleep(0)
        yield b"data: [DONE]\n\n"


@contextlib.contextmanager
def served() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.stop()


def text_of(page: Page, name: str) -> str:
    return page.evaluate(f"document.getElementById('{name}').textContent")


def ask(page: Page, prompt: str) -> None:
    page.evaluate(f"document.getElementById('prompt').value = {json.dumps(prompt)}")
    page.evaluate("document.getElementById('send').click()")


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_page_streams_text_and_colours_pages() -> None:
    with served() as server, open_page(find_chromium() or "") as page:
        page.call("Page.navigate", url=server.url)
        page.wait_for("document.querySelectorAll('#requests tr').length === 2")
        assert text_of(page, "connection") == "live"
        assert text_of(page, "used") == "4"
        label = page.evaluate("document.getElementById('grid').getAttribute('aria-label')")
        assert label == "The pool: 7 pages of 2 tokens, 4 in use, 2 of them shared, 1 cached"
        # One pixel near the corner of each page: two shared ones, one of each request, a cached one, two free ones.
        row = "grid.getContext('2d').getImageData(0, 0.2 * shape.side, grid.width, 1).data"
        pixel = "row.slice(4 * Math.round((page + 0.2) * shape.side)).slice(0, 4).join()"
        colours = page.evaluate(f"(() => {{ const row = {row}; return Array.from(owners, (_, page) => {pixel}); }})()")
        assert colours[2:4] == ["68,119,170,255", "221,204,119,255"]
        assert [colours.index(colour) for colour in colours] == [0, 0, 2, 3, 4, 5, 5]

        ask(page, "Say it")
        page.wait_for("document.getElementById('said').textContent.includes('Ended by')")
        assert text_of(page, "text") == "Say it<b>bold</b> é at 0.8"
        assert text_of(page, "said").startswith("128 tokens, ")
        ask(page, "for ever")
        page.wait_for("document.getElementById('output').textContent.length > 50")
        page.evaluate("document.getElementById('stop').click()")
        page.wait_for("document.getElementById('said').textContent === 'Stopped.'")
        assert server.was_left.wait(10)
        assert page.complaints == []

        ask(page, "refuse")
        page.wait_for("document.getElementById('said').textContent === '400: prompt: too rude'")
        server.answers = False
        page.wait_for("!document.getElementById('gone').hidden")
        assert text_of(page, "connection") == "refused"
        server.answers = True
        page.wait_for("document.getElementById('gone').hidden")
        assert text_of(page, "connection") == "live"
