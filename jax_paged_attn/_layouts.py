"""Where keys and values stand in their pools, by the name that the primitives and the FFI target know a layout by."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to store pools; engines read each in place, plain JAX code through `split`.

    Attributes:
      shape: of a pool, in letters.
      pools: what the arguments that are the two pools are called.
      page_axis: which axis counts pages.
      token_axis: which one the tokens of a page.
      head_axis: which one the heads.
      interleaved: whether one array is both pools: key head k is head 2k of it, value head k head 2k + 1.
    """

    shape: str
    pools: tuple[str, str] = ("k_pages", "v_pages")
    page_axis: int = 0
    token_axis: int = 1
    head_axis: int = 2
    interleaved: bool = False

    def page_size(self, pool: Array) -> int:
        """S, of a pool or its abstract value."""
        return pool.shape[self.token_axis]

    def kv_heads(self, pool: Array) -> int:
        """K, likewise."""
        return pool.shape[self.head_axis] // (2 if self.interleaved else 1)

    def split(self, pool: Array, which: int) -> Array:
        """Keys (`which` 0) or values (1) as `[P, S, K, H]`: a view as far as XLA can make it one."""
        heads = pool[:, :, which::2] if self.interleaved else pool
        return jnp.moveaxis(heads, (self.page_axis, self.token_axis), (0, 1))

    def merge(self, pages: Array, which: int, pool: Array) -> Array:
        """The transpose of `split`: `[P, S, K, H]` in the place of `pool`, whose values are not used, else zeros."""
        aval = jax.ShapeDtypeStruct(pool.shape, pages.dtype)
        (merged,) = jax.linear_transpose(lambda pool: self.split(pool, which), aval)(pages)
        return merged


LAYOUTS = {
    "split": Layout("P S K H"),
    "interleaved": Layout("P S 2K H", pools=("kv_pages", "kv_pages"), interleaved=True),
    "head_major": Layout("K P S H", page_axis=1, token_axis=2, head_axis=0),
}
