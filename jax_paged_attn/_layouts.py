"""Layouts: where keys and values stand in their pools, by the names that the primitives and the FFI targets use."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to store pools; engines read each in place, plain JAX code through `split`.

    Attributes:
      shape: the shape of a pool of keys, in letters. One of values has Hv in the place of H, if it is of their own.
      pools: the names of the arguments that hold keys and values.
      page_axis: the axis that counts pages.
      token_axis: the axis that counts the tokens of a page.
      head_axis: the axis that counts heads.
      interleaved: True if one array holds both pools: key head k is its head 2k, value head k its head 2k + 1. Padding
        heads may follow, which no operation reads or writes.
      values_in_keys: True if the values are the first Hv numbers of each key. The pool of values is then an empty
        array, whose last axis says how many they are. Padding numbers may follow each key, which no row sees.
    """

    shape: str
    pools: tuple[str, str] = ("k_pages", "v_pages")
    page_axis: int = 0
    token_axis: int = 1
    head_axis: int = 2
    interleaved: bool = False
    values_in_keys: bool = False

    @property
    def value_shape(self) -> str:
        """The shape of the pool of values."""
        return self.shape if self.interleaved else self.shape.replace("H", "Hv")

    @property
    def padded_shape(self) -> str:
        """The shape of a pool that may have padding heads."""
        return self.shape.replace("2K", ">=2K")

    @property
    def num_pools(self) -> int:
        """How many arrays hold keys and values."""
        return 1 if self.interleaved or self.values_in_keys else 2

    def page_size(self, pool: Array) -> int:
        """S, the tokens per page, of a pool or its abstract value."""
        return pool.shape[self.token_axis]

    def num_slots(self, pool: Array) -> int:
        """P·S, the slots of a pool or its abstract value."""
        return pool.shape[self.page_axis] * pool.shape[self.token_axis]

    def kv_heads(self, pool: Array, num_padding_heads: int) -> int:
        """K, the key/value heads, of a pool or its abstract value."""
        return (pool.shape[self.head_axis] - num_padding_heads) // (2 if self.interleaved else 1)

    def shape_by_heads(self, pool: Array, head_dim: int | None, kv_heads: int) -> tuple[int, ...]:
        """The shape of a pool, or its abstract value, with one axis of heads; an interleaved one may have any axes.

        One of a single head that holds the values may have the tokens of a page in two axes. That of a pool that does
        not consist of heads of `head_dim` numbers is returned as it is. None: the pool has no axis for a head dim of 1.
        """
        if self.values_in_keys and kv_heads == 1 and len(pool.shape) == 4:
            pages, page_size, more, width = pool.shape
            return (pages, page_size * more, 1, width)
        shape = pool.shape if head_dim is not None else (*pool.shape, 1)
        head_dim = 1 if head_dim is None else head_dim
        numbers = math.prod(shape[2:])
        if not self.interleaved or len(shape) < 3 or head_dim < 1 or numbers % head_dim:
            return shape
        return (*shape[:2], numbers // head_dim, head_dim)

    def padding_heads(self, pool: Array, kv_heads: int) -> int:
        """How many heads of a pool, or its abstract value, are none of the K key/value heads."""
        return pool.shape[self.head_axis] - kv_heads * (2 if self.interleaved else 1)

    def split(self, pool: Array, which: int, kv_heads: int) -> Array:
        """Keys (`which` 0) or values (1) as `[P, S, K, H]`: a view as far as XLA can make it one."""
        heads = pool[:, :, which : 2 * kv_heads : 2] if self.interleaved else pool
        return jnp.moveaxis(heads, (self.page_axis, self.token_axis), (0, 1))

    def split_both(self, k_pages: Array, v_pages: Array, kv_heads: int, head_dim: int) -> tuple[Array, Array]:
        """Keys `[P, S, K, H]` and values `[P, S, K, Hv]`, likewise, of the operands of attention."""
        keys = self.split(k_pages, 0, kv_heads)[..., :head_dim]
        if self.values_in_keys:
            return keys, keys[..., : v_pages.shape[-1]]
        return keys, self.split(v_pages, 1, kv_heads)

    def split_scales(self, scales: Array | None, which: int, kv_heads: int) -> Array | None:
        """Scales per token and head, a pool without its last axis, as `[P, S, K, 1]`; None where there are none."""
        return None if scales is None else self.split(scales[..., None], which, kv_heads)

    def merge(self, pages: Array, which: int, pool: Array) -> Array:
        """The transpose of `split`: `[P, S, K, H]` in the place of `pool`, whose values are not used, else zeros."""
        aval, (*_, kv_heads, head_dim) = jax.ShapeDtypeStruct(pool.shape, pages.dtype), pages.shape
        (merged,) = jax.linear_transpose(lambda pool: self.split(pool, which, kv_heads)[..., :head_dim], aval)(pages)
        return merged


LAYOUTS = {
    "split": Layout("P S K H"),
    "interleaved": Layout("P S 2K H", pools=("kv_pages", "kv_pages"), interleaved=True),
    "head_major": Layout("K P S H", page_axis=1, token_axis=2, head_axis=0),
    "values_in_keys": Layout("P S K H", values_in_keys=True),
}


def keys_and_values(arrays: Sequence[Any], present: tuple[bool, bool]) -> tuple[Any, Any]:
    """What keys have and what values have of something that either may lack, from a list of what there is."""
    left = iter(arrays)
    of_keys, of_values = (next(left) if has else None for has in present)
    return of_keys, of_values


def head_dim_of(tokens: Any) -> int | None:
    """H of tokens `[T, K, H]`, or of their abstract value; None of numbers `[T, K]`."""
    return tokens.shape[2] if len(tokens.shape) == 3 else None
