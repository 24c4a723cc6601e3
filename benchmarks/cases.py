"""The workloads as data, mostly shapes of a Llama 3 8B layer, with their inputs and exact results."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from numpy.typing import NDArray

DTYPES: dict[str, Any] = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "int8": np.int8,
}
# Scales that bring stored values to about unit variance: int8 has its whole range, fp8 is stored as it is drawn.
PAGE_SCALE = {"e4m3": 0.9, "e5m2": 0.9, "int8": 0.0136}


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
    page_dtype: str | None = None  # None: as dtype; 8-bit pages have scales
    table_pages: int | None = None  # columns of the block table; None: pages of the longest sequence
    batch_invariant: bool = False
    ragged: bool = False  # decode rows go through `ragged_paged_attention`
    value_dim: int | None = None  # None: as head_dim
    values_in_keys: bool = False  # one pool: values are the first numbers of each key

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
    def head_dim_of_values(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def quantized(self) -> bool:
        return self.page_dtype in PAGE_SCALE

    @property
    def max_pages(self) -> int:
        """Columns of the block table."""
        return self.table_pages or max(self.pages)

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each sequence."""
        return tuple(-(-keys // self.page_size) for _, keys in self.sequences)

    def bytes(self) -> int:
        """The least that has to move: keys and values read once, queries read, outputs written."""
        values = self.head_dim_of_values
        per_token = self.head_dim + (0 if self.values_in_keys else values)
        keys_and_values = sum(keys for _, keys in self.sequences) * self.num_kv_heads * per_token
        queries_and_outputs = sum(rows for rows, _ in self.sequences) * self.num_heads * (self.head_dim + values)
        of_pages, of_queries = (np.dtype(DTYPES[d]).itemsize for d in (self.page_dtype or self.dtype, self.dtype))
        return keys_and_values * of_pages + queries_and_outputs * of_queries

    def flops(self) -> int:
        """The two matrix products, over the (query, key) pairs that the causal mask leaves."""
        hidden = sum(rows * (rows - 1) // 2 for rows, _ in self.sequences) if self.causal else 0
        pairs = sum(rows * keys for rows, keys in self.sequences) - hidden
        return 2 * pairs * self.num_heads * (self.head_dim + self.head_dim_of_values)

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
# Rows of 128 bytes, and of 64 in 8 bits.
_SMALL_HEADS: dict[str, Any] = {"num_heads": 8, "head_dim": 64}
_64X4K, _64X1K, _32X4K = ((1, 4096),) * 64, ((1, 1024),) * 64, ((1, 4096),) * 32
GPU_DECODE = (
    Workload("decode 64x4k", "bf16", _64X4K),
    Workload("decode 64x4k page 1", "bf16", _64X4K, page_size=1),
    Workload("decode 64x4k page 64", "bf16", _64X4K, page_size=64),
    Workload("decode 64x4k page 128", "bf16", _64X4K, page_size=128),
    Workload("decode 64x4k e4m3", "bf16", _64X4K, page_dtype="e4m3"),
    Workload("decode 64x4k int8", "bf16", _64X4K, page_dtype="int8"),
    Workload("decode 64x4k batch-invariant", "bf16", _64X4K, batch_invariant=True),
    Workload("decode 64x4k drafts of 8", "bf16", ((8, 4096),) * 64),
    Workload("decode 1x1k", "bf16", ((1, 1024),)),
    Workload("decode 1x4k", "bf16", ((1, 4096),)),
    Workload("decode 8x1k", "bf16", ((1, 1024),) * 8),
    Workload("decode 1x128k", "bf16", ((1, 131072),)),
    Workload("decode 1x128k e4m3", "bf16", ((1, 131072),), page_dtype="e4m3"),
    Workload("decode 256x1k", "bf16", ((1, 1024),) * 256),
    Workload("decode 256x1k e4m3", "bf16", ((1, 1024),) * 256, page_dtype="e4m3"),
    Workload("decode 32x8k 64/8 heads", "bf16", ((1, 8192),) * 32, num_heads=64),
    Workload("decode 32x8k 64/8 heads e4m3", "bf16", ((1, 8192),) * 32, num_heads=64, page_dtype="e4m3"),
    Workload("decode 16x4k 16/16 heads", "bf16", ((1, 4096),) * 16, **PLAN),
    Workload("decode 120x2k 8/8 heads head dim 64", "bf16", ((1, 2048),) * 120, **_SMALL_HEADS),
    Workload("decode 120x2k 8/8 heads head dim 64 e4m3", "bf16", ((1, 2048),) * 120, **_SMALL_HEADS, page_dtype="e4m3"),
    Workload("decode 64x4k head dim 96", "bf16", _64X4K, head_dim=96),
    Workload("decode 63x<=1k 1x64k", "bf16", _skewed(64, 1024, 65536)),
    # Other groups and heads, among them those of a layer split over several GPUs.
    Workload("decode 32x4k 64/4 heads", "bf16", _32X4K, num_heads=64, num_kv_heads=4),
    Workload("decode 32x4k 128/4 heads", "bf16", _32X4K, num_heads=128, num_kv_heads=4),
    Workload("decode 32x4k 256/4 heads", "bf16", _32X4K, num_heads=256, num_kv_heads=4),
    Workload("decode 32x4k 28/4 heads", "bf16", _32X4K, num_heads=28, num_kv_heads=4),
    Workload("decode 64x4k 40/8 heads page 32", "bf16", _64X4K, num_heads=40, page_size=32),
    Workload("decode 64x1k 16/2 heads", "bf16", _64X1K, num_heads=16, num_kv_heads=2),
    Workload("decode 64x1k 16/4 heads", "bf16", _64X1K, num_heads=16, num_kv_heads=4),
    Workload("decode 64x4k 64/8 heads head dim 64", "bf16", _64X4K, num_heads=64, head_dim=64),
    Workload("decode 32x4k 64/8 heads drafts of 4", "bf16", ((4, 4096),) * 32, num_heads=64),
    Workload("decode 4x512 64/8 heads", "bf16", ((1, 512),) * 4, num_heads=64),
    Workload("decode 16x512", "bf16", ((1, 512),) * 16),
    Workload("decode 1x1k batch-invariant", "bf16", ((1, 1024),), batch_invariant=True),
    Workload("decode 8x1k batch-invariant", "bf16", ((1, 1024),) * 8, batch_invariant=True),
    # Decode rows as servers pass them.
    Workload("decode 1x1k ragged", "bf16", ((1, 1024),), ragged=True),
    Workload("decode 8x1k ragged", "bf16", ((1, 1024),) * 8, ragged=True),
    Workload("decode 64x1k ragged", "bf16", _64X1K, ragged=True),
    Workload("decode 64x4k ragged", "bf16", _64X4K, ragged=True),
    Workload("decode 256x1k ragged", "bf16", ((1, 1024),) * 256, ragged=True),
    Workload("decode 64x1k table 64", "bf16", _64X1K),
    Workload("decode 64x1k table 8192", "bf16", _64X1K, table_pages=8192),
)
# DeepSeek's prompts, without absorbed projections.
_PLAIN_MLA: dict[str, Any] = {"num_heads": 16, "num_kv_heads": 16, "head_dim": 192, "value_dim": 128}
GPU_PREFILL = (
    Workload("prefill 1x16k", "bf16", ((16384, 16384),)),
    Workload("prefill 1x16k page 128", "bf16", ((16384, 16384),), page_size=128),
    Workload("prefill 1x16k page 1", "bf16", ((16384, 16384),), page_size=1),
    Workload("prefill 4x4k", "bf16", ((4096, 4096),) * 4),
    Workload("prefill 4x4k page 20", "bf16", ((4096, 4096),) * 4, page_size=20),
    Workload("prefill 4x4k page 1", "bf16", ((4096, 4096),) * 4, page_size=1),
    Workload("prefill 4x4k e4m3", "bf16", ((4096, 4096),) * 4, page_dtype="e4m3"),
    Workload("prefill 4x4k int8", "bf16", ((4096, 4096),) * 4, page_dtype="int8"),
    Workload("prefill 2k of 32k", "bf16", ((2048, 32768),)),
    Workload("prefill 2k of 32k page 1", "bf16", ((2048, 32768),), page_size=1),
    Workload("prefill 256 of 32k", "bf16", ((256, 32768),)),
    Workload("prefill 256 of 32k page 1", "bf16", ((256, 32768),), page_size=1),
    Workload("prefill 256 of 32k e4m3", "bf16", ((256, 32768),), page_dtype="e4m3"),
    Workload("prefill 16x1k", "bf16", ((1024, 1024),) * 16),
    Workload("prefill 16x1k e4m3", "bf16", ((1024, 1024),) * 16, page_dtype="e4m3"),
    Workload("prefill 64x256", "bf16", ((256, 256),) * 64),
    Workload("prefill 64x256 e4m3", "bf16", ((256, 256),) * 64, page_dtype="e4m3"),
    Workload("prefill 1x16k head dim 64", "bf16", ((16384, 16384),), head_dim=64),
    Workload("prefill 1x16k 16/8 heads head dim 256", "bf16", ((16384, 16384),), num_heads=16, head_dim=256),
    Workload("prefill 16x4k 16/16 heads, no mask", "bf16", ((4096, 4096),) * 16, **PLAN, causal=False),
    Workload("prefill 1x8k 16/16 heads of 192, values of 128", "bf16", ((8192, 8192),), **_PLAIN_MLA),
    Workload("prefill 4x4k 16/16 heads of 192, values of 128", "bf16", ((4096, 4096),) * 4, **_PLAIN_MLA),
    Workload("mixed 63x4k decode, 2k of 8k", "bf16", (*(((1, 4096),) * 63), (2048, 8192))),
)


def _mla(name: str, sequences: tuple[tuple[int, int], ...], heads: int, **other: Any) -> Workload:
    """Decode of DeepSeek V3 with absorbed projections, or of a share of its heads."""
    dims: dict[str, Any] = {"num_kv_heads": 1, "head_dim": 576, "value_dim": 512, "values_in_keys": True}
    return Workload(f"MLA {name}, {heads} heads", "bf16", sequences, heads, **{"page_size": 64, **dims, **other})


GPU_MLA = (
    *(_mla(f"{batch}x4k", ((1, 4096),) * batch, heads) for heads in (128, 16) for batch in (64, 128)),
    _mla("16x8k", ((1, 8192),) * 16, 32),
    *(_mla("1x32k", ((1, 32768),), heads) for heads in (128, 16)),
    _mla("128x4k, 2 rows", ((2, 4096),) * 128, 128),
    _mla("63x<=1k 1x64k", _skewed(64, 1024, 65536), 16),
    _mla("64x4k page 16", _64X4K, 16, page_size=16),
    _mla("64x4k page 1", _64X4K, 16, page_size=1),
    _mla("1x1k", ((1, 1024),), 16),
    _mla("8x1k", ((1, 1024),) * 8, 16),
    *(_mla(f"{batch}x4k e4m3", ((1, 4096),) * batch, 16, page_dtype="e4m3") for batch in (64, 128)),
    _mla("64x4k int8", _64X4K, 16, page_dtype="int8"),
    _mla("64x4k page 1 e4m3", _64X4K, 16, page_size=1, page_dtype="e4m3"),
    _mla("1x32k e4m3", ((1, 32768),), 16, page_dtype="e4m3"),
    _mla("64x4k e4m3", _64X4K, 128, page_dtype="e4m3"),
    _mla("512 of 32k", ((512, 32768),), 128),
)


def _wide(name: str, sequences: tuple[tuple[int, int], ...], **other: Any) -> tuple[Workload, Workload]:
    """A layer of head dim 512 with 32/4 heads, as Gemma 4 has them: with a pool of values, and with keys as values."""
    dims: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 4, "head_dim": 512, "page_size": 64, **other}
    return (
        Workload(f"{name}, head dim 512", "bf16", sequences, **dims),
        Workload(f"{name}, head dim 512, one pool", "bf16", sequences, **dims, value_dim=512, values_in_keys=True),
    )


GPU_WIDE = (
    *_wide("64x4k", _64X4K),
    *_wide("64x4k page 16", _64X4K, page_size=16),
    *_wide("64x4k page 1", _64X4K, page_size=1),
    *_wide("1x1k", ((1, 1024),)),
    *_wide("1x32k", ((1, 32768),)),
    *_wide("prefill 1x8k", ((8192, 8192),)),
    *_wide("prefill 4x2k", ((2048, 2048),) * 4),
    *_wide("prefill 512 of 32k", ((512, 32768),)),
)
GPU = GPU_DECODE + GPU_PREFILL + GPU_MLA + GPU_WIDE

# How many times the cost of another a workload may have: (first, second, goal).
RELATIONS = (
    ("decode 64x4k", "decode 64x4k page 128", 1.01),
    ("decode 64x4k page 1", "decode 64x4k page 128", 1.05),
    ("decode 64x4k e4m3", "decode 64x4k", 1 / 1.85),
    ("decode 64x4k int8", "decode 64x4k", 1 / 1.85),
    ("decode 64x1k table 8192", "decode 64x1k table 64", 1.02),
    ("prefill 1x16k", "prefill 1x16k page 128", 1.02),
    ("prefill 1x16k page 1", "prefill 1x16k page 128", 1.05),
    ("prefill 2k of 32k page 1", "prefill 2k of 32k", 1.05),
    ("prefill 256 of 32k page 1", "prefill 256 of 32k", 1.05),
    ("prefill 4x4k page 1", "prefill 4x4k", 1.05),
    ("prefill 4x4k page 20", "prefill 4x4k", 1.05),
    ("decode 64x4k batch-invariant", "decode 64x4k", 1.05),
    ("decode 8x1k batch-invariant", "decode 8x1k", 1.3),
    ("decode 1x1k batch-invariant", "decode 1x1k", 1.4),
    ("decode 64x1k ragged", "decode 64x1k table 64", 1.02),
    ("decode 64x4k ragged", "decode 64x4k", 1.02),
    ("decode 256x1k ragged", "decode 256x1k", 1.02),
)

# The workloads for which the host's share of a call is measured.
HOST = tuple(w for w in GPU_DECODE if w.name in ("decode 1x1k", "decode 64x4k"))
# A layer of a step of LAYERS layers.
LAYERS = 32
STEPS = (
    Workload("decode 8x1k", "bf16", ((1, 1024),) * 8),
    Workload("decode 64x512", "bf16", ((1, 512),) * 64),
)

# Workloads that show how the cost of decode grows, for each value of each axis. Those of an axis have the same number
# of key/value heads, so that they share a pool.
SWEEPS: dict[str, dict[int, Workload]] = {
    "batch": {b: Workload(f"decode {b}x1k", "bf16", ((1, 1024),) * b) for b in (1, 2, 4, 8, 16, 32, 64, 128, 256)},
    "length": {
        n: Workload(f"decode 4x{n}", "bf16", ((1, n),) * 4)
        for n in (16, 64, 256, 1024, 4096, 8192, 16384, 32768, 65536)
    },
    "group": {
        g: Workload(f"decode 32x4k {4 * g}/4 heads", "bf16", ((1, 4096),) * 32, num_heads=4 * g, num_kv_heads=4)
        for g in (1, 2, 4, 8, 12, 16, 24, 32, 64)
    },
}


@dataclass(frozen=True)
class Inputs:
    """Operands of a workload of equal sequences; the pages of a sequence lie scattered over the pool."""

    q: Array  # [B, R, N, H]
    pools: tuple[tuple[Array, Array], ...]  # copies of (k_pages, v_pages), each [P, S, K, H]: equal values, own memory
    block_tables: Array  # [B, M]
    kv_lens: Array  # [B]


def random_decode(count: int, seed: int) -> tuple[Workload, ...]:
    """Decode of uniform batches that nobody chose, of at most 2 GiB of keys and values each."""
    rng, workloads = np.random.default_rng(seed), []
    while len(workloads) < count:
        batch, keys = (int(2 ** rng.uniform(0, np.log2(most))) for most in (200, 60_000))
        group, kv_heads = int(rng.integers(1, 17)), int(rng.choice((1, 2, 4, 8, 16)))
        page_size, head_dim = int(rng.choice((1, 8, 16, 20, 32, 64, 128))), int(rng.choice((64, 96, 128, 192, 256)))
        heads = f"{group * kv_heads}/{kv_heads} heads of {head_dim}"
        workload = Workload(
            f"decode {batch}x{max(keys, 16)} {heads} page {page_size}",
            "bf16",
            ((1, max(keys, 16)),) * batch,
            num_heads=group * kv_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            page_size=page_size,
        )
        if workload.bytes() <= 2 << 30:
            workloads.append(workload)
    return tuple(workloads)


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


class Operands(NamedTuple):
    """Operands of any workload, made on the device; the pages of a sequence lie scattered over the pool."""

    q: Array  # [T, N, H]
    k_pages: Array  # [P, S, K, H]
    v_pages: Array  # [P, S, K, Hv], or [0] where the values are in the keys
    block_tables: Array  # [B, M], 0 where a sequence has no page
    kv_lens: Array  # [B]
    cu_q_lens: Array  # [B + 1]
    q_lens: Array  # [B], their differences: an operand, so that no peer is charged with a kernel that makes them
    k_scale: Array  # [K], ones where pages are as q
    v_scale: Array

    def copy(self) -> Operands:
        """The same values in memory of their own."""
        return Operands(*(x.copy() for x in self))


def make_ragged(workload: Workload, copies: int, seed: int = 0) -> tuple[Operands, ...]:
    """Copies of all operands, to be used in turn, so that no set finds its queries and tables in the L2 cache."""
    pools = make_pools(workload, sum(workload.pages), seed)
    (first,) = make_in_pools(workload, pools, copies=1, seed=seed)
    return (first, *(first.copy() for _ in range(copies - 1)))


def make_pools(workload: Workload, num_pages: int, seed: int = 0) -> tuple[Array, Array]:
    """Pools of keys [P, S, K, H] and values [P, S, K, Hv]; the second is empty where the values are in the keys."""
    w = workload
    shape, dtype = (num_pages, w.page_size, w.num_kv_heads), DTYPES[w.page_dtype or w.dtype]
    k_key, v_key, _ = jax.random.split(jax.random.key(seed), 3)
    k_pages = _random(k_key, (*shape, w.head_dim), dtype)
    if w.values_in_keys:
        return k_pages, jnp.zeros(0, dtype)
    return k_pages, _random(v_key, (*shape, w.head_dim_of_values), dtype)


def make_in_pools(workload: Workload, pools: tuple[Array, Array], copies: int, seed: int = 0) -> tuple[Operands, ...]:
    """Operands, to be used in turn, with the pages of a set behind those of the one before, as far as the pools go."""
    w = workload
    rows, keys = np.array(w.sequences, np.int32).T
    ids = np.random.default_rng(seed).permutation(sum(w.pages)).astype(np.int32)
    mine = np.arange(w.max_pages) < np.array(w.pages)[:, None]
    starts = np.concatenate([[0], rows.cumsum()]).astype(np.int32)
    q = _random(
        jax.random.split(jax.random.key(seed), 3)[2], (int(rows.sum()), w.num_heads, w.head_dim), DTYPES[w.dtype]
    )
    scale = jnp.full(w.num_kv_heads, PAGE_SCALE.get(w.page_dtype or w.dtype, 1.0), jnp.float32)
    sets = []
    for i in range(copies):
        tables = np.zeros(mine.shape, np.int32)
        tables[mine] = (ids + i * len(ids)) % len(pools[0])
        block_tables, kv_lens, cu_q_lens, q_lens = map(jnp.asarray, (tables, keys, starts, rows))
        where = (block_tables, kv_lens, cu_q_lens, q_lens)
        sets.append(Operands(q if i == 0 else q.copy(), *pools, *where, scale, scale))
    return tuple(sets)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Standard normal values; int8 uses its whole range evenly."""
    if dtype == np.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return jax.random.normal(key, shape, jnp.bfloat16 if np.dtype(dtype).itemsize == 1 else dtype).astype(dtype)


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
