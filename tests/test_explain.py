"""`explain` says what would run, and the same holds when it runs."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import BY_NAME, build
from harness import python

import jax_paged_attn as jpa
from jax_paged_attn import __main__, _engines, _ffi

DECODE = build(BY_NAME["decode"]).arguments()[0]
RAGGED = build(BY_NAME["mixed"]).arguments()[0]
NAMES = {engine.name for engine in _engines.ENGINES}


def specs(args: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)


def test_cpu_runs_the_cpu_engine() -> None:
    explanation = jpa.explain(jpa.paged_attention, *DECODE, platform="cpu")
    assert explanation.engine == "cpu"
    assert set(explanation.rejected) == NAMES - {"cpu"}
    assert all(explanation.rejected.values())


@pytest.mark.parametrize("form", ["arrays", "specs"])
@pytest.mark.parametrize(("function", "args"), [(jpa.paged_attention, DECODE), (jpa.ragged_paged_attention, RAGGED)])
def test_tpu_runs_the_reference(function: Any, args: Any, form: str) -> None:
    args = specs(args) if form == "specs" else args
    explanation = jpa.explain(function, *args, platform="tpu", sliding_window=3)
    assert explanation.engine == "reference"
    assert set(explanation.rejected) == NAMES - {"reference"}
    assert "cpu" in explanation.rejected["cpu"]
    assert "tpu" in explanation.rejected["cpu"]


def test_default_platform_and_device_agree() -> None:
    device = jax.devices()[0]
    plain = jpa.explain(jpa.paged_attention, *DECODE)
    named = jpa.explain(jpa.paged_attention, *DECODE, platform=device.platform)
    on_device = jpa.explain(jpa.paged_attention, *DECODE, device=device)
    assert plain == named == on_device
    with pytest.raises(ValueError, match="platform"):
        jpa.explain(jpa.paged_attention, *DECODE, platform="cpu", device=device)


def test_named_implementation_is_obeyed() -> None:
    explanation = jpa.explain(jpa.paged_attention, *DECODE, platform="cpu", implementation="reference")
    assert explanation.engine == "reference"
    assert "reference" in explanation.rejected["cpu"]
    with pytest.raises(ValueError, match=r"^implementation.*'cpu'"):
        jpa.explain(jpa.paged_attention, *DECODE, platform="tpu", implementation="cpu")


def test_a_debug_log_says_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="jax_paged_attn"):
        jax.jit(lambda *args: jpa.paged_attention(*args, implementation="reference")).lower(*DECODE)
    (record,) = [r for r in caplog.records if r.name == "jax_paged_attn"]
    assert ": reference (rejected: {'cpu': " in record.getMessage()


def test_calls_inside_a_users_function_are_found() -> None:
    q, k_pages, v_pages, tables, lengths = DECODE

    @jax.jit
    def model(q: Any, layers: Any, name: str | None = None) -> Any:
        def layer(q: Any, pools: Any) -> Any:
            k_pages, v_pages = pools
            return jax.checkpoint(lambda q: jpa.paged_attention(q, k_pages, v_pages, tables, lengths))(q), None

        q, _ = jax.lax.scan(layer, q, layers)
        return jax.lax.cond(q.sum() > 0, lambda: q, lambda: jpa.paged_attention(q, k_pages, v_pages, tables, lengths))

    layers = tuple(jnp.stack([x, x]) for x in (k_pages, v_pages))
    explanation = jpa.explain(model, q, layers, platform="cpu")
    assert explanation.engine == "cpu"
    assert [call.engine for call in explanation.calls] == ["cpu", "cpu"]


def test_several_engines_are_all_named() -> None:
    def two(q: Any) -> Any:
        first: Any = jpa.paged_attention(q, *DECODE[1:], implementation="reference")
        return jpa.paged_attention(first, *DECODE[1:])

    explanation = jpa.explain(two, DECODE[0], platform="cpu")
    assert explanation.engine == "reference, cpu"
    assert "cpu" not in explanation.rejected


def test_function_without_attention_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^fn: "):
        jpa.explain(lambda x: x + 1, 1.0)


WITHOUT_MODULES = """
import sys
sys.modules["jax_paged_attn._cpu"] = None  # importing it raises ModuleNotFoundError, as where it was never built
import jax, harness, jax_paged_attn as jpa
from cases import BY_NAME, build
case = BY_NAME["decode"]
(q, k_pages, v_pages, tables, lengths), _ = build(case).arguments()
harness.assert_close(harness.run(case), harness.expected(case), case.dtype)

def step(q):
    pools = jpa.write_kv_pages(k_pages, v_pages, q[:, :2], q[:, :2], lengths)
    return jpa.paged_attention(q, *pools, tables, lengths).sum()

jax.block_until_ready(jax.jit(jax.value_and_grad(step))(q))
explanation = jpa.explain(step, q, platform="cpu")
print(explanation.engine)
print(explanation.rejected["cpu"])
"""


def test_package_works_without_compiled_modules() -> None:
    engine, reason = python(WITHOUT_MODULES)
    assert engine == "reference"
    assert "built without jax_paged_attn._cpu" in reason


# ---- The table, as it is where the CUDA module is installed ----------------------------------------------------------


def call_of(dtype: Any = jnp.bfloat16, head_dim: int = 128, page_dtype: Any = None) -> tuple[Any, ...]:
    """Specs of a decode call of such queries and pages."""
    spec = jax.ShapeDtypeStruct
    pages = spec((9, 16, 2, head_dim), page_dtype or dtype)
    return spec((3, 10, head_dim), dtype), pages, pages, spec((3, 4), jnp.int32), spec((3,), jnp.int32)


INT8 = {"page_dtype": jnp.int8}
CHOICES: list[tuple[dict[str, Any], bool, str]] = [
    ({}, False, "fused"),
    ({}, True, "fused"),
    ({"dtype": jnp.float16, "head_dim": 80, **INT8}, False, "fused"),
    ({"page_dtype": jnp.float8_e5m2, "head_dim": 256}, True, "fused"),
    ({"dtype": jnp.float32}, False, "cublaslt"),
    ({"head_dim": 72}, False, "cublaslt"),
    ({"head_dim": 512}, False, "fused"),
    ({"head_dim": 512, "dtype": jnp.float16}, True, "fused"),
    ({"head_dim": 512, **INT8}, False, "cublaslt"),
]


@pytest.mark.parametrize(("call", "batch_invariant", "chosen"), CHOICES)
def test_cuda_runs_fused_where_its_table_says_so(
    monkeypatch: pytest.MonkeyPatch, call: dict[str, Any], batch_invariant: bool, chosen: str
) -> None:
    monkeypatch.setitem(_ffi._loaded, "cuda", ModuleType("stand-in"))
    scales = dict.fromkeys(("k_scale", "v_scale"), 0.1)
    explanation = jpa.explain(
        jpa.paged_attention, *call_of(**call), platform="cuda", batch_invariant=batch_invariant, **scales
    )
    assert explanation.engine == chosen
    assert set(explanation.rejected) == NAMES - {chosen}
    if chosen == "cublaslt":
        assert "expected" in explanation.rejected["fused"]
        assert "got" in explanation.rejected["fused"]


@pytest.mark.parametrize("page_dtype", [None, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8], ids=str)
@pytest.mark.parametrize(("value_dim", "chosen"), [(512, "fused"), (256, "cublaslt")])
def test_cuda_runs_fused_on_mla_over_16_bit_and_8_bit_pages(
    monkeypatch: pytest.MonkeyPatch, page_dtype: Any, value_dim: int, chosen: str
) -> None:
    monkeypatch.setitem(_ffi._loaded, "cuda", ModuleType("stand-in"))
    q, pages, _, tables, lengths = call_of(head_dim=576, page_dtype=page_dtype)
    attend = functools.partial(jpa.paged_attention, v_pages=None, value_dim=value_dim, k_scale=0.1)
    explanation = jpa.explain(attend, q, pages, block_tables=tables, lengths=lengths, platform="cuda")
    assert explanation.engine == chosen


@pytest.mark.parametrize("own_pool", [True, False])
def test_head_dim_512_needs_hopper(monkeypatch: pytest.MonkeyPatch, own_pool: bool) -> None:
    monkeypatch.setitem(_ffi._loaded, "cuda", ModuleType("stand-in"))
    q, k_pages, v_pages, tables, lengths = call_of(head_dim=512)
    args = (q, k_pages, v_pages if own_pool else None, tables, lengths)
    value_dim = None if own_pool else 512
    for capability, chosen in ((None, "fused"), ("9.0", "fused"), ("8.0", "cublaslt"), ("10.0", "cublaslt")):
        monkeypatch.setattr(_ffi, "compute_capability", lambda found=capability: found)
        explanation = jpa.explain(jpa.paged_attention, *args, platform="cuda", value_dim=value_dim)
        assert explanation.engine == chosen
        if chosen == "cublaslt":
            reason = f"runs a head dim of 512 on compute capability 9.0, not on {capability}"
            assert explanation.rejected["fused"] == reason


def test_no_engine_that_promises_batch_invariance_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_ffi._loaded, "cuda", ModuleType("stand-in"))
    for platform, dtype in (("cuda", jnp.float32), ("tpu", jnp.bfloat16)):
        with pytest.raises(ValueError, match=r"^batch_invariant: expected an engine that guarantees it .* none runs"):
            jpa.explain(jpa.paged_attention, *call_of(dtype), platform=platform, batch_invariant=True)
    traced = jax.jit(functools.partial(jpa.paged_attention, batch_invariant=True)).trace(*call_of())
    with pytest.raises(ValueError, match=r"^batch_invariant: .*runs on cpu, not on tpu"):
        traced.lower(lowering_platforms=("tpu",))


def test_an_explanation_prints_what_each_engine_takes() -> None:
    text = str(jpa.explain(jpa.paged_attention, *call_of(), platform="tpu"))
    assert text.splitlines()[0] == "reference"
    assert "takes q bfloat16, float16; pages as q, float8_e4m3fn, float8_e5m2, int8; head dims 64, 80, 96" in text
    lines = __main__.report().splitlines()
    for engine in _engines.ENGINES:
        assert sum(str(engine) in line for line in lines) >= 1
        assert any(line.split()[:1] == [engine.name] for line in lines)


def test_engine_that_the_platform_lacks_raises_at_lowering() -> None:
    traced = jax.jit(lambda *args: jpa.paged_attention(*args, implementation="cpu")).trace(*DECODE)
    with pytest.raises(ValueError, match=r"^implementation: 'cpu' .*tpu"):
        traced.lower(lowering_platforms=("tpu",))
