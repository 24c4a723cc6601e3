"""`examples/ports`: calls of other JAX stacks, held to their code or to what it gave (`parity/make_ports.py`)."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import easydel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import call
from jax.sharding import AxisType
from ports import dot_product_attention as dense
from ports import lalamo_after, levanter_after, llm_examples_after

from jax_paged_attn import compat

HERE = Path(__file__).parent
PORTS = Path(lalamo_after.__file__).parent
PARITY = HERE / "parity"
GPU_KERNEL = "jax.experimental.pallas.ops.gpu.paged_attention"


def parity(name: str, dtype: Any = jnp.float32) -> dict[str, Any]:
    """What `parity/make_ports.py` wrote; numbers with a fraction are drawn in float16."""
    with np.load(PARITY / f"{name}.npz") as arrays:
        return {n: jnp.asarray(x, dtype if x.dtype == np.float16 else x.dtype) for n, x in arrays.items()}


# The imports before and after, and how many other lines there are of which the other file has none.
PORTS_OF: dict[str, tuple[list[str], list[str], tuple[int, int]]] = {
    "lalamo": (
        [f"from {GPU_KERNEL} import paged_attention"],
        ["from jax_paged_attn.compat import paged_attention"],
        (0, 0),
    ),
    "levanter": (
        [
            "from levanter.layers.attention import ragged_paged_attention",
            "from levanter.layers.kv_cache import kv_update_unified_prefix",
        ],
        ["from jax_paged_attn.compat.levanter import kv_update_unified_prefix, ragged_paged_attention"],
        (0, 0),
    ),
    # Scales are operands, where pools were dequantized.
    "llm_examples": (
        ["from jax.experimental.pallas.ops.gpu import paged_attention"],
        ["from jax_paged_attn import compat as paged_attention"],
        (5, 6),
    ),
}


@pytest.mark.parametrize("stack", PORTS_OF)
def test_a_port_is_another_import(stack: str) -> None:
    """But for the docstring, and what tells a type checker that the stack is not installed."""
    code: list[list[str]] = []
    for when in ("before", "after"):
        text = (PORTS / f"{stack}_{when}.py").read_text().split('"""', 2)[2]
        code.append([line.split("  # pyright")[0] for line in text.splitlines()])
    changed = [[line for line in code[i] if line not in code[1 - i]] for i in (0, 1)]
    imports = [[line for line in lines if line.startswith("from ")] for lines in changed]
    others = tuple(len(lines) - len(found) for lines, found in zip(changed, imports, strict=True))
    assert (*imports, others) == PORTS_OF[stack]


# ---- marin-levanter --------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Named:
    """All that `compat.levanter` knows of haliax's NamedArray; the generator of the files has the real one."""

    array: Any
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.03)])
def test_levanter(dtype: Any, bound: float) -> None:
    """Dead sequences of both marks, a scale that is traced, tokens beyond the last one that are not written."""
    arrays = parity("levanter", dtype)
    want, where, before = np.asarray(arrays.pop("out"), np.float32), arrays["where"], arrays["kv_pages"].copy()
    named = ("q", "kv_pages", "kv_lens", "page_indices", "cu_q_lens")
    step: Any = levanter_after.paged_step
    operands = [Named(x, (name,)) if name in named else x for name, x in arrays.items()]
    out, kv_pages = step(*operands)
    assert (out.axes, out.array.dtype, out.array.shape) == (("q",), dtype, want.shape)
    np.testing.assert_allclose(np.asarray(out.array, np.float32), want, rtol=bound, atol=bound)
    live = where[0] >= 0
    stored = np.array(before)
    stored[where[0][live], where[1][live], 0::2] = arrays["k"][live]
    stored[where[0][live], where[1][live], 1::2] = arrays["v"][live]
    np.testing.assert_array_equal(kv_pages.array, stored)


def test_levanters_scale_may_be_traced_or_static() -> None:
    """A traced scale rounds q once, and it has a gradient; `[1]` counts, plain arrays and engines are taken."""
    arrays = parity("levanter")
    names = ("q", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs")
    q, *rest = (arrays[name] for name in names)
    rest[-1] = rest[-1].reshape(1)
    attend: Any = compat.levanter.ragged_paged_attention
    static = attend(q, *rest, sm_scale=0.3, implementation="reference")
    traced = jax.jit(attend)(q, *rest, 0.3)
    np.testing.assert_allclose(traced, static, rtol=1e-5, atol=1e-6)

    def loss(scale: Any) -> Any:
        return attend(q, *rest, scale).sum()

    step = 1e-2
    slope = (loss(0.3 + step) - loss(0.3 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(0.3), slope, rtol=2e-2)


LEVANTER_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": jnp.ones((3, 2, 8))}, ValueError, "q: expected rank 4"),
    ({"kv_pages": jnp.ones((3, 4, 2, 8), jnp.int8)}, ValueError, "kv_pages: expected dtype float32 or float8"),
    ({"kv_pages": jnp.ones((3, 4, 4, 8))}, ValueError, "kv_pages: expected .*2K = 2"),
    ({"kv_lens": jnp.ones(2)}, ValueError, "kv_lens: "),
    ({"page_indices": jnp.ones((2, 1), jnp.int32)}, ValueError, "page_indices: expected .*B = 1"),
    ({"sm_scale": "one"}, TypeError, "sm_scale: "),
    ({"soft_cap": 0.0}, ValueError, "soft_cap: "),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), LEVANTER_ERRORS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_errors_of_levanters_call(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {
        "q": jnp.ones((3, 1, 2, 8)),
        "kv_pages": jnp.ones((3, 4, 2, 8)),
        "kv_lens": jnp.array([3], jnp.int32),
        "page_indices": jnp.array([[2]], jnp.int32),
        "cu_q_lens": jnp.array([0, 3], jnp.int32),
        "num_seqs": 1,
    }
    compat.levanter.ragged_paged_attention(**good)
    with pytest.raises(error, match=f"^{message}"):
        compat.levanter.ragged_paged_attention(**good | changes)


# ---- sglang-jax ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sglang_jax(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The port on a base class with all that it uses of theirs; `parity/make_ports.py` runs it on the real one."""

    class FlashAttention:
        page_size, attention_data_partition_axis, kv_partition_axis = 8, "data", "tensor"

        def _get_fused_kv_cache(self, forward_batch: Any, pool: Any, layer_id: int) -> Any:
            return pool[layer_id]

    name = "sgl_jax.srt.layers.attention.flashattention_backend"
    for parent in [name[: dot.start()] for dot in re.finditer(r"\.", name)]:
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    vars(sys.modules[name])["FlashAttention"] = FlashAttention
    monkeypatch.delitem(sys.modules, "ports.sglang_jax", raising=False)
    return importlib.import_module("ports.sglang_jax")


@pytest.mark.parametrize("max_context_len", [None, 24])
def test_sglang_jax(sglang_jax: Any, max_context_len: int | None) -> None:
    """A prompt, a chunk and a decode row; the pool of five axes gets the new tokens."""
    arrays = parity("sglang_jax", jnp.bfloat16)
    want, pool = np.asarray(arrays["out"]), np.asarray(arrays["pool"])
    backend = sglang_jax.PagedAttention()
    backend.max_context_len = max_context_len
    names = ("seq_lens", "page_indices", "cu_q_lens", "cu_kv_lens", "distribution")
    backend.forward_metadata = types.SimpleNamespace(
        custom_mask=None, swa_page_indices=None, **{name: arrays[name] for name in names}
    )
    layer = types.SimpleNamespace(
        **{"layer_id": 1, "head_dim": 128, "scaling": 128**-0.5, "sliding_window_size": 11, "logit_cap": 20.0},
        **{"xai_temperature_len": -1, "attn_type": None},
    )
    flat = [arrays[name].reshape(15, -1) for name in "qkv"]
    step = jax.jit(lambda *x: backend(*x[:3], layer, None, {1: x[3]}, attention_sink=x[4]))
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)):
        out, stored = step(*flat, arrays["pool"], arrays["sinks"].astype(jnp.float32))
    np.testing.assert_allclose(np.asarray(out, np.float32), want, rtol=2e-2, atol=1e-2)
    changed = np.argwhere((np.asarray(stored) != pool).any((2, 3, 4)))
    assert len(changed) == 15
    page, place = changed[-1]  # the decode row's
    np.testing.assert_array_equal(stored[page, place], jnp.stack([arrays["k"], arrays["v"]], axis=2)[-1])
    layer.xai_temperature_len = 512
    with pytest.raises(NotImplementedError, match="xai_temperature_len: "):
        backend(*flat, layer, None, {1: arrays["pool"]})


# ---- lalamo ----------------------------------------------------------------------------------------------------------


def reference_of_the_gpu_kernel(
    q: Any, k_pages: Any, v_pages: Any, tables: Any, lengths: Any, cap: float | None
) -> Any:
    """The plain function beside JAX's GPU kernel, which wants each sequence's keys in one piece."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = pytest.importorskip(GPU_KERNEL, reason="this JAX has it no more").paged_attention_reference
    k, v = (jnp.moveaxis(x[:, tables], 0, 3).reshape(len(q), -1, x.shape[0], x.shape[3]) for x in (k_pages, v_pages))
    with jax.default_matmul_precision("highest"):
        return theirs(q, k, v, lengths, attn_logits_soft_cap=cap)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_lalamo(soft_cap: float | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        before = pytest.importorskip("ports.lalamo_before", reason=f"this JAX has no {GPU_KERNEL}")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((4, n, 64), np.float32) for n in (8, 2, 2))
    pools = [jnp.asarray(x) for x in rng.standard_normal((2, 2, 20, 16, 64), np.float32)]
    tables = jnp.asarray(rng.permutation(20).reshape(4, 5).astype(np.int32))
    lengths = jnp.array([40, 0, 79, 16], jnp.int32)
    operands, static = (q, k, v, *pools, tables, lengths), {"scale": 0.125, "soft_cap": soft_cap}
    shapes = jax.eval_shape(lambda *x: lalamo_after.paged_decode(*x, **static), *operands)
    assert jax.eval_shape(lambda *x: before.paged_decode(*x, **static), *operands) == shapes
    out, key_pages, value_pages = lalamo_after.paged_decode(*operands, **static)
    want = reference_of_the_gpu_kernel(q * 0.125, key_pages, value_pages, tables, lengths + 1, soft_cap)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(value_pages[:, tables[2, 4], 15], v[2])


@pytest.mark.parametrize("quantized", [False, True])
def test_llm_examples(quantized: bool) -> None:
    """Pools split over a mesh; int8 ones with one scale per token and head."""
    rng = np.random.default_rng(0)
    q, pools = rng.standard_normal((3, 8, 1, 64), np.float32), rng.standard_normal((2, 2, 15, 16, 64), np.float32)
    tables = jnp.asarray(rng.permutation(15).reshape(3, 5).astype(np.int32))
    stored: list[Any]
    lengths, (k, v), stored = jnp.array([40, 1, 80], jnp.int32), pools, [jnp.asarray(x) for x in pools]
    if quantized:
        scales = np.abs(pools).max(-1) / 127
        quant = np.rint(pools / scales[..., None])
        stored = [
            llm_examples_after.Quantized(jnp.asarray(x, jnp.int8), jnp.asarray(s))
            for x, s in zip(quant, scales, strict=True)
        ]
        k, v = quant * scales[..., None]
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(AxisType.Auto,))
    operands = (jnp.asarray(q), *stored, tables, lengths)
    out = llm_examples_after.attention(*operands, mesh)
    if quantized:  # no pool in another dtype
        code = str(jax.make_jaxpr(lambda *x: llm_examples_after.attention(*x, mesh))(*operands))
        assert "i8[2,15,16,64]" in code
        assert "f32[2,15,16,64]" not in code
    want = reference_of_the_gpu_kernel(q[:, :, 0] * 0.125, jnp.asarray(k), jnp.asarray(v), tables, lengths, None)
    np.testing.assert_allclose(out[:, :, 0], want, rtol=1e-4, atol=1e-5)


# ---- EasyDeL ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("ejkernel") is None, reason="ejkernel wants JAX 0.10, and so Python 3.11")
def test_easydel(tmp_path: Path) -> None:
    """`easydel.py` in a process of its own: ejkernel turns JAX's persistent cache on, in the home folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    paths = [str(HERE), str(HERE.parent / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*command, str(HERE / "easydel.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_unified_attention_without_ejkernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, kv_lens, tables, rows, _, _, sinks = easydel.inputs("features", jnp.float32)
    ours: Any = compat.ejkernel.unified_attention
    off = ours(q, k, v, kv_lens, tables, rows, sliding_window=0, logits_soft_cap=0.0, num_warps=4)
    np.testing.assert_array_equal(off, call("ragged_paged_attention", q, k, v, kv_lens, tables, rows))
    wider = ours(q.astype(jnp.bfloat16), k, v, kv_lens, tables, rows, softmax_aux=sinks.astype(jnp.bfloat16))
    assert wider.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"^qq_bias: expected None"):
        ours(q, k, v, kv_lens, tables, rows, qq_bias=jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"^platforms: expected some of triton, cuda, xla, got rocm"):
        compat.ejkernel.register(["rocm"])
    monkeypatch.setitem(sys.modules, "ejkernel", None)
    with pytest.raises(ImportError, match="pip install ejkernel"):
        compat.ejkernel.register()


# ---- `jax.nn.dot_product_attention` and tokamax's --------------------------------------------------------------------

# Rows, keys, keywords of `jax.nn.dot_product_attention`.
DENSE: dict[str, tuple[int, int, dict[str, Any]]] = {
    "decode": (1, 9, {"key_value_seq_lengths": np.array([9, 0, 4], np.int32)}),
    "prefill": (6, 6, {"is_causal": True, "scale": 0.3}),
    "window": (4, 9, {"is_causal": True, "local_window_size": (2, 5)}),
    "around": (4, 9, {"local_window_size": 3}),
    "all": (4, 9, {}),
}
# No counterpart here: JAX runs them.
OTHER: dict[str, tuple[int, int, dict[str, Any]]] = {
    "padded": (6, 6, {"is_causal": True, "key_value_seq_lengths": np.array([6, 1, 4], np.int32)}),
    "more rows than keys": (6, 4, {}),
    "behind": (6, 9, {"local_window_size": (2, 4)}),
    "bias": (6, 6, {"bias": np.ones((1, 4, 6, 6), np.float32)}),
    "left alone": (1, 9, {"key_value_seq_lengths": np.array([9, 1, 4], np.int32), "local_window_size": (2, 0)}),
}


def dense_operands(rows: int, keys: int) -> list[Any]:
    rng = np.random.default_rng(rows)
    return [jnp.asarray(rng.standard_normal((3, n, h, 32), np.float32)) for n, h in ((rows, 4), (keys, 2), (keys, 2))]


@pytest.mark.parametrize("name", DENSE)
def test_jax_nn_runs_us(name: str) -> None:
    rows, keys, keywords = DENSE[name]
    operands = dense_operands(rows, keys)
    attend = jax.jit(lambda *x: dense.dot_product_attention(*x, **keywords))
    assert " paged_attention[" in str(jax.make_jaxpr(attend)(*operands))
    with jax.default_matmul_precision("highest"):
        want = np.asarray(jax.nn.dot_product_attention(*operands, **keywords))
    if name == "decode":  # a sequence without keys: 0 here, whose mean JAX takes
        want = np.where(keywords["key_value_seq_lengths"][:, None, None, None] > 0, want, 0)
    np.testing.assert_allclose(attend(*operands), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHER)
def test_jax_nn_runs_what_we_have_not(name: str) -> None:
    rows, keys, keywords = OTHER[name]
    operands = dense_operands(rows, keys)
    want = jax.nn.dot_product_attention(*operands, **keywords)
    np.testing.assert_array_equal(dense.dot_product_attention(*operands, **keywords), want)
    with pytest.raises(NotImplementedError, match="expected"):
        dense.dot_product_attention(*operands, **keywords, implementation="paged")


@dataclasses.dataclass
class Mask:
    """tokamax's mask, as far as the port knows it; `parity/make_ports.py` has the real one."""

    causal_mask: Any = None
    k_end: Any = None
    bool_mask: Any = None
    q_start: Any = None
    q_end: Any = None
    k_start: Any = None


def test_tokamax() -> None:
    """One of its implementations; `python tests/parity/make_ports.py tokamax` calls tokamax itself."""
    q, k, v = dense_operands(1, 9)
    options = {"bias": None, "logits_scale": 0.25, "logits_soft_cap": 3.0}
    lengths = jnp.array([9, 2, 4], jnp.int32)
    got = dense.for_tokamax(q, k, v, mask=Mask(k_end=lengths[:, None, None]), **options)
    keywords = {"scale": 0.25, "soft_cap": 3.0}
    tables = jnp.arange(3, dtype=jnp.int32)[:, None]
    np.testing.assert_array_equal(got[:, 0], call("paged_attention", q[:, 0], k, v, tables, lengths, **keywords))
    for mask in (Mask(bool_mask=jnp.ones((1, 1, 1, 9), bool)), Mask(k_end=jnp.ones((3, 4, 1), jnp.int32))):
        with pytest.raises(NotImplementedError, match="expected"):
            dense.for_tokamax(q, k, v, mask=mask, **options)
