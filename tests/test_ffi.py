"""The compiled modules and their FFI targets: malformed calls, sizes, bits of conversions, the choice of kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array

from jax_paged_attn import _ffi

pytestmark = pytest.mark.skipif(not _ffi.has("cpu"), reason="built without the CPU engine")

# T, N, H, P, S, K, B, M of the calls that the tests of malformed calls start from.
_ROWS, _HEADS, _DIM, _PAGES, _PAGE_SIZE, _KV_HEADS, _SEQS, _TABLE = 5, 4, 8, 6, 2, 2, 2, 3
_STATIC = {"scale": 1.0, "soft_cap": 0.0, "sliding_window": 0, "causal": True}


def _attention_operands() -> dict[str, Array]:
    pool = (_PAGES, _PAGE_SIZE, _KV_HEADS, _DIM)
    return {
        "q": jnp.ones((_ROWS, _HEADS, _DIM)),
        "k_pages": jnp.ones(pool),
        "v_pages": jnp.ones(pool),
        "block_tables": jnp.arange(_SEQS * _TABLE, dtype=jnp.int32).reshape(_SEQS, _TABLE),
        "kv_lens": jnp.array([6, 3], jnp.int32),
        "q_starts": jnp.array([0, 4], jnp.int32),
        "q_counts": jnp.array([4, 1], jnp.int32),
        "sinks": jnp.zeros((0, _HEADS)),
        "k_scale": jnp.zeros((0, _KV_HEADS)),
        "v_scale": jnp.zeros((0, _KV_HEADS)),
    }


def _write_operands() -> dict[str, Array]:
    pool = (_PAGES, _PAGE_SIZE, _KV_HEADS, _DIM)
    return {
        "k_pages": jnp.zeros(pool),
        "v_pages": jnp.zeros(pool),
        "k": jnp.ones((_ROWS, _KV_HEADS, _DIM)),
        "v": jnp.ones((_ROWS, _KV_HEADS, _DIM)),
        "slot_mapping": jnp.arange(_ROWS, dtype=jnp.int32),
        "k_scale": jnp.zeros((0, _KV_HEADS)),
        "v_scale": jnp.zeros((0, _KV_HEADS)),
    }


def test_workspace_formula_is_the_compiled_one() -> None:
    compiled = _ffi.compiled("cpu").attention_workspace_bytes
    for seqs in (0, 1, 2, 7, 64, 100_000):
        for heads in (1, 5, 32, 128):
            for dim in (1, 40, 64, 128, 576):
                assert _ffi.attention_workspace_bytes(seqs, heads, dim) == compiled(seqs, heads, dim)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda x: x[0]),
        ("q", lambda x: x[:, :3]),
        ("q", lambda x: x.astype(jnp.int32)),
        ("k_pages", lambda x: x[..., 0]),
        ("k_pages", lambda x: x.astype(jnp.bfloat16)),
        ("k_pages", lambda x: x.astype(jnp.int32)),
        ("v_pages", lambda x: x[:, :1]),
        ("v_pages", lambda x: x.astype(jnp.float16)),
        ("block_tables", lambda x: x.reshape(-1)),
        ("block_tables", lambda x: x.astype(jnp.float32)),
        ("kv_lens", lambda x: x[:1]),
        ("q_starts", lambda x: x.astype(jnp.uint32)),
        ("q_counts", lambda x: x[:, None]),
        ("sinks", lambda x: jnp.zeros((3, _HEADS))),
        ("k_scale", lambda x: jnp.zeros((1, _HEADS))),
        ("v_scale", lambda x: jnp.zeros((1, _KV_HEADS), jnp.bfloat16)),
    ],
)
def test_malformed_attention_is_an_error_that_names_the_argument(name: str, change: Callable[[Array], Array]) -> None:
    operands = _attention_operands()
    operands[name] = change(operands[name])
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match=rf"\b({name}|k_pages|v_pages): expected .*, got"
    ):
        _raw_attention(operands, _STATIC)


@pytest.mark.parametrize(
    ("name", "value"), [("scale", float("inf")), ("soft_cap", -1.0), ("soft_cap", float("nan")), ("sliding_window", -1)]
)
def test_bad_attribute_is_an_error_that_names_it(name: str, value: float) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"\b{name}: expected .*, got"):
        _raw_attention(_attention_operands(), {**_STATIC, name: value})


def test_wrong_results_are_errors() -> None:
    operands = _attention_operands()
    results = [((_ROWS, _HEADS, _DIM), jnp.float32), ((_ROWS, _HEADS), jnp.float32), (None, jnp.uint8)]
    for i, name in enumerate(("out", "lse", "workspace")):
        changed = [(shape, jnp.int32 if i == j else dtype) for j, (shape, dtype) in enumerate(results)]
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"\b{name}: expected .*, got int32"):
            _raw_attention(operands, _STATIC, changed)


@pytest.mark.parametrize(
    ("layout", "pool", "expected"),
    [
        ("interleaved", (_PAGES, _PAGE_SIZE, 3, _DIM), r"k_pages: expected shape \[P, S, 2K, H\], got"),
        ("interleaved", (_PAGES, _PAGE_SIZE, 6, _DIM), r"q: expected N a positive multiple of K = 3, got"),
        ("interleaved", (_PAGES, _PAGE_SIZE, 2 * _KV_HEADS, _DIM + 1), r"k_pages: expected the head dimension of q"),
        ("head_major", (_PAGE_SIZE, _KV_HEADS, _DIM), r"k_pages: expected shape \[K, P, S, H\], got"),
        ("head_major", (3, _PAGES, _PAGE_SIZE, _DIM), r"q: expected N a positive multiple of K = 3, got"),
        ("head_major", (_KV_HEADS, _PAGES, 0, _DIM), r"k_pages: expected at least 1 in dimensions S, K and H, got"),
        ("transposed", (_PAGES, _PAGE_SIZE, _KV_HEADS, _DIM), r"layout: expected split, .*, got transposed"),
    ],
)
def test_malformed_layouts_are_errors(layout: str, pool: tuple[int, ...], expected: str) -> None:
    operands = {**_attention_operands(), "k_pages": jnp.ones(pool), "v_pages": jnp.ones(pool)}
    with pytest.raises(jax.errors.JaxRuntimeError, match=expected):
        _raw_attention(operands, _STATIC, layout=layout)


def test_pools_of_a_layout_must_agree() -> None:
    for layout, pool, other in (
        ("interleaved", (_PAGES, _PAGE_SIZE, 2 * _KV_HEADS, _DIM), (_PAGES, _PAGE_SIZE, _KV_HEADS, _DIM)),
        ("head_major", (_KV_HEADS, _PAGES, _PAGE_SIZE, _DIM), (_KV_HEADS, _PAGES, _PAGE_SIZE + 1, _DIM)),
    ):
        operands = {**_attention_operands(), "k_pages": jnp.ones(pool), "v_pages": jnp.ones(other)}
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"\bv_pages: expected .*, got"):
            _raw_attention(operands, _STATIC, layout=layout)


def test_targets_take_their_own_attributes_alone() -> None:
    """The first one knows no layout, the second one needs it."""
    for target, layout in ((_ffi.ATTENTION_TARGET, "split"), (_ffi.ATTENTION_LAYOUT_TARGET, None)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="attributes"):
            _raw_attention(_attention_operands(), _STATIC, layout=layout, target=target)
    _raw_attention(_attention_operands(), _STATIC, layout="split")


def _raw_attention(
    operands: dict[str, Array],
    static: dict[str, Any],
    results: Any = None,
    layout: str | None = None,
    target: str | None = None,
) -> None:
    """Calls a target, that of layouts if one is given, with results of the shapes that it should have."""
    target = target or (_ffi.ATTENTION_LAYOUT_TARGET if layout else _ffi.ATTENTION_TARGET)
    size = _ffi.attention_workspace_bytes(_SEQS, _HEADS, _DIM)
    results = results or [((_ROWS, _HEADS, _DIM), jnp.float32), ((_ROWS, _HEADS), jnp.float32), (None, jnp.uint8)]
    shapes = [jax.ShapeDtypeStruct((size,) if shape is None else shape, dtype) for shape, dtype in results]
    attributes = {
        "scale": np.float32(static["scale"]),
        "soft_cap": np.float32(static["soft_cap"]),
        "sliding_window": np.int64(static["sliding_window"]),
        "causal": static["causal"],
        **({"layout": layout} if layout else {}),
    }
    jax.block_until_ready(jax.ffi.ffi_call(target, shapes)(*operands.values(), **attributes))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k_pages", lambda x: x.astype(jnp.int32)),
        ("v_pages", lambda x: x[:3]),
        ("k", lambda x: x[..., :4]),
        ("k", lambda x: x.astype(jnp.float8_e5m2)),
        ("v", lambda x: x[:2]),
        ("v", lambda x: x.astype(jnp.bfloat16)),
        ("slot_mapping", lambda x: x[:2]),
        ("slot_mapping", lambda x: x.astype(jnp.float32)),
        ("k_scale", lambda x: jnp.ones((2, _KV_HEADS))),
        ("v_scale", lambda x: jnp.ones((1, 1))),
    ],
)
def test_malformed_write_is_an_error_that_names_the_argument(name: str, change: Callable[[Array], Array]) -> None:
    operands = _write_operands()
    operands[name] = change(operands[name])
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"\b({name}|v_pages): expected .*, got"):
        jax.block_until_ready(_ffi.write(*operands.values()))


def test_write_needs_aliased_pools() -> None:
    operands = _write_operands()
    pools = [jax.ShapeDtypeStruct(operands[name].shape, jnp.float32) for name in ("k_pages", "v_pages")]
    with pytest.raises(jax.errors.JaxRuntimeError, match="k_pages, v_pages: expected results aliased"):
        jax.block_until_ready(jax.ffi.ffi_call(_ffi.WRITE_TARGET, pools)(*operands.values()))


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


def test_a_broken_module_is_not_taken_for_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_ffi._MODULES, "broken", "jax_paged_attn._broken")

    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'libsomething'", name="libsomething")

    monkeypatch.setattr(_ffi.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="libsomething"):
        _ffi._load("broken")


def test_an_absent_module_is_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_ffi._MODULES, "absent", "jax_paged_attn._absent")
    assert _ffi._load("absent") is None
    assert not _ffi.has("absent")
    assert "built without jax_paged_attn._absent" in (_ffi.missing("absent") or "")
    assert "no compiled module" in (_ffi.missing("tpu") or "")
