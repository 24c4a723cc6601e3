"""Rotary position embeddings: frequencies, their scaling to longer contexts as data, and the rotation. Needs no Flax.

Rotate queries and keys before keys are written to the cache, since pages hold rotated keys. The Flax layers do both.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_paged_attn import _checks, _modes
from jax_paged_attn._step import IntArray

__all__ = [
    "DynamicRopeScaling",
    "LinearRopeScaling",
    "Llama3RopeScaling",
    "LongRopeScaling",
    "ProportionalRopeScaling",
    "RopeScaling",
    "YarnRopeScaling",
    "apply_rope",
    "rope_frequencies",
]

# That of RoFormer and of most models since.
ROPE_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A way to stretch rotary frequencies to contexts longer than the pretrained one: the base of those below.

    Field names of the kinds are those of `rope_scaling` (or `rope_parameters`) in Hugging Face's config.json.

    Example:
      >>> from jax_paged_attn.rope import LinearRopeScaling, RopeScaling
      >>> isinstance(LinearRopeScaling(4.0), RopeScaling)
      True
    """

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """The stretched frequencies, float64 `[n]`, from the plain ones of base `theta`."""
        raise NotImplementedError

    @property
    def rotation_factor(self) -> float:
        """What multiplies the rotated queries and keys, so that scores grow by its square."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearRopeScaling(RopeScaling):
    """Position interpolation (Chen et al. 2023): every frequency is divided by `factor`.

    Raises:
      ValueError: a factor that is not positive.

    Example:
      >>> from jax_paged_attn.rope import LinearRopeScaling, rope_frequencies
      >>> [f"{frequency:.4f}" for frequency in rope_frequencies(4, scaling=LinearRopeScaling(4.0))]
      ['0.2500', '0.0025']
    """

    factor: float

    def __post_init__(self) -> None:
        _require_positive(self, "factor")

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `RopeScaling.scaled`."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicRopeScaling(RopeScaling):
    """Dynamic NTK: the base grows with the context, so that high frequencies stay and the lowest are divided.

    The method (u/emozilla 2023, after u/bloc97) takes the length that a sequence has right now, and `transformers` does
    so. Keys in a cache keep the rotation that they were written with. So here, as in vLLM, the length is that of the
    longest context that is served, for every sequence. A sequence of exactly `max_len` tokens has the frequencies that
    it has in `transformers`; shorter ones have lower frequencies than there.

    Attributes:
      factor: how fast the base grows, > 0.
      original_max_position_embeddings: the context length of pretraining in tokens, > 0.
      max_len: the longest context that is served, in tokens; up to the original one nothing is stretched.

    Raises:
      ValueError: a number that is not positive.

    Example:
      >>> from jax_paged_attn.rope import DynamicRopeScaling, rope_frequencies
      >>> scaling = DynamicRopeScaling(factor=2.0, original_max_position_embeddings=4096, max_len=8192)
      >>> (rope_frequencies(64) / rope_frequencies(64, scaling=scaling))[[0, -1]].round(4).tolist()
      [1.0, 3.0]
    """

    factor: float
    original_max_position_embeddings: int
    max_len: int

    def __post_init__(self) -> None:
        _require_positive(self, "factor", "original_max_position_embeddings", "max_len")

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `RopeScaling.scaled`."""
        growth = self.factor * max(self.max_len / self.original_max_position_embeddings, 1.0) - (self.factor - 1)
        shares = np.arange(len(frequencies)) / max(len(frequencies) - 1, 1)  # the base grows by growth^(H / (H − 2))
        return frequencies * growth**-shares


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling(RopeScaling):
    """The rotary frequencies of Llama 3.1 and later, stretched to contexts longer than the pretrained one.

    Frequencies whose wavelength is above ``original_max_position_embeddings / low_freq_factor`` are divided by
    `factor`, those below ``original_max_position_embeddings / high_freq_factor`` stay, and those between are
    interpolated.

    Attributes:
      factor: how many times longer contexts are than in pretraining, > 0.
      low_freq_factor: see above, > 0.
      high_freq_factor: see above, > `low_freq_factor`.
      original_max_position_embeddings: the context length of pretraining in tokens, > 0.

    Raises:
      ValueError: a number outside of its range.

    Example:
      >>> from jax_paged_attn.rope import Llama3RopeScaling, rope_frequencies
      >>> scaling = Llama3RopeScaling(8.0, 1.0, 4.0, 8192)  # Llama 3.1
      >>> float(rope_frequencies(128, 500000.0)[-1] / rope_frequencies(128, 500000.0, scaling)[-1])
      8.0
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _require_positive(self, "factor", "original_max_position_embeddings")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope scaling: expected 0 < low_freq_factor < high_freq_factor, got {self}")

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `RopeScaling.scaled`."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class YarnRopeScaling(RopeScaling):
    """YaRN (Peng et al. 2023): low frequencies are divided by `factor`, high ones stay, those between are mixed.

    Attributes:
      factor: how many times longer contexts are than in pretraining, > 0.
      original_max_position_embeddings: the context length of pretraining in tokens, > 0.
      beta_fast, beta_slow: turns within the original context from which a frequency stays, and up to which it is
        divided; `beta_fast` > `beta_slow` > 0.
      attention_factor: multiplies rotated queries and keys; None for 0.1 · ln(factor) + 1, or, where `mscale` and
        `mscale_all_dim` are there, the quotient of these with either in front of the logarithm.
      mscale, mscale_all_dim: see above.
      truncate: whether the borders between the three ranges are rounded to whole frequencies.

    Raises:
      ValueError: a number outside of its range.

    Example:
      >>> from jax_paged_attn.rope import YarnRopeScaling, rope_frequencies
      >>> scaling = YarnRopeScaling(factor=4.0, original_max_position_embeddings=4096)
      >>> plain, stretched = rope_frequencies(64), rope_frequencies(64, scaling=scaling)
      >>> (plain / stretched)[[0, -1]].round(4).tolist(), round(scaling.rotation_factor, 4)
      ([1.0, 4.0], 1.1386)
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _require_positive(self, "factor", "original_max_position_embeddings")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(f"rope scaling: expected 0 < beta_slow < beta_fast, got {self}")

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `RopeScaling.scaled`."""
        size = 2 * len(frequencies)

        def index_with(turns: float) -> float:
            """Which frequency, as a number between the indices, makes so many turns in the original context."""
            length = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return size * math.log(length) / (2 * math.log(theta))

        first, last = index_with(self.beta_fast), index_with(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        width = last - first or 0.001  # one border: a step instead of a ramp
        divided = np.clip((np.arange(len(frequencies)) - first) / width, 0.0, 1.0)
        return divided * frequencies / self.factor + (1 - divided) * frequencies

    @property
    def rotation_factor(self) -> float:
        """See `RopeScaling.rotation_factor`."""
        if self.attention_factor is not None:
            return self.attention_factor

        def growth(scale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1.0)


@dataclasses.dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
    """LongRoPE (Ding et al. 2024): each frequency is divided by a factor of its own.

    Models have two lists, `short_factor` and `long_factor`. Choose by the longest context that is to be served, as keys
    in the cache must all be rotated alike: the short one up to `original_max_position_embeddings` tokens.

    Attributes:
      factors: one per frequency, > 0.
      attention_factor: multiplies rotated queries and keys, > 0.

    Raises:
      ValueError: a number that is not positive.

    Example:
      >>> from jax_paged_attn.rope import LongRopeScaling, rope_frequencies
      >>> [f"{frequency:.3f}" for frequency in rope_frequencies(4, scaling=LongRopeScaling((1.0, 2.0), 1.19))]
      ['1.000', '0.005']
    """

    factors: tuple[float, ...]
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "attention_factor")
        if not all(factor > 0 for factor in self.factors):
            raise ValueError(f"rope scaling: expected positive factors, got {self}")

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `RopeScaling.scaled`.

        Raises:
          ValueError: there are not as many factors as frequencies.
        """
        if len(self.factors) != len(frequencies):
            raise ValueError(
                f"factors: expected one for each of {len(frequencies)} frequencies, got {len(self.factors)}"
            )
        return frequencies / np.asarray(self.factors)

    @property
    def rotation_factor(self) -> float:
        """See `RopeScaling.rotation_factor`."""
        return self.attention_factor


@dataclasses.dataclass(frozen=True)
class ProportionalRopeScaling(RopeScaling):
    """Proportional rotation (Gemma 4): the highest frequencies stay, and the others become zero.

    Columns i and i + H/2 are still a pair, so those that are not rotated are the last ones of each half. With
    `rotary_dim`, in contrast, they are the last ones of the head, and frequencies are those of a smaller head.

    Attributes:
      partial_rotary_factor: the share of the frequencies that stay, > 0, rounded down to a number of them.
      factor: divides these, > 0.

    Raises:
      ValueError: a number that is not positive, or a share above 1.

    Example:
      >>> from jax_paged_attn.rope import ProportionalRopeScaling, rope_frequencies
      >>> scaling = ProportionalRopeScaling(0.5)
      >>> [f"{frequency:.2f}" for frequency in rope_frequencies(8, scaling=scaling)]
      ['1.00', '0.10', '0.00', '0.00']
    """

    partial_rotary_factor: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "partial_rotary_factor", "factor")
        if self.partial_rotary_factor > 1:
            raise ValueError(f"rope scaling: expected partial_rotary_factor <= 1, got {self}")

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `RopeScaling.scaled`."""
        kept = int(self.partial_rotary_factor * len(frequencies))
        return np.where(np.arange(len(frequencies)) < kept, frequencies / self.factor, 0.0)


def rope_frequencies(head_dim: int, theta: float = ROPE_THETA, scaling: RopeScaling | None = None) -> np.ndarray:
    """Rotary frequencies in radians per token (RoFormer, Su et al. 2021), float32 `[head_dim / 2]`.

    Args:
      head_dim: H, even; where only the first columns of a head are rotated, their number.
      theta: the base, positive: frequency i is theta^(−2i / H).
      scaling: stretches them to longer contexts.

    Raises:
      ValueError: `head_dim` is odd or `theta` is not positive and finite.

    Example:
      >>> from jax_paged_attn.rope import rope_frequencies
      >>> [f"{frequency:.2f}" for frequency in rope_frequencies(4)]
      ['1.00', '0.01']
    """
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even number for rotary embeddings, got {head_dim}")
    theta = _checks.static_positive("theta", theta)
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return (frequencies if scaling is None else scaling.scaled(frequencies, theta)).astype(np.float32)


def apply_rope(
    x: Array, positions: IntArray, frequencies: ArrayLike, *, interleaved: bool = False, factor: float = 1.0
) -> Array:
    """Rotates pairs of columns of each head by position · frequency.

    Args:
      x: `[..., heads, H]`.
      positions: int32, the leading axes of `x`.
      frequencies: `[R / 2]`, see `rope_frequencies`. Of each head the first R ≤ H columns are rotated.
      interleaved: pairs are columns (2i, 2i + 1), as in GPT-J, and not (i, i + R/2), as in GPT-NeoX and Llama.
      factor: multiplies what was rotated; see `RopeScaling.rotation_factor`.

    Returns:
      As `x`, in its dtype; the rotation is computed in float32.

    Raises:
      ValueError: more columns to rotate than a head has.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.rope import apply_rope, rope_frequencies
      >>> x = jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]])  # two tokens of one head, H = 2
      >>> [f"{number:.2f}" for number in apply_rope(x, jnp.array([0, 1]), rope_frequencies(2)).ravel()]
      ['1.00', '0.00', '0.54', '0.84']
    """
    frequencies = jnp.asarray(frequencies, jnp.float32)
    if 2 * len(frequencies) > x.shape[-1]:
        raise ValueError(f"frequencies: expected at most H / 2 = {x.shape[-1] // 2}, got {len(frequencies)}")
    return _rotated(x, jnp.asarray(positions), frequencies, interleaved, factor)


@functools.partial(_modes.compiled, static_argnums=(3, 4))
def _rotated(x: Array, positions: Array, frequencies: Array, interleaved: bool, factor: float) -> Array:
    columns = 2 * frequencies.shape[-1]
    per_pair = frequencies.reshape(*[1] * (x.ndim - 1), -1)
    angles = (
        positions.astype(jnp.float32).reshape(*[1] * (x.ndim - 2 - positions.ndim), *positions.shape, 1, 1) * per_pair
    )
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    head = x[..., :columns].astype(jnp.float32)
    if interleaved:
        pairs = head.reshape(*head.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(head.shape)
    else:
        first, second = jnp.split(head, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if columns == x.shape[-1] else jnp.concatenate([turned, x[..., columns:]], axis=-1)


def _require_positive(scaling: RopeScaling, *names: str) -> None:
    if not all(getattr(scaling, name) > 0 for name in names):
        raise ValueError(f"rope scaling: expected positive {' and '.join(names)}, got {scaling}")
