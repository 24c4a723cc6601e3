"""Properties on many devices. `test_sharding.py` runs these tests in a process with eight CPU devices."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Array, Case, build
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import Decoder, DecoderConfig
from models.gemma2 import OffsetNorm, SandwichBlock
from models.gpt_oss import ClampedExperts
from models.latent import LatentBlock
from models.layers import Experts, Latent
from rpa_calls import RpaCall
from rpa_calls import build as build_rpa
from safetensors.numpy import load_file
from test_transforms import OURS

import jax_paged_attn as jpa
from jax_paged_attn import compat
from jax_paged_attn.nnx import CacheVariable, PagedSelfAttention, StepMetadata
from jax_paged_attn.serving import Engine, Request

PARITY = Path(__file__).parent / "parity"
DECODE = Case(
    "sharded", (1,) * 8, (1, 8, 17, 32, 0, 9, 31, 5), "paged_attention", num_heads=16, num_kv_heads=8, head_dim=16,
    page_size=8, sinks=True, k_scale=(0.5, 1.0, 1.5, 2.0, 0.7, 0.9, 1.1, 1.3),
)  # fmt: skip
RAGGED = dataclasses.replace(DECODE, q_lens=(1, 5, 3, 8, 0, 1, 12, 5), function="ragged_paged_attention")
TWO_KV_HEADS = dataclasses.replace(DECODE, num_kv_heads=2, k_scale=(0.5, 2.0))

KINDS = (AxisType.Auto, AxisType.Explicit)
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"


def collectives(compiled: Any) -> list[str]:
    return re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled.as_text())


def mesh_of(kind: AxisType = AxisType.Auto, **sizes: int) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def within(mesh: jax.sharding.Mesh) -> Any:
    """The context that calls on arrays of the mesh need."""
    return jax.set_mesh(mesh) if AxisType.Explicit in mesh.axis_types else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function of q, k_pages, v_pages, sinks, k_scale and the integers that say where, and its operands."""

    attend: Callable[..., tuple[Any, Any]]
    operands: tuple[Array, ...]

    @classmethod
    def of(cls, case: Case) -> Problem:
        (q, k_pages, v_pages, *where), traced = build(case).arguments()
        where = [x for x in where if x is not None]

        def attend(q: Any, k_pages: Any, v_pages: Any, sinks: Any, k_scale: Any, *where: Any) -> Any:
            function = getattr(jpa, case.function)
            keywords = {"sinks": sinks, "k_scale": k_scale, "value_dim": traced.get("value_dim"), **case.keywords}
            return function(q, k_pages, v_pages, *where, **keywords, return_lse=True)

        operands: Any = (q, k_pages, v_pages, traced["sinks"], traced["k_scale"], *where)
        return cls(attend, operands)

    def specs(self, rows: Any = None, kv_heads: Any = None, heads: Any = None) -> tuple[P, ...]:
        """How the operands are sharded, by the mesh axes that split sequences and heads."""
        pool = P(None, None, kv_heads)
        return P(rows, heads), pool, pool, P(heads), P(kv_heads), *[P(rows)] * (len(self.operands) - 5)


def loss(results: tuple[Any, Any]) -> Any:
    out, lse = results
    return (out**2).sum() + jnp.sin(jnp.where(jnp.isneginf(lse), 0, lse)).sum()


def derived(attend: Callable[..., Any], derivative: str) -> Callable[..., Any]:
    def gradient(*operands: Any) -> Any:
        return jax.grad(lambda *xs: loss(attend(*xs, *operands[4:])), (0, 1, 2, 3))(*operands[:4])

    def tangent(*operands: Any) -> Any:
        return jax.jvp(lambda *xs: attend(*xs, *operands[4:]), operands[:4], operands[:4])[1]

    return {"forward": attend, "gradient": gradient, "tangent": tangent}[derivative]


def assert_same(got: Any, want: Any) -> None:
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), rtol=1e-5, atol=1e-5)


def compile_sharded(function: Any, operands: Any, mesh: Any, specs: Any, **jit_options: Any) -> tuple[Any, Any]:
    """The compiled function, and the operands placed as the specs say."""
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, specs, strict=True)]
    return jax.jit(function, **jit_options).lower(*placed).compile(), placed


def finite(operands: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(np.nan_to_num(x, nan=0.5, posinf=1.0, neginf=-1.0) if x.dtype == np.float32 else x for x in operands)


# ---- Partitioned by XLA ----------------------------------------------------------------------------------------------

SPLITS = {
    "heads": (DECODE, {"x": 8}, {"kv_heads": "x", "heads": "x"}),
    "ragged heads": (RAGGED, {"x": 8}, {"kv_heads": "x", "heads": "x"}),
    "sequences": (DECODE, {"x": 8}, {"rows": "x"}),
    "sequences and heads": (DECODE, {"x": 2, "y": 4}, {"rows": "x", "kv_heads": "y", "heads": "y"}),
    "heads by minor axis first": (DECODE, {"x": 2, "y": 4}, {"kv_heads": ("y", "x"), "heads": ("y", "x")}),
    "more shards than heads": (TWO_KV_HEADS, {"x": 2, "y": 4}, {"kv_heads": "x", "heads": ("x", "y")}),
}
# Where each device has a part of what the cotangent of a pool or of sinks is a sum of.
SUMMED = {"sequences", "sequences and heads", "more shards than heads"}


@pytest.mark.whole
@pytest.mark.parametrize(
    ("kind", "derivative"),
    [*itertools.product(KINDS, ("forward", "gradient")), (AxisType.Auto, "tangent")],
    ids=str,
)
@pytest.mark.parametrize("split", SPLITS)
def test_partitioned_without_moving_an_operand(kind: AxisType, split: str, derivative: str) -> None:
    case, sizes, axes = SPLITS[split]
    problem = Problem.of(case)
    operands = problem.operands if derivative == "forward" else finite(problem.operands)
    function, mesh = derived(problem.attend, derivative), mesh_of(kind, **sizes)
    want = jax.jit(function)(*operands)
    specs = problem.specs(**axes)
    with within(mesh):
        compiled, placed = compile_sharded(function, operands, mesh, specs)
        got = compiled(*placed)
    assert_same(got, want)
    expected = {"all-reduce"} if derivative == "gradient" and split in SUMMED else set()
    assert set(collectives(compiled)) == expected
    result_specs = specs if derivative == "gradient" else (specs[0], P(*specs[0]))
    for x, spec in zip(got, result_specs, strict=False):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


ONE_KV_HEAD = dataclasses.replace(
    DECODE, num_kv_heads=1, k_scale=(0.7,), head_dim=24, value_dim=16, values_in_keys=True
)
EIGHT_IN_KEYS = dataclasses.replace(DECODE, head_dim=24, value_dim=16, values_in_keys=True)
APART = dataclasses.replace(RAGGED, value_dim=24)
# Values in the keys or of another head dim: the mesh, and the axes of sequences, of pools' heads and of query heads.
VALUE_SPLITS = {
    "query heads of one KV head": (ONE_KV_HEAD, {"x": 8}, (None, None, "x")),
    "sequences of one KV head": (ONE_KV_HEAD, {"x": 8}, ("x", None, None)),
    "both": (ONE_KV_HEAD, {"x": 2, "y": 4}, ("x", None, "y")),
    "heads, in the keys": (EIGHT_IN_KEYS, {"x": 8}, (None, "x", "x")),
    "heads, apart": (APART, {"x": 8}, (None, "x", "x")),
}


@pytest.mark.parametrize(
    ("split", "kind"),
    [
        *((split, AxisType.Auto) for split in VALUE_SPLITS),
        *((split, AxisType.Explicit) for split in ("both", "heads, apart")),
    ],
    ids=str,
)
def test_partitioned_values_apart_or_in_the_keys(split: str, kind: AxisType) -> None:
    """Values and gradients; only what a pool on all devices is the sum of is added up."""
    case, sizes, (rows, kv_heads, heads) = VALUE_SPLITS[split]
    problem, mesh = Problem.of(case), mesh_of(kind, **sizes)
    q, k_pages, v_pages, *rest = problem.operands
    pools = finite((k_pages,) if v_pages is None else (k_pages, v_pages))

    def attend(q: Any, pools: Any, *rest: Any) -> Any:
        return problem.attend(q, pools[0], pools[1] if len(pools) > 1 else None, *rest)

    def both(q: Any, pools: Any, *rest: Any) -> Any:
        gradients = jax.grad(lambda q, pools: loss(attend(q, pools, *rest)), (0, 1))(q, pools)
        return attend(q, pools, *rest), gradients

    pool, (_, _, _, *rest_specs) = P(None, None, kv_heads), problem.specs(rows, kv_heads, heads)
    operands = (*finite((q,)), pools, *rest)
    want = jax.jit(both)(*operands)
    with within(mesh):
        placed = [
            jax.tree.map(lambda x, spec=spec: jax.device_put(x, NamedSharding(mesh, spec)), x)
            for x, spec in zip(operands, (P(rows, heads), pool, *rest_specs), strict=True)
        ]
        compiled = jax.jit(both).lower(*placed).compile()
        got = compiled(*placed)
    assert_same(got, want)
    assert set(collectives(compiled)) == (set() if kv_heads else {"all-reduce"})
    assert got[0][0].sharding.is_equivalent_to(NamedSharding(mesh, P(rows, heads)), 3)


POOLS = {
    "split": P(None, None, "x"),
    "interleaved": P(None, None, "x"),
    "head_major": P("x"),
    "values_in_keys": P(None, None, "x"),
}


@pytest.mark.parametrize("derivative", ["forward", "gradient"])
@pytest.mark.parametrize("layout", ["interleaved", "head_major"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_partitioned_over_pools_of_other_layouts(kind: AxisType, layout: str, derivative: str) -> None:
    """Heads are split where the pools lie, without moving an operand; forward, queries may be on every device."""
    case: Case = {"interleaved": RAGGED, "head_major": DECODE}[layout]
    scaled = functools.partial(compat.ragged_paged_attention, sm_scale=0.25)
    function: Any = {"interleaved": scaled, "head_major": compat.paged_attention}[layout]
    q, k_pages, v_pages, sinks, k_scale, *where = finite(Problem.of(case).operands)
    pools = harness.in_layout(layout, k_pages, v_pages)
    where_specs = [P()] * len(where)
    if layout == "interleaved":
        where.append(np.full(1, len(case.kv_lens), np.int32))
        where_specs.append(P())
    else:  # with a scale per token and head
        where += [np.linspace(0.5, 1.5, pool[..., 0].size, dtype=np.float32).reshape(pool.shape[:3]) for pool in pools]
        where_specs += [POOLS[layout]] * 2

    def attend(q: Any, sinks: Any, k_scale: Any, *operands: Any) -> Any:
        return function(q, *operands, sinks=sinks, k_scale=k_scale, return_lse=True)

    def gradient(*operands: Any) -> Any:
        return jax.grad(lambda *xs: loss(attend(*xs)), (0, 1, *range(3, 3 + len(pools))))(*operands)

    run, heads = (attend, None) if derivative == "forward" else (gradient, "x")
    operands, mesh = (q, sinks, k_scale, *pools, *where), mesh_of(kind, x=8)
    want = jax.jit(run)(*operands)
    specs = (P(None, heads), P("x"), P("x"), *[POOLS[layout]] * len(pools), *where_specs)
    with within(mesh):
        compiled, placed = compile_sharded(run, operands, mesh, specs)
        assert_same(compiled(*placed), want)
    assert collectives(compiled) == []


def test_levanters_call_is_partitioned_by_head() -> None:
    q, k_pages, v_pages, _, _, *where = finite(Problem.of(RAGGED).operands)
    rows = q.reshape(len(q), 8, -1, q.shape[-1])
    operands = (rows, harness.interleave(k_pages, v_pages), *where, np.full(1, len(RAGGED.kv_lens), np.int32), 0.25)
    specs = (P(None, "x"), P(None, None, "x"), *[P()] * 5)
    attend = compat.levanter.ragged_paged_attention
    compiled, placed = compile_sharded(attend, operands, mesh_of(x=8), specs)
    out = compiled(*placed)
    assert_same(out, jax.jit(attend)(*operands))
    assert collectives(compiled) == []
    assert out.sharding.spec[1] == "x"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pools_by_head_alone_are_enough(kind: AxisType) -> None:
    """Queries that every device has are cut where they are."""
    problem, mesh = Problem.of(DECODE), mesh_of(kind, x=8)
    with within(mesh):
        compiled, placed = compile_sharded(problem.attend, problem.operands, mesh, problem.specs(kv_heads="x"))
        assert_same(compiled(*placed), jax.jit(problem.attend)(*problem.operands))
    assert collectives(compiled) == []


@pytest.mark.parametrize(
    ("case", "pool", "q"),
    [
        (DECODE, P("x"), P()),
        (DECODE, P(None, None, None, "x"), P(None, None, "x")),
        (DECODE, P(None, None, "x"), P("x")),
        (RAGGED, P(), P("x")),
        (TWO_KV_HEADS, P(), P(None, "x")),
    ],
    ids=["by page", "by head dim", "one axis for both", "ragged by row", "more shards than heads, of one axis"],
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_other_shardings_give_the_same(kind: AxisType, case: Case, pool: P, q: P) -> None:
    problem, mesh = Problem.of(case), mesh_of(kind, x=8)
    rows, k_pages, v_pages, *rest = problem.operands
    k_pages, v_pages = (np.pad(x, ((0, 40 - len(x)), (0, 0), (0, 0), (0, 0))) for x in (k_pages, v_pages))
    rows = np.pad(rows, ((0, -len(rows) % 8), (0, 0), (0, 0)))
    operands, specs = (rows, k_pages, v_pages, *rest), (q, pool, pool, *[P()] * len(rest))
    with within(mesh):
        compiled, placed = compile_sharded(problem.attend, operands, mesh, specs)
        assert_same(compiled(*placed), jax.jit(problem.attend)(*map(np.asarray, operands)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("split", np.float32),
        ("split", np.int8),
        ("interleaved", np.int8),
        ("head_major", np.float32),
        ("values_in_keys", np.int8),
    ],
)
def test_write_is_in_place_on_each_device(kind: AxisType, layout: str, dtype: Any) -> None:
    mesh, rng = mesh_of(kind, x=8), np.random.default_rng(0)
    k_pages, v_pages = (rng.integers(-9, 9, (6, 4, 8, 16)).astype(dtype) for _ in "kv")
    pools = harness.in_layout(layout, k_pages, v_pages)
    tokens = tuple(rng.standard_normal((5, 8, 16), np.float32) for _ in "kv")
    slots, scale = np.array([3, -1, 23, 3, 24], np.int32), np.linspace(0.1, 0.8, 8, dtype=np.float32)

    def write(*args: Any) -> Any:
        return harness.write_in_layout(*args[:-1], layout=layout, k_scale=args[-1], v_scale=args[-1])

    def addresses(arrays: Any) -> list[int]:
        return [shard.data.unsafe_buffer_pointer() for x in arrays for shard in x.addressable_shards]

    operands, count = (*pools, *tokens, slots, scale), len(pools)
    specs = (*[POOLS[layout]] * count, P(None, "x"), P(None, "x"), P(), P("x"))
    want = jax.jit(write)(*operands)
    with within(mesh):
        compiled, placed = compile_sharded(write, operands, mesh, specs, donate_argnums=range(count))
        placed[:count] = map(jax.jit(jnp.copy), placed[:count])  # memory of NumPy's cannot be donated
        before = addresses(placed[:count])
        got = compiled(*placed)
    assert addresses(got) == before
    assert collectives(compiled) == []
    shard = {"interleaved": "6,4,2,16", "head_major": "1,6,4,16"}.get(layout, "6,4,1,16")
    assert not re.search(rf"\[{shard}\]\S* copy\(", compiled.as_text())
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_layers_of_writes_and_attention_in_a_scan_move_nothing(kind: AxisType) -> None:
    """Forward and gradient, checkpointed, with a flat pool that the scan carries."""
    mesh, problem = mesh_of(kind, x=8), Problem.of(DECODE)
    q, k_pages, v_pages, sinks, _, tables, lengths = finite(problem.operands)
    slots = np.array([tables[b, (max(n, 1) - 1) // 8] * 8 + (n - 1) % 8 if n else -1 for b, n in enumerate(lengths)])

    def model(q: Any, k_pages: Any, v_pages: Any, sinks: Any, tables: Any, lengths: Any, slots: Any) -> Any:
        @jax.checkpoint
        def layer(state: Any, _: Any) -> Any:
            x, k_pages, v_pages = state
            k_pages, v_pages = jpa.write_kv_pages(k_pages, v_pages, x[:, ::2], x[:, 1::2], slots)
            return (x + jpa.paged_attention(x, k_pages, v_pages, tables, lengths, sinks=sinks), k_pages, v_pages), None

        (x, *pools), _ = jax.lax.scan(layer, (q, k_pages, v_pages), length=3)
        return (x**2).sum() + sum((p**2).sum() for p in pools)

    step = jax.value_and_grad(model, (0, 1, 2))
    operands = (q, k_pages, v_pages, sinks, tables, lengths, slots.astype(np.int32))
    pool = P(None, None, "x")
    with within(mesh):
        compiled, placed = compile_sharded(step, operands, mesh, (P(None, "x"), pool, pool, P("x"), P(), P(), P()))
        got = compiled(*placed)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(step)(*operands)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-5 * np.abs(theirs).max())
    # The value alone is a sum over devices.
    assert set(collectives(compiled)) == {"all-reduce"}


def test_mapped_calls_are_partitioned() -> None:
    problem, mesh = Problem.of(DECODE), mesh_of(x=8)
    q, *rest = problem.operands
    mapped = jax.vmap(problem.attend, in_axes=(0, *[None] * len(rest)))
    operands = (np.stack([q, 2 * q]), *rest)
    specs = problem.specs(kv_heads="x", heads="x")
    compiled, placed = compile_sharded(mapped, operands, mesh, (P(None, None, "x"), *specs[1:]))
    assert_same(compiled(*placed), jax.jit(mapped)(*operands))
    assert collectives(compiled) == []


def test_a_mesh_that_no_array_names() -> None:
    """NumPy arrays under `set_mesh`."""
    problem = Problem.of(DECODE)
    want = jax.jit(problem.attend)(*problem.operands)
    with jax.set_mesh(mesh_of(x=2, y=4)):
        assert_same(jax.jit(lambda *xs: problem.attend(*xs))(*problem.operands), want)


LAYER_SPLITS = {"heads": ({"x": 8}, "x", "x", 8), "more shards than heads": ({"x": 2, "y": 4}, ("x", "y"), "x", 2)}


@pytest.mark.parametrize("with_step", [True, False], ids=["step", "no step"])
@pytest.mark.parametrize("split", LAYER_SPLITS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_layer_is_partitioned_by_head(kind: AxisType, split: str, with_step: bool) -> None:
    """Values and gradients of `PagedSelfAttention`, by sums alone; tokens are on no mesh."""
    sizes, heads, kv_heads, num_kv_heads = LAYER_SPLITS[split]
    mesh = mesh_of(kind, **sizes)
    layer = PagedSelfAttention(64, 16, num_kv_heads, 16, use_bias=True, rngs=nnx.Rngs(0))
    layer.init_cache(num_pages=16, page_size=8, dtype=jnp.float32)
    step = StepMetadata.whole_sequences(num_seqs=2, length=20, page_size=8) if with_step else None
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 64) if with_step else (2, 20, 64)), jnp.float32)
    graphdef, cache, weights = nnx.split(layer, CacheVariable, ...)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(weights: Any, x: Any, cache: Any) -> Any:
        layer = nnx.merge(graphdef, cache, weights, copy=True)
        y = layer(x, step)
        return (y**2).sum(), (y, nnx.state(layer, CacheVariable))

    def place(path: Any, value: Any) -> Any:
        name = jax.tree_util.keystr(path)
        by_head = kv_heads if any(part in name for part in ("k_proj", "v_proj", "pages")) else heads
        if "o_proj" in name:
            spec = P() if "bias" in name else P(by_head)
        else:
            spec = P(
                *[None] * {"kernel": 1, "bias": 0, "_pages": 2}[re.findall("kernel|bias|_pages", name)[0]], by_head
            )
        return jax.device_put(value, NamedSharding(mesh, spec))

    placed = jax.tree_util.tree_map_with_path(place, weights), x, jax.tree_util.tree_map_with_path(place, cache)
    compiled = jax.jit(run).lower(*placed).compile()
    got, want = jax.tree.leaves(compiled(*placed)), jax.tree.leaves(jax.jit(run)(weights, x, cache))
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    assert set(collectives(compiled)) == {"all-reduce"}


@pytest.mark.parametrize("with_step", [True, False], ids=["step", "no step"])
def test_a_layer_of_fewer_heads_than_shards_of_one_axis(with_step: bool) -> None:
    """Right, though queries are gathered; also where tokens are split."""
    mesh = mesh_of(AxisType.Explicit, x=8)
    layer = PagedSelfAttention(64, 16, 2, 16, rngs=nnx.Rngs(0))
    layer.init_cache(num_pages=16, page_size=8, dtype=jnp.float32)
    step = StepMetadata.whole_sequences(num_seqs=2, length=20, page_size=8) if with_step else None
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 64) if with_step else (2, 40, 64)), jnp.float32)
    graphdef, state = nnx.split(layer)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, step))
    specs = {"q_proj": P(None, "x"), "o_proj": P("x")}

    def place(path: Any, value: Any) -> Any:
        names = [spec for name, spec in specs.items() if name in jax.tree_util.keystr(path)]
        return jax.device_put(value, NamedSharding(mesh, names[0] if names else P()))

    rows = jax.device_put(x, NamedSharding(mesh, P("x") if with_step else P(None, "x")))
    placed = jax.tree_util.tree_map_with_path(place, state)
    for tokens in (x, rows):
        y = run(placed, tokens)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, jax.typeof(tokens).sharding.spec), y.ndim)
        np.testing.assert_allclose(y, run(state, x), rtol=1e-4, atol=1e-5)


SERVED = DecoderConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=16,
    num_key_value_heads=8, head_dim=8, max_position_embeddings=96, sliding_windows=(9, None),
)  # fmt: skip


def served(model: Decoder, requests: int = 12, **options: Any) -> list[list[int]]:
    """Outputs of requests that share prefixes and a pool in which they have to preempt; nothing is moved or traced."""
    engine = Engine(model.served(), num_pages=3 * requests, page_size=4, max_seqs=6, buckets=(6, 24), **options)
    engine.warm_up()
    traces, places = engine.traces, pool_pointers(engine)
    draw = np.random.default_rng(0)
    generations = [
        engine.submit(
            Request(draw.integers(0, 96, draw.integers(1, 40)), int(draw.integers(1, 30)), temperature=index % 3 / 2)
        )
        for index in range(requests)
    ]
    engine.run()
    assert engine.stats.preemptions >= 1
    assert (engine.traces, pool_pointers(engine), engine.pages_in_use) == (traces, places, 0)
    return [generation.output for generation in generations]


def pool_pointers(engine: Engine) -> list[int]:
    return sorted(shard.data.unsafe_buffer_pointer() for x in engine._cache for shard in x.addressable_shards)


def test_an_engine_is_partitioned_by_head() -> None:
    """The serving engine on a mesh gives the tokens that it gives on one device, in f32, with two layer groups."""
    want = served(Decoder(SERVED, rngs=nnx.Rngs(0)))
    for fused, options in ((False, {}), (True, {"decode_steps": 4}), (True, {"num_drafts": 2})):
        model = Decoder(SERVED, rngs=nnx.Rngs(0))
        if fused:
            model.fuse()
        model.shard(mesh_of(x=8), "x")
        assert served(model, **options) == want


FAMILY_OF_ALL = {
    "gemma with experts": dataclasses.replace(
        SERVED, norm=OffsetNorm, block=SandwichBlock, qk_norm=True, sliding_windows=(9, None), local_rope_theta=50.0,
        embedding_scale=3.0, attention_soft_cap=2.0, logit_soft_cap=5.0, tie_word_embeddings=True,
        experts=Experts(4, 2, 16, normalised=False), dense_layers=(0,),
    ),
    "gpt-oss": dataclasses.replace(
        SERVED, vocab_size=97, sinks=True, attention_bias=True, rotary_dim=4,
        experts=ClampedExperts(5, 3, 8, limit=0.5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY_OF_ALL)
def test_what_is_special_about_a_family_is_partitioned(name: str) -> None:
    """Models with 8 key/value heads on 8 devices, beside the same on one device."""
    config = FAMILY_OF_ALL[name]
    want = served(Decoder(config, rngs=nnx.Rngs(0)), requests=6)
    model = Decoder(config, rngs=nnx.Rngs(0))
    mesh = mesh_of(x=8)
    model.shard(mesh, "x")
    model.fuse()  # keeps the joined weights where they were
    assert served(model, requests=6) == want
    joined = model.layers[1].self_attn.qkv_proj
    assert joined is not None
    assert joined.kernel[...].sharding == NamedSharding(mesh, P(None, "x", None, None))


# One Llama stands for those with other rotary embeddings, which are the same on each device.
LOADED = [folder for folder in sorted(PARITY.glob("*/")) if folder.name not in ("llama-dynamic", "llama-yarn")]


@pytest.mark.parametrize("folder", LOADED, ids=lambda folder: folder.name)
def test_a_loaded_family_gives_the_tokens_of_transformers(folder: Path) -> None:
    """On half of the axes of a mesh, since most have two key/value heads: sums alone, and no page is moved.

    All eight devices share the 8 heads of DeepSeek V3, and each has all of the latents.
    """
    want, mesh = load_file(folder / "expected.safetensors"), mesh_of(x=4, y=2)
    if folder.name == "deepseek-v3":
        mesh = mesh_of(y=8)
    model = checkpoint.load(folder, mesh=mesh, axis="y").model
    model.fuse()
    tokens, greedy = jnp.asarray(want["tokens"], jnp.int32), want["greedy"].tolist()
    model.init_cache(10, 4)
    graphdef, cache, weights = nnx.split(model, CacheVariable, ...)

    def run(cache: Any, weights: Any, step: StepMetadata) -> Any:
        merged = nnx.merge(graphdef, cache, weights)
        return merged(tokens, step), nnx.state(merged, CacheVariable)

    step = StepMetadata.whole_sequences(1, len(tokens), 4)
    compiled = jax.jit(run, donate_argnums=0).lower(cache, weights, step).compile()
    assert set(collectives(compiled)) == {"all-reduce"}
    logits, _ = compiled(cache, weights, step)
    assert np.linalg.norm(logits - want["logits"]) < 1e-5 * np.linalg.norm(want["logits"])

    pools: Any = {"num_pages": 24, "window_pages": 12 if None in model.config.windows else 6, "page_size": 4}
    engine = Engine(model.served(), **pools, max_seqs=3, buckets=(3, 8), decode_steps=2)
    generations = [engine.submit(Request(greedy[:18], len(greedy) - 18)) for _ in range(3)]
    engine.run()
    assert [generation.tokens for generation in generations] == [greedy] * 3
    assert engine.stats.preemptions >= 1


@pytest.mark.parametrize(
    ("changes", "axis", "message"),
    [
        ({"num_key_value_heads": 4}, "x", "axis: expected a size that divides num_key_value_heads = 4, got 8"),
        (
            {"latent": Latent(16, 8, 12, 10), "block": LatentBlock, "num_attention_heads": 12, "sliding_windows": None},
            "x",
            "axis: expected a size that divides num_attention_heads = 12, got 8",
        ),
        ({"intermediate_size": 36}, "x", "axis: expected a size that divides intermediate_size = 36, got 8"),
        ({"experts": Experts(8, 2, 12)}, "x", "axis: expected a size that divides experts.size = 12, got 8"),
        ({}, "y", "axis: expected an Auto axis of the mesh, got 'y'"),
    ],
    ids=["heads", "heads of a latent", "inner columns", "experts", "axis"],
)
def test_a_model_that_no_axis_divides_is_not_partitioned(changes: dict[str, Any], axis: str, message: str) -> None:
    model = Decoder(dataclasses.replace(SERVED, **changes), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        model.shard(mesh_of(x=8), axis)
    with pytest.raises(ValueError, match="axis: expected an Auto axis of the mesh"):
        model.shard(mesh_of(AxisType.Explicit, x=8), "x")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_values_are_checked_where_they_are(kind: AxisType) -> None:
    """`debug` over sharded arrays, eager and jitted, with shards of heads and with sequences split."""
    problem, mesh = Problem.of(DECODE), mesh_of(kind, x=2, y=4)
    operands = list(finite(problem.operands))
    where = problem.operands[-2:]
    assert [x.ndim for x in where] == [2, 1]
    wrong = [*operands[:-1], where[1] + np.array([0, 0, 0, 99, 0, 0, 0, 0], np.int32)]
    specs = problem.specs(rows="x", kv_heads="y", heads="y")
    with within(mesh), jpa.debug():
        attend = jax.jit(problem.attend)
        for values, fine in ((operands, True), (wrong, False)):
            placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(values, specs, strict=True)]
            for call in (problem.attend, attend):
                try:
                    jax.block_until_ready(call(*placed))
                    said = ""
                except (ValueError, jax.errors.JaxRuntimeError) as error:
                    said = str(error)
                assert ("lengths: expected 0 to 32 tokens" in said) != fine
                assert ("got 131 in row 3" in said) != fine


# ---- Inside shard_map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [{"x"}, {"x", "y"}], ids=["some axes", "all axes"])
@pytest.mark.parametrize("derivative", ["forward", "gradient"])
def test_shard_map_is_the_same_as_no_mesh(derivative: str, axes: set[str]) -> None:
    """Sequences by x and heads by y; the operands that a device shares with others get one gradient."""
    problem, mesh = Problem.of(DECODE), mesh_of(x=2, y=4)
    operands = finite(problem.operands)
    manual = {"rows": "x"} if axes == {"x"} else {"rows": "x", "kv_heads": "y", "heads": "y"}
    specs = problem.specs(**manual)
    mapped = jax.shard_map(
        problem.attend, mesh=mesh, in_specs=specs, out_specs=(specs[0], specs[0]), axis_names=axes, check_vma=True
    )
    everywhere = problem.specs(rows="x", kv_heads="y", heads="y")
    compiled, placed = compile_sharded(derived(mapped, derivative), operands, mesh, everywhere)
    assert_same(compiled(*placed), jax.jit(derived(problem.attend, derivative))(*operands))


def test_vmap_inside_and_outside_shard_map() -> None:
    problem, mesh = Problem.of(DECODE), mesh_of(x=8)
    q, *rest = problem.operands
    stacked = np.stack([q, -q, 2 * q])
    specs, unmapped = problem.specs(kv_heads="x", heads="x"), (None,) * len(rest)
    want = jax.jit(jax.vmap(problem.attend, in_axes=(0, *unmapped)))(stacked, *rest)
    inner = jax.vmap(problem.attend, in_axes=(0, *unmapped))
    by_head = P(None, None, "x")
    inside = jax.shard_map(inner, mesh=mesh, in_specs=(by_head, *specs[1:]), out_specs=(by_head, by_head))
    assert_same(jax.jit(inside)(stacked, *rest), want)
    shards = jax.shard_map(problem.attend, mesh=mesh, in_specs=specs, out_specs=(specs[0], specs[0]))
    assert_same(jax.jit(jax.vmap(shards, in_axes=(0, *unmapped)))(stacked, *rest), want)


def test_export_inside_shard_map_on_a_mesh_without_devices() -> None:
    problem, abstract = Problem.of(DECODE), AbstractMesh((8,), ("x",))
    specs = problem.specs(kv_heads="x", heads="x")
    mapped = jax.shard_map(problem.attend, mesh=abstract, in_specs=specs, out_specs=(specs[0], specs[0]))
    args = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(abstract, spec))
        for x, spec in zip(problem.operands, specs, strict=True)
    ]
    exported = jax.export.export(jax.jit(mapped), disabled_checks=OURS, platforms=("cpu",))(*args)
    again = jax.export.deserialize(exported.serialize())
    mesh = mesh_of(x=8)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(problem.operands, specs, strict=True)]
    assert_same(jax.jit(again.call)(*placed), jax.jit(problem.attend)(*problem.operands))


# ---- Context parallelism ---------------------------------------------------------------------------------------------

LONG = Case(
    "context", (1,) * 4, (96, 77, 3, 0), "paged_attention", num_heads=4, num_kv_heads=2, head_dim=16, page_size=4,
    max_pages=24, sinks=True, k_scale=0.5, bad_ids=((0, 5, -1),),
)  # fmt: skip
CONTEXTS = {
    "decode": LONG,
    "decode capped": dataclasses.replace(LONG, keywords={"soft_cap": 2.0}),
    "decode with a window": dataclasses.replace(LONG, keywords={"sliding_window": 9}),
    "prompts": dataclasses.replace(LONG, q_lens=(20, 5, 3, 2), rows=32, function="ragged_paged_attention"),
    "prompts with a window": dataclasses.replace(
        LONG, q_lens=(20, 5, 3, 2), num_seqs=3, function="ragged_paged_attention", keywords={"sliding_window": 7}
    ),
    "prompts without a mask": dataclasses.replace(
        LONG, q_lens=(20, 5, 3, 2), function="ragged_paged_attention", keywords={"causal": False}
    ),
}


@dataclasses.dataclass(frozen=True)
class Spread:
    """Pages distributed over the devices, page i to `owner[i]`: each has a pool, and tables of the pages in it."""

    owner: Array
    local_id: Array

    @classmethod
    def evenly(cls, num_pages: int, devices: int) -> Spread:
        owner = np.random.default_rng(3).integers(0, devices, num_pages)
        return cls(owner, np.array([(owner[:i] == owner[i]).sum() for i in range(num_pages)], np.int32))

    def pools(self, pages: Array, devices: int) -> Array:
        """`[devices, P, S, K, H]`; what nobody uses is NaN."""
        pools = np.full((devices, self.local_id.max() + 1, *pages.shape[1:]), np.nan, pages.dtype)
        pools[self.owner, self.local_id] = pages
        return pools

    def tables(self, tables: Array, devices: int) -> Array:
        """`[devices, B, M]`, −1 where another device has the page."""
        known = (tables >= 0) & (tables < len(self.owner))
        ids = np.where(known, tables, 0)
        mine = known & (self.owner[ids] == np.arange(devices)[:, None, None])
        return np.where(mine, self.local_id[ids], -1).astype(np.int32)


@pytest.mark.parametrize(
    ("name", "check_vma"), [*((name, True) for name in CONTEXTS), ("decode", False), ("prompts", False)], ids=str
)
def test_context_parallel_is_attention_over_all_pages(name: str, check_vma: bool) -> None:
    """Results and gradients, by one small collective."""
    case, mesh = CONTEXTS[name], mesh_of(x=8)
    inputs = build(case)
    (q, k_pages, v_pages, *_), traced = inputs.arguments()
    q, k_pages, v_pages, sinks = finite((q, k_pages, v_pages, traced["sinks"]))
    spread = Spread.evenly(len(k_pages), 8)
    tables = spread.tables(inputs.block_tables, 8)
    ragged = {} if inputs.decode else {"cu_q_lens": inputs.cu_q_lens, "num_seqs": inputs.num_seqs}

    def part(q: Any, k_pages: Any, v_pages: Any, sinks: Any, tables: Any) -> Any:
        keywords = {**ragged, **case.keywords, "sinks": sinks, "k_scale": case.k_scale, "return_lse": True}
        mine = (q, k_pages[0], v_pages[0], tables[0], inputs.kv_lens)
        return jpa.context_parallel_attention(*mine, axis_name="x", **keywords)

    by_device = (P(), P("x"), P("x"), P(), P("x"))
    spread_attend = jax.shard_map(part, mesh=mesh, in_specs=by_device, out_specs=(P(), P()), check_vma=check_vma)
    whole = Problem.of(case)
    operands = (q, k_pages, v_pages, sinks, *whole.operands[4:])
    pools = [spread.pools(pages, 8) for pages in (k_pages, v_pages)]

    compiled, placed = compile_sharded(spread_attend, (q, *pools, sinks, tables), mesh, by_device)
    assert_same(compiled(*placed), jax.jit(whole.attend)(*operands))
    assert collectives(compiled) == ["all-gather"]
    rows, heads, head_dim = q.shape
    assert f"f32[8,{rows},{heads},{head_dim + 1}]" in compiled.as_text()

    grads = jax.jit(derived(spread_attend, "gradient"))(q, *pools, sinks, tables)
    want = jax.jit(derived(whole.attend, "gradient"))(*operands)
    dealt = [np.asarray(grad)[spread.owner, spread.local_id] for grad in grads[1:3]]
    assert_same((grads[0], *dealt, grads[3]), want)


@pytest.mark.parametrize("name", ["decode", "prompts"])
def test_context_parallel_over_one_pool(name: str) -> None:
    """Pages of keys that hold the values, spread over devices; results and gradients."""
    case = dataclasses.replace(CONTEXTS[name], value_dim=9, values_in_keys=True)
    inputs, mesh = build(case), mesh_of(x=8)
    q, k_pages = finite((inputs.q, inputs.k_pages))
    spread = Spread.evenly(len(k_pages), 8)
    tables = spread.tables(inputs.block_tables, 8)
    ragged = {} if inputs.decode else {"cu_q_lens": inputs.cu_q_lens, "num_seqs": inputs.num_seqs}
    keywords = {**case.keywords, "sinks": inputs.sinks, "k_scale": case.k_scale, "value_dim": 9, "return_lse": True}

    def part(q: Any, k_pages: Any, tables: Any) -> Any:
        mine = (q, k_pages[0], None, tables[0], inputs.kv_lens)
        return jpa.context_parallel_attention(*mine, axis_name="x", **ragged, **keywords)

    def whole(q: Any, k_pages: Any) -> Any:
        _, _, _, *where = inputs.arguments()[0]
        return getattr(jpa, case.function)(q, k_pages, None, *where, **keywords)

    by_device = (P(), P("x"), P("x"))
    spread_attend = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=by_device, out_specs=(P(), P())))
    operands = (q, spread.pools(k_pages, 8), tables)
    assert_same(spread_attend(*operands), jax.jit(whole)(q, k_pages))
    grads = jax.jit(jax.grad(lambda *xs: loss(spread_attend(*xs, tables)), (0, 1)))(*operands[:2])
    want = jax.jit(jax.grad(lambda *xs: loss(whole(*xs)), (0, 1)))(q, k_pages)
    assert_same((grads[0], np.asarray(grads[1])[spread.owner, spread.local_id]), want)


def test_context_parallel_says_what_is_wrong() -> None:
    inputs = build(LONG)
    operands = (inputs.q, inputs.k_pages, inputs.v_pages, inputs.block_tables, inputs.kv_lens)
    with pytest.raises(ValueError, match=r"^axis_name: expected an axis of the enclosing shard_map, got 'x'"):
        jpa.context_parallel_attention(*operands, axis_name="x")
    for keywords, message in (({"num_seqs": 1}, "^num_seqs: expected None"), ({"causal": False}, "^causal: expected")):
        attend = functools.partial(jpa.context_parallel_attention, axis_name="x", **keywords)
        with pytest.raises(ValueError, match=message):
            jax.shard_map(attend, mesh=mesh_of(x=8), in_specs=(P(),) * 5, out_specs=P())(*operands)


# ---- Calls that write ------------------------------------------------------------------------------------------------

RPA_CALLS = {
    "packed, bf16": RpaCall("s1", (5, 1), (9, 7), num_heads=16, kv_heads=8, dtype="bf16", poisoned=False),
    "packed, f32": RpaCall("s2", (5, 1), (9, 7), num_heads=16, kv_heads=8, poisoned=False),
    "pairs of e4m3": RpaCall(
        "s3", (5, 1), (9, 7), num_heads=32, kv_heads=32, head_dim=64, cache_dtype="e4m3", cache="pairs", sinks=True,
        poisoned=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("by", ["shard_map", "jit"])
@pytest.mark.parametrize("name", RPA_CALLS)
def test_partitioned_calls_that_write(name: str, by: str) -> None:
    """Heads are split over a donated cache, by `shard_map` as other packages do it, or by XLA.

    XLA gathers a cache whose first axis of heads counts neither K nor 2K; docs/sharding.md says so.
    """
    call, mesh = RPA_CALLS[name], mesh_of(x=8)
    is_gathered = by == "jit" and name.startswith("pairs")
    arrays = build_rpa(call)
    specs = {name: P(None, "x") for name in ("queries", "keys", "values")}
    specs |= {"kv_cache": P(None, None, "x"), "attention_sink": P("x")}
    specs = {name: specs.get(name, P()) for name in arrays}

    def step(arrays: dict[str, Any]) -> Any:
        return compat.ragged_paged_attention_v3(**arrays, return_lse=True)

    results = (P(None, "x"), P(None, None, "x"), P(None, "x"))
    run = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=results) if by == "shard_map" else step
    placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}
    compiled = jax.jit(run, donate_argnums=0).lower(placed).compile()
    assert (collectives(compiled) != []) == is_gathered
    got = compiled(placed)
    for x, want in zip(got, jax.jit(step)(arrays), strict=True):
        np.testing.assert_array_equal(np.asarray(x).astype(np.float32), np.asarray(want).astype(np.float32))
    assert is_gathered or got[1].sharding.is_equivalent_to(NamedSharding(mesh, results[1]), got[1].ndim)
