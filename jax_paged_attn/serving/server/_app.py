"""The application: which paths there are, and what lives as long as it does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from jax_paged_attn.serving._engine import Engine
from jax_paged_attn.serving._text import Tokenizer
from jax_paged_attn.serving.server._access import RequireKey, json_body
from jax_paged_attn.serving.server._answer import Answer
from jax_paged_attn.serving.server._chat import ChatTemplate
from jax_paged_attn.serving.server._choices import Pieces
from jax_paged_attn.serving.server._errors import ApiError, failed, shutting_down
from jax_paged_attn.serving.server._forms import Form, Served, chat_form, completion_form
from jax_paged_attn.serving.server._live import live_routes
from jax_paged_attn.serving.server._metrics import Metrics, Snapshot
from jax_paged_attn.serving.server._thread import EngineThread

_Form = Callable[[dict[str, Any], Served], Awaitable[Form]]
_OPEN_PATHS = frozenset({"/health", "/"})  # the page at / holds nothing secret, and asks for the key


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    stop_tokens: Collection[int] = (),
    chat_template: ChatTemplate | None = None,
    api_key: str | None = None,
    max_prompt_tokens: int | None = None,
    max_body_bytes: int = 8 * 2**20,
    events_per_second: float = 1000.0,
    routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """An application with OpenAI's interface, for any ASGI server.

    While it lives, from its lifespan's start to its end, the engine belongs to a thread of its own: nobody else may
    touch it. `Engine(max_waiting=...)` bounds the queue, and `Engine(max_logprobs=...)` log probabilities.

    Args:
      engine: one with the tokenizer. Call `warm_up` first, or the first requests wait for compilations.
      tokenizer: between texts and tokens. A method `token_bytes` of it says the bytes of tokens that are no text.
      model_name: what clients call the model.
      stop_tokens: ids that end every output.
      chat_template: for `/v1/chat/completions`; without one, chats are refused.
      api_key: what clients have to send as bearer token, for all but `/health` and the page at `/`; None for no check.
      max_prompt_tokens: tokens per prompt; None for what the engine holds.
      max_body_bytes: bytes per request's body.
      events_per_second: about how many events all streams together get. With more tokens than that, an event has
        several of a stream's tokens; first and last ones do not wait.
      routes: more paths, behind the same key.

    Raises:
      ValueError: a bad argument; the message names it, what was expected and what came.

    Example:
      >>> import asyncio
      >>> import httpx
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.serving import ByteTokenizer, Engine
      >>> from jax_paged_attn.serving.server import create_app
      >>> class Counting:
      ...     vocab_size, max_len, weights = 256, 64, ()
      ...     def make_cache(self, num_pages, page_size):
      ...         return jnp.zeros(num_pages)
      ...     def hidden(self, weights, cache, tokens, step):
      ...         return tokens, cache
      ...     def logits(self, weights, hidden):
      ...         return jax.nn.one_hot(hidden + 1, self.vocab_size)
      >>> tokenizer = ByteTokenizer(bos=0)
      >>> engine = Engine(Counting(), num_pages=16, tokenizer=tokenizer)
      >>> app = create_app(engine, tokenizer, model_name="counting")
      >>> async def ask():
      ...     body = {"model": "counting", "prompt": "a", "max_tokens": 3, "temperature": 0}
      ...     async with app.router.lifespan_context(app):
      ...         async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
      ...             return (await client.post("/v1/completions", json=body)).json()
      >>> asyncio.run(ask())["choices"][0]["text"]
      'bcd'
    """
    if not isinstance(model_name, str) or not model_name:
        raise ValueError(f"model_name: expected a string that is not empty, got {model_name!r}")
    if api_key is not None and (not isinstance(api_key, str) or not api_key):
        raise ValueError("api_key: expected a string that is not empty, or None")
    most = engine.longest - 1
    if max_prompt_tokens is not None:
        most = min(max_prompt_tokens, most)
    served = Served(model_name, tokenizer, engine.longest, most, frozenset(stop_tokens), chat_template)
    if not events_per_second > 0:
        raise ValueError(f"events_per_second: expected a positive number, got {events_per_second}")
    service = Service(engine, served, max_body_bytes, events_per_second)
    app = Starlette(
        routes=[*service.routes(), *routes],
        middleware=[] if api_key is None else [Middleware(RequireKey, key=api_key, open_paths=_OPEN_PATHS)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _fault},
        lifespan=service.lifespan,
    )
    app.state.service = service
    return app


class Service:
    """What the handlers of an application share.

    Args:
      engine: used by its thread alone.
      served: what is served.
      max_body_bytes: bytes per request's body.
      events_per_second: see `create_app`.
    """

    def __init__(self, engine: Engine, served: Served, max_body_bytes: int, events_per_second: float):
        self._engine = engine
        self._events_per_second = events_per_second
        self._served = served
        self._max_body_bytes = max_body_bytes
        self._pieces = Pieces(served.tokenizer)
        self._metrics = Metrics()
        self._created = int(time.time())
        self._thread: EngineThread | None = None
        self._is_draining = False

    def routes(self) -> list[BaseRoute]:
        """All paths."""
        return [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._numbers, methods=["GET"]),
            *live_routes(self._view),
        ]

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The time in which the engine is the thread's."""
        self._thread, self._is_draining = EngineThread(self._engine, self._events_per_second), False
        try:
            yield
        finally:
            await self._thread.stop()

    def drain(self) -> None:
        """From now on new requests are refused, and those that are under way go on."""
        self._is_draining = True

    def end_all(self) -> None:
        """Ends what is under way; clients get an error."""
        self.engine_thread.end_all()

    @property
    def engine_thread(self) -> EngineThread:
        """The thread, once the lifespan has begun."""
        if self._thread is None:
            raise RuntimeError("create_app: expected an application whose lifespan has begun")
        return self._thread

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, completion_form)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat_form)

    async def _answer(self, request: Request, form_of: _Form) -> Response:
        arrival = time.perf_counter()
        try:
            if self._is_draining or not self.engine_thread.is_alive:
                raise shutting_down()
            form = await form_of(await json_body(request, self._max_body_bytes), self._served)
        except ClientDisconnect:
            self._metrics.count("cancelled")
            return Response()  # which nobody reads
        except Exception as error:
            is_refusal = isinstance(error, ApiError) and error.status < 500
            self._metrics.count("refused" if is_refusal else "failed")
            raise
        return Answer(form, self._served, self._pieces, self.engine_thread, self._metrics, arrival)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        if (name := request.path_params["name"]) != self._served.model_name:
            raise ApiError(404, f"the model {name!r} is not served here", param="model", code="model_not_found")
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        return {
            "id": self._served.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "jax_paged_attn",
            "max_model_len": self._served.max_len,
        }

    async def _health(self, request: Request) -> Response:
        if self._is_draining or not self.engine_thread.is_alive:
            raise shutting_down()
        return JSONResponse({"status": "ok"})

    async def _numbers(self, request: Request) -> Response:
        snapshot = await self.engine_thread.run(lambda: Snapshot.of(self._engine))
        return Response(self._metrics.text(snapshot), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _view(self) -> dict[str, Any]:
        """Who has which page now. The copy is the thread's work, its form for JSON is not."""
        return (await self.engine_thread.run(self._engine.pool_view)).as_dict()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, such as an unknown path, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _fault(request: Request, error: Exception) -> Response:
    return failed().response()
