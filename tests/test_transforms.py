"""The transformations that JAX applies to a call: compile, loop, differentiate, map, export, cache."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import dense
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, Array, Case, build
from harness import (
    assert_gradients_close,
    differentiable,
    digest,
    normal_like,
    pull_back,
    push_forward,
    python,
    to_f64,
)
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads

import jax_paged_attn as jpa
from jax_paged_attn import _ffi

GRADIENT_BOUND = {"f32": 2e-5, "f16": 4e-3, "bf16": 2e-2}
GRADIENT_CASES = (
    "mixed", "mixed_all", "mixed_dense", "mixed_dense_window_sinks", "decode", "decode_all", "decode_group_7",
    "more_rows_than_keys", "used_ids_bad", "shared_prefix", "num_seqs_two", "cu_decreasing", "cu_outside",
    "sinks_without_keys", "f32_scaled", "mixed_bf16", "mixed_f16", "mixed_page_size_17", "page_size_1_bf16_window",
    "window_passed_pages", "window_huge_short", "chunked_prompt", "whole_prompt", "long_decode_window",
    "mixed_values_narrow_all", "prompt_values_wide", "mixed_in_keys_all", "decode_k_eq_v", "decode_in_keys_odd",
)  # fmt: skip


# ---- Derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_match_dense_attention(name: str) -> None:
    """With respect to everything, through out and lse, with cotangents on rows that have no key as well."""
    case = BY_NAME[name]
    attend, operands = differentiable(case)
    bars = normal_like(jax.eval_shape(attend, *operands), 1)
    got = pull_back(attend, operands, bars)
    with jax.enable_x64(True):
        want = pull_back(dense.attention(case), *to_f64((operands, bars)))
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(operands)]
    assert_gradients_close(got, want, GRADIENT_BOUND[case.dtype])


@pytest.mark.parametrize(
    "name", ["mixed_all", "decode_group_7", "more_rows_than_keys", "sinks_without_keys", "f32_scaled", "mixed_bf16",
     "mixed_in_keys_all", "prompt_values_wide"]
)  # fmt: skip
def test_tangents_match_dense_attention(name: str) -> None:
    case = BY_NAME[name]
    attend, operands = differentiable(case)
    dots = normal_like(operands, 2)
    out_dot, lse_dot = push_forward(attend, operands, dots)
    with jax.enable_x64(True):
        want = push_forward(dense.attention(case), *to_f64((operands, dots)))
    assert_gradients_close((out_dot,), want[:1], GRADIENT_BOUND[case.dtype])
    assert_gradients_close((lse_dot[..., None],), (want[1][..., None],), GRADIENT_BOUND[case.dtype])


@pytest.mark.parametrize("rows", [0, 3])
def test_gradients_without_sequences_are_zero(rows: int) -> None:
    attend, operands = differentiable(Case("no sequences", (), (), rows=rows, sinks=True))
    bars, dots = normal_like(jax.eval_shape(attend, *operands), 1), normal_like(operands, 2)
    for result in (*pull_back(attend, operands, bars), *push_forward(attend, operands, dots)):
        np.testing.assert_array_equal(result, 0)


@functools.cache
def loss_and_gradients() -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
    """A loss, its operands, and the gradients of all of them; compiled once for all operands."""
    attend, operands = differentiable(BY_NAME["mixed_all"])

    def loss(*operands: Any) -> Any:
        out, _ = attend(*operands)
        return (out * jnp.arange(out.size).reshape(out.shape)).sum()

    return loss, operands, jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*operands)


@pytest.mark.parametrize("argnum", range(4))
def test_gradient_of_one_operand_alone(argnum: int) -> None:
    """The others have no tangent at all."""
    loss, operands, gradients = loss_and_gradients()
    alone, together = jax.jit(jax.grad(loss, argnum))(*operands), gradients[argnum]
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-6 * np.abs(together).max())


@pytest.mark.parametrize("modes", ["fwd", "rev"])
def test_gradients_match_finite_differences(modes: str) -> None:
    case = Case("finite", (2, 3), (5, 4), head_dim=8, page_size=4, max_pages=2, sinks=True, keywords={"soft_cap": 3.0})
    attend, operands = differentiable(case)
    operands = tuple(np.nan_to_num(x, nan=0.5, posinf=1.0, neginf=-1.0) for x in operands)
    check_grads(attend, operands, order=1, modes=[modes], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_second_derivative_matches_dense_attention() -> None:
    case = BY_NAME["mixed_all"]

    def product(attend: Callable[..., Any], operands: Any, weights: Any, dots: Any) -> Any:
        """Hessian times vector, of a function that is not linear in `out`."""

        def loss(*operands: Any) -> Any:
            out, lse = attend(*operands)
            return (weights * out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

        return push_forward(jax.grad(loss, (0, 1, 2, 3)), operands, dots)

    attend, operands = differentiable(case)
    weights, dots = normal_like(operands[0], 3), normal_like(operands, 4)
    got = product(attend, operands, weights, dots)
    with jax.enable_x64(True):
        want = product(dense.attention(case), *(to_f64(x) for x in (operands, weights, dots)))
    assert_gradients_close(got, want, 1e-4)


def test_gradient_through_merge_is_gradient_of_whole() -> None:
    """Keys split in two after 32; half of the second parts are empty."""
    case = Case("halves", (1,) * 4, (20, 64, 0, 33), "paged_attention", sinks=True)
    attend, operands = differentiable(case)
    _, _, _, tables, lengths = build(case).arguments()[0]

    def merged(q: Any, k_pages: Any, v_pages: Any, sinks: Any) -> Any:
        first = jpa.paged_attention(q, k_pages, v_pages, tables[:, :2], lengths, sinks=sinks, return_lse=True)
        second = jpa.paged_attention(q, k_pages, v_pages, tables[:, 2:], lengths - 32, return_lse=True)
        return jpa.merge_attention_states(*zip(first, second, strict=True))

    bars = normal_like(jax.eval_shape(attend, *operands), 5)
    assert_gradients_close(pull_back(merged, operands, bars), pull_back(attend, operands, bars), 2e-5)


def test_merge_of_parts_without_keys_has_zero_gradients() -> None:
    outs, lses = np.ones((2, 3, 4, 8), np.float32), np.full((2, 3, 4), -np.inf, np.float32)
    bars = normal_like((outs[0], lses[0]), 6)
    for grad in pull_back(jpa.merge_attention_states, (outs, lses), bars):
        np.testing.assert_array_equal(grad, 0)


def test_gradient_through_write() -> None:
    """Overwritten tokens and pages have no influence, nor have slots outside the pool."""
    case = BY_NAME["decode"]
    (q, k_pages, v_pages, tables, lengths), _ = build(case).arguments()
    k_pages, v_pages = (np.nan_to_num(x, nan=0.5, posinf=1.0, neginf=-1.0) for x in (k_pages, v_pages))
    k, v = np.random.default_rng(7).standard_normal((2, 6, 2, 32)).astype(np.float32)
    newest = [tables[b, (n - 1) // 16] * 16 + (n - 1) % 16 for b, n in enumerate(lengths)]
    slots = np.array([newest[0], newest[1], -1, newest[2], newest[0], k_pages.shape[0] * 16], np.int32)

    def paged(q: Any, k_pages: Any, v_pages: Any, k: Any, v: Any) -> Any:
        k_new, v_new = jpa.write_kv_pages(k_pages, v_pages, k, v, slots)
        return jpa.paged_attention(q, k_new, v_new, tables, lengths, return_lse=True)

    def simple(q: Any, k_pages: Any, v_pages: Any, k: Any, v: Any) -> Any:
        last = np.array([1, 3, 4])
        k_pages, v_pages = (
            pages.reshape(-1, 2, 32).at[slots[last]].set(tokens[last]).reshape(pages.shape)
            for pages, tokens in ((k_pages, k), (v_pages, v))
        )
        return dense.attention(case)(q, k_pages, v_pages)

    operands = (q, k_pages, v_pages, k, v)
    bars = normal_like(jax.eval_shape(paged, *operands), 8)
    dots = normal_like(operands, 9)
    got, got_dots = pull_back(paged, operands, bars), push_forward(paged, operands, dots)
    with jax.enable_x64(True):
        want = pull_back(simple, *to_f64((operands, bars)))
        want_dots = push_forward(simple, *to_f64((operands, dots)))
    assert_gradients_close(got, want, 2e-5)
    assert_gradients_close(got_dots, want_dots, 2e-5)


@pytest.mark.parametrize("k_scale", [0.25, (0.5, 2.0)])
def test_gradient_through_write_with_scales(k_scale: Any) -> None:
    """Written with a scale and read with it, a token is itself again: so is its gradient."""
    case = BY_NAME["decode"]
    (q, k_pages, _, tables, lengths), _ = build(case).arguments()
    k, v = np.random.default_rng(7).standard_normal((2, 4, 2, 32)).astype(np.float32)
    slots = np.array([tables[b, (n - 1) // 16] * 16 + (n - 1) % 16 for b, n in enumerate(lengths)], np.int32)
    zeros = np.zeros_like(k_pages)

    def attend(k: Any, v: Any, **scale: Any) -> Any:
        k_new, v_new = jpa.write_kv_pages(zeros, zeros, k, v, slots, **scale)
        return jpa.paged_attention(q, k_new, v_new, tables, lengths, **scale)

    def attend_scaled(k: Any, v: Any) -> Any:
        return attend(k, v, k_scale=np.float32(k_scale))

    bar = normal_like(q, 10)
    assert_gradients_close(pull_back(attend_scaled, (k, v), bar), pull_back(attend, (k, v), bar), 1e-5)


def test_int8_pages_have_float0_tangents() -> None:
    case = BY_NAME["mixed_f32_int8"]
    attend, operands = differentiable(case)
    bars = normal_like(jax.eval_shape(attend, *operands), 12)
    q_bar, k_bar, v_bar = jax.vjp(attend, *operands)[1](bars)
    assert k_bar.dtype == v_bar.dtype == jax.dtypes.float0
    with jax.enable_x64(True):
        want, *_ = pull_back(dense.attention(case), *to_f64((operands, bars)))
    assert_gradients_close((q_bar,), (want,), 2e-5)


@pytest.mark.parametrize("argnum", [1, 2])
@pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])
def test_fp8_pages_cannot_be_differentiated(dtype: str, argnum: int) -> None:
    attend, operands = differentiable(BY_NAME[f"mixed_f32_{dtype}"])
    name = ("q", "k_pages", "v_pages")[argnum]
    with pytest.raises(TypeError, match=f"^{name}: float8_{dtype}.* pages cannot be differentiated"):
        jax.grad(lambda *xs: attend(*xs)[0].sum(), argnum)(*operands)
    q_bar = jax.grad(lambda q: attend(q, *operands[1:])[0].sum())(operands[0])
    assert np.isfinite(q_bar).all()


def test_scales_are_constants() -> None:
    (q, k_pages, v_pages, *rest), _ = build(BY_NAME["mixed"]).arguments()
    grad = jax.grad(lambda s: jpa.ragged_paged_attention(q, k_pages, v_pages, *rest, k_scale=s)[0].sum())(jnp.ones(2))
    np.testing.assert_array_equal(grad, 0)


def test_nothing_of_size_rows_times_keys_is_kept() -> None:
    case = Case("wide", (96,), (96,), num_heads=2, num_kv_heads=1, head_dim=8, page_size=8, max_pages=64)
    attend, operands = differentiable(case)
    _, pull_back = jax.vjp(attend, *operands)
    kept = jax.tree.leaves(pull_back)
    rows, keys = len(operands[0]), case.max_pages * case.page_size
    assert max(x.size for x in kept) == operands[1].size < rows * keys


def test_gradients_of_shared_pages_have_the_same_bits_again() -> None:
    attend, operands = differentiable(BY_NAME["shared_prefix"])
    grad = jax.jit(jax.grad(lambda *xs: (attend(*xs)[0] ** 2).sum(), (0, 1, 2)))
    assert digest(*map(np.asarray, grad(*operands))) == digest(*map(np.asarray, grad(*operands)))


MAPPED = ((0,), (1,), (2, 3), (0, 1, 2, 3))


@functools.cache
def pull_back_of_one() -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
    """A call, its compiled pullback `(bars, *operands)`, and finite operands."""
    attend, operands = differentiable(BY_NAME["mixed_all"])
    finite = tuple(np.nan_to_num(x, nan=0.5, posinf=1.0, neginf=-1.0) for x in operands)
    return attend, jax.jit(lambda bars, *operands: jax.vjp(attend, *operands)[1](bars)), finite


@pytest.mark.parametrize(
    ("order", "mapped"),
    [*itertools.product(["vmap of vjp", "vjp of vmap"], MAPPED), ("vmap of vjp", ())],
    ids=str,
)
def test_gradient_under_vmap_is_a_loop(order: str, mapped: tuple[int, ...]) -> None:
    """Unmapped operands get one cotangent per copy inside, their sum outside; cotangents alone may be mapped, too."""
    attend, pull, finite = pull_back_of_one()
    axes = tuple(0 if i in mapped else None for i in range(4))
    stacked = tuple(np.stack([x, x[::-1], -x]) if axis == 0 else x for x, axis in zip(finite, axes, strict=True))
    results = jax.eval_shape(attend, *finite)
    bars = normal_like(jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), results), 11)

    def pull_copy(i: int) -> Any:
        mine = (x[i] if axis == 0 else x for x, axis in zip(stacked, axes, strict=True))
        return pull(jax.tree.map(lambda x: x[i], bars), *mine)

    loop = list(zip(*map(pull_copy, range(3)), strict=True))  # the cotangents of each operand
    if order == "vmap of vjp":
        got = jax.jit(jax.vmap(pull, in_axes=(0, *axes)))(bars, *stacked)
        want = [np.stack(grads) for grads in loop]
    else:
        got = jax.jit(jax.vjp(jax.vmap(attend, in_axes=axes), *stacked)[1])(bars)
        want = [np.stack(g) if axis == 0 else np.sum(g, axis=0) for g, axis in zip(loop, axes, strict=True)]
    assert_gradients_close(got, want, 2e-5)


# ---- Control flow and compilation ------------------------------------------------------------------------------------


def _layers() -> tuple[Array, tuple[Array, Array], tuple[Array, Array]]:
    """Queries, pools of three layers, and tables with lengths."""
    case = BY_NAME["decode"]
    (q, k_pages, v_pages, tables, lengths), _ = build(case).arguments()
    k_pools, v_pools = (np.stack([x, 0.5 * x, -x]) for x in (k_pages, v_pages))
    return q, (k_pools, v_pools), (tables, lengths)


def test_scan_while_and_checkpoint_are_loops() -> None:
    q, (k_pages, v_pages), (tables, lengths) = _layers()

    def layer(q: Any, pools: Any) -> Any:
        return q + jpa.paged_attention(q, pools[0], pools[1], tables, lengths)

    def unrolled(q: Any, k_pages: Any, v_pages: Any) -> Any:
        for i in range(3):
            q = layer(q, (k_pages[i], v_pages[i]))
        return q

    def scanned(q: Any, k_pages: Any, v_pages: Any) -> Any:
        return jax.lax.scan(lambda q, pools: (jax.checkpoint(layer)(q, pools), None), q, (k_pages, v_pages))[0]

    def while_loop(q: Any, k_pages: Any, v_pages: Any) -> Any:
        def body(state: Any) -> Any:
            i, q = state
            return i + 1, layer(q, (k_pages[i], v_pages[i]))

        return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, q))[1]

    want = unrolled(q, k_pages, v_pages)
    for form in (scanned, while_loop):
        np.testing.assert_allclose(jax.jit(form)(q, k_pages, v_pages), want, rtol=1e-6, atol=1e-6)

    def grads(f: Callable[..., Any]) -> Any:
        return jax.jit(jax.grad(lambda *xs: (f(*xs) ** 2).sum(), (0, 1, 2)))(q, k_pages, v_pages)

    assert_gradients_close(grads(scanned), grads(unrolled), 1e-5)


def test_donated_queries_are_reused() -> None:
    (q, *rest), _ = build(BY_NAME["decode"]).arguments()
    want = jpa.paged_attention(q, *rest)
    q = jax.device_put(q) + 0
    got = jax.jit(jpa.paged_attention, donate_argnums=0)(q, *rest)
    assert q.is_deleted()
    np.testing.assert_array_equal(got, want)


def test_one_trace_serves_all_lengths() -> None:
    traces = []

    @jax.jit
    def decode(*args: Any) -> Any:
        traces.append(1)
        return jpa.paged_attention(*args)

    *args, lengths = build(BY_NAME["decode"]).arguments()[0]
    for step in range(3):
        decode(*args, lengths - step)
    assert len(traces) == 1


CACHED = """
import sys, jax, harness
from cases import BY_NAME, build
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None)
case = BY_NAME["decode"]
harness.assert_close(harness.run(case), harness.expected(case), case.dtype)
print(len(hits))
"""


def test_persistent_compilation_cache_is_hit(tmp_path: Any) -> None:
    assert python(CACHED, str(tmp_path)) == ["0"]
    (hits,) = python(CACHED, str(tmp_path))
    assert int(hits) > 0


def array_dtypes(jaxpr: Any) -> Iterator[str]:
    """The dtypes of all arrays in a jaxpr and those inside it, except scalars: Python's are 64-bit under x64."""
    for eqn in jaxpr.eqns:
        yield from (str(x.aval.dtype) for x in (*eqn.invars, *eqn.outvars) if x.aval.ndim > 0)
        for inner in jaxprs_in_params(eqn.params):
            yield from array_dtypes(inner)


@pytest.mark.parametrize("name", ["num_seqs_two", "decode_bf16_int8"])
def test_indices_stay_int32_under_x64(engine: str, name: str) -> None:
    case = harness.adapted(name, engine)
    args, traced = build(case).arguments()

    def attend(*args: Any, **traced: Any) -> Any:
        return getattr(jpa, case.function)(*args, **traced, **case.keywords, implementation=engine, return_lse=True)

    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(attend)(*args, **traced)
        result = jax.jit(attend)(*args, **traced)
    assert not {"int64", "float64"} & set(array_dtypes(jaxpr.jaxpr))
    harness.assert_close(result, harness.expected(case), case.dtype)


def test_writes_and_gradients_run_under_x64() -> None:
    (q, k_pages, v_pages, tables, lengths), _ = build(BY_NAME["decode"]).arguments()
    slots = np.array([3, -1, 7, 300], np.int32)

    def loss(q: Any, k_pages: Any) -> Any:
        k_new, v_new = jpa.write_kv_pages(k_pages, v_pages, q[:, :2], q[:, 2:], slots)
        k_new, v_new = jpa.copy_kv_pages(k_new, v_new, slots[:1], slots[2:3])
        out: Any = jpa.paged_attention(q, k_new, v_new, tables, lengths)
        return out.sum()

    want = jax.jit(jax.grad(loss, (0, 1)))(q, k_pages)
    with jax.enable_x64(True):
        got = jax.jit(jax.grad(loss, (0, 1)))(q, k_pages)
    assert [x.dtype for x in got] == [np.float32] * 2
    assert_gradients_close(got, want, 1e-5)


@pytest.mark.engines(that=lambda row: row.batch_invariant)
def test_batch_invariant_calls_have_the_same_derivatives(engine: str) -> None:
    """And map as others do: derivatives are plain JAX, whatever is asked of the engine."""
    case = harness.adapted("mixed_all", engine)
    (q, k_pages, *rest), traced = build(case).arguments()

    def loss(q: Any, k_pages: Any, batch_invariant: bool) -> Any:
        keywords = {**traced, **case.keywords, "implementation": engine, "batch_invariant": batch_invariant}
        return jpa.ragged_paged_attention(q, k_pages, *rest, **keywords).astype(jnp.float32).sum()

    def derivatives(batch_invariant: bool) -> Any:
        of_one = jax.value_and_grad(functools.partial(loss, batch_invariant=batch_invariant), (0, 1))
        return jax.jit(jax.vmap(of_one, in_axes=(0, None)))(np.stack([q, 2 * q]), k_pages)

    for mine, theirs in zip(*map(jax.tree.leaves, map(derivatives, (True, False))), strict=True):
        # A batch-invariant call may round otherwise.
        np.testing.assert_allclose(to_f64(mine), to_f64(theirs), rtol=GRADIENT_BOUND[case.dtype], atol=1e-2)


# ---- Export ----------------------------------------------------------------------------------------------------------

OURS = [jax.export.DisabledSafetyCheck.custom_call(f"jax_paged_attn.{name}.v1") for name in ("attention", "write")]


def test_export_with_a_symbolic_batch(engine: str) -> None:
    case = harness.adapted("mixed_all", engine)
    args, traced = build(case).arguments()
    q, k_pages, v_pages, kv_lens, tables, *_ = args

    def attend(*args: Any) -> Any:
        return jpa.ragged_paged_attention(*args, **traced, **case.keywords, implementation=engine, return_lse=True)

    t, b, p, m = jax.export.symbolic_shape("t, b, p, m")
    spec = jax.ShapeDtypeStruct
    pool = spec((p, *k_pages.shape[1:]), k_pages.dtype)
    ints = (spec((b,), jnp.int32), spec((b, m), jnp.int32), spec((b + 1,), jnp.int32))
    specs = (spec((t, *q.shape[1:]), q.dtype), pool, pool, *ints)
    exported = jax.export.export(jax.jit(attend), disabled_checks=OURS)(*specs)
    again = jax.export.deserialize(exported.serialize())
    for name in ("mixed_all", "mixed_all_short"):
        # By one name, or the two could be adapted to different dtypes.
        edge = dataclasses.replace(BY_NAME[name], name=case.name)
        args = build(harness.adapted(edge, engine)).arguments()[0][:6]
        harness.assert_close(again.call(*args), jax.jit(attend)(*args), case.dtype)
    smaller = (q[:3], k_pages, v_pages, kv_lens[:1], tables[:1, :2], np.array([0, 3], np.int32))
    harness.assert_close(again.call(*smaller), attend(*smaller), case.dtype)


def test_export_of_decode_with_writes_and_a_symbolic_batch() -> None:
    (q, k_pages, v_pages, tables, lengths), _ = build(BY_NAME["decode"]).arguments()

    def step(q: Any, k_pages: Any, v_pages: Any, tables: Any, lengths: Any, slots: Any) -> Any:
        k_new, v_new = jpa.write_kv_pages(k_pages, v_pages, q[:, :2], q[:, 2:], slots)
        return jpa.paged_attention(q, k_new, v_new, tables, lengths)

    (b,) = jax.export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct
    pool = spec(k_pages.shape, jnp.float32)
    args = (
        spec((b, 4, 32), jnp.float32),
        pool,
        pool,
        spec((b, 4), jnp.int32),
        spec((b,), jnp.int32),
        spec((b,), jnp.int32),
    )
    exported = jax.export.deserialize(jax.export.export(jax.jit(step), disabled_checks=OURS)(*args).serialize())
    slots = np.array([5, 18, -1, 7], np.int32)
    for n in (1, 4):
        values = (q[:n], k_pages, v_pages, tables[:n], lengths[:n], slots[:n])
        np.testing.assert_allclose(exported.call(*values), step(*values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_platform_without_an_engine_lowers_to_plain_jax(platform: str) -> None:
    if _ffi.has(platform):
        pytest.skip(f"has engines for {platform}")
    args, _ = build(BY_NAME["decode"]).arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jpa.PagedAttentionWarning)  # on CUDA, once per process
        lowered = jax.jit(jpa.paged_attention).trace(*args).lower(lowering_platforms=(platform,))
    assert "jax_paged_attn." not in lowered.as_text()
