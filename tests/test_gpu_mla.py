"""Properties of the MLA kernels that only a GPU can show: KV splits, repeats, graphs, batch invariance."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_paged_attn as jpa
from jax_paged_attn import _ffi

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu" or _ffi.compute_capability() != "9.0" or not _ffi.has("cuda"),
        reason="needs a GPU of compute capability 9.0 and a CUDA build",
    ),
]

KEY_DIM, VALUE_DIM = 576, 512
Inputs = tuple[jax.Array, ...]
SCALE = 0.05  # of 8-bit pages
PAGE_DTYPES = {"bf16": jnp.bfloat16, "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "int8": jnp.int8}


def make_inputs(lengths: tuple[int, ...], heads: int, page_size: int, page_dtype: str) -> Inputs:
    """Operands of `paged_attention` with q in bf16: q, the pool, tables, lengths; pages that no table names are NaN."""
    batch, width = len(lengths), max(-(-max(lengths) // page_size), 1)
    q_key, pool_key = jax.random.split(jax.random.key(0))
    q = jax.random.normal(q_key, (batch, heads, KEY_DIM), jnp.bfloat16)
    pool = jax.random.normal(pool_key, (2 * batch * width, page_size, 1, KEY_DIM), jnp.bfloat16)
    ids = np.random.default_rng(0).permutation(len(pool)).astype(np.int32)
    used, unused = ids[: batch * width].reshape(batch, width), ids[batch * width :]
    pool = (pool if page_dtype == "bf16" else pool / SCALE).astype(PAGE_DTYPES[page_dtype])
    pool = pool.at[unused].set(127 if page_dtype == "int8" else jnp.nan)
    return q, pool, jnp.asarray(used), jnp.asarray(lengths, jnp.int32)


def options_of(pool: jax.Array) -> dict[str, Any]:
    k_scale = SCALE if pool.dtype.itemsize == 1 else None
    return {"value_dim": VALUE_DIM, "k_scale": k_scale, "return_lse": True}


@functools.cache
def compiled(**keywords: Any) -> Any:
    def attend(q: jax.Array, pool: jax.Array, tables: jax.Array, lengths: jax.Array) -> Any:
        options = {"implementation": "fused", **options_of(pool), **keywords}
        return jpa.paged_attention(q, pool, None, tables, lengths, **options)

    return jax.jit(attend)


def bits(results: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in results]


@pytest.mark.parametrize("page_dtype", PAGE_DTYPES)
@pytest.mark.parametrize("page_size", [64, 16, 17])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("lengths", [(9000,), (4096,) * 5, (1, 0, 777, 30000, 64, 5000)], ids=["one", "few", "skewed"])
def test_kv_splits_are_merged_and_repeats_agree(
    lengths: tuple[int, ...], heads: int, page_size: int, page_dtype: str
) -> None:
    inputs = make_inputs(lengths, heads, page_size, page_dtype)
    q, pool, tables, kv_lens = inputs
    out, lse = compiled()(*inputs)
    exact = jpa.paged_attention_reference(q, pool, None, tables, kv_lens, **options_of(pool))
    error = np.linalg.norm(np.asarray(out - exact[0], np.float32)) / np.linalg.norm(np.asarray(exact[0], np.float32))
    assert error < 1e-2
    np.testing.assert_allclose(lse, exact[1], atol=1e-3)
    for _ in range(300 if page_dtype in ("bf16", "e4m3") else 20):
        assert bits(compiled()(*inputs)) == bits((out, lse))


@pytest.mark.parametrize("page_dtype", PAGE_DTYPES)
@pytest.mark.parametrize("page_size", [64, 17])
@pytest.mark.parametrize("heads", [16, 128])
def test_a_sequence_has_the_same_bits_in_any_batch(heads: int, page_size: int, page_dtype: str) -> None:
    lengths = tuple(int(n) for n in np.random.default_rng(1).integers(0, 3000, 40))
    q, pool, tables, kv_lens = make_inputs(lengths, heads, page_size, page_dtype)
    attend = compiled(batch_invariant=True)
    whole = tuple(map(np.asarray, attend(q, pool, tables, kv_lens)))
    for some in ([0], [39, 3, 12], range(0, 40, 2)):
        mine = np.array(list(some))
        assert bits(attend(q[mine], pool, tables[mine], kv_lens[mine])) == bits(x[mine] for x in whole)


@pytest.mark.parametrize("page_dtype", ["bf16", "e4m3"])
def test_lengths_grow_between_replays_of_a_graph(page_dtype: str) -> None:
    q, pool, tables, lengths = make_inputs((1, 500, 63, 64), 128, 64, page_dtype)

    @jax.jit
    def layers(q: jax.Array, lengths: jax.Array) -> jax.Array:
        outs = [compiled()(q + layer, pool, tables, lengths)[0] for layer in range(8)]
        return jnp.stack(outs)

    calls = []
    for growth in range(0, 400, 40):
        before = _ffi.compiled("cuda").host_calls()
        got = jax.block_until_ready(layers(q, jnp.minimum(lengths + growth, 512)))
        calls.append(_ffi.compiled("cuda").host_calls() - before)
        want = [compiled()(q + layer, pool, tables, jnp.minimum(lengths + growth, 512))[0] for layer in range(8)]
        np.testing.assert_array_equal(got, np.stack(want))
    assert 0 in calls, f"calls of the handler per step: {calls}"
