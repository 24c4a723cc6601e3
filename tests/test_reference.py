"""The functions of the pure-JAX reference, against the NumPy loop; `implementation="reference"` runs the same code."""

from __future__ import annotations

import harness
import pytest
from cases import CASES, Case


def _params() -> list[Case]:
    """Others than `make test` has for the engine of that name, which has them all in the long tail: the code is one."""
    taken = [case for case in CASES if not any(case.token_scales)]  # these functions have no scales per token
    return [case for case in taken if not harness.reference_is_slow(case, place=4)]


@pytest.mark.one_release
@pytest.mark.parametrize("case", _params(), ids=str)
def test_reference_function_matches_the_oracle(case: Case) -> None:
    result = harness.run(case, function=f"{case.function}_reference")
    harness.assert_close(result, harness.expected(case), case.dtype)
