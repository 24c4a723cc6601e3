"""The CUDA module as far as it runs without a GPU: it loads, plans within its limits, and calls lower for it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from typing import Any

import harness
import jax
import jax.numpy as jnp
import pytest
from cases import build
from harness import python
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_paged_attn as jpa
from jax_paged_attn import _ffi

pytestmark = pytest.mark.skipif(not _ffi.has("cuda"), reason="this installation was built without the CUDA module")

MIB = 1 << 20


def plan_of(*sizes: Any, limit: int = 256 * MIB, **kind: Any) -> dict[str, int]:
    return _ffi.compiled("cuda").attention_plan(*sizes, limit, **kind)


@settings(max_examples=2000, deadline=None)
@given(
    dtypes=st.sampled_from([("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "int8")]),
    kv_heads=st.integers(1, 16),
    group=st.integers(1, 80),
    head_dim=st.integers(1, 600),
    other_dim=st.none() | st.integers(1, 600),
    page_size=st.one_of(st.integers(1, 300), st.sampled_from([64, 128, 4096, 8192])),
    num_seqs=st.integers(0, 300),
    num_rows=st.integers(0, 70000),
    max_pages=st.integers(0, 1100),
    decode=st.booleans(),
    limit=st.sampled_from([1 * MIB, 16 * MIB, 256 * MIB]),
    pool=st.sampled_from(
        [("split", 0), ("interleaved", 0), ("interleaved", 3), ("head_major", 0), ("values_in_keys", 0)]
    ),
    token_scales=st.booleans(),
)
def test_plan_covers_the_call_within_its_bound(
    dtypes: tuple[str, str], kv_heads: int, group: int, head_dim: int, other_dim: int | None, page_size: int,
    num_seqs: int, num_rows: int, max_pages: int, decode: bool, limit: int, pool: tuple[str, int], token_scales: bool,
) -> None:  # fmt: skip
    module = _ffi.compiled("cuda")
    value_dim = head_dim if other_dim is None or pool[0] == "interleaved" else other_dim
    if pool[0] == "values_in_keys":
        value_dim, token_scales = min(head_dim, value_dim), False
    kind = {"layout": pool[0], "num_padding_heads": pool[1], "token_scales": token_scales}
    sizes = (kv_heads * group, kv_heads, head_dim, value_dim, page_size)
    rows = num_seqs if decode else num_rows
    plan = plan_of(*dtypes, rows, *sizes, num_seqs, max_pages, decode, limit=limit, **kind)
    bound = module.workspace_bound(*dtypes, *sizes, limit, **kind)
    assert plan["workspace_bytes"] <= bound + (rows + num_seqs) * module.WORKSPACE_BYTES_PER_ROW
    assert plan["stretch_keys"] * plan["stretches"] >= max_pages * page_size
    # Every row has a place: of each sequence all tiles but one are full.
    rows_per_tile = plan["row_block_rows"] // group
    tiles = rows if decode else min(rows, rows // rows_per_tile + num_seqs)
    assert plan["row_blocks"] * plan["groups"] >= tiles * kv_heads
    assert plan["row_blocks"] % plan["chunk_row_blocks"] == 0
    # Gathered keys: a slot a unit, or one for each sequence and head that the units of a group have.
    heads = -(-(plan["row_blocks"] - 1) // max(tiles, 1)) + 1
    assert plan["gathered"] in (plan["row_blocks"], min(heads, kv_heads) * max(num_seqs, 1))
    assert plan["gathered"] <= plan["row_blocks"]


def test_launches_do_not_depend_on_the_batch_while_it_fits() -> None:
    decode = {
        plan_of(*["bfloat16"] * 2, b, 8 * k, k, 128, 128, 64, b, 8, True)["launches"]
        for b in (1, 7, 64)
        for k in (1, 8)
    }
    ragged = {plan_of(*["bfloat16"] * 2, 64, 32, 8, 128, 128, 16, b, 8, False)["launches"] for b in (1, 3, 16)}
    assert decode == {5}
    assert ragged == {6}


def test_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _ffi.workspace_limit_cuda() == 256 * MIB
    monkeypatch.setenv("JPA_CUDA_WORKSPACE_MIB", "64")
    assert _ffi.workspace_limit_cuda() == 64 * MIB
    monkeypatch.setenv("JPA_CUDA_WORKSPACE_MIB", "-1")
    with pytest.raises(ValueError, match=r"JPA_CUDA_WORKSPACE_MIB: expected .* got '-1'"):
        _ffi.workspace_limit_cuda()


@given(
    kv_heads=st.integers(1, 16),
    group=st.integers(1, 80),
    head_dims=st.sampled_from(harness.engine_row("fused").head_dims or ()),
    page_dtype=st.sampled_from(["bfloat16", "float8_e4m3fn"]),
    page_size=st.integers(1, 200),
    num_seqs=st.integers(0, 3000),
    max_pages=st.integers(0, 3000),
    num_rows=st.integers(0, 70000),
    decode=st.booleans(),
    limit=st.integers(0, 1 << 30),
)
@settings(max_examples=500, deadline=None)
def test_scratch_of_fused_depends_on_rows_only_where_it_must(
    kv_heads: int,
    group: int,
    head_dims: tuple[int, int],
    page_dtype: str,
    page_size: int,
    num_seqs: int,
    max_pages: int,
    num_rows: int,
    decode: bool,
    limit: int,
) -> None:
    module = _ffi.compiled("cuda")
    head_dim, value_dim = head_dims
    dtypes, heads = ("bfloat16", page_dtype), (kv_heads * group, kv_heads, head_dim, value_dim)
    rows = num_seqs if decode else num_rows

    def size(rows: int, num_seqs: int, *, batch_invariant: bool = False, limit: int = limit) -> int:
        sizes = (*dtypes, rows, *heads, page_size, num_seqs, max_pages)
        return module.fused_workspace_bytes(*sizes, decode, batch_invariant, limit)

    def bound(*, batch_invariant: bool, limit: int = limit) -> int:
        of_rows = rows * module.fused_workspace_bytes_per_row(heads[0], value_dim) if batch_invariant else 0
        of_sequences = 0 if decode else num_seqs * module.FUSED_WORKSPACE_BYTES_PER_SEQUENCE
        constant = module.fused_workspace_bound(*dtypes, *heads, page_size, decode, batch_invariant, limit)
        return constant + of_rows + of_sequences

    without = size(rows, num_seqs, limit=0)
    of_one = size(1, 1, limit=0)
    assert of_one - 256 <= without <= of_one + (0 if decode else num_seqs * module.FUSED_WORKSPACE_BYTES_PER_SEQUENCE)
    assert not decode or without == of_one
    assert 0 < without <= 128 * MIB + (0 if decode else num_seqs * module.FUSED_WORKSPACE_BYTES_PER_SEQUENCE)
    # The tile cache: only for prompts over pages that TMA does not load, and in half of the limit.
    tile_cache = size(rows, num_seqs) - without
    assert 0 <= tile_cache <= limit // 2 + limit // 4096 + 256  # with 16 bytes of state for each, of 32 KiB at least
    if decode or (page_size % 8 == 0 and page_dtype == "bfloat16") or rows * group <= 3 * 128:
        assert tile_cache == 0
    elif min(num_seqs, max_pages) > 0 and limit >= 1 << 20 and head_dim != 80:
        assert tile_cache > 0
    assert size(rows, num_seqs) <= bound(batch_invariant=False)
    invariant = size(rows, num_seqs, batch_invariant=True, limit=0)
    per_row = module.fused_workspace_bytes_per_row(heads[0], value_dim)
    enough = bound(batch_invariant=True, limit=0)
    assert invariant <= enough
    cumulative = module.fused_workspace_bytes(
        *(*dtypes, rows, *heads, page_size, num_seqs, max_pages), decode, False, limit, cumulative=True
    )
    more = cumulative - size(rows, num_seqs)
    assert num_seqs * module.FUSED_CUMULATIVE_BYTES_PER_SEQUENCE < more <= 4 * num_seqs + 256
    assert rows > 8 * num_seqs or invariant >= enough - per_row - 512  # no more than rounding is lost
    assert size(rows, num_seqs, batch_invariant=True) <= bound(batch_invariant=True)


def lowered(name: str, cuda_engine: str) -> str:
    case = harness.adapted(name, cuda_engine)
    args, _ = build(case).arguments()
    call = functools.partial(getattr(jpa, case.function), implementation=cuda_engine)
    return jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("cuda_engine", ["fused", "cublaslt"])
@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_calls_lower_for_cuda(name: str, cuda_engine: str) -> None:
    text = lowered(name, cuda_engine)
    cumulative = name == "mixed" and cuda_engine == "fused"
    assert f"custom_call @{_ffi.ATTENTION_CUMULATIVE_TARGET if cumulative else _ffi.ATTENTION_TARGET}" in text
    assert f'engine = "{cuda_engine}"' in text


@pytest.mark.parametrize("keywords", [
    {"implementation": "cublaslt"}, {"implementation": "fused"}, {"implementation": "fused", "batch_invariant": True}
], ids=str)  # fmt: skip
def test_a_symbolic_batch_exports_for_cuda(keywords: dict[str, Any]) -> None:
    (batch,) = jax.export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct
    pages = spec((99, 16, 2, 64), jnp.bfloat16)
    call = jax.jit(functools.partial(jpa.paged_attention, **keywords))
    exported = jax.export.export(
        call,
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(_ffi.ATTENTION_TARGET)],
    )(spec((batch, 8, 64), jnp.bfloat16), pages, pages, spec((batch, 7), jnp.int32), spec((batch,), jnp.int32))
    assert _ffi.ATTENTION_TARGET in exported.mlir_module()


def digests() -> list[str]:
    """Digests of calls as they are lowered with the module that serves here."""
    calls = [lowered(name, engine) for name in ("decode", "mixed") for engine in ("fused", "cublaslt")]
    return [hashlib.sha256(call.encode()).hexdigest() for call in calls]


OF_A_VERSION = """
import test_cuda_build
from jax_paged_attn import _ffi
print(_ffi.compiled("cuda").__name__, _ffi.compiled("cuda").build_info()["cuda"].split(".")[0])
print(*_ffi.compiled("cuda").registrations())
print(*test_cuda_build.digests())
"""


@pytest.mark.parametrize(("version", "module"), [("12", "_cuda12"), ("13", "_cuda")])
def test_the_module_of_each_version_lowers_the_same_programs(version: str, module: str) -> None:
    """So that a program which was exported beside one CUDA runs beside the other."""
    name = f"jax_paged_attn.{module}"
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"this installation was built without {name}")
    of_module, targets, programs = python(OF_A_VERSION, JPA_CUDA_VERSION=version)
    assert of_module == f"{name} {version}"
    assert targets.split() == list(_ffi.compiled("cuda").registrations())
    assert programs.split() == digests()
