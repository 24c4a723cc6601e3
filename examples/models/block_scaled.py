"""Fp8 weights in square blocks, each of which has a scale, as DeepSeek V3 and its kin have them in their files."""

from __future__ import annotations

import numpy as np

from .fields import CheckpointError

# Rows and columns of a block.
BLOCK = 128


def block_scaled(name: str, weight: np.ndarray, scales: np.ndarray) -> BlockScaled:
    """The weights that a file has as fp8 numbers and scales.

    Args:
      name: what errors call the tensor.
      weight: `[outputs, inputs]`.
      scales: `[ceil(outputs / 128), ceil(inputs / 128)]`, of any dtype: value = stored · scale.

    Raises:
      CheckpointError: the shapes do not fit.
    """
    expected = tuple(-(-size // BLOCK) for size in weight.shape)
    if weight.ndim != 2 or scales.shape != expected:
        shapes = f"{weight.shape} with {scales.shape}"
        raise CheckpointError(f"{name}: expected weights of two axes and a scale for each {BLOCK}², got {shapes}")
    return BlockScaled(weight, scales)


class BlockScaled:
    """Weights in float32, of which only what is sliced is dequantised; made by `block_scaled`."""

    dtype = np.dtype(np.float32)

    def __init__(self, weight: np.ndarray, scales: np.ndarray):
        self._weight, self._scales = weight, scales
        self.shape = weight.shape

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        blocks = (np.arange(size)[part] // BLOCK for size, part in zip(self.shape, index, strict=True))
        return self._weight[index].astype(np.float32) * self._scales[np.ix_(*blocks)].astype(np.float32)
