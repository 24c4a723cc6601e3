"""Every public call under every mode of JAX: the same values, or the error that the mode guarantees.

A test is one call × transformation × mode. `CALLS`, `TRANSFORMATIONS` and `MODES` are the lists; `combinations` says
which of their products exist. The results of a call without a mode are computed once, and are right in all modes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from harness import python
from jax.core import Tracer
from jax.sharding import AxisType, PartitionSpec

import jax_paged_attn as jpa
from jax_paged_attn import compat
from jax_paged_attn.nnx import PagedAttention, PagedSelfAttention, StepMetadata, apply_rope, rope_frequencies

B, T, N, K, H, P, S, M = 2, 3, 4, 2, 8, 4, 4, 2
HIDDEN = 16
TABLES = np.array([[2, 0], [1, 3]], np.int32)
LENGTHS = np.array([3, 6], np.int32)
STARTS = np.array([0, 1, 3], np.int32)  # one row of the first sequence, two of the second
SLOTS = np.array([10, 12, 13], np.int32)
FULL: dict[str, Any] = {"soft_cap": 5.0, "sliding_window": 4, "scale": 0.3}


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    values = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return (values * 20).astype(dtype) if dtype == np.int8 else values.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the package.

    Attributes:
      function: from arrays to arrays.
      operands: what it is called with.
      differentiable: how many of the leading operands have derivatives; 0 where pages of 8 bits have none.
      every: whether to transform it in every way; the others are plain, or under `jit` or `grad`.
      in_shard_map: whether it asks which device of a mesh it runs on.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    differentiable: int
    every: bool = False
    in_shard_map: bool = False


def pool(seed: int, dtype: Any = np.float32) -> Any:
    return normal(P, S, K, H, seed=seed, dtype=dtype)


def attention_calls() -> Iterator[tuple[str, Call]]:
    heads, scales = normal(N, seed=3), np.array([0.5, 2.0], np.float32)
    plain = (normal(B, N, H), pool(1), pool(2))
    rows = (normal(T, N, H), pool(1), pool(2), heads)

    def decode(*xs: Any, call: Any = jpa.paged_attention, **keywords: Any) -> Any:
        return call(*xs, return_lse=True, **keywords)

    def ragged(
        q: Any, k: Any, v: Any, sinks: Any, *where: Any, call: Any = jpa.ragged_paged_attention, **kw: Any
    ) -> Any:
        *places, k_scale, v_scale = where
        traced = {"sinks": sinks, "k_scale": k_scale, "v_scale": v_scale}
        return call(q, k, v, *places, return_lse=True, **traced, **kw)

    engines: dict[str, dict[str, Any]] = {engine: {"implementation": engine} for engine in ("cpu", "reference")}
    decodes = {**engines, "reference function": {"call": jpa.paged_attention_reference}}
    raggeds = {**engines, "reference function": {"call": jpa.ragged_paged_attention_reference}}
    where = (LENGTHS, TABLES, STARTS, np.int32(2), scales, scales[::-1].copy())
    for name, keywords in decodes.items():
        yield f"decode {name}", Call(functools.partial(decode, **keywords), (*plain, TABLES, LENGTHS), 3, name == "cpu")
    for name, keywords in raggeds.items():
        function = functools.partial(ragged, **keywords, **FULL)
        yield f"ragged {name}", Call(function, (*rows, *where), 4, name == "cpu")
    quantized = (normal(T, N, H, dtype=jnp.bfloat16), pool(1, np.int8), pool(2, np.int8))
    for name, keywords in raggeds.items():
        function = functools.partial(ragged, **keywords, causal=False)
        yield f"ragged {name} bf16 int8", Call(function, (*quantized, heads, *where), 1)

    def windowed(*xs: Any, **keywords: Any) -> Any:
        return jpa.ragged_paged_attention(*xs, sliding_window=3, causal=False, **keywords)

    yield (
        "ragged batch-invariant",
        Call(functools.partial(windowed, batch_invariant=True), (*rows[:3], LENGTHS, TABLES, STARTS), 3),
    )


def cache_calls() -> Iterator[tuple[str, Call]]:
    tokens = (normal(T, K, H, seed=4), normal(T, K, H, seed=5))
    scale = np.float32(0.5)
    yield "write", Call(jpa.write_kv_pages, (pool(1), pool(2), *tokens, SLOTS), 4, every=True)
    for dtype in (jnp.float8_e4m3fn, np.int8):

        def write(*operands: Any) -> Any:
            scales: dict[str, Any] = dict(zip(("k_scale", "v_scale"), operands[5:], strict=True))
            return jpa.write_kv_pages(*operands[:5], **scales)

        operands = (*(pool(i, dtype) for i in (1, 2)), *(x.astype(jnp.bfloat16) for x in tokens), SLOTS, scale, scale)
        yield f"write bf16 {np.dtype(dtype).name}", Call(write, operands, 0)
    pairs = (np.array([0, 1, 7], np.int32), np.array([1, 3, 2], np.int32))
    yield "copy", Call(jpa.copy_kv_pages, (pool(1), pool(2), *pairs), 2)
    for form, stacked in (("flat", False), ("stacked", True)):

        def step(k: Any, v: Any, q: Any, *rest: Any, layers: int = 1 if stacked else 2) -> Any:
            *pools, k_scale, v_scale, slots, tables, lengths = rest
            cache = jpa.PagedKVCache(tuple(pools[:layers]), tuple(pools[layers:]), k_scale, v_scale, 2)
            cache = cache.write(1, k, v, slots)
            scales: dict[str, Any] = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
            return cache.k_pages, jpa.paged_attention(q, *cache.layer(1, tables), lengths, **scales)

        def copy(*pools: Any, layers: int = 1 if stacked else 2) -> Any:
            *sides, src, dst = pools
            copied = jpa.PagedKVCache(tuple(sides[:layers]), tuple(sides[layers:]), num_layers=2).copy(src, dst)
            return copied.k_pages, copied.v_pages

        sides = [(pool(i), pool(i + 2)) for i in (1, 2)]
        pools = tuple(np.concatenate(side) for side in sides) if stacked else (*sides[0], *sides[1])
        where = (scale, scale, SLOTS, TABLES, LENGTHS)
        yield f"{form} cache step", Call(step, (*tokens, normal(B, N, H), *pools, *where), 3 + len(pools))
        yield f"{form} cache copy", Call(copy, (*pools, *pairs), len(pools))


def other_calls() -> Iterator[tuple[str, Call]]:
    states = (normal(2, B, N, H, seed=6), normal(2, B, N, seed=7))
    yield "merge", Call(jpa.merge_attention_states, states, 2, every=True)
    # `list` of a traced array indexes it with numbers of the host, so that the transfer guard refuses derivatives.
    yield "merge lists", Call(lambda outs, lses: jpa.merge_attention_states(list(outs), list(lses)), states, 0)

    interleaved = np.stack([pool(1), pool(2)], axis=3).reshape(P, S, 2 * K, H)
    where = (LENGTHS, TABLES, STARTS, np.array([2], np.int32))
    yield "compat ragged", Call(compat.ragged_paged_attention, (normal(T, N, H), interleaved, *where), 2)
    head_major = tuple(np.ascontiguousarray(np.moveaxis(pool(i), 2, 0)) for i in (1, 2))
    yield "compat decode", Call(compat.paged_attention, (normal(B, N, H), *head_major, TABLES, LENGTHS), 3)

    def context_parallel(*xs: Any) -> Any:
        q, k, v, sinks, tables, lengths, *starts = xs
        options: dict[str, Any] = {"sinks": sinks, "return_lse": True, "axis_name": "x"}
        if starts:
            options["cu_q_lens"] = starts[0]
        return jpa.context_parallel_attention(q, k, v, tables, lengths, **options)

    def on_mesh(*xs: Any) -> Any:
        own = (PartitionSpec(), *[PartitionSpec("x")] * 2, PartitionSpec(), PartitionSpec(None, "x"))
        specs = (*own, *[PartitionSpec()] * (len(xs) - 5))
        mesh = jax.make_mesh((1,), ("x",), (AxisType.Auto,), devices=jax.devices()[:1])
        return jax.shard_map(context_parallel, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(*xs)

    pools, sinks = (pool(1), pool(2)), normal(N, seed=3)
    yield (
        "context parallel decode",
        Call(on_mesh, (normal(B, N, H), *pools, sinks, TABLES, LENGTHS), 4, in_shard_map=True),
    )
    yield (
        "context parallel ragged",
        Call(on_mesh, (normal(T, N, H), *pools, sinks, TABLES, LENGTHS, STARTS), 4, in_shard_map=True),
    )


def nnx_calls() -> Iterator[tuple[str, Call]]:
    positions = np.array([2, 4, 5], np.int32)
    metadata = (positions, SLOTS, TABLES, LENGTHS, STARTS, np.int32(2))
    heads = (normal(T, N, H), normal(T, K, H, seed=4), normal(T, K, H, seed=5))
    frequencies = rope_frequencies(H)
    yield "rope", Call(apply_rope, (heads[0], positions, frequencies), 1)

    def layer(rngs: Any = None) -> Any:
        options: dict[str, Any] = {"sliding_window": 4, "soft_cap": 5.0, "sinks": True}
        if rngs is None:
            return PagedAttention(N, K, H, **options)
        return PagedSelfAttention(HIDDEN, N, K, H, use_bias=True, rngs=rngs, **options)

    def with_pages(layer: PagedAttention, k_pages: Any, v_pages: Any) -> None:
        layer.init_cache(P, S, jnp.float32)
        assert layer.k_pages is not None
        assert layer.v_pages is not None
        layer.k_pages.set_value(k_pages)
        layer.v_pages.set_value(v_pages)

    def attention_step(q: Any, k: Any, v: Any, k_pages: Any, v_pages: Any, *step: Any) -> Any:
        attention = layer()
        with_pages(attention, k_pages, v_pages)
        out = attention(q, k, v, StepMetadata(*step))
        return out, attention.k_pages[...], attention.v_pages[...]

    yield "nnx attention with a step", Call(attention_step, (*heads, pool(1), pool(2), *metadata), 5)
    yield "nnx attention without a step", Call(lambda q, k, v: layer()(q, k, v), heads, 3, every=True)
    graph, weights = nnx.split(layer(nnx.Rngs(0)), nnx.Param)
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, weights))

    def self_attention(x: Any, *rest: Any) -> Any:
        return nnx.merge(graph, jax.tree.unflatten(structure, rest))(x)

    def self_attention_step(x: Any, k_pages: Any, v_pages: Any, *rest: Any) -> Any:
        module = nnx.merge(graph, jax.tree.unflatten(structure, rest[6:]))
        with_pages(module.attention, k_pages, v_pages)
        return module(x, StepMetadata(*rest[:6])), module.attention.k_pages[...]

    x = normal(T, HIDDEN)
    yield "nnx layer without a step", Call(self_attention, (x, *leaves), 1 + len(leaves))
    yield "nnx layer with a step", Call(self_attention_step, (x, pool(1), pool(2), *metadata, *leaves), 3)


CALLS: dict[str, Call] = dict([*attention_calls(), *cache_calls(), *other_calls(), *nnx_calls()])


# ---- transformations -------------------------------------------------------------------------------------------------


def floats(results: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1]


def bars_like(operands: Any) -> list[Any]:
    return [normal(*x.shape, seed=9).astype(x.dtype) for x in operands]


def plain(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return call.function, call.operands


def vmap(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return jax.vmap(call.function), tuple(np.stack([x, x]) for x in call.operands)


def jvp(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    n = call.differentiable

    def push(dots: Any, *operands: Any) -> Any:
        return jax.jvp(lambda *xs: floats(call.function(*xs, *operands[n:])), operands[:n], tuple(dots))

    return push, (bars_like(call.operands[:n]), *call.operands)


def grad(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    n = call.differentiable

    def pull(bars: Any, *operands: Any) -> Any:
        return jax.vjp(lambda *xs: floats(call.function(*xs, *operands[n:])), *operands[:n])[1](bars)

    return pull, (bars_like(floats(jax.eval_shape(call.function, *call.operands))), *call.operands)


def jvp_of_grad(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    pull, (bars, *operands) = grad(call)
    n = call.differentiable

    def push(dots: Any, bars: Any, *operands: Any) -> Any:
        return jax.jvp(lambda *xs: pull(bars, *xs, *operands[n:]), operands[:n], tuple(dots))

    return push, (bars_like(operands[:n]), bars, *operands)


def jit(transformed: Callable[[Call], tuple[Callable[..., Any], Any]]) -> Callable[..., Any]:
    def make(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        function, operands = transformed(call)
        return jax.jit(function), operands

    return make


TRANSFORMATIONS: dict[str, Callable[[Call], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "plain": plain,
    "jit": jit(plain),
    "vmap": vmap,
    "jvp": jvp,
    "grad": grad,
    "jit of grad": jit(grad),
    "jvp of grad": jvp_of_grad,
}


DERIVATIVES = ("jvp", "grad", "jvp of grad")


@functools.cache
def made(call: str, transformation: str) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """The function, its operands on the device, and what it gives without a mode; shared by all modes."""
    function, operands = TRANSFORMATIONS[transformation](CALLS[call])
    operands = jax.device_put(operands)
    return function, operands, jax.device_get(function(*operands))


# ---- modes -----------------------------------------------------------------------------------------------------------


def under(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[..., Any]:
    def run(function: Callable[..., Any], operands: Any) -> Any:
        with context():
            return function(*operands)

    return run


def constants_in_jit(function: Callable[..., Any], operands: Any) -> Any:
    """The call on constants of a jitted function; what comes out must be values while that is traced."""

    def body() -> Any:
        with jax.ensure_compile_time_eval():
            results = function(*operands)
        assert not any(isinstance(x, Tracer) for x in jax.tree.leaves(results))
        return results

    return jax.jit(body)()


MODES: dict[str, Callable[..., Any]] = {
    "disable_jit": under(jax.disable_jit),
    "debug_nans": under(lambda: jax.debug_nans(True)),
    "debug_infs": under(lambda: jax.debug_infs(True)),
    "compile-time eval": under(jax.ensure_compile_time_eval),
    "compile-time eval in jit": constants_in_jit,
    "rank promotion": under(lambda: jax.numpy_rank_promotion("raise")),
    "dtype promotion": under(lambda: jax.numpy_dtype_promotion("strict")),
    "x64": under(lambda: jax.enable_x64(True)),
    "checks": under(lambda: jax.enable_checks(True)),
    "leaks": under(jax.checking_leaks),
    "transfer guard": under(lambda: jax.transfer_guard("disallow")),
    "matmul precision": under(lambda: jax.default_matmul_precision("bfloat16")),
}


# Under these JAX compiles nothing again; every other mode is part of the key of its caches.
SHARING = ("debug_nans", "debug_infs", "checks", "transfer guard")


def applies(call: Call, transformation: str) -> bool:
    if transformation not in ("plain", "jit", "vmap") and not call.differentiable:
        return False
    return call.every or transformation in ("plain", "jit", "grad")


def share(call: Call, transformation: str, mode: str) -> int:
    """n: each n-th test of this kind is run."""
    if mode in SHARING or (transformation == "plain" and (call.every or mode in ("disable_jit", "rank promotion"))):
        return 1
    return 2 if transformation == "plain" or call.every else 8


def in_long_tail(call: Call, transformation: str, mode: str) -> bool:
    """Eager derivatives, `disable_jit` and eager `shard_map` compile hundreds of small operations.

    Where calls are transformed in every way, `make test` has them, but for second derivatives in modes that compile.
    """
    if mode == "disable_jit":
        return transformation != "plain" or not call.every
    if transformation == "jvp of grad":
        return mode not in SHARING
    return not call.every and (transformation in DERIVATIVES or (transformation == "plain" and call.in_shard_map))


def combinations() -> Iterator[Any]:
    """All that applies where a mode compiles nothing again; of the rest a share, by places in the lists."""
    for i, (name, call) in enumerate(CALLS.items()):
        for j, transformation in enumerate(t for t in TRANSFORMATIONS if applies(call, t)):
            for k, mode in enumerate(MODES):
                if call.in_shard_map and mode.startswith("compile-time"):
                    continue  # JAX itself cannot tell there which device it is on
                if (i + j + k) % share(call, transformation, mode) == 0:
                    marks = [pytest.mark.slow] if in_long_tail(call, transformation, mode) else []
                    yield pytest.param(name, transformation, mode, id=f"{name}-{transformation}-{mode}", marks=marks)


@pytest.mark.parametrize(("name", "transformation", "mode"), [*combinations()])
def test_same_values(name: str, transformation: str, mode: str) -> None:
    function, operands, want = made(name, transformation)
    if mode == "transfer guard" and transformation in DERIVATIVES:
        # Outside of `jit` JAX's own backward pass makes zeros on the host: where a slice is transposed, for example.
        function = jax.jit(function)
    got = jax.device_get(MODES[mode](function, operands))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        tolerance = 1e-5 if x.dtype.itemsize == 4 else 2e-2
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=tolerance, atol=tolerance)


# ---- errors that modes guarantee -------------------------------------------------------------------------------------


def poisoned(name: str, transformation: str, index: int, value: float) -> tuple[Callable[..., Any], Any]:
    """The function, and operands of which one is this number throughout."""
    call = CALLS[name]
    operands = list(call.operands)
    operands[index] = np.full_like(operands[index], value)
    function, _, _ = made(name, transformation)
    _, operands = TRANSFORMATIONS[transformation](dataclasses.replace(call, operands=tuple(operands)))
    return function, jax.device_put(operands)


# JAX itself never ends where an operand of `shard_map` outside of `jit` is NaN already, so those calls are not here.
@pytest.mark.parametrize("transformation", ["plain", "jit", "grad"])
@pytest.mark.parametrize(
    "name", [name for name, call in CALLS.items() if call.differentiable and not call.in_shard_map]
)
def test_nan_is_reported(name: str, transformation: str) -> None:
    function, operands = poisoned(name, transformation, 0, np.nan)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        function(*operands)


# Calls, and an operand whose infinity is one of the result.
INFINITE = {
    "decode cpu": 2, "decode reference": 2, "decode reference function": 2, "ragged cpu": 2, "ragged reference": 2,
    "write": 0, "copy": 0, "merge": 0, "compat decode": 2, "nnx attention with a step": 2,
}  # fmt: skip


@pytest.mark.parametrize("transformation", ["plain", "jit"])
@pytest.mark.parametrize("name", INFINITE)
def test_infinity_is_reported(name: str, transformation: str) -> None:
    function, operands = poisoned(name, transformation, INFINITE[name], np.inf)
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match="inf"):
        function(*operands)


@pytest.mark.parametrize("name", ["decode cpu", "decode reference", "decode reference function"])
def test_row_without_keys_is_no_overflow(name: str) -> None:
    """Its lse is −inf. JAX refuses that as a result of the caller's own `jit`, as it would one of `jnp`."""
    function = CALLS[name].function
    operands = jax.device_put((*CALLS[name].operands[:-1], np.array([0, 6], np.int32)))
    pull, (bars, *_) = grad(CALLS[name])
    want = jax.device_get(function(*operands)), jax.device_get(pull(bars, *operands))
    bars = jax.device_put(bars)
    with jax.debug_infs(True):
        got = jax.device_get(function(*operands)), jax.device_get(pull(bars, *operands))
        jax.jit(lambda *xs: function(*xs)[0])(*operands)
        with pytest.raises(FloatingPointError, match="inf"):
            jax.jit(function)(*operands)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.isneginf(got[0][1][0]).all()


@pytest.mark.parametrize("function", [jpa.paged_attention_reference, jpa.paged_attention])
def test_no_sequences_under_disable_jit(function: Callable[..., Any]) -> None:
    """JAX runs no loop of zero steps there."""
    q, tables, lengths = normal(0, N, H), np.zeros((0, M), np.int32), np.zeros(0, np.int32)
    with jax.disable_jit():
        assert function(q, pool(1), pool(2), tables, lengths).shape == (0, N, H)


IMPORTED = """
import jax
with jax.ensure_compile_time_eval(), jax.disable_jit():
    from jax_paged_attn import _partitioning
print(len(_partitioning.call_that_needs_devices().jaxpr.eqns))
"""


def test_import_under_modes() -> None:
    """The mark that a primitive needs devices is made on import, and would be empty as a constant."""
    assert python(IMPORTED) == ["1"]
