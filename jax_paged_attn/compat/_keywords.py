"""Keywords that several calls of other kernels have: their defaults and checks."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_paged_attn import _checks

# The default of both kernels.
DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)

# Scores do not come near it, so exp(mask_value − score) is 0 and the key has no weight.
_LARGEST_MASK_VALUE = -1e6


def check_mask_value(mask_value: float | None) -> None:
    if mask_value is not None and _checks.static_number("mask_value", mask_value) > _LARGEST_MASK_VALUE:
        raise ValueError(f"mask_value: expected None or a number of at most {_LARGEST_MASK_VALUE}, got {mask_value}")


def check_counts(options: dict[str, Any], *names: str) -> None:
    for name in names:
        if options[name] is not None:
            _checks.static_count(name, options[name])


def page_scales(options: dict[str, Any], pages: Array) -> dict[str, Any]:
    """The page scales: 1 where int8 pages have none, as both kernels read them."""
    default = 1.0 if pages.dtype == jnp.int8 else None
    return {name: default if options[name] is None else options[name] for name in ("k_scale", "v_scale")}
