"""The paged cache: writing tokens, copying pages, and a pytree that holds the pools of all layers."""

import dataclasses
import functools
import operator
from typing import Any, Literal, Protocol, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_paged_attn import _call, _checks, _debug, _modes, _options, _reference
from jax_paged_attn._attention import paged_attention, ragged_paged_attention
from jax_paged_attn._donation import warn_of_eager_update
from jax_paged_attn._step import StepMetadata

# Keywords of attention that `attend` takes from the cache.
_OWN: dict[str, str] = {
    **dict.fromkeys(("k_scale", "v_scale"), "expected none, since the cache has its own scales"),
    "value_dim": "expected none, since the cache has its own",
}


@overload
def write_kv_pages(
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    slot_mapping: ArrayLike,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> tuple[Array, Array]: ...


@overload
def write_kv_pages(
    k_pages: ArrayLike,
    v_pages: None,
    k: ArrayLike,
    v: None,
    slot_mapping: ArrayLike,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: None = None,
) -> tuple[Array, None]: ...


def write_kv_pages(
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    k: ArrayLike,
    v: ArrayLike | None,
    slot_mapping: ArrayLike,
    *,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
) -> tuple[Array, Array | None]:
    """Writes new tokens into their slots of the cache; in place where the pages are donated.

    Letters: P pages of S tokens, K key/value heads, H head dim of keys, Hv that of values, T new tokens.

    Args:
      k_pages: `[P, S, K, H]` float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8.
      v_pages: `[P, S, K, Hv]`, dtype as `k_pages`; None where the values are the first numbers of each key.
      k: `[T, K, H]` float32, bfloat16 or float16; converted to the dtype of the pages.
      v: `[T, K, Hv]`, dtype as `k`; None where `v_pages` is.
      slot_mapping: `[T]` int32 (or integers that fit): page·S + offset in the page. Slots outside [0, P·S) are skipped
        (pad with −1); of equal slots the last token wins.
      k_scale: positive, finite float32, scalar or `[K]`, default 1, required for int8: stored = round(k / k_scale), to
        nearest even, saturated to ±448 (e4m3), ±57344 (e5m2) or ±127 (int8). NaN stays NaN in fp8, becomes 0 in int8.
      v_scale: likewise for `v`; None where that is.

    Returns:
      The new `(k_pages, v_pages)`, or `(k_pages, None)`. Inside a jitted function whose pages are donated they are the
      same buffers; otherwise the caller's arrays stay as they were.

    Raises:
      ValueError: a shape or dtype that does not fit; the message names the argument, what was expected, what came.

    Example:
      Two tokens go to the first two slots of page 1; a padding token has slot −1.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> write = jax.jit(jpa.write_kv_pages, donate_argnums=(0, 1))
      >>> k_pages, v_pages, new = jnp.zeros((3, 4, 1, 8)), jnp.zeros((3, 4, 1, 8)), jnp.ones((3, 1, 8))
      >>> k_pages, v_pages = write(k_pages, v_pages, new, new, jnp.array([4, 5, -1], jnp.int32))
      >>> k_pages[:, :, 0, 0].astype(int).tolist()
      [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    """
    one_pool = v_pages is None
    pools, layout = ((k_pages,), "values_in_keys") if one_pool else ((k_pages, v_pages), "split")
    new = _call.write("write_kv_pages", pools, (k, v), slot_mapping, (k_scale, v_scale), layout)
    return (new[0], None) if one_pool else (new[0], new[1])


@overload
def copy_kv_pages(k_pages: ArrayLike, v_pages: ArrayLike, src: ArrayLike, dst: ArrayLike) -> tuple[Array, Array]: ...


@overload
def copy_kv_pages(k_pages: ArrayLike, v_pages: None, src: ArrayLike, dst: ArrayLike) -> tuple[Array, None]: ...


def copy_kv_pages(
    k_pages: ArrayLike, v_pages: ArrayLike | None, src: ArrayLike, dst: ArrayLike
) -> tuple[Array, Array | None]:
    """Copies whole pages inside the cache, as `PageAllocator` asks for; in place where the pages are donated.

    Args:
      k_pages: `[P, S, K, H]` of any dtype that caches have.
      v_pages: `[P, S, K, Hv]`, dtype as `k_pages`; None where the values are in the keys.
      src: `[n]` int32 page ids (or integers that fit), read as they were before the call.
      dst: `[n]` int32 page ids; of equal ones the last wins. A pair with an id outside [0, P) is skipped.

    Returns:
      The new `(k_pages, v_pages)`, or `(k_pages, None)`.

    Raises:
      ValueError: a shape or dtype that does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> pages = jnp.arange(3.0).reshape(3, 1, 1, 1)
      >>> k_pages, _ = jpa.copy_kv_pages(pages, pages, jnp.array([0], jnp.int32), jnp.array([2], jnp.int32))
      >>> k_pages.reshape(-1).tolist()
      [0.0, 1.0, 0.0]
    """
    dims = _checks.Dims()
    pools = _pools(dims, k_pages, v_pages)
    src, dst = _checks.as_int32("src", src), _checks.as_int32("dst", dst)
    dims.match("src", src, "n", ("int32",))
    dims.match("dst", dst, "n", ("int32",))
    warn_of_eager_update("copy_kv_pages", pools[0])
    _debug.check_copy(dims["P"], src, dst)

    copied = _copied(pools, src, dst)
    return (copied[0], None) if v_pages is None else (copied[0], copied[1])


@_modes.compiled
def _copied(pools: tuple[Array, ...], src: Array, dst: Array) -> tuple[Array, ...]:
    num_pages = pools[0].shape[0]
    if num_pages == 0:
        return pools
    readable = (src >= 0) & (src < num_pages)
    # A pair that is skipped must not count as the last one of its target.
    dst = jnp.where(readable, dst, num_pages)
    dst = jnp.where(_reference.last_writer(dst, num_pages), dst, num_pages)
    return tuple(
        pages.at[dst].set(pages.at[jnp.where(readable, src, num_pages)].get(mode="fill", fill_value=0), mode="drop")
        for pages in pools
    )


def _pools(dims: _checks.Dims, k_pages: ArrayLike, v_pages: ArrayLike | None) -> tuple[Array, ...]:
    k_pages = _checks.as_array("k_pages", k_pages)
    dims.match("k_pages", k_pages, "P S K H", _checks.PAGE_DTYPES)
    if v_pages is None:
        return (k_pages,)
    v_pages = _checks.as_array("v_pages", v_pages)
    dims.match("v_pages", v_pages, "P S K Hv", (str(k_pages.dtype),))
    return k_pages, v_pages


class _PagesOf(Protocol):
    """The sizes that `create` asks of an allocator; a `PageAllocator` has both."""

    @property
    def num_pages(self) -> int: ...

    @property
    def page_size(self) -> int: ...


class _Scales(TypedDict):
    k_scale: Array | None
    v_scale: Array | None


class _AnyNumber(int):
    """The number of layers of a prefix tree: equal to every number, so that it is a prefix of every cache.

    Trees as a whole stay equal only to their like: a prefix tree has a leaf, or None, where a cache has a tuple.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, int)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "any"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """The pools of all layers of a model: a pytree without tables, made to be donated to the step that updates it.

    `k_pages` is a tuple of L arrays `[P, S, K, H]`, one per layer. With `create(..., stacked=True)` it is a tuple of
    one flat pool `[L·P, S, K, H]`, in which layer l has the pages from l·P on. A `lax.scan` over layers carries the
    flat pool without copying it, while pools as `xs` and `ys` of a scan are copied whole.

    A write is in place if every read of the pool comes after it or is known to come before it. That holds in a scan,
    and where the tokens of layer l + 1 are computed from the attention of layer l. In unrolled code whose writes do not
    depend on attention, XLA may write to layer l + 1 before layer l attends. To be safe it copies the flat pool. There
    use one array per layer, or write all layers before the first one attends::

        for l in range(L):
            cache = cache.write(l, k[l], v[l], slots)
        outs = [cache.attend(l, q[l], block_tables, lengths) for l in range(L)]

    Where the values are the first `value_dim` numbers of each key, as in multi-head latent attention, there is one pool
    per layer: `v_pages` is empty, `v_scale` None, and `k_scale` holds for values too.

    A cache of shardings, of axes or of None is a prefix tree of any cache: `jax.jit(..., out_shardings=PagedKVCache(s,
    s))`, `jax.vmap(..., in_axes=(PagedKVCache(None, None), 0))`.

    Attributes:
      k_pages: tuple of pools.
      v_pages: tuple of pools `[P, S, K, Hv]`; empty where the values are in the keys.
      k_scale: float32, scalar or `[K]` for all layers, or `[L, K]`, a row per layer; or None.
      v_scale: likewise.
      num_layers: L.
      value_dim: Hv where `v_pages` is empty, else 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> cache = jpa.PagedKVCache.create(2, num_pages=3, page_size=4, num_kv_heads=1, head_dim=8, dtype=jnp.float32)
      >>> cache = cache.write(0, jnp.ones((1, 1, 8)), jnp.ones((1, 1, 8)), jnp.array([4], jnp.int32))
      >>> tables, lengths = jnp.array([[1]], jnp.int32), jnp.array([1], jnp.int32)
      >>> float(cache.attend(0, jnp.ones((1, 2, 8)), tables, lengths)[0, 0, 0])
      1.0
    """

    k_pages: tuple[Array, ...]
    v_pages: tuple[Array, ...]
    k_scale: Array | None = None
    v_scale: Array | None = None
    num_layers: int = dataclasses.field(default=0, metadata={"static": True})
    value_dim: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self) -> None:
        if not isinstance(self.k_pages, (tuple, list)):
            object.__setattr__(self, "num_layers", _AnyNumber())
            object.__setattr__(self, "value_dim", _AnyNumber())
        elif self.num_layers == 0:
            object.__setattr__(self, "num_layers", len(self.k_pages))

    @classmethod
    def create(
        cls,
        num_layers: int,
        num_pages: int | None = None,
        page_size: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        *,
        k_scale: ArrayLike | None = None,
        v_scale: ArrayLike | None = None,
        stacked: bool = False,
        allocator: _PagesOf | None = None,
        value_dim: int | None = None,
        values_in_keys: bool = False,
    ) -> "PagedKVCache":
        """Makes a cache of zeros: `num_pages` pages of `page_size` tokens per layer.

        Args:
          num_layers: L.
          num_pages: P; may be left out where an allocator is given.
          page_size: S; likewise.
          num_kv_heads: K.
          head_dim: H.
          dtype: float32, bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8.
          k_scale: positive, finite float32: scalar, `[K]`, or `[L, K]` with a row per layer: key = stored × k_scale.
            Default 1, required for int8.
          v_scale: likewise for values.
          stacked: one flat pool for all layers.
          allocator: the `PageAllocator` whose pages these are: it says how many there are, and of which size.
          value_dim: Hv, the head dim of values; None is H.
          values_in_keys: the values are the first Hv ≤ H numbers of each key: one pool per layer, and no `v_scale`.

        Raises:
          ValueError: a size below 1, or one that is not the allocator's; a dtype that pages cannot have; a scale of
            another shape, zero, negative or not finite; an int8 cache without its scales; a pool of more than 2³¹ − 1
            slots, which are int32; values in the keys with a `v_scale`, or with more numbers than keys.
          TypeError: a size that is missing or no integer, or no allocator.

        Example:
          >>> import jax_paged_attn as jpa
          >>> allocator = jpa.PageAllocator(num_pages=16, page_size=4)
          >>> cache = jpa.PagedKVCache.create(2, num_kv_heads=1, head_dim=8, allocator=allocator, stacked=True)
          >>> cache.k_pages[0].shape, str(cache.k_pages[0].dtype)
          ((32, 4, 1, 8), 'bfloat16')
        """
        if allocator is not None:
            num_pages = _size_of("num_pages", num_pages, allocator)
            page_size = _size_of("page_size", page_size, allocator)
        sizes = {
            "num_layers": num_layers,
            "num_pages": num_pages,
            "page_size": page_size,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "value_dim": head_dim if value_dim is None else value_dim,
        }
        layers, pages, tokens, heads, dim, dim_v = (_checks.static_count(name, size) for name, size in sizes.items())
        page_dtype = _page_dtype(dtype)
        pools = 1 if _checks.static_bool("stacked", stacked) else layers
        shape = (layers * pages // pools, tokens, heads)
        if shape[0] * tokens > _checks.INT32.max:
            counted = "num_layers * num_pages * page_size" if stacked else "num_pages * page_size"
            raise ValueError(f"{counted}: expected at most 2**31 - 1 (slots are int32), got {shape[0] * tokens}")
        k_scale = _stored_scale("k_scale", k_scale, layers, heads, page_dtype)
        k_pages = _zero_pools((*shape, dim), page_dtype, pools)
        if _checks.static_bool("values_in_keys", values_in_keys):
            _call.refuse_v_scale(v_scale)
            _call.values_in(k_pages[0], dim_v)
            return cls(k_pages, (), k_scale, None, layers, dim_v)
        v_scale = _stored_scale("v_scale", v_scale, layers, heads, page_dtype)
        return cls(k_pages, _zero_pools((*shape, dim_v), page_dtype, pools), k_scale, v_scale, layers)

    @property
    def stacked(self) -> bool:
        """True if all layers share one flat pool."""
        return len(self.k_pages) != self.num_layers

    @property
    def num_pages(self) -> int:
        """P, the pages of one layer."""
        return self.k_pages[0].shape[0] * len(self.k_pages) // self.num_layers

    @property
    def page_size(self) -> int:
        """S, the tokens of one page."""
        return self.k_pages[0].shape[1]

    @overload
    def attend(
        self,
        layer: int | Array,
        q: ArrayLike,
        block_tables: ArrayLike,
        lengths: ArrayLike,
        *,
        return_lse: Literal[False] = False,
        **options: Unpack[_options.CacheOptions],
    ) -> Array: ...

    @overload
    def attend(
        self,
        layer: int | Array,
        q: ArrayLike,
        block_tables: ArrayLike,
        lengths: ArrayLike,
        *,
        return_lse: Literal[True],
        **options: Unpack[_options.CacheOptions],
    ) -> tuple[Array, Array]: ...

    @_options.keywords(_options.CacheOptions, refuse=_OWN, return_lse=False)
    def attend(
        self, layer: int | Array, q: ArrayLike, block_tables: ArrayLike, lengths: ArrayLike, **options: Any
    ) -> Array | tuple[Array, Array]:
        """`paged_attention` over the pages of a layer, with the cache's own scales.

        Args:
          layer: 0 ≤ layer < L; may be traced if the cache is stacked, and a traced one outside sees no key.
          q: `[B, N, H]`.
          block_tables: `[B, M]` int32, ids in [0, P).
          lengths: `[B]` int32.
          options: the other keywords are those of `paged_attention`, without `k_scale` and `v_scale`.

        Returns:
          As `paged_attention`: `[B, N, Hv]`, or with `return_lse` a tuple of that and lse `[B, N]` float32.

        Raises:
          ValueError: a layer outside [0, L), or as `paged_attention`.
          TypeError: `k_scale` or `v_scale`, which the cache has, or as `paged_attention`.
        """
        pools_and_tables, own = self._layer("layer", layer, block_tables), self._own(layer)
        return paged_attention(q, *pools_and_tables, lengths, **options, **own)

    @overload
    def attend_ragged(
        self,
        layer: int | Array,
        q: ArrayLike,
        kv_lens: ArrayLike,
        block_tables: ArrayLike,
        cu_q_lens: ArrayLike,
        num_seqs: ArrayLike | None = None,
        *,
        return_lse: Literal[False] = False,
        **options: Unpack[_options.RaggedCacheOptions],
    ) -> Array: ...

    @overload
    def attend_ragged(
        self,
        layer: int | Array,
        q: ArrayLike,
        kv_lens: ArrayLike,
        block_tables: ArrayLike,
        cu_q_lens: ArrayLike,
        num_seqs: ArrayLike | None = None,
        *,
        return_lse: Literal[True],
        **options: Unpack[_options.RaggedCacheOptions],
    ) -> tuple[Array, Array]: ...

    @_options.keywords(_options.RaggedCacheOptions, refuse=_OWN, return_lse=False)
    def attend_ragged(
        self,
        layer: int | Array,
        q: ArrayLike,
        kv_lens: ArrayLike,
        block_tables: ArrayLike,
        cu_q_lens: ArrayLike,
        num_seqs: ArrayLike | None = None,
        **options: Any,
    ) -> Array | tuple[Array, Array]:
        """`ragged_paged_attention` over the pages of a layer, with the cache's own scales.

        Args:
          layer: as in `attend`.
          q: `[T, N, H]`.
          kv_lens: `[B]` int32.
          block_tables: `[B, M]` int32, ids in [0, P).
          cu_q_lens: `[B + 1]` int32.
          num_seqs: int32, scalar or `[1]`; None is all.
          options: the other keywords are those of `ragged_paged_attention`, without `k_scale` and `v_scale`.

        Returns:
          As `ragged_paged_attention`: `[T, N, Hv]`, or with `return_lse` a tuple of that and lse `[T, N]` float32.

        Raises:
          ValueError, TypeError: as `attend` and `ragged_paged_attention`.
        """
        k_pages, v_pages, tables = self._layer("layer", layer, block_tables)
        operands = (q, k_pages, v_pages, kv_lens, tables, cu_q_lens, num_seqs)
        return ragged_paged_attention(*operands, **options, **self._own(layer))

    @_options.keywords(_options.CacheOptions, refuse=_OWN)
    def attend_step(
        self, layer: int | Array, q: ArrayLike, step: StepMetadata, **options: Unpack[_options.CacheOptions]
    ) -> Array:
        """Causal attention of the tokens of a step: `attend` in a decode step, else `attend_ragged`.

        Args:
          layer: as in `attend`.
          q: `[T, N, H]`.
          step: whose tokens these are; their keys and values are in the cache.
          options: the other keywords are those of `paged_attention`, without `k_scale` and `v_scale`.

        Returns:
          `[T, N, Hv]` in q's dtype.

        Raises:
          ValueError, TypeError: as `attend` and `attend_ragged`.

        Example:
          >>> import jax.numpy as jnp
          >>> import jax_paged_attn as jpa
          >>> cache = jpa.PagedKVCache.create(1, 2, page_size=4, num_kv_heads=1, head_dim=8, dtype=jnp.float32)
          >>> step = jpa.StepMetadata.whole_sequences(num_seqs=2, length=3, page_size=4)
          >>> cache = cache.write(0, jnp.ones((6, 1, 8)), jnp.ones((6, 1, 8)), step.slot_mapping)
          >>> cache.attend_step(0, jnp.ones((6, 2, 8)), step).shape
          (6, 2, 8)
        """
        if step.cu_q_lens is None:
            return self.attend(layer, q, step.block_tables, step.kv_lens, **options)
        return self.attend_ragged(layer, q, step.kv_lens, step.block_tables, step.cu_q_lens, step.num_seqs, **options)

    def layer(self, index: int | Array, block_tables: ArrayLike) -> tuple[Array, Array | None, Array]:
        """`(k_pages, v_pages, block_tables)` to give to attention in layer `index`, together with `scales(index)`.

        Without pools of values `v_pages` is None, and attention wants the keyword `value_dim=cache.value_dim` too.

        Args:
          index: 0 ≤ index < L; may be traced if the cache is stacked. A traced one outside makes all ids −1.
          block_tables: `[B, M]` int32, ids in [0, P); in a stacked cache they come back offset to the layer's pages,
            ids outside [0, P) as −1.

        Raises:
          ValueError: a layer outside [0, L), or ids that are no integers.
          TypeError: a layer that is no integer, or a traced one where the cache has one array per layer.
        """
        return self._layer("index", index, block_tables)

    def scales(self, index: int | Array) -> _Scales:
        """The keywords `k_scale` and `v_scale` of layer `index`, each None, scalar or `[K]`.

        `attend` and `write` pass them by themselves.
        """
        layer = self._number("index", index)
        return {"k_scale": _row("k_scale", self.k_scale, layer), "v_scale": _row("v_scale", self.v_scale, layer)}

    def _own(self, index: int | Array) -> dict[str, Any]:
        """The keywords of attention in layer `index` that the cache knows."""
        return {**self.scales(index), "value_dim": self.value_dim or None}

    def calibrated_scales(self, dtype: jax.typing.DTypeLike, *, margin: float = 1.1) -> _Scales:
        """Scales for an 8-bit cache, by the largest key and the largest value of each head in this one.

        The largest magnitude, times the margin, becomes the largest number of the dtype. fp8 scales are then rounded up
        to a power of two, which costs no precision and leaves more room. Run sample prompts through the model with this
        cache first. All pages count, also those of no sequence. Not for traced caches.

        Args:
          dtype: of the cache to come: float8_e4m3fn, float8_e5m2 or int8.
          margin: multiplies the largest magnitudes, as room for numbers beyond those of the prompts.

        Returns:
          A dict of `k_scale` and `v_scale`, float32 `[L, K]`, keywords of `create`. A head that is zero throughout has
          scale 1. Without pools of values `v_scale` is None.

        Raises:
          ValueError: a dtype of other than 8 bits, pages that have 8 bits already, a margin that is not positive, or
            keys or values that are NaN or infinite.

        Example:
          >>> import jax.numpy as jnp
          >>> import jax_paged_attn as jpa
          >>> sizes = {"num_pages": 2, "page_size": 4, "num_kv_heads": 2, "head_dim": 8}
          >>> full = jpa.PagedKVCache.create(3, **sizes, dtype=jnp.float32)
          >>> full = full.write(0, jnp.full((1, 2, 8), -127.0), jnp.ones((1, 2, 8)), jnp.array([0], jnp.int32))
          >>> scales = full.calibrated_scales(jnp.int8, margin=2)
          >>> scales["k_scale"].tolist()
          [[2.0, 2.0], [1.0, 1.0], [1.0, 1.0]]
          >>> cache = jpa.PagedKVCache.create(3, **sizes, dtype=jnp.int8, **scales)
        """
        if str(self.k_pages[0].dtype) in _checks.QUANTIZED_DTYPES:
            raise ValueError(f"k_pages: expected {' or '.join(_checks.COMPUTE_DTYPES)}, got {self.k_pages[0].dtype}")

        def scale(name: str, pools: tuple[Array, ...]) -> Array:
            largest = jax.device_get(_largest_per_head(pools, self.num_layers))
            return scales_from_largest(name, largest, dtype, margin)

        v_scale = scale("v_pages", self.v_pages) if self.v_pages else None
        return {"k_scale": scale("k_pages", self.k_pages), "v_scale": v_scale}

    def write(self, index: int | Array, k: ArrayLike, v: ArrayLike | None, slot_mapping: ArrayLike) -> "PagedKVCache":
        """The cache after `write_kv_pages` of `k [T, K, H]` and `v [T, K, Hv]` at `slot_mapping [T]` in layer `index`.

        Without pools of values `v` is None.

        Raises:
          ValueError, TypeError: as `layer` and `write_kv_pages`. A traced layer outside [0, L) writes nothing.
        """
        layer = self._number("index", index)
        pool = layer if isinstance(layer, int) and not self.stacked else 0
        if self.stacked:
            slot_mapping = _checks.as_int32("slot_mapping", slot_mapping)
            _debug.check_slots(slot_mapping, self.num_pages * self.page_size)
            slot_mapping = self._offset(slot_mapping, layer, self.num_pages * self.page_size)
        write: Any = write_kv_pages  # of both forms
        v_pages = self.v_pages[pool] if self.v_pages else None
        k_new, v_new = write(self.k_pages[pool], v_pages, k, v, slot_mapping, **self.scales(index))
        k_pools = _replaced(self.k_pages, pool, k_new)
        v_pools = _replaced(self.v_pages, pool, v_new) if self.v_pages else ()
        return dataclasses.replace(self, k_pages=k_pools, v_pages=v_pools)

    def copy(self, src: ArrayLike, dst: ArrayLike) -> "PagedKVCache":
        """The cache after `copy_kv_pages` of pages `src [n]` to `dst [n]` in every layer."""
        if self.stacked:
            layers = jnp.arange(self.num_layers, dtype=jnp.int32)[:, None]
            dims = _checks.Dims()
            arrays = {"src": _checks.as_int32("src", src), "dst": _checks.as_int32("dst", dst)}
            for name, ids in arrays.items():
                dims.match(name, ids, "n", ("int32",))
            _debug.check_copy(self.num_pages, arrays["src"], arrays["dst"])
            src, dst = (self._offset(ids[None], layers, self.num_pages).reshape(-1) for ids in arrays.values())
        if not self.v_pages:
            k_pools = tuple(copy_kv_pages(k, None, src, dst)[0] for k in self.k_pages)
            return dataclasses.replace(self, k_pages=k_pools)
        pools = [copy_kv_pages(k, v, src, dst) for k, v in zip(self.k_pages, self.v_pages, strict=True)]
        return dataclasses.replace(self, k_pages=tuple(k for k, _ in pools), v_pages=tuple(v for _, v in pools))

    def _layer(self, name: str, index: int | Array, block_tables: ArrayLike) -> tuple[Array, Array | None, Array]:
        layer = self._number(name, index)
        tables = _checks.as_int32("block_tables", block_tables)
        pool = layer if isinstance(layer, int) and not self.stacked else 0
        if self.stacked or not isinstance(layer, int):
            tables = self._offset(tables, layer, self.num_pages)
        return self.k_pages[pool], self.v_pages[pool] if self.v_pages else None, tables

    def _number(self, name: str, index: int | Array) -> int | Array:
        """A concrete layer as an int in [0, L), a traced one as an int32 scalar."""
        expected = f"{name}: expected a layer in [0, {self.num_layers})"
        dtype = getattr(index, "dtype", None)
        if dtype is not None and not (jnp.issubdtype(dtype, jnp.integer) and np.ndim(index) == 0):
            raise TypeError(f"{expected}, got {dtype}{list(np.shape(index))}")
        if isinstance(index, Tracer):
            if not self.stacked:
                raise TypeError(
                    f"{name}: expected a static layer number, since the cache has one array per layer; got a tracer"
                )
            return _checks.as_int32(name, index)
        try:
            layer = operator.index(jax.device_get(index)) if not isinstance(index, bool) else None
        except TypeError:
            layer = None
        if layer is None:
            raise TypeError(f"{expected}, got {type(index).__name__} {index!r}")
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"{expected}, got {layer}")
        return layer

    def _offset(self, ids: Array, layer: int | Array, per_layer: int) -> Array:
        """Ids of a layer as ids of the flat pool; −1 for those that the layer does not have, and in no layer."""
        if jnp.ndim(layer) == 0:
            _debug.check_layer(layer, self.num_layers)
        # A number of the host's goes to the device by an explicit transfer, which `jax.transfer_guard` lets pass.
        number = jax.device_put(np.int32(layer)) if isinstance(layer, int) else layer
        return _shifted(ids, number, per_layer, self.num_layers)


@functools.partial(_modes.compiled, static_argnums=(2, 3))
def _shifted(ids: Array, layer: Array, per_layer: int, num_layers: int) -> Array:
    inside = (ids >= 0) & (ids < per_layer) & (layer >= 0) & (layer < num_layers)
    return jnp.where(inside, ids + layer * per_layer, -1)


@functools.partial(_modes.compiled, static_argnums=1)
def _largest_per_head(pools: tuple[Array, ...], num_layers: int) -> Array:
    """The largest magnitudes in the pools of all layers, float32 `[L, K]`."""
    layers = [part for pool in pools for part in jnp.split(pool, num_layers // len(pools))]
    return jnp.stack([jnp.abs(pages).max((0, 1, 3)).astype(jnp.float32) for pages in layers])


def scales_from_largest(name: str, largest: np.ndarray, dtype: jax.typing.DTypeLike, margin: float) -> Array:
    """The scales, float32, for numbers up to these magnitudes, which errors call `name`; see `calibrated_scales`."""
    page_dtype = _page_dtype(dtype)
    if str(page_dtype) not in _checks.QUANTIZED_DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(_checks.QUANTIZED_DTYPES)}, got {page_dtype}")
    if not np.isfinite(largest).all():
        raise ValueError(f"{name}: expected finite numbers, got {largest[~np.isfinite(largest)][0]}")
    limits = jnp.iinfo(page_dtype) if page_dtype == jnp.int8 else jnp.finfo(page_dtype)
    scales = largest.astype(np.float64) * _checks.static_positive("margin", margin) / float(limits.max)
    scales = np.clip(scales, np.finfo(np.float32).tiny, 2.0**127)  # what float32 holds in full precision
    if page_dtype != jnp.int8:
        scales = 2.0 ** np.ceil(np.log2(scales))
    return jax.device_put(np.where(largest > 0, scales, 1.0).astype(np.float32))


def _zero_pools(shape: tuple[int, ...], dtype: np.dtype, count: int) -> tuple[Array, ...]:
    return tuple(_modes.zeros(shape, jnp.dtype(dtype)) for _ in range(count))


def _replaced(pools: tuple[Array, ...], index: int, pool: Array) -> tuple[Array, ...]:
    return (*pools[:index], pool, *pools[index + 1 :])


def _size_of(name: str, given: int | None, allocator: _PagesOf) -> int:
    """`num_pages` or `page_size` of the allocator; ValueError if another one is given beside it."""
    size = getattr(allocator, name, None)
    if size is None:
        raise TypeError(f"allocator: expected a PageAllocator, or what has num_pages and page_size, got {allocator!r}")
    if given is not None and _checks.static_count(name, given) != size:
        raise ValueError(f"{name}: expected {size}, that of the allocator, got {given}")
    return size


def _page_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    try:
        page_dtype = jnp.dtype(dtype) if dtype is not None else None
    except TypeError:
        page_dtype = None
    if page_dtype is None or str(page_dtype) not in _checks.PAGE_DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(_checks.PAGE_DTYPES)}, got {page_dtype or repr(dtype)}")
    return page_dtype


def _stored_scale(name: str, scale: ArrayLike | None, num_layers: int, kv_heads: int, dtype: np.dtype) -> Array | None:
    """A scale as a cache keeps it, checked: float32, scalar, `[K]` or `[L, K]`; None where it is absent."""
    if scale is None:
        if dtype == jnp.int8:
            raise ValueError(f"{name}: required for int8 pages, got None")
        return None
    array = _checks.as_float32(name, scale)
    if array.dtype != jnp.float32:
        raise ValueError(f"{name}: expected dtype float32, got {array.dtype}")
    if array.shape not in ((), (kv_heads,), (num_layers, kv_heads)):
        shapes = f"(), [K] = ({kv_heads},) or [L, K] = ({num_layers}, {kv_heads})"
        raise ValueError(f"{name}: expected shape {shapes}, got shape {array.shape}")
    _checks.check_scales(name, scale, array)
    return array


def _row(name: str, scale: Array | None, layer: int | Array) -> Array | None:
    """The scale of one layer, where each has its own."""
    if scale is None or np.ndim(scale) < 2:
        return scale
    _checks.check_scales(name, scale, scale)
    row = jax.lax.dynamic_index_in_dim(scale, layer, keepdims=False)
    _checks.note_good_scales(row)
    return row
