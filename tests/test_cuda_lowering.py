"""The lowering of calls for CUDA, asked for with a stand-in for the compiled module: no build of it is needed."""

from __future__ import annotations

import functools
import math
import re
from types import ModuleType
from typing import Any

import harness
import jax
import jax.numpy as jnp
import pytest
from jax.export import symbolic_shape

import jax_paged_attn as jpa
from jax_paged_attn import _ffi, compat

OURS = [
    jax.export.DisabledSafetyCheck.custom_call(target)
    for target in (_ffi.ATTENTION_TARGET, _ffi.ATTENTION_CUMULATIVE_TARGET)
]
CONSTANT, PER_ROW, PER_SEQUENCE, CUMULATIVE = 1_000_000, 4096, 16, 4
RAGGED = PER_SEQUENCE + CUMULATIVE  # per sequence of ragged calls


class StandIn(ModuleType):
    """The facts about sizes that `_cuda` offers, with numbers that are easy to tell apart."""

    DEFAULT_WORKSPACE_LIMIT = 256 << 20
    WORKSPACE_BYTES_PER_ROW = 32
    FUSED_WORKSPACE_BYTES_PER_SEQUENCE = PER_SEQUENCE
    FUSED_CUMULATIVE_BYTES_PER_SEQUENCE = CUMULATIVE

    def fused_workspace_bytes(
        self, *, num_rows: int, num_seqs: int, decode: bool, batch_invariant: bool, cumulative: bool, **fixed: Any
    ) -> int:
        known = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "workspace_limit": 256 << 20}
        assert {name: fixed[name] for name in known} == known
        more = num_rows if decode else min(num_rows, 8 * num_seqs)
        per_sequence = (0 if decode else PER_SEQUENCE) + CUMULATIVE * cumulative
        return CONSTANT + more * PER_ROW * batch_invariant + num_seqs * per_sequence

    def fused_workspace_bound(self, **fixed: Any) -> int:
        return self.fused_workspace_bytes(**fixed, num_rows=1, num_seqs=1, max_pages=1)

    def fused_workspace_bytes_per_row(self, *, num_q_heads: int, value_dim: int) -> int:
        return PER_ROW

    def attention_plan(self, **sizes: Any) -> dict[str, int]:
        return {"workspace_bytes": 77}

    def workspace_bound(self, **fixed: Any) -> int:
        return 88


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_ffi._loaded, "cuda", StandIn("stand-in"))


def specs(batch: Any, rows: Any = None, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """Operands of `paged_attention`, or of `ragged_paged_attention` if `rows` is given."""
    spec = jax.ShapeDtypeStruct
    pages = spec((99, 16, 2, 64), dtype)
    tables, lengths = spec((batch, 7), jnp.int32), spec((batch,), jnp.int32)
    if rows is None:
        return spec((batch, 8, 64), dtype), pages, pages, tables, lengths
    return spec((rows, 8, 64), dtype), pages, pages, lengths, tables, spec((batch + 1,), jnp.int32)


def lowered(args: tuple[Any, ...], **keywords: Any) -> str:
    function = jpa.paged_attention if len(args) == 5 else jpa.ragged_paged_attention
    call = jax.jit(functools.partial(function, **keywords))
    return call.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def workspace_bytes(text: str) -> int:
    (size,) = re.findall(r"-> \(.*tensor<(\d+)xui8>\)", text)
    return int(size)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("args", [specs(3), specs(3, 40)], ids=["decode", "ragged"])
def test_attributes_of_the_call(args: tuple[Any, ...], batch_invariant: bool) -> None:
    text = lowered(args, batch_invariant=batch_invariant)
    decode = len(args) == 5
    assert f"custom_call @{_ffi.ATTENTION_TARGET if decode else _ffi.ATTENTION_CUMULATIVE_TARGET}" in text
    (attributes,) = re.findall(r"mhlo.backend_config = \{([^}]*)\}", text)
    names = {"scale", "soft_cap", "sliding_window", "causal", "engine", "workspace_limit", "batch_invariant"}
    names.add("decode" if decode else "layout")
    assert {part.split(" = ")[0].strip() for part in attributes.split(", ")} == names
    assert 'engine = "fused"' in attributes
    assert f"batch_invariant = {str(batch_invariant).lower()}" in attributes
    assert ("decode = true" if decode else 'layout = "split"') in attributes
    assert f"workspace_limit = {256 << 20} : i64" in attributes


@pytest.mark.parametrize("cuda_engine", ["fused", "cublaslt"])
@pytest.mark.parametrize("layout", ["interleaved", "head_major", "padded"])
def test_layouts_have_a_target_of_their_own(monkeypatch: pytest.MonkeyPatch, layout: str, cuda_engine: str) -> None:
    asked = []
    monkeypatch.setattr(StandIn, "attention_plan", lambda _, **sizes: asked.append(sizes) or {"workspace_bytes": 77})
    q, pages, _, *rest = specs(3) if layout == "head_major" else specs(3, 40)
    pool = {"interleaved": (99, 16, 4, 64), "head_major": (2, 99, 16, 64), "padded": (99, 16, 7, 64)}[layout]
    pages = jax.ShapeDtypeStruct(pool, pages.dtype)
    pools = [pages] * (1 if layout == "interleaved" else 2)
    args = (q, *pools, *rest, *([] if layout == "head_major" else [jax.ShapeDtypeStruct((1,), jnp.int32)]))
    function: Any = {
        "interleaved": compat.ragged_paged_attention,
        "head_major": compat.paged_attention,
        "padded": functools.partial(harness.attend_in_layout, layout="interleaved", kv_heads=2),
    }[layout]
    text = (
        jax.jit(functools.partial(function, implementation=cuda_engine))
        .trace(*args)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    target = _ffi.ATTENTION_TOKENS_TARGET if layout == "padded" else _ffi.ATTENTION_LAYOUT_TARGET
    cumulative = layout == "interleaved" and cuda_engine == "fused"
    if cumulative:
        target = _ffi.ATTENTION_CUMULATIVE_TARGET
    name = "interleaved" if layout == "padded" else layout
    assert f"custom_call @{target}" in text
    assert f'layout = "{name}"' in text
    expected = CONSTANT + 3 * {"head_major": 0, "padded": PER_SEQUENCE, "interleaved": RAGGED}[layout]
    assert workspace_bytes(text) == (77 if cuda_engine == "cublaslt" else expected)
    rows = 3 if layout == "head_major" else 40
    sizes = {
        **{"q_dtype": "bfloat16", "kv_dtype": "bfloat16", "num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64},
        **{"value_dim": 64},
        **{"page_size": 16, "num_rows": rows, "num_seqs": 3, "max_pages": 7, "decode": layout == "head_major"},
        **{"workspace_limit": 256 << 20, "layout": name, "num_padding_heads": 3 if layout == "padded" else 0},
        "token_scales": False,
    }
    assert asked == ([sizes] if cuda_engine == "cublaslt" else [])


@pytest.mark.parametrize("form", ["in keys", "narrow", "k = v"])
def test_values_apart_or_in_keys_go_to_a_target_of_their_own(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Where "fused" has no kernel for the pair of head dims, it says so."""
    asked = []
    monkeypatch.setattr(StandIn, "attention_plan", lambda _, **sizes: asked.append(sizes) or {"workspace_bytes": 77})
    q, k_pages, _, *rest = specs(3)
    v_pages = jax.ShapeDtypeStruct((99, 16, 2, 40), k_pages.dtype) if form == "narrow" else None
    value_dim = {"in keys": 40, "narrow": None, "k = v": 64}[form]
    call = functools.partial(jpa.paged_attention, value_dim=value_dim)
    verdict = jpa.explain(call, q, k_pages, v_pages, *rest, platform="cuda")
    text = jax.jit(call).trace(q, k_pages, v_pages, *rest).lower(lowering_platforms=("cuda",)).as_text()
    assert f"custom_call @{_ffi.ATTENTION_VALUES_TARGET}" in text
    assert f'layout = "{"split" if form == "narrow" else "values_in_keys"}"' in text
    if form == "k = v":
        assert (verdict.engine, asked) == ("fused", [])
        return
    assert verdict.engine == "cublaslt"
    assert verdict.rejected["fused"].endswith("got 64 with values of 40")
    assert [sizes["value_dim"] for sizes in asked] == [40]
    with pytest.raises(ValueError, match=r"^batch_invariant: expected an engine that guarantees it"):
        jpa.explain(functools.partial(call, batch_invariant=True), q, k_pages, v_pages, *rest, platform="cuda")


def test_scales_per_token_go_to_cublaslt(monkeypatch: pytest.MonkeyPatch) -> None:
    """And "fused" says why not; its own calls know nothing of them."""
    asked = []
    monkeypatch.setattr(StandIn, "attention_plan", lambda _, **sizes: asked.append(sizes) or {"workspace_bytes": 77})
    q, _, _, *rest = specs(3)
    pages, scales = jax.ShapeDtypeStruct((2, 99, 16, 64), jnp.int8), jax.ShapeDtypeStruct((2, 99, 16), jnp.float32)
    args = (q, pages, pages, *rest, scales, scales)
    verdict = jpa.explain(compat.paged_attention, *args, platform="cuda")
    assert verdict.engine == "cublaslt"
    assert "got one per token and head" in verdict.rejected["fused"]
    text = jax.jit(compat.paged_attention).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert f"custom_call @{_ffi.ATTENTION_TOKENS_TARGET}" in text
    assert [sizes["token_scales"] for sizes in asked] == [True]
    with pytest.raises(ValueError, match=r"^implementation: for 'fused' expected scales"):
        jax.eval_shape(functools.partial(compat.paged_attention, implementation="fused"), *args)


def test_every_engine_gets_its_own_workspace() -> None:
    assert workspace_bytes(lowered(specs(3))) == CONSTANT
    assert workspace_bytes(lowered(specs(300, 4000))) == CONSTANT + 300 * RAGGED
    assert workspace_bytes(lowered(specs(3), batch_invariant=True)) == CONSTANT + 3 * PER_ROW
    assert workspace_bytes(lowered(specs(3, 10), batch_invariant=True)) == CONSTANT + 10 * PER_ROW + 3 * RAGGED
    assert workspace_bytes(lowered(specs(3, 40), batch_invariant=True)) == CONSTANT + 24 * PER_ROW + 3 * RAGGED
    assert workspace_bytes(lowered(specs(3), implementation="cublaslt")) == 77
    assert 'engine = "cublaslt"' in lowered(specs(3, dtype=jnp.float32))


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_symbolic_sizes_get_enough(ragged: bool, batch_invariant: bool) -> None:
    b, t = symbolic_shape("b, t")
    call = functools.partial(
        jpa.ragged_paged_attention if ragged else jpa.paged_attention, batch_invariant=batch_invariant
    )
    args = specs(b, t) if ragged else specs(b)
    text = jax.export.export(jax.jit(call), platforms=["cuda"], disabled_checks=OURS)(*args).mlir_module()
    assert (_ffi.ATTENTION_CUMULATIVE_TARGET if ragged else _ffi.ATTENTION_TARGET) in text

    q, k_pages, *_ = args
    tables = args[4] if ragged else args[3]
    keywords: dict[str, Any] = {"decode": not ragged, "batch_invariant": batch_invariant}
    keywords |= {"workspace_limit": StandIn.DEFAULT_WORKSPACE_LIMIT, "cumulative": ragged}
    size = _ffi.fused_workspace_bytes(q, k_pages, tables, **keywords)
    if not batch_invariant and not ragged:
        assert size == CONSTANT
        return
    for rows, seqs in ((0, 0), (1, 1), (40, 3), (9, 700)):
        known = specs(seqs, rows) if ragged else specs(rows)
        tables = known[4] if ragged else known[3]
        assert size_at(size, t=rows, b=seqs if ragged else rows) >= _ffi.fused_workspace_bytes(
            known[0], known[1], tables, **keywords
        )


@pytest.mark.parametrize("num_seqs", [None, (), (1,)])
def test_nothing_but_the_call_computes_in_a_ragged_call(num_seqs: tuple[int, ...] | None) -> None:
    """Each operation of XLA's in front of it would be a kernel more."""
    args = specs(64, 64) + (() if num_seqs is None else (jax.ShapeDtypeStruct(num_seqs, jnp.int32),))
    call = jax.jit(jpa.ragged_paged_attention)
    text = call.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    operations = set(re.findall(r"stablehlo\.(\w+)", text))
    # Arrays without numbers are nothing to fill, and a scalar becomes [1] without a copy.
    assert operations <= {"custom_call", "constant", "broadcast_in_dim", "reshape"}
    assert all("-> tensor<0" in line for line in text.splitlines() if "stablehlo.broadcast_in_dim" in line)
    assert f"custom_call @{_ffi.ATTENTION_CUMULATIVE_TARGET}" in text


@pytest.mark.parametrize("transformation", ["vmap", "grad", "cublaslt", "other platform"])
def test_first_rows_and_row_counts_where_they_are_needed(transformation: str) -> None:
    q, *rest = specs(3, 40)

    def attend(q: Any, *rest: Any) -> Any:
        return jpa.ragged_paged_attention(q, *rest, implementation="cublaslt" if transformation == "cublaslt" else None)

    call: Any = attend
    if transformation == "vmap":
        call, q = jax.vmap(attend, in_axes=(1, *[None] * 5)), jax.ShapeDtypeStruct((40, 2, 8, 64), q.dtype)
    if transformation == "grad":
        call = jax.grad(lambda q, *rest: attend(q, *rest).astype(jnp.float32).sum())
    platform = "tpu" if transformation == "other platform" else "cuda"
    text = jax.jit(call).trace(q, *rest).lower(lowering_platforms=(platform,)).as_text()
    targets = {
        "vmap": [_ffi.ATTENTION_TARGET],
        "cublaslt": [_ffi.ATTENTION_TARGET],
        "grad": [_ffi.ATTENTION_CUMULATIVE_TARGET],  # of the forward pass; derivatives are plain JAX
        "other platform": [],
    }[transformation]
    assert re.findall(r"custom_call @(jax_paged_attn[\w.]+)", text) == targets


def size_at(size: Any, **dims: int) -> int:
    """A symbolic size for values of its dimensions."""
    terms = str(size).split(" + ")
    return sum(math.prod(dims[x] if x in dims else int(x) for x in term.split("*")) for term in terms)
