"""One decoder for all families, in Flax NNX: attention and MLPs between residual connections.

A family says by a `DecoderConfig` which options of attention it has, and which norm, block and experts of its own.
Every attention goes through `jax_paged_attn.nnx`: grouped-query attention through `PagedSelfAttention`, multi-head
latent attention through `PagedAttention`. Module and field names follow Hugging Face's, so that `checkpoint.py` is a
plain renaming.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_paged_attn.nnx import PagedSelfAttention, StepMetadata
from jax_paged_attn.rope import RopeScaling
from jax_paged_attn.serving import NnxModel

from .layers import Build, Experts, GatedMlp, Latent, Norm, rms_norm

Step = StepMetadata | tuple[StepMetadata, ...] | None


class Block(nnx.Module):
    """Attention and MLP: each sees its input normalised, and its result is added to that input."""

    split_axes: ClassVar = {
        **dict.fromkeys([f"self_attn.{name}_proj.{leaf}" for name in "qkv" for leaf in ("kernel", "bias")], -1),
        **dict.fromkeys(("self_attn.qkv_proj.kernel", "self_attn.qkv_proj.bias"), -3),
        "self_attn.o_proj.kernel": 0,
    }

    def __init__(self, config: DecoderConfig, layer: int, build: Build):
        size, epsilon = config.hidden_size, config.rms_norm_eps
        self.group = config.windows.index(config.window(layer))
        self.input_layernorm = config.norm(size, epsilon, build)
        self.self_attn = self.attention(config, layer, build)
        self.post_attention_layernorm = config.norm(size, epsilon, build)
        if config.experts is None or layer in config.dense_layers:
            options: Any = {"activation": config.hidden_act, "use_bias": config.mlp_bias}
            self.mlp = GatedMlp(size, config.inner_size(layer), build, **options)
        else:
            self.mlp = config.experts.mlp(size, build, config.hidden_act)
        self.dropout = nnx.Dropout(build.dropout)

    def __call__(self, x: Array, step: StepMetadata | None, rngs: nnx.Rngs | None) -> Array:
        """`[..., T, D]` to the same. See `Decoder.__call__`."""
        x = x + self.dropped(self.self_attn(self.input_layernorm(x), step), rngs)
        return x + self.dropped(self.mlp(self.post_attention_layernorm(x)), rngs)

    def fuse(self) -> None:
        """See `Decoder.fuse`."""
        self.self_attn.fuse_projections()
        self.mlp.fuse()

    def dropped(self, y: Array, rngs: nnx.Rngs | None) -> Array:
        """What is added to the input, after dropout."""
        return self.dropout(y, deterministic=rngs is None, rngs=rngs)

    def attention(self, config: DecoderConfig, layer: int, build: Build) -> Any:
        """The module between the norm and the sum: called as `PagedSelfAttention`, with a `PagedAttention` in it."""
        window = config.window(layer)
        is_local = window is not None and config.local_rope_theta is not None
        rope_theta = config.local_rope_theta if is_local else config.rope_theta
        return PagedSelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            use_bias=config.attention_bias,
            qk_norm=(lambda head_dim: config.norm(head_dim, config.rms_norm_eps, build)) if config.qk_norm else None,
            sliding_window=window,
            scale=config.attention_scale,
            soft_cap=config.attention_soft_cap,
            sinks=config.sinks,
            rope_theta=None if layer in config.unrotated_layers else rope_theta,
            rope_scaling=None if is_local else config.rope_scaling,
            rotary_dim=config.rotary_dim,
            implementation=build.implementation,
            dtype=build.dtype,
            param_dtype=build.param_dtype,
            rngs=build.rngs,
        )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options, named as in Hugging Face's config.json where that has the field. The defaults are a Llama's.

    Attributes:
      attention_bias: True for biases of all four projections, or the names of those that have one.
      qk_norm: whether each head of q and k is normalised before its rotation.
      sliding_windows: the most keys that a row sees, for each layer; a layer without a window has None.
        None in place of the tuple means that no layer has one.
      rotary_dim: the first columns of a head that are rotated; None for all.
      unrotated_layers: layers without rotary embeddings.
      local_rope_theta: the rotary base of layers with a window, which then have no scaling; None for `rope_theta`.
      latent: sizes of multi-head latent attention; None for grouped-query attention.
      experts: None where all layers have a plain MLP.
      dense_layers: layers with a plain MLP in spite of that.
      sinks: whether each head has a learnt logit without a value.
      hidden_act: of the MLP: "silu" or "gelu_tanh".
      norm: makes every norm.
      block: attention, MLP, and the norms around them.
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
    unrotated_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    latent: Latent | None = None
    experts: Experts | None = None
    dense_layers: tuple[int, ...] = ()
    sinks: bool = False
    hidden_act: str = "silu"
    norm: Norm = rms_norm
    block: type[Block] = Block
    embedding_scale: float | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The windows of the layer groups, each once."""
        return tuple(dict.fromkeys(self.sliding_windows or (None,)))

    def window(self, layer: int) -> int | None:
        """That of a layer."""
        return None if self.sliding_windows is None else self.sliding_windows[layer]

    def inner_size(self, layer: int) -> int:
        """The inner columns of a layer's plain MLP."""
        return self.intermediate_size

    def split_sizes(self) -> dict[str, int]:
        """What tensor parallelism splits, by name: the number of devices has to divide each."""
        if self.latent is None:
            sizes = {"num_key_value_heads": self.num_key_value_heads}
        else:
            sizes = {"num_attention_heads": self.num_attention_heads}
        if self.experts is None or self.dense_layers:
            sizes["intermediate_size"] = self.intermediate_size
        if self.experts is not None:
            sizes["experts.size"] = self.experts.size
        return sizes


class Decoder(nnx.Module):
    """Tokens to next-token logits.

    Args:
      config: sizes and options.
      dtype, param_dtype: of the computation and of the weights.
      dropout: rate on the embeddings and on what each block adds, in training only.
      implementation: engine that every attention runs on; None for the best one.
    """

    split_axes: ClassVar = {"embed_tokens.embedding": 0, "lm_head.kernel": -1}

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        dropout: float = 0.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        build = Build(dtype, param_dtype, rngs, dropout, implementation)
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List([config.block(config, layer, build) for layer in range(config.num_hidden_layers)])
        self.norm = config.norm(config.hidden_size, config.rms_norm_eps, build)
        self.dropout = nnx.Dropout(dropout)
        self._placed: tuple[Mesh, str] | None = None
        self.add_modules(build)
        self.lm_head = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = build.linear(config.hidden_size, config.vocab_size)

    def add_modules(self, build: Build) -> None:
        """Makes what only some families have around the blocks; here nothing."""

    def init_cache(
        self,
        num_pages: int | tuple[int, ...],
        page_size: int,
        dtype: DTypeLike | None = None,
        scales: Sequence[Mapping[str, ArrayLike]] | None = None,
    ) -> None:
        """Gives every layer an empty cache, but for those that see another layer's.

        Args:
          num_pages, page_size: pages of every layer, or of those of each layer group; and tokens per page.
          dtype: of the pages, by default that of the computation.
          scales: keywords of each layer's `init_cache`, as `jax_paged_attn.nnx.calibrate` returns them.

        Raises:
          ValueError: as many scales as layers with a cache are expected; see also `PagedAttention.init_cache`.
        """
        layers = [layer for layer in self.layers if layer.self_attn.attention is not None]
        if scales is not None and len(scales) != len(layers):
            raise ValueError(f"scales: expected those of {len(layers)} layers, got {len(scales)}")
        dtype = self.dtype if dtype is None else dtype
        for index, layer in enumerate(layers):
            pages_of_layer = of_group(num_pages, layer.group)
            layer.self_attn.init_cache(pages_of_layer, page_size, dtype, **(scales[index] if scales else {}))
            for pages in (layer.self_attn.attention.k_pages, layer.self_attn.attention.v_pages):
                if pages is not None and self._placed is not None:
                    mesh, axis = self._placed
                    by_head = None if self.config.latent is not None else axis  # a latent is that of all heads
                    pages.set_value(jax.device_put(pages[...], NamedSharding(mesh, PartitionSpec(None, None, by_head))))

    def fuse(self) -> None:
        """Joins products that share their input, q with k and v, gate with up: for serving, not to be saved."""
        for layer in self.layers:
            layer.fuse()
        if self._placed is not None:
            self.shard(*self._placed)

    def shardings(self, mesh: Mesh, axis: str) -> dict[tuple[Any, ...], NamedSharding]:
        """Where `shard` places each weight, by its path in the model; the weights may be abstract."""
        if axis not in mesh.shape or mesh.axis_types[mesh.axis_names.index(axis)] != AxisType.Auto:
            raise ValueError(f"axis: expected an Auto axis of the mesh, got {axis!r} of {mesh}")
        ways = mesh.shape[axis]
        for name, number in self.config.split_sizes().items():
            if number % ways:
                raise ValueError(f"axis: expected a size that divides {name} = {number}, got {ways}")

        def sharding(path: tuple[Any, ...], variable: nnx.Variable) -> NamedSharding:
            spec: list[str | None] = [None] * len(variable.shape)
            split = _split_axis(self, path)
            if split is not None and variable.shape[split] % ways == 0:  # a vocabulary may be no multiple
                spec[split] = axis
            return NamedSharding(mesh, PartitionSpec(*spec))

        return {path: sharding(path, variable) for path, variable in nnx.to_flat_state(nnx.state(self, nnx.Param))}

    def shard(self, mesh: Mesh, axis: str) -> None:
        """Places the weights for tensor parallelism over an Auto axis of a mesh, and later the caches of `init_cache`.

        Heads, the inner columns of MLPs and of all experts, and the vocabulary are split. Attention and MLP each end in
        one sum over devices. A vocabulary that is no multiple of the axis' size is on all devices.

        Raises:
          ValueError: the heads of keys and values, or the inner columns, are no multiple of the axis' size, or the mesh
            has no such Auto axis.
        """
        shardings = self.shardings(mesh, axis)
        for path, variable in nnx.iter_graph(self):  # one at a time, so that no more than one is there twice
            if isinstance(variable, nnx.Param):
                variable.set_value(jax.device_put(variable[...], shardings[path]))
        self._placed = mesh, axis

    def served(
        self, cache_dtype: DTypeLike | None = None, scales: Sequence[Mapping[str, ArrayLike]] | None = None
    ) -> NnxModel:
        """The model as `jax_paged_attn.serving.Engine` takes it; see `init_cache` for the arguments."""
        return NnxModel(
            self,
            vocab_size=self.config.vocab_size,
            max_len=self.config.max_position_embeddings,
            windows=self.config.windows,
            init_cache=lambda twin, *pool: twin.init_cache(*pool, cache_dtype, scales),
        )

    def hidden(self, tokens: Array, step: Step = None, rngs: nnx.Rngs | None = None) -> Array:
        """`[..., T]` token ids to normalised hidden states `[..., T, D]`. See `__call__`."""
        x = self.embedded(tokens, rngs)
        for layer in self.layers:
            x = layer(x, of_group(step, layer.group), rngs)
        return self.norm(x)

    def embedded(self, tokens: Array, rngs: nnx.Rngs | None) -> Array:
        """What the first layer sees, `[..., T, D]`."""
        x = self.embed_tokens(tokens)
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return self.dropout(x, deterministic=rngs is None, rngs=rngs)

    def logits(self, hidden: Array) -> Array:
        """`[..., D]` to float32 `[..., vocab]`."""
        out = self.embed_tokens.attend(hidden) if self.lm_head is None else self.lm_head(hidden)
        out = out.astype(jnp.float32)
        cap = self.config.logit_soft_cap
        return out if cap is None else cap * jnp.tanh(out / cap)

    def __call__(self, tokens: Array, step: Step = None, rngs: nnx.Rngs | None = None) -> Array:
        """Logits, float32 `[..., T, vocab]`.

        Args:
          tokens: int32 `[T]`, the tokens of a step over the cache; or `[..., T]`, whole sequences, without one.
          step: see `StepMetadata`; one for all layers or, as the engine has it, one for each layer group. None reads
            and writes no cache.
          rngs: for dropout, in training; None drops nothing.
        """
        return self.logits(self.hidden(tokens, step, rngs))


def of_group(values: Any, group: int) -> Any:
    """What the layers of a group get: their own, if there is one for each group."""
    return values[group] if isinstance(values, tuple) else values


def _split_axis(module: Any, path: tuple[Any, ...]) -> int | None:
    """The axis of a parameter that tensor parallelism splits, as the `split_axes` of the modules around it say."""
    for depth, name in enumerate(path):
        axes = getattr(module, "split_axes", {})
        if (rest := ".".join(map(str, path[depth:]))) in axes:
            return axes[rest]
        module = module[name] if isinstance(name, int) else getattr(module, name)
    return None
