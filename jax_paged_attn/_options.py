"""The keywords of attention, each written once: its type, its default, its check, and its effect on scores.

A keyword that changes scores, or which keys a row sees, is a line of `ScoreOptions` and a field of `Scoring`.
`Scoring.checked` has its check, one of the other methods its effect, and the docstring of `paged_attention` its
meaning. Everything else in Python follows: the signatures of all public functions, the Flax layer, the reference,
the derivatives, `cost_analysis`, the checks of `debug` and the attributes of the FFI call. C++ needs a new version of
the FFI target, which must not get an attribute that it does not know; CONTRIBUTING.md names the files.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypedDict, TypeVar, get_type_hints

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_paged_attn import _checks

Function = TypeVar("Function", bound=Callable[..., Any])

# ---- Types of the keywords, and the sets of them that functions take -------------------------------------------------


class ScoreOptions(TypedDict, total=False):
    """Static numbers that decide about scores."""

    scale: float | None
    sliding_window: int | None
    soft_cap: float | None


class Sinks(TypedDict, total=False):
    """A logit per head without a value."""

    sinks: ArrayLike | None


class PageScales(TypedDict, total=False):
    """Factors of 8-bit pages."""

    k_scale: ArrayLike | None
    v_scale: ArrayLike | None


class ValueDim(TypedDict, total=False):
    """How many numbers of each key are its value, where there is no pool of values."""

    value_dim: int | None


class EngineChoice(TypedDict, total=False):
    """Keywords that the choice of an engine depends on."""

    implementation: str | None
    batch_invariant: bool


class _Invariance(TypedDict, total=False):
    batch_invariant: bool


class _Causal(TypedDict, total=False):
    causal: bool


class Options(ScoreOptions, Sinks, PageScales, ValueDim, EngineChoice, total=False):
    """The keywords of `paged_attention`."""


class RaggedOptions(_Causal, Options, total=False):
    """The keywords of `ragged_paged_attention`."""


class ReferenceOptions(ScoreOptions, Sinks, PageScales, ValueDim, _Invariance, total=False):
    """The keywords of `paged_attention_reference`."""


class RaggedReferenceOptions(_Causal, ReferenceOptions, total=False):
    """The keywords of `ragged_paged_attention_reference`."""


class CacheOptions(ScoreOptions, Sinks, EngineChoice, total=False):
    """The keywords of `PagedKVCache.attend`: the cache has its own page scales."""


class RaggedCacheOptions(_Causal, CacheOptions, total=False):
    """The keywords of `PagedKVCache.attend_ragged`."""


class LayerOptions(ScoreOptions, EngineChoice, total=False):
    """The keywords of attention that a Flax layer takes: it is causal, and has sinks and page scales as variables."""


# ---- Signatures ------------------------------------------------------------------------------------------------------

# A keyword that is not here has None.
_DEFAULTS = {"causal": True, "batch_invariant": False}


def keywords(
    options: type, *, refuse: Mapping[str, str] = MappingProxyType({}), **defaults: Any
) -> Callable[[Function], Function]:
    """Gives a function that takes `**options` the keywords of a TypedDict, which it gets complete with defaults.

    `inspect.signature` and `help` show them one by one; type checkers read `**options: Unpack[...]`, which calls for
    the TypedDict. Keywords that the function does not have raise the TypeError that Python itself would raise.

    Args:
      options: the TypedDict.
      refuse: keywords that users may expect, with what their TypeError says.
      **defaults: those that differ from the usual ones, and those of keywords that overloads declare one by one.
    """
    types = {name: type(default) for name, default in defaults.items()} | get_type_hints(options)
    defaults = {name: {**_DEFAULTS, **defaults}.get(name) for name in types}

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [x for x in signature.parameters.values() if x.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
            for name, default in defaults.items()
        ]
        signature = signature.replace(parameters=[*own, *added])

        @functools.wraps(function)
        def complete(*args: Any, **given: Any) -> Any:
            for name in given:
                if name in refuse:
                    raise TypeError(f"{name}: {refuse[name]}, got {given[name]}")
                if name not in signature.parameters:
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
            return function(*args, **{**defaults, **given})

        complete.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        return complete  # pyright: ignore[reportReturnType]

    return decorate


# ---- Checked keywords ------------------------------------------------------------------------------------------------


def engine_choice(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `EngineChoice`, checked: parameters of the primitive."""
    name = options.get("implementation")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"implementation: expected the name of an engine or None, got {type(name).__name__}")
    invariant = _checks.static_bool("batch_invariant", options.get("batch_invariant", False))
    return {"implementation": name, "batch_invariant": invariant}


_FFI_TYPES: dict[type, Callable[[Any], Any]] = {float: np.float32, int: np.int64, bool: bool}


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How scores follow from products of queries and keys, and which keys a row sees. Static: part of the program.

    The methods work on NumPy's and JAX's arrays alike.

    Attributes:
      scale: multiplies the products.
      soft_cap: c of c·tanh(score / c); 0 is none.
      sliding_window: how many keys a row sees at most; 0 is all.
      causal: whether a row sees no key behind its own position.
    """

    scale: float
    soft_cap: float
    sliding_window: int
    causal: bool

    @classmethod
    def checked(cls, options: Mapping[str, Any], head_dim: int) -> "Scoring":
        """From the keywords that a user gave.

        Raises:
          ValueError: a number outside of its range.
          TypeError: a tracer, or an argument of another kind.
        """
        scale, window, cap = (options[name] for name in ("scale", "sliding_window", "soft_cap"))
        return cls(
            scale=float(head_dim) ** -0.5 if scale is None else _checks.static_number("scale", scale),
            sliding_window=0 if window is None else _checks.static_count("sliding_window", window),
            soft_cap=0.0 if cap is None else _checks.static_positive("soft_cap", cap),
            causal=_checks.static_bool("causal", options.get("causal", True)),
        )

    def attributes(self) -> dict[str, Any]:
        """The attributes of an FFI call: float32, int64 and bool, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _FFI_TYPES[type(value)](value) for name, value in values.items()}

    def scores(self, products: Array) -> tuple[Array, Array]:
        """Scores of float32 products q·k, and the derivative of each score by its scaled product."""
        scores = products * self.scale
        if not self.soft_cap:
            return scores, jnp.ones((), jnp.float32)
        squashed = jnp.tanh(scores / self.soft_cap)
        return self.soft_cap * squashed, 1.0 - squashed**2

    def first_key(self, position: Any) -> Any:
        """The first key that the row at a position sees, of integers; rows before position 0 see none."""
        start = position.clip(0)
        return (start - self.sliding_window + 1).clip(0) if self.sliding_window else 0 * start

    def end_key(self, position: Any, length: Any) -> Any:
        """One more than the last key that the row sees, of a sequence of `length` tokens."""
        return position + 1 if self.causal else length + 0 * position

    def sees(self, position: Any, key: Any) -> Any:
        """True where the row at a position sees a key of its sequence; the two broadcast."""
        seen = key <= position if self.causal else position >= 0
        return seen & (key >= self.first_key(position)) if self.sliding_window else seen
