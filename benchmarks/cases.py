"""The workloads: shapes of a Llama 3 8B layer as data, their inputs, and the exact result in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from numpy.typing import NDArray

DTYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}


@dataclass(frozen=True)
class Workload:
    """One attention call. Every sequence has `rows` query rows, its last, and `keys` tokens in the cache."""

    name: str
    dtype: str
    batch: int
    rows: int
    keys: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def decode(self) -> bool:
        return self.rows == 1

    @property
    def max_pages(self) -> int:
        return -(-self.keys // self.page_size)

    def bytes(self) -> int:
        """The least that has to move: keys and values read once, queries read, outputs written."""
        keys_and_values = 2 * self.batch * self.keys * self.num_kv_heads * self.head_dim
        queries_and_outputs = 2 * self.batch * self.rows * self.num_heads * self.head_dim
        return (keys_and_values + queries_and_outputs) * np.dtype(DTYPES[self.dtype]).itemsize

    def flops(self) -> int:
        """The two matrix products, over the (query, key) pairs that the causal mask leaves."""
        pairs = self.rows * self.keys - self.rows * (self.rows - 1) // 2
        return 4 * self.batch * pairs * self.num_heads * self.head_dim


DECODE = tuple(
    Workload(f"decode {batch}x{keys // 1024}k {dtype}", dtype, batch, 1, keys)
    for dtype in ("bf16", "f32")
    for batch, keys in ((8, 2048), (1, 16384))
)
PREFILL = tuple(Workload(f"prefill 1x2k {dtype}", dtype, 1, 2048, 2048) for dtype in ("bf16", "f32"))
CPU = DECODE + PREFILL


@dataclass(frozen=True)
class Inputs:
    """Operands of a workload; the pages of a sequence lie scattered over the pool."""

    q: Array  # [B, R, N, H]
    pools: tuple[tuple[Array, Array], ...]  # copies of (k_pages, v_pages), each [P, S, K, H]: equal values, own memory
    block_tables: Array  # [B, M]
    kv_lens: Array  # [B]


def make(workload: Workload, copies: int, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    w, dtype = workload, DTYPES[workload.dtype]
    num_pages = w.batch * w.max_pages

    def normal(*shape: int) -> NDArray[Any]:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    k_pages, v_pages = (normal(num_pages, w.page_size, w.num_kv_heads, w.head_dim) for _ in range(2))
    return Inputs(
        q=jnp.asarray(normal(w.batch, w.rows, w.num_heads, w.head_dim)),
        pools=tuple((jnp.array(k_pages), jnp.array(v_pages)) for _ in range(copies)),
        block_tables=jnp.asarray(rng.permutation(num_pages).astype(np.int32).reshape(w.batch, w.max_pages)),
        kv_lens=jnp.full(w.batch, w.keys, jnp.int32),
    )


def exact(workload: Workload, inputs: Inputs) -> NDArray[np.float64]:
    """`[B, R, N, H]`: the attention of the inputs as they are stored, computed in float64."""
    w = workload
    q, tables = np.asarray(inputs.q).astype(np.float64), np.asarray(inputs.block_tables)
    k_pages, v_pages = (np.asarray(pages) for pages in inputs.pools[0])
    hidden = np.arange(w.keys)[None, :] > np.arange(w.keys - w.rows, w.keys)[:, None]
    out = np.empty(q.shape)
    for b in range(w.batch):
        keys, values = (
            pages[tables[b]].reshape(-1, w.num_kv_heads, w.head_dim)[: w.keys].astype(np.float64)
            for pages in (k_pages, v_pages)
        )
        for head in range(w.num_heads):
            kv_head = head // (w.num_heads // w.num_kv_heads)
            scores = q[b, :, head] @ keys[:, kv_head].T / np.sqrt(w.head_dim)
            scores[hidden] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[b, :, head] = weights @ values[:, kv_head] / weights.sum(axis=-1, keepdims=True)
    return out
