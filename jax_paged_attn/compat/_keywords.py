"""Keywords that several calls of other kernels have: their defaults and checks."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_paged_attn import _checks

# The default of several kernels.
DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)

# Scores do not come near it, so exp(mask_value − score) is 0 and the key has no weight.
_LARGEST_MASK_VALUE = -1e6


def check_mask_value(mask_value: float | None) -> None:
    if mask_value is not None and _checks.static_number("mask_value", mask_value) > _LARGEST_MASK_VALUE:
        raise ValueError(f"mask_value: expected None or a number of at most {_LARGEST_MASK_VALUE}, got {mask_value}")


def check_counts(options: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if options[name] is not None:
            _checks.static_count(name, options[name])


def soft_cap(name: str, cap: float | None) -> float | None:
    """The cap as a positive number, since tanh is odd."""
    cap = None if cap is None else abs(_checks.static_number(name, cap))
    if cap == 0:
        raise ValueError(f"{name}: expected None or a number that is not 0, got 0")
    return cap


def page_scales(options: Mapping[str, Any], pages: Array) -> dict[str, Any]:
    """The page scales: 1 where int8 pages have none, as other kernels read them."""
    default = 1.0 if pages.dtype == jnp.int8 else None
    return {name: default if options[name] is None else options[name] for name in ("k_scale", "v_scale")}
