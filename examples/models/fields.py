"""The fields of a config.json, each checked as it is read; a wrong one is a `CheckpointError` of one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_LARGEST_INTEGER = 2**31 - 1
_REQUIRED: Any = object()


class CheckpointError(ValueError):
    """A folder that holds no checkpoint that a model here can run; the message names the file and what was expected."""


class Fields:
    """The fields of one JSON object, each checked as it is read. A field that is null is as good as absent.

    Args:
      data: the object.
      source: where it stands, for messages.
    """

    def __init__(self, data: dict[str, Any], source: Path | str):
        self._data = data
        self.source = source

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def error(self, name: str, expected: str) -> CheckpointError:
        got = shown(self._data[name]) if name in self._data else "no such field"
        return CheckpointError(f"{self.source}: {name}: expected {expected}, got {got}")

    def has(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self._data.get(name) is not None

    def integer(self, name: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
        """At least `least`. Without a default the field has to be there."""
        return self._read(name, default, f"an integer of at least {least}", lambda value: _is_integer(value, least))

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """Positive and finite; the default may be None."""
        value = self._read(name, default, "a positive number", _is_positive_number)
        return None if value is None else float(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of positive integers."""

        def is_right(value: Any) -> bool:
            return isinstance(value, list) and all(_is_integer(item, 1) for item in value)

        return tuple(self._read(name, _REQUIRED, "a list of positive integers", is_right))

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive and finite numbers, at least one."""

        def is_right(value: Any) -> bool:
            return isinstance(value, list) and bool(value) and all(map(_is_positive_number, value))

        return tuple(map(float, self._read(name, _REQUIRED, "a list of positive numbers", is_right)))

    def boolean(self, name: str, default: bool) -> bool:
        return self._read(name, default, "true or false", lambda value: isinstance(value, bool))

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        """One of a few strings."""
        expected = " or ".join(map(repr, choices))
        return self._read(name, default, expected, lambda value: isinstance(value, str) and value in choices)

    def indices(self, name: str, below: int) -> tuple[int, ...]:
        """A list of integers in [0, below); none if there is no such field."""

        def is_right(value: Any) -> bool:
            return isinstance(value, list) and all(_is_integer(item, 0) and item < below for item in value)

        return tuple(self._read(name, [], f"a list of integers in [0, {below})", is_right))

    def flags(self, name: str, least_count: int) -> tuple[bool, ...] | None:
        """A list of zeros and ones, at least so many; None if there is no such field."""

        def is_right(value: Any) -> bool:
            return isinstance(value, list) and len(value) >= least_count and all(item in (0, 1) for item in value)

        value = self._read(name, None, f"a list of at least {least_count} zeros and ones", is_right)
        return None if value is None else tuple(map(bool, value))

    def strings(self, name: str, choices: tuple[str, ...], count: int) -> tuple[str, ...] | None:
        """A list of so many strings, each one of a few; None if there is no such field."""

        def is_right(value: Any) -> bool:
            return isinstance(value, list) and len(value) == count and all(item in choices for item in value)

        value = self._read(name, None, f"a list of {count} of {' or '.join(map(repr, choices))}", is_right)
        return None if value is None else tuple(value)

    def section(self, name: str) -> Fields:
        """The object in the field; an empty one if there is none."""
        data = self._read(name, {}, "an object", lambda value: isinstance(value, dict))
        return Fields(data, f"{self.source}: {name}")

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of them."""

        def is_token(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size

        value = self._read(
            name,
            [],
            f"token ids in [0, {vocab_size})",
            lambda value: all(map(is_token, value)) if isinstance(value, list) else is_token(value),
        )
        return tuple(value) if isinstance(value, list) else (value,)

    def _read(self, name: str, default: Any, expected: str, is_right: Any) -> Any:
        value = self._data.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if not is_right(value):
            raise self.error(name, expected)
        return value


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST_INTEGER


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
