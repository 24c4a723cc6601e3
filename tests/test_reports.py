"""Faults that users reported or met, each named for what they saw, with the right value.

One short test per fault; the suites beside this one test each kind of fault.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_paged_attn as jpa
from jax_paged_attn import compat
from jax_paged_attn.nnx import PagedAttention

# One sequence whose tokens are all ones, in page 0 of 2: attention to it gives 1.
ONES, SLOT, TABLE, LENGTH = jnp.ones((1, 1, 8)), np.array([0], np.int32), np.array([[0]], np.int32), np.array([1])
POOL = jnp.ones((2, 4, 1, 8))
BAD_SCALES = pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])


def cache_of(dtype: Any = jnp.float32, **options: Any) -> jpa.PagedKVCache:
    return jpa.PagedKVCache.create(2, 2, 4, 1, 8, dtype, **options)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_attention_over_an_fp8_cache_was_27_times_too_large() -> None:
    """The scales that `write` used were not given to attention."""
    cache = cache_of(jnp.float8_e4m3fn, k_scale=0.05, v_scale=0.05).write(0, ONES, ONES, SLOT)
    np.testing.assert_allclose(cache.attend(0, ONES, TABLE, LENGTH), 1, rtol=0.05)
    np.testing.assert_allclose(cache.attend_ragged(0, ONES, LENGTH, TABLE, np.array([0, 1])), 1, rtol=0.05)
    with pytest.raises(TypeError, match=r"^k_scale: expected none, since the cache has its own"):
        cache.attend(0, ONES, TABLE, LENGTH, k_scale=0.05)  # pyright: ignore[reportCallIssue]


@BAD_SCALES
def test_a_cache_took_scales_that_divide_by_zero(scale: float) -> None:
    with pytest.raises(ValueError, match=r"^v_scale: expected positive, finite scales"):
        cache_of(jnp.int8, k_scale=1.0, v_scale=scale)


@BAD_SCALES
def test_the_flax_layer_took_scales_that_divide_by_zero(scale: float) -> None:
    with pytest.raises(ValueError, match=r"^k_scale: expected positive, finite scales"):
        PagedAttention(1, 1, 8).init_cache(2, 4, jnp.float8_e4m3fn, k_scale=scale, v_scale=1.0)


@BAD_SCALES
def test_attention_took_infinite_scales_and_bad_ones_in_jax_arrays(scale: float) -> None:
    for given in (scale, jnp.float32(scale)):
        with pytest.raises(ValueError, match=r"^k_scale: expected positive, finite scales"):
            jpa.paged_attention(ONES, POOL, POOL, TABLE, LENGTH, k_scale=given)
        with pytest.raises(ValueError, match=r"^v_scale: expected positive, finite scales"):
            compat.paged_attention(ONES, POOL.swapaxes(0, 2), POOL.swapaxes(0, 2), TABLE, LENGTH, v_scale=given)


def test_an_int8_cache_without_scales_failed_only_when_written() -> None:
    with pytest.raises(ValueError, match=r"^k_scale: required for int8 pages, got None"):
        cache_of(jnp.int8)


@pytest.mark.parametrize("layer", [-1, 2])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_layer_outside_dropped_its_writes(layer: int, stacked: bool) -> None:
    cache = cache_of(stacked=stacked)
    with pytest.raises(ValueError, match=rf"^index: expected a layer in \[0, 2\), got {layer}"):
        cache.write(layer, ONES, ONES, SLOT)
    with pytest.raises(ValueError, match=rf"^index: expected a layer in \[0, 2\), got {layer}"):
        cache.layer(layer, TABLE)


@pytest.mark.parametrize("layer", ["0", True, 0.0])
@pytest.mark.parametrize("stacked", [False, True])
def test_what_is_no_number_was_a_layer(layer: Any, stacked: bool) -> None:
    with pytest.raises(TypeError, match=r"^index: expected a layer in \[0, 2\), got"):
        cache_of(stacked=stacked).layer(layer, TABLE)


@pytest.mark.parametrize("stacked", [False, True])
def test_page_0_point_7_was_page_0(stacked: bool) -> None:
    with pytest.raises(ValueError, match=r"^block_tables: expected dtype int32.*, got float32"):
        cache_of(stacked=stacked).layer(0, jnp.array([[0.7]]))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_cache_of_shardings_was_no_prefix_tree(stacked: bool) -> None:
    sharding: Any = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    cache = cache_of(stacked=stacked, k_scale=0.5)
    got = jax.jit(lambda cache: cache, out_shardings=jpa.PagedKVCache(sharding, sharding))(cache)
    assert jax.tree.structure(got) == jax.tree.structure(cache)


def test_pages_of_16_tokens_in_a_cache_of_8() -> None:
    allocator = jpa.PageAllocator(8, 16)
    cache = jpa.PagedKVCache.create(1, num_kv_heads=1, head_dim=8, allocator=allocator)
    assert (cache.num_pages, cache.page_size) == (8, 16)
    with pytest.raises(ValueError, match=r"^page_size: expected 16, that of the allocator, got 8"):
        jpa.PagedKVCache.create(1, page_size=8, num_kv_heads=1, head_dim=8, allocator=allocator)


def test_unrolled_writes_copied_the_stacked_cache_for_every_layer() -> None:
    """No write had to wait for the attention before it. The docstring says: write all layers, then attend."""

    def step(cache: jpa.PagedKVCache) -> Any:
        for layer in range(2):
            cache = cache.write(layer, ONES, ONES, SLOT)
        return cache, [cache.attend(layer, ONES, TABLE, LENGTH) for layer in range(2)]

    text = jax.jit(step, donate_argnums=0).lower(cache_of(stacked=True)).compile().as_text() or ""
    assert re.search(r"f32\[4,4,1,8\]", text)
    assert not re.findall(r"= f32\[4,4,1,8\]\S* (?:copy|copy-start)\(", text)


# ---- small ones ------------------------------------------------------------------------------------------------------


def test_explain_answered_for_a_platform_called_nonsense() -> None:
    for platform in ("nonsense", "CPU", ""):
        with pytest.raises(ValueError, match=r"^platform: expected one of cpu, cuda, gpu, rocm, tpu or None, got '"):
            jpa.explain(jpa.paged_attention, ONES, POOL, POOL, TABLE, LENGTH, platform=platform)
    with pytest.raises(TypeError, match=r"^device: expected a jax.Device, got str 'cpu'"):
        jpa.explain(jpa.paged_attention, ONES, POOL, POOL, TABLE, LENGTH, device="cpu")


def test_copying_no_pages_spoke_of_float32() -> None:
    nothing: Any = []
    for got in jpa.copy_kv_pages(POOL, POOL, nothing, nothing):
        np.testing.assert_array_equal(got, POOL)
    none = np.zeros((0, 1, 8), np.float32)
    np.testing.assert_array_equal(jpa.write_kv_pages(POOL, POOL, none, none, nothing)[0], POOL)
    assert jpa.paged_attention(none, POOL, POOL, np.zeros((0, 3), np.int32), nothing).shape == (0, 1, 8)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3b11fnuz, "nonsense", None])
def test_init_cache_took_any_dtype(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"^dtype: expected float32 or bfloat16 .*, got"):
        PagedAttention(1, 1, 8).init_cache(2, 4, dtype)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"sliding_window": True}, TypeError),
        ({"soft_cap": float("nan")}, ValueError),
        ({"scale": float("inf")}, ValueError),
        ({"sinks": "no"}, TypeError),
        ({"rope_theta": float("inf")}, ValueError),
    ],
    ids=str,
)
def test_the_flax_layer_took_options_that_attention_refuses(option: dict[str, Any], error: type[Exception]) -> None:
    (name,) = option
    with pytest.raises(error, match=f"^{name.removeprefix('rope_')}: expected a"):
        PagedAttention(1, 1, 8, **option)


def test_merging_an_infinite_lse_gave_nan() -> None:
    """Parts with lse +inf outweigh all others, and share among them; NaN stays NaN, in lse too."""
    outs = jnp.array([1.0, 2.0, 4.0])[:, None, None, None] * jnp.ones((3, 6, 1, 2))
    inf, nan = jnp.inf, jnp.nan
    rows = [[inf, 0, -inf], [0, inf, inf], [inf, inf, inf], [0, 0, -inf], [-inf, -inf, -inf], [nan, inf, 0]]
    lses = jnp.array(rows).T[..., None]
    out, lse = jpa.merge_attention_states(outs, lses)
    np.testing.assert_allclose(out[:, 0, 0], [1, 3, 7 / 3, 1.5, 0, nan], rtol=1e-6)
    np.testing.assert_allclose(lse[:, 0], [inf, inf, inf, np.log(2), -inf, nan], rtol=1e-6)
    gradients = jax.grad(lambda outs, lses: jpa.merge_attention_states(outs, lses)[0].sum(), (0, 1))
    for gradient in gradients(outs[:, :5], lses[:, :5]):
        assert np.isfinite(gradient).all()


def test_page_2_to_the_32_was_page_0() -> None:
    """Without x64 JAX cuts int64 to int32."""
    with pytest.raises(
        ValueError, match=r"^block_tables: expected values that fit in int32, got 4294967296 at \[0, 0\]"
    ):
        jpa.paged_attention(ONES, POOL, POOL, np.array([[2**32]]), LENGTH)
    with pytest.raises(ValueError, match=r"^slot_mapping: expected values that fit in int32, got 4294967296 at \[0\]"):
        cache_of(stacked=True).write(0, ONES, ONES, np.array([2**32]))


def test_lengths_of_jnp_array_were_refused_under_x64() -> None:
    with jax.enable_x64(True):
        lengths = jnp.array([1])
        assert lengths.dtype == jnp.int64
        np.testing.assert_array_equal(jpa.paged_attention(ONES, POOL, POOL, jnp.array([[1]]), lengths), ONES)


def test_python_m_had_no_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jax_paged_attn", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"jax_paged_attn {jpa.__version__}\n"


def test_star_import_of_compat_took_everything() -> None:
    names: dict[str, Any] = {}
    exec("from jax_paged_attn.compat import *", names)
    assert names.keys() - {"__builtins__"} == set(compat.__all__)
