"""What the engine asks of a model: a small protocol, one for layer groups, and an adapter for Flax NNX modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from jax_paged_attn._step import StepMetadata

if TYPE_CHECKING:
    from flax import nnx


class Model(Protocol):
    """A decoder that the engine can serve. `hidden` and `logits` are traced; any pytrees will do as weights and cache.

    A model in Linen, Equinox or plain JAX is a class with these members around its functions; `NnxModel` is one for
    Flax NNX. The cache is donated to each step, so `hidden` has to return a new one of the same shapes.

    Attributes:
      vocab_size: V; token ids are in [0, V).
      max_len: the longest context in tokens.
      weights: a pytree of arrays, an operand of each step.

    Example:
      One layer of attention over token embeddings, in plain JAX.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> from jax_paged_attn.serving import Engine, Request
      >>> class OneLayer:
      ...     vocab_size, max_len = 32, 64
      ...     weights = {"embedding": jax.random.normal(jax.random.key(0), (32, 2, 8))}
      ...     def make_cache(self, num_pages, page_size):
      ...         return jpa.PagedKVCache.create(1, num_pages, page_size, 2, 8, jnp.float32)
      ...     def hidden(self, weights, cache, tokens, step):
      ...         x = weights["embedding"][tokens]
      ...         cache = cache.write(0, x, x, step.slot_mapping)
      ...         return x + cache.attend_step(0, x, step), cache
      ...     def logits(self, weights, hidden):
      ...         return jnp.einsum("bkh,vkh->bv", hidden, weights["embedding"])
      >>> engine = Engine(OneLayer(), num_pages=16, page_size=4, max_seqs=2)
      >>> generation = engine.submit(Request([1, 2, 3], max_new_tokens=5))
      >>> engine.run()
      >>> len(generation.output), generation.finish_reason
      (5, 'length')
    """

    vocab_size: int
    max_len: int
    weights: Any

    def make_cache(self, num_pages: int, page_size: int) -> Any:
        """An empty cache of `num_pages` pages per layer: a pytree of arrays, sharded as the steps are to use it."""
        ...

    def hidden(self, weights: Any, cache: Any, tokens: Array, step: StepMetadata) -> tuple[Array, Any]:
        """Hidden states of the tokens `[T]` of a step, `[T, ...]`, and the cache with their keys and values."""
        ...

    def logits(self, weights: Any, hidden: Array) -> Array:
        """Logits `[R, V]` of some of the hidden states, `[R, ...]`."""
        ...


class GroupedModel(Protocol):
    """A `Model` whose layers have different sliding windows: the layers with the same one are a layer group.

    Each group has page ids, slots and block tables of its own, and pools of its own size. So layers with a window hold
    only the pages of their window.

    Attributes:
      windows: of each group, in tokens, each once; None for layers that see everything.
      vocab_size, max_len, weights: see `Model`.

    Example:
      Two layers, of which the first one sees the last 8 tokens.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> from jax_paged_attn.serving import Engine, Request
      >>> class TwoLayers:
      ...     vocab_size, max_len, windows = 32, 64, (8, None)
      ...     weights = {"embedding": jax.random.normal(jax.random.key(0), (32, 2, 8))}
      ...     def make_cache(self, num_pages, page_size):
      ...         return [jpa.PagedKVCache.create(1, pages, page_size, 2, 8, jnp.float32) for pages in num_pages]
      ...     def hidden(self, weights, caches, tokens, steps):
      ...         x, caches = weights["embedding"][tokens], list(caches)
      ...         for group, step in enumerate(steps):
      ...             caches[group] = caches[group].write(0, x, x, step.slot_mapping)
      ...             x = x + caches[group].attend_step(0, x, step, sliding_window=self.windows[group])
      ...         return x, caches
      ...     def logits(self, weights, hidden):
      ...         return jnp.einsum("bkh,vkh->bv", hidden, weights["embedding"])
      >>> engine = Engine(TwoLayers(), num_pages=64, page_size=4, max_seqs=2, buckets=(8,))
      >>> [pool.num_pages for pool in engine.pools]
      [25, 64]
      >>> generation = engine.submit(Request([1, 2, 3], max_new_tokens=50))
      >>> engine.run()
      >>> len(generation.output)
      50
    """

    vocab_size: int
    max_len: int
    weights: Any
    windows: Sequence[int | None]

    def make_cache(self, num_pages: tuple[int, ...], page_size: int) -> Any:
        """See `Model.make_cache`; `num_pages[i]` are the pages of each layer of group i."""
        ...

    def hidden(self, weights: Any, cache: Any, tokens: Array, steps: tuple[StepMetadata, ...], /) -> tuple[Array, Any]:
        """See `Model.hidden`; `steps[i]` is for the layers of group i. Only slots and block tables differ."""
        ...

    def logits(self, weights: Any, hidden: Array) -> Array:
        """See `Model.logits`."""
        ...


class OneGroup:
    """A `Model` as a `GroupedModel` of a single group, which sees everything."""

    windows: Sequence[int | None] = (None,)

    def __init__(self, model: Model):
        self._model = model
        self.vocab_size, self.max_len = model.vocab_size, model.max_len
        self.logits = model.logits

    @property
    def weights(self) -> Any:
        """See `Model.weights`."""
        return self._model.weights

    def make_cache(self, num_pages: tuple[int, ...], page_size: int) -> Any:
        """See `Model.make_cache`."""
        return self._model.make_cache(num_pages[0], page_size)

    def hidden(self, weights: Any, cache: Any, tokens: Array, steps: tuple[StepMetadata, ...]) -> tuple[Array, Any]:
        """See `Model.hidden`."""
        return self._model.hidden(weights, cache, tokens, steps[0])


def grouped(model: Any) -> GroupedModel:
    """A `GroupedModel` as it is, and a `Model` as one."""
    return OneGroup(model) if getattr(model, "windows", None) is None else model


class NnxModel:
    """A Flax NNX module as a `Model`. The module stays as it is: the engine works with a twin that shares its arrays.

    Args:
      module: has ``hidden(tokens, step)`` and ``logits(hidden)``, and `jax_paged_attn.nnx.CacheVariable` pages once
        `init_cache` was called. Its ``nnx.Param`` variables are the weights of the model.
      vocab_size, max_len: see `Model`.
      windows: of the module's layer groups. Then `init_cache` gets the pages of each group, and ``hidden`` the step of
        each: see `GroupedModel`. None for a module without groups.
      init_cache: called as ``init_cache(module, num_pages, page_size)`` on the twin; by default the module's own
        ``init_cache(num_pages, page_size)``. It may choose a dtype and scales, or shard the pages.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jax_paged_attn.nnx import PagedSelfAttention
      >>> from jax_paged_attn.serving import Engine, NnxModel, Request
      >>> class OneLayer(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.embed = nnx.Embed(32, 16, rngs=rngs)
      ...         self.attention = PagedSelfAttention(16, num_heads=2, num_kv_heads=1, head_dim=8, rngs=rngs)
      ...     def init_cache(self, num_pages, page_size):
      ...         self.attention.init_cache(num_pages, page_size, jnp.float32)
      ...     def hidden(self, tokens, step):
      ...         x = self.embed(tokens)
      ...         return x + self.attention(x, step)
      ...     def logits(self, hidden):
      ...         return self.embed.attend(hidden)
      >>> engine = Engine(NnxModel(OneLayer(nnx.Rngs(0)), vocab_size=32, max_len=64), num_pages=16, max_seqs=2)
      >>> generation = engine.submit(Request([1, 2, 3], max_new_tokens=5))
      >>> engine.run()
      >>> len(generation.output)
      5
    """

    def __init__(
        self,
        module: nnx.Module,
        *,
        vocab_size: int,
        max_len: int,
        windows: Sequence[int | None] | None = None,
        init_cache: Callable[[Any, Any, int], object] | None = None,
    ):
        self.vocab_size, self.max_len, self.windows = vocab_size, max_len, windows
        self._nnx, self._pages = _flax()
        self._twin: Any = self._nnx.merge(*self._nnx.split(module))
        self._init_cache = init_cache or (lambda twin, num_pages, page_size: twin.init_cache(num_pages, page_size))

    @property
    def weights(self) -> list[Array]:
        """The module's parameters as plain arrays, which cost less per call than an `nnx.State`."""
        return jax.tree.leaves(self._split()[2])

    def make_cache(self, num_pages: int | tuple[int, ...], page_size: int) -> list[Array]:
        """See `Model.make_cache` and `GroupedModel.make_cache`."""
        self._init_cache(self._twin, num_pages, page_size)
        self._graph, cache, weights, self._constants = self._split()
        pages, self._cache_tree = jax.tree.flatten(cache)
        self._weights_tree = jax.tree.structure(weights)
        return pages

    def hidden(
        self,
        weights: list[Array],
        cache: list[Array],
        tokens: Array,
        step: StepMetadata | tuple[StepMetadata, ...],
    ) -> tuple[Array, Any]:
        """See `Model.hidden` and `GroupedModel.hidden`."""
        module = self._merged(weights, cache)
        hidden = module.hidden(tokens, step)
        return hidden, jax.tree.leaves(self._nnx.state(module, self._pages))

    def logits(self, weights: list[Array], hidden: Array) -> Array:
        """See `Model.logits`."""
        return self._merged(weights, [jnp.zeros(())] * self._cache_tree.num_leaves).logits(hidden)

    def _split(self) -> Any:
        return self._nnx.split(self._twin, self._pages, self._nnx.Param, ...)

    def _merged(self, weights: list[Array], cache: list[Array]) -> Any:
        states = jax.tree.unflatten(self._cache_tree, cache), jax.tree.unflatten(self._weights_tree, weights)
        return self._nnx.merge(self._graph, *states, self._constants)


def _flax() -> tuple[Any, type]:
    """`flax.nnx` and the type of pages, which only `NnxModel` needs: the engine itself runs without Flax."""
    from flax import nnx

    from jax_paged_attn.nnx import CacheVariable

    return nnx, CacheVariable
