"""Laws that hold for every engine: what may not change a result, and what must add up to the same result."""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import BY_NAME, Array, Case, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_paged_attn as jpa

# A law is tried on few examples: each has the shapes of the last, so that nothing is compiled again.
few_examples = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def attend(engine: str, function: str, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """`(out, lse)` as NumPy arrays, from a call whose compilation is shared by equal shapes and static keywords."""
    out, lse = harness.call(function, *args, **kwargs, implementation=engine, return_lse=True)
    return np.asarray(out), np.asarray(lse)


def digest(*arrays: Array) -> str:
    """A hash of the bits."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()


def assert_same_attention(got: tuple[Array, Array], want: tuple[Array, Array], dtype: str = "f32") -> None:
    harness.assert_close(*got, *(x.astype(np.float64) for x in want), dtype)


# ---- Where tokens are stored, and how a call is cut ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixed_all", "decode_f16_int8", "long_decode_sinks"])
def test_where_pages_lie_changes_no_bit(engine: str, name: str) -> None:
    case = BY_NAME[name]
    (q, k_pages, v_pages, *rest), traced = build(case).arguments()
    index = 3 if case.function == "paged_attention" else 4
    args = [q, k_pages, v_pages, *rest]
    tables, num_pages = args[index], len(k_pages)
    moved_to = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    in_pool = (tables >= 0) & (tables < num_pages)
    args[1], args[2] = np.empty_like(k_pages), np.empty_like(v_pages)
    args[1][moved_to], args[2][moved_to] = k_pages, v_pages
    args[index] = np.where(in_pool, moved_to[np.where(in_pool, tables, 0)], tables)
    before = harness.run(case, implementation=engine)
    after = attend(engine, case.function, *args, **traced, **case.keywords)
    assert digest(*after) == digest(*before)


@pytest.mark.parametrize("name", ["decode", "decode_all", "decode_bf16_int8", "long_decode"])
def test_decode_is_ragged_with_one_row_each(engine: str, name: str) -> None:
    case = BY_NAME[name]
    (q, k_pages, v_pages, tables, lengths), traced = build(case).arguments()
    cu_q_lens = np.arange(len(lengths) + 1, dtype=np.int32)
    keywords = {**traced, **case.keywords}
    ragged = attend(engine, "ragged_paged_attention", q, k_pages, v_pages, lengths, tables, cu_q_lens, None, **keywords)
    assert_same_attention(ragged, harness.run(case, implementation=engine), case.dtype)


@pytest.mark.parametrize("keywords", [{}, {"sliding_window": 6, "soft_cap": 2.0}], ids=["plain", "window and cap"])
@few_examples
@given(cuts=st.sets(st.integers(1, 39), max_size=6))
def test_chunked_prefill_is_one_shot_prefill(engine: str, keywords: dict[str, Any], cuts: set[int]) -> None:
    prompt = Case("prompt", q_lens=(40,), kv_lens=(40,))
    (q, k_pages, v_pages, _, tables, *_), _ = build(prompt).arguments()

    def rows(start: int, end: int) -> tuple[Array, Array]:
        bounds = np.array([start, end], np.int32)
        args = (q, k_pages, v_pages, bounds[1:], tables, bounds)
        out, lse = attend(engine, "ragged_paged_attention", *args, **keywords)
        return out[start:end], lse[start:end]

    ends = [0, *sorted(cuts), 40]
    chunks = [rows(start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]
    out, lse = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    assert_same_attention((out, lse), rows(0, 40))


@few_examples
@given(lengths=st.tuples(*[st.integers(0, 64)] * 4), parts=st.sampled_from([1, 2, 4]))
def test_split_and_merged_is_whole(engine: str, lengths: tuple[int, ...], parts: int) -> None:
    case = Case("split", (1,) * 4, lengths, function="paged_attention", sinks=True)
    (q, k_pages, v_pages, tables, kv_lens), traced = build(case).arguments()
    whole = attend(engine, case.function, q, k_pages, v_pages, tables, kv_lens, **traced)
    columns = case.max_pages // parts
    outs, lses = [], []
    for part in range(parts):
        mine = tables[:, part * columns : (part + 1) * columns]
        left = kv_lens - part * columns * case.page_size  # negative where the sequence ends before
        if part > 0:
            traced = {**traced, "sinks": None}
        out, lse = attend(engine, case.function, q, k_pages, v_pages, mine, left, **traced)
        outs.append(out)
        lses.append(lse)
    as_lists = jpa.merge_attention_states(outs, lses)
    as_arrays = jpa.merge_attention_states(np.stack(outs), np.stack(lses))
    assert_same_attention((np.asarray(as_lists[0]), np.asarray(as_lists[1])), whole)
    assert digest(*map(np.asarray, as_lists)) == digest(*map(np.asarray, as_arrays))


@few_examples
@given(seed=st.integers(0, 2**32 - 1), parts=st.integers(1, 5), dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]))
def test_merge_matches_the_oracle(seed: int, parts: int, dtype: Any) -> None:
    from oracle import merge_attention_states

    rng = np.random.default_rng(seed)
    lses = (30 * rng.standard_normal((parts, 7, 4))).astype(np.float32)
    lses[rng.random(lses.shape) < 0.4] = -np.inf
    outs = rng.standard_normal((parts, 7, 4, 8)).astype(dtype)
    outs[np.isneginf(lses)] = 0
    want_out, want_lse = merge_attention_states(outs, lses)
    out, lse = (np.asarray(x) for x in jpa.merge_attention_states(outs, lses))
    assert (out.dtype, lse.dtype) == (dtype, np.float32)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
    np.testing.assert_allclose(out.astype(float), want_out, rtol=1e-2 if dtype != np.float32 else 1e-5, atol=1e-5)


# ---- vmap ------------------------------------------------------------------------------------------------------------

OPERANDS = ("q", "k_pages", "v_pages", "kv_lens", "block_tables", "cu_q_lens", "num_seqs", "sinks", "k_scale", "v_scale")
MAPPED = [(name,) for name in OPERANDS] + [
    ("k_pages", "v_pages"),
    ("q", "kv_lens", "block_tables"),
    ("k_pages", "block_tables"),
    ("v_pages", "k_scale"),
    ("cu_q_lens", "num_seqs", "sinks"),
    OPERANDS,
]


def _variants(count: int) -> list[dict[str, Array]]:
    """Inputs of equal shapes and independent values, with used ids that are bad and just one pool away."""
    lengths = [(17, 30, 9, 33), (0, 48, 31, 20), (64, 6, 2, 50)]
    cuts = [(0, 7, 3, 9, 14), (2, 3, 8, 8, 13), (0, 1, 6, 6, 16)]
    scales = {"k_scale": (0.02, 0.01), "v_scale": 0.01}
    variants = []
    for i in range(count):
        case = Case(f"variant {i}", (0,) * 4, lengths[i % 3], rows=16, cu_q_lens=cuts[i % 3], page_dtype="int8", sinks=True, **scales)
        (q, k_pages, v_pages, kv_lens, tables, cu_q_lens, _), traced = build(case).arguments()
        tables[i % 4, 0] = len(k_pages) + 1  # page 1 of a neighbour, if the pools were simply stacked
        num_seqs = np.array([4 - i % 2], np.int32)
        # Rows that no sequence claims in this variant may be claimed by the cu_q_lens of another.
        q = np.nan_to_num(q, nan=0.5, posinf=1.0, neginf=-1.0)
        values = (q, k_pages, v_pages, kv_lens, tables, cu_q_lens, num_seqs, *traced.values())
        variants.append(dict(zip(OPERANDS, values, strict=True)))
    # Scales as [K] everywhere, or mapped and unmapped ones would differ in rank.
    return [{**v, "v_scale": np.full(2, (i + 1) * 0.01, np.float32)} for i, v in enumerate(variants)]


@pytest.mark.parametrize("mapped", MAPPED, ids="+".join)
def test_vmap_is_a_loop(engine: str, mapped: tuple[str, ...]) -> None:
    variants = _variants(3)

    def one(operands: dict[str, Any]) -> Any:
        args = [operands[name] for name in OPERANDS[:7]]
        scales = {name: operands[name] for name in OPERANDS[7:]}
        return jpa.ragged_paged_attention(*args, **scales, return_lse=True, implementation=engine, sliding_window=40)

    # The mapped axis is not always the first.
    axis = {name: (0 if name in ("q", "num_seqs") else -1) if name in mapped else None for name in OPERANDS}
    stacked = {
        name: np.stack([v[name] for v in variants], axis[name]) if name in mapped else variants[0][name] for name in OPERANDS
    }
    out, lse = (np.asarray(x) for x in jax.jit(jax.vmap(one, in_axes=(axis,)))(stacked))
    one = jax.jit(one)
    for i, variant in enumerate(variants):
        alone = {name: variant[name] if name in mapped else variants[0][name] for name in OPERANDS}
        want_out, want_lse = (np.asarray(x) for x in one(alone))
        assert_same_attention((out[i], lse[i]), (want_out, want_lse))


def test_nested_vmap_is_a_loop(engine: str) -> None:
    """Queries and lengths by the outer axis, pools by the inner one, tables by both, then all operands twice."""
    case = BY_NAME["decode"]
    grid = [[build(Case(f"{i} {j}", case.q_lens, case.kv_lens, "paged_attention")) for j in range(3)] for i in range(2)]

    def decode(q: Any, k_pages: Any, v_pages: Any, tables: Any, lengths: Any) -> Any:
        return jpa.paged_attention(q, k_pages, v_pages, tables, lengths, implementation=engine, return_lse=True)

    tables = np.stack([np.stack([x.block_tables for x in row]) for row in grid])
    tables[0, 0, 0, 0], tables[1, 2, 3, 1] = 19, -1  # P is 19
    q = np.stack([row[0].q for row in grid])
    lengths = np.array([[1, 17, 48, 64], [64, 0, 3, 16]], np.int32)
    # Poison stands where another variant's tables may point, so pools have none here.
    k_pages, v_pages = np.random.default_rng(5).standard_normal((2, 3, *grid[0][0].k_pages.shape)).astype(np.float32)
    inner = jax.vmap(decode, in_axes=(None, 0, 0, 0, None))
    both = jax.jit(jax.vmap(inner, in_axes=(0, None, None, 0, 0)))
    out, lse = (np.asarray(x) for x in both(q, k_pages, v_pages, tables, lengths))
    loop = jax.jit(decode)
    for i in range(2):
        for j in range(3):
            want = [np.asarray(x) for x in loop(q[i], k_pages[j], v_pages[j], tables[i, j], lengths[i])]
            assert_same_attention((out[i, j], lse[i, j]), (want[0], want[1]))


def test_vmap_with_an_unmapped_pool_copies_no_pool(engine: str) -> None:
    if engine == "reference":
        pytest.skip("the reference gathers keys")
    spec = jax.ShapeDtypeStruct
    pool = spec((512, 16, 2, 64), jnp.float32)  # 4 MiB
    args = (spec((6, 2, 4, 64), jnp.float32), pool, pool, spec((6, 2, 4), jnp.int32), spec((6, 2), jnp.int32))
    mapped = jax.vmap(lambda *xs: jpa.paged_attention(*xs, implementation=engine), in_axes=(0, None, None, 0, 0))
    analysis = jax.jit(mapped).lower(*args).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 2**21


# ---- The same bits ---------------------------------------------------------------------------------------------------

SAME_BITS = ("mixed_all", "decode_bf16_int8", "long_decode", "long_decode_bf16", "long_decode_window", "long_prefill", "whole_prompt")
DIGESTS = """
import sys, harness
from cases import BY_NAME
from test_properties import digest
for name in sys.argv[2:]:
    print(digest(*harness.run(BY_NAME[name], implementation=sys.argv[1])))
"""
CONFORM = """
import sys, harness
from cases import BY_NAME
for name in sys.argv[2:]:
    case = BY_NAME[name]
    harness.assert_close(*harness.run(case, implementation=sys.argv[1]), *harness.expected(name), case.dtype)
print("conforms")
"""


def python(code: str, *args: str, **environment: str) -> list[str]:
    """The lines that a fresh interpreter prints; the suite's own modules and environment are at its hand."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code, *args], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize("name", SAME_BITS)
def test_same_call_gives_the_same_bits(engine: str, name: str) -> None:
    case = BY_NAME[name]
    assert digest(*harness.run(case, implementation=engine)) == digest(*harness.run(case, implementation=engine))


def test_number_of_threads_changes_no_bit(engine: str) -> None:
    if engine == "reference":
        pytest.skip("XLA's own kernels decide")
    # The size of XLA's thread pool, whatever the number of cores.
    results = [python(DIGESTS, engine, *SAME_BITS, NPROC=threads) for threads in ("1", "2", "7")]
    assert len(results[0]) == len(SAME_BITS)
    assert results[1:] == results[:1] * 2


@pytest.mark.parametrize("name", ["mixed", "decode_all", "decode_group_7", "long_decode", "long_decode_bf16"])
def test_a_sequence_alone_has_the_bits_it_has_in_a_batch(engine: str, name: str) -> None:
    if engine == "reference":
        pytest.skip("XLA's own kernels decide")
    case = BY_NAME[name]
    inputs = build(case)
    out, lse = harness.run(case, implementation=engine)
    for b in range(len(inputs.kv_lens)):
        rows = slice(inputs.cu_q_lens[b], inputs.cu_q_lens[b + 1])
        args = [inputs.q[rows], inputs.k_pages, inputs.v_pages]
        tables, lengths = inputs.block_tables[b : b + 1], inputs.kv_lens[b : b + 1]
        if inputs.decode:
            args += [tables, lengths]
        else:
            args += [lengths, tables, np.array([0, len(args[0])], np.int32)]
        alone = attend(engine, case.function, *args, sinks=inputs.sinks, **case.keywords)
        assert digest(*alone) == digest(out[rows], lse[rows])


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_each_instruction_set_conforms(isa: str) -> None:
    if jpa.explain(jpa.paged_attention, *build(BY_NAME["decode"]).arguments()[0]).engine != "cpu":
        pytest.skip("for the cpu engine")
    names = [name for name in BY_NAME if name.startswith(("decode_head_dim", "decode_group_5", "long_decode"))]
    names += ["mixed_all", "mixed_head_dim_40", "page_size_1_bf16_window", "mixed_bf16_e4m3", "mixed_f16_e5m2", "decode_f32_int8"]
    names += ["mixed_f16", "decode_f16", "used_ids_bad", "length_beyond_table", "chunked_prompt", "whole_prompt"]
    assert python(CONFORM, "cpu", *names, JPA_CPU_ISA=isa) == ["conforms"]


# ---- Sizes at both ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["T", "B", "P", "M"])
def test_empty_axis(engine: str, size: str) -> None:
    """A batch, a table or a pool of size zero is no error: rows without keys give 0 and -inf."""
    t, b, p, m = (0 if size == letter else n for letter, n in (("T", 5), ("B", 2), ("P", 6), ("M", 3)))
    q, pool = jnp.ones((t, 4, 8)), jnp.ones((p, 4, 2, 8))
    tables, lengths = jnp.zeros((b, m), jnp.int32), jnp.full(b, 7, jnp.int32)
    cu_q_lens = jnp.arange(b + 1, dtype=jnp.int32)
    out, lse = attend(engine, "ragged_paged_attention", q, pool, pool, lengths, tables, cu_q_lens)
    assert (out.shape, lse.shape) == ((t, 4, 8), (t, 4))
    assert not out.any()
    assert np.isneginf(lse).all()
    out, lse = attend(engine, "paged_attention", q[:b], pool, pool, tables[: len(q)], lengths[: len(q)])
    assert not out.any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("scalar", [True, False])
def test_num_seqs_is_a_scalar_or_has_one_element(engine: str, scalar: bool) -> None:
    case = BY_NAME["num_seqs_two"]
    (*args, num_seqs), _ = build(case).arguments()
    num_seqs = num_seqs[0] if scalar else num_seqs
    result = attend(engine, case.function, *args, num_seqs)
    assert_same_attention(result, harness.expected(case.name))


def test_pool_of_more_than_2_to_the_31_elements(engine: str) -> None:
    """The operating system hands out zero pages on first touch, so the pool costs memory only where it is used."""
    shape = (2**20 + 5, 16, 1, 128)
    pool = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.int8).reshape(shape)
    assert pool.size > 2**31
    case = Case("last pages", (1,), (40,), "paged_attention", 2, 1, 128, page_dtype="int8", max_pages=3, k_scale=0.02, v_scale=0.02)
    small = build(case)
    far = np.array([[shape[0] - 1, 2**20 - 1, shape[0] - 3]], np.int32)  # element offsets on both sides of 2^31
    pool[far[0]] = small.k_pages[small.block_tables[0]]
    scales = {"k_scale": small.k_scale, "v_scale": small.v_scale}
    near = (small.q, small.k_pages, small.k_pages, small.block_tables, small.kv_lens)
    want = attend(engine, case.function, *near, **scales)
    on_device = jax.device_put(pool, may_alias=True)
    got = attend(engine, case.function, small.q, on_device, on_device, far, small.kv_lens, **scales)
    assert_same_attention(got, want)
