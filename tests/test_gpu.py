"""What only a GPU can show of the engines for CUDA: scratch memory, threads, graphs, launches, large pools."""

from __future__ import annotations

import functools
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_paged_attn as jpa
from jax_paged_attn import _engines, _ffi

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu" or not _ffi.has("cuda"), reason="needs a CUDA device and build"),
]

ENGINES = [engine.name for engine in _engines.ENGINES if engine.platform == "cuda"]
# Pages used in place, and pages that are gathered.
PAGE_SIZES = [64, 16]
GIB = 1 << 30


def decode_inputs(
    batch: int, length: int, page_size: int, *, heads: int = 8, kv_heads: int = 2, seed: int = 0
) -> tuple[jax.Array, ...]:
    """Operands of `paged_attention` in bf16, head dim 64, every sequence as long."""
    max_pages = -(-length // page_size)
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(batch, heads, 64), *[(batch * max_pages, page_size, kv_heads, 64)] * 2]
    q, k_pages, v_pages = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    tables = np.random.default_rng(seed).permutation(batch * max_pages).astype(np.int32).reshape(batch, max_pages)
    return q, k_pages, v_pages, jnp.asarray(tables), jnp.full((batch,), length, jnp.int32)


@functools.cache
def compiled(engine: str) -> Any:
    return jax.jit(functools.partial(jpa.paged_attention, implementation=engine, return_lse=True))


def bits(results: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in results]


def assert_right(results: Any, args: tuple[jax.Array, ...]) -> None:
    for got, want in zip(results, jpa.paged_attention_reference(*args, return_lse=True), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=2e-2)


def fill_free_memory(pattern: int) -> None:
    """Leaves the bytes of a pattern in all memory that XLA would hand out next."""
    stats = jax.devices()[0].memory_stats()
    assert stats is not None
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    held = [jnp.full((GIB // 4,), pattern, jnp.uint32) for _ in range(max(free // GIB - 1, 1))]
    jax.block_until_ready(held)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("cuda_engine", ENGINES)
def test_whatever_scratch_memory_holds_the_bits_are_the_same(cuda_engine: str, page_size: int) -> None:
    args = decode_inputs(4, 1000, page_size)
    expected = compiled(cuda_engine)(*args)
    assert_right(expected, args)
    for pattern in (0x7FC00000, 0xFFFFFFFF, 0x7F800000):
        for _ in range(2):
            fill_free_memory(pattern)
            assert bits(compiled(cuda_engine)(*args)) == bits(expected)


@pytest.mark.parametrize("cuda_engine", ENGINES)
def test_threads_share_an_executable(cuda_engine: str) -> None:
    inputs = [decode_inputs(4, 500, 64, seed=seed) for seed in range(4)]
    expected = [bits(compiled(cuda_engine)(*args)) for args in inputs]

    def repeat(args: tuple[jax.Array, ...]) -> list[list[bytes]]:
        return [bits(compiled(cuda_engine)(*args)) for _ in range(50)]

    with ThreadPoolExecutor(len(inputs)) as pool:
        for results, want in zip(pool.map(repeat, inputs), expected, strict=True):
            assert all(result == want for result in results)


@pytest.mark.parametrize("page_size", [128, 16])
@pytest.mark.parametrize("cuda_engine", ENGINES)
def test_pool_beyond_32_bit_offsets(cuda_engine: str, page_size: int) -> None:
    small = decode_inputs(2, 3 * page_size - 5, page_size, kv_heads=8)
    q, k_pages, v_pages, tables, lengths = small
    page = k_pages[0].size
    num_pages = 2**31 // page + 64
    assert k_pages.dtype.itemsize * page * num_pages > 4.2e9
    # The small pool becomes the end of the large one; what is in front of it is never asked for.
    first = num_pages - k_pages.shape[0]
    enlarge = jax.jit(lambda pages: jnp.pad(pages, ((first, 0), (0, 0), (0, 0), (0, 0)), constant_values=np.nan))
    large = (q, enlarge(k_pages), enlarge(v_pages), tables + first, lengths)
    results = compiled(cuda_engine)(*large)
    assert_right(results, small)
    assert bits(results) == bits(compiled(cuda_engine)(*small))


def layers_step(engine: str) -> Any:
    """A jitted step of attention over many layers, each with a cache of its own; lengths grow in place."""

    @functools.partial(jax.jit, donate_argnames="lengths")
    def step(
        q: jax.Array, caches: Any, tables: jax.Array, lengths: jax.Array, growth: int
    ) -> tuple[jax.Array, jax.Array]:
        for k_pages, v_pages in caches:
            q = q + jpa.paged_attention(q, k_pages, v_pages, tables, lengths, implementation=engine)
        return q, lengths + growth

    return step


def layers_inputs(layers: int, seed: int = 0) -> tuple[Any, ...]:
    caches = [decode_inputs(4, 640, 64, seed=1000 * seed + layer)[1:3] for layer in range(layers)]
    q, _, _, tables, lengths = decode_inputs(4, 640, 64, seed=seed)
    return q, tuple(caches), tables, lengths


def assert_close_to_calls(result: Any, engine: str, q: jax.Array, caches: Any, tables: jax.Array, lengths: Any) -> None:
    """Compares a step's result with the same layers called one by one, outside any graph."""
    for k_pages, v_pages in caches:
        q = q + compiled(engine)(q, k_pages, v_pages, tables, jnp.asarray(lengths, jnp.int32))[0]
    np.testing.assert_allclose(np.asarray(result, np.float32), np.asarray(q, np.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("cuda_engine", ENGINES)
def test_lengths_grow_between_replays_of_a_graph(cuda_engine: str) -> None:
    layers, steps, growth = 32, 12, 50
    step = layers_step(cuda_engine)
    q, caches, tables, _ = layers_inputs(layers)
    lengths = jnp.ones((4,), jnp.int32)
    module = _ffi.compiled("cuda")
    results, calls = [], []
    for _ in range(steps):
        before = module.host_calls()
        result, lengths = step(q, caches, tables, lengths, growth)
        results.append(np.asarray(result))  # which frees the result's memory for the next step's
        calls.append(module.host_calls() - before)
    # Without graphs the host calls the handler once a layer in every step.
    assert calls.count(0) > steps // 2, f"calls of the handler in steps of {layers} layers: {calls}"
    for i, result in enumerate(results):
        assert_close_to_calls(result, cuda_engine, q, caches, tables, np.full((4,), 1 + growth * i))


@pytest.mark.parametrize("cuda_engine", ENGINES)
def test_more_addresses_in_turn_than_graphs_are_kept_for(cuda_engine: str) -> None:
    step = layers_step(cuda_engine)
    inputs = [layers_inputs(6, seed) for seed in range(24)]
    rounds = [
        [np.asarray(step(q, caches, tables, jnp.copy(lengths), 0)[0]) for q, caches, tables, lengths in inputs]
        for _ in range(3)
    ]
    for again in rounds[1:]:
        np.testing.assert_array_equal(again, rounds[0])
    for args, result in zip(inputs, rounds[0], strict=True):
        assert_close_to_calls(result, cuda_engine, *args)


def count_launches(fn: Any, *args: Any) -> int:
    """Kernels of the engine and of cuBLAS in one call; the others are XLA's, around it."""
    from jax.experimental.mosaic.gpu import profiler

    _, kernels = profiler.measure(fn, aggregate=False)(*args)
    return sum(re.search("cublaslt|nvjet|gemm|cutlass|xmma", name) is not None for name, _ in kernels)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_cublaslt_launches(page_size: int) -> None:
    counts = set()
    for batch, heads, length in ((2, 8, 512), (32, 8, 512), (4, 32, 512)):
        args = decode_inputs(batch, length, page_size, heads=heads, kv_heads=heads // 4)
        for lengths in (args[4], jnp.zeros_like(args[4]), args[4] // 2):
            counts.add(count_launches(compiled("cublaslt"), *args[:4], lengths))
    plan = _ffi.compiled("cuda").attention_plan(
        *("bfloat16", "bfloat16", 2, 8, 2, 64, page_size, 2, 512 // page_size, True, _ffi.workspace_limit_cuda())
    )
    assert counts == {plan["launches"]}
    assert plan["launches"] <= 6


def prefill_inputs(seed: int = 0) -> tuple[jax.Array, ...]:
    """Operands of `ragged_paged_attention` whose scores, 1 GiB of f32, come in chunks."""
    q_lens, kv_lens, page_size, kv_heads = (4096, 37, 2500), (4096, 900, 3800), 16, 2
    max_pages = 4096 // page_size
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(sum(q_lens), 8, 64), *[(3 * max_pages, page_size, kv_heads, 64)] * 2]
    q, k_pages, v_pages = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    tables = np.random.default_rng(seed).permutation(3 * max_pages).astype(np.int32).reshape(3, max_pages)
    cu_q_lens = np.cumsum((0, *q_lens)).astype(np.int32)
    return q, k_pages, v_pages, jnp.asarray(kv_lens, jnp.int32), jnp.asarray(tables), jnp.asarray(cu_q_lens)


def test_cublaslt_in_groups_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that gather keys a sequence and head: right, the same bits from threads at once and in a graph of many."""
    monkeypatch.setenv("JPA_CUDA_WORKSPACE_MIB", "80")
    inputs = [prefill_inputs(seed) for seed in range(4)]
    q, _, _, _, tables, _ = inputs[0]
    plan = _ffi.compiled("cuda").attention_plan(
        *("bfloat16", "bfloat16", q.shape[0], 8, 2, 64, 16, *tables.shape, False, _ffi.workspace_limit_cuda())
    )
    assert plan["groups"] > 1
    assert plan["slots"] < plan["units"]
    attend = jax.jit(functools.partial(jpa.ragged_paged_attention, implementation="cublaslt", return_lse=True))
    expected = [bits(attend(*args)) for args in inputs]
    reference = jax.jit(functools.partial(jpa.ragged_paged_attention, implementation="reference", return_lse=True))
    for got, want in zip(attend(*inputs[0]), reference(*inputs[0]), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=2e-2)

    with ThreadPoolExecutor(len(inputs)) as pool:
        for _ in range(10):
            assert list(pool.map(lambda args: bits(attend(*args)), inputs)) == expected

    step = jax.jit(lambda many: [jpa.ragged_paged_attention(*args, implementation="cublaslt") for args in many])
    outs = [want for want, _ in expected] * 2
    with ThreadPoolExecutor(2) as pool:  # captures beside calls outside of any graph
        for _ in range(6):
            graph = pool.submit(lambda: bits(step(inputs * 2)))
            alone = [pool.submit(lambda: bits(attend(*inputs[1]))) for _ in range(4)]
            assert graph.result() == outs
            assert all(result.result() == expected[1] for result in alone)
    module, calls = _ffi.compiled("cuda"), []
    for _ in range(8):
        before = module.host_calls()
        assert bits(step(inputs * 2)) == outs
        calls.append(module.host_calls() - before)
    assert min(calls) == 0, f"calls of the handler in steps of 8: {calls}"


def test_cublaslt_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit so small that units and keys come in chunks; the online softmax joins them."""
    args = decode_inputs(3, 9000, 16)
    whole = compiled("cublaslt")(*args)
    monkeypatch.setenv("JPA_CUDA_WORKSPACE_MIB", "1")
    plan = _ffi.compiled("cuda").attention_plan(
        *("bfloat16", "bfloat16", 3, 8, 2, 64, 16, 3, 563, True, _ffi.workspace_limit_cuda())
    )
    assert plan["groups"] > 1
    assert plan["stretches"] > 1
    chunked = jax.jit(functools.partial(jpa.paged_attention, implementation="cublaslt", return_lse=True))(*args)
    assert_right(whole, args)
    assert_right(chunked, args)
