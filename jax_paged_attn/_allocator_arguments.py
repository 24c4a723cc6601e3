"""Arguments of the allocator's methods: checked, and turned into integers, tuples and arrays."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Sized
from itertools import chain
from typing import Any, NoReturn

import numpy as np

LARGEST = 2**31 - 1


def integer(name: str, value: Any, at_least: int | None = None) -> int:
    if isinstance(value, bool):
        reject(name, "an integer", value)
    try:
        number = operator.index(value)
    except TypeError:
        reject(name, "an integer", value)
    if at_least is not None and number < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {number}")
    return number


def integer_list(name: str, values: Any) -> list[int]:
    """Integers from an iterable or a 1-d integer array."""
    if hasattr(values, "__array__"):
        return _integer_array(name, values, ndim=1).tolist()
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        reject(name, "a list of integers", values)
    items = list(values)
    if set(map(type, items)) <= {int}:
        return items
    return [integer(f"{name}[{i}]", item) for i, item in enumerate(items)]


def counts(name: str, values: Any, number: int) -> np.ndarray:
    """int64 `[number]` from an iterable or a 1-d array of integers in [0, 2³¹ - 1]."""
    if isinstance(values, np.ndarray):
        array = _integer_array(name, values, ndim=1)
    else:
        items = integer_list(name, values)
        try:
            array = np.fromiter(items, np.int64, len(items))
        except OverflowError:
            array = np.array(items, object)
    if len(array) != number:
        raise ValueError(f"{name}: expected {number}, one for each of ids, got {len(array)}")
    if number and not (array.min() >= 0 and array.max() <= LARGEST):
        wrong = array[(array < 0) | (array > LARGEST)][0]
        raise ValueError(f"{name}: expected integers from 0 to 2**31 - 1, got {wrong}")
    return array.astype(np.int64)


def hashable(name: str, value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        reject(name, "hashable values", value)
    return value


def token_tuple(name: str, tokens: Any) -> tuple[Hashable, ...]:
    if hasattr(tokens, "__array__"):
        return tuple(_integer_array(name, tokens, ndim=1).tolist())
    if not isinstance(tokens, Iterable):
        reject(name, "an iterable of tokens", tokens)
    items = tuple(tokens)
    hashable(name, items)  # here, so that nothing is half done when a token has no hash
    return items


def number_or_tokens(name: str, value: Any) -> tuple[int, tuple[Hashable, ...] | None]:
    """How many tokens, and which, or None if only their number was given."""
    if not isinstance(value, bool) and isinstance(value, (int, np.integer)):
        return integer(name, value, at_least=0), None
    if hasattr(value, "__array__") and np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.integer):
        return integer(name, value, at_least=0), None
    tokens = token_tuple(name, value)
    return len(tokens), tokens


def numbers_or_tokens(name: str, values: Any, number: int) -> tuple[np.ndarray, Any, np.ndarray | None]:
    """As `number_or_tokens`, for each of `number` sequences.

    Returns:
      int64 `[number]`, how many tokens; the tokens of each sequence, a list or an array `[number, n]`; bool `[number]`,
      which sequences have them, or None if none has.
    """
    if hasattr(values, "__array__"):
        array = np.asarray(values)
        if array.ndim == 1:
            return counts(name, array, number), [], None
        _integer_array(name, array, ndim=2)
        _require_length(name, array, number)
        return np.full(number, array.shape[1], np.int64), array, np.ones(number, bool)
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        reject(name, "a list of numbers or of tokens for each sequence", values)
    items = list(values)
    _require_length(name, items, number)
    kinds = set(map(type, items))
    if kinds <= {int}:
        return counts(name, items, number), [], None
    if kinds <= {list, tuple}:
        hashable(name, tuple(chain.from_iterable(items)))
        return np.fromiter(map(len, items), np.int64, number), items, np.ones(number, bool)
    pairs = [number_or_tokens(f"{name}[{i}]", item) for i, item in enumerate(items)]
    told = np.array([tokens is not None for _, tokens in pairs])
    return counts(name, [count for count, _ in pairs], number), [tokens for _, tokens in pairs], told


def reject(name: str, expected: str, value: Any) -> NoReturn:
    raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}") from None


def _integer_array(name: str, value: Any, ndim: int) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != ndim or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: expected a {ndim}-d integer array, got {array.dtype}{list(array.shape)}")
    return array


def _require_length(name: str, items: Sized, number: int) -> None:
    if len(items) != number:
        raise ValueError(f"{name}: expected {number}, one for each of ids, got {len(items)}")
