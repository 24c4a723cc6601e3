"""The calls of the RPA v3 family: what other packages give, a float64 oracle, in place, transformations, errors."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rpa_calls import CALLS, DTYPES, THEIRS, RpaCall, build, expected
from test_compat import assert_updates_in_place

import jax_paged_attn as jpa
from jax_paged_attn import compat

PARITY = Path(__file__).parent / "parity" / "rpa-v3.npz"
V3: Any = compat.ragged_paged_attention_v3
BATCHED: Any = compat.batched_ragged_paged_attention
OURS = {"tokamax": BATCHED, "tpu-inference": V3, "tpu-inference hd64": V3}
# Relative errors of outputs, by the queries' dtype.
BOUNDS = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2}
# tpu-inference's plain function rounds probabilities to the dtype of the values.
BOUNDS_OF_THEIRS = {"v3 e4m3": 6e-2, "v3 bf16, prefill": 2e-2}


def run(function: Any, call: RpaCall, arrays: dict[str, Any] | None = None, **keywords: Any) -> tuple[Any, ...]:
    """`(out, cache, lse)` of a call in `jit`."""
    static = {**call.keywords, **keywords, "return_lse": True}
    return jax.jit(lambda arrays: function(**arrays, **static))(build(call) if arrays is None else arrays)


def adapted(call: RpaCall, engine: str) -> RpaCall:
    """The call with queries of a dtype that the engine takes."""
    taken = harness.engine_row(engine).q_dtypes
    return call if DTYPES[call.dtype].name in taken else dataclasses.replace(call, dtype="bf16")


def error(got: Any, want: Any) -> float:
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def bits(x: Any) -> bytes:
    return np.asarray(x).tobytes()


def assert_right(call: RpaCall, got: tuple[Any, ...]) -> None:
    (out, cache, lse), (want_out, want_cache, want_lse) = got, expected(call, build(call))
    assert error(out, want_out) < BOUNDS[call.dtype]
    np.testing.assert_array_equal(np.asarray(out)[np.isneginf(want_lse).all(axis=1)], 0.0)
    np.testing.assert_allclose(np.asarray(lse), want_lse, atol=1e-4 if call.dtype == "f32" else 2e-2)
    np.testing.assert_array_equal(np.asarray(cache).astype(np.float32), want_cache.astype(np.float32))


# ---- Other packages --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    return dict(np.load(PARITY))


CALLS_OF_THEIRS = [pytest.param(stack, call, id=call.name) for stack, calls in THEIRS.items() for call in calls]


@pytest.mark.parametrize(("stack", "call"), CALLS_OF_THEIRS)
def test_gives_what_they_give(engine: str, theirs: dict[str, Any], stack: str, call: RpaCall) -> None:
    if adapted(call, engine) != call:
        pytest.skip(f"{engine} takes no {call.dtype}; the oracle has such calls in another dtype")
    out, cache, lse = run(OURS[stack], call, implementation=engine)
    want = theirs[f"{call.name}/out"]
    bound = BOUNDS_OF_THEIRS.get(call.name, 2 * BOUNDS[call.dtype])
    assert error(out[: len(want)], want) < bound  # tpu-inference leaves out the rows that no sequence has
    assert hashlib.sha256(bits(cache)).hexdigest() == str(theirs[f"{call.name}/cache"])
    if f"{call.name}/lse" in theirs:
        np.testing.assert_allclose(lse, theirs[f"{call.name}/lse"], atol=1e-4)
    assert_right(call, (out, cache, lse))


@pytest.mark.parametrize("stack", OURS)
def test_arguments_are_theirs(theirs: dict[str, Any], stack: str) -> None:
    mine = inspect.signature(OURS[stack]).parameters
    positional = [p.name for p in mine.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    # Both kernels of tpu-inference have one function here, and masks have no weight whatever their value is.
    differ = {"mask_value"} if stack == "tpu-inference hd64" else set()
    parameters = json.loads(str(theirs["signatures"]))[stack]
    for place, (name, kind, default) in enumerate(parameters):
        if kind != "KEYWORD_ONLY":
            assert positional[place] == name
        elif name not in differ and not default.startswith("<"):  # enums
            assert repr(mine[name].default) == default, name
    assert len([x for x in parameters if x[1] != "KEYWORD_ONLY"]) in (8, len(positional))


# ---- The oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_gives_what_the_oracle_gives(engine: str, call: RpaCall) -> None:
    call = adapted(call, engine)
    assert_right(call, run(V3, call, implementation=engine))


# ---- In place --------------------------------------------------------------------------------------------------------

# Pools that are much larger than all else.
LARGE = [
    dataclasses.replace(call, page_size=64, poisoned=False)
    for call in (
        RpaCall("large, packed", (9, 1, 0), (133, 17, 48), dtype="bf16", keywords={"sm_scale": 0.1}),
        RpaCall("large, padding heads", (9, 1), (133, 170), kv_heads=1, dtype="bf16", cache_dtype="e4m3", head_dim=80),
        RpaCall("large, pairs", (9, 1), (133, 170), head_dim=64, dtype="bf16", cache="pairs"),
        RpaCall("large, flat", (9, 1), (133, 170), dtype="bf16", cache="flat", keywords={"sm_scale": 0.1}),
        RpaCall(
            "large, chunks", (9, 1), (133, 170), cache_dtype="int8", dtype="bf16",
            keywords={"attention_chunk_size": 64},
        ),
    )
]  # fmt: skip


@pytest.mark.parametrize("call", LARGE, ids=lambda call: call.name)
def test_the_cache_is_updated_in_place(engine: str, call: RpaCall) -> None:
    """Two calls on one donated cache, of which the second has new keys that depend on the first, as in a model."""
    arrays = {name: jnp.asarray(x) for name, x in build(call).items()}
    keywords = {**call.keywords, "implementation": engine}
    kv_cache = arrays.pop("kv_cache")
    kv_cache = jnp.tile(kv_cache, (8, *[1] * (kv_cache.ndim - 1)))

    def step(kv_cache: Any, arrays: dict[str, Any]) -> Any:
        out, kv_cache = V3(**arrays, kv_cache=kv_cache, **keywords)
        keys = out[:, : call.kv_heads].astype(kv_cache.dtype)
        again, kv_cache = V3(**{**arrays, "keys": keys}, kv_cache=kv_cache, **keywords)
        return out, again, kv_cache

    assert_updates_in_place(engine, step, kv_cache, arrays)


# ---- Transformations -------------------------------------------------------------------------------------------------


def test_exported_and_loaded_again() -> None:
    call = CALLS[0]
    arrays = build(call)
    names = list(arrays)
    step = jax.jit(lambda *xs: V3(**dict(zip(names, xs, strict=True)), **call.keywords, return_lse=True))
    targets = [jax.export.DisabledSafetyCheck.custom_call(name) for name in targets_of(step, arrays)]
    exported = jax.export.export(step, disabled_checks=targets)(*arrays.values())
    got: Any = jax.export.deserialize(exported.serialize()).call(*arrays.values())
    assert_right(call, got)


def targets_of(step: Any, arrays: dict[str, Any]) -> set[str]:
    """The package's own targets that a jitted function calls."""
    text = step.lower(*arrays.values()).as_text()
    return set(re.findall(r"jax_paged_attn\.[\w.]+", text))


def test_mapped_over_calls() -> None:
    """Each copy has a cache of its own."""
    call = dataclasses.replace(CALLS[0], dtype="f32", poisoned=False)
    many = [build(dataclasses.replace(call, name=name)) for name in ("one", "two")]
    stacked = {name: np.stack([x[name] for x in many]) for name in many[0]}
    got = jax.jit(jax.vmap(lambda arrays: V3(**arrays, **call.keywords, return_lse=True)))(stacked)
    for i, arrays in enumerate(many):
        want_out, want_cache, want_lse = expected(call, arrays)
        assert error(got[0][i], want_out) < BOUNDS["f32"]
        assert bits(got[1][i]) == bits(want_cache)
        np.testing.assert_allclose(got[2][i], want_lse, atol=1e-4)


def test_gradients_are_those_of_a_write_and_attention() -> None:
    call = dataclasses.replace(CALLS[0], dtype="f32", poisoned=False)
    arrays = build(call)
    floats = {name: arrays.pop(name) for name in ("queries", "keys", "values", "kv_cache")}

    def loss(floats: dict[str, Any]) -> Any:
        out, kv_cache = V3(**floats, **arrays, **call.keywords)
        return (jnp.sin(out)).sum() + (kv_cache**2).sum()

    gradient = jax.jit(jax.grad(loss))(floats)
    rng = np.random.RandomState(0)
    direction = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in floats.items()}
    moved = [{name: x + step * direction[name] for name, x in floats.items()} for step in (1e-2, -1e-2)]
    slope = (jax.jit(loss)(moved[0]) - jax.jit(loss)(moved[1])) / 2e-2
    along = sum(float((gradient[name] * direction[name]).sum()) for name in floats)
    np.testing.assert_allclose(along, slope, rtol=2e-2)


def test_values_are_checked_on_request() -> None:
    arrays = build(CALLS[0])
    bad = arrays["page_indices"].copy()
    bad[0] = 1000
    with jpa.debug():
        for call in CALLS[0], next(call for call in CALLS if call.name == "chunks"):
            jax.block_until_ready(V3(**build(call), **call.keywords))
        with pytest.raises(ValueError, match=r"^page_indices: expected pages in \[0, 12\), got 1000 at \[0, 0\]"):
            V3(**{**arrays, "page_indices": bad}, **CALLS[0].keywords)


def test_a_cache_of_five_axes_is_seen_to_be_in_place() -> None:
    arrays = {name: jnp.asarray(x) for name, x in build(LARGE[0]).items()}
    step = jax.jit(V3, donate_argnames="kv_cache")
    jpa.check_in_place(step.lower(**arrays).compile(), arrays["kv_cache"])
    with pytest.warns(jpa.PagedAttentionWarning, match="expected results to reuse"):
        jpa.check_in_place(jax.jit(V3).lower(**arrays).compile(), arrays["kv_cache"])


def test_no_token_explain_and_cost() -> None:
    call = RpaCall("empty", (), (), dead=0, poisoned=False)
    arrays = build(call)
    out, cache, lse = run(V3, call, arrays)
    assert (out.shape, lse.shape, bits(cache)) == ((0, 4, 128), (0, 4), bits(arrays["kv_cache"]))
    arrays = build(CALLS[0])
    assert jpa.explain(V3, **arrays, platform="tpu").engine == "reference"
    assert jpa.cost_analysis(V3, **arrays).flops > 0


# ---- Errors ----------------------------------------------------------------------------------------------------------

GOOD = build(RpaCall("good", (2, 1), (5, 3), dead=0))
BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (
        V3,
        {"kv_cache": jnp.zeros((6, 4, 4, 2, 128))},
        ValueError,
        r"kv_cache: expected shape \[P, S, heads / 1, 1, H'\]",
    ),
    (V3, {"kv_cache": jnp.zeros((6, 4, 6, 1, 128))}, ValueError, r"kv_cache: expected .* for 2 key/value heads, got"),
    (V3, {"kv_cache": jnp.zeros((6, 4, 4, 1, 64))}, ValueError, "kv_cache: expected .* ≥ 128"),
    (V3, {"kv_cache": jnp.zeros((6, 4, 4))}, ValueError, "kv_cache: expected shape"),
    (V3, {"kv_cache": jnp.zeros((6, 4, 2, 2, 128), jnp.bfloat16)}, ValueError, "kv_cache: expected dtype float32 or"),
    (V3, {"kv_cache": jnp.zeros((6, 4, 1, 4, 128), jnp.int8)}, ValueError, "keys: expected dtype int8, got float32"),
    (V3, {"side_by_side": True}, ValueError, "kv_cache: expected .* 256"),
    (V3, {"keys": GOOD["keys"][:, :1]}, ValueError, "values: expected .*K = 1"),
    (V3, {"values": GOOD["values"][1:]}, ValueError, "values: expected .*T = 3"),
    (V3, {"queries": GOOD["queries"][:, :3]}, ValueError, "query heads divisible by the 2 .* of kv_cache"),
    (V3, {"page_indices": GOOD["page_indices"][1:]}, ValueError, r"page_indices: expected shape \[B·M\]"),
    (V3, {"page_indices": GOOD["page_indices"].reshape(2, -1)}, ValueError, "page_indices: expected rank 1"),
    (V3, {"cu_q_lens": GOOD["cu_q_lens"][1:]}, ValueError, r"cu_q_lens: expected .*B\+1 = 3"),
    (V3, {"distribution": np.zeros(2, np.int32)}, ValueError, "distribution: expected .*3 = 3"),
    (V3, {"attention_sink": np.zeros(3, np.float32)}, ValueError, "attention_sink: expected .*N = 4"),
    (
        V3,
        {"attention_chunk_size": 6},
        ValueError,
        "attention_chunk_size: expected a multiple of the page size, 4, got 6",
    ),
    (V3, {"soft_cap": 0.0}, ValueError, "soft_cap: "),
    (V3, {"sliding_window": 0}, ValueError, "sliding_window: "),
    (V3, {"q_scale": 0.0}, ValueError, "q_scale: "),
    (V3, {"mask_value": 0.0}, ValueError, "mask_value: "),
    (V3, {"use_causal_mask": 1}, TypeError, "use_causal_mask: "),
    (
        BATCHED,
        {"kv_layout": "SEQ_ALONG_LANE"},
        ValueError,
        "kv_layout: expected HEAD_ALONG_SUBLANE, got SEQ_ALONG_LANE",
    ),
    (BATCHED, {"attention_scope": "CACHE_ONLY"}, ValueError, "attention_scope: expected FULL, got CACHE_ONLY"),
    (BATCHED, {"cp_group_size": 2}, ValueError, "cp_group_size: expected None, got 2"),
    (BATCHED, {"scale_rule": "mine"}, ValueError, "scale_rule: "),
    (BATCHED, {"k_scale": -1.0, "scale_rule": "reference"}, ValueError, "k_scale: "),
    (BATCHED, {"implementation": "mosaic_tpu"}, ValueError, "implementation: "),
]


@pytest.mark.parametrize(("function", "changes", "kind", "text"), BAD, ids=lambda x: str(x)[:24])
def test_bad_calls_say_what_is_wrong(function: Any, changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        jax.eval_shape(lambda: function(**{**GOOD, **changes}))


def test_tuning_arguments_have_no_effect() -> None:
    sizes = (1, 2, 3, 4)
    tuning = {
        "d_block_sizes": sizes, "p_block_sizes": sizes, "m_block_sizes": sizes, "vmem_limit_bytes": 1,
        "chunk_prefill_size": 3, "skip_kv_mask": True, "debug_mode": True, "num_kv_pages_per_block": 2,
        "num_queries_per_block": 1, "disable_bounds_checks": False, "disable_semaphore_checks": False,
    }  # fmt: skip
    call = CALLS[0]
    assert list(map(bits, run(V3, call))) == list(map(bits, run(V3, call, **tuning, out_dtype=jnp.bfloat16)))
