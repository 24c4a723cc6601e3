"""The workloads as data, mostly shapes of a Llama 3 8B layer, with their inputs and exact results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from numpy.typing import NDArray

DTYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}


@dataclass(frozen=True)
class Workload:
    """One attention call over sequences of (query rows, tokens in the cache); the rows are a sequence's last tokens."""

    name: str
    dtype: str
    sequences: tuple[tuple[int, int], ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    causal: bool = True

    @property
    def batch(self) -> int:
        return len(self.sequences)

    @property
    def rows(self) -> int:
        """Query rows of each sequence; 0 if they differ."""
        return self._common(rows for rows, _ in self.sequences)

    @property
    def keys(self) -> int:
        """Tokens in the cache of each sequence; 0 if they differ."""
        return self._common(keys for _, keys in self.sequences)

    @property
    def decode(self) -> bool:
        return self.rows == 1

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence."""
        return max(self.pages)

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each sequence."""
        return tuple(-(-keys // self.page_size) for _, keys in self.sequences)

    def bytes(self) -> int:
        """The least that has to move: keys and values read once, queries read, outputs written."""
        keys_and_values = 2 * sum(keys for _, keys in self.sequences) * self.num_kv_heads * self.head_dim
        queries_and_outputs = 2 * sum(rows for rows, _ in self.sequences) * self.num_heads * self.head_dim
        return (keys_and_values + queries_and_outputs) * np.dtype(DTYPES[self.dtype]).itemsize

    def flops(self) -> int:
        """The two matrix products, over the (query, key) pairs that the causal mask leaves."""
        hidden = sum(rows * (rows - 1) // 2 for rows, _ in self.sequences) if self.causal else 0
        pairs = sum(rows * keys for rows, keys in self.sequences) - hidden
        return 4 * pairs * self.num_heads * self.head_dim

    @staticmethod
    def _common(counts: Iterable[int]) -> int:
        different = set(counts)
        return different.pop() if len(different) == 1 else 0


def _skewed(batch: int, longest_of_others: int, longest: int) -> tuple[tuple[int, int], ...]:
    """Decode: one long sequence among short ones."""
    others = np.random.default_rng(0).integers(longest_of_others // 2, longest_of_others + 1, batch - 1)
    return (*((1, int(keys)) for keys in others), (1, longest))


DECODE = tuple(
    Workload(f"decode {batch}x{keys // 1024}k {dtype}", dtype, ((1, keys),) * batch)
    for dtype in ("bf16", "f32")
    for batch, keys in ((8, 2048), (1, 16384))
)
PREFILL = tuple(Workload(f"prefill 1x2k {dtype}", dtype, ((2048, 2048),)) for dtype in ("bf16", "f32"))
CPU = DECODE + PREFILL

# The plan's own shape: 16 sequences of 16 heads, 32 pages each.
PLAN: dict[str, Any] = {"num_heads": 16, "num_kv_heads": 16, "page_size": 128}
GPU_DECODE = (
    Workload("decode 64x4k", "bf16", ((1, 4096),) * 64),
    Workload("decode 64x4k page 64", "bf16", ((1, 4096),) * 64, page_size=64),
    Workload("decode 64x4k page 128", "bf16", ((1, 4096),) * 64, page_size=128),
    Workload("decode 1x4k", "bf16", ((1, 4096),)),
    Workload("decode 1x128k", "bf16", ((1, 131072),)),
    Workload("decode 256x1k", "bf16", ((1, 1024),) * 256),
    Workload("decode 32x8k 64/8 heads", "bf16", ((1, 8192),) * 32, num_heads=64),
    Workload("decode 16x4k 16/16 heads", "bf16", ((1, 4096),) * 16, **PLAN),
    Workload("decode 63x<=1k 1x64k", "bf16", _skewed(64, 1024, 65536)),
)
GPU_PREFILL = (
    Workload("prefill 1x16k", "bf16", ((16384, 16384),)),
    Workload("prefill 1x16k page 128", "bf16", ((16384, 16384),), page_size=128),
    Workload("prefill 4x4k", "bf16", ((4096, 4096),) * 4),
    Workload("prefill 2k of 32k", "bf16", ((2048, 32768),)),
    Workload("prefill 16x4k 16/16 heads, no mask", "bf16", ((4096, 4096),) * 16, **PLAN, causal=False),
    Workload("mixed 63x4k decode, 2k of 8k", "bf16", (*(((1, 4096),) * 63), (2048, 8192))),
)
GPU = GPU_DECODE + GPU_PREFILL


@dataclass(frozen=True)
class Inputs:
    """Operands of a workload of equal sequences; the pages of a sequence lie scattered over the pool."""

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


@dataclass(frozen=True)
class RaggedInputs:
    """Operands of any workload, made on the device; the pages of a sequence lie scattered over the pool."""

    q: Array  # [T, N, H]
    pools: tuple[tuple[Array, Array], ...]  # copies of (k_pages, v_pages), each [P, S, K, H]: equal values, own memory
    block_tables: Array  # [B, M], 0 where a sequence has no page
    kv_lens: Array  # [B]
    cu_q_lens: Array  # [B + 1]


def make_ragged(workload: Workload, copies: int, seed: int = 0) -> RaggedInputs:
    w, dtype = workload, DTYPES[workload.dtype]
    rows, keys = np.array(w.sequences, np.int32).T
    ids = np.random.default_rng(seed).permutation(sum(w.pages)).astype(np.int32)
    tables = np.zeros((w.batch, w.max_pages), np.int32)
    tables[np.arange(w.max_pages) < np.array(w.pages)[:, None]] = ids
    k_key, v_key, q_key = jax.random.split(jax.random.key(seed), 3)
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    pool = (len(ids), w.page_size, w.num_kv_heads, w.head_dim)
    k_pages, v_pages = normal(k_key, pool, dtype), normal(v_key, pool, dtype)
    return RaggedInputs(
        q=normal(q_key, (int(rows.sum()), w.num_heads, w.head_dim), dtype),
        pools=((k_pages, v_pages), *((k_pages.copy(), v_pages.copy()) for _ in range(copies - 1))),
        block_tables=jnp.asarray(tables),
        kv_lens=jnp.asarray(keys),
        cu_q_lens=jnp.asarray(np.concatenate([[0], rows.cumsum()]).astype(np.int32)),
    )


def sampled_rows(workload: Workload, count: int, seed: int = 1) -> tuple[NDArray[np.int32], ...]:
    """`count` query rows at random: their numbers, their sequences, and how many tokens each of them sees.

    A row of any workload is a decode step over the tokens that it sees: so exact results of large prefills are cheap.
    """
    rows, keys = np.array(workload.sequences, np.int32).T
    ends = rows.cumsum()
    chosen = np.sort(np.random.default_rng(seed).integers(0, ends[-1], count))
    sequences = np.searchsorted(ends, chosen, side="right")
    seen = keys[sequences]
    if workload.causal:
        seen = seen - (ends[sequences] - 1 - chosen)
    return chosen.astype(np.int32), sequences.astype(np.int32), seen.astype(np.int32)
