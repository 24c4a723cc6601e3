"""Requests to the engine, checked once where they come in, and how far each one is."""

from __future__ import annotations

import dataclasses
import math
import operator
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

_LARGEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      prompt: token ids, at least one: a sequence of integers, or a NumPy or JAX array of them, `[n]`.
      max_new_tokens: at most this many are generated.
      stop_tokens: ids that end the generation; they are not part of the output.
      temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
      top_p: draw from the likeliest tokens only that together have this probability, and always from one at least.
      seed: of the draws, in [0, 2³²); the same request gives the same tokens, whatever else is served.
      on_token: called with each new token. It may submit and cancel requests, but not step the engine. If it raises,
        its request ends with "error".
    """

    prompt: Sequence[int] | np.ndarray | Array
    max_new_tokens: int
    stop_tokens: Collection[int] | np.ndarray | Array = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    on_token: Callable[[int], object] | None = None


@dataclasses.dataclass(eq=False)
class Generation:
    """A request and how far it is.

    Attributes:
      request: as `checked_request` returns it: a copy, with the prompt as a tuple.
      tokens: the prompt, then what was generated.
      finish_reason: "length", "stop", "cancelled" or "error"; None while there is more to come.
      error: the exception that `on_token` raised, where the reason is "error".
      preemptions: how often its pages were taken away.
    """

    request: Request
    tokens: list[int]
    finish_reason: str | None = None
    error: Exception | None = None
    preemptions: int = 0
    _sequence: int = -1  # the allocator's id, while admitted
    _slots: int = 0  # leading tokens that have slots in its pages
    _computed: int = 0  # leading tokens that are in the cache

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def _pending(self) -> int:
        return len(self.tokens) - self._computed


def checked_request(request: Request, vocab_size: int) -> Request:
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
    if request.on_token is not None and not callable(request.on_token):
        raise TypeError(f"on_token: expected a function of a token or None, got {_shown(request.on_token)}")
    return Request(
        prompt,
        integer("max_new_tokens", request.max_new_tokens, least=1),
        stop_tokens=frozenset(_token_ids("stop_tokens", request.stop_tokens, Collection, vocab_size)),
        temperature=temperature,
        top_p=top_p,
        seed=integer("seed", request.seed, least=0, most=_LARGEST_SEED),
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
