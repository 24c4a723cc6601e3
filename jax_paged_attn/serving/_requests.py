"""Requests to the engine, checked once where they come in, and how far each one is."""

from __future__ import annotations

import dataclasses
import math
import operator
import reprlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_paged_attn.serving._text import OutputText

_LARGEST_SEED = 2**32 - 1
_LARGEST_INT32 = 2**31 - 1


class QueueFull(RuntimeError):
    """As many requests wait as the engine's `max_waiting` allows: try again later.

    Example:
      >>> from jax_paged_attn.serving import QueueFull
      >>> issubclass(QueueFull, RuntimeError)
      True
    """


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      prompt: token ids, at least one: a sequence of integers, or a NumPy or JAX array of them, `[n]`.
      max_new_tokens: at most this many are generated.
      stop_tokens: ids that end the generation; they are not part of the output.
      stop: strings that end the generation; `Generation.text` ends in front of the one that is complete first. Needs an
        engine with a tokenizer.
      temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
      min_p: draw only from tokens that have at least this share of the likeliest token's probability.
      top_k: draw from this many of the likeliest tokens only; 0 for all.
      top_p: draw from the likeliest tokens only that together have this probability, and always from one at least.
      seed: of the draws, in [0, 2³²); the same request gives the same tokens, whatever else is served.
      logprobs: None for none; otherwise `Generation.logprobs` has the log probability of each token and of this many of
        the likeliest ones, at most the engine's `max_logprobs`.
      priority: requests of lower numbers go first, and are preempted last; equals in the order of their arrival.
      salt: prefixes are shared only among requests of equal salts: one per tenant keeps tenants apart. Any hashable
        value.
      on_token: called with each new token. It may submit and cancel requests, but not step the engine. If it raises,
        its request ends with "error".

    Example:
      >>> from jax_paged_attn.serving import Request
      >>> Request([1, 2, 3], max_new_tokens=8, temperature=0.7, top_p=0.9, seed=1).top_k
      0
    """

    prompt: Sequence[int] | np.ndarray | Array
    max_new_tokens: int
    stop_tokens: Collection[int] | np.ndarray | Array = ()
    stop: Sequence[str] = ()
    temperature: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    priority: int = 0
    salt: Hashable = None
    on_token: Callable[[int], object] | None = None


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of one output token, by the model's own logits, before temperature and filters.

    Attributes:
      chosen: that of the token itself.
      top: (token id, log probability) of the likeliest tokens, the likeliest first.

    Example:
      >>> from jax_paged_attn.serving import TokenLogprobs
      >>> TokenLogprobs(-0.5, ((7, -0.5), (3, -1.2))).top[0]
      (7, -0.5)
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(eq=False)
class Generation:
    """A request and how far it is.

    Attributes:
      request: as `checked_request` returns it: a copy, with the prompt as a tuple.
      tokens: the prompt, then what was generated.
      logprobs: one entry per output token, if the request asked for them.
      finish_reason: "length", "stop", "cancelled" or "error"; None while there is more to come.
      error: the exception that `on_token` or the tokenizer raised, where the reason is "error".
      preemptions: how often its pages were taken away.

    Example:
      >>> from jax_paged_attn.serving import Generation, Request
      >>> generation = Generation(Request((1, 2), 8), [1, 2, 5])
      >>> generation.output, generation.finish_reason
      ([5], None)
    """

    request: Request
    tokens: list[int]
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    preemptions: int = 0
    _text: OutputText | None = None
    _decoded: int = 0  # leading tokens that `_text` knows or that are the prompt's
    _arrival: int = 0  # its place among all requests
    _submitted: float = 0.0  # seconds of the monotonic clock
    _last_token: float = 0.0  # likewise, when the last token was handed out
    _sequence: tuple[int, ...] = ()  # the id in each layer group's allocator, while admitted
    _row: int = -1  # where the device keeps its last token, while admitted
    _computed: int = 0  # leading tokens that are in the cache once the dispatched steps have run
    _slots: int = 0  # leading tokens that have slots in its pages
    _told: int = 0  # leading tokens whose values the allocator knows
    _in_flight: int = 0  # tokens that dispatched steps give and the host has not read

    @property
    def is_running(self) -> bool:
        """True while it holds pages: not in the queue, and not ended."""
        return bool(self._sequence)

    @property
    def output(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def text(self) -> str:
        """The generated text so far: whole characters, none of which is taken back.

        Raises:
          ValueError: the engine has no tokenizer.
        """
        if self._text is None:
            raise ValueError("text: expected an engine with a tokenizer, got one without")
        self._decode()
        return self._text.text

    def _decode(self) -> bool:
        """Adds the new tokens to the text, if there is a tokenizer; True if a stop string is complete."""
        if self._text is None:
            return False
        for token in self.tokens[self._decoded :]:
            self._text.add(token)
        self._decoded = len(self.tokens)
        if self.finish_reason is not None:
            self._text.end()
        return self._text.stopped

    @property
    def _end(self) -> int:
        """Tokens after which there are no more."""
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def _length(self) -> int:
        """Tokens so far, those included that the host has not read."""
        return len(self.tokens) + self._in_flight

    @property
    def _pending(self) -> int:
        """Tokens that are still to be computed before the next one can be sampled."""
        return self._length - self._computed

    @property
    def _rank(self) -> tuple[int, int]:
        """Who goes first: the lower."""
        return self.request.priority, self._arrival


def checked_request(request: Request, vocab_size: int, *, max_logprobs: int, has_tokenizer: bool) -> Request:
    """A copy in plain Python types, which the caller's arrays and lists no longer change.

    Raises:
      ValueError, TypeError: a field that cannot be served; the message names it, what was expected and what came.
    """
    if not isinstance(request, Request):
        raise TypeError(f"request: expected a Request, got {_shown(request)}")
    prompt = _token_ids("prompt", request.prompt, Sequence, vocab_size)
    if not prompt:
        raise ValueError("prompt: expected at least one token, got none")
    temperature = real("temperature", request.temperature)
    if temperature < 0:
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature}")
    top_p = real("top_p", request.top_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    min_p = real("min_p", request.min_p)
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: expected a number in [0, 1], got {min_p}")
    if request.on_token is not None and not callable(request.on_token):
        raise TypeError(f"on_token: expected a function of a token or None, got {_shown(request.on_token)}")
    try:
        hash(request.salt)
    except TypeError:
        raise TypeError(f"salt: expected a hashable value, got {_shown(request.salt)}") from None
    logprobs = request.logprobs
    return Request(
        prompt,
        integer("max_new_tokens", request.max_new_tokens, least=1),
        stop_tokens=frozenset(_token_ids("stop_tokens", request.stop_tokens, Collection, vocab_size)),
        stop=_stop_strings(request.stop, has_tokenizer),
        temperature=temperature,
        min_p=min_p,
        top_k=min(integer("top_k", request.top_k, least=0), _LARGEST_INT32),
        top_p=top_p,
        seed=integer("seed", request.seed, least=0, most=_LARGEST_SEED),
        logprobs=None if logprobs is None else integer("logprobs", logprobs, least=0, most=max_logprobs),
        priority=integer("priority", request.priority),
        salt=request.salt,
        on_token=request.on_token,
    )


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int: Python's, NumPy's, or a JAX scalar, but no bool.

    Raises:
      TypeError: it is no integer.
      ValueError: it is below `least` or above `most`.
    """
    try:
        if isinstance(value, bool):  # an int by inheritance only
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {_shown(value)}") from None
    if (least is not None and number < least) or (most is not None and number > most):
        allowed = f"of at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name}: expected an integer {allowed}, got {number}")
    return number


def real(name: str, value: Any) -> float:
    """`value` as a finite float.

    Raises:
      TypeError: it is no number.
      ValueError: it is NaN, infinite, or beyond a float's range.
    """
    try:
        if isinstance(value, bool | np.bool_ | str | bytes) or getattr(value, "ndim", 0):
            raise TypeError
        number = float(value)
    except TypeError:
        raise TypeError(f"{name}: expected a number, got {_shown(value)}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {_shown(value)}")
    return number


def _stop_strings(values: Any, has_tokenizer: bool) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"stop: expected a sequence of strings, got {_shown(values)}")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"stop[{index}]: expected a string, got {_shown(value)}")
        if not value:
            raise ValueError(f"stop[{index}]: expected a string that is not empty, got ''")
    if values and not has_tokenizer:
        raise ValueError(f"stop: expected none, since the engine has no tokenizer, got {_shown(values)}")
    return tuple(values)


def _token_ids(name: str, values: Any, kind: type, vocab_size: int) -> tuple[int, ...]:
    if isinstance(values, Array | np.ndarray):
        if not jnp.issubdtype(values.dtype, np.integer):
            raise TypeError(f"{name}: expected integers, got an array of {values.dtype}")
        if values.ndim != 1:
            raise ValueError(f"{name}: expected token ids of shape [n], got an array of shape {values.shape}")
        values = np.asarray(values).tolist()
    if not isinstance(values, kind) or isinstance(values, str | bytes | bytearray | Mapping):
        raise TypeError(f"{name}: expected a {kind.__name__.lower()} of token ids, got {_shown(values)}")
    ids = tuple(integer(f"{name}[{index}]", value) for index, value in enumerate(values))
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}[{index}]: expected token ids in [0, {vocab_size}), got {token}")
    return ids


def _shown(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"
