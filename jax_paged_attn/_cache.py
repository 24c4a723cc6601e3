"""The paged cache: writing tokens, copying pages, and a pytree that holds the pools of all layers."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_paged_attn import _checks, _primitive, _reference
from jax_paged_attn._attention import page_scale

_PAGE_DTYPES = (*_checks.COMPUTE_DTYPES, *_checks.QUANTIZED_DTYPES)


def write_kv_pages(
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    slot_mapping: ArrayLike,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Writes new tokens into their slots of the cache; in place where the pages are donated.

    Letters: P pages of S tokens, K key/value heads, H head dim, T new tokens.

    Args:
      k_pages: `[P, S, K, H]` float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8.
      v_pages: as `k_pages`.
      k: `[T, K, H]` float32, bfloat16 or float16; converted to the dtype of the pages.
      v: as `k`.
      slot_mapping: `[T]` int32: page·S + offset in the page. Slots outside [0, P·S) are skipped (pad with −1); of equal
        slots the last token wins.
      k_scale: positive float32, scalar or `[K]`, default 1, required for int8 pages: stored = round(k / k_scale), to
        nearest even, saturated to ±448 (e4m3), ±57344 (e5m2) or ±127 (int8). NaN stays NaN in fp8, becomes 0 in int8.
      v_scale: likewise for `v`.

    Returns:
      The new `(k_pages, v_pages)`. Inside a jitted function whose pages are donated they are the same buffers;
      otherwise the caller's arrays stay as they were.

    Raises:
      ValueError: a shape or dtype that does not fit; the message names the argument, what was expected, what came.
    """
    dims = _checks.Dims()
    k_pages, v_pages = _pools(dims, k_pages, v_pages)
    k, v = _checks.as_array("k", k), _checks.as_array("v", v)
    dims.match("k", k, "T K H", _checks.COMPUTE_DTYPES)
    dims.match("v", v, "T K H", (str(k.dtype),))
    slot_mapping = _checks.as_int32("slot_mapping", slot_mapping)
    dims.match("slot_mapping", slot_mapping, "T", ("int32",))
    scales = (page_scale(dims, "k_scale", k_scale, k_pages), page_scale(dims, "v_scale", v_scale, v_pages))
    return _primitive.write(k_pages, v_pages, k, v, slot_mapping, *scales)


def copy_kv_pages(k_pages: ArrayLike, v_pages: ArrayLike, src: ArrayLike, dst: ArrayLike) -> tuple[Array, Array]:
    """Copies whole pages inside the cache, as `PageAllocator` asks for; in place where the pages are donated.

    Args:
      k_pages: `[P, S, K, H]` of any dtype that caches have.
      v_pages: as `k_pages`.
      src: `[n]` int32 page ids, read as they were before the call.
      dst: `[n]` int32 page ids; of equal ones the last wins. A pair with an id outside [0, P) is skipped.

    Returns:
      The new `(k_pages, v_pages)`.

    Raises:
      ValueError: a shape or dtype that does not fit.
    """
    dims = _checks.Dims()
    k_pages, v_pages = _pools(dims, k_pages, v_pages)
    src, dst = _checks.as_int32("src", src), _checks.as_int32("dst", dst)
    dims.match("src", src, "n", ("int32",))
    dims.match("dst", dst, "n", ("int32",))

    num_pages = dims["P"]
    if num_pages == 0:
        return k_pages, v_pages
    readable = (src >= 0) & (src < num_pages)
    # A pair that is skipped must not count as the last one of its target.
    dst = jnp.where(readable, dst, num_pages)
    dst = jnp.where(_reference.last_writer(dst, num_pages), dst, num_pages)
    k_new, v_new = (
        pages.at[dst].set(pages.at[jnp.where(readable, src, num_pages)].get(mode="fill", fill_value=0), mode="drop")
        for pages in (k_pages, v_pages)
    )
    return k_new, v_new


def _pools(dims: _checks.Dims, k_pages: ArrayLike, v_pages: ArrayLike) -> tuple[Array, Array]:
    k_pages, v_pages = _checks.as_array("k_pages", k_pages), _checks.as_array("v_pages", v_pages)
    dims.match("k_pages", k_pages, "P S K H", _PAGE_DTYPES)
    dims.match("v_pages", v_pages, "P S K H", (str(k_pages.dtype),))
    return k_pages, v_pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """The pools of all layers of a model: a pytree without tables, made to be donated to the step that updates it.

    One array a layer (`k_pages` is a tuple of L arrays `[P, S, K, H]`), or, with `create(..., stacked=True)`, one flat
    pool `[L·P, S, K, H]` in a tuple of one, in which layer l has the pages from l·P: what a `lax.scan` over layers
    carries without copying, while pools as `xs` and `ys` of a scan are copied whole.

    Attributes:
      k_pages: tuple of pools.
      v_pages: tuple of pools.
      k_scale: float32, scalar or `[K]`, or None; the same for all layers.
      v_scale: likewise.
      num_layers: L.
    """

    k_pages: tuple[Array, ...]
    v_pages: tuple[Array, ...]
    k_scale: Array | None = None
    v_scale: Array | None = None
    num_layers: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self) -> None:
        if self.num_layers == 0:
            object.__setattr__(self, "num_layers", len(self.k_pages))

    @classmethod
    def create(
        cls,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        *,
        k_scale: ArrayLike | None = None,
        v_scale: ArrayLike | None = None,
        stacked: bool = False,
    ) -> "PagedKVCache":
        """A cache of zeros: `num_pages` pages of `page_size` tokens a layer.

        Raises:
          ValueError: a size below 1, or a dtype that pages cannot have.
        """
        sizes = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        names = ("num_layers", "num_pages", "page_size", "num_kv_heads", "head_dim")
        for name, size in zip(names, sizes, strict=True):
            _checks.static_count(name, size)
        if jnp.dtype(dtype) not in [jnp.dtype(d) for d in _PAGE_DTYPES]:
            raise ValueError(f"dtype: expected {' or '.join(_PAGE_DTYPES)}, got {jnp.dtype(dtype)}")
        pools = 1 if stacked else num_layers
        shape = (num_layers * num_pages // pools, page_size, num_kv_heads, head_dim)
        k_pages, v_pages = (tuple(jnp.zeros(shape, dtype) for _ in range(pools)) for _ in "kv")
        k_scale, v_scale = (None if s is None else jnp.asarray(s, jnp.float32) for s in (k_scale, v_scale))
        return cls(k_pages, v_pages, k_scale, v_scale, num_layers)

    @property
    def stacked(self) -> bool:
        """Whether all layers share one flat pool."""
        return len(self.k_pages) != self.num_layers

    @property
    def num_pages(self) -> int:
        """P, the pages of one layer."""
        return self.k_pages[0].shape[0] * len(self.k_pages) // self.num_layers

    @property
    def page_size(self) -> int:
        """S, the tokens of one page."""
        return self.k_pages[0].shape[1]

    def layer(self, index: int | Array, block_tables: Array) -> tuple[Array, Array, Array]:
        """`(k_pages, v_pages, block_tables)` to give to attention in layer `index`.

        Args:
          index: 0 ≤ index < L; may be traced if the cache is stacked.
          block_tables: `[B, M]` int32, ids in [0, P); in a stacked cache they come back offset to the layer's pages,
            ids outside [0, P) as −1.
        """
        if not self.stacked:
            return self.k_pages[self._static(index)], self.v_pages[self._static(index)], block_tables
        return self.k_pages[0], self.v_pages[0], self._offset(block_tables, index, self.num_pages)

    def write(self, index: int | Array, k: Array, v: Array, slot_mapping: Array) -> "PagedKVCache":
        """The cache after `write_kv_pages` of `k`, `v` `[T, K, H]` at `slot_mapping [T]` in layer `index`."""
        pool = 0 if self.stacked else self._static(index)
        if self.stacked:
            slot_mapping = self._offset(slot_mapping, index, self.num_pages * self.page_size)
        k_new, v_new = write_kv_pages(
            self.k_pages[pool], self.v_pages[pool], k, v, slot_mapping, k_scale=self.k_scale, v_scale=self.v_scale
        )
        return dataclasses.replace(
            self, k_pages=_replaced(self.k_pages, pool, k_new), v_pages=_replaced(self.v_pages, pool, v_new)
        )

    def copy(self, src: Array, dst: Array) -> "PagedKVCache":
        """The cache after `copy_kv_pages` of pages `src [n]` to `dst [n]` in every layer."""
        if self.stacked:
            layers = jnp.arange(self.num_layers, dtype=jnp.int32)[:, None]
            src, dst = (self._offset(ids, layers, self.num_pages).reshape(-1) for ids in (src, dst))
        pools = [copy_kv_pages(k, v, src, dst) for k, v in zip(self.k_pages, self.v_pages, strict=True)]
        return dataclasses.replace(self, k_pages=tuple(k for k, _ in pools), v_pages=tuple(v for _, v in pools))

    def _static(self, index: int | Array) -> int:
        if isinstance(index, Tracer):
            raise TypeError(
                "index: expected a static layer number, since the cache has one array a layer; got a tracer"
            )
        if not 0 <= int(index) < self.num_layers:
            raise ValueError(f"index: expected a layer in [0, {self.num_layers}), got {int(index)}")
        return int(index)

    def _offset(self, ids: Array, layer: int | Array, per_layer: int) -> Array:
        ids = jnp.asarray(ids, jnp.int32)
        shift = jnp.asarray(layer, jnp.int32) * per_layer
        return jnp.where((ids >= 0) & (ids < per_layer), ids + shift, -1)


def _replaced(pools: tuple[Array, ...], index: int, pool: Array) -> tuple[Array, ...]:
    return (*pools[:index], pool, *pools[index + 1 :])
