"""Whole calls at random against the oracle: shapes, dtypes, keywords, tables, lengths; `vmap`, gradients, writes.

As a test it tries the same few calls each time; `make fuzz` tries others until it is stopped, in rounds of new
processes (tools/fuzz). A failing attention call is printed as a `Case`, which a file of tests/cases/ can take as it is.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import dense
import harness
import jax
import numpy as np
import oracle
import pytest
from cases import DTYPES, INT32_MAX, INT32_MIN, Array, Case, build, random_values
from harness import assert_same_bits, normal_like, pull_back, to_f64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_paged_attn as jpa

# Random examples, and how many times as many, instead of the fixed ones.
FUZZ = int(os.environ.get("JPA_FUZZ", "0"))


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=examples * max(FUZZ, 1),
        derandomize=FUZZ == 0,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# ---- A call ----------------------------------------------------------------------------------------------------------

ANY_INT32 = st.sampled_from([INT32_MIN, -1, INT32_MAX])
ARGUMENTS = {
    "paged_attention": ("q", "k_pages", "v_pages", "block_tables", "kv_lens"),
    "ragged_paged_attention": ("q", "k_pages", "v_pages", "kv_lens", "block_tables", "cu_q_lens", "num_seqs"),
}


@st.composite
def cases(draw: st.DrawFn, engine: str, **fixed: Any) -> Case:
    """Any call that the engine takes, `fixed` apart; small, since the oracle is a loop and shapes are compiled."""
    row = harness.engine_row(engine)
    taken = [dtype for dtype in ("f32", "bf16", "f16") if DTYPES[dtype].name in row.q_dtypes]
    dtype = fixed["dtype"] if "dtype" in fixed else draw(st.sampled_from(taken))
    narrow = st.sampled_from(["e4m3", "e5m2", "int8"])
    page_dtype = fixed["page_dtype"] if "page_dtype" in fixed else draw(st.none() | narrow)
    num_kv_heads = draw(st.integers(1, 3))
    sizes = st.integers(1, 40) | st.sampled_from([64, 80, 128])
    equal = sizes.map(lambda size: (size, size))
    head_dim, value_dim = draw(st.sampled_from(row.head_dims) if row.head_dims else equal | st.tuples(sizes, sizes))
    values_in_keys = value_dim <= head_dim and draw(st.integers(0, 3)) == 0
    page_size = draw(st.integers(1, 9) | st.sampled_from([16, 24, 64, 100]))
    max_pages = draw(st.integers(0, 6) if page_size > 9 else st.integers(0, 40))
    capacity = max_pages * page_size

    decode = draw(st.booleans())
    batch = draw(st.integers(0, 5))
    q_lens = (1,) * batch if decode else draw(tuples(st.integers(0, 12) | st.integers(0, 40), batch))
    kv_lens = draw(tuples(st.integers(0, capacity) | st.integers(-2, capacity + 2) | ANY_INT32, batch))
    rows = num_seqs = cu_q_lens = None
    if not decode:
        rows = sum(q_lens) + draw(st.integers(0, 3))
        num_seqs = draw(st.none() | st.integers(-1, batch + 1) | ANY_INT32)
        cu_q_lens = draw(st.none() | tuples(st.integers(-1, rows + 1) | ANY_INT32, batch + 1))

    # Whole pages of the first sequence may be others' too; a page that one knows in part holds poison in its rest.
    first_pages = min(max(kv_lens[0], 0), capacity) // page_size if batch else 0
    entries = [(b, column) for b in range(batch) for column in range(max_pages)]
    bad_ids = st.sampled_from([INT32_MIN, -1, batch * max_pages + 3, INT32_MAX])
    bad = draw(st.dictionaries(st.sampled_from(entries), bad_ids, max_size=4)) if entries else {}

    scale = st.sampled_from([0.005, 0.01, 0.02] if page_dtype == "int8" else [0.25, 0.7, 1.9])
    scales = scale | tuples(scale, num_kv_heads)
    if page_dtype != "int8":
        scales = st.none() | scales

    keywords: dict[str, Any] = {}
    if multiplier := draw(st.sampled_from([None, None, 0.1, 0.15, -0.1])):
        keywords["scale"] = multiplier
    if window := draw(st.none() | st.integers(1, 20) | st.sampled_from([capacity + 1, INT32_MAX, 2**40])):
        keywords["sliding_window"] = window
    if cap := draw(st.sampled_from([None, None, 0.5, 3.0, 50.0])):
        keywords["soft_cap"] = cap
    if not decode and draw(st.booleans()):
        keywords["causal"] = False
    return Case(
        name=f"fuzz {draw(st.integers(0, 2**16))}",  # which the values follow from
        q_lens=q_lens,
        kv_lens=kv_lens,
        function="paged_attention" if decode else "ragged_paged_attention",
        num_heads=num_kv_heads * draw(st.integers(1, 9) | st.just(17)),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        values_in_keys=values_in_keys,
        page_size=page_size,
        max_pages=max_pages,
        dtype=dtype,
        page_dtype=page_dtype,
        rows=rows,
        num_seqs=num_seqs,
        cu_q_lens=cu_q_lens,
        bad_ids=tuple((b, column, page) for (b, column), page in sorted(bad.items())),
        shared_pages=draw(st.integers(0, first_pages)),
        sinks=draw(st.booleans()),
        sink_offset=draw(st.sampled_from([0.0, 0.0, 5.0, -300.0, -np.inf])),
        k_scale=draw(scales),
        v_scale=None if values_in_keys else draw(scales),
        keywords=keywords,
    )


def tuples(elements: st.SearchStrategy[Any], size: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(elements, min_size=size, max_size=size).map(tuple)


def assert_as_the_oracle(got: Any, function: str, args: tuple[Any, ...], keywords: dict[str, Any], dtype: str) -> None:
    """Errors are measured by what the values add up to without their signs, which few of them cancel at random."""
    want = getattr(oracle, function)(*args, **keywords)
    q, k_pages, v_pages, *rest = args
    if v_pages is None:
        v_pages, keywords = k_pages[..., : keywords["value_dim"]], {**keywords, "v_scale": keywords["k_scale"]}
    magnitude, _ = getattr(oracle, function)(q, k_pages, np.abs(v_pages), *rest, **keywords)
    harness.assert_close(got, want, dtype, magnitude)


# ---- Attention -------------------------------------------------------------------------------------------------------


def test_any_call_is_as_the_oracle(engine: str) -> None:
    @fuzzed(20 if engine == "reference" else 100)  # whose calls take XLA longer to compile
    @given(case=cases(engine))
    def check(case: Case) -> None:
        args, traced = build(case).arguments()
        got = harness.run(case, implementation=engine)
        assert_as_the_oracle(got, case.function, args, {**traced, **case.keywords}, case.dtype)

    check()


@pytest.mark.engines(that=lambda row: row.batch_invariant)
@fuzzed(15)
@given(data=st.data())
def test_any_batch_invariant_call_has_the_bits_of_each_sequence_alone(engine: str, data: st.DataObject) -> None:
    case = data.draw(cases(engine).filter(lambda case: case.function == "paged_attention"), label="case")
    (q, k_pages, v_pages, tables, lengths), traced = build(case).arguments()
    keywords = {**traced, **case.keywords, "implementation": engine, "batch_invariant": True, "return_lse": True}

    def run(rows: slice) -> list[Array]:
        results = harness.call(case.function, q[rows], k_pages, v_pages, tables[rows], lengths[rows], **keywords)
        return [np.asarray(x) for x in results]

    whole = run(slice(None))
    for b in range(len(q)):
        assert harness.digest(*run(slice(b, b + 1))) == harness.digest(*(x[b : b + 1] for x in whole))


@fuzzed(10)
@given(data=st.data())
def test_any_vmap_is_a_loop(engine: str, data: st.DataObject) -> None:
    case = data.draw(cases(engine), label="case")
    variants, static = [_operands(case)], {**case.keywords}
    if case.values_in_keys:
        static["value_dim"] = case.value_dim
    for i in range(data.draw(st.integers(0, 2), label="more variants")):
        kv_lens, q_lens = (tuple(data.draw(st.permutations(lens))) for lens in (case.kv_lens, case.q_lens))
        variants.append(_operands(replace(case, name=f"{case.name} {i}", kv_lens=kv_lens, q_lens=q_lens)))
    present = [name for name, value in variants[0].items() if value is not None]
    mapped = data.draw(st.sets(st.sampled_from(present), min_size=1), label="mapped")
    axes: dict[str, int | None] = dict.fromkeys(variants[0])
    stacked = dict(variants[0])
    for name in sorted(mapped):
        axes[name] = axis = data.draw(st.integers(0, np.ndim(stacked[name])), label=f"axis of {name}")
        stacked[name] = np.stack([variant[name] for variant in variants], axis)

    def one(operands: dict[str, Any]) -> Any:
        args, traced = _arguments(case.function, operands)
        return getattr(jpa, case.function)(*args, **traced, **static, implementation=engine, return_lse=True)

    out, lse = jax.jit(jax.vmap(one, in_axes=(axes,)))(stacked)
    for i, variant in enumerate(variants):
        alone = {name: (variant if name in mapped else variants[0])[name] for name in variant}
        args, traced = _arguments(case.function, alone)
        assert_as_the_oracle((out[i], lse[i]), case.function, args, {**traced, **static}, case.dtype)


def _operands(case: Case) -> dict[str, Any]:
    """A case's operands by name. A page that one variant does not use may be another's, so none is poisoned."""
    args, traced = build(case).arguments()
    operands = dict(zip(ARGUMENTS[case.function], args, strict=True)) | traced
    operands.pop("value_dim", None)  # which is static
    for name in ("q", "k_pages") if case.values_in_keys else ("q", "k_pages", "v_pages"):
        tame = np.nan_to_num(operands[name].astype(np.float32), nan=0.5, posinf=1.0, neginf=-1.0)
        operands[name] = tame.astype(operands[name].dtype)
    return operands


def _arguments(function: str, operands: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    traced = {name: operands[name] for name in ("sinks", "k_scale", "v_scale")}
    return tuple(operands[name] for name in ARGUMENTS[function]), traced


@pytest.mark.engines(that=lambda row: "float32" in row.q_dtypes)  # it is compared in f32
@fuzzed(6)
@given(data=st.data())
def test_any_gradient_is_that_of_dense_attention(engine: str, data: st.DataObject) -> None:
    case = data.draw(cases(engine, dtype="f32", page_dtype=None), label="case")
    attend, operands = harness.differentiable(case, implementation=engine)
    bars = normal_like(jax.eval_shape(attend, *operands), 1)
    got = pull_back(attend, operands, bars)
    with jax.enable_x64(True):
        want = pull_back(dense.attention(case), *to_f64((operands, bars)))
    harness.assert_gradients_close(got, want, 1e-4)


# ---- Writes ----------------------------------------------------------------------------------------------------------


@fuzzed(60)
@given(data=st.data())
def test_any_write_is_as_the_oracle(data: st.DataObject) -> None:
    """On the platform at hand: bit for bit, mapped over any operands or not, and the caller's arrays stay."""
    num_pages, page_size = data.draw(st.integers(0, 6), label="P"), data.draw(st.integers(1, 5), label="S")
    kv_heads, tokens = data.draw(st.integers(1, 3), label="K"), data.draw(st.integers(0, 12), label="T")
    head_dim = data.draw(st.integers(1, 20) | st.sampled_from([64, 128]), label="H")
    value_dim = data.draw(st.just(head_dim) | st.sampled_from([0, 5, 64]), label="Hv, 0 in the keys")
    dtype = DTYPES[data.draw(st.sampled_from(["f32", "bf16", "f16"]), label="dtype")]
    page_dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)), label="dtype of pages")]
    scales = st.sampled_from([0.01, 0.3, 1.0, 7.0])
    scale = scales | tuples(scales, kv_heads)
    if page_dtype != np.int8:
        scale = st.none() | scale
    slot = st.integers(-2, num_pages * page_size + 1) | ANY_INT32
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), label="seed"))

    def operands(scales: list[Any]) -> dict[str, Any]:
        dims = (head_dim, value_dim)
        pools = [random_values(rng, (num_pages, page_size, kv_heads, dim), page_dtype) if dim else None for dim in dims]
        shapes = [(tokens, kv_heads, dim) for dim in dims]
        with np.errstate(over="ignore"):
            new = [
                (rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 7, shape)).astype(dtype) if shape[2] else None
                for shape in shapes
            ]
        slots = np.array(data.draw(tuples(slot, tokens), label="slots"), np.int32)
        names = ("k_pages", "v_pages", "k", "v", "slot_mapping", "k_scale", "v_scale")
        return dict(zip(names, (*pools, *new, slots, *scales), strict=True))

    def check(got: Any, operands: dict[str, Any]) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            want = oracle.write_kv_pages(**operands)
        for mine, theirs in zip(got, want, strict=True):
            if theirs is None:
                assert mine is None
            else:
                assert_same_bits(mine, theirs)

    def scale_array(scale: Any) -> Array | None:
        return None if scale is None else np.asarray(scale, np.float32)

    factors = [scale_array(data.draw(scale, label=name)) for name in ("k_scale", "v_scale")]
    if value_dim == 0:
        factors[1] = None
    variants = [operands(factors) for _ in range(2)]
    on_device: dict[str, Any] = {n: None if x is None else jax.numpy.array(x) for n, x in variants[0].items()}
    check(jpa.write_kv_pages(**on_device), variants[0])
    for name in ("k_pages", "v_pages") if value_dim else ("k_pages",):
        assert_same_bits(on_device[name], variants[0][name])

    present = [name for name, value in variants[0].items() if value is not None]
    mapped = data.draw(st.sets(st.sampled_from(present)), label="mapped")
    if mapped:
        axes = {name: 0 if name in mapped else None for name in variants[0]}
        stacked = {n: np.stack([x[n] for x in variants]) if n in mapped else variants[0][n] for n in axes}
        got = jax.jit(jax.vmap(lambda x: jpa.write_kv_pages(**x), in_axes=(axes,)))(stacked)
        for i, variant in enumerate(variants):
            mine = [None if x is None else x[i] for x in got]
            check(mine, {n: (variant if n in mapped else variants[0])[n] for n in variant})
