"""`cost_analysis`: what attention calls cost, which XLA's own analysis cannot see: to it they are custom calls."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from numpy.typing import NDArray

from jax_paged_attn import _primitive
from jax_paged_attn._explain import trace
from jax_paged_attn._layouts import LAYOUTS
from jax_paged_attn._options import Scoring
from jax_paged_attn._rows import rows_of_each


@dataclasses.dataclass(frozen=True)
class Cost:
    """The result of `cost_analysis`: costs of a function's attention calls in one forward pass, on whichever engine.

    Attributes:
      flops: multiplications and additions of both matrix products: 2·(H + Hv) per query head and visible key.
      transcendentals: exponentials, one per query head and visible key; with a soft cap one more.
      bytes_accessed: query rows, results, tables and lengths once; keys and values of the visible tokens once per
        sequence, also where sequences share pages, and values in the keys with these. An engine that reads pages once
        needs no more.
      exact: True if lengths and row counts were known. Otherwise the numbers are upper bounds: whole block tables, and
        each row sees as many keys as the longest sequence, or the window, has.
      calls: one Cost per attention call of the function, in the order of its jaxpr. A call in a loop counts as often as
        the loop repeats it.

    Example:
      >>> import jax_paged_attn as jpa
      >>> cost = jpa.Cost(flops=640, transcendentals=20, bytes_accessed=4096, exact=True)
      >>> cost.flops / cost.bytes_accessed  # FLOPs per byte
      0.15625
    """

    flops: int
    transcendentals: int
    bytes_accessed: int
    exact: bool
    calls: tuple["Cost", ...] = ()


def cost_analysis(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Cost:
    """Counts the costs of the attention calls of `fn(*args, **kwargs)`. Only the code that makes its indices is run.

    XLA counts the other operations: `jax.jit(fn).lower(…).compile().cost_analysis()`.

    Args:
      fn: `paged_attention`, `ragged_paged_attention`, or any function that calls them.
      *args: arrays or `jax.ShapeDtypeStruct`s (in pytrees too). With arrays of integers for lengths and `cu_q_lens` the
        count is exact about causality, windows and lengths, also where they are computed from such arrays outside of
        loops; otherwise it is an upper bound.
      **kwargs: keywords of `fn`; those that are not arrays stay static.

    Returns:
      A `Cost`. Causality, window and lengths are counted token by token; every entry of a block table is taken to
      name a page. A `scan` counts as often as it repeats, and a `while_loop` once. The costliest branch of a `cond`
      counts, and one shard of a `shard_map`. Gradients are plain JAX, so only their forward pass counts.

    Raises:
      ValueError: the function has no attention call.

    Example:
      Five visible keys, two heads, head dim 8: 5 · 2 · 4 · 8 FLOPs.

      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> q, pages = jnp.ones((1, 2, 8)), jnp.ones((3, 4, 1, 8))
      >>> where = (jnp.array([[2, 0, -1]], jnp.int32), jnp.array([5], jnp.int32))
      >>> cost = jpa.cost_analysis(jpa.paged_attention, q, pages, pages, *where)
      >>> cost.flops, cost.transcendentals, cost.exact
      (320, 10, True)
    """
    closed, operands = trace(fn, args, kwargs)
    known = [None if isinstance(x, jax.ShapeDtypeStruct) else _if_index(x) for x in operands]
    calls: list[Cost] = []
    _walk(closed.jaxpr, [*map(_if_index, closed.consts), *known], calls)
    if not calls:
        raise ValueError("fn: expected a function that calls paged attention, found no such call")
    return dataclasses.replace(_sum(calls), calls=tuple(calls))


# An integer array or scalar whose value is known, else None.
_Known = NDArray[Any] | None


def _if_index(x: Any) -> _Known:
    return np.asarray(x) if getattr(x.dtype, "kind", "") in ("i", "u", "b") else None


def _walk(jaxpr: Jaxpr, operands: Sequence[_Known], calls: list[Cost]) -> list[_Known]:
    """Appends the calls of a jaxpr (its constants come first in `operands`), and returns what is known of its results.

    What is computed from known integers is known too, so that lengths are those that the calls will get.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), operands, strict=True))

    def value_of(atom: Any) -> _Known:
        return _if_index(np.asarray(atom.val)) if isinstance(atom, Literal) else values.get(atom)

    for eqn in jaxpr.eqns:
        known = [value_of(x) for x in eqn.invars]
        results: list[_Known] = [None] * len(eqn.outvars)
        if eqn.primitive is _primitive.attention_p:
            calls.append(_cost_of_call([x.aval for x in eqn.invars], known, eqn.params))
        elif inner := list(_inner_jaxprs(eqn.params)):
            results = _walk_inner(eqn, inner, known, calls) or results
        elif all(x is not None for x in known) and all(_is_small_index(x.aval) for x in eqn.outvars):
            outs = eqn.primitive.bind(*known, **eqn.params)
            results = [np.asarray(x) for x in (outs if eqn.primitive.multiple_results else [outs])]
        values |= zip(eqn.outvars, results, strict=True)
    return [value_of(x) for x in jaxpr.outvars]


def _is_small_index(aval: Any) -> bool:
    """True for values that are kept: lengths and row numbers, not masks of whole score matrices."""
    is_index = getattr(getattr(aval, "dtype", None), "kind", "") in ("i", "u", "b")
    return is_index and math.prod(aval.shape) <= 1 << 20


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, (ClosedJaxpr, Jaxpr)):
                yield x


def _walk_inner(
    eqn: Any, inner: list[ClosedJaxpr | Jaxpr], known: list[_Known], calls: list[Cost]
) -> list[_Known] | None:
    """The calls of an operation that has jaxprs inside; what is known of its results, if they run once and plainly."""
    if eqn.primitive.name == "scan":
        body = _calls_of(inner[0], known[: _constants_of_scan(eqn, _jaxpr_of(inner[0]))])
        calls += [_times(one, eqn.params["length"]) for one in body]
        return None
    if eqn.primitive.name == "cond":
        branches = [_calls_of(branch, known[1:]) for branch in inner]
        calls += max(branches, key=lambda branch: _sum(branch).flops)
        return None
    if len(inner) == 1 and len(_jaxpr_of(inner[0]).invars) == len(known):
        return _walk(_jaxpr_of(inner[0]), [*_constants_of(inner[0]), *known], calls)
    for one in inner:
        calls += _calls_of(one, [])
    return None


def _constants_of_scan(eqn: Any, body: Jaxpr) -> int:
    """How many of a scan's operands are the same in every step; they come first, then the carry, then slices.

    Shapes tell it, as JAX's releases do not agree on a parameter that does: of slices, the body sees one axis less.
    """

    def alike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        return sum(len(x.aval.shape) == len(y.aval.shape) for x, y in zip(outside, inside, strict=True))

    return alike(eqn.invars, body.invars) - alike(eqn.outvars, body.outvars)


def _calls_of(inner: ClosedJaxpr | Jaxpr, known: Sequence[_Known]) -> list[Cost]:
    """The calls of a jaxpr whose first operands may be known."""
    calls: list[Cost] = []
    jaxpr = _jaxpr_of(inner)
    unknown = [None] * (len(jaxpr.invars) - len(known))
    _walk(jaxpr, [*_constants_of(inner), *known, *unknown], calls)
    return calls


def _jaxpr_of(inner: ClosedJaxpr | Jaxpr) -> Jaxpr:
    return inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner


def _constants_of(inner: ClosedJaxpr | Jaxpr) -> list[_Known]:
    return [_if_index(x) for x in inner.consts] if isinstance(inner, ClosedJaxpr) else [None] * len(inner.constvars)


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(
        flops=sum(one.flops for one in costs),
        transcendentals=sum(one.transcendentals for one in costs),
        bytes_accessed=sum(one.bytes_accessed for one in costs),
        exact=all(one.exact for one in costs),
    )


def _times(cost: Cost, count: int) -> Cost:
    return Cost(cost.flops * count, cost.transcendentals * count, cost.bytes_accessed * count, cost.exact)


def _cost_of_call(avals: Sequence[Any], known: Sequence[_Known], params: dict[str, Any]) -> Cost:
    q, k_pages, v_pages, tables, *_ = avals
    kv_lens, q_counts = known[4], known[6]
    if params["cumulative"]:
        q_counts = _row_counts(known[5], known[6], avals[0].shape[0])
    num_rows, heads, head_dim = q.shape
    value_dim = v_pages.shape[-1]
    num_seqs, max_pages = tables.shape
    layout = LAYOUTS[params["layout"]]
    capacity = max_pages * layout.page_size(k_pages)
    scoring = params["scoring"]

    lengths = np.clip(np.full(num_seqs, capacity) if kv_lens is None else kv_lens.astype(np.int64), 0, capacity)
    if q_counts is not None:
        counts = np.maximum(q_counts.astype(np.int64), 0)
        seen = [_visible(int(n), int(rows), scoring) for n, rows in zip(lengths, counts, strict=True)]
        pairs, tokens = (sum(x) for x in zip(*seen, strict=True)) if seen else (0, 0)
    else:
        pairs = num_rows * int(min(lengths.max(initial=0), scoring.sliding_window or capacity))
        tokens = int(lengths.sum())

    # Keys, values and their scales; of the operands, pools and such scales are not read whole.
    numbers = head_dim if layout.values_in_keys else head_dim + value_dim
    token_bytes = avals[8].shape[1] * (numbers * k_pages.dtype.itemsize + 4 * sum(params["token_scales"]))
    others = [x for i, x in enumerate(avals) if i in (0, *range(3, 10))]
    operand_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in others)
    result_bytes = num_rows * heads * (value_dim * q.dtype.itemsize + 4)
    return Cost(
        flops=2 * (head_dim + value_dim) * heads * pairs,
        transcendentals=heads * pairs * (2 if scoring.soft_cap else 1),
        bytes_accessed=tokens * token_bytes + operand_bytes + result_bytes,
        exact=kv_lens is not None and q_counts is not None,
    )


def _row_counts(cu_q_lens: _Known, num_seqs: _Known, num_rows: int) -> _Known:
    if cu_q_lens is None or num_seqs is None:
        return None
    return np.asarray(rows_of_each(jnp.asarray(cu_q_lens), jnp.asarray(num_seqs), num_rows)[1])


def _visible(length: int, rows: int, scoring: Scoring) -> tuple[int, int]:
    """For a sequence's last `rows` tokens: pairs of a row and a key that it sees, and keys that any of them sees."""
    position = np.arange(max(length - rows, 0), length)  # rows before position 0 see no key
    if not len(position):
        return 0, 0
    first, end = scoring.first_key(position), scoring.end_key(position, length)
    return int((end - first).sum()), int(end[-1] - first[0])
