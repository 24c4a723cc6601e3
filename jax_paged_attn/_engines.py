"""The engines as data: what each one supports, which one a call gets, and why not the others."""

import dataclasses
import logging
from collections.abc import Mapping

from jax_paged_attn import _ffi

_log = logging.getLogger("jax_paged_attn")

_PAGE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")


@dataclasses.dataclass(frozen=True)
class Call:
    """What the choice of an engine may depend on: static facts of one attention call."""

    num_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    q_dtype: str
    page_dtype: str
    decode: bool


@dataclasses.dataclass(frozen=True)
class Engine:
    """One row of the table.

    Attributes:
      name: what `implementation=` calls it.
      platform: the only platform it runs on; None is any.
      page_dtypes: dtypes of pages that it reads in place.
    """

    name: str
    platform: str | None
    page_dtypes: tuple[str, ...] = _PAGE_DTYPES

    def unsupported(self, call: Call) -> str | None:
        """Why shapes and dtypes of the call exclude this engine, or None."""
        if call.page_dtype not in self.page_dtypes:
            return f"pages of dtype {call.page_dtype}; it reads {', '.join(self.page_dtypes)}"
        return None

    def missing(self, platform: str) -> str | None:
        """Why the engine cannot run on the platform, or None."""
        if self.platform not in (None, platform):
            return f"runs on {self.platform}, not on {platform}"
        return _ffi.missing(self.platform) if self.platform else None


# Best first.
ENGINES = (
    Engine("cpu", platform="cpu"),
    Engine("cublaslt", platform="cuda"),
    Engine("reference", platform=None),
)
_BY_NAME = {engine.name: engine for engine in ENGINES}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which engine runs a call, and why the others do not.

    Attributes:
      engine: the engine's name; names joined by ", " where a function's calls get different ones.
      rejected: `{engine: reason}` for the engines that do not run.
      calls: one Explanation for each attention call of the function, in the order of its jaxpr.
    """

    engine: str
    rejected: Mapping[str, str]
    calls: tuple["Explanation", ...] = ()


def check_name(implementation: str | None) -> None:
    """Raises ValueError for a name that no engine has."""
    if implementation is not None and implementation not in _BY_NAME:
        raise ValueError(f"implementation: expected one of {', '.join(_BY_NAME)} or None, got {implementation!r}")


def check_supported(call: Call, implementation: str | None) -> None:
    """Raises ValueError if the named engine cannot take such shapes and dtypes on any platform."""
    check_name(implementation)
    reason = _BY_NAME[implementation].unsupported(call) if implementation else None
    if reason:
        raise ValueError(f"implementation: {implementation!r} does not support {reason}")


def choose(call: Call, platform: str, implementation: str | None) -> Explanation:
    """The engine for the call on a platform; ValueError if the named one does not run there."""
    check_supported(call, implementation)
    rejected: dict[str, str] = {}
    chosen = None
    for engine in ENGINES:
        reason = engine.missing(platform) or engine.unsupported(call)
        if engine.name == implementation and reason:
            raise ValueError(f"implementation: {implementation!r} is not available here: {reason}")
        if reason is None and implementation not in (None, engine.name):
            reason = f"implementation={implementation!r} was asked for"
        if reason is None and chosen is not None:
            reason = f"{chosen!r} is preferred"
        if reason is None:
            chosen = engine.name
        else:
            rejected[engine.name] = reason
    if chosen is None:  # the reference takes every call, so only an incomplete table leads here
        raise ValueError(f"implementation: no engine takes {call} on {platform}: {rejected}")
    _log.debug("%s on %s: %s (rejected: %s)", call, platform, chosen, rejected)
    return Explanation(chosen, rejected)
