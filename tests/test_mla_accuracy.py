"""Both forms of multi-head latent attention beside the plain one in float64, over caches of several dtypes.

`python tests/test_mla_accuracy.py` prints the table of docs/decisions/2026-11-30-mla-accuracy.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_paged_attn as jpa

Array = np.ndarray[Any, Any]

# Sizes of DeepSeek V3, with a share of its heads.
HEADS, LATENT, ROTATED, HEAD_DIM = 8, 512, 64, 128
ROWS, PAGE_SIZE = 4, 64
SCALE = (HEAD_DIM + ROTATED) ** -0.5
CACHES = ("float32", "bfloat16", "float8_e4m3fn", "int8")


@dataclasses.dataclass(frozen=True)
class Layer:
    """Numbers that bfloat16 has, as models are stored, so that no form is charged for rounding its inputs.

    Attributes:
      query: `[T, N, 128]`, and `rotated_query`: `[T, N, 64]`.
      latent: `[S, 512]`, of unit mean square as behind its norm, and `rotated_key`: `[S, 64]`.
      up_k, up_v: `[N, 512, 128]`.
    """

    query: Array
    rotated_query: Array
    latent: Array
    rotated_key: Array
    up_k: Array
    up_v: Array

    @classmethod
    def random(cls, keys: int, spread: float) -> Layer:
        """With scores of a standard deviation of `spread`."""
        draw = np.random.default_rng(0)

        def normal(*shape: int, factor: float = 1.0) -> Array:
            return np.asarray(draw.standard_normal(shape) * factor).astype(jnp.bfloat16).astype(np.float64)

        return cls(
            query=normal(ROWS, HEADS, HEAD_DIM, factor=spread),
            rotated_query=normal(ROWS, HEADS, ROTATED, factor=spread),
            latent=normal(keys, LATENT),
            rotated_key=normal(keys, ROTATED),
            up_k=normal(HEADS, LATENT, HEAD_DIM, factor=LATENT**-0.5),
            up_v=normal(HEADS, LATENT, HEAD_DIM, factor=LATENT**-0.5),
        )

    def exact(self) -> Array:
        """The plain form in float64, `[T, N, 128]`: the last rows of a sequence."""
        keys = np.einsum("sl,nld->snd", self.latent, self.up_k)
        values = np.einsum("sl,nld->snd", self.latent, self.up_v)
        scores = np.einsum("tnd,snd->tns", self.query, keys)
        scores += np.einsum("tnd,sd->tns", self.rotated_query, self.rotated_key)
        positions = np.arange(len(keys))
        scores = np.where(positions > positions[-ROWS:, None, None], -np.inf, scores * SCALE)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.einsum("tns,snd->tnd", weights / weights.sum(axis=-1, keepdims=True), values)

    def absorbed(self, cache_dtype: str) -> jax.Array:
        """`[T, N, 128]` over one pool of latents beside rotated keys, in the dtype of the computation."""
        x = self.cast(cache_dtype)
        queries = product("tnd,nld->tnl", x.query, x.up_k)
        queries = jnp.concatenate([queries, x.rotated_query], axis=-1)
        keys = jnp.concatenate([x.latent, x.rotated_key], axis=-1)[:, None]
        cache = filled(cache_dtype, keys, None, value_dim=LATENT, values_in_keys=True)
        return product("tnl,nld->tnd", attended(cache, queries, len(keys)), x.up_v)

    def plain(self, cache_dtype: str) -> jax.Array:
        """`[T, N, 128]` over the keys and values of all heads."""
        x = self.cast(cache_dtype)
        keys, values = (product("sl,nld->snd", x.latent, up) for up in (x.up_k, x.up_v))
        rotated = jnp.broadcast_to(x.rotated_key[:, None], (*keys.shape[:2], ROTATED))
        keys = jnp.concatenate([keys, rotated], axis=-1)
        queries = jnp.concatenate([x.query, x.rotated_query], axis=-1)
        return attended(filled(cache_dtype, keys, values, value_dim=HEAD_DIM), queries, len(keys))

    def cast(self, cache_dtype: str) -> Any:
        """In the dtype of the computation: float32, or bfloat16 over smaller caches."""
        dtype = jnp.float32 if cache_dtype == "float32" else jnp.bfloat16
        return dataclasses.replace(self, **{k: jnp.asarray(v, dtype) for k, v in vars(self).items()})


def product(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums in float32, as GPUs have them: on CPUs XLA sums some products of bfloat16 in that dtype since JAX 0.12."""
    return jnp.einsum(form, x.astype(jnp.float32), y.astype(jnp.float32)).astype(x.dtype)


def filled(dtype: str, keys: jax.Array, values: jax.Array | None, **options: Any) -> jpa.PagedKVCache:
    """A cache with these tokens; one of 8 bits has the scales that its contents call for."""
    heads, head_dim = keys.shape[1:]
    sizes: Any = {"num_pages": len(keys) // PAGE_SIZE, "page_size": PAGE_SIZE, "num_kv_heads": heads}
    sizes |= {"head_dim": head_dim, **options}
    slots = jnp.arange(len(keys))
    full = jpa.PagedKVCache.create(1, dtype=keys.dtype, **sizes).write(0, keys, values, slots)
    if jnp.dtype(dtype) == keys.dtype:
        return full
    scales: Any = full.calibrated_scales(dtype, margin=1.0)
    return jpa.PagedKVCache.create(1, dtype=dtype, **sizes, **scales).write(0, keys, values, slots)


def attended(cache: jpa.PagedKVCache, queries: jax.Array, keys: int) -> jax.Array:
    tables = jnp.arange(keys // PAGE_SIZE)[None]
    return cache.attend_ragged(0, queries, jnp.array([keys]), tables, jnp.array([0, ROWS]), scale=SCALE)


def error(got: jax.Array, want: Array) -> float:
    return float(np.linalg.norm(np.asarray(got).astype(np.float64) - want) / np.linalg.norm(want))


# The largest relative errors of either form, with room of a third or more.
BOUNDS = {"float32": 4e-6, "bfloat16": 6e-3, "float8_e4m3fn": 9e-2, "int8": 4e-2}


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("cache_dtype", CACHES)
def test_absorption_costs_no_accuracy(cache_dtype: str, spread: float) -> None:
    """But in float32, whose longer sums of products show."""
    layer = Layer.random(512, spread)
    want = layer.exact()
    absorbed, plain = error(layer.absorbed(cache_dtype), want), error(layer.plain(cache_dtype), want)
    assert max(absorbed, plain) < BOUNDS[cache_dtype]
    assert cache_dtype == "float32" or absorbed < 1.5 * plain


def main() -> None:
    print("| keys | spread of scores | form | " + " | ".join(CACHES) + " |")
    print("|---" * (3 + len(CACHES)) + "|")
    for keys in (512, 4096):
        for spread in (1.0, 4.0):
            layer = Layer.random(keys, spread)
            want = layer.exact()
            for form in ("absorbed", "plain"):
                errors = [error(getattr(layer, form)(dtype), want) for dtype in CACHES]
                print(f"| {keys} | {spread:g} | {form} | " + " | ".join(f"{x:.1e}" for x in errors) + " |")


if __name__ == "__main__":
    main()
