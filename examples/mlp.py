"""What stands between the attentions of a decoder: gated MLPs, and mixtures of experts.

Parameters are named as in Hugging Face's checkpoints, so that `checkpoint.py` is a plain renaming.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jax_paged_attn.nnx import FusedLinear


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of the computation and of the weights."""

    dtype: DTypeLike
    param_dtype: DTypeLike


def linear(inputs: int, outputs: int, precision: Precision, rngs: nnx.Rngs, use_bias: bool = False) -> nnx.Linear:
    return nnx.Linear(
        inputs, outputs, use_bias=use_bias, dtype=precision.dtype, param_dtype=precision.param_dtype, rngs=rngs
    )


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
    normalised: bool


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class GatedMlp(nnx.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(
        self,
        inner: int,
        *,
        size: int,
        precision: Precision,
        rngs: nnx.Rngs,
        activation: str = "silu",
        use_bias: bool = False,
    ):
        self.gate_proj = linear(size, inner, precision, rngs, use_bias)
        self.up_proj = linear(size, inner, precision, rngs, use_bias)
        self.down_proj = linear(inner, size, precision, rngs, use_bias)
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


class ExpertsMlp(nnx.Module):
    """A sum of a few experts per token, weighted by a router's softmax (Shazeer et al. 2017)."""

    def __init__(self, config: Experts, *, size: int, precision: Precision, rngs: nnx.Rngs, activation: str = "silu"):
        self.config = config
        self.activation = activation
        self.gate = linear(size, config.number, precision, rngs)
        experts = [GatedMlp(config.size, size=size, precision=precision, rngs=rngs) for _ in range(config.number)]
        self.experts = nnx.data(nnx.List(experts))
        self.gate_up: nnx.Param | None = nnx.data(None)  # `[E, D, 2 · size]`
        self.down: nnx.Param | None = nnx.data(None)  # `[E, size, D]`

    def fuse(self) -> None:
        """Puts the weights of all experts into two arrays, if they are not yet, so that no step has to."""
        if self.gate_up is None:
            gate_up, down = self._stacked()
            self.gate_up, self.down = nnx.Param(gate_up), nnx.Param(down)
            self.experts = nnx.data(None)

    def __call__(self, x: Array) -> Array:
        gate_up, down = self._stacked()

        def run(rows: Array, counts: Array, _: Array) -> Array:
            gate, up = jnp.split(jax.lax.ragged_dot(rows, gate_up.astype(rows.dtype), counts), 2, axis=-1)
            return jax.lax.ragged_dot(ACTIVATIONS[self.activation](gate) * up, down.astype(rows.dtype), counts)

        return _mixture(x, self.gate, self.config, run)

    def _stacked(self) -> tuple[Array, Array]:
        if self.gate_up is not None and self.down is not None:
            return self.gate_up[...], self.down[...]
        experts = list(self.experts or ())
        both = [jnp.concatenate([x.gate_proj.kernel[...], x.up_proj.kernel[...]], axis=1) for x in experts]
        return jnp.stack(both), jnp.stack([expert.down_proj.kernel[...] for expert in experts])


class ClampedExpertsMlp(nnx.Module):
    """The experts of gpt-oss: biases everywhere, and (up + 1) · gate · sigmoid(1.702 · gate) of clamped numbers."""

    def __init__(self, config: Experts, *, size: int, precision: Precision, rngs: nnx.Rngs, limit: float):
        self.config = config
        self.limit = limit
        self.router = linear(size, config.number, precision, rngs, use_bias=True)
        self.experts = _Arrays(config, size, precision, rngs)

    def fuse(self) -> None:
        """Does nothing: the weights are in two arrays already."""

    def __call__(self, x: Array) -> Array:
        weights = self.experts

        def run(rows: Array, counts: Array, expert: Array) -> Array:
            both = jax.lax.ragged_dot(rows, weights.gate_up_proj[...].astype(rows.dtype), counts)
            both += weights.gate_up_proj_bias[...].astype(rows.dtype)[expert]
            gate = jnp.minimum(both[..., ::2], self.limit)
            up = jnp.clip(both[..., 1::2], -self.limit, self.limit)
            inner = (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
            out = jax.lax.ragged_dot(inner, weights.down_proj[...].astype(rows.dtype), counts)
            return out + weights.down_proj_bias[...].astype(rows.dtype)[expert]

        return _mixture(x, self.router, self.config, run)


class _Arrays(nnx.Module):
    """The weights of gpt-oss' experts; columns of gate and up alternate."""

    def __init__(self, config: Experts, size: int, precision: Precision, rngs: nnx.Rngs):
        def parameter(*shape: int) -> nnx.Param:
            return nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, precision.param_dtype))

        number, inner = config.number, config.size
        self.gate_up_proj, self.gate_up_proj_bias = parameter(number, size, 2 * inner), parameter(number, 2 * inner)
        self.down_proj, self.down_proj_bias = parameter(number, inner, size), parameter(number, size)


def _mixture(x: Array, router: nnx.Linear, config: Experts, run: Callable[[Array, Array, Array], Array]) -> Array:
    """The weighted sum of each token's experts.

    Args:
      x: `[..., D]`.
      router: tokens to a logit per expert.
      config: how many experts there are, and how many each token has.
      run: the experts, from rows `[n, D]` that are sorted by expert, the number of rows of each, and each row's expert.
    """
    flat = x.reshape(-1, x.shape[-1])
    weights, chosen = jax.lax.top_k(jax.nn.softmax(router(flat).astype(jnp.float32), axis=-1), config.per_token)
    if config.normalised:
        weights /= weights.sum(axis=-1, keepdims=True)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    tokens, expert = order // config.per_token, chosen.reshape(-1)[order]
    counts = jnp.bincount(expert, length=config.number).astype(jnp.int32)
    out = run(flat[tokens], counts, expert).astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    return jnp.zeros(flat.shape, jnp.float32).at[tokens].add(out).astype(x.dtype).reshape(x.shape)
