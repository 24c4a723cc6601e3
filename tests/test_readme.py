"""The README's example runs as it stands there, with 32-bit and with 64-bit defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.is_file(), reason="the tests of a wheel come without the README")
@pytest.mark.parametrize("x64", [False, True])
def test_the_example_runs(x64: bool) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", x64)
    try:
        names: dict[str, Any] = {}
        exec(example, names)
    finally:
        jax.config.update("jax_enable_x64", before)
    out = np.asarray(names["out"], np.float32)
    assert out.shape == (8, 32, 128)
    # Keys are all alike, so each row is the mean of values that are 1; the last row is padding.
    np.testing.assert_array_equal(out[:7], np.ones_like(out[:7]))
    np.testing.assert_array_equal(out[7], np.zeros_like(out[7]))
    shared = names["allocator"].allocate([1, 2, 3, 4, 5, 9])
    assert shared.cached_len == 0  # a page of 16 tokens is not full
