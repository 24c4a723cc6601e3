"""gpt-oss: sinks and biases in attention, clamped experts with biases, whose weights may be MXFP4.

Every second layer has a window, from the first one on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from .decoder import DecoderConfig
from .family import Family, Tensor, Tensors, windows
from .fields import CheckpointError, Fields
from .layers import Build, Experts, alternating, largest, mixture
from .mxfp4 import Quantised

_ALPHA = 1.702


def _special(fields: Fields) -> dict[str, Any]:
    if fields.number("swiglu_alpha", _ALPHA) != _ALPHA:
        raise fields.error("swiglu_alpha", str(_ALPHA))
    return {
        "attention_bias": fields.boolean("attention_bias", True),
        "sinks": True,
        "sliding_windows": windows(fields, 128, lambda layer: layer % 2 == 0),
        "experts": ClampedExperts(
            number=fields.integer("num_local_experts", 128),
            per_token=fields.integer("num_experts_per_tok", 4),
            size=fields.integer("intermediate_size"),
            limit=fields.number("swiglu_limit", 7.0),
        ),
    }


@dataclasses.dataclass(frozen=True)
class ClampedExperts(Experts):
    """Experts whose inner columns are bounded.

    Attributes:
      limit: the bound.
    """

    limit: float = 7.0

    def mlp(self, size: int, build: Build, activation: str) -> ClampedExpertsMlp:
        """See `Experts.mlp`."""
        return ClampedExpertsMlp(self, size, build)


class ClampedExpertsMlp(nnx.Module):
    """Biases everywhere, and (up + 1) · gate · sigmoid(1.702 · gate) of clamped numbers."""

    def __init__(self, config: ClampedExperts, size: int, build: Build):
        self.config = config
        self.router = build.linear(size, config.number, use_bias=True)
        self.experts = _Arrays(config, size, build)

    def fuse(self) -> None:
        """Does nothing: the weights are in two arrays already."""

    def __call__(self, x: Array) -> Array:
        weights, limit = self.experts, self.config.limit

        def run(rows: Array, counts: Array, expert: Array) -> Array:
            both = jax.lax.ragged_dot(rows, weights.gate_up_proj[...].astype(rows.dtype), counts)
            both += weights.gate_up_proj_bias[...].astype(rows.dtype)[expert]
            gate, up = alternating(both)
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            inner = (up + 1) * gate * jax.nn.sigmoid(_ALPHA * gate)
            out = jax.lax.ragged_dot(inner, weights.down_proj[...].astype(rows.dtype), counts)
            return out + weights.down_proj_bias[...].astype(rows.dtype)[expert]

        return mixture(x, self.config, lambda rows: largest(self.router(rows), self.config), run)


class _Arrays(nnx.Module):
    """The weights of all experts; columns of gate and up alternate."""

    split_axes: ClassVar = {"gate_up_proj": 2, "gate_up_proj_bias": 1, "down_proj": 1}

    def __init__(self, config: Experts, size: int, build: Build):
        def parameter(*shape: int) -> nnx.Param:
            return nnx.Param(nnx.initializers.normal(0.02)(build.rngs.params(), shape, build.param_dtype))

        number, inner = config.number, config.size
        self.gate_up_proj, self.gate_up_proj_bias = parameter(number, size, 2 * inner), parameter(number, 2 * inner)
        self.down_proj, self.down_proj_bias = parameter(number, inner, size), parameter(number, size)


def _tensors(tensors: Tensors, config: DecoderConfig) -> Iterator[tuple[Path, str, Tensor]]:
    """Where weights are MXFP4, the numbers that blocks and scales stand for, `[E, inputs, outputs]`."""
    halves: dict[str, dict[str, Tensor]] = {}
    for file, name, tensor in tensors:
        stem, _, kind = name.rpartition("_")
        if kind not in ("blocks", "scales") or tensor.dtype != np.uint8:
            yield file, name, tensor
            continue
        halves.setdefault(stem, {})[kind] = tensor
        if len(halves[stem]) == 2:
            both = halves.pop(stem)
            if both["blocks"].shape != (*both["scales"].shape, 16):
                shapes = both["blocks"].shape, both["scales"].shape
                raise CheckpointError(
                    f"{file}: {stem!r}: expected blocks [..., G, 16] and scales [..., G], got {shapes}"
                )
            yield file, stem, Quantised(**both)
    for stem, one in halves.items():
        raise CheckpointError(f"{stem!r}: expected blocks and scales, got {next(iter(one))} alone")


GPT_OSS = Family(
    _special,
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
    },
    tensors=_tensors,
)
