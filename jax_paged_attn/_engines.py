"""The engines as data: which calls each one supports, which engine runs a call, and why the others do not."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping

from jax_paged_attn import _ffi
from jax_paged_attn._head_dims import FUSED_HEAD_DIMS, FUSED_MLA_HEAD_DIMS, FUSED_WIDE_HEAD_DIMS
from jax_paged_attn._options import Scoring
from jax_paged_attn._warnings import warn_once

_log = logging.getLogger("jax_paged_attn")

_MLA_CAPABILITY = "9.0"
_QUANTIZED = ("float8_e4m3fn", "float8_e5m2", "int8")


@dataclasses.dataclass(frozen=True)
class Call:
    """The static facts of one attention call that the choice of an engine may depend on."""

    num_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    page_size: int
    q_dtype: str
    page_dtype: str
    scoring: Scoring
    decode: bool
    batch_invariant: bool
    token_scales: bool = False
    values_in_keys: bool = False
    padded_keys: bool = False


@dataclasses.dataclass(frozen=True)
class Engine:
    """One row of the table.

    Attributes:
      name: what `implementation=` calls it.
      platform: the only platform it runs on; None is any.
      q_dtypes: dtypes of queries that it takes.
      quantized_dtypes: dtypes of pages that it reads besides that of the queries.
      head_dims: head dims of keys and of values that it takes; None is any.
      mla_head_dims: those that it takes besides where the values are in the keys, on GPUs of compute capability 9.0.
      wide_head_dims: likewise, where the values have a pool of their own, with pages of q's dtype.
      batch_invariant: whether it can guarantee that a sequence has the same bits alone and in any batch.
      token_scales: whether it reads pages with one scale per token and head. "fused" does not: its products run from
        tensor cores' registers to registers, and a factor per key would cost every call in there.
      cumulative: whether it takes `cu_q_lens` and `num_seqs`; others are given first rows and row counts.
    """

    name: str
    platform: str | None
    q_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    quantized_dtypes: tuple[str, ...] = _QUANTIZED
    head_dims: tuple[tuple[int, int], ...] | None = None
    mla_head_dims: tuple[tuple[int, int], ...] = ()
    wide_head_dims: tuple[tuple[int, int], ...] = ()
    batch_invariant: bool = False
    token_scales: bool = True
    cumulative: bool = False

    def unsupported(self, call: Call) -> str | None:
        """Why shapes and dtypes of the call exclude this engine, or None."""
        if call.q_dtype not in self.q_dtypes:
            return f"expected q of dtype {_either(self.q_dtypes)}, got {call.q_dtype}"
        if call.page_dtype not in (call.q_dtype, *self.quantized_dtypes):
            expected = _either((call.q_dtype, *self.quantized_dtypes))
            return f"expected pages of dtype {expected}, got {call.page_dtype}"
        dims, taken = (call.head_dim, call.value_dim), self.head_dims_for(call.values_in_keys, call.page_dtype)
        if taken is not None and dims not in taken:
            of_pages = (
                f" for pages of dtype {call.page_dtype}" if not call.values_in_keys and self.wide_head_dims else ""
            )
            return f"expected a head dim of {_either(map(_name, taken))}{of_pages}, got {_name(dims)}"
        if call.padded_keys and taken is not None and dims not in self.mla_head_dims:
            return f"expected keys without padding unless of {_either(map(_name, self.mla_head_dims))}, got some"
        if call.token_scales and not self.token_scales:
            return "expected scales of pages to be scalar or per head, got one per token and head"
        return None

    def head_dims_for(self, values_in_keys: bool, page_dtype: str) -> tuple[tuple[int, int], ...] | None:
        """The head dims that the engine takes of calls whose pages have that dtype; None is any."""
        if self.head_dims is None or (page_dtype in self.quantized_dtypes and not values_in_keys):
            return self.head_dims
        return self.head_dims + self._by_mla_kernels(values_in_keys)

    def _by_mla_kernels(self, values_in_keys: bool) -> tuple[tuple[int, int], ...]:
        return self.mla_head_dims if values_in_keys else self.wide_head_dims

    def rejects(self, call: Call) -> str | None:
        """Why the engine cannot run the call on any platform, or None."""
        if call.batch_invariant and not self.batch_invariant:
            return "expected batch_invariant=False, got True, which it does not guarantee"
        return self.unsupported(call)

    def missing(self, platform: str, call: Call | None = None) -> str | None:
        """Why the engine cannot run on the platform, or cannot run the call on this one's device, or None."""
        if self.platform not in (None, platform):
            return f"runs on {self.platform}, not on {platform}"
        dims = (0, 0) if call is None else (call.head_dim, call.value_dim)
        if call is not None and dims in self._by_mla_kernels(call.values_in_keys):
            capability = _ffi.compute_capability()
            if capability not in (None, _MLA_CAPABILITY):
                return f"runs a head dim of {_name(dims)} on compute capability {_MLA_CAPABILITY}, not on {capability}"
        return _ffi.missing(self.platform) if self.platform else None

    def __str__(self) -> str:
        """The calls that the engine takes, in one line."""
        head_dims = "any head dim" if self.head_dims is None else f"head dims {', '.join(map(_name, self.head_dims))}"
        if self.wide_head_dims:
            head_dims += f", in pages as q {', '.join(map(_name, self.wide_head_dims))}"
        if self.mla_head_dims:
            head_dims += f", with values in the keys {', '.join(map(_name, self.mla_head_dims))}"
        return "; ".join(
            (
                f"q {', '.join(self.q_dtypes)}",
                f"pages as q, {', '.join(self.quantized_dtypes)}",
                head_dims,
                f"batch_invariant {'True or False' if self.batch_invariant else 'False'}",
                f"scales per head{' or per token and head' if self.token_scales else ''}",
            )
        )


def _either(choices: Iterable[object]) -> str:
    return " or ".join(map(str, choices))


def _name(head_dims: tuple[int, int]) -> str:
    """The head dim of keys, and that of values if it is another one."""
    keys, values = head_dims
    return str(keys) if keys == values else f"{keys} with values of {values}"


# Best first.
ENGINES = (
    Engine("cpu", platform="cpu", batch_invariant=True),
    Engine(
        "fused",
        platform="cuda",
        q_dtypes=("bfloat16", "float16"),
        head_dims=FUSED_HEAD_DIMS,
        mla_head_dims=FUSED_MLA_HEAD_DIMS,
        wide_head_dims=FUSED_WIDE_HEAD_DIMS,
        batch_invariant=True,
        token_scales=False,
        cumulative=True,
    ),
    Engine("cublaslt", platform="cuda"),
    Engine("reference", platform=None),
)
_CUDA_ENGINES = [engine for engine in ENGINES if engine.platform == "cuda"]
_BY_NAME = {engine.name: engine for engine in ENGINES}
_GUARANTEEING = (
    f"an engine that guarantees it ({_either([engine.name for engine in ENGINES if engine.batch_invariant])})"
)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The answer of `explain`: which engine runs a call, and why the others do not.

    `str` of it is a table with a verdict on each engine and the calls that it takes.

    Attributes:
      engine: the engine's name; names joined by ", " where a function's calls get different ones.
      rejected: `{engine: reason}` for the engines that do not run.
      calls: one Explanation per attention call of the function, in the order of its jaxpr.

    Example:
      >>> import jax_paged_attn as jpa
      >>> verdict = jpa.Explanation("cpu", {"fused": "runs on cuda, not on cpu"})
      >>> verdict.engine, verdict.rejected["fused"]
      ('cpu', 'runs on cuda, not on cpu')
    """

    engine: str
    rejected: Mapping[str, str]
    calls: tuple["Explanation", ...] = ()

    def __str__(self) -> str:
        return "\n".join(
            [self.engine, *table({engine.name: self.rejected.get(engine.name, "runs") for engine in ENGINES})]
        )


def table(verdicts: Mapping[str, str]) -> list[str]:
    """Two lines per engine, best first: what `verdicts` says of it, and what it takes."""
    width = max(map(len, _BY_NAME))
    lines = []
    for name, engine in _BY_NAME.items():
        lines += [f"  {name:<{width}}  {verdicts[name]}", f"  {'':<{width}}  takes {engine}"]
    return lines


def check_name(implementation: str | None) -> None:
    """Raises ValueError for a name that no engine has."""
    if implementation is not None and implementation not in _BY_NAME:
        raise ValueError(f"implementation: expected one of {', '.join(_BY_NAME)} or None, got {implementation!r}")


def check_supported(call: Call, implementation: str | None) -> None:
    """Raises ValueError if the named engine cannot take such a call on any platform."""
    check_name(implementation)
    if implementation is None:
        return
    engine = _BY_NAME[implementation]
    if call.batch_invariant and not engine.batch_invariant:
        raise ValueError(f"batch_invariant: expected {_GUARANTEEING}, got True with implementation={implementation!r}")
    reason = engine.unsupported(call)
    if reason:
        raise ValueError(f"implementation: for {implementation!r} {reason}")


def choose(call: Call, platform: str, implementation: str | None) -> Explanation:
    """The engine for the call on a platform; ValueError if the named one, or any that may, does not run there."""
    check_supported(call, implementation)
    rejected: dict[str, str] = {}
    chosen = None
    for engine in ENGINES:
        reason = engine.missing(platform, call) or engine.rejects(call)
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
    if chosen is None:  # the reference takes every call without the guarantee
        raise ValueError(f"batch_invariant: expected {_GUARANTEEING}, got True where none runs: {rejected}")
    _log.debug("%s on %s: %s (rejected: %s)", call, platform, chosen, rejected)
    return Explanation(chosen, rejected)


def choose_to_run(call: Call, platform: str, implementation: str | None) -> str:
    """The name of the engine that `choose` finds; warns once per cause if none but the reference runs on CUDA."""
    choice = choose(call, platform, implementation)
    if platform == "cuda" and choice.engine == "reference" and implementation is None:
        reasons = "; ".join(f"{engine.name}: {choice.rejected[engine.name]}" for engine in _CUDA_ENGINES)
        warn_once(reasons, f"paged attention runs on CUDA as plain JAX, which is slow, since no engine can ({reasons})")
    return choice.engine


def is_cumulative(name: str) -> bool:
    """Whether the engine of that name takes `cu_q_lens` and `num_seqs` as they are."""
    return _BY_NAME[name].cumulative
