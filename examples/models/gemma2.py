"""Gemma 2: what is new in its block, its norms and its scales. Gemma 3 shares all of it but the caps.

- Attention and MLP are normalised on both sides, before their results are added.
- A norm's weights are what is added to 1.
- Embeddings are multiplied by √D, and scores by a number of their own; scores and logits are capped.
- Every second layer has a window, from the first one on.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_paged_attn.nnx import StepMetadata

from .decoder import Block, DecoderConfig
from .family import Family, if_missing, windows
from .fields import Fields
from .layers import Build, normalised


class OffsetNorm(nnx.Module):
    """RMSNorm whose weights are added to 1, in float32, so that weights near 0 keep their precision in bf16."""

    def __init__(self, size: int, epsilon: float, build: Build):
        self.scale = nnx.Param(jnp.zeros(size, build.param_dtype))
        self.epsilon = epsilon
        self.dtype = build.dtype

    def __call__(self, x: Array) -> Array:
        return (normalised(x, self.epsilon) * (1.0 + self.scale[...].astype(jnp.float32))).astype(self.dtype)


class SandwichBlock(Block):
    """A block with norms on both sides of attention and of the MLP."""

    def __init__(self, config: DecoderConfig, layer: int, build: Build):
        super().__init__(config, layer, build)
        self.pre_feedforward_layernorm = config.norm(config.hidden_size, config.rms_norm_eps, build)
        self.post_feedforward_layernorm = config.norm(config.hidden_size, config.rms_norm_eps, build)

    def __call__(self, x: Array, step: StepMetadata | None, rngs: nnx.Rngs | None) -> Array:
        """See `Block.__call__`."""
        attended = self.self_attn(self.input_layernorm(x), step)
        x = x + self.dropped(self.post_attention_layernorm(attended), rngs)
        through = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.dropped(self.post_feedforward_layernorm(through), rngs)


def gemma_special(fields: Fields, period: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; one in `period` layers has no window."""
    return {
        "attention_bias": fields.boolean("attention_bias", False),
        "sliding_windows": windows(fields, 4096, lambda layer: (layer + 1) % period > 0),
        "hidden_act": "gelu_tanh",
        "norm": OffsetNorm,
        "block": SandwichBlock,
        "embedding_scale": math.sqrt(fields.integer("hidden_size")),
        "attention_scale": fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
    }


def gemma_activation(fields: Fields) -> str:
    """The activation has a new name, beside which the old one does not count."""
    name = "hidden_activation" if fields.has("hidden_activation") else "hidden_act"
    return fields.choice(name, ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")


def _special(fields: Fields) -> dict[str, Any]:
    return {
        **gemma_special(fields, period=2),
        "attention_soft_cap": _soft_cap(fields, "attn_logit_softcapping", 50.0),
        "logit_soft_cap": _soft_cap(fields, "final_logit_softcapping", 30.0),
    }


def _soft_cap(fields: Fields, name: str, default: float) -> float | None:
    return fields.number(name, if_missing(fields, name, default))


GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
GEMMA2 = Family(_special, {**GEMMA_DEFAULTS, "max_position_embeddings": 8192}, activation=gemma_activation)
