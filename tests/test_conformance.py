"""Every case on every engine, held to the specification's bounds against the float64 oracle."""

from __future__ import annotations

import harness
import numpy as np
import pytest
from cases import BY_NAME, CASES, DTYPES, LSE_BOUND, OUT_BOUND, Case, build

from jax_paged_attn import _engines


@pytest.mark.whole
@pytest.mark.parametrize("case", CASES, ids=str)
def test_engine_matches_the_oracle(engine: str, case: Case) -> None:
    case = harness.adapted(case, engine)
    harness.assert_close(harness.run(case, implementation=engine), harness.expected(case), case.dtype)


@pytest.mark.parametrize("row", _engines.ENGINES, ids=lambda row: row.name)
def test_adapted_cases_are_what_the_engine_takes(row: _engines.Engine) -> None:
    adapted = [harness.adapted(case, row.name) for case in CASES]
    assert {DTYPES[case.dtype].name for case in adapted} == set(row.q_dtypes)
    head_dims = [(case.head_dim, case.value_dim or case.head_dim) for case in adapted]
    assert row.head_dims is None or set(head_dims) == {*row.head_dims, *row.mla_head_dims, *row.wide_head_dims}
    for case in adapted:
        assert row.token_scales or not any(case.token_scales)
    if row.q_dtypes == _engines.Engine("any", None).q_dtypes and row.head_dims is None:
        assert adapted == list(CASES)


@pytest.mark.parametrize("corrupt", ["out", "one row", "nan", "ghost row", "lse", "lse of a ghost row"])
def test_the_comparison_can_fail(corrupt: str) -> None:
    case = BY_NAME["mixed_group_12"]
    want = harness.expected(case)
    out, lse = (x.copy() for x in want)
    harness.assert_close((out, lse), want, case.dtype)
    if corrupt == "out":
        out *= 1 + 2 * OUT_BOUND[case.dtype]
    elif corrupt == "one row":
        out[0, 0] *= 1 + 10 * OUT_BOUND[case.dtype]
        assert np.linalg.norm(out - want[0]) < OUT_BOUND[case.dtype] * np.linalg.norm(want[0])
    elif corrupt == "nan":
        out[15, 0, 0] = np.nan
    elif corrupt == "ghost row":
        out[15] = 1e-30
    elif corrupt == "lse":
        lse[0, 0] += 2 * LSE_BOUND[case.dtype]
    else:
        lse[15] = -1e30
    with pytest.raises(AssertionError):
        harness.assert_close((out, lse), want, case.dtype)


def test_output_is_the_same_without_lse(engine: str) -> None:
    case = harness.adapted("mixed_sinks", engine)
    args, traced = build(case).arguments()
    alone = harness.call(case.function, *args, **traced, implementation=engine)
    out, lse = harness.run(case, implementation=engine)
    np.testing.assert_array_equal(np.asarray(alone), out)
    assert (out.dtype, lse.dtype) == (args[0].dtype, np.float32)
