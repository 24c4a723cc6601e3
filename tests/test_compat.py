"""Calls and pages of JAX's own kernels: the inputs of their tests, nothing copied, transformations, errors."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, DTYPES, LSE_BOUND, OUT_BOUND, Case, build
from harness import interleave
from tpu_port import after, before

import jax_paged_attn as jpa
from jax_paged_attn import _ffi, compat

TPU_MODULE = "jax.experimental.pallas.ops.tpu.ragged_paged_attention"
GPU_MODULE = "jax.experimental.pallas.ops.gpu.paged_attention"
LAYOUTS = ("interleaved", "head_major")
# Called with keywords from dicts, which say nothing of their types.
RAGGED: Any = compat.ragged_paged_attention
PAGED: Any = compat.paged_attention


def dense(q: Any, k: Any, v: Any, length: int, *, scale: float, window: int | None = None, cap: float | None = None):
    """Float64 attention of the last rows `q [R, N, H]` of a sequence to its keys `[L, K, H]`: `(out, lse)`."""
    q, k, v = (np.asarray(x).astype(np.float64).swapaxes(0, 1) for x in (q, k[:length], v[:length]))
    heads, rows, head_dim = q.shape
    q = q.reshape(len(k), -1, head_dim)  # [K, N / K · R, H]
    scores = q @ k.swapaxes(1, 2) * scale
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    position, key = np.arange(length - rows, length)[:, None], np.arange(length)
    seen = (key <= position) & (key > position - (window or length))
    scores = np.where(seen, scores.reshape(heads, rows, length), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    lse = scores.max(-1) + np.log(weights.sum(-1))
    probabilities = (weights / weights.sum(-1, keepdims=True)).reshape(len(k), -1, length)
    return (probabilities @ v).reshape(heads, rows, head_dim).swapaxes(0, 1), lse.swapaxes(0, 1)


def assert_within_bounds(got: Any, want: Any, dtype: str) -> None:
    (out, lse), (want_out, want_lse) = ((np.asarray(x).astype(np.float64) for x in pair) for pair in (got, want))
    assert np.linalg.norm(out - want_out) <= OUT_BOUND[dtype] * np.linalg.norm(want_out)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=LSE_BOUND[dtype])


# ---- What JAX's own tests of these kernels run -----------------------------------------------------------------------

BASIC = [(192, 328), (128, 180), (64, 255)]
DECODE_ONLY = [(1, n) for n in (18, 129, 597, 122, 64, 322, 463, 181, 1107, 123, 31, 18, 1229, 229, 87, 1328)]
PREFILL_ONLY = [(5, 18), (15, 129), (120, 597), (100, 122), (21, 64), (32, 322), (251, 463), (40, 181), (64, 1107),
                (99, 123), (10, 31), (5, 18), (3, 1229), (120, 229), (9, 87), (2, 1328)]  # fmt: skip
MIXED = [(5, 18), (1, 129), (120, 597), (1, 122), (1, 64), (32, 322), (251, 463), (1, 181), (1, 1107), (99, 123),
         (1, 31), (5, 18), (3, 1229), (117, 229), (1, 87), (1, 1328)]  # fmt: skip


def random_lens(num_seqs: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(1234)
    q_lens = rng.integers(1, 100, num_seqs)
    return list(zip(q_lens.tolist(), (q_lens + rng.integers(0, 50, num_seqs)).tolist(), strict=True))


# Rows and keys of each sequence, (N, K), dtypes of queries and pages, keywords.
TPU_TESTS: dict[str, tuple[list[tuple[int, int]], tuple[int, int], str, str, dict[str, Any]]] = {
    "basic_f32": (BASIC, (32, 8), "f32", "f32", {}),
    "basic_bf16": (BASIC, (32, 8), "bf16", "bf16", {}),
    "quantized_e5m2": (BASIC, (32, 8), "bf16", "e5m2", {"k_scale": 0.5, "v_scale": 0.5}),
    "quantized_e4m3": (BASIC, (32, 8), "bf16", "e4m3", {}),
    "decode_only": (DECODE_ONLY, (32, 8), "bf16", "bf16", {}),
    "prefill_only": (PREFILL_ONLY, (32, 8), "bf16", "bf16", {}),
    "mixed": (MIXED, (32, 8), "f32", "f32", {}),
    "complex_1": (random_lens(1), (32, 16), "bf16", "bf16", {}),
    "complex_5": (random_lens(5), (16, 2), "f32", "f32", {}),
    "complex_16": (random_lens(16), (8, 1), "bf16", "bf16", {}),
    "window_5": (random_lens(5), (4, 4), "f32", "f32", {"sliding_window": 5}),
    "window_128": (random_lens(5), (4, 4), "f32", "f32", {"sliding_window": 128}),
    "soft_cap": (random_lens(2), (16, 2), "f32", "f32", {"soft_cap": 50.0}),
}


# Whose float64 results take seconds.
LARGE = ("prefill_only", "mixed")


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x in LARGE)) for x in TPU_TESTS])
def test_inputs_of_the_tpu_kernels_tests(compiled_engine: str, name: str) -> None:
    """Head dim 128, pages of 16 tokens, NaN in what no sequence has, and the default scale of 1."""
    seq_lens, (heads, kv_heads), dtype, page_dtype, keywords = TPU_TESTS[name]
    row = harness.engine_row(compiled_engine)
    if DTYPES[dtype].name not in row.q_dtypes:
        dtype, page_dtype = "bf16", "bf16"
    page_size, head_dim, max_seqs = 16, 128, max(8, len(seq_lens))
    q_lens, kv_lens = (list(x) for x in zip(*seq_lens, strict=True))
    key_q, key_kv = jax.random.split(jax.random.key(1234))
    q = jax.random.normal(key_q, (max(512, sum(q_lens)), heads, head_dim), DTYPES[dtype])
    table_width = -(-max(kv_lens) // page_size)
    tables, tokens, pages = np.zeros((max_seqs, table_width), np.int32), [], []
    for i, length in enumerate(kv_lens):
        tokens.append(np.asarray(jax.random.normal(key_kv, (length, 2 * kv_heads, head_dim), DTYPES[page_dtype])))
        padded = np.full((-(-length // page_size) * page_size, 2 * kv_heads, head_dim), np.nan, DTYPES[page_dtype])
        padded[:length] = tokens[-1]
        tables[i, : len(padded) // page_size] = sum(map(len, pages)) + np.arange(len(padded) // page_size)
        pages.append(padded.reshape(-1, page_size, 2 * kv_heads, head_dim))
    unused = np.full((3, *pages[0].shape[1:]), np.nan, DTYPES[page_dtype])
    padding = (0, max_seqs - len(seq_lens))
    operands = (
        q,
        np.concatenate([*pages, unused]),
        np.pad(np.array(kv_lens, np.int32), padding),
        tables,
        np.pad(np.cumsum([0, *q_lens], dtype=np.int32), padding),
        np.array([len(seq_lens)], np.int32),
    )
    tuning = {"num_kv_pages_per_block": 4, "num_queries_per_block": 64, "vmem_limit_bytes": 32 << 20}
    out, lse = harness.call(
        "compat.ragged_paged_attention",
        *operands,
        **tuning,
        **keywords,
        implementation=compiled_engine,
        return_lse=True,
    )
    k_scale, v_scale = keywords.get("k_scale", 1.0), keywords.get("v_scale", 1.0)
    parts = [
        dense(
            rows,
            kv[:, 0::2].astype(np.float64) * k_scale,
            kv[:, 1::2].astype(np.float64) * v_scale,
            len(kv),
            scale=1.0,
            window=keywords.get("sliding_window"),
            cap=keywords.get("soft_cap"),
        )
        for rows, kv in zip(np.split(np.asarray(q), np.cumsum(q_lens))[:-1], tokens, strict=True)
    ]
    want = [np.concatenate(x) for x in zip(*parts, strict=True)]
    live = sum(q_lens)
    assert_within_bounds((out[:live], lse[:live]), want, dtype)
    np.testing.assert_array_equal(np.asarray(out[live:], np.float32), 0)


# Page size, K, N / K, head dim.
GPU_TESTS = [(8, 1, 2, 32), (16, 2, 16, 64), (32, 1, 20, 64), (8, 2, 20, 64), (32, 2, 2, 32)]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("page_size", "kv_heads", "group", "head_dim"), GPU_TESTS)
def test_inputs_of_the_gpu_kernels_tests(
    compiled_engine: str, page_size: int, kv_heads: int, group: int, head_dim: int, quantized: bool
) -> None:
    """f16 vectors of length 1. Where those tests quantise with one scale per token, here it is one per head."""
    taken = harness.engine_row(compiled_engine).head_dims
    head_dim = 64 if taken and (head_dim, head_dim) not in taken else head_dim
    lengths, longest = np.array([3, 256, 513, 1023, 2048], np.int32), 2048
    num_pages = len(lengths) * longest // page_size
    keys = jax.random.split(jax.random.key(0), 4)

    def unit(key: Any, shape: tuple[int, ...]) -> Any:
        x = jax.random.normal(key, shape, jnp.float16)
        return np.asarray(x / jnp.linalg.norm(x, axis=-1, keepdims=True))

    k_pages, v_pages = (unit(key, (kv_heads, num_pages, page_size, head_dim)) for key in keys[:2])
    q = unit(keys[3], (len(lengths), kv_heads * group, head_dim))
    tables = np.asarray(jax.random.permutation(keys[2], num_pages)).astype(np.int32).reshape(len(lengths), -1)
    scales: dict[str, Any] = {}
    if quantized:
        pages = (k_pages.astype(np.float32), v_pages.astype(np.float32))
        factors = [np.abs(x).max((1, 2, 3)) / 127 for x in pages]
        stored = [np.rint(x / f[:, None, None, None]).astype(np.int8) for x, f in zip(pages, factors, strict=True)]
        scales = dict(zip(("k_scale", "v_scale"), factors, strict=True))
        k_values, v_values = (x * f[:, None, None, None] for x, f in zip(stored, factors, strict=True))
        k_pages, v_pages = stored
    else:
        k_values, v_values = k_pages, v_pages
    tuning = {"block_h": 16, "pages_per_compute_block": 8, "k_splits": 4}
    got = harness.call(
        "compat.paged_attention", q, k_pages, v_pages, tables, lengths, **scales, **tuning,
        implementation=compiled_engine, return_lse=True,
    )  # fmt: skip

    def tokens(pages: Any, table: Any) -> Any:
        return np.moveaxis(pages[:, table], 0, 2).reshape(longest, kv_heads, head_dim)

    parts = [
        dense(row[None], tokens(k_values, table), tokens(v_values, table), length, scale=1.0)
        for row, table, length in zip(q, tables, lengths, strict=True)
    ]
    assert_within_bounds(got, [np.concatenate(x) for x in zip(*parts, strict=True)], "f16")


@pytest.mark.parametrize(
    ("module", "name"), [(TPU_MODULE, "ragged_paged_attention"), (GPU_MODULE, "paged_attention")], ids=["tpu", "gpu"]
)
def test_signature_is_that_of_the_installed_jax(module: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = getattr(importlib.import_module(module), name)
    ours = inspect.signature(getattr(compat, name)).parameters
    for parameter in inspect.signature(theirs).parameters.values():
        mine = ours[parameter.name]
        assert (mine.kind, mine.default) == (parameter.kind, parameter.default)
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(inspect.signature(theirs).parameters)[: len(positional)]


# ---- The example of a port -------------------------------------------------------------------------------------------


def test_a_port_is_another_import(capsys: pytest.CaptureFixture[str]) -> None:
    files = [Path(module.__file__ or "").read_text().splitlines()[1:] for module in (before, after)]
    assert [line for line in files[0] if line not in files[1]] == [f"from {TPU_MODULE} import ragged_paged_attention"]
    assert [line for line in files[1] if line not in files[0]] == [
        "from jax_paged_attn.compat import ragged_paged_attention"
    ]
    after.main()
    assert capsys.readouterr().out.endswith(": True\n")


def test_a_port_gives_what_jaxs_reference_gives() -> None:
    """The TPU kernel itself cannot run here, but JAX has a plain function beside it."""
    case = Case("port", (3, 1), (40, 17), head_dim=128)
    (q, k_pages, v_pages, kv_lens, tables, cu_q_lens, _), _ = build(case).arguments()
    kv_pages = jnp.nan_to_num(interleave(k_pages, v_pages), nan=0.5, posinf=1.0, neginf=-1.0)
    tables, num_seqs = np.clip(tables, 0, len(kv_pages) - 1), np.array([2], np.int32)
    k, v = np.random.default_rng(0).standard_normal((2, len(q), 2, 128)).astype(np.float32)
    slots = np.full(len(q), kv_pages.shape[0] * kv_pages.shape[1])
    slots[:2] = [5, 100]
    operands = (q, k, v, kv_pages, slots, kv_lens, tables, cu_q_lens, num_seqs)
    shapes = jax.eval_shape(after.attention_layer, *operands)
    assert jax.eval_shape(before.attention_layer, *operands) == shapes
    out, kv_pages = after.attention_layer(*operands)
    np.testing.assert_array_equal(kv_pages[0, 5, 1::2], v[0])
    theirs = importlib.import_module(TPU_MODULE).ref_ragged_paged_attention
    with jax.default_matmul_precision("highest"):
        want = theirs(q, kv_pages, kv_lens, tables, cu_q_lens, num_seqs, sm_scale=128**-0.5)
    np.testing.assert_allclose(out[: len(want)], want, rtol=1e-4, atol=1e-5)


# ---- Nothing is copied -----------------------------------------------------------------------------------------------


def layout_case(layout: str, **changes: Any) -> Case:
    """A small call with a pool that is much larger than all else."""
    if layout == "interleaved":
        case = Case("in_place", (9, 1, 0, 6), (33, 17, 9, 48), head_dim=64, max_pages=16, dtype="bf16", layout=layout)
    else:
        case = Case(
            "in_place", (1,) * 4, (33, 17, 0, 48), "paged_attention", head_dim=64, max_pages=16, dtype="bf16",
            keywords={"scale": 1.0}, layout="head_major",
        )  # fmt: skip
    return dataclasses.replace(case, **changes)


def large_results(compiled: jax.stages.Compiled, elements: int) -> list[str]:
    """The operations of a compiled module that make arrays of at least so many elements, parameters aside."""
    text = compiled.as_text() or ""
    made = re.findall(r"= \(?\w+\[([\d,]+)\][^ ]* (?:[^()]*\) )?([\w-]+)\(", text)
    sizes = [(np.prod([int(n) for n in dims.split(",")]), operation) for dims, operation in made]
    assert any(operation == "parameter" and size >= elements for size, operation in sizes)
    return [operation for size, operation in sizes if size >= elements and operation != "parameter"]


def assert_updates_in_place(engine: str, step: Any, cache: jax.Array, arrays: dict[str, jax.Array]) -> None:
    """step(cache, arrays), whose last result is the cache, neither copies nor moves it where it is donated."""
    want = jax.jit(step)(cache, arrays)
    compiled = jax.jit(step, donate_argnums=0).lower(cache, arrays).compile()
    made = set(large_results(compiled, cache.size // 2))
    if engine != "reference":  # plain JAX gathers what it reads
        assert made <= {"bitcast", "custom-call", "get-tuple-element"}
    pointer = cache.unsafe_buffer_pointer()
    got = compiled(cache, arrays)
    assert got[-1].unsafe_buffer_pointer() == pointer
    assert [np.asarray(x).tobytes() for x in got] == [np.asarray(x).tobytes() for x in want]


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_not_copied(compiled_engine: str, layout: str, page_size: int) -> None:
    case = layout_case(layout, page_size=page_size)
    name, args, named = harness.arguments(case)
    function = getattr(compat, name.rpartition(".")[2])

    def attend(*args: Any) -> Any:
        return function(*args, **named, implementation=compiled_engine)

    def of_many_queries(q: Any, *args: Any) -> Any:
        return jax.vmap(lambda q: attend(q, *args))(jnp.stack([q, 2 * q]))

    pool = args[1].size
    for run in (attend, of_many_queries):
        compiled = jax.jit(run).lower(*args).compile()
        assert _ffi.ATTENTION_LAYOUT_TARGET in (compiled.as_text() or "")
        assert not large_results(compiled, pool // 2)


def test_a_copy_would_be_seen() -> None:
    (_, args, _) = harness.arguments(layout_case("interleaved"))
    copy = jax.jit(lambda kv_pages: (kv_pages[:, :, 0::2], kv_pages[:, :, 1::2]))
    assert large_results(copy.lower(args[1]).compile(), args[1].size // 2)


# ---- Transformations -------------------------------------------------------------------------------------------------


def layout_calls(layout: str) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
    """The same attention with pools of a layout and with split ones, and finite `(q, k_pages, v_pages)`, split."""
    case = BY_NAME[{"interleaved": "interleaved_all", "head_major": "head_major_cap"}[layout]]
    (q, k_pages, v_pages, *rest), traced = build(case).arguments()
    _, (_, *theirs), named = harness.arguments(case)
    theirs = theirs[1:] if layout == "interleaved" else theirs[2:]

    def in_layout(q: Any, k_pages: Any, v_pages: Any) -> Any:
        if layout == "interleaved":
            pages, size, kv_heads, head_dim = k_pages.shape
            kv_pages = jnp.stack([k_pages, v_pages], axis=3).reshape(pages, size, 2 * kv_heads, head_dim)
            return RAGGED(q, kv_pages, *theirs, **named, return_lse=True)
        pools = (jnp.moveaxis(x, 2, 0) for x in (k_pages, v_pages))
        return PAGED(q, *pools, *theirs, **named, return_lse=True)

    def split(q: Any, k_pages: Any, v_pages: Any) -> Any:
        keywords = {**traced, **case.keywords, "return_lse": True}
        return getattr(jpa, case.function)(q, k_pages, v_pages, *rest, **keywords)

    finite = tuple(np.nan_to_num(x, nan=0.5, posinf=1.0, neginf=-1.0) for x in (q, k_pages, v_pages))
    return in_layout, split, finite


def assert_trees_close(got: Any, want: Any) -> None:
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_are_those_of_split_pools(layout: str) -> None:
    """The tangents and cotangents of `[P, S, K, H]` pools, through the layout; their own test compares those."""
    in_layout, split, operands = layout_calls(layout)
    bars = jax.tree.map(lambda x: np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape), in_layout(*operands))
    dots = tuple(np.sin(np.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in operands)

    def derivatives(attend: Callable[..., Any]) -> Any:
        def both(operands: Any) -> Any:
            results, pull_back = jax.vjp(attend, *operands)
            return results, pull_back(bars), jax.jvp(attend, operands, dots)[1]

        return jax.jit(both)(operands)

    assert_trees_close(derivatives(in_layout), derivatives(split))


@pytest.mark.parametrize("mapped", [(0,), (1, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_is_a_loop(layout: str, mapped: Sequence[int]) -> None:
    """Values and per-example gradients, with page ids that no pool has."""
    in_layout, _, operands = layout_calls(layout)
    axes = tuple(0 if i in mapped else None for i in range(3))
    stacked = tuple(np.stack([x, 0.5 * x, -x]) if i in mapped else x for i, x in enumerate(operands))

    def both(*operands: Any) -> Any:
        out, pull_back = jax.vjp(in_layout, *operands)
        return out, pull_back(jax.tree.map(jnp.ones_like, out))

    one = jax.jit(both)
    loop = [one(*(x[i] if axis == 0 else x for x, axis in zip(stacked, axes, strict=True))) for i in range(3)]
    assert_trees_close(jax.jit(jax.vmap(both, in_axes=axes))(*stacked), jax.tree.map(lambda *x: np.stack(x), *loop))


def test_mapped_head_major_pools_need_no_copy_behind_their_heads() -> None:
    case = layout_case("head_major")
    _, (q, k_pages, v_pages, tables, lengths), _ = harness.arguments(case)
    many = [np.stack([x, -x], axis=1) for x in (k_pages, v_pages)]  # [K, 2, P, S, H]
    mapped = jax.jit(jax.vmap(PAGED, in_axes=(None, 1, 1, None, None)))
    got = mapped(q, *many, tables, lengths)
    for i in range(2):
        want = PAGED(q, *(x[:, i] for x in many), tables, lengths)
        np.testing.assert_array_equal(np.asarray(got[i]), np.asarray(want))
    compiled = mapped.lower(q, *many, tables, lengths).compile()
    assert set(large_results(compiled, k_pages.size // 2)) <= {"bitcast"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_explain_knows_these_calls(layout: str) -> None:
    name, args, named = harness.arguments(layout_case(layout))
    explanation = jpa.explain(getattr(compat, name.rpartition(".")[2]), *args, platform="tpu", **named)
    assert explanation.engine == "reference"


# ---- Errors ----------------------------------------------------------------------------------------------------------

TPU_CALL: dict[str, Any] = {
    "q": jnp.zeros((5, 4, 8)),
    "kv_pages": jnp.zeros((6, 4, 4, 8)),
    "kv_lens": jnp.ones(2, jnp.int32),
    "page_indices": jnp.zeros((2, 3), jnp.int32),
    "cu_q_lens": jnp.zeros(3, jnp.int32),
    "num_seqs": jnp.ones(1, jnp.int32),
}
GPU_CALL: dict[str, Any] = {
    "q": jnp.zeros((2, 4, 8)),
    "k_pages": jnp.zeros((2, 6, 4, 8)),
    "v_pages": jnp.zeros((2, 6, 4, 8)),
    "block_tables": jnp.zeros((2, 3), jnp.int32),
    "lengths": jnp.ones(2, jnp.int32),
}
# The change, the error, and the text that the message must have.
BAD_TPU: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kv_pages": jnp.zeros((6, 4, 3, 8))}, ValueError, r"kv_pages: expected .*2K.* an even size .*, got .*3"),
    ({"kv_pages": jnp.zeros((6, 4, 32))}, ValueError, "kv_pages: expected rank 4"),
    ({"kv_pages": jnp.zeros((6, 4, 6, 8))}, ValueError, "q: expected query heads divisible by the 3 .* of kv_pages"),
    ({"kv_pages": jnp.zeros((6, 0, 4, 8))}, ValueError, "kv_pages: page size"),
    ({"kv_pages": jnp.zeros((6, 4, 4, 8), jnp.bfloat16)}, ValueError, "kv_pages: expected dtype float32"),
    ({"page_indices": jnp.zeros((3, 3), jnp.int32)}, ValueError, "page_indices: expected .*B = 2"),
    ({"page_indices": jnp.zeros((2, 3))}, ValueError, "page_indices: expected dtype int32"),
    ({"num_seqs": jnp.ones(2, jnp.int32)}, ValueError, "num_seqs: "),
    ({"sliding_window": 0}, ValueError, "sliding_window: "),
    ({"sliding_window": -1}, ValueError, "sliding_window: "),
    ({"soft_cap": 0.0}, ValueError, "soft_cap: "),
    ({"mask_value": -1.0}, ValueError, "mask_value: expected .*, got -1.0"),
    ({"mask_value": "low"}, TypeError, "mask_value: "),
    ({"num_kv_pages_per_block": 0}, ValueError, "num_kv_pages_per_block: "),
    ({"implementation": "mine"}, ValueError, "implementation: "),
]
TPU_WRITE: dict[str, Any] = {
    "kv_pages": jnp.zeros((6, 4, 4, 8)),
    "k": jnp.zeros((3, 2, 8)),
    "v": jnp.zeros((3, 2, 8)),
    "slot_mapping": jnp.zeros(3, jnp.int32),
}
GPU_WRITE = {
    **{name: x for name, x in TPU_WRITE.items() if name != "kv_pages"},
    **dict.fromkeys(("k_pages", "v_pages"), jnp.zeros((2, 6, 4, 8))),
}
BAD_TPU_WRITE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kv_pages": jnp.zeros((6, 4, 3, 8))}, ValueError, "kv_pages: expected .* an even size"),
    ({"kv_pages": jnp.zeros((6, 4, 8, 8))}, ValueError, "k: expected .*K = 4"),
    ({"kv_pages": jnp.zeros((6, 4, 4, 8), jnp.int8)}, ValueError, "k_scale: required for int8"),
    ({"v": jnp.zeros((3, 2, 8), jnp.bfloat16)}, ValueError, "v: expected dtype float32"),
    ({"slot_mapping": jnp.zeros(4, jnp.int32)}, ValueError, "slot_mapping: expected .*T = 3"),
]
BAD_GPU_WRITE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k_pages": jnp.zeros((6, 4, 2, 8))}, ValueError, "v_pages: expected .*K = 6"),
    ({"v_pages": jnp.zeros((2, 6, 4, 8), jnp.bfloat16)}, ValueError, "v_pages: expected dtype float32"),
    ({"k": jnp.zeros((3, 2, 8), jnp.int8)}, ValueError, "k: expected dtype"),
    ({"v_scale": 0.0}, ValueError, "v_scale: expected positive"),
]
BAD_GPU: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k_pages": jnp.zeros((2, 6, 4, 9))}, ValueError, "k_pages: expected .*H = 8"),
    ({"v_pages": jnp.zeros((2, 7, 4, 8))}, ValueError, "v_pages: expected .*P = 6"),
    ({"k_pages": jnp.zeros((3, 6, 4, 8))}, ValueError, r"v_pages: expected .*\[K, P, S, Hv\].*K = 3"),
    ({"block_tables": jnp.zeros((2, 3, 1), jnp.int32), "lengths": None}, ValueError, "block_tables: expected rank 2"),
    ({"attn_logits_soft_cap": 0.0}, ValueError, "attn_logits_soft_cap: "),
    ({"k_splits": 0}, ValueError, "k_splits: "),
]


@pytest.mark.parametrize(
    ("function", "good", "bad"),
    [*((RAGGED, TPU_CALL, bad) for bad in BAD_TPU),
     *((PAGED, GPU_CALL, bad) for bad in BAD_GPU),
     *((compat.write_interleaved_kv_pages, TPU_WRITE, bad) for bad in BAD_TPU_WRITE),
     *((compat.write_head_major_kv_pages, GPU_WRITE, bad) for bad in BAD_GPU_WRITE)],
    ids=lambda x: None if callable(x) else "call" if isinstance(x, dict) else x[2][:20],
)  # fmt: skip
def test_bad_input_raises_at_trace_time(function: Any, good: dict[str, Any], bad: Any) -> None:
    changes, error, message = bad
    function(**good)
    with pytest.raises(error, match=f"^{message}"):
        function(**{**good, **changes})


def test_absent_values_mean_what_they_mean_there() -> None:
    args = dict(GPU_CALL, q=jnp.ones((2, 4, 8)), v_pages=jnp.arange(2 * 6 * 4 * 8.0).reshape(2, 6, 4, 8))
    whole = PAGED(**{**args, "lengths": jnp.full(2, 12, jnp.int32)})
    np.testing.assert_array_equal(PAGED(**{**args, "lengths": None}), whole)
    capped = {"attn_logits_soft_cap": 3.0}
    np.testing.assert_array_equal(PAGED(**args, **capped), PAGED(**args, attn_logits_soft_cap=-3.0))
    int8 = {**TPU_CALL, "kv_pages": jnp.ones((6, 4, 4, 8), jnp.int8), "cu_q_lens": jnp.array([0, 1, 5], jnp.int32)}
    np.testing.assert_array_equal(RAGGED(**int8)[0], 1)


def test_fp8_pages_cannot_be_differentiated() -> None:
    pages = TPU_CALL["kv_pages"].astype(jnp.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"^kv_pages: float8_e4m3fn pages cannot be differentiated"):
        jax.grad(lambda x: RAGGED(**{**TPU_CALL, "kv_pages": x}).sum())(pages)
