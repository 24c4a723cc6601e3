"""The decoder of Gemma 4, whose layers are of two kinds; gemma4.py says what is special about it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_paged_attn.nnx import FusedLinear, PagedAttention, StepMetadata
from jax_paged_attn.rope import RopeScaling

from .decoder import Decoder, DecoderConfig, Step, of_group
from .gemma2 import SandwichBlock
from .layers import ACTIVATIONS, Build, Experts, ExpertsMlp, normalised


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What all layers with a window have alike, or all others.

    Attributes:
      head_dim, kv_heads: H and K.
      rope_theta, rope_scaling: of rotary embeddings.
      values_from_keys: whether the projection of keys is that of values too.
    """

    head_dim: int
    kv_heads: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    values_from_keys: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Config(DecoderConfig):
    """Sizes and options of a Gemma 4.

    Attributes:
      local_kind, global_kind: the layers with a window, and the others.
      shared_layers: how many of the last layers have no keys and values of their own.
      wide_shared_mlps: whether the MLPs of these have twice the inner columns.
      layer_input_size: numbers of the vector that each layer gets for each token; 0 for none.
      layer_input_vocab_size: how many tokens have such vectors.
    """

    local_kind: LayerKind
    global_kind: LayerKind
    shared_layers: int = 0
    wide_shared_mlps: bool = False
    layer_input_size: int = 0
    layer_input_vocab_size: int = 0

    def kind(self, layer: int) -> LayerKind:
        """That of a layer."""
        return self.global_kind if self.window(layer) is None else self.local_kind

    def is_shared(self, layer: int) -> bool:
        """Whether a layer sees the keys and values of an earlier one."""
        return layer >= self.num_hidden_layers - self.shared_layers

    def inner_size(self, layer: int) -> int:
        """See `DecoderConfig.inner_size`."""
        return self.intermediate_size * (2 if self.wide_shared_mlps and self.is_shared(layer) else 1)

    def split_sizes(self) -> dict[str, int]:
        """See `DecoderConfig.split_sizes`."""
        return {**super().split_sizes(), "num_global_key_value_heads": self.global_kind.kv_heads}


# The attention of a layer that has keys and values, and those of the tokens at hand.
Kept = tuple[PagedAttention, Array, Array]


class SharedAttention(nnx.Module):
    """Attention of a layer without keys and values: over the cache of an earlier layer."""

    def __init__(self, config: Gemma4Config, layer: int, build: Build):
        kind, heads, has_bias = config.kind(layer), config.num_attention_heads, bool(config.attention_bias)
        self.heads = heads, kind.head_dim
        self.q_proj = build.linear(config.hidden_size, heads * kind.head_dim, has_bias)
        self.q_norm = config.norm(kind.head_dim, config.rms_norm_eps, build)
        self.o_proj = build.linear(heads * kind.head_dim, config.hidden_size, has_bias)
        self.attention: PagedAttention | None = nnx.data(None)

    def fuse_projections(self) -> None:
        """Does nothing: there is one projection in front of attention."""

    def __call__(self, x: Array, step: StepMetadata | None, kept: Kept | None) -> tuple[Array, Kept]:
        """`[T, D]` tokens of a step, or `[..., T, D]` whole sequences without one; returns as `x`, and `kept`.

        Args:
          x: see above.
          step: see `StepMetadata`.
          kept: of the last layer in front that is of the same kind and has keys and values.
        """
        if kept is None:
            raise ValueError("kept: expected keys and values of an earlier layer of the same kind, got None")
        q = self.q_norm(self.q_proj(x).reshape(*x.shape[:-1], *self.heads))
        attention, k, v = kept
        return self.projected(attention(q, k, v, step, writes=False)), kept

    def projected(self, out: Array) -> Array:
        """Results of heads `[..., N, H]` to `[..., D]`."""
        return self.o_proj(out.reshape(*out.shape[:-2], -1))


class OwnAttention(SharedAttention):
    """Attention of a layer that has keys and values, with norms of their heads."""

    attention: PagedAttention

    def __init__(self, config: Gemma4Config, layer: int, build: Build):
        super().__init__(config, layer, build)
        self.kind, self.epsilon = config.kind(layer), config.rms_norm_eps
        inputs, columns = config.hidden_size, self.kind.kv_heads * self.kind.head_dim
        has_bias = bool(config.attention_bias)
        self.k_proj = build.linear(inputs, columns, has_bias)
        self.v_proj = nnx.data(None if self.kind.values_from_keys else build.linear(inputs, columns, has_bias))
        self.k_norm = config.norm(self.kind.head_dim, config.rms_norm_eps, build)
        self.qkv_proj: FusedLinear | None = nnx.data(None)
        self.attention = PagedAttention(
            config.num_attention_heads,
            self.kind.kv_heads,
            self.kind.head_dim,
            sliding_window=config.window(layer),
            scale=config.attention_scale,
            rope_theta=self.kind.rope_theta,
            rope_scaling=self.kind.rope_scaling,
            implementation=build.implementation,
        )

    def fuse_projections(self) -> None:
        """See `PagedSelfAttention.fuse_projections`."""
        if self.qkv_proj is None:
            projections = [x for x in (self.q_proj, self.k_proj, self.v_proj) if x is not None]
            self.qkv_proj = FusedLinear.of(projections, (self.kind.kv_heads, -1, self.kind.head_dim))
            del self.q_proj, self.k_proj, self.v_proj

    def init_cache(self, num_pages: int, page_size: int, dtype: Any, **scales: Any) -> None:
        """See `PagedAttention.init_cache`."""
        self.attention.init_cache(num_pages, page_size, dtype, **scales)

    def __call__(self, x: Array, step: StepMetadata | None, kept: Kept | None) -> tuple[Array, Kept]:
        """See `SharedAttention.__call__`; what is returned besides is for layers that share it."""
        q, k, v = self._heads(x)
        q, k, v = self.q_norm(q), self.k_norm(k), normalised(v, self.epsilon).astype(q.dtype)
        return self.projected(self.attention(q, k, v, step)), (self.attention, k, v)

    def _heads(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries `[..., T, N, H]`, and what keys and values are made of, `[..., T, K, H]`."""
        if self.qkv_proj is not None:
            both, group = self.qkv_proj(x), self.heads[0] // self.kind.kv_heads
            q = both[..., :group, :].reshape(*x.shape[:-1], *self.heads)
            return q, both[..., group, :], both[..., -1, :]
        q = self.q_proj(x).reshape(*x.shape[:-1], *self.heads)
        k = self.k_proj(x).reshape(*x.shape[:-1], -1, self.kind.head_dim)
        return q, k, k if self.v_proj is None else self.v_proj(x).reshape(k.shape)


class ScaledRouter(nnx.Module):
    """Tokens to a logit for each expert, and what the weights of the chosen ones are multiplied by."""

    def __init__(self, config: Gemma4Config, number: int, build: Build):
        self.norm = config.norm(config.hidden_size, config.rms_norm_eps, build)
        self.proj = build.linear(config.hidden_size, number)
        self.per_expert_scale = nnx.Param(jnp.ones(number, build.param_dtype))

    def __call__(self, x: Array) -> Array:
        return self.proj(self.norm(x) * jnp.asarray(x.shape[-1] ** -0.5, x.dtype))


class ScaledExpertsMlp(ExpertsMlp):
    """Experts whose weights are multiplied by a learnt number each."""

    def __init__(self, experts: Experts, config: Gemma4Config, build: Build):
        super().__init__(experts, config.hidden_size, build, config.hidden_act)
        self.gate = ScaledRouter(config, experts.number, build)

    def route(self, x: Array) -> tuple[Array, Array]:
        """See `ExpertsMlp.route`."""
        weights, chosen = super().route(x)
        return weights * self.gate.per_expert_scale[...].astype(jnp.float32)[chosen], chosen


class Gemma4Block(SandwichBlock):
    """A block with experts beside the MLP, and with a vector of its own for each token, where the model has these."""

    def __init__(self, config: Gemma4Config, layer: int, build: Build):
        super().__init__(config, layer, build)
        size, epsilon = config.hidden_size, config.rms_norm_eps
        self.activation = ACTIVATIONS[config.hidden_act]
        self.layer_scalar = nnx.Param(jnp.ones(1, build.param_dtype))
        self.experts: ScaledExpertsMlp | None = nnx.data(None)
        self.has_input = config.layer_input_size > 0
        if config.experts is not None:
            self.experts = ScaledExpertsMlp(config.experts, config, build)
            self.pre_feedforward_layernorm_2 = config.norm(size, epsilon, build)
            self.post_feedforward_layernorm_1 = config.norm(size, epsilon, build)
            self.post_feedforward_layernorm_2 = config.norm(size, epsilon, build)
        if self.has_input:
            self.per_layer_input_gate = build.linear(size, config.layer_input_size)
            self.per_layer_projection = build.linear(config.layer_input_size, size)
            self.post_per_layer_input_norm = config.norm(size, epsilon, build)

    def attention(self, config: Gemma4Config, layer: int, build: Build) -> SharedAttention:
        """See `Block.attention`."""
        return (SharedAttention if config.is_shared(layer) else OwnAttention)(config, layer, build)

    def fuse(self) -> None:
        """See `Block.fuse`."""
        super().fuse()
        if self.experts is not None:
            self.experts.fuse()

    def __call__(
        self,
        x: Array,
        step: StepMetadata | None,
        rngs: nnx.Rngs | None,
        layer_input: Array | None = None,
        kept: dict[int, Kept] | None = None,
    ) -> Array:
        """See `Block.__call__`.

        Args:
          x, step, rngs: see there.
          layer_input: `[..., T, layer_input_size]`, in models that have it.
          kept: of each layer group; a layer with keys and values puts its own there.
        """
        kept = {} if kept is None else kept
        attended, kept[self.group] = self.self_attn(self.input_layernorm(x), step, kept.get(self.group))
        x = x + self.dropped(self.post_attention_layernorm(attended), rngs)
        through = self.mlp(self.pre_feedforward_layernorm(x))
        if self.experts is not None:
            of_experts = self.experts(self.pre_feedforward_layernorm_2(x), routed=x)
            through = self.post_feedforward_layernorm_1(through) + self.post_feedforward_layernorm_2(of_experts)
        x = x + self.dropped(self.post_feedforward_layernorm(through), rngs)
        if layer_input is not None:
            gated = self.activation(self.per_layer_input_gate(x)) * layer_input
            x = x + self.dropped(self.post_per_layer_input_norm(self.per_layer_projection(gated)), rngs)
        return x * self.layer_scalar[...].astype(x.dtype)


class Gemma4Decoder(Decoder):
    """A decoder that passes keys and values on between layers, and gives each a vector of its own for each token."""

    split_axes: ClassVar = {**Decoder.split_axes, "embed_tokens_per_layer.embedding": 0}

    config: Gemma4Config

    def add_modules(self, build: Build) -> None:
        """See `Decoder.add_modules`."""
        config = self.config
        columns = config.num_hidden_layers * config.layer_input_size
        if columns:
            options: Any = {"dtype": build.dtype, "param_dtype": build.param_dtype, "rngs": build.rngs}
            options["embedding_init"] = nnx.initializers.normal(0.02)
            self.embed_tokens_per_layer = nnx.Embed(config.layer_input_vocab_size, columns, **options)
            self.per_layer_model_projection = build.linear(config.hidden_size, columns)
            self.per_layer_projection_norm = config.norm(config.layer_input_size, config.rms_norm_eps, build)

    def hidden(self, tokens: Array, step: Step = None, rngs: nnx.Rngs | None = None) -> Array:
        """See `Decoder.hidden`."""
        x = self.embedded(tokens, rngs)
        inputs = self._layer_inputs(tokens, x) if self.config.layer_input_size else None
        kept: dict[int, Kept] = {}
        layers: Any = self.layers  # whose blocks take more than others do
        for index, layer in enumerate(layers):
            layer_input = None if inputs is None else inputs[..., index, :]
            x = layer(x, of_group(step, layer.group), rngs, layer_input, kept)
        return self.norm(x)

    def _layer_inputs(self, tokens: Array, x: Array) -> Array:
        """`[..., T, layers, layer_input_size]`, from tokens and from what the first layer sees."""
        shape = (*tokens.shape, self.config.num_hidden_layers, self.config.layer_input_size)

        def scaled(y: Array, factor: float) -> Array:
            return y.reshape(shape) * jnp.asarray(factor, y.dtype)

        of_tokens = scaled(self.embed_tokens_per_layer(tokens), math.sqrt(shape[-1]))
        of_states = self.per_layer_projection_norm(scaled(self.per_layer_model_projection(x), x.shape[-1] ** -0.5))
        return scaled(of_tokens + of_states, 0.5**0.5)
