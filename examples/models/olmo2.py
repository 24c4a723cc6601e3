"""OLMo 2: norms behind attention and MLP and none in front of them; q and k are normalised over all heads together."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_paged_attn.nnx import StepMetadata

from .decoder import Block, DecoderConfig
from .family import Family
from .fields import Fields
from .layers import Build, normalised


class AllHeadsNorm(nnx.Module):
    """RMSNorm over the heads `[..., heads, H]` of a token, with a weight for each column of each head."""

    split_axes: ClassVar = {"scale": 0}

    def __init__(self, size: int, epsilon: float, build: Build):
        self.scale = nnx.Param(jnp.ones(size, build.param_dtype))
        self.epsilon = epsilon
        self.dtype = build.dtype

    def __call__(self, x: Array) -> Array:
        x = normalised(x, self.epsilon, (-2, -1))
        return (x * self.scale[...].astype(jnp.float32).reshape(x.shape[-2:])).astype(self.dtype)


class Olmo2Block(Block):
    """A block that normalises what attention and MLP give, and not what they see."""

    def __init__(self, config: DecoderConfig, layer: int, build: Build):
        super().__init__(config, layer, build)
        del self.input_layernorm
        self.post_feedforward_layernorm = config.norm(config.hidden_size, config.rms_norm_eps, build)
        attention: Any = self.self_attn
        for name, heads in (("q_norm", config.num_attention_heads), ("k_norm", config.num_key_value_heads)):
            setattr(attention, name, AllHeadsNorm(heads * config.head_dim, config.rms_norm_eps, build))

    def __call__(self, x: Array, step: StepMetadata | None, rngs: nnx.Rngs | None) -> Array:
        """See `Block.__call__`."""
        x = x + self.dropped(self.post_attention_layernorm(self.self_attn(x, step)), rngs)
        return x + self.dropped(self.post_feedforward_layernorm(self.mlp(x)), rngs)


def _special(fields: Fields) -> dict[str, Any]:
    return {"attention_bias": fields.boolean("attention_bias", False), "block": Olmo2Block}


OLMO2 = Family(_special, {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279})
