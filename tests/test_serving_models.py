"""One small transformer in Flax NNX, Flax Linen, Equinox and plain JAX, each as the engine's `Model`.

All have the same weights, and the tokens of each are those of a dense forward pass in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from jax_paged_attn import PagedKVCache, StepMetadata
from jax_paged_attn.nnx import PagedAttention
from jax_paged_attn.serving import Engine, Generation, GroupedModel, Model, NnxModel, Request

VOCAB, WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, MAX_LEN = 61, 16, 32, 4, 2, 8, 48
LAYERS = 2
PAGE_SIZE = 4
WINDOWS = (5, None)  # of the layers of some models

Weights = dict[str, Any]  # "embed" [V, D], "positions" [max_len, D], "head" [D, V]; of all layers [L, inputs, outputs]
MATRICES = ("q", "k", "v", "o", "up", "down")


def make_weights(seed: int) -> Weights:
    draw = np.random.default_rng(seed)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"q": (WIDTH, q), "k": (WIDTH, kv), "v": (WIDTH, kv), "o": (q, WIDTH)}
    shapes |= {"up": (WIDTH, INNER), "down": (INNER, WIDTH)}
    layers = {name: draw.normal(0, 1.5 * shape[0] ** -0.5, (LAYERS, *shape)) for name, shape in shapes.items()}
    others = {"embed": (VOCAB, WIDTH), "positions": (MAX_LEN, WIDTH), "head": (WIDTH, VOCAB)}
    weights = layers | {name: draw.normal(0, 1, shape) for name, shape in others.items()}
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


OLD, NEW = make_weights(0), make_weights(1)


def norm(x: Any) -> Any:
    return x * ((x**2).mean(-1, keepdims=True) + 1e-6) ** -0.5


def heads(x: Array) -> Array:
    return x.reshape(len(x), -1, HEAD_DIM)


def dense(weights: Weights, tokens: list[int], windows: tuple[int | None, ...] = (None, None)) -> np.ndarray:
    """Logits `[T, V]` in float64, without cache, pages or JAX."""
    weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
    index = np.arange(len(tokens))
    x = weights["embed"][tokens] + weights["positions"][index]
    for layer, window in enumerate(windows):
        w = {name: weights[name][layer] for name in MATRICES}
        q, k, v = ((norm(x) @ w[name]).reshape(len(x), -1, HEAD_DIM) for name in "qkv")
        k, v = (np.repeat(y, HEADS // KV_HEADS, axis=1) for y in (k, v))
        scores = np.einsum("qnh,knh->nqk", q, k) * HEAD_DIM**-0.5
        is_seen = (index <= index[:, None]) & (index > index[:, None] - (window or len(tokens)))
        probabilities = np.exp(np.where(is_seen, scores, -np.inf))
        probabilities /= probabilities.sum(-1, keepdims=True)
        x = x + np.einsum("nqk,knh->qnh", probabilities, v).reshape(len(x), -1) @ w["o"]
        up = norm(x) @ w["up"]
        x = x + up / (1 + np.exp(-up)) @ w["down"]
    return norm(x) @ weights["head"]


def check(generations: list[Generation], weights: Weights, **options: Any) -> None:
    """The greedy tokens are those of the dense pass, in which no two are nearly as likely."""
    for generation in generations:
        start = len(generation.request.prompt)
        logits = dense(weights, generation.tokens, **options)[start - 1 : -1]
        first, second = np.sort(logits, axis=-1)[:, ::-1][:, :2].T
        assert (first - second).min() > 1e-4, "choose other weights: f32 cannot decide this"
        assert generation.finish_reason == "length"
        assert generation.output == logits.argmax(-1).tolist()


# ---- the transformer in four ways


class Scanned:
    """Plain JAX: a `lax.scan` over the layers, with one pool for all of them."""

    vocab_size, max_len = VOCAB, MAX_LEN

    def __init__(self, weights: Weights):
        self.weights = jax.tree.map(jnp.asarray, weights)

    def make_cache(self, num_pages: int, page_size: int) -> PagedKVCache:
        return PagedKVCache.create(LAYERS, num_pages, page_size, KV_HEADS, HEAD_DIM, dtype=jnp.float32, stacked=True)

    def hidden(
        self, weights: Weights, cache: PagedKVCache, tokens: Array, step: StepMetadata
    ) -> tuple[Array, PagedKVCache]:
        def layer(carry: tuple[Array, PagedKVCache], xs: tuple[Array, Weights]) -> tuple[Any, None]:
            (x, cache), (number, w) = carry, xs
            q, k, v = (heads(norm(x) @ w[name]) for name in "qkv")
            cache = cache.write(number, k, v, step.slot_mapping)
            x = x + cache.attend_step(number, q, step).reshape(len(x), -1) @ w["o"]
            return (x + jax.nn.silu(norm(x) @ w["up"]) @ w["down"], cache), None

        x = weights["embed"][tokens] + weights["positions"][step.positions]
        layers = jnp.arange(LAYERS, dtype=jnp.int32), {name: weights[name] for name in MATRICES}
        (x, cache), _ = jax.lax.scan(layer, (x, cache), layers)
        return norm(x), cache

    def logits(self, weights: Weights, hidden: Array) -> Array:
        return hidden @ weights["head"]


class Grouped:
    """Plain JAX with a layer group, and so a cache, per layer."""

    vocab_size, max_len, windows = VOCAB, MAX_LEN, WINDOWS

    def __init__(self, weights: Weights):
        self.weights = jax.tree.map(jnp.asarray, weights)

    def make_cache(self, num_pages: tuple[int, ...], page_size: int) -> list[PagedKVCache]:
        return [PagedKVCache.create(1, pages, page_size, KV_HEADS, HEAD_DIM, dtype=jnp.float32) for pages in num_pages]

    def hidden(
        self, weights: Weights, caches: list[PagedKVCache], tokens: Array, steps: tuple[StepMetadata, ...]
    ) -> tuple[Array, list[PagedKVCache]]:
        x, caches = weights["embed"][tokens] + weights["positions"][steps[0].positions], list(caches)
        for layer, (step, window) in enumerate(zip(steps, self.windows, strict=True)):
            w = {name: weights[name][layer] for name in MATRICES}
            q, k, v = (heads(norm(x) @ w[name]) for name in "qkv")
            caches[layer] = caches[layer].write(0, k, v, step.slot_mapping)
            x = x + caches[layer].attend_step(0, q, step, sliding_window=window).reshape(len(x), -1) @ w["o"]
            x = x + jax.nn.silu(norm(x) @ w["up"]) @ w["down"]
        return norm(x), caches

    def logits(self, weights: Weights, hidden: Array) -> Array:
        return hidden @ weights["head"]


class NnxTransformer(nnx.Module):
    """Layers see everything; or each has a window of `windows`, and is a layer group."""

    def __init__(self, weights: Weights, windows: tuple[int | None, ...] = (None, None)):
        rngs = nnx.Rngs(0)

        def linear(kernel: np.ndarray) -> nnx.Linear:
            return nnx.Linear(*kernel.shape, use_bias=False, kernel_init=lambda *_: jnp.asarray(kernel), rngs=rngs)

        def embed(table: np.ndarray) -> nnx.Embed:
            return nnx.Embed(*table.shape, embedding_init=lambda *_: jnp.asarray(table), rngs=rngs)

        self.embed, self.positions = embed(weights["embed"]), embed(weights["positions"])
        self.projections = nnx.List(
            [nnx.Dict({name: linear(weights[name][layer]) for name in MATRICES}) for layer in range(LAYERS)]
        )
        sizes = (HEADS, KV_HEADS, HEAD_DIM)
        self.attentions = nnx.List([PagedAttention(*sizes, rope_theta=None, sliding_window=w) for w in windows])
        self.head = linear(weights["head"])

    def init_cache(self, num_pages: int | tuple[int, ...], page_size: int) -> None:
        for attention, pages in zip(self.attentions, _of_layers(num_pages), strict=True):
            attention.init_cache(pages, page_size, jnp.float32)

    def hidden(self, tokens: Array, steps: StepMetadata | tuple[StepMetadata, ...]) -> Array:
        of_layers = _of_layers(steps)
        x = self.embed(tokens) + self.positions(jnp.asarray(of_layers[0].positions))
        for w, attention, step in zip(self.projections, self.attentions, of_layers, strict=True):
            q, k, v = (heads(w[name](norm(x))) for name in "qkv")
            x = x + w["o"](attention(q, k, v, step).reshape(len(x), -1))
            x = x + w["down"](jax.nn.silu(w["up"](norm(x))))
        return norm(x)

    def logits(self, hidden: Array) -> Array:
        return self.head(hidden)


def _of_layers(values: Any) -> tuple[Any, ...]:
    """What the engine gives a model, for each layer: of its group, or the same for all."""
    return values if isinstance(values, tuple) else (values,) * LAYERS


class LinenLayer(nn.Module):
    window: int | None

    @nn.compact
    def __call__(self, x: Array, step: StepMetadata) -> Array:
        def dense(name: str, size: int, x: Array) -> Array:
            return nn.Dense(size, use_bias=False, name=name)(x)

        sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        q, k, v = (heads(dense(name, size, norm(x))) for name, size in sizes.items())
        pages: Any = self.variable("cache", "pages", lambda: None)
        pages.value = pages.value.write(0, k, v, step.slot_mapping)
        out = pages.value.attend_step(0, q, step, sliding_window=self.window)
        x = x + dense("o", WIDTH, out.reshape(len(x), -1))
        return x + dense("down", WIDTH, jax.nn.silu(dense("up", INNER, norm(x))))


class LinenTransformer(nn.Module):
    def setup(self) -> None:
        self.embed, self.positions = nn.Embed(VOCAB, WIDTH), nn.Embed(MAX_LEN, WIDTH)
        self.layers = [LinenLayer(window) for window in WINDOWS]
        self.head = nn.Dense(VOCAB, use_bias=False)

    def hidden(self, tokens: Array, step: StepMetadata) -> Array:
        x = self.embed(tokens) + self.positions(step.positions)
        for layer in self.layers:
            x = layer(x, step)
        return norm(x)

    def logits(self, hidden: Array) -> Array:
        return self.head(hidden)


class LinenModel:
    """Linen: the cache is a collection of variables, one `PagedKVCache` per layer; the first layer has a window."""

    vocab_size, max_len = VOCAB, MAX_LEN

    def __init__(self, weights: Weights):
        layers = {
            f"layers_{layer}": {name: {"kernel": jnp.asarray(weights[name][layer])} for name in MATRICES}
            for layer in range(LAYERS)
        }
        embeddings = {name: {"embedding": jnp.asarray(weights[name])} for name in ("embed", "positions")}
        self.weights = layers | embeddings | {"head": {"kernel": jnp.asarray(weights["head"])}}
        self.module = LinenTransformer()

    def make_cache(self, num_pages: int, page_size: int) -> Any:
        def layer() -> PagedKVCache:
            return PagedKVCache.create(1, num_pages, page_size, KV_HEADS, HEAD_DIM, dtype=jnp.float32)

        return {f"layers_{number}": {"pages": layer()} for number in range(LAYERS)}

    def hidden(self, weights: Any, cache: Any, tokens: Array, step: StepMetadata) -> tuple[Array, Any]:
        variables = {"params": weights, "cache": cache}
        hidden, changed = self.module.apply(variables, tokens, step, method="hidden", mutable="cache")
        return hidden, changed["cache"]

    def logits(self, weights: Any, hidden: Array) -> Any:
        return self.module.apply({"params": weights}, hidden, method="logits")


def equinox_model(weights: Weights) -> Model:
    """Equinox: the module itself is the pytree of weights."""
    eqx = pytest.importorskip("equinox")

    def linear(kernel: np.ndarray) -> Any:
        blank = eqx.nn.Linear(*kernel.shape, use_bias=False, key=jax.random.key(0))
        return eqx.tree_at(lambda module: module.weight, blank, jnp.asarray(kernel.T))

    class Transformer(eqx.Module):
        embed: Any
        positions: Any
        layers: list[dict[str, Any]]
        head: Any

        def __init__(self):
            self.embed = eqx.nn.Embedding(weight=jnp.asarray(weights["embed"]))
            self.positions = eqx.nn.Embedding(weight=jnp.asarray(weights["positions"]))
            self.layers = [{name: linear(weights[name][layer]) for name in MATRICES} for layer in range(LAYERS)]
            self.head = linear(weights["head"])

        def hidden(self, cache: PagedKVCache, tokens: Array, step: StepMetadata) -> tuple[Array, PagedKVCache]:
            x = jax.vmap(self.embed)(tokens) + jax.vmap(self.positions)(step.positions)
            for number, layer in enumerate(self.layers):
                w = {name: jax.vmap(projection) for name, projection in layer.items()}
                q, k, v = (heads(w[name](norm(x))) for name in "qkv")
                cache = cache.write(number, k, v, step.slot_mapping)
                x = x + w["o"](cache.attend_step(number, q, step).reshape(len(x), -1))
                x = x + w["down"](jax.nn.silu(w["up"](norm(x))))
            return norm(x), cache

    class EquinoxModel:
        vocab_size, max_len, weights = VOCAB, MAX_LEN, Transformer()

        def make_cache(self, num_pages: int, page_size: int) -> PagedKVCache:
            return PagedKVCache.create(LAYERS, num_pages, page_size, KV_HEADS, HEAD_DIM, dtype=jnp.float32)

        def hidden(self, weights: Any, cache: Any, tokens: Array, step: StepMetadata) -> tuple[Array, Any]:
            return weights.hidden(cache, tokens, step)

        def logits(self, weights: Any, hidden: Array) -> Array:
            return jax.vmap(weights.head)(hidden)

    return EquinoxModel()


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Products of float32 are rounded to fewer bits on GPUs otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


def nnx_model(weights: Weights) -> Model:
    return NnxModel(NnxTransformer(weights), vocab_size=VOCAB, max_len=MAX_LEN)


def grouped_nnx_model(weights: Weights) -> Model:
    return NnxModel(NnxTransformer(weights, WINDOWS), vocab_size=VOCAB, max_len=MAX_LEN, windows=WINDOWS)


def make_engine(model: Model | GroupedModel, **options: Any) -> Engine:
    return Engine(model, page_size=PAGE_SIZE, max_seqs=4, buckets=(4, 16), **{"num_pages": 20, **options})


def run(engine: Engine, requests: list[Request]) -> list[Generation]:
    generations = [engine.submit(request) for request in requests]
    engine.run()
    return generations


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


# ---- all of them give the tokens of the dense pass


MODELS = [nnx_model, LinenModel, equinox_model, Scanned, grouped_nnx_model, Grouped]
WITH_WINDOWS = (LinenModel, grouped_nnx_model, Grouped)


@pytest.mark.parametrize("make_model", MODELS, ids=lambda make: make.__name__)
def test_tokens_are_those_of_a_dense_pass(make_model: Callable[[Weights], Model]) -> None:
    """Prompts longer than a step, prefixes that are found, repeated decode steps, and a pool that is too small."""
    engine = make_engine(make_model(OLD), decode_steps=4, num_pages=14)
    requests = [Request([*prompt(0, 18)[: 6 * (i % 4)], *prompt(i, 8)], 19 - i) for i in range(8)]
    generations = run(engine, requests)
    check(generations, OLD, windows=WINDOWS if make_model in WITH_WINDOWS else (None, None))
    stats = engine.stats
    assert any(len(request.prompt) > 16 for request in requests)
    assert min(stats.preemptions, stats.cached_tokens) > 0
    assert stats.dispatches < stats.steps
    assert engine.pages_in_use == 0


@pytest.mark.parametrize(("make_model", "windows"), [(Scanned, (None, None)), (Grouped, WINDOWS)])
def test_drafts_give_the_tokens_of_a_dense_pass(make_model: Any, windows: tuple[int | None, ...]) -> None:
    """With weak positions the model repeats itself, so that some drafts are right."""
    weights = OLD | {"positions": OLD["positions"] / 10}
    engine = make_engine(make_model(weights), num_drafts=3)
    check(run(engine, [Request(prompt(seed, 6), 30) for seed in range(4)]), weights, windows=windows)
    assert 0 < engine.stats.accepted < engine.stats.drafted


# ---- new weights


def test_new_weights_give_the_new_models_tokens() -> None:
    engine = make_engine(Scanned(OLD))
    request = Request(prompt(0, 13), 9)
    check(run(engine, [request, request]), OLD)
    stats = engine.stats
    before = stats.cached_tokens

    running = engine.submit(Request(prompt(0, 13), 20))
    for _ in range(4):
        engine.step()
    assert stats.cached_tokens == before + 12
    traces = engine.traces
    engine.update_weights(NEW)  # arrays of NumPy will do
    check(run(engine, [request]), NEW)  # beside the running one, which has the old pages of this prompt
    assert running.finish_reason is None or len(running.output) == 20
    assert stats.cached_tokens == before + 12
    engine.run()
    check(run(engine, [request]), NEW)
    assert stats.cached_tokens == before + 24
    assert engine.traces == traces
    assert (len(running.output), running.output[:2]) == (20, run(make_engine(Scanned(OLD)), [request])[0].output[:2])


def test_new_weights_of_another_form_are_refused() -> None:
    engine = make_engine(Scanned(OLD))
    generation = engine.submit(Request(prompt(0, 13), 6))
    engine.step()
    with pytest.raises(ValueError, match=r"^weights: expected the structure PyTreeDef.*, got PyTreeDef"):
        engine.update_weights({name: weight for name, weight in NEW.items() if name != "head"})
    with pytest.raises(ValueError, match=r"^weights: expected leaf \d+ as float32\[16,? 61\], got float32\[16,? 60\]"):
        engine.update_weights(NEW | {"head": NEW["head"][:, 1:]})
    with pytest.raises(ValueError, match=r"^weights: expected leaf \d+ as float32\[16,? 61\], got int32"):
        engine.update_weights(NEW | {"head": NEW["head"].astype(np.int32)})
    engine.run()
    check([generation], OLD)


# ---- salts


def test_prefixes_are_shared_among_equal_salts_only() -> None:
    engine = make_engine(Scanned(OLD))
    salts_and_found = [("a", 0), ("a", 12), ("b", 0), (None, 0), (("b",), 0), (tuple("b"), 12), ("a", 12), (None, 12)]
    for salt, found in salts_and_found:
        before = engine.stats.cached_tokens
        check(run(engine, [Request(prompt(0, 13), 2, salt=salt)]), OLD)
        assert engine.stats.cached_tokens == before + found


def test_salts_keep_apart_what_runs_at_once() -> None:
    engine = make_engine(Scanned(OLD))
    first = engine.submit(Request(prompt(0, 16), 12, salt=1))
    for _ in range(3):
        engine.step()
    others = [engine.submit(Request([*first.tokens[:16], 5], 3, salt=salt)) for salt in (1, 2)]
    engine.run()
    assert engine.stats.cached_tokens == 16
    check([first, *others], OLD)
