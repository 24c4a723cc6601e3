"""Runs a case through a function of the package and compares the result with the oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import oracle
from cases import LSE_BOUND, OUT_BOUND, Array, Case, build

import jax_paged_attn as jpa

# A single row may be this much worse than the bound on the whole output: the bound alone would let one wrong row of
# many pass, while a row of small values may exceed it by rounding.
ROW_SLACK = 8


@functools.cache
def compiled(function: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """`jit` of a function of the package, one for each set of static keywords, so that cases share compilations."""
    return jax.jit(functools.partial(getattr(jpa, function), **dict(static)))


def call(function: str, *args: Any, **kwargs: Any) -> Any:
    """A jitted call; keywords that are arrays or None are traced, all others are static."""
    traced = {name: value for name, value in kwargs.items() if value is None or hasattr(value, "dtype")}
    static = tuple((name, value) for name, value in kwargs.items() if name not in traced)
    return compiled(function, static)(*args, **traced)


def run(case: Case, function: str | None = None, **keywords: Any) -> tuple[Array, Array]:
    """`(out, lse)` of a case as NumPy arrays."""
    args, traced = build(case).arguments()
    out, lse = call(function or case.function, *args, **traced, **case.keywords, **keywords, return_lse=True)
    return np.asarray(out), np.asarray(lse)


@functools.cache
def expected(case_name: str) -> tuple[Array, Array]:
    """The oracle's float64 `(out, lse)` of the case of that name."""
    from cases import BY_NAME

    case = BY_NAME[case_name]
    args, traced = build(case).arguments()
    return getattr(oracle, case.function)(*args, **traced, **case.keywords)


def assert_close(out: Array, lse: Array, want_out: Array, want_lse: Array, dtype: str) -> None:
    """Holds a result to the specification's bounds for queries of `dtype` (a name of `cases.DTYPES`)."""
    out, lse = out.astype(np.float64), lse.astype(np.float64)
    assert out.shape == want_out.shape
    assert lse.shape == want_lse.shape
    assert np.isfinite(out).all(), f"{np.isnan(out).sum()} NaN, {np.isinf(out).sum()} Inf in out"

    # What is defined to be exact: no visible key, no output.
    no_key = ~want_out.any(axis=-1)
    np.testing.assert_array_equal(out[no_key], 0.0)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    finite = np.isfinite(want_lse)
    np.testing.assert_allclose(lse[finite], want_lse[finite], rtol=0, atol=LSE_BOUND[dtype])

    norm = np.linalg.norm(want_out)
    assert np.linalg.norm(out - want_out) <= OUT_BOUND[dtype] * norm
    row_norms = np.linalg.norm(want_out, axis=-1)
    row_errors = np.linalg.norm(out - want_out, axis=-1)
    worst = np.argmax(row_errors - ROW_SLACK * OUT_BOUND[dtype] * row_norms)
    index = np.unravel_index(worst, row_errors.shape)
    assert (row_errors <= ROW_SLACK * OUT_BOUND[dtype] * row_norms).all(), (
        f"row and head {index}: error {row_errors[index]:.2e} for a norm of {row_norms[index]:.2e}"
    )
