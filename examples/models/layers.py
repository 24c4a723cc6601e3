"""Parts of a decoder's blocks that families share: norms, gated MLPs and mixtures of experts.

Parameters are named as in Hugging Face's checkpoints, so that `checkpoint.py` is a plain renaming. A module's
`split_axes` names the axis of each parameter that tensor parallelism splits; the others are on all devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jax_paged_attn.nnx import FusedLinear


@dataclasses.dataclass(frozen=True)
class Build:
    """How the modules of one model are made.

    Attributes:
      dtype, param_dtype: of the computation and of the weights.
      rngs: for the weights' initial values.
      dropout: rate on what each block adds, in training only.
      implementation: engine that every attention runs on; None for the best one.
    """

    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs
    dropout: float = 0.0
    implementation: str | None = None

    def linear(self, inputs: int, outputs: int, use_bias: bool = False) -> nnx.Linear:
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": self.rngs}
        return nnx.Linear(inputs, outputs, use_bias=use_bias, **options)


# Makes a norm over the last axis from its size and its epsilon.
Norm = Callable[[int, float, Build], Any]


def rms_norm(size: int, epsilon: float, build: Build) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, epsilon=epsilon, dtype=build.dtype, param_dtype=build.param_dtype, rngs=build.rngs)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def normalised(x: Array, epsilon: float, axes: int | tuple[int, ...] = -1) -> Array:
    """x over the root of its mean square along some axes, in float32: an RMSNorm without weights."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + epsilon)


class GatedMlp(nnx.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020)."""

    split_axes: ClassVar = {
        **dict.fromkeys(("gate_proj.kernel", "gate_proj.bias", "up_proj.kernel", "up_proj.bias"), -1),
        **dict.fromkeys(("gate_up_proj.kernel", "gate_up_proj.bias"), -1),
        "down_proj.kernel": 0,
    }

    def __init__(self, size: int, inner: int, build: Build, *, activation: str = "silu", use_bias: bool = False):
        self.gate_proj = build.linear(size, inner, use_bias)
        self.up_proj = build.linear(size, inner, use_bias)
        self.down_proj = build.linear(inner, size, use_bias)
        self.gate_up_proj: FusedLinear | None = nnx.data(None)
        self.activation = activation

    def fuse(self) -> None:
        """Puts `gate_proj` and `up_proj` into one product, if they are not yet."""
        if self.gate_up_proj is not None:
            return
        inner = self.gate_proj.out_features
        self.gate_up_proj = FusedLinear.of((self.gate_proj, self.up_proj), (1, 1, inner))
        del self.gate_proj, self.up_proj

    def __call__(self, x: Array) -> Array:
        if self.gate_up_proj is not None:
            fused = self.gate_up_proj(x)
            gate, up = fused[..., 0, 0, :], fused[..., 0, 1, :]
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)


@dataclasses.dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention.

    Attributes:
      rank: numbers of a token's latent, from which the keys and values of all heads come.
      rotary_dim: numbers of the rotated part of keys, which all heads share.
      unrotated_dim: numbers of the part of keys that each head has for itself.
      value_dim: numbers of a head's values.
      query_rank: numbers of the latent that queries come from; None where they come from the hidden states.
      interleaved: whether rotated pairs are columns (2i, 2i + 1).
    """

    rank: int
    rotary_dim: int
    unrotated_dim: int
    value_dim: int
    query_rank: int | None = None
    interleaved: bool = True


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of an MLP.

    Attributes:
      number: of experts.
      per_token: how many of them each token goes to.
      size: inner columns of each.
      normalised: whether the weights of a token's experts are scaled to a sum of 1.
    """

    number: int
    per_token: int
    size: int
    normalised: bool = True

    def mlp(self, size: int, build: Build, activation: str) -> Any:
        """The module, over tokens `[..., size]`."""
        return ExpertsMlp(self, size, build, activation)


class ExpertsMlp(nnx.Module):
    """A sum of a few experts per token, weighted by a router's softmax (Shazeer et al. 2017).

    Tensor parallelism splits the inner columns of every expert, and not the experts, so that all devices have the same
    work whatever the router chooses.
    """

    split_axes: ClassVar = {"gate_up": 2, "down": 1}

    def __init__(self, config: Experts, size: int, build: Build, activation: str):
        self.config = config
        self.activation = activation
        self.gate: Any = build.linear(size, config.number)
        self.experts = nnx.data(nnx.List([GatedMlp(size, config.size, build) for _ in range(config.number)]))
        self.gate_up: nnx.Param | None = nnx.data(None)  # `[E, D, 2 · size]`, columns of gate and up alternate
        self.down: nnx.Param | None = nnx.data(None)  # `[E, size, D]`

    def fuse(self) -> None:
        """Puts the weights of all experts into two arrays, if they are not yet, so that no step has to."""
        if self.gate_up is None:
            gate_up, down = self._stacked()
            self.gate_up, self.down = nnx.Param(gate_up), nnx.Param(down)
            self.experts = nnx.data(None)

    def __call__(self, x: Array, routed: Array | None = None) -> Array:
        """Tokens `[..., D]` to the same; `routed` is what the router sees, where that is not `x`."""
        gate_up, down = self._stacked()
        seen = (x if routed is None else routed).reshape(-1, x.shape[-1])

        def run(rows: Array, counts: Array, _: Array) -> Array:
            gate, up = alternating(jax.lax.ragged_dot(rows, gate_up.astype(rows.dtype), counts))
            return jax.lax.ragged_dot(ACTIVATIONS[self.activation](gate) * up, down.astype(rows.dtype), counts)

        return mixture(x, self.config, lambda _: self.route(seen), run)

    def route(self, x: Array) -> tuple[Array, Array]:
        """The experts of each token `[n, D]`: their weights, float32 `[n, per_token]`, and which they are."""
        return largest(self.gate(x), self.config)

    def _stacked(self) -> tuple[Array, Array]:
        if self.gate_up is not None and self.down is not None:
            return self.gate_up[...], self.down[...]
        experts = list(self.experts or ())
        both = [jnp.stack([x.gate_proj.kernel[...], x.up_proj.kernel[...]], axis=-1) for x in experts]
        gate_up = jnp.stack([x.reshape(len(x), -1) for x in both])
        return gate_up, jnp.stack([expert.down_proj.kernel[...] for expert in experts])


def alternating(columns: Array) -> tuple[Array, Array]:
    """Every second column, `[..., n]`, from the first and from the second one on: a device's shard has both."""
    pairs = columns.reshape(*columns.shape[:-1], -1, 2)
    return pairs[..., 0], pairs[..., 1]


def largest(logits: Array, config: Experts) -> tuple[Array, Array]:
    """The weights, float32, and the numbers of those experts that have the largest of each row's logits `[n, E]`."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), config.per_token)
    if config.normalised:
        weights /= weights.sum(axis=-1, keepdims=True)
    return weights, chosen


def mixture(
    x: Array,
    config: Experts,
    route: Callable[[Array], tuple[Array, Array]],
    run: Callable[[Array, Array, Array], Array],
) -> Array:
    """The weighted sum of each token's experts.

    Args:
      x: `[..., D]`.
      config: how many experts there are, and how many each token has.
      route: from tokens `[n, D]` the weights of their experts, `[n, per_token]`, and which they are.
      run: the experts, from rows `[n, D]` that are sorted by expert, the number of rows of each, and each row's expert.
    """
    flat = x.reshape(-1, x.shape[-1])
    weights, chosen = route(flat)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    tokens, expert = order // config.per_token, chosen.reshape(-1)[order]
    counts = jnp.bincount(expert, length=config.number).astype(jnp.int32)
    out = run(flat[tokens], counts, expert).astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    return jnp.zeros(flat.shape, jnp.float32).at[tokens].add(out).astype(x.dtype).reshape(x.shape)
