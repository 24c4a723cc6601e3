"""Properties of every engine: changes that leave a result as it is, and parts that add up to the same result."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import mmap
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import BY_NAME, DTYPES, OUT_BOUND, Array, Case, build
from harness import digest, python, temporary_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_paged_attn as jpa

# A property is tried on few examples: each has the shapes of the last, so that nothing is compiled again.
few_examples = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def attend(engine: str, function: str, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
    """`(out, lse)` as NumPy arrays, from a call whose compilation is shared by equal shapes and static keywords."""
    out, lse = harness.call(function, *args, **kwargs, implementation=engine, return_lse=True)
    return np.asarray(out), np.asarray(lse)


# ---- Where tokens are stored, and how a call is cut ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixed_all", "decode_f16_int8", "long_decode_sinks"])
def test_where_pages_lie_changes_no_bit(engine: str, name: str) -> None:
    case = harness.adapted(name, engine)
    positional, traced = build(case).arguments()
    args = list(positional)
    index = 3 if case.function == "paged_attention" else 4
    k_pages, v_pages, tables = args[1], args[2], args[index]
    num_pages = len(k_pages)
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
    case = harness.adapted(name, engine)
    (q, k_pages, v_pages, tables, lengths), traced = build(case).arguments()
    cu_q_lens = np.arange(len(lengths) + 1, dtype=np.int32)
    keywords = {**traced, **case.keywords}
    ragged = attend(engine, "ragged_paged_attention", q, k_pages, v_pages, lengths, tables, cu_q_lens, None, **keywords)
    harness.assert_close(ragged, harness.run(case, implementation=engine), case.dtype)


@pytest.mark.parametrize("keywords", [{}, {"sliding_window": 6, "soft_cap": 2.0}], ids=["plain", "window and cap"])
@few_examples
@given(cuts=st.sets(st.integers(1, 39), max_size=6))
def test_chunked_prefill_is_one_shot_prefill(engine: str, keywords: dict[str, Any], cuts: set[int]) -> None:
    prompt = harness.adapted(Case("prompt", q_lens=(40,), kv_lens=(40,)), engine)
    (q, k_pages, v_pages, _, tables, *_), _ = build(prompt).arguments()

    def rows(start: int, end: int) -> tuple[Array, Array]:
        bounds = np.array([start, end], np.int32)
        args = (q, k_pages, v_pages, bounds[1:], tables, bounds)
        out, lse = attend(engine, "ragged_paged_attention", *args, **keywords)
        return out[start:end], lse[start:end]

    ends = [0, *sorted(cuts), 40]
    chunks = [rows(start, end) for start, end in itertools.pairwise(ends)]
    out, lse = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    harness.assert_close((out, lse), rows(0, 40), prompt.dtype)


@few_examples
@given(lengths=st.tuples(*[st.integers(0, 64)] * 4), parts=st.sampled_from([1, 2, 4]))
def test_split_and_merged_is_whole(engine: str, lengths: tuple[int, ...], parts: int) -> None:
    case = harness.adapted(Case("split", (1,) * 4, lengths, function="paged_attention", sinks=True), engine)
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
    as_lists = harness.call("merge_attention_states", outs, lses)
    as_arrays = harness.call("merge_attention_states", np.stack(outs), np.stack(lses))
    harness.assert_close(as_lists, whole, case.dtype)
    assert digest(*map(np.asarray, as_lists)) == digest(*map(np.asarray, as_arrays))


@few_examples
@given(
    seed=st.integers(0, 2**32 - 1),
    parts=st.sampled_from([1, 2, 5]),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_merge_matches_the_oracle(seed: int, parts: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    lses = (30 * rng.standard_normal((parts, 7, 4))).astype(np.float32)
    lses[rng.random(lses.shape) < 0.4] = -np.inf
    outs = rng.standard_normal((parts, 7, 4, 8)).astype(dtype)
    outs[np.isneginf(lses)] = np.nan  # the output of an empty part is ignored
    want_out, want_lse = oracle.merge_attention_states(outs, lses)
    out, lse = (np.asarray(x) for x in harness.call("merge_attention_states", outs, lses))
    assert (out.dtype, lse.dtype) == (dtype, np.float32)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
    np.testing.assert_allclose(out.astype(float), want_out, rtol=1e-2 if dtype != np.float32 else 1e-5, atol=1e-5)


@few_examples
@given(lengths=st.tuples(*[st.one_of(st.integers(0, 5120), st.sampled_from([511, 512, 513, 1024, 4096]))] * 2))
def test_any_length_matches_the_oracle(engine: str, lengths: tuple[int, ...]) -> None:
    """Lengths on all sides of wherever an engine cuts its keys."""
    case = harness.adapted(dataclasses.replace(BY_NAME["long_decode"], name="any length", kv_lens=lengths), engine)
    args, _ = build(case).arguments()
    harness.assert_close(harness.run(case, implementation=engine), oracle.paged_attention(*args), case.dtype)


@few_examples
@given(
    ends=st.lists(st.integers(0, 70), min_size=4, max_size=4).map(sorted),
    more=st.tuples(*[st.one_of(st.integers(-5, 5), st.integers(0, 130))] * 4),
)
def test_any_mixed_batch_matches_the_oracle(engine: str, ends: list[int], more: tuple[int, ...]) -> None:
    """Any cut of 70 rows into four sequences, with more or fewer keys than rows."""
    q_lens = tuple(np.diff([0, *ends]).tolist())
    kv_lens = tuple(n + extra for n, extra in zip(q_lens, more, strict=True))
    case = Case("any batch", q_lens, kv_lens, rows=70, num_heads=6, page_size=5, max_pages=40, sinks=True)
    case = harness.adapted(dataclasses.replace(case, keywords={"sliding_window": 37}), engine)
    args, traced = build(case).arguments()
    want = oracle.ragged_paged_attention(*args, **traced, **case.keywords)
    harness.assert_close(harness.run(case, implementation=engine), want, case.dtype)


def test_nan_stays_in_its_row(engine: str) -> None:
    """A query that is NaN changes no other row; nor does a sequence whose keys and values are NaN change another."""
    case = harness.adapted("prompt", engine)
    args, _ = build(case).arguments()
    clean = attend(engine, case.function, *args)
    q, k_pages, v_pages, lengths, tables, cu_q_lens = (np.copy(x) for x in args[:6])
    q[3] = np.nan
    for pages in (k_pages, v_pages):
        pages[tables[1, 0], : lengths[1]] = np.nan
    out, lse = attend(engine, case.function, q, k_pages, v_pages, lengths, tables, cu_q_lens)
    spoilt = np.zeros(len(q), bool)
    spoilt[[3, *range(cu_q_lens[1], cu_q_lens[2])]] = True
    assert np.isnan(out[spoilt]).all()
    harness.assert_close((out[~spoilt], lse[~spoilt]), [x[~spoilt] for x in clean], case.dtype)


# ---- vmap ------------------------------------------------------------------------------------------------------------

ARGUMENTS = ("q", "k_pages", "v_pages", "kv_lens", "block_tables", "cu_q_lens", "num_seqs")
OPERANDS: tuple[str, ...] = (*ARGUMENTS, "sinks", "k_scale", "v_scale")
MAPPED = [(name,) for name in OPERANDS] + [
    ("k_pages", "v_pages"),
    ("q", "kv_lens", "block_tables"),
    ("k_pages", "block_tables"),
    ("v_pages", "k_scale"),
    ("cu_q_lens", "num_seqs", "sinks"),
    OPERANDS,
]


@functools.cache
def _variants(engine: str) -> tuple[list[dict[str, Array]], str]:
    """Inputs of equal shapes and independent values, with used ids that are bad and just one pool away; the dtype."""
    dtype = harness.adapted(Case("variants", (1,), (1,)), engine).dtype
    lengths = [(17, 30, 9, 33), (0, 48, 31, 20), (64, 6, 2, 50)]
    cuts = [(0, 7, 3, 9, 14), (2, 3, 8, 8, 13), (0, 1, 6, 6, 16)]
    scales = {"k_scale": (0.02, 0.01), "v_scale": 0.01}
    variants = []
    for i in range(3):
        case = Case(f"variant {i}", (0,) * 4, lengths[i], rows=16, cu_q_lens=cuts[i], sinks=True, dtype=dtype)
        case = harness.adapted(dataclasses.replace(case, page_dtype="int8", **scales), engine)
        (q, k_pages, v_pages, kv_lens, tables, cu_q_lens, _), traced = build(case).arguments()
        tables[i % 4, 0] = len(k_pages) + 1  # page 1 of a neighbour, if the pools were simply stacked
        num_seqs = np.array([4 - i % 2], np.int32)
        # Rows that no sequence claims in this variant may be claimed by the cu_q_lens of another.
        q = np.nan_to_num(q.astype(np.float32), nan=0.5, posinf=1.0, neginf=-1.0).astype(q.dtype)
        values = (q, k_pages, v_pages, kv_lens, tables, cu_q_lens, num_seqs, *traced.values())
        variants.append(dict(zip(OPERANDS, values, strict=True)))
    # Scales as [K] everywhere, or mapped and unmapped ones would differ in rank.
    return [{**v, "v_scale": np.full(2, (i + 1) * 0.01, np.float32)} for i, v in enumerate(variants)], dtype


@functools.cache
def _ragged(engine: str) -> Callable[[dict[str, Any]], Any]:
    """A call by operand name, compiled once for all that is mapped over it."""

    @jax.jit
    def one(operands: dict[str, Any]) -> Any:
        args = [operands[name] for name in ARGUMENTS]
        scales = {name: operands[name] for name in OPERANDS if name not in ARGUMENTS}
        return jpa.ragged_paged_attention(*args, **scales, return_lse=True, implementation=engine, sliding_window=40)

    return one


@pytest.mark.parametrize("mapped", MAPPED, ids="+".join)
def test_vmap_is_a_loop(engine: str, mapped: tuple[str, ...]) -> None:
    variants, dtype = _variants(engine)
    one = _ragged(engine)
    # The mapped axis is not always the first.
    stacked = dict(variants[0])
    axes: dict[str, int | None] = dict.fromkeys(OPERANDS)
    for name in mapped:
        axes[name] = axis = 0 if name in ("q", "num_seqs") else -1
        stacked[name] = np.stack([variant[name] for variant in variants], axis)
    out, lse = jax.jit(jax.vmap(one, in_axes=(axes,)))(stacked)
    for i, variant in enumerate(variants):
        alone = {**variants[0], **{name: variant[name] for name in mapped}}
        harness.assert_close((out[i], lse[i]), one(alone), dtype)


DECODE_OPERANDS = ("q", "k_pages", "v_pages", "block_tables", "lengths")
NESTED = [
    (("q", "lengths"), ("k_pages", "v_pages", "block_tables")),
    (("k_pages",), ("v_pages",)),
    (("v_pages", "block_tables"), ("k_pages", "q")),
    (("k_pages", "v_pages"), ("k_pages",)),
    (("block_tables",), ("block_tables", "v_pages")),
    (DECODE_OPERANDS, DECODE_OPERANDS),
]


@functools.cache
def _decode_with_gradients(engine: str) -> Callable[[dict[str, Any]], Any]:
    """Results and gradients of a call by operand name, compiled once for all that is mapped over it."""

    @jax.jit
    def one(operands: dict[str, Any]) -> Any:
        q, k_pages, v_pages, tables, lengths = (operands[name] for name in DECODE_OPERANDS)

        def attend(q: Any, k_pages: Any, v_pages: Any) -> Any:
            return jpa.paged_attention(q, k_pages, v_pages, tables, lengths, implementation=engine, return_lse=True)

        results, pull_back = jax.vjp(attend, q, k_pages, v_pages)
        return results, pull_back((q + 1, jnp.ones(q.shape[:2])))

    return one


@pytest.mark.parametrize(("outer", "inner"), NESTED, ids=lambda names: "+".join(names))
def test_nested_vmap_is_a_loop(engine: str, outer: tuple[str, ...], inner: tuple[str, ...]) -> None:
    """Values and gradients, both; pools of different leading sizes meet where only one was mapped."""
    rng = np.random.default_rng(5)
    like = harness.adapted(Case("nested", (1,), (1,), head_dim=8), engine)
    pool, num_pages = (5, 4, 2, like.head_dim), 5
    shapes = {"q": (2, 4, like.head_dim), "k_pages": pool, "v_pages": pool, "block_tables": (2, 3), "lengths": (2,)}
    ranges = {"block_tables": (-1, num_pages + 2), "lengths": (0, 13)}

    def values(name: str) -> Array:
        shape = ((2,) if name in outer else ()) + ((3,) if name in inner else ()) + shapes[name]
        if name in ranges:
            return rng.integers(*ranges[name], shape).astype(np.int32)
        return rng.standard_normal(shape, np.float32).astype(DTYPES[like.dtype])

    one = _decode_with_gradients(engine)
    operands = {name: values(name) for name in DECODE_OPERANDS}
    axes = [{name: 0 if name in mapped else None for name in DECODE_OPERANDS} for mapped in (outer, inner)]
    mapped = jax.jit(jax.vmap(jax.vmap(one, in_axes=(axes[1],)), in_axes=(axes[0],)))(operands)
    bound = 1e-5 if like.dtype == "f32" else 3 * OUT_BOUND[like.dtype]
    for i, j in itertools.product(range(2), range(3)):
        index = {name: ((i,) if name in outer else ()) + ((j,) if name in inner else ()) for name in DECODE_OPERANDS}
        want, want_grads = one({name: operands[name][index[name]] for name in DECODE_OPERANDS})
        got, got_grads = jax.tree.map(lambda x: np.asarray(x[i, j]), mapped)  # noqa: B023
        harness.assert_close(got, want, like.dtype)
        for mine, theirs in zip(got_grads, want_grads, strict=True):
            difference = np.asarray(mine, np.float64) - np.asarray(theirs, np.float64)
            np.testing.assert_array_less(abs(difference), bound * (1 + abs(np.asarray(theirs, np.float64))))


@pytest.mark.engines(that=lambda row: row.name != "reference")  # that one gathers keys
def test_vmap_with_an_unmapped_pool_copies_no_pool(engine: str) -> None:
    spec, dtype = jax.ShapeDtypeStruct, DTYPES[harness.adapted(Case("large", (1,), (1,)), engine).dtype]
    pool = spec((1024, 16, 8, 64), dtype)  # 16 MiB or more
    args = (spec((6, 2, 16, 64), dtype), pool, pool, spec((6, 2, 4), jnp.int32), spec((6, 2), jnp.int32))
    mapped = jax.vmap(lambda *xs: jpa.paged_attention(*xs, implementation=engine), in_axes=(0, None, None, 0, 0))
    copied = 2**22 if engine == "cpu" else 2**24  # scratch memory of engines for GPUs goes with the device
    assert temporary_bytes(jax.jit(mapped).lower(*args).compile()) < copied


# ---- The same bits ---------------------------------------------------------------------------------------------------

SAME_BITS = (
    "mixed_all",
    "decode_bf16_int8",
    "prompt_bf16_e4m3",
    "long_decode",
    "long_decode_bf16",
    "long_prefill",
    "whole_prompt",
)
DIGESTS = """
import sys, harness
from cases import BY_NAME
from harness import digest
for name in sys.argv[2:]:
    print(digest(*harness.run(BY_NAME[name], implementation=sys.argv[1])))
"""
CONFORM = """
import sys, harness
from cases import BY_NAME
from jax_paged_attn import _cpu
print(_cpu.isa())
for name in sys.argv[1:]:
    case = BY_NAME[name]
    harness.assert_close(harness.run(case, implementation="cpu"), harness.expected(case), case.dtype)
    print(name)
"""


@pytest.mark.parametrize("name", SAME_BITS)
def test_same_call_gives_the_same_bits(engine: str, name: str) -> None:
    case = harness.adapted(name, engine)
    assert digest(*harness.run(case, implementation=engine)) == digest(*harness.run(case, implementation=engine))


@pytest.mark.engines(that=lambda row: row.name == "cpu")  # the others run on no threads of the host
def test_number_of_threads_changes_no_bit(engine: str) -> None:
    # The size of XLA's thread pool, whatever the number of cores.
    results = [python(DIGESTS, engine, *SAME_BITS, NPROC=threads) for threads in ("1", "2", "7")]
    assert len(results[0]) == len(SAME_BITS)
    assert results[1:] == results[:1] * 2


BATCHES = [
    "mixed",
    "prompt_bf16",
    "decode_all",
    "decode_group_7",
    "long_decode",
    "long_decode_bf16",
    "rising_drafts",
    "drafts_all",
    "tiles_page_size_24_e5m2",
    "tiles_page_size_80_bf16",
]


guarantees = pytest.mark.engines(that=lambda row: row.batch_invariant)


def batch_invariant(case: Case, engine: str) -> Case:
    """The case as the engine takes it, with the guarantee asked for."""
    case = harness.adapted(case, engine)
    return dataclasses.replace(case, keywords={**case.keywords, "batch_invariant": True})


@guarantees
@pytest.mark.parametrize("name", BATCHES)
def test_a_sequence_alone_has_the_bits_it_has_in_a_batch(engine: str, name: str) -> None:
    case = batch_invariant(BY_NAME[name], engine)
    inputs = build(case)
    out, lse = harness.run(case, implementation=engine)
    harness.assert_close((out, lse), harness.expected(harness.adapted(name, engine)), case.dtype)
    for b in range(len(inputs.kv_lens)):
        rows = slice(inputs.cu_q_lens[b], inputs.cu_q_lens[b + 1])
        args = [inputs.q[rows], inputs.k_pages, inputs.v_pages]
        tables, lengths = inputs.block_tables[b : b + 1], inputs.kv_lens[b : b + 1]
        if inputs.decode:
            args += [tables, lengths]
        else:
            args += [lengths, tables, np.array([0, len(args[0])], np.int32)]
        traced = {"sinks": inputs.sinks, "k_scale": inputs.k_scale, "v_scale": inputs.v_scale}
        alone = attend(engine, case.function, *args, **traced, **case.keywords)
        assert digest(*alone) == digest(out[rows], lse[rows])


@guarantees
@pytest.mark.parametrize("name", ["decode_all", "batch_of_300", "long_decode", "decode_bf16_e4m3"])
def test_bits_do_not_depend_on_the_place_in_the_batch(engine: str, name: str) -> None:
    """Nor on the other sequences: the same ones in reverse, then twice with all others gone."""
    case = batch_invariant(BY_NAME[name], engine)
    (q, k_pages, v_pages, tables, lengths), traced = build(case).arguments()

    def run(order: Any, lengths: Array) -> tuple[Array, Array]:
        args = (q[order], k_pages, v_pages, tables[order], lengths[order])
        return attend(engine, case.function, *args, **traced, **case.keywords)

    whole = run(slice(None), lengths)
    backwards = run(slice(None, None, -1), lengths)
    assert digest(*(x[::-1] for x in backwards)) == digest(*whole)
    odd = np.arange(len(lengths)) % 2 == 1
    for mine in (odd, ~odd):
        emptied = run(slice(None), np.where(mine, lengths, 0).astype(np.int32))
        assert digest(*(x[mine] for x in emptied)) == digest(*(x[mine] for x in whole))


# The conformance suite runs the widest of them anyway.
WIDE = [pytest.param(isa, marks=pytest.mark.slow) for isa in ("avx512", "avx2")]


@pytest.mark.one_release
@pytest.mark.parametrize("isa", [*WIDE, "baseline"])
def test_each_instruction_set_conforms(isa: str) -> None:
    cpu = pytest.importorskip("jax_paged_attn._cpu", exc_type=ModuleNotFoundError)
    if isa not in cpu.available_isas():
        pytest.skip(f"this processor runs {cpu.available_isas()}")
    names = [name for name in BY_NAME if "head_dim" in name or name.startswith(("prompt", "long", "decode_group_5"))]
    names += ["mixed", "decode", "mixed_f16", "decode_f16", "mixed_bf16", "decode_bf16", "whole_prompt", "mixed_all"]
    names += ["used_ids_bad", "length_beyond_table", "chunked_prompt", "page_size_1_bf16_window"]
    for base, q, page in itertools.product(("mixed", "decode"), ("f32", "bf16", "f16"), ("e4m3", "e5m2", "int8")):
        names.append(f"{base}_{q}_{page}")
    assert python(CONFORM, *names, JPA_CPU_ISA=isa, JAX_PLATFORMS="cpu") == [isa, *names]


# ---- Sizes at both ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["T", "B", "P", "M"])
def test_empty_axis(engine: str, size: str) -> None:
    """A batch, a table or a pool of size zero is no error: rows without keys give 0 and -inf."""
    t, b, p, m = (0 if size == letter else n for letter, n in (("T", 5), ("B", 2), ("P", 6), ("M", 3)))
    like = harness.adapted(Case("empty", (1,), (1,), head_dim=8), engine)
    head_dim, dtype = like.head_dim, DTYPES[like.dtype]
    q, pool = jnp.ones((t, 4, head_dim), dtype), jnp.ones((p, 4, 2, head_dim), dtype)
    tables, lengths = jnp.zeros((b, m), jnp.int32), jnp.full(b, 7, jnp.int32)
    cu_q_lens = jnp.arange(b + 1, dtype=jnp.int32)
    out, lse = attend(engine, "ragged_paged_attention", q, pool, pool, lengths, tables, cu_q_lens)
    assert (out.shape, lse.shape) == ((t, 4, head_dim), (t, 4))
    assert not out.any()
    assert np.isneginf(lse).all()
    out, lse = attend(engine, "paged_attention", q[:b], pool, pool, tables[: len(q)], lengths[: len(q)])
    assert not out.any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("scalar", [True, False])
def test_num_seqs_is_a_scalar_or_has_one_element(engine: str, scalar: bool) -> None:
    case = harness.adapted("num_seqs_two", engine)
    (*args, num_seqs), _ = build(case).arguments()
    num_seqs = num_seqs[0] if scalar else num_seqs
    result = attend(engine, case.function, *args, num_seqs)
    harness.assert_close(result, harness.expected(case), case.dtype)


def test_pool_of_more_than_2_to_the_31_elements(engine: str) -> None:
    """The operating system hands out zero pages on first touch, so the pool costs memory only where it is used."""
    shape = (2**20 + 5, 16, 1, 128)
    pool = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.int8).reshape(shape)
    assert pool.size > 2**31
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 128}
    int8 = {"page_dtype": "int8", "k_scale": 0.02, "v_scale": 0.02}
    case = harness.adapted(Case("last pages", (1,), (40,), "paged_attention", max_pages=3, **heads, **int8), engine)
    small = build(case)
    far = np.array([[shape[0] - 1, 2**20 - 1, shape[0] - 3]], np.int32)  # element offsets on both sides of 2^31
    pool[far[0]] = small.k_pages[small.block_tables[0]]
    scales = {"k_scale": small.k_scale, "v_scale": small.v_scale}
    near = (small.q, small.k_pages, small.k_pages, small.block_tables, small.kv_lens)
    want = attend(engine, case.function, *near, **scales)
    on_device = jax.device_put(pool, may_alias=True)
    got = attend(engine, case.function, small.q, on_device, on_device, far, small.kv_lens, **scales)
    harness.assert_close(got, want, case.dtype)
