"""The functions of the pure-JAX reference, against the NumPy loop; `implementation="reference"` runs the same code."""

from __future__ import annotations

import harness
import pytest
from cases import CASES, Case


def _params() -> list[object]:
    """All cases, of which `make test` runs others than it does for the engine of that name."""
    return [pytest.param(case, marks=[pytest.mark.slow] * harness.reference_is_slow(case, place=4)) for case in CASES]


@pytest.mark.parametrize("case", _params(), ids=str)
def test_reference_function_matches_the_oracle(case: Case) -> None:
    result = harness.run(case, function=f"{case.function}_reference")
    harness.assert_close(result, harness.expected(case), case.dtype)
