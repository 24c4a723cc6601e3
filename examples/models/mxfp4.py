"""MXFP4 weights (OCP microscaling, 2023): blocks of 32 four-bit floats that share a power of two."""

from __future__ import annotations

import numpy as np

# E2M1 has a sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], np.float32)
_BIAS = 127  # of the shared exponents


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Float32 weights `[..., 32 · G]`.

    Args:
      blocks: uint8 `[..., G, 16]`: two numbers per byte, the first one in its low bits.
      scales: uint8 `[..., G]`: exponents of the blocks, plus 127.
    """
    pairs = np.stack([blocks & 0xF, blocks >> 4], axis=-1)
    values = _VALUES[pairs].reshape(*blocks.shape[:-1], 32)
    scaled = np.ldexp(values, scales.astype(np.int32)[..., None] - _BIAS)
    return scaled.reshape(*blocks.shape[:-2], -1)


class Quantised:
    """Weights `[E, 32 · G, outputs]` that a file has as blocks and scales. Only what is sliced is dequantised.

    Args:
      blocks: uint8 `[E, outputs, G, 16]`.
      scales: uint8 `[E, outputs, G]`.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, blocks: np.ndarray, scales: np.ndarray):
        self._blocks, self._scales = blocks, scales
        *experts, outputs, groups = scales.shape
        self.shape = (*experts, 32 * groups, outputs)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        experts, inputs, outputs = index
        values = dequantised(self._blocks[experts, outputs], self._scales[experts, outputs])
        return values[..., inputs].swapaxes(-1, -2)
