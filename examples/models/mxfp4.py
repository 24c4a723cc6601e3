"""MXFP4 weights (OCP microscaling, 2023): blocks of 32 four-bit floats that share a power of two."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

# E2M1 has a sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], np.float32)
_BIAS = 127  # of the shared exponents


def dequantised(blocks: Array, scales: Array) -> Array:
    """Float32 weights `[..., 32 · G]`.

    Args:
      blocks: uint8 `[..., G, 16]`: two numbers per byte, the first one in its low bits.
      scales: uint8 `[..., G]`: exponents of the blocks, plus 127.
    """
    pairs = jnp.stack([blocks & 0xF, blocks >> 4], axis=-1)
    values = jnp.asarray(_VALUES)[pairs].reshape(*blocks.shape[:-1], 32)
    scaled = jnp.ldexp(values, scales.astype(jnp.int32)[..., None] - _BIAS)
    return scaled.reshape(*blocks.shape[:-2], -1)
