"""Writing tokens, copying pages, and the pytree that holds the pools: bit for bit against the oracle, and in place."""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DTYPES, Array, random_values
from harness import assert_same_bits, temporary_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_paged_attn as jpa
from jax_paged_attn import _ffi, _reference
from jax_paged_attn._layouts import LAYOUTS as LAYOUTS_BY_NAME

P, S, K, H = 7, 3, 2, 16
SCALES = {"none": None, "scalar": np.float32(0.37), "head": np.array([0.5, 3.0], np.float32)}


def pools(seed: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return random_values(rng, (P, S, K, H), dtype), random_values(rng, (P, S, K, H), dtype)


def hard_values(tokens: int) -> Array:
    """Float32 values that meet every rule of rounding: ties, saturation, denormals of fp8, NaN, Inf, signed zeros."""
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((tokens, K, H)) * 10.0 ** rng.integers(-8, 6, (tokens, K, H))).astype(np.float32)
    ties = np.array([0.5, 1.5, 2.5, -0.5, -126.5, 126.5, 127.5, 1.0625, 1.1875, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10])
    limits = np.array([448, 464, 465, -500, 57344, 61440, 65504, 127, 128, 3e38, np.inf, -np.inf, np.nan, 0.0, -0.0])
    special = np.concatenate([ties, limits]).astype(np.float32)
    values.reshape(-1)[: special.size] = special
    return values


def public_write(*args: Any, **scales: Any) -> Any:
    return harness.call("write_kv_pages", *args, **scales)


def reference_write(*args: Any, **scales: Any) -> Any:
    """The fallback where there is no engine, called as the primitive: scales are `[X, K]`, X = 0 where absent."""
    rows = [np.zeros((0, K), np.float32) if s is None else np.full((1, K), s, np.float32) for s in scales.values()]
    return _reference.write(*args, *rows)


@pytest.mark.parametrize("write", [public_write, reference_write])
@pytest.mark.parametrize(
    ("page_dtype", "scales"), [(d, s) for d in DTYPES for s in SCALES if (d, s) != ("int8", "none")]
)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_write_matches_the_oracle(dtype: str, page_dtype: str, scales: str, write: Callable[..., Any]) -> None:
    k_pages, v_pages = pools(0, DTYPES[page_dtype])
    with np.errstate(over="ignore"):
        k = hard_values(6).astype(DTYPES[dtype])
    v = k[::-1].copy()
    # Skipped, skipped, first and last slot, a duplicate: token 5 wins over token 2.
    slots = np.array([-1, P * S, 4, P * S - 1, 0, 4], np.int32)
    factors = {"k_scale": SCALES[scales], "v_scale": SCALES[scales]}
    got = write(k_pages, v_pages, k, v, slots, **factors)
    with np.errstate(over="ignore", invalid="ignore"):
        want = oracle.write_kv_pages(k_pages, v_pages, k, v, slots, **factors)
    for mine, theirs in zip(got, want, strict=True):
        assert_same_bits(mine, theirs)


LAYOUTS = ("interleaved", "padded", "head_major")


@pytest.mark.parametrize("write", [harness.write_in_layout, None], ids=["public", "reference"])
@pytest.mark.parametrize("page_dtype", ["f32", "bf16", "e4m3", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_write_to_other_layouts_matches_the_oracle(layout: str, page_dtype: str, write: Any) -> None:
    """Bit for bit, garbage in padding heads included, and on the platforms that have no engine."""
    k_pages, v_pages = pools(0, DTYPES[page_dtype])
    k = hard_values(6)
    operands = (k, k[::-1].copy(), np.array([-1, P * S, 4, P * S - 1, 0, 4], np.int32))
    scales = {"k_scale": SCALES["head"], "v_scale": SCALES["scalar"]}
    own = harness.in_layout(layout, k_pages, v_pages)
    if write is None:
        rows = [np.full((1, K), scale, np.float32) for scale in scales.values()]
        got = _reference.write(*own, *operands, *rows, layout={"padded": "interleaved"}.get(layout, layout))
    else:
        got = harness.call("harness.write_in_layout", *own, *operands, layout=layout, **scales)
    with np.errstate(over="ignore", invalid="ignore"):
        want = oracle.write_kv_pages(k_pages, v_pages, *operands, **scales)
    for mine, theirs in zip(got, harness.in_layout(layout, *want), strict=True):
        assert_same_bits(mine, theirs)


INT32 = st.one_of(st.integers(-3, P * S + 3), st.sampled_from([2**31 - 1, -(2**31), 2**31 - P * S]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(slots=st.lists(INT32, min_size=9, max_size=9))
def test_write_to_any_slots_matches_the_oracle(slots: list[int]) -> None:
    k_pages, v_pages = pools(0, DTYPES["bf16"])
    k, v = np.random.default_rng(2).standard_normal((2, 9, K, H)).astype(np.float32)
    got = harness.call("write_kv_pages", k_pages, v_pages, k, v, np.array(slots, np.int32))
    for mine, theirs in zip(got, oracle.write_kv_pages(k_pages, v_pages, k, v, np.array(slots)), strict=True):
        assert_same_bits(mine, theirs)


def check_write_of_rows(
    num_pages: int, row: tuple[int, int], page_size: int, slots: Array, dtype: str, layout: str = "split"
) -> None:
    """Rows keep their bits, so NumPy can tell what is expected of more tokens than the oracle likes."""
    rng = np.random.default_rng(3)
    pages = k_pages, v_pages = [random_values(rng, (num_pages, page_size, *row), DTYPES[dtype]) for _ in "kv"]
    new = [random_values(rng, (len(slots), *row), DTYPES[dtype]) for _ in "kv"]
    inside = (slots >= 0) & (slots < num_pages * page_size)
    got = harness.call(
        "harness.write_in_layout", *harness.in_layout(layout, k_pages, v_pages), *new, slots, layout=layout
    )
    for want, values in zip(pages, new, strict=True):
        want.reshape(-1, *row)[slots[inside]] = values[inside]  # of equal indices NumPy keeps the last
    for mine, want in zip(got, harness.in_layout(layout, k_pages, v_pages), strict=True):
        assert_same_bits(mine, want)


@pytest.mark.parametrize(("tokens", "kv_heads", "head_dim"), [(600, 1, 5), (5000, 2, 16), (150_000, 1, 8)])
def test_write_of_many_tokens(tokens: int, kv_heads: int, head_dim: int) -> None:
    """More tokens than a worker looks at at once; most slots have several of them, far apart, and some are outside."""
    num_pages = tokens // (2 * S)
    slots = np.random.default_rng(4).integers(-5, num_pages * S + 5, tokens).astype(np.int32)
    check_write_of_rows(num_pages, (kv_heads, head_dim), S, slots, "f16")


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "head_dim", "layout"),
    [
        pytest.param("bf16", 1, 8, "split", id="16 bytes"),
        pytest.param("f16", 3, 5, "split", id="30 bytes"),
        pytest.param("bf16", 1, 136, "split", id="272 bytes"),
        pytest.param("bf16", 8, 128, "split", id="2 KiB"),
        pytest.param("f32", 5, 100, "split", id="2000 bytes"),
        pytest.param("bf16", 8, 128, "interleaved", id="2 KiB, interleaved"),
        pytest.param("f32", 5, 100, "padded", id="2000 bytes, interleaved and padded"),
        pytest.param("f16", 3, 5, "head_major", id="30 bytes, head_major"),
        pytest.param("bf16", 8, 128, "head_major", id="2 KiB, head_major"),
    ],
)
def test_write_of_a_prompt(dtype: str, kv_heads: int, head_dim: int, layout: str) -> None:
    """Neighbours mostly stay such, in scattered pages, but some tokens are repeated later, and some are outside."""
    tokens, page_size = 5003, 16
    num_pages = 2 * tokens // page_size
    num_slots = num_pages * page_size
    rng = np.random.default_rng(5)
    slots = (rng.permutation(num_pages)[:, None] * page_size + np.arange(page_size)).reshape(-1)[:tokens]
    some = rng.permutation(tokens)[:600].reshape(3, 200)
    slots[some[0]] = slots[some[1]]
    slots[some[2]] = rng.choice([-(2**31), -2, -1, num_slots, num_slots + 7, 2**31 - 1], 200)
    # Runs that enter and leave the pool, twice the same one, and one slot many times.
    slots[1000:1010] = np.arange(-5, 5)
    slots[2000:2010] = np.arange(num_slots - 5, num_slots + 5)
    slots[3000:3064] = slots[3064:3128] = np.arange(100, 164)
    slots[4000:4040] = 77
    check_write_of_rows(num_pages, (kv_heads, head_dim), page_size, slots.astype(np.int32), dtype, layout)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pairs=st.lists(st.tuples(INT32, INT32), min_size=6, max_size=6), dtype=st.sampled_from(["f32", "int8"]))
def test_copy_matches_the_oracle(pairs: list[tuple[int, int]], dtype: str) -> None:
    k_pages, v_pages = pools(3, DTYPES[dtype])
    src, dst = np.array(pairs, np.int32).T
    got = harness.call("copy_kv_pages", k_pages, v_pages, src, dst)
    for mine, theirs in zip(got, oracle.copy_kv_pages(k_pages, v_pages, src, dst), strict=True):
        assert_same_bits(mine, theirs)


def test_copy_reads_sources_as_they_were() -> None:
    """A rotation of pages and a chain: no target may be read after it was written. Of equal targets the last wins."""
    k_pages, v_pages = pools(3, DTYPES["e4m3"])
    src, dst = np.array([0, 1, 2, 3, 0, P], np.int32), np.array([1, 2, 0, 4, 4, 4], np.int32)
    k_new, v_new = jpa.copy_kv_pages(k_pages, v_pages, src, dst)
    for new, old in ((k_new, k_pages), (v_new, v_pages)):
        assert_same_bits(new, old[[2, 0, 1, 3, 0, 5, 6]])


def test_no_tokens_and_no_pages_change_nothing() -> None:
    k_pages, v_pages = pools(0, DTYPES["f32"])
    none, ids = np.zeros((0, K, H), np.float32), np.zeros(0, np.int32)
    written = jpa.write_kv_pages(k_pages, v_pages, none, none, ids)
    copied = jpa.copy_kv_pages(k_pages, v_pages, ids, ids)
    for k_new, v_new in (written, copied):
        assert_same_bits(k_new, k_pages)
        assert_same_bits(v_new, v_pages)
    empty = k_pages[:0]
    tokens, slots = np.ones((2, K, H), np.float32), np.array([0, 1], np.int32)
    assert jpa.write_kv_pages(empty, empty, tokens, tokens, slots)[0].shape == empty.shape
    assert jpa.copy_kv_pages(empty, empty, slots, slots)[0].shape == empty.shape


# ---- In place --------------------------------------------------------------------------------------------------------


def _write(k_pages: Any, v_pages: Any) -> Any:
    tokens = jnp.ones((2, K, H)) * 3
    return jpa.write_kv_pages(k_pages, v_pages, tokens, tokens, jnp.array([4, 9], jnp.int32))


def _copy(k_pages: Any, v_pages: Any) -> Any:
    return jpa.copy_kv_pages(k_pages, v_pages, jnp.array([0, 1], jnp.int32), jnp.array([1, 5], jnp.int32))


def _scan(k_pages: Any, v_pages: Any) -> Any:
    """Three steps of writing, each reading what the one before wrote."""

    def step(pages: Any, slot: Any) -> Any:
        k_pages, v_pages = pages
        tokens = k_pages[0, :1] + 1
        k_pages, v_pages = jpa.write_kv_pages(k_pages, v_pages, tokens, tokens, slot[None])
        lengths, tables = jnp.full(1, S, jnp.int32), jnp.zeros((1, 1), jnp.int32)
        return (k_pages, v_pages), jpa.paged_attention(tokens, k_pages, v_pages, tables, lengths)

    return jax.lax.scan(step, (k_pages, v_pages), jnp.array([0, 0, 8], jnp.int32))[0]


@pytest.mark.parametrize("update", [_write, _copy, _scan])
def test_donated_pages_are_updated_in_place(update: Callable[..., Any]) -> None:
    k_pages, v_pages = (jax.device_put(x) + 0 for x in pools(4, DTYPES["f32"]))
    want = [np.asarray(x) for x in jax.jit(update)(k_pages, v_pages)]
    assert not np.array_equal(want[0], k_pages)
    pointers = [x.unsafe_buffer_pointer() for x in (k_pages, v_pages)]

    donating = jax.jit(update, donate_argnums=(0, 1)).lower(k_pages, v_pages).compile()
    pool = rf"f32\[{P},{S},{K},{H}\]"
    assert not re.findall(rf"= {pool}\S* (?:copy|copy-start|broadcast|concatenate)\(.*", donating.as_text() or "")
    assert temporary_bytes(donating) < k_pages.nbytes

    got = donating(k_pages, v_pages)
    assert [x.unsafe_buffer_pointer() for x in got] == pointers
    assert k_pages.is_deleted()
    assert v_pages.is_deleted()
    for mine, theirs in zip(got, want, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_donated_pages_of_other_layouts_are_updated_in_place(layout: str, dtype: str) -> None:
    """Two writes, each of what the pool before has: XLA makes no array of a pool's size."""
    own = [jax.device_put(x) + np.zeros((), x.dtype) for x in harness.in_layout(layout, *pools(4, DTYPES[dtype]))]
    k, v = np.random.default_rng(2).standard_normal((2, 2, K, H)).astype(np.float32)
    scales = dict.fromkeys(("k_scale", "v_scale"), SCALES["scalar"])

    def update(*own: Any) -> Any:
        for slots in ([4, 9], [9, 0]):
            own = harness.write_in_layout(*own, k, v, np.array(slots, np.int32), layout=layout, **scales)
        return own

    want = [np.asarray(x) for x in jax.jit(update)(*own)]
    pointers = [x.unsafe_buffer_pointer() for x in own]
    donating = jax.jit(update, donate_argnums=range(len(own))).lower(*own).compile()
    if _ffi.has("cpu") or jax.default_backend() == "gpu":
        pool = ",".join(map(str, own[0].shape))
        made = re.findall(rf"= \w+\[{pool}\]\S* ([\w-]+)\(", donating.as_text() or "")
        assert set(made) <= {"parameter", "get-tuple-element"}
        assert temporary_bytes(donating) < own[0].nbytes
    got = donating(*own)
    assert [x.unsafe_buffer_pointer() for x in got] == pointers
    for mine, theirs in zip(got, want, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("update", [_write, _copy, _scan])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_pages_that_are_not_donated_stay(update: Callable[..., Any], transform: Callable[..., Any]) -> None:
    before = pools(4, DTYPES["f32"])
    k_pages, v_pages = (jax.device_put(x) + 0 for x in before)
    k_new, v_new = transform(update)(k_pages, v_pages)
    assert_same_bits(k_pages, before[0])
    assert_same_bits(v_pages, before[1])
    assert not np.array_equal(k_new, k_pages)
    assert not np.array_equal(v_new, v_pages)


def test_donated_pages_of_a_vmapped_write_are_updated_in_place() -> None:
    k_pages, v_pages = (jnp.stack([x, 2 * x]) for x in pools(4, DTYPES["f32"]))
    pointers = [x.unsafe_buffer_pointer() for x in (k_pages, v_pages)]
    got = jax.jit(jax.vmap(_write), donate_argnums=(0, 1))(k_pages, v_pages)
    assert [x.unsafe_buffer_pointer() for x in got] == pointers


@pytest.mark.slow
def test_write_beyond_2_to_the_31_elements() -> None:
    """The old pool is never touched memory, which the system shares; the new ones are real."""
    available = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())["MemAvailable"]
    if int(available.split()[0]) < 6 * 2**20:  # what files are cached in counts as available, and not as free
        pytest.skip(f"needs 6 GiB of memory, and {available.strip()} are available")
    shape = (2**20 + 5, 16, 1, 128)
    zeros = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.int8).reshape(shape)
    assert zeros.size > 2**31
    pages = np.array([0, 2**20 - 1, 2**20, shape[0] - 1], np.int32)
    tokens = np.random.default_rng(0).standard_normal((4, 1, 128), np.float32)
    pool = jax.device_put(zeros, may_alias=True)
    scales = {"k_scale": np.float32(0.02), "v_scale": np.float32(0.01)}
    new_pools = jax.jit(jpa.write_kv_pages)(pool, pool, tokens, tokens, pages * 16 + 5, **scales)
    for new, scale in zip(new_pools, scales.values(), strict=True):
        want = np.zeros((4, *shape[1:]), np.int8)
        want[:, 5] = oracle.store(tokens[:, None], np.full(1, scale), np.int8)[:, 0]
        assert_same_bits(new[pages], want)
        assert not new[pages + np.array([1, -1, 1, -1])].any()


# ---- vmap ------------------------------------------------------------------------------------------------------------

WRITE_OPERANDS = ("k_pages", "v_pages", "k", "v", "slot_mapping", "k_scale", "v_scale")


@pytest.mark.parametrize(
    "mapped",
    [*[(name,) for name in WRITE_OPERANDS], ("k_pages", "v_pages"), ("k", "v", "slot_mapping"), WRITE_OPERANDS],
    ids="+".join,
)
def test_vmap_of_write_is_a_loop(mapped: tuple[str, ...]) -> None:
    rng = np.random.default_rng(6)
    variants = []
    for _ in range(3):
        k, v = rng.standard_normal((2, 8, K, H)).astype(np.float32)
        # Skipped slots that a neighbour's pool would have, and duplicates.
        slots = rng.permutation([0, 0, 5, 11, P * S - 1, P * S, P * S + 5, -1]).astype(np.int32)
        scales = rng.random((2, K), np.float32) + 0.1
        values = (*pools(int(rng.integers(99)), DTYPES["e4m3"]), k, v, slots, *scales)
        variants.append(dict(zip(WRITE_OPERANDS, values, strict=True)))
    axes = {name: 0 if name in mapped else None for name in WRITE_OPERANDS}
    stacked = {n: np.stack([x[n] for x in variants]) if n in mapped else variants[0][n] for n in WRITE_OPERANDS}
    got = jax.jit(jax.vmap(lambda x: jpa.write_kv_pages(**x), in_axes=(axes,)))(stacked)
    for i, variant in enumerate(variants):
        alone = {n: variant[n] if n in mapped else variants[0][n] for n in WRITE_OPERANDS}
        for mine, theirs in zip(got, oracle.write_kv_pages(**alone), strict=True):
            assert_same_bits(mine[i], theirs)


@pytest.mark.parametrize("mapped", ["pools", "tokens", "slots", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_of_a_write_to_other_layouts_is_a_loop(layout: str, mapped: str) -> None:
    rng = np.random.default_rng(6)
    split = [pools(seed, DTYPES["bf16"]) for seed in range(3)]
    own = [np.stack(x) for x in zip(*(harness.in_layout(layout, *pair) for pair in split), strict=True)]
    tokens = rng.standard_normal((2, 3, 8, K, H)).astype(np.float32)
    slots = np.stack([rng.permutation([0, 0, 5, 11, P * S - 1, P * S, P * S + 5, -1]) for _ in range(3)])
    operands = (*own, *tokens, slots.astype(np.int32))
    kinds = ["pools"] * len(own) + ["tokens"] * 2 + ["slots"]
    axes = [0 if mapped in (kind, "all") else None for kind in kinds]
    given = [x if axis == 0 else x[0] for x, axis in zip(operands, axes, strict=True)]
    write = functools.partial(harness.write_in_layout, layout=layout)
    got = jax.jit(jax.vmap(write, in_axes=axes))(*given)
    for i in range(3):
        alone = [x[i] if axis == 0 else x for x, axis in zip(given, axes, strict=True)]
        for mine, theirs in zip(got, jax.jit(write)(*alone), strict=True):
            assert_same_bits(mine[i], np.asarray(theirs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_of_a_write_to_other_layouts_are_those_of_split_pools(layout: str) -> None:
    """With slots that are skipped and written twice, and scales of keys."""
    slots, scales = np.array([4, 4, P * S, 0], np.int32), {"k_scale": np.array([0.5, 2.0], np.float32)}
    operands: tuple[Any, ...] = (
        *pools(4, DTYPES["f32"]),
        *np.random.default_rng(3).standard_normal((2, 4, K, H)).astype(np.float32),
    )

    def split(k_pages: Any, v_pages: Any, k: Any, v: Any) -> Any:
        return jpa.write_kv_pages(k_pages, v_pages, k, v, slots, **scales)

    def write(k_pages: Any, v_pages: Any, k: Any, v: Any) -> Any:
        own = harness.in_layout(layout, k_pages, v_pages, xp=jnp)
        own = harness.write_in_layout(*own, k, v, slots, layout=layout, **scales)
        name = "interleaved" if layout == "padded" else layout
        return tuple(LAYOUTS_BY_NAME[name].split(own[min(i, len(own) - 1)], i, K) for i in range(2))

    bars = harness.normal_like(jax.eval_shape(split, *operands), 8)
    dots = harness.normal_like(operands, 9)
    for derivative, seeds in ((harness.pull_back, bars), (harness.push_forward, dots)):
        for mine, theirs in zip(derivative(write, operands, seeds), derivative(split, operands, seeds), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("mapped", ["src", "dst", "k_pages"])
def test_vmap_of_copy_is_a_loop(mapped: str) -> None:
    k_pages, v_pages = pools(7, DTYPES["bf16"])
    ids = np.array([[0, 1, P + 2], [3, 3, 5], [-1, 6, 0]], np.int32)
    args: dict[str, Any] = {"k_pages": k_pages, "v_pages": v_pages, "src": ids[1], "dst": ids[0]}
    args[mapped] = ids if mapped != "k_pages" else np.stack([pools(i, DTYPES["bf16"])[0] for i in range(3)])
    axes = {name: 0 if name == mapped else None for name in args}
    got = jax.jit(jax.vmap(lambda x: jpa.copy_kv_pages(**x), in_axes=(axes,)))(args)
    for i in range(3):
        want = oracle.copy_kv_pages(**{**args, mapped: args[mapped][i]})
        for mine, theirs in zip(got, want, strict=True):
            assert_same_bits(mine[i], theirs)


# ---- PagedKVCache ----------------------------------------------------------------------------------------------------

LAYERS = 3


def _caches(**keywords: Any) -> list[jpa.PagedKVCache]:
    sizes = (LAYERS, P, S, K, H)
    return [jpa.PagedKVCache.create(*sizes, dtype=jnp.float32, stacked=s, **keywords) for s in (False, True)]


def test_cache_is_a_pytree_of_pools() -> None:
    tuples, flat = _caches(k_scale=0.5, v_scale=np.array([1.0, 2.0]))
    assert [x.shape for x in jax.tree.leaves(tuples)] == [(P, S, K, H)] * (2 * LAYERS) + [(), (K,)]
    assert [x.shape for x in jax.tree.leaves(flat)] == [(LAYERS * P, S, K, H)] * 2 + [(), (K,)]
    for cache, stacked in ((tuples, False), (flat, True)):
        doubled = jax.tree.map(lambda x: 2 * x, cache)
        assert isinstance(doubled, jpa.PagedKVCache)
        assert (doubled.num_layers, doubled.num_pages, doubled.page_size) == (LAYERS, P, S)
        assert doubled.stacked == stacked
        assert jax.tree.structure(doubled) == jax.tree.structure(cache)
    assert jpa.PagedKVCache(tuples.k_pages, tuples.v_pages, None, None).num_layers == LAYERS


def test_both_layouts_give_the_same_attention() -> None:
    """Each layer writes other tokens, then attends; ids that are bad stay so in the flat pool."""
    rng = np.random.default_rng(8)
    k, v = rng.standard_normal((2, LAYERS, 5, K, H)).astype(np.float32)
    q = rng.standard_normal((LAYERS, 2, K, H)).astype(np.float32)
    slots = jnp.array([0, 1, 2, P * S - 1, P * S], jnp.int32)
    tables, lengths = jnp.array([[0, P + 1], [P - 1, -1]], jnp.int32), jnp.array([5, 3], jnp.int32)
    src, dst = jnp.array([P - 1, 0, P], jnp.int32), jnp.array([3, 4, 0], jnp.int32)

    def layer(cache: jpa.PagedKVCache, index: Any) -> Any:
        return jpa.paged_attention(q[index], *cache.layer(index, tables), lengths, return_lse=True)

    @jax.jit
    def step(cache: jpa.PagedKVCache) -> Any:
        for index in range(LAYERS):
            cache = cache.write(index, k[index], v[index], slots)
        cache = cache.copy(src, dst)
        return cache, [layer(cache, index) for index in range(LAYERS)]

    (tuples, want), (flat, got) = map(step, _caches(k_scale=0.5, v_scale=2.0))
    assert_same_bits(flat.k_pages[0], np.concatenate(tuples.k_pages))
    assert_same_bits(flat.v_pages[0], np.concatenate(tuples.v_pages))
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_same_bits(mine, np.asarray(theirs))
    zeros = np.zeros((P, S, K, H), np.float32)
    expected_k, _ = oracle.write_kv_pages(zeros, zeros, k[1], v[1], np.asarray(slots), k_scale=0.5)
    assert_same_bits(tuples.k_pages[1][:3], expected_k[:3])
    assert_same_bits(tuples.k_pages[1][3], expected_k[P - 1])


def test_flat_pool_is_carried_by_a_scan_in_place() -> None:
    _, cache = _caches()
    k, v = np.random.default_rng(9).standard_normal((2, LAYERS, 2, K, H)).astype(np.float32)
    slots = jnp.array([1, 20], jnp.int32)

    def over_layers(cache: jpa.PagedKVCache, k: Any, v: Any) -> Any:
        def step(cache: jpa.PagedKVCache, xs: Any) -> Any:
            index, k, v = xs
            return cache.write(index, k, v, slots), None

        return jax.lax.scan(step, cache, (jnp.arange(LAYERS), k, v))[0]

    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    got = jax.jit(over_layers, donate_argnums=0)(cache, k, v)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(got)] == pointers
    for index in range(LAYERS):
        zeros = np.zeros((P, S, K, H), np.float32)
        want, _ = oracle.write_kv_pages(zeros, zeros, k[index], v[index], np.asarray(slots))
        assert_same_bits(got.k_pages[0][index * P : (index + 1) * P], want)


def test_tuple_of_pools_wants_a_static_layer() -> None:
    tuples, _ = _caches()
    tables = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(TypeError, match=r"^index: expected a static layer"):
        jax.jit(lambda i: tuples.layer(i, tables))(0)
    with pytest.raises(ValueError, match=rf"^index: expected a layer in \[0, {LAYERS}\), got {LAYERS}"):
        tuples.layer(LAYERS, tables)


ROWS = np.array([[0.5, 2.0], [0.25, 1.0], [3.0, 0.125]], np.float32)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "e4m3", "int8"])
@pytest.mark.parametrize("scale", [None, 0.5, ROWS[0], ROWS], ids=["none", "scalar", "K", "LK"])
def test_attend_uses_the_scales_that_write_used(stacked: bool, dtype: str, scale: Any) -> None:
    """Decode and ragged calls of every layer equal plain calls over pools that were written with the layer's scale."""
    if dtype == "int8" and scale is None:
        return
    scales = {"k_scale": scale, "v_scale": None if scale is None else scale + np.float32(0.5)}
    cache = jpa.PagedKVCache.create(LAYERS, P, S, K, H, DTYPES[dtype], stacked=stacked, **scales)
    k, v, q = np.random.default_rng(11).standard_normal((3, LAYERS, 5, K, H)).astype(np.float32)
    slots, tables = np.array([0, 1, 2, 3, P * S], np.int32), np.array([[0, 1], [1, -1]], np.int32)
    lengths, cu_q_lens = np.array([4, 1], np.int32), np.array([0, 3, 4], np.int32)
    for layer in range(LAYERS):
        cache = cache.write(layer, k[layer], v[layer], slots)
    empty = np.zeros((P, S, K, H), DTYPES[dtype])
    for layer in range(LAYERS):
        own: dict[str, Any] = {n: s if s is None or np.ndim(s) < 2 else s[layer] for n, s in scales.items()}
        pools = jpa.write_kv_pages(empty, empty, k[layer], v[layer], slots, **own)
        want = jpa.paged_attention(q[layer, :2], *pools, tables, lengths, soft_cap=3.0, return_lse=True, **own)
        got = cache.attend(layer, q[layer, :2], tables, lengths, soft_cap=3.0, return_lse=True)
        ragged = (lengths, tables, cu_q_lens, np.int32(2))
        want += jpa.ragged_paged_attention(q[layer], *pools, *ragged, return_lse=True, causal=False, **own)
        got += cache.attend_ragged(layer, q[layer], *ragged, return_lse=True, causal=False)
        for mine, theirs in zip(got, want, strict=True):
            assert_same_bits(mine, np.asarray(theirs))


def test_scales_per_layer_go_with_the_layers_of_a_scan() -> None:
    tuples, flat = (
        jpa.PagedKVCache.create(LAYERS, P, S, K, H, jnp.int8, stacked=stacked, k_scale=ROWS, v_scale=2 * ROWS)
        for stacked in (False, True)
    )
    k, v, q = np.random.default_rng(12).standard_normal((3, LAYERS, 2, K, H)).astype(np.float32)
    slots, tables, lengths = np.array([1, 9], np.int32), np.array([[0], [3]], np.int32), np.array([2, 1], np.int32)

    @jax.jit
    def over_layers(cache: jpa.PagedKVCache) -> Any:
        def step(cache: jpa.PagedKVCache, xs: Any) -> Any:
            layer, q, k, v = xs
            cache = cache.write(layer, k, v, slots)
            return cache, cache.attend(layer, q, tables, lengths)

        return jax.lax.scan(step, cache, (jnp.arange(LAYERS), q, k, v))

    flat, outs = over_layers(flat)
    for layer in range(LAYERS):
        tuples = tuples.write(layer, k[layer], v[layer], slots)
        np.testing.assert_allclose(outs[layer], tuples.attend(layer, q[layer], tables, lengths), rtol=1e-6)
    assert_same_bits(flat.k_pages[0], np.concatenate(tuples.k_pages))


# A layer whose first slot, in int32 arithmetic, is slot 1 of layer 0.
WRAPPING = (pow(P * S, -1, 2**32) + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize("layer", [-1, LAYERS, 2**31 - 1, -(2**31), WRAPPING])
def test_a_traced_layer_outside_writes_nothing_and_sees_nothing(layer: int) -> None:
    _, cache = _caches()
    tokens, slots = jnp.ones((P * S, K, H)), jnp.arange(P * S, dtype=jnp.int32)
    cache = cache.write(0, tokens, tokens, slots)
    written = jax.jit(lambda layer: cache.write(layer, 2 * tokens, tokens, slots))(layer)
    assert_same_bits(written.k_pages[0], np.asarray(cache.k_pages[0]))
    tables, lengths = jnp.arange(P, dtype=jnp.int32)[None], jnp.full(1, P * S, jnp.int32)
    out, lse = jax.jit(lambda layer: cache.attend(layer, tokens[:1], tables, lengths, return_lse=True))(layer)
    assert not out.any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("stacked", [False, True])
def test_bad_layers_are_refused_in_both_layouts(stacked: bool) -> None:
    cache = _caches()[stacked]
    tokens, slots = np.ones((1, K, H), np.float32), np.zeros(1, np.int32)
    tables, lengths, cu_q_lens = np.zeros((1, 1), np.int32), np.ones(1, np.int32), np.array([0, 1], np.int32)
    calls: dict[str, Callable[..., Any]] = {
        "layer": lambda i, **scale: cache.attend(i, tokens, tables, lengths, **scale),
        "layer ": lambda i, **scale: cache.attend_ragged(i, tokens, lengths, tables, cu_q_lens, **scale),
        "index": lambda i: cache.layer(i, tables),
        "index ": lambda i: cache.write(i, tokens, tokens, slots),
        "index  ": lambda i: cache.scales(i),
    }
    for name, call in calls.items():
        expected = rf"^{name.strip()}: expected a layer in \[0, {LAYERS}\), got"
        for outside in (-1, LAYERS, np.int64(2**40), jnp.int32(LAYERS)):
            with pytest.raises(ValueError, match=f"{expected} {int(outside)}"):
                call(outside)
        for nonsense in ("0", True, np.True_, jnp.array(True), 1.0, np.float32(0), jnp.float32(0), None, [0], slots):
            with pytest.raises(TypeError, match=expected):
                call(nonsense)
        for good in (LAYERS - 1, np.int64(0), np.array(1), jnp.int32(1)):
            call(good)
    for table in ([[0.7]], np.array([[0.7]], np.float32), jnp.zeros((1, 1)), [[True]]):
        with pytest.raises(ValueError, match=r"^block_tables: expected dtype int32"):
            cache.layer(0, table)  # pyright: ignore[reportArgumentType]
    for name in ("k_scale", "v_scale"):
        with pytest.raises(TypeError, match=f"^{name}: expected none, since the cache has its own"):
            calls["layer"](0, **{name: 1.0})


def prefix(k_pages: Any, v_pages: Any, *scales: Any, **number: Any) -> Any:
    """A cache of what is no pool."""
    return jpa.PagedKVCache(k_pages, v_pages, *scales, **number)


@pytest.mark.parametrize("scales", [{}, {"k_scale": 0.5, "v_scale": ROWS}], ids=["plain", "scaled"])
@pytest.mark.parametrize("stacked", [False, True])
def test_prefix_trees(stacked: bool, scales: dict[str, Any]) -> None:
    cache = _caches(**scales)[stacked]
    s = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for tree in (
        prefix(s, s),
        prefix(s, s, num_layers=LAYERS),
        prefix(s, None),
        prefix(None, None),
        prefix(s, s, s, s),
    ):
        if tree.k_scale is not None and not scales:
            continue
        got = jax.jit(lambda cache: cache, in_shardings=(tree,), out_shardings=tree)(cache)
        assert jax.tree.structure(got) == jax.tree.structure(cache)
        assert (got.num_layers, got.stacked) == (LAYERS, stacked)
    slots, tokens = jnp.array([[0], [4]], jnp.int32), jnp.ones((1, K, H))
    tables, lengths = jnp.array([[0], [1]], jnp.int32), jnp.array([1, 2], jnp.int32)

    def attend(cache: jpa.PagedKVCache, table: Any, length: Any) -> Any:
        return cache.attend(1, tokens, table[None], length[None])[0]

    written = cache.write(1, tokens, tokens, slots[0])
    got = jax.vmap(attend, in_axes=(prefix(None, None), 0, 0))(written, tables, lengths)
    np.testing.assert_allclose(got, written.attend(1, tokens.repeat(2, 0), tables, lengths))
    write = jax.vmap(lambda slot: cache.write(1, tokens, tokens, slot), out_axes=prefix(0, 0))
    assert write(slots).k_pages[0].shape == (2, *cache.k_pages[0].shape)
    # A tree with a leaf for pools is no tree of a cache, however many layers that has.
    for tree in (prefix(None, None), prefix(0, 0)):
        assert jax.tree.structure(tree) != jax.tree.structure(cache)


# ---- unrolled layers -------------------------------------------------------------------------------------------------


def _write_first(cache: jpa.PagedKVCache, q: Any, k: Any) -> Any:
    slots, tables, lengths = jnp.array([4], jnp.int32), jnp.array([[1]], jnp.int32), jnp.array([2], jnp.int32)
    for layer in range(LAYERS):
        cache = cache.write(layer, k[layer], k[layer], slots)
    return cache, [cache.attend(layer, q[layer], tables, lengths) for layer in range(LAYERS)]


def _one_after_the_other(cache: jpa.PagedKVCache, q: Any, k: Any) -> Any:
    """As in a model: the tokens of a layer are computed from the attention of the one before."""
    slots, tables, lengths = jnp.array([4], jnp.int32), jnp.array([[1]], jnp.int32), jnp.array([2], jnp.int32)
    outs, tokens = [], k[0]
    for layer in range(LAYERS):
        cache = cache.write(layer, tokens, tokens, slots)
        outs.append(cache.attend(layer, q[layer], tables, lengths))
        tokens = k[layer] + outs[-1]
    return cache, outs


def _in_turn(cache: jpa.PagedKVCache, q: Any, k: Any) -> Any:
    slots, tables, lengths = jnp.array([4], jnp.int32), jnp.array([[1]], jnp.int32), jnp.array([2], jnp.int32)
    outs = []
    for layer in range(LAYERS):
        cache = cache.write(layer, k[layer], k[layer], slots)
        outs.append(cache.attend(layer, q[layer], tables, lengths))
    return cache, outs


@pytest.mark.parametrize(
    ("layers", "stacked"),
    [(_write_first, True), (_one_after_the_other, True), (_in_turn, False), (_write_first, False)],
)
def test_unrolled_layers_as_the_docstring_says_copy_no_pool(layers: Callable[..., Any], stacked: bool) -> None:
    cache = _caches()[stacked]
    q, k = jnp.ones((2, LAYERS, 1, K, H)) * jnp.arange(1.0, LAYERS + 1).reshape(1, -1, 1, 1, 1)
    want = [np.asarray(x) for x in jax.tree.leaves(jax.jit(layers)(cache, q, k))]
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    compiled = jax.jit(layers, donate_argnums=0).lower(cache, q, k).compile()
    pool = rf"f32\[{cache.k_pages[0].shape[0]},{S},{K},{H}\]"
    assert not re.findall(rf"= {pool}\S* (?:copy|copy-start)\(.*", compiled.as_text() or "")
    got = compiled(cache, q, k)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(got[0])] == pointers
    for mine, theirs in zip(jax.tree.leaves(got), want, strict=True):
        assert_same_bits(mine, theirs)


# ---- create ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pages:
    num_pages: int
    page_size: int


@pytest.mark.parametrize("stacked", [False, True])
def test_create_takes_the_pages_of_an_allocator(stacked: bool) -> None:
    options: dict[str, Any] = {"num_kv_heads": K, "head_dim": H, "stacked": stacked}
    for allocator in (jpa.PageAllocator(P, S), Pages(P, S)):
        for sizes in ({}, {"num_pages": P}, {"num_pages": P, "page_size": np.int64(S)}):
            cache = jpa.PagedKVCache.create(2, **sizes, **options, allocator=allocator)
            assert (cache.num_layers, cache.num_pages, cache.page_size) == (2, P, S)
        for name, good in (("num_pages", P), ("page_size", S)):
            message = f"^{name}: expected {good}, that of the allocator, got {good + 1}"
            with pytest.raises(ValueError, match=message):
                jpa.PagedKVCache.create(2, **{name: good + 1}, **options, allocator=allocator)
    with pytest.raises(TypeError, match=r"^allocator: expected a PageAllocator, or what has"):
        jpa.PagedKVCache.create(2, allocator="pages", **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^num_pages: expected a number, got NoneType"):
        jpa.PagedKVCache.create(2, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_pages": 0}, ValueError, "num_pages: expected an integer >= 1, got 0"),
        ({"num_layers": True}, TypeError, "num_layers: expected a number, got bool"),
        ({"page_size": "16"}, TypeError, "page_size: expected a number, got str"),
        ({"head_dim": 0.5}, TypeError, "head_dim: expected an integer, got 0.5"),
        ({"dtype": jnp.int32}, ValueError, "dtype: expected .* got int32"),
        ({"dtype": "bf16"}, ValueError, "dtype: expected .* got 'bf16'"),
        ({"dtype": None}, ValueError, "dtype: expected .* got None"),
        ({"stacked": "no"}, TypeError, "stacked: expected a bool, got str"),
        ({"num_pages": 2**29, "page_size": 4}, ValueError, r"num_pages \* page_size: expected at most 2\*\*31 - 1"),
        (
            {"num_layers": 2, "num_pages": 2**28, "page_size": 4, "stacked": True},
            ValueError,
            r"num_layers \* num_pages \* page_size: expected at most 2\*\*31 - 1 .*, got 2147483648",
        ),
    ],
)
def test_cache_rejects_bad_sizes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    sizes = {"num_layers": 1, "num_pages": P, "page_size": S, "num_kv_heads": K, "head_dim": H}
    with pytest.raises(error, match=f"^{message}"):
        jpa.PagedKVCache.create(**{**sizes, **change})


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (0.0, ValueError, "expected positive, finite scales, got 0.0"),
        (-1, ValueError, "expected positive, finite scales, got -1.0"),
        (np.nan, ValueError, "expected positive, finite scales, got nan"),
        (np.array([[1.0, 1.0], [1.0, np.inf], [1.0, 1.0]]), ValueError, r"expected positive.* got inf at \[1, 1\]"),
        (jnp.array([1.0, 0.0]), ValueError, r"expected positive.* got 0.0 at \[1\]"),
        (np.ones(3), ValueError, r"expected shape .*\[L, K\] = \(3, 2\), got shape \(3,\)"),
        (np.ones((2, 3)), ValueError, r"expected shape .*got shape \(2, 3\)"),
        (np.ones(2, np.float16), ValueError, "expected dtype float32, got float16"),
        (True, TypeError, "expected float32 numbers, got bool"),
        ("1", TypeError, "expected an array, got str"),
        (None, ValueError, "required for int8 pages, got None"),
    ],
)
def test_cache_rejects_bad_scales(scale: Any, error: type[Exception], message: str) -> None:
    for name, other in (("k_scale", "v_scale"), ("v_scale", "k_scale")):
        with pytest.raises(error, match=f"^{name}: {message}"):
            jpa.PagedKVCache.create(LAYERS, P, S, K, H, jnp.int8, **{name: scale, other: 0.5})


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("stacked", [False, True])
def test_calibrated_scales_hold_what_the_cache_holds(stacked: bool, dtype: str) -> None:
    """Heads of very different sizes, of which layer 1 has none."""
    full = jpa.PagedKVCache.create(LAYERS, P, S, K, H, jnp.float32, stacked=stacked)
    sizes = np.float32(10.0) ** np.arange(-30, -30 + 15 * K, 15)[:, None]
    k, v = sizes * np.random.default_rng(0).standard_normal((2, S, K, H)).astype(np.float32)
    slots = np.arange(S, dtype=np.int32)
    for layer in (0, *range(2, LAYERS)):
        full = full.write(layer, k, v, slots)
    scales = full.calibrated_scales(dtype)
    assert np.all(np.array([scales["k_scale"], scales["v_scale"]])[:, 1] == 1.0)
    cache = jpa.PagedKVCache.create(LAYERS, P, S, K, H, dtype, **scales).write(0, k, v, slots)
    for name, tokens in (("k", k), ("v", v)):
        stored = np.float32(getattr(cache, f"{name}_pages")[0][0]) * cache.scales(0)[f"{name}_scale"][:, None]
        largest = np.abs(tokens).max((0, 2), keepdims=True)
        bound = {"int8": 1.1 * 0.5 / 127, "float8_e4m3fn": 1 / 16, "float8_e5m2": 1 / 8}[dtype]
        assert (np.abs(stored - tokens) <= 1.001 * bound * largest).all()
        assert np.abs(stored - tokens).max() > 0.0
    with pytest.raises(ValueError, match="k_pages: expected float32 or bfloat16 or float16, got"):
        cache.calibrated_scales(dtype)
    with pytest.raises(ValueError, match="v_pages: expected finite numbers, got inf"):
        full.write(0, k, v * np.float32(np.inf), slots).calibrated_scales(dtype)


def test_one_scale_of_two_is_enough_for_fp8() -> None:
    cache = jpa.PagedKVCache.create(1, P, S, K, H, jnp.float8_e4m3fn, k_scale=0.5)
    ones = jnp.ones((1, K, H))
    cache = cache.write(0, ones, ones, jnp.zeros(1, jnp.int32))
    assert float(cache.k_pages[0][0, 0, 0, 0]) == 2
    assert float(cache.v_pages[0][0, 0, 0, 0]) == 1
    tables, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    out, lse = cache.attend(0, ones, tables, lengths, scale=1.0, return_lse=True)
    np.testing.assert_array_equal(out, ones)
    np.testing.assert_allclose(lse, H)


def test_create_runs_under_jit_and_eval_shape() -> None:
    def create(scale: Any) -> jpa.PagedKVCache:
        return jpa.PagedKVCache.create(LAYERS, P, S, K, H, jnp.int8, k_scale=scale, v_scale=scale, stacked=True)

    assert jax.jit(create)(ROWS).k_scale.shape == ROWS.shape
    assert jax.eval_shape(create, ROWS).num_pages == P
