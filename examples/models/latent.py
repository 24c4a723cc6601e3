"""Multi-head latent attention (DeepSeek-AI 2024): all heads share one latent per token, which alone is cached.

A head's keys and values are products of the latent, and a part of the key that all heads share is rotated. Over the
cache the products change sides: that of keys goes to the queries, that of values behind attention. Then the cache is
one pool of one key/value head, whose keys are latents beside rotated parts, and whose values are the latents in them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_paged_attn import ragged_paged_attention
from jax_paged_attn.nnx import PagedAttention, StepMetadata
from jax_paged_attn.rope import apply_rope, rope_frequencies

from .decoder import Block, DecoderConfig
from .layers import Build, Latent, rms_norm

# That of both norms of latents, whatever the model's other norms have.
_EPSILON = 1e-6


class LatentAttention(nnx.Module):
    """Projections, rotary embeddings and a paged cache of `rank + rotary_dim` numbers per token.

    Over the cache attention is absorbed. A row and a key then cost `2 · rank + rotary_dim` multiplications per head:
    1088 in DeepSeek V3, against 320 of the plain form. So sequences that have all their tokens in the step, as prompts
    have, take the plain form there, and so do whole sequences without a step.
    """

    split_axes: ClassVar = {"q_b_proj.kernel": -1, "kv_b_proj.kernel": -1, "key_up": 0, "value_up": 0}

    def __init__(self, config: DecoderConfig, sizes: Latent, build: Build):
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.sizes, self.num_heads = sizes, heads
        head_dim = sizes.unrotated_dim + sizes.rotary_dim
        if sizes.query_rank is None:
            self.q_proj = build.linear(hidden, heads * head_dim)
        else:
            self.q_a_proj = build.linear(hidden, sizes.query_rank, bool(config.attention_bias))
            self.q_a_layernorm = rms_norm(sizes.query_rank, _EPSILON, build)
            self.q_b_proj = build.linear(sizes.query_rank, heads * head_dim)
        self.kv_a_proj_with_mqa = build.linear(hidden, sizes.rank + sizes.rotary_dim, bool(config.attention_bias))
        self.kv_a_layernorm = rms_norm(sizes.rank, _EPSILON, build)
        self.kv_b_proj = build.linear(sizes.rank, heads * (sizes.unrotated_dim + sizes.value_dim))
        self.key_up: nnx.Param | None = nnx.data(None)  # `[N, unrotated_dim, rank]`
        self.value_up: nnx.Param | None = nnx.data(None)  # `[N, rank, value_dim]`
        self.o_proj = build.linear(heads * sizes.value_dim, hidden, bool(config.attention_bias))
        scaling = config.rope_scaling
        self.frequencies = tuple(rope_frequencies(sizes.rotary_dim, config.rope_theta, scaling).tolist())
        self.rotation_factor = 1.0 if scaling is None else scaling.rotation_factor
        self.scale = config.attention_scale or head_dim**-0.5
        self.implementation = build.implementation
        self.attention = PagedAttention(
            heads,
            1,
            sizes.rank + sizes.rotary_dim,
            value_dim=sizes.rank,
            values_in_keys=True,
            scale=self.scale,
            rope_theta=None,
            implementation=self.implementation,
        )

    def fuse_projections(self) -> None:
        """Parts `kv_b_proj` into what queries and what results are multiplied by, if it is not yet: for serving."""
        if self.key_up is None:
            key_up, value_up = self._ups()
            self.key_up, self.value_up = nnx.Param(key_up), nnx.Param(value_up)
            del self.kv_b_proj

    def init_cache(self, num_pages: int, page_size: int, dtype: Any, **scales: Any) -> None:
        """See `PagedAttention.init_cache`."""
        self.attention.init_cache(num_pages, page_size, dtype, **scales)

    def __call__(self, x: Array, step: StepMetadata | None = None) -> Array:
        """`[T, D]` tokens of a step, or `[..., T, D]` whole sequences without one; returns as `x`."""
        sizes = self.sizes
        positions = jnp.arange(x.shape[-2], dtype=jnp.int32) if step is None else jnp.asarray(step.positions)
        projected = self.q_proj(x) if sizes.query_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = projected.reshape(*x.shape[:-1], self.num_heads, -1)
        q, rotated_q = q[..., : sizes.unrotated_dim], self._rotated(q[..., sizes.unrotated_dim :], positions)
        both = self.kv_a_proj_with_mqa(x)[..., None, :]
        latent = self.kv_a_layernorm(both[..., : sizes.rank])
        rotated_k = self._rotated(both[..., sizes.rank :], positions)
        parts = (q, rotated_q), (latent, rotated_k)
        out = self._whole(*parts) if step is None else self._over_cache(*parts, step)
        return self.o_proj(out.reshape(*x.shape[:-1], -1))

    def _over_cache(self, q: tuple[Array, Array], k: tuple[Array, Array], step: StepMetadata) -> Array:
        """Attention `[T, N, value_dim]` of a step, from the two parts of queries and of what is cached."""
        if step.cu_q_lens is None:
            return self._absorbed(q, k, step)
        kv_lens, cu_q_lens = jnp.asarray(step.kv_lens), jnp.asarray(step.cu_q_lens)
        whole = kv_lens == jnp.diff(cu_q_lens)
        # Rows of a sequence without keys are zeros: so each row has its result in one of the two.
        absorbed = self._absorbed(q, k, dataclasses.replace(step, kv_lens=jnp.where(whole, 0, kv_lens)))
        return absorbed + self._prompts(q, k, jnp.where(whole, kv_lens, 0), cu_q_lens, step.num_seqs)

    def _absorbed(self, q: tuple[Array, Array], k: tuple[Array, Array], step: StepMetadata) -> Array:
        """Attention `[T, N, value_dim]` over the cache, from the two parts of queries and of what is cached."""
        key_up, value_up = (weights.astype(q[0].dtype) for weights in self._ups())
        absorbed = jnp.einsum("tnd,ndr->tnr", q[0], key_up)
        queries, keys = jnp.concatenate([absorbed, q[1]], axis=-1), jnp.concatenate(k, axis=-1)
        return jnp.einsum("tnr,nrv->tnv", self.attention(queries, keys, None, step), value_up)

    def _prompts(
        self, q: tuple[Array, Array], k: tuple[Array, Array], kv_lens: Array, cu_q_lens: Array, num_seqs: Any
    ) -> Array:
        """Attention `[T, N, value_dim]` of a step's own tokens: they are pages of one token each."""
        keys, values = self._keys_and_values(q, k)
        tables = cu_q_lens[:-1, None] + jnp.arange(len(keys), dtype=jnp.int32)
        options: Any = {"scale": self.scale, "implementation": self.implementation}
        queries, pools = jnp.concatenate(q, axis=-1), (keys[:, None], values[:, None])
        return ragged_paged_attention(queries, *pools, kv_lens, tables, cu_q_lens, num_seqs, **options)

    def _whole(self, q: tuple[Array, Array], k: tuple[Array, Array]) -> Array:
        """Attention `[..., T, N, value_dim]` of whole sequences."""
        keys, values = self._keys_and_values(q, k)
        heads, options = (self.num_heads, self.num_heads, keys.shape[-1]), {"scale": self.scale, "rope_theta": None}
        attention = PagedAttention(*heads, value_dim=self.sizes.value_dim, **options)  # it has no weights
        return attention(jnp.concatenate(q, axis=-1), keys, values)

    def _keys_and_values(self, q: tuple[Array, Array], k: tuple[Array, Array]) -> tuple[Array, Array]:
        """Those of all heads, for the plain form: `[..., T, N, H]` of queries, and `[..., T, N, value_dim]`."""
        key_up, value_up = (weights.astype(q[0].dtype) for weights in self._ups())
        latent, rotated = k[0][..., 0, :], jnp.broadcast_to(k[1], q[1].shape)
        keys = jnp.concatenate([jnp.einsum("...r,ndr->...nd", latent, key_up), rotated], axis=-1)
        return keys, jnp.einsum("...r,nrv->...nv", latent, value_up)

    def _ups(self) -> tuple[Array, Array]:
        """The weights from a latent to keys, `[N, unrotated_dim, rank]`, and to values, `[N, rank, value_dim]`."""
        if self.key_up is not None and self.value_up is not None:
            return self.key_up[...], self.value_up[...]
        by_head = self.kv_b_proj.kernel[...].reshape(self.sizes.rank, self.num_heads, -1)
        keys, values = by_head[..., : self.sizes.unrotated_dim], by_head[..., self.sizes.unrotated_dim :]
        return keys.transpose(1, 2, 0), values.transpose(1, 0, 2)

    def _rotated(self, x: Array, positions: Array) -> Array:
        options: Any = {"interleaved": self.sizes.interleaved, "factor": self.rotation_factor}
        return apply_rope(x, positions, jnp.asarray(self.frequencies, jnp.float32), **options)


class LatentBlock(Block):
    """A block with multi-head latent attention."""

    def attention(self, config: DecoderConfig, layer: int, build: Build) -> LatentAttention:
        """See `Block.attention`."""
        if config.latent is None:
            raise ValueError("latent: expected sizes of multi-head latent attention, got None")
        return LatentAttention(config, config.latent, build)
