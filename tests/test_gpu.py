"""Properties of the CUDA engines that only a GPU can show: scratch memory, threads, graphs, launches, large pools."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
# Bits of `(out, lse)`, in bf16 and f32.
VIEWS = (jnp.uint16, jnp.uint32)
# Pages used in place, and pages that are gathered.
PAGE_SIZES = [64, 16]
# Query heads of two key/value heads: groups that decode takes by its usual kernel, and by that for large groups.
HEADS = [8, 80]
GIB = 1 << 30


def decode_inputs(
    batch: int,
    length: int,
    page_size: int,
    *,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_dtype: Any = jnp.bfloat16,
    seed: int = 0,
) -> tuple[jax.Array, ...]:
    """Operands of `paged_attention` in bf16, every sequence as long."""
    max_pages = -(-length // page_size)
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(batch, heads, head_dim), *[(batch * max_pages, page_size, kv_heads, head_dim)] * 2]
    q, k_pages, v_pages = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    k_pages, v_pages = k_pages.astype(page_dtype), v_pages.astype(page_dtype)
    tables = np.random.default_rng(seed).permutation(batch * max_pages).astype(np.int32).reshape(batch, max_pages)
    return q, k_pages, v_pages, jnp.asarray(tables), jnp.full((batch,), length, jnp.int32)


@functools.cache
def compiled(engine: str, **keywords: Any) -> Any:
    return jax.jit(functools.partial(jpa.paged_attention, implementation=engine, return_lse=True, **keywords))


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
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cuda_engine", ENGINES)
def test_whatever_scratch_memory_holds_the_bits_are_the_same(cuda_engine: str, heads: int, page_size: int) -> None:
    args = decode_inputs(4, 1000, page_size, heads=heads)
    expected = compiled(cuda_engine)(*args)
    assert_right(expected, args)
    for pattern in (0x7FC00000, 0xFFFFFFFF, 0x7F800000):
        for _ in range(2):
            fill_free_memory(pattern)
            assert bits(compiled(cuda_engine)(*args)) == bits(expected)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cuda_engine", ENGINES)
def test_values_that_are_no_numbers_reach_results_of_their_sequence_alone(cuda_engine: str, heads: int) -> None:
    """Whatever their bits are: `fused` tells by those of a NaN that a partial result is not there yet."""
    q, k_pages, v_pages, tables, lengths = decode_inputs(2, 1000, 16, heads=heads)
    expected = compiled(cuda_engine)(q, k_pages, v_pages, tables, lengths)
    for pattern in (0xFFFF, 0x7FFF, 0x7FC0):
        nan = jax.lax.bitcast_convert_type(jnp.uint16(pattern), jnp.bfloat16)
        results = compiled(cuda_engine)(q, k_pages, v_pages.at[tables[1, 3]].set(nan), tables, lengths)
        assert bits([x[0] for x in results]) == bits([x[0] for x in expected])
        assert np.isnan(np.asarray(results[0][1], np.float32)).all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "page_dtype"), [(7, 1, jnp.bfloat16), (2, 2, jnp.bfloat16), (12, 1, jnp.float8_e4m3fn)]
)
def test_many_splits_are_merged_in_groups(heads: int, kv_heads: int, page_dtype: Any) -> None:
    """One long sequence and few key/value heads: many KV splits, which `fused` merges in two steps."""
    args = decode_inputs(1, 16_000, 16, heads=heads, kv_heads=kv_heads, page_dtype=page_dtype)
    expected = compiled("fused")(*args)
    assert_right(expected, args)
    for pattern in (0, 0x7FC00000, 0xFFFFFFFF):
        fill_free_memory(pattern)
        for _ in range(8):
            assert bits(compiled("fused")(*args)) == bits(expected)


@pytest.mark.parametrize("heads", [8, 14, 16])
def test_folded_splits_have_the_same_bits_after_any_call(heads: int) -> None:
    """Batch-invariant: scratch memory still has what CTAs left for each other in a call of other operands."""
    q, k_pages, v_pages, tables, _ = decode_inputs(9, 8192, 16, heads=heads)
    lengths = jnp.asarray([8192, 1, 64, 65, 129, 1025, 2049, 4097, 0], jnp.int32)
    args, others = (q, k_pages, v_pages, tables, lengths), (-q[::-1], v_pages, k_pages, tables, lengths[::-1])
    attend = compiled("fused", batch_invariant=True)
    expected = attend(*args)
    assert_right(expected, args)
    for pattern in (0, 0x7FC00000, 0xFFFFFFFF):
        fill_free_memory(pattern)
        for _ in range(30):
            attend(*others)
            assert bits(attend(*args)) == bits(expected)


# A lane of the kernel for few sequences reads one length, up to four, and with more there is another kernel.
@pytest.mark.parametrize("page_dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("batch", [1, 32, 33, 65, 128, 129])
@pytest.mark.parametrize("window", [None, 100])
def test_few_sequences(batch: int, window: int | None, page_dtype: Any) -> None:
    """Of lengths of all kinds, as many have tiles as there are multiprocessors, or more, or fewer."""
    rng = np.random.default_rng(batch)
    args = decode_inputs(batch, 700, 16, head_dim=128, page_dtype=page_dtype, seed=batch)
    attend, expect = (compiled(engine, sliding_window=window) for engine in ("fused", "reference"))
    for most in (0, 64, 700):
        lengths = rng.integers(0, most + 1, batch)
        lengths[: batch // 8] = rng.choice([-1, 0, 1, 64, 65, 700, 701], batch // 8)
        for kv_lens in (lengths, np.full(batch, most)):
            some = (*args[:-1], jnp.asarray(kv_lens, jnp.int32))
            got = attend(*some)
            for mine, theirs in zip(got, expect(*some), strict=True):
                np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(theirs, np.float32), atol=2e-2)
            assert all(bits(attend(*some)) == bits(got) for _ in range(5))


# Sequences of 16 key/value heads: on 132 multiprocessors from 33 on `fused` takes the kernel for many row blocks.
@pytest.mark.parametrize("batch", [32, 34, 100])
@pytest.mark.parametrize(("heads", "page_dtype"), [(16, jnp.bfloat16), (64, jnp.bfloat16), (128, jnp.float8_e4m3fn)])
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (96, 16), (128, 32)])
def test_many_row_blocks_repeat(batch: int, heads: int, page_dtype: Any, head_dim: int, page_size: int) -> None:
    """Whichever warp is done last, and in a graph of many calls, of which each starts while others still merge."""
    args = decode_inputs(
        batch, 200, page_size, heads=heads, kv_heads=16, head_dim=head_dim, page_dtype=page_dtype, seed=batch
    )
    lengths = np.random.default_rng(batch).integers(0, 201, batch)
    lengths[:4] = [0, 1, 64, 65]
    args = (*args[:-1], jnp.asarray(lengths, jnp.int32))
    expected = compiled("fused")(*args)
    assert_right(expected, args)
    for _ in range(50):
        assert bits(compiled("fused")(*args)) == bits(expected)
    q, *others = args
    call = functools.partial(jpa.paged_attention, implementation="fused", return_lse=True)
    graph = jax.jit(lambda queries: [call(each, *others) for each in queries])
    for _ in range(5):
        results = graph([q, jnp.copy(q), -q, jnp.copy(q)])
        assert [bits(results[i]) for i in (0, 1, 3)] == [bits(expected)] * 3


@contextmanager
def bandwidth_hog() -> Iterator[Callable[[], int]]:
    """Copies within the device on a stream of its own while the context lasts; yields how often it has copied.

    What JAX is asked to do is done on one stream, after each other: only the driver can be asked for more.
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    size = ctypes.c_size_t(GIB // 4)
    context, stream, buffers = ctypes.c_void_p(), ctypes.c_void_p(), [ctypes.c_uint64() for _ in range(2)]
    stop, copies, errors = threading.Event(), [0], list[str]()

    def check(name: str, *args: Any) -> None:
        code = getattr(cuda, name)(*args)
        if code:
            raise RuntimeError(f"{name}: error {code}")

    def hog() -> None:
        try:
            check("cuCtxSetCurrent", context)
            while not stop.is_set():
                for source, target in (buffers, buffers[::-1]):
                    check("cuMemcpyDtoDAsync_v2", target, source, size, stream)
                check("cuStreamSynchronize", stream)
                copies[0] += 2
        except RuntimeError as error:
            errors.append(str(error))

    check("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)  # the one that JAX uses
    check("cuCtxSetCurrent", context)
    check("cuStreamCreate", ctypes.byref(stream), 1)  # not ordered with the default stream
    for buffer in buffers:
        check("cuMemAlloc_v2", ctypes.byref(buffer), size)
    thread = threading.Thread(target=hog)
    thread.start()
    try:
        yield lambda: copies[0]
    finally:
        stop.set()
        thread.join()
        for buffer in buffers:
            check("cuMemFree_v2", buffer)
        check("cuStreamDestroy_v2", stream)
        check("cuDevicePrimaryCtxRelease_v2", 0)
    assert not errors


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cuda_engine", ENGINES)
def test_repeats_beside_a_bandwidth_hog(cuda_engine: str, heads: int) -> None:
    """A skewed batch, so that KV splits of the long sequence are done by many blocks, in any order."""
    q, k_pages, v_pages, tables, _ = decode_inputs(16, 6000, 16, heads=heads)
    lengths = jnp.asarray([6000, *range(3, 903, 60)], jnp.int32)
    args = (q, k_pages, v_pages, tables, lengths)
    expected = compiled(cuda_engine)(*args)
    assert_right(expected, args)
    same = jax.jit(
        lambda a, b: jnp.stack([(x.view(y) == z.view(y)).all() for x, z, y in zip(a, b, VIEWS, strict=True)])
    )
    with bandwidth_hog() as copies:
        while copies() == 0:
            time.sleep(0.001)
        before = copies()
        results = [same(compiled(cuda_engine)(*args), expected) for _ in range(1000)]
        assert np.asarray(jnp.stack(results)).all()
        assert copies() > before


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
    # Without graphs the host calls the handler once per layer in every step.
    assert calls.count(0) > steps // 2, f"calls of the handler in steps of {layers} layers: {calls}"
    for i, result in enumerate(results):
        assert_close_to_calls(result, cuda_engine, q, caches, tables, np.full((4,), 1 + growth * i))


@pytest.mark.parametrize("cuda_engine", ENGINES)
def test_scratch_memory_is_poisoned_between_replays_of_a_graph(cuda_engine: str) -> None:
    step = layers_step(cuda_engine)
    q, caches, tables, lengths = layers_inputs(32)
    module = _ffi.compiled("cuda")
    results, calls = [], []
    for i in range(12):
        fill_free_memory((0x7FC00000, 0xFFFFFFFF, 0)[i % 3])
        before = module.host_calls()
        result, lengths = step(q, caches, tables, lengths, 0)
        results.append(np.asarray(result))
        calls.append(module.host_calls() - before)
    assert calls.count(0) >= 3, f"calls of the handler in steps of 32 layers: {calls}"
    assert_close_to_calls(results[0], cuda_engine, q, caches, tables, np.asarray(lengths))
    for again in results[1:]:
        np.testing.assert_array_equal(again, results[0])


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


def count_launches(fn: Any, *args: Any, kernels_of: str = "cublaslt|nvjet|gemm|cutlass|xmma") -> int:
    """Kernels of the engine (and of cuBLAS) in one call; the others are XLA's, around it."""
    from jax.experimental.mosaic.gpu import profiler

    _, kernels = profiler.measure(fn, aggregate=False)(*args)
    return sum(re.search(kernels_of, name) is not None for name, _ in kernels)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_cublaslt_launches(page_size: int) -> None:
    counts = set()
    for batch, heads, length in ((2, 8, 512), (32, 8, 512), (4, 32, 512)):
        args = decode_inputs(batch, length, page_size, heads=heads, kv_heads=heads // 4)
        for lengths in (args[4], jnp.zeros_like(args[4]), args[4] // 2):
            counts.add(count_launches(compiled("cublaslt"), *args[:4], lengths))
    plan = _ffi.compiled("cuda").attention_plan(
        *("bfloat16", "bfloat16", 2, 8, 2, 64, 64, page_size, 2, 512 // page_size, True, _ffi.workspace_limit_cuda())
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
    """Groups that gather keys per sequence and head are right: also from several threads and in a graph."""
    monkeypatch.setenv("JPA_CUDA_WORKSPACE_MIB", "64")
    inputs = [prefill_inputs(seed) for seed in range(4)]
    q, _, _, _, tables, _ = inputs[0]
    plan = _ffi.compiled("cuda").attention_plan(
        *("bfloat16", "bfloat16", q.shape[0], 8, 2, 64, 64, 16, *tables.shape, False, _ffi.workspace_limit_cuda())
    )
    assert plan["groups"] > 1
    assert plan["gathered"] < plan["row_blocks"]
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


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("page_dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_fused_launches(page_dtype: Any, batch_invariant: bool) -> None:
    """As few as docs/engines say, whatever lengths, tables and pages are; and none of XLA's around them."""
    count = functools.partial(count_launches, kernels_of="jpa")
    counts: dict[int, set[int]] = {8: set(), 32: set()}
    decode = compiled("fused", batch_invariant=batch_invariant)
    for batch, heads, length, page_size in ((1, 8, 100, 16), (2, 8, 512, 64), (300, 8, 512, 16), (4, 32, 9000, 1)):
        args = decode_inputs(batch, length, page_size, heads=heads, page_dtype=page_dtype)
        q, k_pages, v_pages, tables, lengths = args
        skewed = jnp.where(jnp.arange(batch) == 0, lengths, 1)
        for some in (lengths, jnp.zeros_like(lengths), skewed):
            counts[heads].add(count(decode, q, k_pages, v_pages, tables, some))
        counts[heads].add(count(decode, q, k_pages, v_pages, jnp.full_like(tables, -1), lengths))
    # Batch-invariant, decode folds KV splits of up to 8 packed rows, over 16-bit pages; others are combined.
    folds = page_dtype == jnp.bfloat16
    assert counts == {8: {1 + (batch_invariant and not folds)}, 32: {1 + batch_invariant}}
    ragged = jax.jit(
        functools.partial(jpa.ragged_paged_attention, implementation="fused", batch_invariant=batch_invariant)
    )
    q, k_pages, v_pages, tables, lengths = decode_inputs(8, 512, 16, page_dtype=page_dtype)
    # Decode and prefill, with more rows than drafts the plan; batch-invariant, and the combine of decode.
    for num_rows, expected in ((8, 1), (64, 2), (65, 3)):
        rows = jnp.resize(q, (num_rows, *q.shape[1:]))
        cuts = [jnp.arange(9, dtype=jnp.int32) * each for each in (1, num_rows // 8, 100)]
        seen = {count(ragged, rows, k_pages, v_pages, lengths, tables, cu_q_lens) for cu_q_lens in cuts}
        assert seen == {expected + batch_invariant}, num_rows
        everything = count_launches(ragged, rows, k_pages, v_pages, lengths, tables, cuts[0], kernels_of=".")
        assert everything == expected + batch_invariant, num_rows
    # As many rows as sequences, as in a step of decode rows: decode alone has them, whichever sequence they are of.
    # Batch-invariant, sequences with many rows are prefill's whatever else there is.
    q, k_pages, v_pages, tables, lengths = decode_inputs(40, 512, 16, page_dtype=page_dtype)
    cuts = [jnp.minimum(jnp.arange(41, dtype=jnp.int32) * each, 40) for each in (1, 8, 40)]
    seen = {count(ragged, q, k_pages, v_pages, lengths, tables, cu_q_lens) for cu_q_lens in cuts}
    assert seen == {3 if batch_invariant else 1}


def scales_of(page_dtype: Any) -> dict[str, jax.Array]:
    """The bytes that a call over pages of the dtype takes besides."""
    return {} if page_dtype == BF16 else {"k_scale": jnp.float32(0.5), "v_scale": jnp.float32(0.5)}


def mixed_inputs(
    rows: tuple[int, ...],
    lengths: tuple[int, ...],
    page_size: int,
    head_dim: int,
    heads: int = 8,
    seed: int = 0,
    page_dtype: Any = jnp.bfloat16,
) -> tuple[jax.Array, ...]:
    """Operands of `ragged_paged_attention` with two key/value heads."""
    max_pages = -(-max(lengths) // page_size)
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(sum(rows), heads, head_dim), *[(len(rows) * max_pages, page_size, 2, head_dim)] * 2]
    q, k_pages, v_pages = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    k_pages, v_pages = k_pages.astype(page_dtype), v_pages.astype(page_dtype)
    tables = np.random.default_rng(seed).permutation(len(rows) * max_pages).astype(np.int32).reshape(len(rows), -1)
    cu_q_lens = np.cumsum((0, *rows)).astype(np.int32)
    return q, k_pages, v_pages, jnp.asarray(lengths, jnp.int32), jnp.asarray(tables), jnp.asarray(cu_q_lens)


# A few long chunks, which take several KV splits; many prompts beside decoded rows, which are too many per sequence for
# prefill to decode them, and which are not; rows that fill no tile.
PREFILLS = {
    "chunks": ((100, 40), (9000, 5003)),
    "mixed": ((1, 700, 1, 16, 0, 129, 64, 65, 1), (3000, 700, 17, 900, 5, 4000, 64, 65, 0)),
    "beside": ((1, 700, 1, 2, 0, 129, 1), (800, 700, 17, 700, 5, 4000, 64)),
    "prompts": ((257,) * 6, (257, 300, 1000, 257, 2049, 258)),
}


# Pages of a multiple of 8 tokens are loaded by TMA, others by cp.async; those of 8 bits are converted.
BF16, E4M3, E5M2, INT8 = "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"
TMA_LOADS = [(64, 16), (96, 8), (128, 8), (128, 16), (128, 24), (128, 256), (192, 16), (256, 48)]
CP_ASYNC_LOADS = [(64, 5), (96, 1), (128, 100), (192, 12), (256, 7)]
NARROW = [(64, 16, E4M3), (96, 1, INT8), (128, 16, E5M2), (128, 20, INT8), (192, 48, E4M3), (256, 16, E5M2)]


@pytest.mark.parametrize(
    ("head_dim", "page_size", "page_dtype"), [*((*s, BF16) for s in (*TMA_LOADS, *CP_ASYNC_LOADS)), *NARROW]
)
@pytest.mark.parametrize("name", PREFILLS)
def test_fused_prefill(name: str, head_dim: int, page_size: int, page_dtype: str) -> None:
    """As "cublaslt" has it, the same bits every time, and no value of a page that is not there."""
    rows, lengths = PREFILLS[name]
    args = mixed_inputs(rows, lengths, page_size, head_dim, page_dtype=page_dtype)
    scales = scales_of(page_dtype)
    tables = args[4].at[0, 3].set(-1).at[1, 0].set(2**31 - 1)
    variants: tuple[Any, ...] = (args, (*args[:4], tables, args[5]))
    for keywords in ({}, {"causal": False}, {"sliding_window": 300, "soft_cap": 20.0}):
        fused, cublaslt = (
            jax.jit(
                functools.partial(
                    jpa.ragged_paged_attention, implementation=engine, return_lse=True, **keywords, **scales
                )
            )
            for engine in ("fused", "cublaslt")
        )
        for some in variants:
            got, want = fused(*some), cublaslt(*some)
            for mine, theirs in zip(got, want, strict=True):
                np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(theirs, np.float32), atol=2e-2)
            assert all(bits(fused(*some)) == bits(got) for _ in range(3))


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("page_size", [16, 20])
@pytest.mark.parametrize("name", PREFILLS)
def test_dead_sequences_change_no_bit(name: str, page_size: int, batch_invariant: bool) -> None:
    """With many of them, decode plans prefill, and no kernel in front of it (kRowsOfDecode in decode_choice.h)."""
    rows, kv_lens = PREFILLS[name]
    q, k_pages, v_pages, lengths, tables, cu_q_lens = mixed_inputs(rows, kv_lens, page_size, 128)
    attend = jax.jit(
        functools.partial(
            jpa.ragged_paged_attention, implementation="fused", return_lse=True, batch_invariant=batch_invariant
        )
    )
    expected = bits(attend(q, k_pages, v_pages, lengths, tables, cu_q_lens))
    dead = q.shape[0] // 4
    padded = (
        jnp.pad(lengths, (0, dead), constant_values=9),
        jnp.pad(tables, ((0, dead), (0, 0)), constant_values=-1),
        jnp.pad(cu_q_lens, (0, dead), constant_values=-7),  # which nothing reads
    )
    num_seqs = jnp.int32(lengths.shape[0])
    for _ in range(10):
        assert bits(attend(q, k_pages, v_pages, *padded, num_seqs)) == expected


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("num_seqs", "num_rows"), [(5, 400), (60, 300), (1500, 2000)])
def test_rows_in_any_order_are_those_of_first_rows_and_row_counts(
    num_seqs: int, num_rows: int, batch_invariant: bool
) -> None:
    """Kernels read `cu_q_lens` as `rows_of_each` does, which a mapped call goes through."""
    rng = np.random.default_rng(num_seqs)
    q, k_pages, v_pages, lengths, tables, _ = mixed_inputs(
        (num_rows, *(0,) * (num_seqs - 1)), (300,) * num_seqs, 20, 128
    )
    attend = functools.partial(
        jpa.ragged_paged_attention, implementation="fused", return_lse=True, batch_invariant=batch_invariant
    )
    direct, mapped = jax.jit(attend), jax.jit(jax.vmap(attend, in_axes=(None,) * 5 + (0, None)))
    in_order = np.sort(rng.integers(0, num_rows, num_seqs + 1))
    spoilt = np.where(rng.random(num_seqs + 1) < 0.2, rng.integers(-(2**31), 2**31, num_seqs + 1), in_order)
    for cuts in (in_order, spoilt, rng.permutation(in_order), np.full(num_seqs + 1, 2**31 - 1), in_order[::-1] - 9):
        for live in (num_seqs, num_seqs // 2, -1):
            args = (q, k_pages, v_pages, lengths, tables)
            some = jnp.asarray(cuts, jnp.int32)
            got = direct(*args, some, jnp.int32(live))
            want = [x[0] for x in mapped(*args, some[None], jnp.int32(live))]
            assert bits(got) == bits(want)


@pytest.mark.parametrize(("head_dim", "page_size", "page_dtype"), [(128, 20, BF16), (256, 1, BF16), (128, 16, E4M3)])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"), [((3000, 1500, 700), (3000, 4000, 701)), ((2040, 40), (9000, 700))], ids=["prompts", "chunk"]
)
def test_the_tile_cache_changes_no_result(
    monkeypatch: pytest.MonkeyPatch,
    q_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    head_dim: int,
    page_size: int,
    page_dtype: str,
) -> None:
    """The bits are the same with entries for all key tiles or for eight only, whoever writes them first."""
    args = mixed_inputs(q_lens, kv_lens, page_size, head_dim, page_dtype=page_dtype)
    scales = scales_of(page_dtype)
    sizes, results = [], []
    for mebibytes in (1, 2, 8, 256):
        monkeypatch.setenv("JPA_CUDA_WORKSPACE_MIB", str(mebibytes))
        attend = jax.jit(
            functools.partial(jpa.ragged_paged_attention, implementation="fused", return_lse=True, **scales)
        )
        memory = attend.lower(*args).compile().memory_analysis()
        assert memory is not None
        sizes.append(memory.temp_size_in_bytes)
        results += [bits(attend(*args)) for _ in range(10)]
    assert sizes == sorted(set(sizes)), f"scratch memory: {sizes}"
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize(("page_size", "page_dtype"), [(20, BF16), (16, E4M3)])
def test_the_tile_cache_takes_the_memory_there_is(
    monkeypatch: pytest.MonkeyPatch, page_size: int, page_dtype: str
) -> None:
    """A program that was kept may have less scratch memory than its call would ask for today; too little is refused."""
    args = mixed_inputs((2100, 40), (3000, 700), page_size, 128, page_dtype=page_dtype)
    scales = scales_of(page_dtype)
    asks_for = _ffi._CUDA_WORKSPACES["fused"]
    sizes: list[int] = []

    def with_memory(share: float, more: int = 0) -> list[bytes]:
        """A call whose tile cache has a share of the memory it asks for, and the call so many bytes more."""

        def size(*operands: jax.Array, **options: Any) -> int:
            without = asks_for(*operands, **{**options, "workspace_limit": 0})
            sizes.append(without + int(share * (asks_for(*operands, **options) - without)) + more)
            return sizes[-1]

        monkeypatch.setitem(_ffi._CUDA_WORKSPACES, "fused", size)
        attend = functools.partial(jpa.ragged_paged_attention, implementation="fused", return_lse=True, **scales)
        return bits(jax.jit(attend)(*args))

    expected = with_memory(1.0)
    for share, more in ((1.0, -1), (0.5, 0), (0.1, 0), (0.0, 0)):
        assert with_memory(share, more) == expected
    assert len(set(sizes)) == 5, f"scratch memory: {sizes}"
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"workspace: expected at least {sizes[-1]} bytes"):
        with_memory(0.0, -1)


# Scores of keys by their positions, in natural units. Engines mostly go from the last key tile to the first.
SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rise slowly": lambda keys: -3 * keys / 128,
    "rise fast": lambda keys: -20 * keys / 128,
    "fall": lambda keys: 3 * keys / 128,
    "are very low": lambda keys: -1000 - 3 * keys / 128,
    "alternate": lambda keys: 30.0 * (keys // 64 % 2),
    "have one peak": lambda keys: np.where(keys == 5, 300.0, 0.0),
}


@pytest.mark.parametrize(
    ("head_dim", "page_size", "page_dtype"),
    [(64, 16, BF16), (128, 16, BF16), (128, 20, BF16), (256, 16, BF16), (128, 16, E5M2)],
)
@pytest.mark.parametrize("name", SCORES)
def test_fused_prefill_whatever_scores_do(name: str, head_dim: int, page_size: int, page_dtype: str) -> None:
    """Maxima that rise a little or a lot, in either half of a key tile; of scores far below 0, and negated ones."""
    q, k_pages, v_pages, *rest = mixed_inputs((700, 300), (1500, 300), page_size, head_dim, page_dtype=page_dtype)
    tables = np.asarray(rest[1])
    positions = np.empty(k_pages.shape[:2])  # of each page's tokens
    positions[tables] = np.arange(tables.shape[1] * page_size).reshape(1, -1, page_size)
    k_pages = k_pages.at[..., 0].set(jnp.asarray(SCORES[name](positions)[..., None], k_pages.dtype))
    q = (q * 0.05).at[..., 0].set(1.0)
    scales = {} if page_dtype == BF16 else {"k_scale": jnp.float32(1.0), "v_scale": jnp.float32(1.0)}
    for sign in (1.0, -1.0):
        operands = (sign * q, k_pages, v_pages, *rest)
        fused, cublaslt = (
            jax.jit(
                functools.partial(
                    jpa.ragged_paged_attention, implementation=engine, return_lse=True, scale=1.0, **scales
                )
            )(*operands)
            for engine in ("fused", "cublaslt")
        )
        for mine, theirs in zip(fused, cublaslt, strict=True):
            assert np.isfinite(np.asarray(theirs, np.float32)).all()
            np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(theirs, np.float32), atol=2e-2)


def test_fused_prefill_does_not_depend_on_the_batch() -> None:
    """Batch-invariant: a chunk that would take several KV splits alone has the bits that it has among prompts."""
    rows, lengths = (100, *(300,) * 40), (5000, *(300,) * 40)
    args = mixed_inputs(rows, lengths, 16, 128)
    attend = jax.jit(functools.partial(jpa.ragged_paged_attention, implementation="fused", batch_invariant=True))
    q, k_pages, v_pages, kv_lens, tables, cu_q_lens = args
    alone = attend(q[:100], k_pages, v_pages, kv_lens[:1], tables[:1], cu_q_lens[:2])
    assert bits([alone]) == bits([attend(*args)[:100]])


INVARIANT = [engine.name for engine in _engines.ENGINES if engine.platform == "cuda" and engine.batch_invariant]


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize(
    ("heads", "page_dtype"), [(8, jnp.bfloat16), (80, jnp.bfloat16), (8, jnp.float8_e5m2), (8, jnp.int8)]
)
@pytest.mark.parametrize("cuda_engine", INVARIANT)
def test_a_sequence_has_the_same_bits_in_any_batch(
    cuda_engine: str, heads: int, page_dtype: Any, page_size: int
) -> None:
    """Alone, among others, at another place, and beside others that are gone or longer."""
    batch = 150
    q, k_pages, v_pages, tables, _ = decode_inputs(batch, 2048, page_size, heads=heads, page_dtype=page_dtype)
    lengths = jnp.asarray(np.random.default_rng(0).integers(0, 2049, batch).astype(np.int32)).at[:3].set([2048, 1, 0])
    scales = {"k_scale": jnp.float32(1.0), "v_scale": jnp.float32(1.0)}
    attend = compiled(cuda_engine, batch_invariant=True)

    def run(order: Any, lengths: jax.Array) -> tuple[np.ndarray, ...]:
        order = np.asarray(order)
        return tuple(map(np.asarray, attend(q[order], k_pages, v_pages, tables[order], lengths[order], **scales)))

    everyone = np.arange(batch)
    whole = run(everyone, lengths)
    for order in (everyone[::-1], np.roll(everyone, 37)):
        again = run(order, lengths)
        assert bits(x[np.argsort(order)] for x in again) == bits(whole)
    for some in ([0], [1], [77], [2, 0], [149, 3, 12, 0, 88], range(0, 150, 7)):
        mine = list(some)
        assert bits(run(mine, lengths)) == bits(x[mine] for x in whole)
    odd = everyone % 2 == 1
    for others in (0, 2048):
        changed = run(everyone, jnp.where(odd, lengths, others))
        assert bits(x[odd] for x in changed) == bits(x[odd] for x in whole)


def test_cublaslt_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit so small that row blocks and keys come in chunks; the online softmax joins them."""
    args = decode_inputs(3, 9000, 16)
    whole = compiled("cublaslt")(*args)
    monkeypatch.setenv("JPA_CUDA_WORKSPACE_MIB", "1")
    plan = _ffi.compiled("cuda").attention_plan(
        *("bfloat16", "bfloat16", 3, 8, 2, 64, 64, 16, 3, 563, True, _ffi.workspace_limit_cuda())
    )
    assert plan["groups"] > 1
    assert plan["stretches"] > 1
    chunked = jax.jit(functools.partial(jpa.paged_attention, implementation="cublaslt", return_lse=True))(*args)
    assert_right(whole, args)
    assert_right(chunked, args)
