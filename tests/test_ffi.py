"""The compiled modules and their FFI targets: malformed calls, sizes, bits of conversions, the choice of kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from harness import python

from jax_paged_attn import _ffi

pytestmark = pytest.mark.skipif(not _ffi.has("cpu"), reason="built without the CPU engine")


def test_workspace_formula_is_the_compiled_one() -> None:
    compiled = _ffi.compiled("cpu").attention_workspace_bytes
    for seqs in (0, 1, 2, 7, 64, 100_000):
        for heads in (1, 5, 32, 128):
            for dim in (1, 40, 64, 128, 576):
                assert _ffi.attention_workspace_bytes(seqs, heads, dim) == compiled(seqs, heads, dim)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_operands_and_attributes_are_those_of_the_compiled_targets(platform: str) -> None:
    if not _ffi.has(platform):
        pytest.skip(_ffi.missing(platform) or "")
    import malformed

    targets = _ffi.compiled(platform).targets()
    attention = {
        "split": _ffi.ATTENTION_TARGET,
        "head_major": _ffi.ATTENTION_LAYOUT_TARGET,
        "padded": _ffi.ATTENTION_TOKENS_TARGET,
        "values_in_keys": _ffi.ATTENTION_VALUES_TARGET,
    }
    writes = {
        "split": _ffi.WRITE_TARGET,
        "interleaved": _ffi.WRITE_LAYOUT_TARGET,
        "values_in_keys": _ffi.WRITE_VALUES_TARGET,
    }
    cumulative = {_ffi.ATTENTION_CUMULATIVE_TARGET} if platform == "cuda" else set[str]()
    assert set(targets) == {*attention.values(), *cumulative, *writes.values()}
    for target in cumulative:
        call = malformed.attention("fused", cumulative=True)
        assert call.target == target
        assert targets[target]["operands"] == [*malformed.CUMULATIVE_OPERANDS, *malformed.TOKEN_SCALES]
        assert set(targets[target]["attributes"]) == set(call.attributes)
    engine = {"cpu": "cpu", "cuda": "fused"}[platform]
    for layout, target in attention.items():
        call = malformed.attention(engine, layout=layout)
        assert call.target == target
        fields = list(_ffi.AttentionOperands._fields)
        assert targets[target]["operands"] == (fields if layout in ("padded", "values_in_keys") else fields[:-2])
        assert targets[target]["results"] == list(malformed.ATTENTION_RESULTS)
        assert set(targets[target]["attributes"]) == set(call.attributes)
    for layout, target in writes.items():
        call = malformed.write(layout)
        assert call.target == target
        assert targets[target]["operands"] == list(_ffi.WriteOperands._fields)
        assert [name.removesuffix(" (result)") for name in targets[target]["results"]] == list(malformed.WRITE_RESULTS)
        assert targets[target]["attributes"] == list(call.attributes)


def test_malformed_attention_is_an_error_that_names_the_argument(compiled_engine: str) -> None:
    assert_errors(compiled_engine, 200)


def test_malformed_write_is_an_error_that_names_the_argument() -> None:
    assert_errors("write", 150)


def assert_errors(what: str, calls: int) -> None:
    """Every malformed call is the error that it should be, and the process lives to make a good one after all that."""
    *failures, tried = python("import sys, malformed; malformed.main(sys.argv[1])", what)
    assert failures == []
    assert int(tried) >= calls


def _all_f16_bits() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_written_bits_are_those_of_ml_dtypes(source: str, target: str, scale: float | None) -> None:
    rng = np.random.default_rng(0)
    if source == "float16":
        values = _all_f16_bits()
    elif source == "bfloat16":
        values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    else:  # random bits; every f16 value and the floats beside it, which hold all midpoints of the 8-bit types
        near = _all_f16_bits().astype(np.float32)
        near = near[np.isfinite(near)]
        values = np.concatenate(
            [
                rng.integers(0, 1 << 32, 40_000, dtype=np.uint32).view(np.float32),
                near,
                np.nextafter(near, np.float32(np.inf)),
                np.nextafter(near, np.float32(-np.inf)),
            ]
        )
    dim = 64
    values = values[: len(values) // dim * dim].reshape(-1, 1, dim)
    pool = jnp.zeros((1, len(values), 1, dim), target)
    factor = jnp.zeros((0, 1)) if scale is None else jnp.full((1, 1), scale, jnp.float32)
    slots = jnp.arange(len(values), dtype=jnp.int32)
    k_pages, v_pages = _ffi.write(pool, pool, jnp.asarray(values), jnp.asarray(values[::-1]), slots, factor, factor)

    for pages, written in ((k_pages, values), (v_pages, values[::-1])):
        expected = _quantize(written.astype(np.float32), None if scale is None else np.float32(scale), target)
        got = np.asarray(pages).reshape(expected.shape)
        is_nan = np.isnan(expected.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), is_nan)
        bits = np.dtype(f"u{expected.itemsize}")
        # A quotient that is subnormal in f32 is flushed to zero on XLA's threads.
        tiny = np.abs(written.astype(np.float32)) < (2.0**-120 if scale is not None else 0.0)
        differ = (got.view(bits) != expected.view(bits)) & ~is_nan & ~tiny
        assert not differ.any(), (written[differ][:5], got[differ][:5], expected[differ][:5])


@np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore")
def _quantize(values: np.ndarray, scale: np.float32 | None, target: str) -> np.ndarray:
    dtype = jnp.dtype(target)
    if scale is not None:
        values = values / scale
    if target == "int8":
        return np.nan_to_num(np.clip(np.rint(values), -127, 127), nan=0.0).astype(np.int8)
    if dtype.itemsize == 1:
        bound = float(ml_dtypes.finfo(dtype).max)
        values = np.clip(values, -bound, bound)
    return values.astype(dtype)


@pytest.mark.parametrize("isa", _ffi.compiled("cpu").available_isas() if _ffi.has("cpu") else [])
def test_environment_chooses_the_kernels(isa: str) -> None:
    assert _isa_in_new_process(isa) == isa


def test_environment_with_an_unknown_set_is_an_error() -> None:
    assert "JPA_CPU_ISA: expected one of" in _isa_in_new_process("mmx")


def _isa_in_new_process(name: str) -> str:
    script = """
from jax_paged_attn import _ffi
try:
    print(_ffi.compiled("cpu").isa())
except RuntimeError as error:
    print(error)
"""
    environment = {**os.environ, "JPA_CPU_ISA": name}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return result.stdout.strip()
