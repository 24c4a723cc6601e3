"""Every case on every engine, held to the specification's bounds against the float64 oracle."""

from __future__ import annotations

import harness
import numpy as np
import pytest
from cases import BY_NAME, CASES, LSE_BOUND, OUT_BOUND, Case, build


@pytest.mark.parametrize("case", CASES, ids=str)
def test_engine_matches_the_oracle(engine: str, case: Case) -> None:
    harness.assert_close(harness.run(case, implementation=engine), harness.expected(case.name), case.dtype)


@pytest.mark.parametrize("corrupt", ["out", "one row", "nan", "ghost row", "lse", "lse of a ghost row"])
def test_the_comparison_can_fail(corrupt: str) -> None:
    case = BY_NAME["mixed_group_12"]
    want = harness.expected(case.name)
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
    case = BY_NAME["mixed_sinks"]
    args, traced = build(case).arguments()
    alone = harness.call(case.function, *args, **traced, implementation=engine)
    out, lse = harness.run(case, implementation=engine)
    np.testing.assert_array_equal(np.asarray(alone), out)
    assert (out.dtype, lse.dtype) == (args[0].dtype, np.float32)
