"""Llama and its relatives in Flax NNX: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU.

Mistral adds sliding windows, Mixtral experts, Qwen 2 biases of q, k and v, Qwen 3 norms of q and k. Gemma has norms on
both sides of attention and MLP, scaled embeddings, soft caps and a second rotary base; gpt-oss has sinks. `families.py`
reads which it is.

Module and field names follow Hugging Face's, so that `checkpoint.py` is a plain renaming. Every attention goes through
`jax_paged_attn.nnx.PagedSelfAttention`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from mlp import ClampedExpertsMlp, Experts, ExpertsMlp, GatedMlp, Precision, linear

from jax_paged_attn.nnx import PagedSelfAttention, StepMetadata
from jax_paged_attn.rope import RopeScaling
from jax_paged_attn.serving import NnxModel


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the model, named as in Hugging Face's config.json where that has the field.

    Attributes:
      attention_bias: True for biases of all four projections, or the names of those that have one.
      qk_norm: whether each head of q and k is normalised before its rotation.
      sliding_windows: the most keys that a row sees, for each layer; a layer without a window has None.
        None in place of the tuple means that no layer has one.
      rotary_dim: the first columns of a head that are rotated; None for all.
      local_rope_theta: the rotary base of layers with a window, which then have no scaling; None for `rope_theta`.
      experts: None where all layers have a plain MLP.
      dense_layers: layers with a plain MLP in spite of that.
      swiglu_limit: bounds the inner columns of gpt-oss' experts; None for other models.
      sinks: whether each head has a learnt logit without a value.
      hidden_act: of the MLP: "silu" or "gelu_tanh".
      norm_offset: whether a norm's weights are what is added to 1.
      sandwich_norms: whether attention and MLP are normalised on both sides, before their results are added.
      embedding_scale: multiplies the embeddings of tokens.
      attention_scale: multiplies q · k; None for head_dim^(−1/2).
      attention_soft_cap, logit_soft_cap: c of c · tanh(x / c), for scores and for logits; None for none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool | tuple[str, ...] = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] | None = None
    rotary_dim: int | None = None
    local_rope_theta: float | None = None
    experts: Experts | None = None
    dense_layers: tuple[int, ...] = ()
    swiglu_limit: float | None = None
    sinks: bool = False
    hidden_act: str = "silu"
    norm_offset: bool = False
    sandwich_norms: bool = False
    embedding_scale: float | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


class Llama(nnx.Module):
    """Tokens to next-token logits.

    Args:
      config: the sizes.
      dtype, param_dtype: of the computation and of the weights.
      dropout: rate on the embeddings and on what each block adds, in training only.
      implementation: engine that every attention runs on; None for the best one.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        dropout: float = 0.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        precision = Precision(dtype, param_dtype)
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List(
            [_Block(config, i, precision, dropout, implementation, rngs) for i in range(config.num_hidden_layers)]
        )
        self.norm = _norm(config, precision, rngs)
        self.dropout = nnx.Dropout(dropout)
        self._pages_sharding: NamedSharding | None = None
        self.lm_head = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size, precision, rngs)

    def init_cache(
        self,
        num_pages: int,
        page_size: int,
        dtype: DTypeLike | None = None,
        scales: Sequence[tuple[ArrayLike, ArrayLike]] | None = None,
    ) -> None:
        """Gives every layer a cache of pages in `dtype`, by default that of the computation; scales: (k, v) per layer.

        Raises:
          ValueError: as many scales as layers are expected; see also `PagedAttention.init_cache`.
        """
        if scales is not None and len(scales) != len(self.layers):
            raise ValueError(f"scales: expected one pair for each of {len(self.layers)} layers, got {len(scales)}")
        dtype = self.dtype if dtype is None else dtype
        for index, layer in enumerate(self.layers):
            k_scale, v_scale = (None, None) if scales is None else scales[index]
            layer.self_attn.init_cache(num_pages, page_size, dtype, k_scale=k_scale, v_scale=v_scale)
            for pages in (layer.self_attn.attention.k_pages, layer.self_attn.attention.v_pages):
                if pages is not None and self._pages_sharding is not None:
                    pages.set_value(jax.device_put(pages[...], self._pages_sharding))

    def fuse(self) -> None:
        """Joins products that share their input, q with k and v, gate with up: for serving, not to be saved."""
        for layer in self.layers:
            layer.self_attn.fuse_projections()
            layer.mlp.fuse()

    def shard(self, mesh: Mesh, axis: str) -> None:
        """Places the weights for tensor parallelism over an Auto axis of a mesh, and later the caches of `init_cache`.

        Heads and the inner columns of the MLP are split; what follows them is split by row and summed over devices.

        Raises:
          ValueError: the heads of keys and values, or the inner columns, are no multiple of the axis' size.
        """
        ways = mesh.shape[axis]
        for name in ("num_key_value_heads", "intermediate_size"):
            if (number := getattr(self.config, name)) % ways:
                raise ValueError(f"axis: expected a size that divides {name} = {number}, got {ways}")
        self._pages_sharding = NamedSharding(mesh, PartitionSpec(None, None, axis))

        def place(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
            spec = PartitionSpec(*(axis if split else None for split in _split_axes(path, variable.ndim)))
            return variable.replace(jax.device_put(variable[...], NamedSharding(mesh, spec)))

        nnx.update(self, nnx.map_state(place, nnx.state(self, nnx.Param)))

    def served(
        self, cache_dtype: DTypeLike | None = None, scales: Sequence[tuple[ArrayLike, ArrayLike]] | None = None
    ) -> NnxModel:
        """The model as `jax_paged_attn.serving.Engine` takes it; see `init_cache` for the arguments."""
        return NnxModel(
            self,
            vocab_size=self.config.vocab_size,
            max_len=self.config.max_position_embeddings,
            init_cache=lambda twin, *pool: twin.init_cache(*pool, cache_dtype, scales),
        )

    def int8_scales(self, tokens: Array) -> list[tuple[Array, Array]]:
        """Scales (k, v) of each layer, `[K]`, such that the largest key and value over `tokens [T]` become 127.

        Replaces the cache.
        """
        page_size = 16
        self.init_cache(math.ceil(len(tokens) / page_size), page_size)
        self.hidden(tokens, StepMetadata.whole_sequences(1, len(tokens), page_size))

        def scale(pages: nnx.Variable | None) -> Array:
            assert pages is not None
            return jnp.abs(pages[...].astype(jnp.float32)).max((0, 1, 3)) / 127

        caches = [layer.self_attn.attention for layer in self.layers]
        return [(scale(cache.k_pages), scale(cache.v_pages)) for cache in caches]

    def hidden(self, tokens: Array, step: StepMetadata | None = None, rngs: nnx.Rngs | None = None) -> Array:
        """`[..., T]` token ids to normalised hidden states `[..., T, D]`. See `__call__`."""
        x = self.embed_tokens(tokens)
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        for layer in self.layers:
            x = layer(x, step, rngs)
        return self.norm(x)

    def logits(self, hidden: Array) -> Array:
        """`[..., D]` to float32 `[..., vocab]`."""
        out = self.embed_tokens.attend(hidden) if self.lm_head is None else self.lm_head(hidden)
        out = out.astype(jnp.float32)
        cap = self.config.logit_soft_cap
        return out if cap is None else cap * jnp.tanh(out / cap)

    def __call__(self, tokens: Array, step: StepMetadata | None = None, rngs: nnx.Rngs | None = None) -> Array:
        """Logits, float32 `[..., T, vocab]`.

        Args:
          tokens: int32 `[T]`, the tokens of a step over the cache; or `[..., T]`, whole sequences, without one.
          step: see `StepMetadata`; None reads and writes no cache.
          rngs: for dropout, in training; None drops nothing.
        """
        return self.logits(self.hidden(tokens, step, rngs))


class _Block(nnx.Module):
    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        precision: Precision,
        dropout: float,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        window = None if config.sliding_windows is None else config.sliding_windows[layer]
        is_local = window is not None and config.local_rope_theta is not None
        self.input_layernorm = _norm(config, precision, rngs)
        self.self_attn = PagedSelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            use_bias=config.attention_bias,
            qk_norm=(lambda size: _norm(config, precision, rngs, size)) if config.qk_norm else None,
            sliding_window=window,
            scale=config.attention_scale,
            soft_cap=config.attention_soft_cap,
            sinks=config.sinks,
            rope_theta=config.local_rope_theta if is_local else config.rope_theta,
            rope_scaling=None if is_local else config.rope_scaling,
            rotary_dim=config.rotary_dim,
            implementation=implementation,
            dtype=precision.dtype,
            param_dtype=precision.param_dtype,
            rngs=rngs,
        )
        self.post_attention_layernorm = _norm(config, precision, rngs)
        self.pre_feedforward_layernorm = self.post_feedforward_layernorm = nnx.data(None)
        if config.sandwich_norms:
            self.pre_feedforward_layernorm = _norm(config, precision, rngs)
            self.post_feedforward_layernorm = _norm(config, precision, rngs)
        sizes: dict[str, Any] = {"size": config.hidden_size, "precision": precision, "rngs": rngs}
        if config.experts is None or layer in config.dense_layers:
            bias, inner = config.mlp_bias, config.intermediate_size
            self.mlp = GatedMlp(inner, activation=config.hidden_act, use_bias=bias, **sizes)
        elif config.swiglu_limit is None:
            self.mlp = ExpertsMlp(config.experts, activation=config.hidden_act, **sizes)
        else:
            self.mlp = ClampedExpertsMlp(config.experts, limit=config.swiglu_limit, **sizes)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Array, step: StepMetadata | None, rngs: nnx.Rngs | None) -> Array:
        def drop(y: Array) -> Array:
            return self.dropout(y, deterministic=rngs is None, rngs=rngs)

        attended = self.self_attn(self.input_layernorm(x), step)
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x = x + drop(attended)
            return x + drop(self.mlp(self.post_attention_layernorm(x)))
        x = x + drop(self.post_attention_layernorm(attended))
        return x + drop(self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))


class _OffsetNorm(nnx.Module):
    """RMSNorm whose weights are added to 1, in float32, so that weights near 0 keep their precision in bf16."""

    def __init__(self, size: int, epsilon: float, precision: Precision):
        self.scale = nnx.Param(jnp.zeros(size, precision.param_dtype))
        self.epsilon = epsilon
        self.dtype = precision.dtype

    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * (1.0 + self.scale[...].astype(jnp.float32))).astype(self.dtype)


def _split_axes(path: tuple[Any, ...], ndim: int) -> list[bool]:
    """Which axes of a parameter tensor parallelism splits."""
    module, leaf = path[-2:]
    # Axes from the last one: columns of a layer by itself, heads or inner columns of one that is joined.
    from_end = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "gate_proj": 1, "up_proj": 1, "lm_head": 1}
    from_end |= {"qkv_proj": 3, "gate_up_proj": 1}
    if module in ("o_proj", "down_proj"):
        return [leaf == "kernel" and axis == 0 for axis in range(ndim)]
    return [module in from_end and axis == ndim - from_end[module] for axis in range(ndim)]


def _norm(
    config: LlamaConfig, precision: Precision, rngs: nnx.Rngs, size: int | None = None
) -> nnx.RMSNorm | _OffsetNorm:
    size = config.hidden_size if size is None else size
    if config.norm_offset:
        return _OffsetNorm(size, config.rms_norm_eps, precision)
    return nnx.RMSNorm(
        size,
        epsilon=config.rms_norm_eps,
        dtype=precision.dtype,
        param_dtype=precision.param_dtype,
        rngs=rngs,
    )
