"""Values of another head dim than keys, and values that are the first numbers of each key: writes, caches, MLA."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import dense
import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BY_NAME, DTYPES, OUT_BOUND, Array, build, random_values
from harness import assert_same_bits, normal_like, pull_back, to_f64

import jax_paged_attn as jpa
from jax_paged_attn import _engines, _ffi, _options, _reference

P, S, K, H = 7, 3, 2, 16
SCALES = {"none": None, "head": np.array([0.5, 3.0], np.float32)}
# The head dim of values; None: they are in the keys.
FORMS = {"in keys": None, "narrow": 5, "wide": 24}
SLOTS = np.array([-1, P * S, 4, P * S - 1, 0, 4], np.int32)  # of two tokens for slot 4 the last wins


def arrays(value_dim: int | None, leading: tuple[int, ...], dtype: str, seed: int = 0) -> tuple[Array, Any]:
    """Pools, or new tokens, of keys and of values."""
    rng = np.random.default_rng(seed)
    keys = random_values(rng, (*leading, K, H), DTYPES[dtype])
    return keys, None if value_dim is None else random_values(rng, (*leading, K, value_dim), DTYPES[dtype])


def written_by_the_reference(*operands: Any, k_scale: Any, v_scale: Any) -> Any:
    """The fallback of platforms without an engine, which takes the operands of the primitive."""
    k_pages, v_pages, k, v, slots = operands
    rows = [np.zeros((0, K), np.float32) if s is None else np.full((1, K), s, np.float32) for s in (k_scale, v_scale)]
    if v_pages is None:
        return *_reference.write(k_pages, k, k[..., :0], slots, *rows, layout="values_in_keys"), None
    return _reference.write(k_pages, v_pages, k, v, slots, *rows)


def assert_same(got: Any, want: Any) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert_same_bits(mine, theirs)


# ---- Writes and copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [functools.partial(harness.call, "write_kv_pages"), written_by_the_reference])
@pytest.mark.parametrize("page_dtype", ["f32", "bf16", "e4m3", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_write_matches_the_oracle(form: str, page_dtype: str, write: Any) -> None:
    operands = (*arrays(FORMS[form], (P, S), page_dtype), *arrays(FORMS[form], (6,), "f32", seed=1), SLOTS)
    for scale in SCALES.values():
        if scale is None and page_dtype == "int8":
            continue
        scales = {"k_scale": scale, "v_scale": None if FORMS[form] is None else scale}
        assert_same(write(*operands, **scales), oracle.write_kv_pages(*operands, **scales))


@pytest.mark.parametrize("form", FORMS)
def test_copy_matches_the_oracle(form: str) -> None:
    pools = arrays(FORMS[form], (P, S), "bf16")
    src, dst = np.array([0, 1, 2, -1, 5], np.int32), np.array([1, 0, 6, 3, P], np.int32)
    assert_same(harness.call("copy_kv_pages", *pools, src, dst), oracle.copy_kv_pages(*pools, src, dst))


@pytest.mark.parametrize("form", FORMS)
def test_donated_pages_are_updated_in_place(form: str) -> None:
    """By a write and a copy, in a scan that reads what the step before has written."""
    value_dim = FORMS[form]
    held = [jax.device_put(x) + 0 for x in arrays(value_dim, (P, S), "f32") if x is not None]

    def step(pools: Any, slot: Any) -> Any:
        k_pages, v_pages = pools[0], pools[1] if len(pools) > 1 else None
        v = None if value_dim is None else jnp.ones((1, K, value_dim))
        k_pages, v_pages = jpa.write_kv_pages(k_pages, v_pages, k_pages[0, :1] + 1, v, slot[None])  # pyright: ignore
        k_pages, v_pages = jpa.copy_kv_pages(k_pages, v_pages, slot[None] // S, jnp.array([5], jnp.int32))
        tables, lengths = jnp.zeros((1, 1), jnp.int32), jnp.full(1, S, jnp.int32)
        size: dict[str, Any] = {"value_dim": H // 2} if value_dim is None else {}
        out = jpa.paged_attention(jnp.ones((1, K, H)), k_pages, v_pages, tables, lengths, **size)
        return (k_pages,) if v_pages is None else (k_pages, v_pages), out

    @functools.partial(jax.jit, donate_argnums=0)
    def update(pools: Any) -> Any:
        return jax.lax.scan(step, pools, jnp.array([0, 0, 8], jnp.int32))[0]

    pointers = [x.unsafe_buffer_pointer() for x in held]
    compiled = update.lower(tuple(held)).compile()
    pool = rf"f32[{P},{S},{K},{H}]"
    assert f"{pool} copy(" not in (compiled.as_text() or "")
    assert [x.unsafe_buffer_pointer() for x in compiled(tuple(held))] == pointers


def test_gradient_through_a_write_of_one_pool() -> None:
    """An overwritten key has no influence, neither as a key nor as a value."""
    case = BY_NAME["decode_in_keys"]
    (q, k_pages, _, tables, lengths), _ = build(case).arguments()
    k_pages = np.nan_to_num(k_pages, nan=0.5, posinf=1.0, neginf=-1.0)
    k = np.random.default_rng(7).standard_normal((5, 2, 40)).astype(np.float32)
    newest = [tables[b, (n - 1) // 16] * 16 + (n - 1) % 16 for b, n in enumerate(lengths)]
    slots = np.array([newest[0], newest[1], -1, newest[2], newest[0]], np.int32)

    def paged(q: Any, k_pages: Any, k: Any) -> Any:
        k_pages, _ = jpa.write_kv_pages(k_pages, None, k, None, slots)
        return jpa.paged_attention(q, k_pages, None, tables, lengths, value_dim=24, return_lse=True)

    def simple(q: Any, k_pages: Any, k: Any) -> Any:
        last = np.array([1, 3, 4])
        k_pages = k_pages.reshape(-1, 2, 40).at[slots[last]].set(k[last]).reshape(k_pages.shape)
        return dense.attention(case)(q, k_pages, None)

    operands = (q, k_pages, k)
    bars = normal_like(jax.eval_shape(paged, *operands), 8)
    got = pull_back(paged, operands, bars)
    with jax.enable_x64(True):
        want = pull_back(simple, *to_f64((operands, bars)))
    harness.assert_gradients_close(got, want, 2e-5)


@pytest.mark.parametrize("mapped", ["k_pages", "k", "k_pages and k", "slots"])
def test_vmap_of_a_write_and_attention_is_a_loop(mapped: str) -> None:
    """Values of mapped keys are mapped with them; ids outside a pool never reach the pool of a neighbour."""
    rng = np.random.default_rng(5)
    operands: dict[str, Array] = {
        "k_pages": rng.standard_normal((3, P, S, K, H)).astype(np.float32),
        "k": rng.standard_normal((3, 2, K, H)).astype(np.float32),
        "slots": np.array([[0, P * S], [4, -1], [20, 3]], np.int32),
    }
    axes = {name: 0 if name in mapped.split(" and ") else None for name in operands}
    given = {name: x if axes[name] == 0 else x[0] for name, x in operands.items()}
    tables, lengths = np.array([[0, P], [1, 6], [P + 2, 2]], np.int32), np.array([5, 6, 6], np.int32)
    q = rng.standard_normal((3, 4, H)).astype(np.float32)

    def one(x: dict[str, Any]) -> Any:
        k_pages, _ = jpa.write_kv_pages(x["k_pages"], None, x["k"], None, x["slots"])
        return k_pages, jpa.paged_attention(q, k_pages, None, tables, lengths, value_dim=9)

    pools, outs = jax.jit(jax.vmap(one, in_axes=(axes,)))(given)
    for i in range(3):
        alone = {name: operands[name][i if axes[name] == 0 else 0] for name in operands}
        pool, _ = oracle.write_kv_pages(alone["k_pages"], None, alone["k"], None, alone["slots"])
        assert_same_bits(pools[i], pool)
        want, _ = oracle.paged_attention(q, pool, None, tables, lengths, value_dim=9)
        np.testing.assert_allclose(outs[i], want, rtol=1e-5, atol=1e-5)


# ---- PagedKVCache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_cache_attends_to_what_it_holds(form: str, stacked: bool) -> None:
    value_dim = FORMS[form]
    sizes = {"num_pages": P, "page_size": S, "num_kv_heads": K, "head_dim": H}
    own = {"value_dim": 9, "values_in_keys": True} if value_dim is None else {"value_dim": value_dim}
    cache = jpa.PagedKVCache.create(2, **sizes, dtype=jnp.float32, k_scale=0.5, stacked=stacked, **own)
    assert len(jax.tree.leaves(cache)) == (1 if stacked else 2) * (1 if value_dim is None else 2) + 1
    assert (cache.num_pages, cache.page_size, cache.stacked) == (P, S, stacked)
    k, v = arrays(value_dim, (5,), "f32")
    slots = np.array([0, 1, 2, 9, 10], np.int32)
    tables, lengths = np.array([[0, 3], [5, 1]], np.int32), np.array([5, 2], np.int32)
    q = np.random.default_rng(1).standard_normal((2, 4, H)).astype(np.float32)

    @jax.jit
    def step(cache: jpa.PagedKVCache) -> Any:
        cache = cache.write(1, k, v, slots).copy(jnp.array([3]), jnp.array([5]))
        ragged = cache.attend_ragged(1, q, lengths, tables, np.array([0, 1, 2], np.int32))
        return cache, cache.attend(1, q, tables, lengths, return_lse=True), ragged

    new, got, ragged = step(cache)
    assert jax.tree.structure(new) == jax.tree.structure(cache)
    empty = arrays(value_dim, (P, S), "f32")
    k_pages, v_pages = (None if x is None else 0 * x for x in empty)
    assert k_pages is not None
    k_pages, v_pages = oracle.write_kv_pages(k_pages, v_pages, k, v, slots, k_scale=0.5)
    k_pages, v_pages = oracle.copy_kv_pages(k_pages, v_pages, np.array([3], np.int32), np.array([5], np.int32))
    in_keys = {"value_dim": 9} if value_dim is None else {}
    want = oracle.paged_attention(q, k_pages, v_pages, tables, lengths, k_scale=0.5, **in_keys)
    harness.assert_close(got, want, "f32")
    np.testing.assert_allclose(ragged, want[0], rtol=1e-5, atol=1e-5)
    assert new.layer(0, tables)[1] is None or value_dim is not None


def test_a_cache_of_one_pool_is_calibrated_and_has_prefix_trees() -> None:
    sizes = {"num_pages": P, "page_size": S, "num_kv_heads": K, "head_dim": H, "values_in_keys": True, "value_dim": 9}
    full = jpa.PagedKVCache.create(2, **sizes, dtype=jnp.float32)
    full = full.write(0, np.full((1, K, H), -254.0, np.float32), None, np.zeros(1, np.int32))
    scales: Any = full.calibrated_scales(jnp.int8, margin=1)
    assert scales["v_scale"] is None
    np.testing.assert_allclose(scales["k_scale"], [[2.0, 2.0], [1.0, 1.0]])
    cache = jpa.PagedKVCache.create(2, **sizes, dtype=jnp.int8, **scales)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    same = jax.jit(lambda cache: cache, out_shardings=jpa.PagedKVCache(device, device, device))(cache)  # pyright: ignore
    assert jax.tree.structure(same) == jax.tree.structure(cache)
    mapped = jax.vmap(lambda c, _: c.k_pages[0][0, 0, 0, 0], in_axes=(jpa.PagedKVCache(None, None), 0))  # pyright: ignore
    assert mapped(cache, jnp.zeros(3)).shape == (3,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_dim": 17, "values_in_keys": True}, "value_dim: expected at most the 16 numbers of a key, got 17"),
        ({"value_dim": 0}, "value_dim: expected an integer >= 1, got 0"),
        ({"values_in_keys": True, "v_scale": 1.0}, "v_scale: expected None where v_pages is None"),
        ({"values_in_keys": True, "dtype": jnp.int8}, "k_scale: required for int8 pages"),
    ],
)
def test_cache_refuses(changes: dict[str, Any], message: str) -> None:
    sizes = {"num_layers": 1, "num_pages": P, "page_size": S, "num_kv_heads": K, "head_dim": H}
    with pytest.raises(ValueError, match=message):
        jpa.PagedKVCache.create(**{**sizes, **changes})


def test_cache_knows_the_head_dim_of_its_values() -> None:
    cache = jpa.PagedKVCache.create(1, P, S, K, H, values_in_keys=True)
    with pytest.raises(TypeError, match="value_dim: expected none, since the cache has its own, got 8"):
        cache.attend(0, jnp.ones((1, K, H)), [[0]], [1], value_dim=8)  # pyright: ignore[reportCallIssue]


# ---- MLA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_absorbed_mla_is_the_plain_form(engine: str, dtype: str) -> None:
    """One key of latent numbers and a rotated part, shared by all heads, against keys and values of each head."""
    if DTYPES[dtype].name not in harness.engine_row(engine).q_dtypes:
        pytest.skip("takes other dtypes")
    if harness.engine_row(engine).head_dims is not None:
        pytest.skip("has no kernel for these head dims")
    heads, latent, rotated, plain, length = 8, 64, 16, 24, 75
    rng = np.random.default_rng(3)
    q = rng.standard_normal((length, heads, plain + rotated))
    up_k, up_v = rng.standard_normal((2, latent, heads, plain)) / np.sqrt(latent)
    pool = rng.standard_normal((5, 16, 1, latent + rotated)).astype(DTYPES[dtype])
    tokens = pool[[2, 0, 4, 1, 3]].reshape(-1, latent + rotated)[:length].astype(np.float64)
    scale = (plain + rotated) ** -0.5
    # Up-projections move from keys to queries, and from values to outputs.
    absorbed = np.concatenate([np.einsum("tnp,lnp->tnl", q[..., :plain], up_k), q[..., plain:]], axis=-1)
    absorbed = absorbed.astype(DTYPES[dtype])
    out = jpa.ragged_paged_attention(
        absorbed,
        pool,
        None,
        np.array([length], np.int32),
        np.array([[2, 0, 4, 1, 3]], np.int32),
        np.array([0, length], np.int32),
        scale=scale,
        value_dim=latent,
        implementation=engine,
    )
    got = np.einsum("tnl,lnp->tnp", np.asarray(out, np.float64), up_v)

    keys = np.einsum("sl,lnp->snp", tokens[:, :latent], up_k)
    rotated_keys = np.broadcast_to(tokens[:, None, latent:], (length, heads, rotated))
    scores = np.einsum("tnp,snp->tns", q, np.concatenate([keys, rotated_keys], axis=-1)) * scale
    mask = np.arange(length)[:, None] >= np.arange(length)[None]
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    want = np.einsum("tns,snp->tnp", weights, np.einsum("sl,lnp->snp", tokens[:, :latent], up_v))
    assert np.linalg.norm(got - want) <= OUT_BOUND[dtype] * np.linalg.norm(want)


def test_fused_says_which_pairs_it_takes() -> None:
    call = _engines.Call(16, 1, 72, 40, 64, "bfloat16", "bfloat16", *_no_options(), values_in_keys=True)
    reason = harness.engine_row("fused").unsupported(call)
    assert reason is not None
    assert reason.endswith("got 72 with values of 40")
    same = dataclasses.replace(call, head_dim=128, value_dim=128)
    assert harness.engine_row("fused").unsupported(same) is None


def _no_options() -> tuple[Any, bool, bool]:
    return _options.Scoring(1.0, 0.0, 0, True), True, False


# ---- Programs --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not _ffi.has("cpu"), reason="built without the CPU engine")
@pytest.mark.parametrize(
    ("form", "targets"),
    [
        ("in keys", {_ffi.ATTENTION_VALUES_TARGET, _ffi.WRITE_VALUES_TARGET}),
        ("narrow", {_ffi.ATTENTION_VALUES_TARGET, _ffi.WRITE_VALUES_TARGET}),
        ("as keys", {_ffi.ATTENTION_TARGET, _ffi.WRITE_TARGET}),
    ],
)
def test_export_calls_new_targets_only_where_it_must(form: str, targets: set[str]) -> None:
    value_dim = {**FORMS, "as keys": H}[form]
    keywords: dict[str, Any] = {"value_dim": 9} if value_dim is None else {}

    def step(q: Any, pools: Any, k: Any, v: Any, slots: Any, tables: Any, lengths: Any) -> Any:
        k_pages, v_pages = jpa.write_kv_pages(*pools, k, v, slots)  # pyright: ignore[reportCallIssue]
        return jpa.paged_attention(q, k_pages, v_pages, tables, lengths, **keywords)

    (b,) = jax.export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct
    pools, tokens = arrays(value_dim, (P, S), "f32"), arrays(value_dim, (3,), "f32", 1)
    q = np.random.default_rng(1).standard_normal((3, 4, H)).astype(np.float32)
    where = (
        np.array([0, 9, 20], np.int32),
        np.array([[0, 1], [3, 2], [6, -1]], np.int32),
        np.array([4, 2, 3], np.int32),
    )
    args = (q, pools, *tokens, *where)
    specs = jax.tree.map(lambda x: spec((b, *x.shape[1:]), x.dtype), args)
    specs = (specs[0], jax.tree.map(lambda x: spec(x.shape, x.dtype), pools), *specs[2:])
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]
    exported = jax.export.export(jax.jit(step), platforms=["cpu"], disabled_checks=checks)(*specs)
    assert all(f"@{target}" in exported.mlir_module() for target in targets)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(*args), jax.jit(step)(*args))


@pytest.mark.parametrize(("name", "numbers"), [("decode_in_keys", 40), ("decode_values_narrow", 64)])
def test_cost_counts_each_number_of_a_key_once(name: str, numbers: int) -> None:
    case = BY_NAME[name]
    args, traced = build(case).arguments()
    cost = jpa.cost_analysis(jpa.paged_attention, *args, **traced)
    tokens = sum(case.kv_lens)
    assert cost.flops == 2 * (40 + 24) * case.num_heads * tokens
    none = jpa.cost_analysis(jpa.paged_attention, *args[:-1], 0 * args[-1], **traced)
    assert cost.bytes_accessed - none.bytes_accessed == tokens * case.num_kv_heads * numbers * 4


def test_debug_names_the_pool_that_there_is() -> None:
    pages = np.ones((P, S, K, H), np.float32)
    pages[2, 1, 0, 3] = np.nan
    tables, lengths = np.array([[2]], np.int32), np.array([3], np.int32)
    with jpa.debug(), pytest.raises(ValueError, match=r"k_pages: expected finite keys, got NaN .* page 2, token 1"):
        jpa.paged_attention(jnp.ones((1, K, H)), pages, None, tables, lengths, value_dim=2)
    with jpa.debug(), pytest.raises(ValueError, match=r"slot_mapping: expected .*got 1"):
        jpa.write_kv_pages(pages, None, np.ones((2, K, H), np.float32), None, np.array([1, 1], np.int32))
