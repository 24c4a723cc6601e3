"""Flax NNX: an attention layer whose key/value cache is `nnx` state.

Needs the extra `flax`. `PagedSelfAttention` is a whole layer; `PagedAttention` is the part between the projections, for
models that have projections of their own. Either takes the tokens of all sequences of a step in one row, and a
`StepMetadata` that says whose they are::

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = PagedSelfAttention(hidden_size=512, num_heads=8, num_kv_heads=2, head_dim=64, rngs=rngs)
            self.attention.init_cache(num_pages=1024, page_size=16, dtype=jnp.bfloat16)

        def __call__(self, x, step):
            return x + self.attention(x, step)

The pages are `CacheVariable`s, so a step can take them apart from the weights and donate them::

    graphdef, cache, weights = nnx.split(model, CacheVariable, ...)

    @partial(jax.jit, donate_argnums=0)
    def run(cache, weights, x, step):
        model = nnx.merge(graphdef, cache, weights)
        y = model(x, step)
        return y, nnx.state(model, CacheVariable)
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Unpack, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_paged_attn import PagedKVCache, StepMetadata, _checks, _modes, _options
from jax_paged_attn._cache import scales_from_largest
from jax_paged_attn.rope import ROPE_THETA, Llama3RopeScaling, RopeScaling, apply_rope, rope_frequencies

__all__ = [
    "CacheVariable",
    "FusedLinear",
    "Llama3RopeScaling",
    "PagedAttention",
    "PagedSelfAttention",
    "StepMetadata",
    "apply_rope",
    "calibrate",
    "rope_frequencies",
]


class CacheVariable(nnx.Variable):
    """Key or value pages of one layer, `[P, S, K, H or Hv]`: changed by every step, unlike the weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_paged_attn.nnx import CacheVariable, PagedAttention
      >>> layer = PagedAttention(num_heads=2, num_kv_heads=1, head_dim=8)
      >>> layer.init_cache(num_pages=3, page_size=4, dtype=jnp.float32)
      >>> [x.shape for x in nnx.to_flat_state(nnx.state(layer, CacheVariable)).leaves]
      [(3, 4, 1, 8), (3, 4, 1, 8)]
    """


@functools.partial(_modes.compiled, static_argnums=(3, 4, 5, 6))
def _rotated_heads(
    q: Array,
    k: Array,
    positions: Array,
    columns: int,
    theta: float,
    scaling: RopeScaling | None,
    interleaved: bool,
) -> tuple[Array, Array]:
    """Queries and keys, rotated; the frequencies are constants of the compiled function."""
    frequencies = rope_frequencies(columns, theta, scaling)
    options: Any = {"interleaved": interleaved, "factor": 1.0 if scaling is None else scaling.rotation_factor}
    return apply_rope(q, positions, frequencies, **options), apply_rope(k, positions, frequencies, **options)


class PagedAttention(nnx.Module):
    """Rotates queries and keys, writes keys and values to the cache, and attends. It has no weights but optional sinks.

    Args:
      num_heads, num_kv_heads, head_dim: N, K, H.
      rope_theta: base of the rotary frequencies; None for no rotation.
      rope_scaling: stretches the frequencies to longer contexts, see `jax_paged_attn.rope`.
      rotary_dim: the first columns of a head that are rotated; None for all.
      rope_interleaved: True rotates columns (2i, 2i + 1), as GPT-J, in place of (i, i + rotary_dim / 2), as Llama.
      sinks: True gives each head a learnt sink logit, an `nnx.Param` `[N]` float32, initially 0.
      value_dim: Hv, the head dim of values; None for H.
      values_in_keys: the values are the first Hv ≤ H numbers of each rotated key, as in multi-head latent attention:
        the cache has one pool, and no `v_scale`.
      options: the other keywords are those of `jax_paged_attn.ragged_paged_attention`, kept as attributes of the layer.
        `implementation` and `batch_invariant` are for calls with a step.

    Raises:
      ValueError: a size below 1, N is no multiple of K, values in keys that are shorter, a window below 1, a cap that
        is not positive, a number that is not finite, or what `rope_frequencies` refuses.
      TypeError: a size or window that is no integer, or what is no number or no bool.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.nnx import PagedAttention, StepMetadata
      >>> layer = PagedAttention(num_heads=2, num_kv_heads=1, head_dim=8, sliding_window=4)
      >>> layer.init_cache(num_pages=2, page_size=4, dtype=jnp.float32)
      >>> step = StepMetadata.whole_sequences(num_seqs=1, length=6, page_size=4)
      >>> layer(jnp.ones((6, 2, 8)), jnp.ones((6, 1, 8)), jnp.ones((6, 1, 8)), step).shape
      (6, 2, 8)
    """

    @_options.keywords(_options.LayerOptions)
    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rope_theta: float | None = ROPE_THETA,
        rope_scaling: RopeScaling | None = None,
        rotary_dim: int | None = None,
        rope_interleaved: bool = False,
        sinks: bool = False,
        value_dim: int | None = None,
        values_in_keys: bool = False,
        **options: Unpack[_options.LayerOptions],
    ):
        for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
            _checks.static_count(name, count)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads: expected a multiple of num_kv_heads = {num_kv_heads}, got {num_heads}")
        _checks.static_bool("sinks", sinks)
        _options.Scoring.checked(options, head_dim)
        _options.engine_choice(options)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_dim = head_dim if value_dim is None else _checks.static_count("value_dim", value_dim)
        self.values_in_keys = _checks.static_bool("values_in_keys", values_in_keys)
        if values_in_keys and self.value_dim > head_dim:
            raise ValueError(f"value_dim: expected at most head_dim = {head_dim} of values in keys, got {value_dim}")
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.rotary_dim = head_dim if rotary_dim is None else _checks.static_count("rotary_dim", rotary_dim)
        self.rope_interleaved = _checks.static_bool("rope_interleaved", rope_interleaved)
        if self.rotary_dim > head_dim:
            raise ValueError(f"rotary_dim: expected at most head_dim = {head_dim}, got {rotary_dim}")
        if rope_theta is not None:
            rope_frequencies(self.rotary_dim, rope_theta, rope_scaling)
        for name, value in options.items():  # such as `self.scale`
            setattr(self, name, value)
        self.sinks = nnx.data(nnx.Param(_modes.zeros((num_heads,), jnp.float32)) if sinks else None)
        self.k_pages: CacheVariable | None = nnx.data(None)
        self.v_pages: CacheVariable | None = nnx.data(None)
        self.k_scale: nnx.Variable | None = nnx.data(None)
        self.v_scale: nnx.Variable | None = nnx.data(None)
        # `[2, K]`, or `[1, K]` without pages of values; `calibrate` has one in its twin of the model.
        self._largest: nnx.Variable | None = nnx.data(None)

    def init_cache(
        self,
        num_pages: int,
        page_size: int,
        dtype: DTypeLike,
        *,
        k_scale: ArrayLike | None = None,
        v_scale: ArrayLike | None = None,
    ) -> None:
        """Gives the layer an empty cache in place of any it had: keys and values `[num_pages, page_size, K, H or Hv]`.

        Args:
          dtype: that of the queries, or float8_e4m3fn, float8_e5m2, int8.
          k_scale, v_scale: positive, finite float32, scalar or `[K]`: value = stored · scale. Required for int8.
            Values in keys have the scale of these.

        Raises:
          ValueError: no pages, no tokens per page, a dtype that pages cannot have, an int8 cache without scales, a
            `v_scale` of values in keys, or scales that are zero, negative or not finite.
          TypeError: sizes that are no integers.
        """
        sizes = num_pages, page_size, self.num_kv_heads, self.head_dim
        values: Any = {"value_dim": self.value_dim, "values_in_keys": self.values_in_keys}
        cache = PagedKVCache.create(1, *sizes, dtype, k_scale=k_scale, v_scale=v_scale, **values)
        self.k_pages = CacheVariable(cache.k_pages[0])
        self.v_pages = CacheVariable(cache.v_pages[0]) if cache.v_pages else None
        k_scale, v_scale = cache.scales(0)["k_scale"], cache.scales(0)["v_scale"]
        self.k_scale = None if k_scale is None else nnx.Variable(k_scale)
        self.v_scale = None if v_scale is None else nnx.Variable(v_scale)

    def __call__(
        self, q: Array, k: Array, v: Array | None, step: StepMetadata | None = None, *, writes: bool = True
    ) -> Array:
        """Attends causally, over the cache or, without a step, within each of a batch of whole sequences.

        Args:
          q: `[T, N, H]`, or `[..., T, N, H]` without a step; k: likewise with K heads; v: `[..., T, K, Hv]`, or None
            where the values are in the keys.
          step: whose tokens these are. None for training and scoring: no cache is read or written.
          writes: False where keys and values of the step are in the cache already, since another layer has written
            them: layers that share a cache call one `PagedAttention`, the first of them with True.

        Returns:
          `[..., T, N, Hv]`, dtype as `q`.

        Raises:
          ValueError: a step, but no cache; values beside keys that have them in, or no values.
        """
        if (v is None) != self.values_in_keys:
            expected = "None, since the values are in the keys" if self.values_in_keys else "an array"
            raise ValueError(f"v: expected {expected}, got {'None' if v is None else f'shape {v.shape}'}")
        positions = jnp.arange(q.shape[-3], dtype=jnp.int32) if step is None else step.positions
        if self.rope_theta is not None:
            rope = (self.rotary_dim, self.rope_theta, self.rope_scaling, self.rope_interleaved)
            q, k = _rotated_heads(q, k, jnp.asarray(positions), *rope)
        options: Any = {name: getattr(self, name) for name in get_type_hints(_options.LayerOptions)}
        sinks = None if self.sinks is None else self.sinks[...]
        if step is not None and self._largest is not None:
            self._largest.set_value(_largest_per_head(k, v, step.slot_mapping))
            step = None  # the one sequence of such a step is whole
        if step is None:
            values = k[..., : self.value_dim] if v is None else v
            return _attend_within(q, k, values, sinks, _options.Scoring.checked(options, self.head_dim))
        if self.k_pages is None:
            raise ValueError("step: expected a layer with a cache, but init_cache was never called")

        k_scale, v_scale = (None if scale is None else scale[...] for scale in (self.k_scale, self.v_scale))
        v_pools = () if self.v_pages is None else (self.v_pages[...],)
        value_dim = self.value_dim if self.values_in_keys else 0
        cache = PagedKVCache((self.k_pages[...],), v_pools, k_scale, v_scale, value_dim=value_dim)
        if writes:
            cache = cache.write(0, k, v, step.slot_mapping)
            self.k_pages.set_value(cache.k_pages[0])
            if self.v_pages is not None:
                self.v_pages.set_value(cache.v_pages[0])
        return cache.attend_step(0, q, step, sinks=sinks, **options)


@functools.partial(_modes.compiled, static_argnames="scoring")
def _attend_within(q: Array, k: Array, v: Array, sinks: Array | None, scoring: _options.Scoring) -> Array:
    """Causal attention of whole sequences, q `[..., T, N, H]`, k `[..., T, K, H]`, v `[..., T, K, Hv]`, within each.

    A block of queries at a time, which leaves out the keys that none of them sees; the queries of a group are rows of
    one product. The scores of a block are kept for the backward pass.
    """
    length, num_heads, head_dim = q.shape[-3:]
    kv_heads = k.shape[-2]
    positions = jnp.arange(length, dtype=jnp.int32)
    grouped = q.reshape(*q.shape[:-2], kv_heads, num_heads // kv_heads, head_dim)
    block = max(128, math.ceil(length / 8))
    outs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = int(scoring.first_key(np.int64(start)))
        visible = scoring.sees(positions[start:stop, None], positions[None, first:stop])
        products = jnp.einsum(
            "...qkgh,...skh->...kgqs",
            grouped[..., start:stop, :, :, :],
            k[..., first:stop, :, :],
            preferred_element_type=jnp.float32,
        )
        scores, _ = scoring.scores(products)
        scores = jnp.where(visible.reshape(*[1] * (scores.ndim - 2), *visible.shape), scores, -jnp.inf)
        if sinks is not None:
            sink = jnp.broadcast_to(sinks.reshape(kv_heads, -1, 1, 1), (*scores.shape[:-1], 1))
            scores = jnp.concatenate([scores, sink], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., : stop - first].astype(v.dtype)
        outs.append(jnp.einsum("...kgqs,...skh->...qkgh", weights, v[..., first:stop, :, :]))
    return jnp.concatenate(outs, axis=-4).reshape(*q.shape[:-1], v.shape[-1])


def _largest_per_head(k: Array, v: Array | None, slot_mapping: ArrayLike) -> Array:
    """The largest magnitudes among keys and, if there are any, values of the tokens that have a slot, `[2 or 1, K]`."""
    is_token = (jnp.asarray(slot_mapping) >= 0)[:, None, None]
    written = (k,) if v is None else (k, v)
    return jnp.stack([jnp.where(is_token, jnp.abs(x), 0).max((0, 2)).astype(jnp.float32) for x in written])


class _AttentionOptions(_options.LayerOptions, total=False):
    """The keywords of `PagedAttention` that a whole layer has."""

    rope_theta: float | None
    rope_scaling: RopeScaling | None
    rotary_dim: int | None
    rope_interleaved: bool
    sinks: bool


class PagedSelfAttention(nnx.Module):
    """Grouped-query self-attention with projections, rotary embeddings and a paged cache.

    It is tensor parallel where weights and pages are sharded by head, on meshes with Auto and with Explicit axes. The
    kernels of `q_proj`, `k_proj` and `v_proj` are sharded by column, that of `o_proj` by row, the pages by axis 2. See
    docs/sharding.md.

    Args:
      hidden_size: D, size of the tokens' vectors.
      num_heads, num_kv_heads, head_dim: N, K, H.
      use_bias: True gives every projection a bias; or the names of those that have one, of "q", "k", "v" and "o".
      qk_norm: makes a norm over the last axis from a head's size, such as ``lambda size: nnx.RMSNorm(size, rngs=r)``.
        The layer then normalises each head of q and k, before the rotation, by its `q_norm` and `k_norm`.
      dtype: of the computation; None for that of inputs and weights.
      param_dtype: of the weights.
      rngs: for the weights' initial values.
      options: the other keywords are those of `PagedAttention`.

    Raises:
      ValueError, TypeError: as `PagedAttention`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_paged_attn.nnx import PagedSelfAttention
      >>> layer = PagedSelfAttention(16, num_heads=2, num_kv_heads=1, head_dim=8, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((3, 5, 16))).shape  # training: three whole sequences, no cache
      (3, 5, 16)
    """

    @_options.keywords(_AttentionOptions, rope_theta=ROPE_THETA, rope_interleaved=False, sinks=False)
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        use_bias: bool | Collection[str] = False,
        qk_norm: Callable[[int], nnx.Module] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Unpack[_AttentionOptions],
    ):
        with_bias = _projections_with_bias(use_bias)

        def linear(name: str, inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs, outputs, use_bias=name in with_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.attention = PagedAttention(num_heads, num_kv_heads, head_dim, **options)
        self.q_proj = linear("q", hidden_size, num_heads * head_dim)
        self.k_proj = linear("k", hidden_size, num_kv_heads * head_dim)
        self.v_proj = linear("v", hidden_size, num_kv_heads * head_dim)
        self.o_proj = linear("o", num_heads * head_dim, hidden_size)
        self.q_norm, self.k_norm = (nnx.data(None if qk_norm is None else qk_norm(head_dim)) for _ in "qk")
        self.qkv_proj: FusedLinear | None = nnx.data(None)

    def fuse_projections(self) -> None:
        """Puts `q_proj`, `k_proj` and `v_proj` into one, `qkv_proj`, and gives the three up: for serving.

        One product reads the tokens once and fills the device better than three. The kernel `[D, K, N/K + 2, H]` has
        the query heads of each key/value head, then its key, then its value, so it can be sharded by axis 1.

        Raises:
          ValueError: the projections are on a mesh with explicit axes.
        """
        if self.qkv_proj is not None:
            return
        heads = self.attention.num_kv_heads, -1, self.attention.head_dim
        projections = self.q_proj, self.k_proj, self.v_proj
        self.qkv_proj = FusedLinear.of(projections, heads)
        del self.q_proj, self.k_proj, self.v_proj

    def init_cache(self, num_pages: int, page_size: int, dtype: DTypeLike, **scales: ArrayLike | None) -> None:
        """See `PagedAttention.init_cache`."""
        self.attention.init_cache(num_pages, page_size, dtype, **scales)

    def __call__(self, x: Array, step: StepMetadata | None = None) -> Array:
        """`[T, D]` tokens of a step, or `[..., T, D]` whole sequences without one; returns as `x`."""
        if self.qkv_proj is not None:
            fused = self.qkv_proj(x)
            q, k, v = fused[..., :-2, :], fused[..., -2, :], fused[..., -1, :]
            q = q.reshape(*x.shape[:-1], self.attention.num_heads, self.attention.head_dim)
        else:
            x = _on_mesh_of(self.q_proj.kernel[...], x)
            q, k, v = (self._heads(projection, x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = self.attention(q, k, v, step)
        return _project(self.o_proj, out.reshape(*out.shape[:-2], -1), _explicit(x, jax.typeof(x).sharding.spec))

    def _heads(self, projection: nnx.Linear, x: Array) -> Array:
        """`[..., T, heads, H]`; on a mesh with explicit axes all tokens of a sequence, by head as the weights are."""
        columns = _names(jax.typeof(projection.kernel[...]).sharding.spec[1])
        rows = [
            tuple(axis for axis in _names(entry) if axis not in columns) for entry in jax.typeof(x).sharding.spec[:-1]
        ]
        projected = _project(projection, x, _explicit(x, (*rows, columns)))
        shape = (*x.shape[:-1], projected.shape[-1] // self.attention.head_dim, self.attention.head_dim)
        heads = _splitting(columns, jax.typeof(x).sharding.mesh.shape, self.attention.num_kv_heads, shape[-2])
        return jax.lax.reshape(projected, shape, out_sharding=_explicit(x, (*rows[:-1], None, heads, None)))


class FusedLinear(nnx.Module):
    """Several linear layers of the same input as one product; made by `FusedLinear.of` for serving.

    Attributes:
      kernel: `[D, groups, n, size]`.
      bias: `[groups, n, size]`, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_paged_attn.nnx import FusedLinear
      >>> gate, up = (nnx.Linear(8, 6, rngs=nnx.Rngs(seed)) for seed in range(2))
      >>> fused = FusedLinear.of((gate, up), (1, 1, 6))
      >>> fused(jnp.ones((3, 8))).shape, fused.kernel.shape
      ((3, 1, 2, 6), (8, 1, 2, 6))
    """

    def __init__(self, kernel: Array, bias: Array | None, dtype: DTypeLike | None):
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.dtype = dtype

    @classmethod
    def of(cls, projections: Sequence[nnx.Linear], shape: tuple[int, int, int]) -> FusedLinear:
        """Joins layers whose outputs, reshaped to `shape`, follow each other along its second axis.

        Raises:
          ValueError: the layers are on a mesh with explicit axes.
        """
        kernels = [projection.kernel[...] for projection in projections]
        if AxisType.Explicit in jax.typeof(kernels[0]).sharding.mesh.axis_types:
            raise ValueError("projections: expected weights on no mesh or one with Auto axes, got Explicit axes")
        kernel = jnp.concatenate([x.reshape(len(x), *shape) for x in kernels], axis=2)
        bias = None
        if any(projection.bias is not None for projection in projections):
            zeros = [jnp.zeros(x.shape[1], x.dtype) for x in kernels]  # for those without
            biases = [z if p.bias is None else p.bias[...] for z, p in zip(zeros, projections, strict=True)]
            bias = jnp.concatenate([x.reshape(shape) for x in biases], axis=1)
        return cls(kernel, bias, projections[0].dtype)

    def __call__(self, x: Array) -> Array:
        """`[..., D]` to `[..., groups, n, size]`."""
        dtype = jnp.result_type(x, self.kernel[...]) if self.dtype is None else self.dtype
        out = jnp.einsum("...d,dgns->...gns", x.astype(dtype), self.kernel[...].astype(dtype))
        return out if self.bias is None else out + self.bias[...].astype(dtype)


def _projections_with_bias(use_bias: bool | Collection[str]) -> Collection[str]:
    """The names of the projections that have a bias, checked."""
    names = ("q", "k", "v", "o")
    if isinstance(use_bias, bool):
        return names if use_bias else ()
    if isinstance(use_bias, str) or not isinstance(use_bias, Collection) or not set(use_bias) <= set(names):
        raise ValueError(f"use_bias: expected True, False, or names of {names}, got {use_bias!r}")
    return use_bias


def _project(projection: nnx.Linear, x: Array, sharding: NamedSharding | None) -> Array:
    return projection(x) if sharding is None else projection(x, out_sharding=sharding)


def _on_mesh_of(weights: Array, x: Array) -> Array:
    """`x`, on all devices of the mesh with explicit axes that only the weights name; its gradient needs to know."""
    mesh = jax.typeof(weights).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types or not jax.typeof(x).sharding.mesh.empty:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def _explicit(x: Array, spec: Sequence[Any]) -> NamedSharding | None:
    """The sharding by `spec` on the mesh of `x`, if that has explicit axes; None where XLA is to find one."""
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return None
    return NamedSharding(mesh, PartitionSpec(*(_names(entry) or None for entry in spec)))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _splitting(axes: tuple[str, ...], sizes: Mapping[str, int], kv_heads: int, heads: int) -> tuple[str, ...]:
    """The longest prefix of mesh axes that splits heads between key/value heads, or beyond each of these its group."""
    ways = [math.prod(sizes[axis] for axis in axes[:n]) for n in range(len(axes) + 1)]
    fits = [kv_heads % way == 0 or (kv_heads in ways and heads % way == 0) for way in ways]
    return axes[: max(n for n, fit in enumerate(fits) if fit)]


def calibrate(
    model: nnx.Module, prompts: Sequence[ArrayLike | Sequence[int]], dtype: DTypeLike, *, margin: float = 1.1
) -> list[dict[str, Array]]:
    """Scales for an 8-bit cache of a model, by the largest key and the largest value of each head in some prompts.

    The largest magnitude, times the margin, becomes the largest number of the dtype. fp8 scales are then rounded up to
    a power of two, which costs no precision and leaves more room.

    The prompts run through the model in its own precision, one at a time and padded to the longest, so that they
    compile once. No cache is needed, and the model stays as it is. Keys are looked at after their rotation, as they
    will be stored.

    Args:
      model: has `PagedAttention` or `PagedSelfAttention` layers, and is called as ``model.hidden(tokens, step)`` or,
        without such a method, as ``model(tokens, step)``.
      prompts: token ids, `[T]` integers each; lengths may differ. A few of some hundred tokens will do, of the kind
        that the model is to serve.
      dtype: of the cache: float8_e4m3fn, float8_e5m2 or int8.
      margin: multiplies the largest magnitudes, as room for numbers beyond those of the prompts.

    Returns:
      For each layer a dict of `k_scale` and `v_scale`, float32 `[K]`: value = stored · scale. A head that is zero
      throughout has scale 1. Where values are in keys, there is no `v_scale`. Layers are in the order of their paths in
      the model, numbers in these by value.

    Raises:
      ValueError: no prompts, an empty one, ids that are not integers in one row, a dtype of other than 8 bits, a margin
        that is not positive, a model without layers, or keys or values that are NaN or infinite.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_paged_attn.nnx import PagedSelfAttention, calibrate
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.embed = nnx.Embed(32, 16, rngs=rngs)
      ...         self.layers = nnx.List([PagedSelfAttention(16, 4, 2, 8, rngs=rngs) for _ in range(3)])
      ...     def __call__(self, tokens, step=None):
      ...         x = self.embed(tokens)
      ...         for layer in self.layers:
      ...             x = x + layer(x, step)
      ...         return x
      >>> model = Model(nnx.Rngs(0))
      >>> scales = calibrate(model, [[1, 2, 3], [4, 5, 6, 7, 8]], jnp.int8)
      >>> for layer, of_layer in zip(model.layers, scales):
      ...     layer.init_cache(num_pages=4, page_size=4, dtype=jnp.int8, **of_layer)
      >>> scales[0]["k_scale"].shape
      (2,)

      `PagedKVCache.create` takes those of all layers at once, `[L, K]`:

      >>> import jax
      >>> import jax_paged_attn as jpa
      >>> stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *scales)
      >>> cache = jpa.PagedKVCache.create(3, 4, 4, num_kv_heads=2, head_dim=8, dtype=jnp.int8, **stacked)
      >>> cache.k_scale.shape
      (3, 2)
    """
    checked = [_prompt(f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)]
    if not checked:
        raise ValueError("prompts: expected at least one, got none")
    twin = nnx.merge(*nnx.split(model))
    layers = _attention_layers(twin)
    if not layers:
        raise ValueError(f"model: expected PagedAttention layers, got none in {type(model).__name__}")
    for layer in layers:
        layer.k_pages = layer.v_pages = layer.k_scale = layer.v_scale = None  # those of the model may be donated
        pools = 1 if layer.values_in_keys else 2
        layer._largest = nnx.Variable(_modes.zeros((pools, layer.num_kv_heads), jnp.float32))
    graphdef, state = nnx.split(twin)
    longest = max(map(len, checked))
    found = [jax.device_get(_largest_of(graphdef, state, *_padded(prompt, longest))) for prompt in checked]
    scales: list[dict[str, Array]] = []
    for index, of_layer in enumerate(zip(*found, strict=True)):
        rows = dict(zip(("keys", "values"), np.max(of_layer, axis=0), strict=False))  # keys alone if they have both
        each = (scales_from_largest(f"{kind} of layer {index}", row, dtype, margin) for kind, row in rows.items())
        scales.append(dict(zip(("k_scale", "v_scale"), each, strict=False)))
    return scales


@functools.partial(jax.jit, static_argnums=0)
def _largest_of(graphdef: nnx.GraphDef[Any], state: nnx.State, tokens: Array, step: StepMetadata) -> list[Array]:
    """The largest magnitudes of each layer, `[2, K]`, over the tokens of one sequence."""
    model: Any = nnx.merge(graphdef, state)
    getattr(model, "hidden", model)(tokens, step)
    return [layer._largest[...] for layer in _attention_layers(model) if layer._largest is not None]


def _attention_layers(model: nnx.Module) -> list[PagedAttention]:
    """In the order of their paths, with numbers in these by value: `layer_2` before `layer_10`."""
    layers = [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, PagedAttention)]

    def key(entry: tuple[Any, PagedAttention]) -> list[str | int]:
        parts = re.split(r"(\d+)", ".".join(map(str, entry[0])))
        return [int(part) if part.isdigit() else part for part in parts]

    return [layer for _, layer in sorted(layers, key=key)]


def _prompt(name: str, tokens: ArrayLike | Sequence[int]) -> np.ndarray:
    ids = np.asarray(_checks.as_int32(name, tokens))  # pyright: ignore[reportArgumentType]
    if ids.ndim != 1 or not ids.size:
        raise ValueError(f"{name}: expected at least one token, shape [T], got shape {ids.shape}")
    return ids


def _padded(prompt: np.ndarray, length: int) -> tuple[Array, StepMetadata]:
    """The prompt as a step of `length` tokens, of which the last ones are padding, on one page."""
    positions = np.arange(length, dtype=np.int32)
    count = len(prompt)
    step = StepMetadata(
        positions=positions,
        slot_mapping=np.where(positions < count, positions, np.int32(-1)),
        block_tables=np.zeros((1, 1), np.int32),
        kv_lens=np.array([count], np.int32),
        cu_q_lens=np.array([0, count], np.int32),
        num_seqs=np.array(1, np.int32),
    )
    return jax.device_put((np.pad(prompt, (0, length - count)), step))
