"""The MLA call of tpu-inference and tokamax: what these give, a float64 oracle, in place, transformations, errors."""

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
from mla_calls import CALLS, THEIRS, MlaCall, build, expected
from rpa_calls import DTYPES
from test_compat import assert_updates_in_place

import jax_paged_attn as jpa
from jax_paged_attn import _engines, _options, compat

PARITY = Path(__file__).parent / "parity" / "mla.npz"
MLA: Any = compat.mla_ragged_paged_attention
# Relative errors of outputs, by the queries' dtype.
BOUNDS = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2, "e4m3": 4e-2}
# Their plain functions round probabilities to the dtype of the values.
BOUNDS_OF_THEIRS = {"e4m3 with scales": 6e-2, "tokamax e4m3": 6e-2, "bf16, sizes of DeepSeek": 2e-2}


def run(call: MlaCall, arrays: dict[str, Any] | None = None, **keywords: Any) -> tuple[Any, ...]:
    """`(out, cache, lse)` of a call in `jit`, with tokens as the first axis of the output."""
    static = {**call.keywords, **keywords, "return_lse": True}
    out, cache, lse = jax.jit(lambda arrays: MLA(**arrays, **static))(given(call, arrays))
    return out.swapaxes(0, 1) if static.get("heads_first", True) else out, cache, lse


def given(call: MlaCall, arrays: dict[str, Any] | None = None) -> dict[str, Any]:
    """The arrays as the call takes them."""
    arrays = build(call) if arrays is None else arrays
    return {**arrays, "ql_nope": arrays["ql_nope"].swapaxes(0, 1)} if call.keywords.get("heads_first", True) else arrays


def adapted(call: MlaCall, engine: str) -> MlaCall:
    """The call with dtypes and sizes that the engine takes."""
    row = harness.engine_row(engine)
    if DTYPES[call.dtype].name not in (*row.q_dtypes, "float8_e4m3fn"):
        call = dataclasses.replace(call, dtype="bf16")
    if row.head_dims is None:
        return call
    call = dataclasses.replace(
        call, dtype="bf16" if call.dtype == "e4m3" else call.dtype, latent_dim=512, rotary_dim=64
    )
    pack = call.pack or 4 // DTYPES[call.cache_dtype or call.dtype].itemsize
    return dataclasses.replace(call, page_size=-(-call.page_size // pack) * pack)


def error(got: Any, want: Any) -> float:
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def bits(x: Any) -> bytes:
    return np.asarray(x).tobytes()


def assert_right(call: MlaCall, got: tuple[Any, ...]) -> None:
    (out, cache, lse), (want_out, want_cache, want_lse) = got, expected(call, build(call))
    assert out.dtype == DTYPES[call.dtype]
    assert error(out, want_out) < BOUNDS[call.dtype]
    np.testing.assert_array_equal(np.asarray(out).astype(np.float32)[np.isneginf(want_lse).all(axis=1)], 0.0)
    np.testing.assert_allclose(np.asarray(lse), want_lse, atol=1e-4 if call.dtype == "f32" else 2e-2)
    np.testing.assert_array_equal(np.asarray(cache).astype(np.float32), want_cache.astype(np.float32))


# ---- Other packages --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    return dict(np.load(PARITY))


ALL_OF_THEM = [call for calls in THEIRS.values() for call in calls]


@pytest.mark.engines(that=lambda row: row.head_dims is None)
@pytest.mark.parametrize("call", ALL_OF_THEM, ids=lambda call: call.name)
def test_gives_what_they_give(engine: str, theirs: dict[str, Any], call: MlaCall) -> None:
    assert_theirs(engine, theirs, call)


@pytest.mark.engines(that=lambda row: row.head_dims is not None)
@pytest.mark.parametrize("call", [c for c in ALL_OF_THEM if c.latent_dim == 512], ids=lambda call: call.name)
def test_gives_what_they_give_in_the_sizes_of_deepseek(engine: str, theirs: dict[str, Any], call: MlaCall) -> None:
    assert adapted(call, engine) == call
    assert_theirs(engine, theirs, call)


def assert_theirs(engine: str, theirs: dict[str, Any], call: MlaCall) -> None:
    out, cache, lse = run(call, implementation=engine)
    assert error(out, theirs[f"{call.name}/out"]) < BOUNDS_OF_THEIRS.get(call.name, 2 * BOUNDS[call.dtype])
    assert hashlib.sha256(bits(cache)).hexdigest() == str(theirs[f"{call.name}/cache"])
    assert_right(call, (out, cache, lse))


@pytest.mark.parametrize("stack", ["tpu-inference", "tpu-inference v1", "tokamax"])
def test_arguments_are_theirs(theirs: dict[str, Any], stack: str) -> None:
    mine = inspect.signature(MLA).parameters
    positional = [p.name for p in mine.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    # Masked keys have no weight whatever that number is.
    differ = {"mask_value"} if stack == "tpu-inference v1" else set()
    parameters = json.loads(str(theirs["signatures"]))[stack]
    assert [name for name, kind, _ in parameters if kind != "KEYWORD_ONLY"] == positional
    for name, kind, default in parameters:
        if kind == "KEYWORD_ONLY" and name not in differ:
            assert repr(mine[name].default) == default, name


# ---- The oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_gives_what_the_oracle_gives(engine: str, call: MlaCall) -> None:
    call = adapted(call, engine)
    assert_right(call, run(call, implementation=engine))


def test_padding_columns_may_hold_anything(compiled_engine: str) -> None:
    """Those behind the rotated part of each key. "cublaslt" multiplies them by zeros: so they are finite there."""
    call = adapted(dataclasses.replace(CALLS[0], latent_dim=512, rotary_dim=64), compiled_engine)
    arrays = build(call)
    arrays["cache_kv"][..., 576:] = 7.0 if compiled_engine == "cublaslt" else np.nan
    out, _, lse = run(call, arrays, implementation=compiled_engine)
    want, _, want_lse = run(call, implementation=compiled_engine)
    assert (bits(out), bits(lse)) == (bits(want), bits(want_lse))


def test_the_engine_for_it_passes_over_padding() -> None:
    """On Hopper "fused" reads 576 of 640 numbers; of other head dims it takes no padded keys."""
    fused = next(engine for engine in _engines.ENGINES if engine.name == "fused")
    scoring = _options.Scoring.checked(dict.fromkeys(("scale", "sliding_window", "soft_cap")), 576)
    call = _engines.Call(
        num_heads=16, kv_heads=1, head_dim=576, value_dim=512, page_size=64, q_dtype="bfloat16",
        page_dtype="bfloat16", scoring=scoring, decode=False, batch_invariant=False,
        values_in_keys=True, padded_keys=True,
    )  # fmt: skip
    assert fused.unsupported(call) is None
    other = dataclasses.replace(call, head_dim=128, value_dim=128)
    assert fused.unsupported(dataclasses.replace(other, padded_keys=False)) is None
    assert fused.unsupported(other) == "expected keys without padding unless of 576 with values of 512 or 512, got some"


# ---- In place --------------------------------------------------------------------------------------------------------

# Pools that are much larger than all else.
LARGE = [
    dataclasses.replace(call, page_size=64, poisoned=False, latent_dim=512, rotary_dim=64)
    for call in (
        MlaCall("large", (9, 1, 0), (133, 17, 48), dtype="bf16", keywords={"sm_scale": 0.1}),
        MlaCall("large, e4m3", (9, 1), (133, 170), dtype="bf16", cache_dtype="e4m3", keywords={"sm_scale": 0.1}),
        MlaCall("large, f32", (9, 1), (133, 170), keywords={"sm_scale": 0.1}),
    )
]


@pytest.mark.parametrize("call", LARGE, ids=lambda call: call.name)
def test_the_cache_is_updated_in_place(engine: str, call: MlaCall) -> None:
    """Two calls on one donated cache, of which the second has new latents that depend on the first, as in a model."""
    call = adapted(call, engine)
    arrays = {name: jnp.asarray(x) for name, x in given(call).items()}
    keywords = {**call.keywords, "implementation": engine}
    cache_kv = jnp.tile(arrays.pop("cache_kv"), (8, 1, 1, 1))

    def step(cache_kv: Any, arrays: dict[str, Any]) -> Any:
        out, cache_kv = MLA(**arrays, cache_kv=cache_kv, **keywords)
        again, cache_kv = MLA(**{**arrays, "new_kv_c": out[0].astype(cache_kv.dtype)}, cache_kv=cache_kv, **keywords)
        return out, again, cache_kv

    assert_updates_in_place(engine, step, cache_kv, arrays)


# ---- Transformations -------------------------------------------------------------------------------------------------


def test_exported_and_loaded_again() -> None:
    call = dataclasses.replace(CALLS[0], keywords={"sm_scale": 0.1, "heads_first": False})
    arrays = build(call)
    names = list(arrays)
    step = jax.jit(lambda *xs: MLA(**dict(zip(names, xs, strict=True)), **call.keywords, return_lse=True))
    targets = set(re.findall(r"jax_paged_attn\.[\w.]+", step.lower(*arrays.values()).as_text()))
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in targets]
    exported = jax.export.export(step, disabled_checks=allowed)(*arrays.values())
    got: Any = jax.export.deserialize(exported.serialize()).call(*arrays.values())
    assert_right(call, got)


def test_mapped_over_calls() -> None:
    """Each copy has a cache of its own."""
    call = dataclasses.replace(CALLS[0], dtype="f32", poisoned=False, keywords={"sm_scale": 0.1, "heads_first": False})
    many = [build(dataclasses.replace(call, name=name)) for name in ("one", "two")]
    stacked = {name: np.stack([x[name] for x in many]) for name in many[0]}
    got = jax.jit(jax.vmap(lambda arrays: MLA(**arrays, **call.keywords, return_lse=True)))(stacked)
    for i, arrays in enumerate(many):
        want_out, want_cache, want_lse = expected(call, arrays)
        assert error(got[0][i], want_out) < BOUNDS["f32"]
        assert bits(got[1][i]) == bits(want_cache)
        np.testing.assert_allclose(got[2][i], want_lse, atol=1e-4)


def test_gradients_are_those_of_a_write_and_attention() -> None:
    """Forwards and backwards; padding columns have none."""
    call = dataclasses.replace(CALLS[0], dtype="f32", poisoned=False)
    arrays = given(call)
    floats = {name: arrays.pop(name) for name in ("ql_nope", "q_pe", "new_kv_c", "new_k_pe", "cache_kv")}

    def loss(floats: dict[str, Any]) -> Any:
        out, _ = MLA(**floats, **arrays, **call.keywords)
        return jnp.sin(out).sum()

    gradient = jax.jit(jax.grad(loss))(floats)
    np.testing.assert_array_equal(gradient["cache_kv"][..., 128 + call.rotary_dim :], 0.0)
    rng = np.random.RandomState(0)
    direction = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in floats.items()}
    moved = [{name: x + step * direction[name] for name, x in floats.items()} for step in (1e-2, -1e-2)]
    slope = (jax.jit(loss)(moved[0]) - jax.jit(loss)(moved[1])) / 2e-2
    along = sum(float((gradient[name] * direction[name]).sum()) for name in floats)
    np.testing.assert_allclose(along, slope, rtol=2e-2)
    _, forwards = jax.jit(lambda floats, direction: jax.jvp(loss, (floats,), (direction,)))(floats, direction)
    np.testing.assert_allclose(forwards, along, rtol=1e-4)


def test_values_are_checked_on_request() -> None:
    call = CALLS[0]
    arrays = given(call)
    bad = arrays["page_indices"].copy()
    bad[0] = 1000
    arrays["cache_kv"][..., 128 + call.rotary_dim :] = np.nan  # which no row sees
    with jpa.debug():
        jax.block_until_ready(MLA(**arrays, **call.keywords))
        with pytest.raises(ValueError, match=r"^page_indices: expected pages in \[0, \d+\), got 1000 at \[0, 0\]"):
            MLA(**{**arrays, "page_indices": bad}, **call.keywords)


def test_no_token_explain_and_cost() -> None:
    call = MlaCall("empty", (), (), dead=0, poisoned=False)
    arrays = build(call)
    out, cache, lse = run(call, arrays)
    assert (out.shape, lse.shape, bits(cache)) == ((0, 4, 40), (0, 4), bits(arrays["cache_kv"]))
    arrays = given(CALLS[0])
    assert jpa.explain(MLA, **arrays, platform="tpu").engine == "reference"
    assert jpa.cost_analysis(MLA, **arrays).flops > 0


# ---- Errors ----------------------------------------------------------------------------------------------------------

GOOD = given(MlaCall("good", (2, 1), (5, 3), dead=0))
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cache_kv": jnp.zeros((6, 4, 2, 256))[..., :200]}, ValueError, r"cache_kv: expected .* 256\] for 40 and 24"),
    ({"cache_kv": jnp.zeros((6, 2, 3, 256), jnp.bfloat16)}, ValueError, "cache_kv: expected dtype float32 or"),
    ({"cache_kv": jnp.zeros((6, 4, 256))}, ValueError, r"cache_kv: expected shape \[P, S / 1, 1, 256\]"),
    ({"cache_kv": jnp.zeros((6, 4, 3, 256), jnp.float8_e5m2)}, ValueError, "new_kv_c: expected dtype float8_e5m2"),
    ({"cache_kv": jnp.zeros((6, 4, 3, 256), jnp.int8)}, ValueError, "cache_kv: expected dtype float32 or"),
    ({"cache_kv": jnp.zeros((6, 0, 1, 256))}, ValueError, "cache_kv: expected shape"),
    ({"new_kv_c": GOOD["new_kv_c"][:, :39]}, ValueError, "new_kv_c: expected .*L = 40"),
    ({"new_k_pe": GOOD["new_k_pe"][1:]}, ValueError, "new_k_pe: expected .*T = 3"),
    ({"q_pe": GOOD["q_pe"].astype(np.float16)}, ValueError, "q_pe: expected dtype float32, got float16"),
    ({"heads_first": False}, ValueError, "q_pe: expected .*T = 4"),
    ({"ql_nope": GOOD["ql_nope"].astype(jnp.float8_e4m3fn)}, ValueError, "ql_nope: expected dtype float32 or"),
    ({"page_indices": GOOD["page_indices"][1:]}, ValueError, r"page_indices: expected shape \[B·M\]"),
    ({"cu_q_lens": GOOD["cu_q_lens"][1:]}, ValueError, r"cu_q_lens: expected .*B\+1 = 3"),
    ({"distribution": np.zeros(2, np.int32)}, ValueError, "distribution: expected .*3 = 3"),
    ({"transpose_kv_cache": True}, ValueError, "transpose_kv_cache: expected False"),
    ({"k_scale": 0.0}, ValueError, "k_scale: "),
    ({"q_scale": jnp.ones(2)}, TypeError, "q_scale: "),
    ({"soft_cap": 0.0}, ValueError, "soft_cap: "),
    ({"sliding_window": 0}, ValueError, "sliding_window: "),
    ({"mask_value": 0.0}, ValueError, "mask_value: "),
    ({"num_kv_pages_per_block": (1, 0, 1)}, ValueError, "num_kv_pages_per_block: "),
    ({"mixed_q_split": 0}, ValueError, "mixed_q_split: "),
    ({"heads_first": 1}, TypeError, "heads_first: "),
    ({"implementation": "mosaic_tpu"}, ValueError, "implementation: "),
]


@pytest.mark.parametrize(("changes", "kind", "text"), BAD, ids=lambda x: str(x)[:24])
def test_bad_calls_say_what_is_wrong(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        jax.eval_shape(lambda: MLA(**{**GOOD, **changes}))


def test_tuning_arguments_have_no_effect() -> None:
    tuning = {
        "num_kv_pages_per_block": (1, 2, 3), "num_queries_per_block": 1, "vmem_limit_bytes": 1, "debug_mode": True,
        "chunk_prefill_size": 3, "decode_batch_size": 2, "mixed_q_split": 2, "s_dtype": jnp.float32,
        "two_step_flash_attention": False, "p_same_dtype_as_v": False, "mask_value": compat.DEFAULT_MASK_VALUE,
    }  # fmt: skip
    assert list(map(bits, run(CALLS[0]))) == list(map(bits, run(CALLS[0], **tuning)))
