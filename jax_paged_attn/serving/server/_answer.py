"""An answer on its way to a client: whole or in events, ended by the last token, by a fault, or by the client."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jax_paged_attn.serving.server._choices import Choice, Entry, Pieces, Writer
from jax_paged_attn.serving.server._errors import ApiError, failed
from jax_paged_attn.serving.server._forms import Form, Served
from jax_paged_attn.serving.server._metrics import Metrics
from jax_paged_attn.serving.server._thread import Abandoned, Call, EngineThread, News, Refused

_LOGGER = logging.getLogger(__name__)
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # else nginx holds events back
]


class Answer(Response):
    """Submits what a form asks for, and sends what comes of it. The status is known with the first tokens.

    Args:
      form: what was asked for.
      served: with which tokenizer, under which name.
      pieces: of that tokenizer.
      thread: the engine's.
      metrics: where the outcome is counted.
      arrival: when the request came, by `time.perf_counter`.
    """

    def __init__(
        self, form: Form, served: Served, pieces: Pieces, thread: EngineThread, metrics: Metrics, arrival: float
    ):
        self._form = form
        self._served = served
        self._thread = thread
        self._metrics = metrics
        self._writer = Writer(form, served.model_name, pieces)
        self._last = arrival
        self._has_tokens = False
        self._has_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the answer to its end, whatever that is."""
        call = self._thread.submit(self._form.requests)
        watcher = asyncio.create_task(_watch(receive, call))
        outcome = "cancelled"
        try:
            await (self._stream if self._form.streams else self._whole)(call, send)
            outcome = "completed"
        except Abandoned:
            pass
        except Exception as error:
            told = self._told(error)
            outcome = "failed" if told.status >= 500 else "refused"
            await self._tell(told, scope, receive, send)
        finally:
            watcher.cancel()
            if outcome != "completed":
                self._thread.cancel(call)
            self._metrics.count(outcome)

    async def _stream(self, call: Call, send: Send) -> None:
        choices = await self._choices(call)
        opened: set[int] = set()
        while any(choice.finish_reason is None for choice in choices):
            events = ""
            for news in await self._news(call):
                if news.index not in opened:
                    opened.add(news.index)
                    events += self._writer.opening(news.index)
                text, entries = choices[news.index].add(news)
                events += self._writer.event(news.index, text, entries, news.finish_reason)
            if events:
                await self._start(send)
                await send({"type": "http.response.body", "body": events.encode(), "more_body": True})
        await self._start(send)
        await send({"type": "http.response.body", "body": self._writer.closing(choices).encode()})

    async def _whole(self, call: Call, send: Send) -> None:
        choices = await self._choices(call)
        texts = ["" for _ in choices]
        entries: list[list[Entry]] = [[] for _ in choices]
        while any(choice.finish_reason is None for choice in choices):
            for news in await self._news(call):
                text, found = choices[news.index].add(news)
                texts[news.index] += text
                entries[news.index] += found
        body = self._writer.whole(choices, texts, entries)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._has_started = True
        await send({"type": "http.response.body", "body": body})

    async def _choices(self, call: Call) -> list[Choice]:
        try:
            return [Choice(request, self._served.tokenizer) for request in self._form.requests]
        except Exception:
            await call.news()  # the engine says better what is wrong with a prompt
            raise

    async def _news(self, call: Call) -> list[News]:
        """The call's next news, whose times are taken.

        Raises:
          Exception: what ended one of the generations.
        """
        news = await call.news()
        count = sum(len(new.tokens) for new in news)
        if count:
            now = time.perf_counter()
            if self._has_tokens:
                # Choices come side by side, so that each has its share of the tokens.
                self._metrics.per_token.observe((now - self._last) * len({new.index for new in news}) / count)
            else:
                self._metrics.first_token.observe(now - self._last)
            self._last, self._has_tokens = now, True
        for new in news:
            if new.error is not None:
                raise new.error
        return news

    async def _start(self, send: Send) -> None:
        if not self._has_started:
            self._has_started = True
            await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})

    def _told(self, error: Exception) -> ApiError:
        """What the client is told of an error; the log has the others' details."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, Refused):
            return self._form.refusal(str(error))
        _LOGGER.error("a request failed", exc_info=error)
        return failed()

    async def _tell(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._has_started:
            await error.response()(scope, receive, send)
        elif self._form.streams:
            body = b"data: " + error.content + b"\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": body})


async def _watch(receive: Receive, call: Call) -> None:
    """Abandons the call when its client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.abandon()
