"""The pure-JAX reference against the NumPy loop."""

from __future__ import annotations

import harness
import pytest
from cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_function_matches_the_oracle(case: Case) -> None:
    result = harness.run(case, function=f"{case.function}_reference")
    harness.assert_close(result, harness.expected(case), case.dtype)
