"""Calls of the FFI targets that the package itself would never make: each must come back as an error.

The package's own call is recorded; then one thing about it is wrong at a time. tests/test_ffi.py runs this file in a
process of its own, since what it looks for are crashes.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jax_paged_attn import _ffi
from jax_paged_attn._layouts import LAYOUTS
from jax_paged_attn._options import Scoring

T, N, B, M = 5, 4, 2, 3
P, S, K = 6, 2, 2

ATTENTION_OPERANDS = (
    "q", "k_pages", "v_pages", "block_tables", "kv_lens", "q_starts", "q_counts", "sinks", "k_scale", "v_scale"
)  # fmt: skip
CUMULATIVE_OPERANDS = (*ATTENTION_OPERANDS[:5], "cu_q_lens", "num_seqs", *ATTENTION_OPERANDS[7:])  # of v5
TOKEN_SCALES = ("k_token_scales", "v_token_scales")  # of v3
ATTENTION_RESULTS = ("out", "lse", "workspace")
WRITE_OPERANDS = ("k_pages", "v_pages", "k", "v", "slot_mapping", "k_scale", "v_scale")
WRITE_RESULTS = ("k_pages", "v_pages")

DTYPES = (
    "float64", "float32", "bfloat16", "float8_e4m3fn", "float8_e4m3b11fnuz", "complex64",
    "bool", "int4", "int8", "uint8", "int32", "int64",
)  # fmt: skip

# Sizes that may differ: pools of unequal length, the width of the table, a row of scales for all sequences or tokens.
FREE_PAGES = {("k_pages", 0), ("v_pages", 0)}
FREE = FREE_PAGES | {("block_tables", 1), ("sinks", 0), ("k_scale", 0), ("v_scale", 0)}


MISMATCH = r"\b\w+( \(result\))?: expected .*, got"


@dataclass(frozen=True)
class Call:
    """A call of a target, and what an error about it must say; None where it need not be one."""

    target: str
    operands: tuple[jax.ShapeDtypeStruct, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    attributes: dict[str, Any]
    options: dict[str, Any]
    label: str = "as it should be"
    error: str | None = None

    def run(self) -> None:
        # Without a side effect, nothing would be left of a call that has no results.
        call = jax.ffi.ffi_call(self.target, self.results, has_side_effect=True, **self.options)
        operands = [jnp.zeros(x.shape, x.dtype) for x in self.operands]
        # Compiled anew, since attributes that compare equal, such as 1 and True, would share what is compiled.
        jax.block_until_ready(jax.jit(lambda *xs: call(*xs, **self.attributes))(*operands))


def recorded(function: Any, *operands: Any, **parameters: Any) -> Call:
    """The call of a target that a function of `_ffi` makes."""
    calls = []

    def ffi_call(target: str, results: Any, **options: Any) -> Any:
        def record(*operands: Any, **attributes: Any) -> Any:
            specs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
            calls.append(Call(target, specs, tuple(results), attributes, options))
            return tuple(results)

        return record

    with mock.patch.object(jax.ffi, "ffi_call", ffi_call):
        function(*operands, **parameters)
    (call,) = calls
    return call


# Pools by layout, without the head dim; "padded" is an interleaved one with a head more, "apart" a split one whose
# values have half of the head dim of keys.
POOLS = {
    "split": (P, S, K),
    "apart": (P, S, K),
    "interleaved": (P, S, 2 * K),
    "padded": (P, S, 2 * K + 1),
    "head_major": (K, P, S),
    "values_in_keys": (P, S, K),
}
NAMES = {"apart": "split", "padded": "interleaved"}


def attention(
    engine: str, decode: bool = False, layout: str = "split", token_scales: bool = False, cumulative: bool = False
) -> Call:
    """Ragged attention, or decode, as the engine is called."""
    dtype, head_dim = (jnp.bfloat16, 64) if engine == "fused" else (jnp.float32, 8)
    pool, rows = jnp.zeros((*POOLS[layout], head_dim), dtype), jnp.zeros(B, jnp.int32)
    values = {"apart": pool[..., : head_dim // 2], "values_in_keys": pool[:0]}.get(layout, pool)
    return recorded(
        _ffi.ATTENTION[engine],
        jnp.zeros((B if decode else T, N, head_dim), dtype),
        *(pool, values),
        jnp.zeros((B, M), jnp.int32),
        rows,
        *((jnp.zeros(B + 1, jnp.int32), rows[:1]) if cumulative else (rows, rows)),
        *(jnp.zeros((0, heads), jnp.float32) for heads in (N, K, K)),
        *([jnp.zeros(pool.shape[:-1], jnp.float32)] * 2 if token_scales else []),
        token_scales=(token_scales, token_scales),
        decode=decode,
        batch_invariant=False,
        scoring=Scoring(scale=0.5, sliding_window=0, soft_cap=0.0, causal=True),
        layout=NAMES.get(layout, layout),
        **({"cumulative": True} if cumulative else {}),
    )


def write(layout: str = "split") -> Call:
    pool, new, none = (jnp.zeros(shape, jnp.float32) for shape in ((*POOLS[layout], 8), (T, K, 8), (0, K)))
    name = NAMES.get(layout, layout)
    pools = [pool] * LAYOUTS[name].num_pools
    v = new[..., : {"apart": 4, "values_in_keys": 0}.get(layout, 8)]
    if layout == "apart":
        pools[1] = pool[..., :4]
    return recorded(_ffi.write, *pools, new, v, jnp.zeros(T, jnp.int32), none, none, layout=name)


# ---- What may be wrong with a call -----------------------------------------------------------------------------------


def wrong_arrays(
    call: Call, names: tuple[str, ...], field: str, free_sizes: Container[tuple[str, int]] = FREE
) -> Iterator[Call]:
    """Each operand, or result, with another dtype, rank and size, one too few, none, and one too many."""
    arrays: tuple[jax.ShapeDtypeStruct, ...] = getattr(call, field)
    for i, (name, spec) in enumerate(zip(names, arrays, strict=True)):
        shape = spec.shape
        changed = [(f"dtype {dtype}", shape, jnp.dtype(dtype)) for dtype in DTYPES if dtype != str(spec.dtype)]
        changed += [("an axis more", (*shape, 1), spec.dtype), ("an axis fewer", shape[1:], spec.dtype)]
        for axis, size in enumerate(shape):
            changed += [
                (f"axis {axis} of {other}", (*shape[:axis], other, *shape[axis + 1 :]), spec.dtype)
                for other in (0, size + 1)
                if other != size
            ]
        for what, new_shape, dtype in changed:
            free = what.startswith("axis") and (name, int(what.split()[1])) in free_sizes and field == "operands"
            # Either of two arrays with unlike dtypes may be named, and any one of unlike size.
            named = MISMATCH if what.startswith("axis") else MISMATCH.replace(r"\w+", f"({name}|k_pages|v_pages|v|out)")
            error = None if free else named
            new = (*arrays[:i], jax.ShapeDtypeStruct(new_shape, dtype), *arrays[i + 1 :])
            yield replace(call, **{field: new}, label=f"{name}: {what}", error=error)
    counts = {"operands": "arguments|operands", "results": "results"}[field]
    for what, some in (("one fewer", arrays[:-1]), ("none", ()), ("one more", (*arrays, arrays[-1]))):
        if field == "results" and not some and jax.default_backend() == "gpu":
            continue  # nothing to wait for: the error of the call reaches nobody
        # Aliases of what is not there are refused before the call.
        yield replace(call, **{field: some}, label=f"{field}: {what}", error=rf"\b({counts})\b|alias")


def wrong_attributes(call: Call) -> Iterator[Call]:
    """Each attribute missing, of another type, out of range; and one that the target does not have."""

    def change(name: str, value: Any, error: str) -> Call:
        return replace(call, attributes={**call.attributes, name: value}, label=f"{name}={value!r}", error=error)

    types: list[Any] = [0.5, np.float64(0.5), np.int32(1), np.int8(1), 1, "yes", np.ones(3, np.float32), {"a": 1}]
    for name, good in call.attributes.items():
        without = {key: value for key, value in call.attributes.items() if key != name}
        yield replace(call, attributes=without, label=f"no {name}", error="attributes|decode")
        for value in types:
            if type(value) is not type(good) and (type(good), type(value)) != (np.int64, int):
                yield change(name, value, "decode|[Ww]rong")
    yield change("another", np.int64(1), "attributes|decode")
    infinity, nan = np.float32(np.inf), np.float32(np.nan)
    ranges: dict[str, list[Any]] = {
        "scale": [infinity, -infinity, nan],
        "soft_cap": [infinity, nan, np.float32(-1)],
        "sliding_window": [np.int64(-1), np.int64(-(2**63))],
        "workspace_limit": [np.int64(-1), np.int64(-(2**63))],
        "engine": ["", "cpu", "fuse", "fused\0", "x" * 1000],
        "decode": [not call.attributes.get("decode")],
        "layout": ["", "interleave", "transposed"],
    }
    for name, value in ((name, value) for name, values in ranges.items() for value in values):
        if name in call.attributes:
            yield change(name, value, MISMATCH)
    if call.attributes.get("engine") == "cublaslt":
        yield change("batch_invariant", True, "batch_invariant: expected")


def malformed_attention(engine: str) -> Iterator[Call]:
    for decode in (False, True) if engine != "cpu" else (False,):
        call = attention(engine, decode)
        yield call
        yield from wrong_attributes(call)
        for wrong in itertools.chain(
            wrong_arrays(call, ATTENTION_OPERANDS, "operands"), wrong_arrays(call, ATTENTION_RESULTS, "results")
        ):
            if decode and ": dtype" in wrong.label:
                continue  # the same checks as of ragged calls
            more_workspace = wrong.label.startswith("workspace: axis 0") and not wrong.label.endswith(" 0")
            # On CUDA an engine takes what it needs of it, and how much that is may go with the width of the table.
            yield replace(wrong, error=None) if more_workspace and engine != "cpu" else wrong
        three = jax.ShapeDtypeStruct((3, K), jnp.float32)  # of which two sequences can have no equal share
        yield replace(call, operands=(*call.operands[:-1], three), label="v_scale: 3 rows", error="v_scale: expected")

    for layout, page_axis in (("interleaved", 0), ("head_major", 1), ("padded", 0)):
        call = attention(engine, layout=layout)
        yield call
        yield from (wrong for wrong in wrong_attributes(call) if "layout" in wrong.label)
        free = {("k_scale", 0), *((name, page_axis) for name in WRITE_RESULTS)}
        names = (*ATTENTION_OPERANDS, *TOKEN_SCALES)[: len(call.operands)]
        for wrong in wrong_arrays(call, names, "operands", free):
            of_scale = layout == "padded" and wrong.label.startswith("k_scale: ax")  # whose columns are K
            if (wrong.label.startswith(WRITE_RESULTS) and ": dtype" not in wrong.label) or of_scale:
                yield wrong
    yield from malformed_values(engine)
    if engine == "fused":
        yield from malformed_cumulative(engine)
    # The versions before know no padding heads, and no scales per token.
    call = attention(engine, layout="padded")
    before = {"target": _ffi.ATTENTION_LAYOUT_TARGET, "operands": call.operands[:-2]}
    yield replace(call, **before, label="padding heads in v2", error=MISMATCH)
    yield replace(call, **{**before, "operands": call.operands}, label="scales in v2", error="operands")
    if engine == "fused":
        call = attention("cublaslt", layout="head_major", token_scales=True)
        error = "k_token_scales, v_token_scales: expected none"
        yield replace(call, attributes={**call.attributes, "engine": "fused"}, label="scales per token", error=error)
        return
    call = attention(engine, layout="head_major", token_scales=True)
    yield call
    for wrong in wrong_arrays(call, (*ATTENTION_OPERANDS, *TOKEN_SCALES), "operands"):
        if wrong.label.startswith(TOKEN_SCALES):
            yield wrong


def malformed_cumulative(engine: str) -> Iterator[Call]:
    """Calls of the target that takes `cu_q_lens`."""
    call = attention(engine, cumulative=True)
    yield call
    yield from wrong_attributes(call)
    for wrong in wrong_arrays(call, (*CUMULATIVE_OPERANDS, *TOKEN_SCALES), "operands", FREE | {("num_seqs", 0)}):
        of_rows = wrong.label.startswith(("cu_q_lens", "num_seqs", "operands"))
        two = wrong.label == "num_seqs: axis 0 of 2"
        if of_rows:
            yield replace(wrong, error="num_seqs: expected") if two else wrong
    attributes = {**call.attributes, "engine": "cublaslt"}
    yield replace(call, attributes=attributes, label="cublaslt", error="cu_q_lens: expected implementation fused")


def malformed_values(engine: str) -> Iterator[Call]:
    """Calls of the target for values of another head dim, or in the keys."""
    call = attention(engine, layout="values_in_keys")
    yield call
    yield from (wrong for wrong in wrong_attributes(call) if "layout" in wrong.label)
    for wrong in wrong_arrays(call, (*ATTENTION_OPERANDS, *TOKEN_SCALES), "operands"):
        # Pages of values are none; fewer of their numbers are another result.
        free = wrong.label.startswith(WRITE_RESULTS) and wrong.error is None and not wrong.label.startswith("k_pages")
        if wrong.label.startswith((*WRITE_RESULTS, *TOKEN_SCALES)) and ": dtype" not in wrong.label:
            yield replace(wrong, error=MISMATCH) if free else wrong
    before = {"target": _ffi.ATTENTION_TOKENS_TARGET}
    yield replace(call, **before, label="values in keys in v3", error=MISMATCH)
    yield from padded_keys(call, engine)
    apart = attention("cublaslt" if engine == "fused" else engine, layout="apart")
    yield replace(apart, **before, label="head dims apart in v3", error=MISMATCH)
    if engine == "fused":
        attributes = {**apart.attributes, "engine": "fused"}
        yield replace(apart, attributes=attributes, label="head dims apart", error="implementation: 'fused' has no")
        return
    yield apart
    for wrong in wrong_arrays(apart, (*ATTENTION_OPERANDS, *TOKEN_SCALES), "operands"):
        if wrong.label.startswith(("v_pages", "q:")) and ": dtype" not in wrong.label:
            yield wrong


def padded_keys(call: Call, engine: str) -> Iterator[Call]:
    """Keys with columns that no row sees: of whole 16 bytes, for engines that pass over them."""
    q, keys, values, *others = call.operands
    more = 16 // keys.dtype.itemsize

    def padded(columns: int, label: str, error: str | None, more_values: int = 0) -> Call:
        wide, of_values = (
            jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] + n), x.dtype)
            for x, n in ((keys, columns), (values, more_values))
        )
        return replace(call, operands=(q, wide, of_values, *others), label=label, error=error)

    refused = None if engine == "cpu" else "k_pages: expected keys without padding"
    yield padded(more, "padded keys", refused)
    yield padded(1, "odd padding", "k_pages: expected padded keys of a multiple of 16 bytes")
    yield padded(more, "values in padding", "v_pages: expected at most the H", more)


def malformed_writes() -> Iterator[Call]:
    for layout in ("split", "interleaved", "head_major", "apart", "values_in_keys"):
        call = write(layout)
        yield call
        yield from wrong_attributes(call)
        free = {("k_pages", 0)} if layout in ("interleaved", "values_in_keys") else set()
        for wrong in wrong_arrays(call, WRITE_OPERANDS, "operands", free | (FREE - FREE_PAGES)):
            pool = wrong.label.split(":")[0] in WRITE_RESULTS
            if layout != "split" and (not pool or ": dtype" in wrong.label):
                continue  # the same checks
            # JAX itself refuses a result unlike the operand that it is aliased to.
            results = wrong.operands[:2] if pool else call.results
            yield replace(wrong, results=results)
        # So these are not aliased.
        yield from wrong_arrays(replace(call, options={}), WRITE_RESULTS, "results")
        yield replace(call, options={}, label="no aliases", error="k_pages, v_pages: expected results aliased")
    for layout in ("values_in_keys", "apart"):
        old = {"target": _ffi.WRITE_LAYOUT_TARGET}
        yield replace(write(layout), **old, label=f"{layout} in v2", error=MISMATCH)


def main(what: str) -> None:
    """Prints a line for each call that does not do what it should, then how many were tried."""
    jax.config.update("jax_enable_x64", True)  # so that arrays may have 64-bit dtypes
    calls = list(malformed_writes() if what == "write" else malformed_attention(what))
    for call in calls:
        try:
            call.run()
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if call.label == "as it should be" or (call.error and not re.search(call.error, str(error))):
                print(f"{call.label}: {str(error)[:300]}")
        else:
            if call.error is not None:
                print(f"{call.label}: no error")
    calls[0].run()
    print(len(calls))


if __name__ == "__main__":
    main(sys.argv[1])
