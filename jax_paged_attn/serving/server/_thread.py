"""The engine's thread, which alone touches the engine, and the calls through which an event loop waits for it.

Requests, cancellations and questions reach the thread by a queue, and are taken between two steps. All that is new goes
to the event loop together: after each step while there are few streams, and less often the more there are.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from jax_paged_attn.serving._engine import Engine
from jax_paged_attn.serving._requests import Generation, QueueFull, Request, TokenLogprobs
from jax_paged_attn.serving.server._errors import failed, queue_full, shutting_down

_LOGGER = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Refused(Exception):
    """The engine cannot serve a request; the message is the engine's, which begins with the name of the field."""


class Abandoned(Exception):
    """The client has gone."""


@dataclasses.dataclass(slots=True)
class News:
    """What is new of one generation of a call.

    Attributes:
      index: which of the call's requests it is.
      tokens: the new ones.
      logprobs: one entry per token, if the request asked for them.
      finish_reason: see `Generation`; None while there is more to come.
      error: what ended it, where the reason is "error".
    """

    index: int
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None
    error: Exception | None


class Call:
    """Requests that one client waits for. Its methods are the event loop's, its underscored members the package's.

    Args:
      requests: all of them are queued, or none is.
    """

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self._generations: dict[int, Generation] = {}  # the engine thread's: those that have not ended
        self._seen: list[int] = []  # the engine thread's: tokens that were reported, or are the prompt's
        self._news: list[News] = []
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def news(self) -> list[News]:
        """Waits until something is new; several steps' news come together where the caller is slower than the engine.

        Raises:
          ApiError: the call was ended by the server.
          Refused: the engine cannot serve one of the requests.
          Abandoned: `abandon` was called.
        """
        if not self._news and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure
        news, self._news = self._news, []
        return news

    def abandon(self) -> None:
        """Says that nobody waits any more."""
        self._fail(Abandoned())

    def _add(self, news: list[News]) -> None:
        self._news += news
        self._wake()

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineThread:
    """Runs an engine in a thread of its own. All methods are the event loop's.

    A step that raises is tried again, as the engine loses no request by it. If the next one raises, too, the call that
    came last among those that ran is ended: it is the likeliest cause, since the others were served without it.

    Args:
      engine: nobody else may use it until `stop` has returned.
      events_per_second: about how often calls hear of new tokens, all of them together.

    Attributes:
      loop: the event loop that made it.
    """

    def __init__(self, engine: Engine, events_per_second: float):
        self._engine = engine
        self._seconds_per_event = 1 / events_per_second
        self._next_report = 0.0  # until then only first and last tokens are told
        self.loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._calls: list[Call] = []  # in the order of their arrival
        self._failures: list[tuple[Call, Exception]] = []  # to be told to the event loop
        self._failed_steps = 0
        self._is_stopping = False  # the event loop's
        self._has_stopped = False  # the thread's
        self._thread = threading.Thread(target=self._run, name="jax_paged_attn engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while requests are taken."""
        return self._thread.is_alive() and not self._is_stopping

    def submit(self, requests: Sequence[Request]) -> Call:
        """Queues requests; what becomes of them is the call's news.

        Raises:
          ApiError: the thread has ended.
        """
        call = Call(requests)
        self._put(functools.partial(self._admit, call))
        return call

    def cancel(self, call: Call) -> None:
        """Frees what the call holds; does nothing if all of it has ended."""
        if self.is_alive:
            self._put(functools.partial(self._release, call))

    async def run(self, function: Callable[[], _Result]) -> _Result:
        """What `function` returns when the thread calls it, between two steps.

        Raises:
          ApiError: the thread has ended.
          Exception: what `function` raises.
        """
        future: concurrent.futures.Future[_Result] = concurrent.futures.Future()

        def call() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._put(call)
        return await asyncio.wrap_future(future)

    def end_all(self) -> None:
        """Ends all calls, whose clients are told that the server shuts down."""
        if self.is_alive:
            self._put(self._end_all)

    async def stop(self) -> None:
        """Ends all calls and the thread."""
        if self.is_alive:
            self._put(self._stop)
        self._is_stopping = True
        await asyncio.to_thread(self._thread.join)

    def _put(self, task: Callable[[], object]) -> None:
        if not self.is_alive:
            raise shutting_down()
        self._inbox.put(task)

    # ---- the thread's

    def _run(self) -> None:
        try:
            while not self._has_stopped:
                self._do_tasks()
                if self._engine.has_work:
                    self._step()
                self._report()
        finally:
            self._end_all()
            self._report()

    def _do_tasks(self) -> None:
        """Does what is in the queue; waits for it while the engine has nothing to do."""
        task = self._inbox.get() if not self._engine.has_work else None
        while True:
            if task is not None:
                task()
            try:
                task = self._inbox.get_nowait()
            except queue.Empty:
                return

    def _step(self) -> None:
        try:
            self._engine.step()
            self._failed_steps = 0
        except Exception as error:
            _LOGGER.exception("a step failed")
            self._failed_steps += 1
            if self._failed_steps > 1:
                self._end_last(error)

    def _end_last(self, error: Exception) -> None:
        """Ends the call that came last among those that had a part in steps."""
        ran = [c for c in self._calls if any(g.is_running or g.preemptions for g in c._generations.values())]
        if call := next(reversed(ran or self._calls), None):
            _LOGGER.error("ends the newest request, as steps fail: %r", error)
            self._end(call, failed())

    def _admit(self, call: Call) -> None:
        try:
            for index, request in enumerate(call.requests):
                call._generations[index] = self._engine.submit(request)
                call._seen.append(len(request.prompt))
        except QueueFull:
            self._end(call, queue_full())
        except (ValueError, TypeError) as error:
            self._end(call, Refused(str(error)))
        except Exception:  # a tokenizer's
            _LOGGER.exception("a request could not be queued")
            self._end(call, failed())
        else:
            self._calls.append(call)

    def _end(self, call: Call, failure: Exception) -> None:
        self._release(call)
        self._failures.append((call, failure))

    def _release(self, call: Call) -> None:
        for generation in call._generations.values():
            self._engine.cancel(generation)
        call._generations.clear()
        if call in self._calls:
            self._calls.remove(call)

    def _end_all(self) -> None:
        for call in list(self._calls):
            self._end(call, shutting_down())

    def _stop(self) -> None:
        self._has_stopped = True

    def _report(self) -> None:
        """Hands what is new to the event loop, all at once, since waking it costs most."""
        now = time.monotonic()
        is_due = now >= self._next_report
        news = [(call, _news_of(call)) for call in self._calls if is_due or _cannot_wait(call)]
        news = [(call, new) for call, new in news if new]
        failures, self._failures = self._failures, []
        if not news and not failures:
            return
        if is_due:
            self._next_report = now + self._seconds_per_event * len(news)
        self._calls = [call for call in self._calls if call._generations]
        try:
            self.loop.call_soon_threadsafe(_deliver, news, failures)
        except RuntimeError:  # the loop is closed, so nobody waits
            self._has_stopped = True


def _cannot_wait(call: Call) -> bool:
    """True if a generation has ended, or has its first tokens."""
    for index, generation in call._generations.items():
        if generation.finish_reason is not None:
            return True
        if call._seen[index] == len(generation.request.prompt) < len(generation.tokens):
            return True
    return False


def _news_of(call: Call) -> list[News]:
    found = []
    for index, generation in call._generations.items():
        seen, tokens, reason = call._seen[index], generation.tokens, generation.finish_reason
        if len(tokens) == seen and reason is None:
            continue
        start = seen - len(generation.request.prompt)
        found.append(News(index, tokens[seen:], generation.logprobs[start:], reason, generation.error))
        call._seen[index] = len(tokens)
    for news in found:
        if news.finish_reason is not None:
            del call._generations[news.index]
    return found


def _deliver(news: list[tuple[Call, list[News]]], failures: list[tuple[Call, Exception]]) -> None:
    for call, new in news:
        call._add(new)
    for call, error in failures:
        call._fail(error)
