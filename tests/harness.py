"""Shared by all tests: cases as engines take them, comparing with the oracle, hashing bits, a fresh interpreter."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import BY_NAME, DTYPES, FAMILIES, LSE_BOUND, OUT_BOUND, Array, Case, build, poison

import jax_paged_attn as jpa
from jax_paged_attn import _call, _checks, _engines, _options, _primitive, _rows, compat

# A single row may be this much worse than the bound on the whole output: the bound alone would let one wrong row of
# many pass, while a row of small values may exceed it by rounding.
ROW_SLACK = 8

# A large sink leaves so little for the values that float32 has no normal number for it; float16 rounds to multiples of
# its smallest number what is small for any reason.
UNDERFLOW = {"f32": 2.0**-126, "bf16": 2.0**-126, "f16": 2.0**-24}


# Each case of these families has shapes of its own, and compiling the reference takes a second, where an engine
# takes milliseconds. Hence the reference runs some of them in `make test`, and the others in `make test-slow`.
OWN_SHAPES = ("dtypes", "shapes", "long", "tiles", "layouts", "value_dims")


def reference_is_slow(case: Case, place: int) -> bool:
    """True for a case that the reference leaves to `make test-slow`: in `make test` it runs one of eight, by place."""
    return any(case in FAMILIES[name] and FAMILIES[name].index(case) % 8 != place for name in OWN_SHAPES)


@functools.cache
def compiled(function: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """`jit` of a function of the package, one for each set of static keywords, so that cases share compilations."""
    module, _, name = function.rpartition(".")
    where = {"": jpa, "compat": compat, "harness": sys.modules[__name__]}[module]
    return jax.jit(functools.partial(getattr(where, name), **dict(static)))


def call(function: str, *args: Any, **kwargs: Any) -> Any:
    """A jitted call; keywords that are arrays or None are traced, all others are static."""
    traced = {name: value for name, value in kwargs.items() if value is None or hasattr(value, "dtype")}
    static = tuple((name, value) for name, value in kwargs.items() if name not in traced)
    return compiled(function, static)(*args, **traced)


def run(case: Case, function: str | None = None, **keywords: Any) -> tuple[Array, Array]:
    """`(out, lse)` of a case as NumPy arrays; of a function named here with split pools, whatever the case has."""
    split = dataclasses.replace(case, layout="split") if function else case
    name, args, named = arguments(split)
    out, lse = call(function or name, *args, **named, **keywords, return_lse=True)
    return np.asarray(out), np.asarray(lse)


def arguments(case: Case) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """The function that takes pools of the case's layout, with its arguments: static keywords too."""
    args, traced = build(case).arguments()
    named = {**traced, **case.keywords}
    scales = {name: named.pop(name, None) for name in ("k_token_scales", "v_token_scales")}
    if case.layout == "split" and not any(case.token_scales):
        return case.function, args, named
    q, k_pages, v_pages, *rest = args
    if case.padding_heads or (any(case.token_scales) and case.layout != "head_major"):
        pools = in_layout(case.layout, k_pages, v_pages, case.padding_heads)
        named |= {"layout": case.layout, "kv_heads": case.num_kv_heads}
        named |= {name: of_tokens(case.layout, x, case.padding_heads) for name, x in scales.items()}
        return "harness.attend_in_layout", (q, pools[0], pools[-1], *rest), named
    if case.layout == "interleaved":
        kv_lens, tables, cu_q_lens, num_seqs = rest
        num_seqs = np.array([len(kv_lens)], np.int32) if num_seqs is None else num_seqs
        pools = (interleave(k_pages, v_pages),)
        named["sm_scale"] = named.pop("scale", case.head_dim**-0.5)
        return "compat.ragged_paged_attention", (q, *pools, kv_lens, tables, cu_q_lens, num_seqs), named
    assert named.pop("scale") == 1
    named["attn_logits_soft_cap"] = named.pop("soft_cap", None)
    if any(case.token_scales):
        pages = {"k_token_scales": "k_scales_pages", "v_token_scales": "v_scales_pages"}
        named |= {pages[name]: of_tokens("head_major", x) for name, x in scales.items()}
    return "compat.paged_attention", (q, *in_layout("head_major", k_pages, v_pages), *rest), named


def in_layout(layout: str, k_pages: Any, v_pages: Any, padding_heads: int = 0, xp: Any = np) -> tuple[Any, ...]:
    """Pools `[P, S, K, H]` as a layout has them, of which "padded" is an interleaved one with a padding head.

    Traced ones need `jax.numpy` as `xp`.
    """
    if layout == "split":
        return k_pages, v_pages
    if layout == "values_in_keys":
        return (k_pages,)
    if layout == "head_major":
        return tuple(xp.moveaxis(x, 2, 0).copy() for x in (k_pages, v_pages))
    return (interleave(k_pages, v_pages, padding_heads or int(layout == "padded"), xp),)


def of_tokens(layout: str, scales: Array | None, padding_heads: int = 0) -> Array | None:
    """Scales `[P, S, K]` in the shape of a layout's pool."""
    if scales is None:
        return None
    return in_layout(layout, scales[..., None], scales[..., None], padding_heads)[0][..., 0]


def write_in_layout(*operands: Any, layout: str, **scales: Any) -> tuple[Any, ...]:
    """The pools of `in_layout` after a write of k and v to slots, as the public functions and `compat` write."""
    *pools, k, v, slots = operands
    if layout == "padded":
        dims = _checks.Dims(K=k.shape[1])
        k_scale, v_scale = (_call.page_scale(dims, x, scales.get(x), *pools) for x in ("k_scale", "v_scale"))
        arrays = (jnp.asarray(x) for x in (*pools, k, v, slots))
        return _primitive.write(*arrays, k_scale, v_scale, layout="interleaved")
    if layout == "values_in_keys":  # `v` and its scale are for other layouts
        return jpa.write_kv_pages(pools[0], None, k, None, slots, k_scale=scales.get("k_scale"))[:1]
    write: Any = {
        "split": jpa.write_kv_pages,
        "interleaved": compat.write_interleaved_kv_pages,
        "head_major": compat.write_head_major_kv_pages,
    }[layout]
    written = write(*operands, **scales)
    return (written,) if layout == "interleaved" else written


def interleave(k_pages: Any, v_pages: Any, padding_heads: int = 0, xp: Any = np) -> Any:
    """`[P, S, K, H]` each -> `[P, S, 2K, H]`, each key head in front of its value head, poisoned heads behind."""
    pages, page_size, kv_heads, head_dim = k_pages.shape
    pool = xp.stack([k_pages, v_pages], axis=3).reshape(pages, page_size, 2 * kv_heads, head_dim)
    return xp.concatenate([pool, poison((pages, page_size, padding_heads, head_dim), pool.dtype)], axis=2)


def attend_in_layout(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    kv_lens: Any,
    block_tables: Any,
    cu_q_lens: Any,
    num_seqs: Any = None,
    *,
    layout: str,
    kv_heads: int,
    k_token_scales: Any = None,
    v_token_scales: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """`(out, lse)` of ragged attention over what no public function takes: padding heads, or scales per token."""
    defaults = dict.fromkeys(("scale", "sliding_window", "soft_cap", "implementation", "sinks"))
    options = {**defaults, "batch_invariant": False, **options}
    for name in ("k_scale", "v_scale"):
        if options.get(name) is None:
            options[name] = 1.0 if k_pages.dtype == jnp.int8 else None
    arrays = (jnp.asarray(x) for x in (q, k_pages, v_pages, block_tables, kv_lens))
    none = jnp.zeros(0, jnp.int32)
    rows = _rows.rows_of_each(jnp.asarray(cu_q_lens), none if num_seqs is None else jnp.asarray(num_seqs), q.shape[0])
    per_head = _call.operands_per_head(_checks.Dims(N=q.shape[1], K=kv_heads), jnp.asarray(k_pages), options)
    scales = (k_token_scales, v_token_scales)
    return _primitive.attention(
        *(*arrays, *rows, *per_head),
        *(jnp.asarray(x) for x in scales if x is not None),
        scoring=_options.Scoring.checked(options, q.shape[2]),
        decode=False,
        layout=layout,
        token_scales=(k_token_scales is not None, v_token_scales is not None),
        **_options.engine_choice(options),
    )


_expected: dict[str, tuple[Array, Array]] = {}


def expected(case: Case) -> tuple[Array, Array]:
    """The oracle's float64 `(out, lse)` of a case, computed once."""
    key = repr(case)
    if key not in _expected:
        args, traced = build(case).arguments()
        _expected[key] = getattr(oracle, case.function)(*args, **traced, **case.keywords)
    return _expected[key]


def engine_row(name: str) -> _engines.Engine:
    """The engine of that name, as the table describes it."""
    (row,) = (engine for engine in _engines.ENGINES if engine.name == name)
    return row


def adapted(case: Case | str, engine: str) -> Case:
    """A case (or the one of that name) as the engine takes it, so that no edge is left out for its dtype or head dim.

    Where the engine does not take the dtype of the queries, the name of the case decides among those it takes; of head
    dims the nearest is taken. Scales per token are left out where it has none.
    """
    adapted = BY_NAME[case] if isinstance(case, str) else case
    name, dims = adapted.name, (adapted.head_dim, adapted.value_dim or adapted.head_dim)
    row = engine_row(engine)
    if DTYPES[adapted.dtype].name not in row.q_dtypes:
        taken = [dtype for dtype in OUT_BOUND if DTYPES[dtype].name in row.q_dtypes]
        adapted = replace(adapted, dtype=taken[zlib.crc32(name.encode()) % len(taken)])
    if not row.token_scales:
        adapted = replace(adapted, token_scales=(False, False))
        if adapted.page_dtype == "int8":  # which needs a scale
            names = ("k_scale",) if adapted.values_in_keys else ("k_scale", "v_scale")
            scales = {name: getattr(adapted, name) or 0.01 for name in names}
            adapted = replace(adapted, **scales)
    taken_dims = row.head_dims_for(adapted.values_in_keys, DTYPES[adapted.page_dtype or adapted.dtype].name)
    if taken_dims is not None and dims not in taken_dims:
        head_dim, value_dim = min(taken_dims, key=lambda taken: abs(taken[0] - dims[0]) + abs(taken[1] - dims[1]))
        adapted = replace(adapted, head_dim=head_dim, value_dim=None if value_dim == head_dim else value_dim)
    return adapted


def assert_close(got: Any, want: Any, dtype: str, magnitude: Array | None = None) -> None:
    """Holds `(out, lse)` to the specification's bounds for queries of `dtype` (a name of `cases.DTYPES`).

    Errors are relative to `magnitude`, an array like `out`; None is the wanted `out` itself.
    """
    (out, lse), (want_out, want_lse) = ((np.asarray(x).astype(np.float64) for x in pair) for pair in (got, want))
    assert out.shape == want_out.shape
    assert lse.shape == want_lse.shape
    assert np.isfinite(out).all(), f"{np.isnan(out).sum()} NaN, {np.isinf(out).sum()} Inf in out"

    # Exact by definition: no visible key, no output.
    magnitude = want_out if magnitude is None else magnitude
    no_key = ~magnitude.any(axis=-1)
    np.testing.assert_array_equal(out[no_key], 0.0)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    finite = np.isfinite(want_lse)
    np.testing.assert_allclose(lse[finite], want_lse[finite], rtol=0, atol=LSE_BOUND[dtype])

    error, norm = np.linalg.norm(out - want_out), np.linalg.norm(magnitude)
    assert error <= OUT_BOUND[dtype] * norm + UNDERFLOW[dtype] * np.sqrt(out.size)
    row_errors, row_norms = np.linalg.norm(out - want_out, axis=-1), np.linalg.norm(magnitude, axis=-1)
    excess = row_errors - ROW_SLACK * OUT_BOUND[dtype] * row_norms
    worst = np.unravel_index(np.argmax(excess), excess.shape) if excess.size else ()
    underflow = UNDERFLOW[dtype] * np.sqrt(out.shape[-1])
    assert (excess <= underflow).all(), f"row and head {worst}: {row_errors[worst]} for a norm of {row_norms[worst]}"


def assert_same_bits(got: Any, want: Array) -> None:
    """Equal bits, except that one NaN is as good as another."""
    got = np.asarray(got)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if want.dtype != np.int8:
        nan = np.isnan(want.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
        got, want = np.where(nan, 0, got), np.where(nan, 0, want)
    bits = np.dtype(f"u{want.dtype.itemsize}")
    np.testing.assert_array_equal(got.view(bits), want.view(bits))


def differentiable(case: Case, **keywords: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of q, k_pages, v_pages (and sinks, if the case has some) that gives `(out, lse)`, and its operands."""
    (q, k_pages, v_pages, *rest), traced = build(case).arguments()
    sinks = traced.pop("sinks")

    def attend(q: Any, k_pages: Any, v_pages: Any, sinks: Any = None) -> Any:
        function = getattr(jpa, case.function)
        return function(q, k_pages, v_pages, *rest, sinks=sinks, **traced, **case.keywords, **keywords, return_lse=True)

    return attend, (q, k_pages, v_pages) if sinks is None else (q, k_pages, v_pages, sinks)


def normal_like(tree: Any, seed: int) -> Any:
    """Standard normal numbers of the shapes and dtypes of a pytree of floats."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32).astype(x.dtype), tree)


def to_f64(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def pull_back(function: Callable[..., Any], operands: Any, bars: Any) -> Any:
    """The cotangents of the operands."""
    return jax.jit(lambda operands, bars: jax.vjp(function, *operands)[1](bars))(operands, bars)


def push_forward(function: Callable[..., Any], operands: Any, dots: Any) -> Any:
    """The tangents of the results."""
    return jax.jit(lambda operands, dots: jax.jvp(function, operands, dots)[1])(operands, dots)


def assert_gradients_close(got: Any, want: Any, bound: float) -> None:
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        if theirs is None:  # there is no such operand
            assert mine is None
            continue
        mine, theirs = to_f64(mine), to_f64(theirs)
        assert mine.shape == theirs.shape
        assert np.isfinite(mine).all(), f"gradient {index}: {np.isnan(mine).sum()} NaN"
        assert np.linalg.norm(mine - theirs) <= bound * np.linalg.norm(theirs), f"gradient {index}"
        # No sequence saw these: unused pages, tails, rows outside.
        untouched = ~theirs.any(axis=-1)
        np.testing.assert_array_equal(mine[untouched], 0)


def digest(*arrays: Array) -> str:
    """A hash of the bits."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """The bytes that a compiled function allocates besides its operands and results."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def python(code: str, *args: str, **environment: str) -> list[str]:
    """The lines that a fresh interpreter prints; the suite's own modules and environment are at its hand."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\n")[:-1]
