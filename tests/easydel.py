"""EasyDeL's registry of kernels with this package in it. `test_ports.py` runs these tests in a process of their own."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_paged_attn import compat


@pytest.fixture
def ejkernel() -> Iterator[Any]:
    """ejkernel, whose registry is as before afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = importlib.import_module("ejkernel.modules")
        registry = importlib.import_module("ejkernel.kernels._registry").kernel_registry
    theirs = [spec for spec in registry.list_implementations("unified_attention") if spec.priority == 0]
    registry._registry["unified_attention"] = list(theirs)
    yield modules
    registry._registry["unified_attention"] = theirs


# Rows and keys of each sequence, N, K, H, page size, keywords: what ejkernel's own tests call.
CALLS: dict[str, tuple[list[tuple[int, int]], tuple[int, int, int, int], dict[str, Any]]] = {
    "basic": ([(6, 24), (1, 17)], (8, 4, 32, 8), {}),
    "three": ([(16, 64), (1, 31), (4, 17)], (8, 2, 64, 16), {"softmax_scale": 0.125}),
    "features": ([(4, 16), (1, 19), (2, 23)], (8, 2, 32, 8), {"sliding_window": 8, "logits_soft_cap": 10.0}),
    "decode": ([(1, 32), (1, 33), (1, 17), (1, 48)], (8, 4, 64, 16), {"sliding_window": 32, "logits_soft_cap": 20.0}),
}


def inputs(name: str, dtype: Any) -> list[Any]:
    """The positional operands of `unified_attention`; the last one is sinks."""
    seq_lens, (heads, kv_heads, head_dim, page_size), _ = CALLS[name]
    q_lens, kv_lens = (np.array(x, np.int32) for x in zip(*seq_lens, strict=True))
    tables = np.arange(len(kv_lens) * -(-kv_lens.max() // page_size), dtype=np.int32).reshape(len(kv_lens), -1)
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (int(q_lens.sum()), heads, head_dim), dtype)
    pools = (jax.random.normal(key, (tables.size, page_size, kv_heads, head_dim), dtype) for key in keys[1:3])
    where = (jnp.asarray(x) for x in (kv_lens, tables, np.cumsum([0, *q_lens], dtype=np.int32)))
    return [q, *pools, *where, None, None, jax.random.normal(keys[3], (heads,))]


@pytest.mark.parametrize("name", CALLS)
def test_easydels_registry_runs_us(ejkernel: Any, name: str) -> None:
    """The call of EasyDeL's server, before and after `register()`, for the platform it asks for and for the default."""
    operands, keywords = inputs(name, jnp.bfloat16), CALLS[name][2]
    theirs = ejkernel.unified_attention(*operands, **keywords)
    compat.ejkernel.register()
    compat.ejkernel.register()  # no second entry
    for platform in (None, "triton"):
        ours = jax.jit(lambda *x, p=platform: ejkernel.unified_attention(*x, platform=p, **keywords))
        assert " paged_attention[" in str(jax.make_jaxpr(ours)(*operands))
        got = np.asarray(ours(*operands), np.float32)
        np.testing.assert_allclose(got, np.asarray(theirs, np.float32), rtol=1e-2, atol=1e-2)


def test_easydels_registry_finds_the_same_signature(ejkernel: Any) -> None:
    registry = importlib.import_module("ejkernel.kernels._registry").kernel_registry
    compat.ejkernel.register(["triton"], priority=5)
    first, *_ = registry.list_implementations("unified_attention")
    assert (first.platform, first.priority) == ("triton", 5)
    assert registry.validate_signatures("unified_attention")
    q, *rest = inputs("basic", jnp.float32)
    rest[5] = jnp.ones(8)
    with pytest.raises(importlib.import_module("ejkernel.errors").EjkernelRuntimeError, match="alibi_slopes: "):
        ejkernel.unified_attention(q, *rest, platform="triton")
