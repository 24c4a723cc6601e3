"""Calls of the RPA v3 family: inputs by seed, and what they give in float64. `parity/make_rpa_v3.py` uses them too."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int8": np.dtype(np.int8),
}
# Tables may hold these where no token of a sequence is.
GARBAGE = (-1, 2**31 - 1, 1_000_000, 0)


@dataclasses.dataclass(frozen=True)
class RpaCall:
    """One call.

    Attributes:
      name: decides about the random numbers.
      q_lens, kv_lens: of the live sequences.
      num_heads, kv_heads, head_dim: N, K and H.
      page_size: S.
      dtype, cache_dtype: names in `DTYPES`; None is that of the queries.
      cache: "packed" `[P, S, ceil(2K / pack), pack, H']`, "flat" `[P, S, 2K, H']`, or, for H = 64, "pairs"
        `[P, S, ceil(K / pack), pack, 2H]`.
      dead: sequences behind the live ones, and rows that none has.
      poisoned: whether unused tokens, pages and table entries hold garbage.
      keywords: of the call.
      sinks: whether there is an `attention_sink`.
    """

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    page_size: int = 4
    dtype: str = "f32"
    cache_dtype: str | None = None
    cache: str = "packed"
    dead: int = 2
    poisoned: bool = True
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sinks: bool = False

    @property
    def pack(self) -> int:
        return 4 // DTYPES[self.cache_dtype or self.dtype].itemsize

    @property
    def writes(self) -> bool:
        return self.keywords.get("update_kv_cache", True) and not self.keywords.get("skip_kv_update", False)


def aligned(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def rounded(values: Array, dtype: Any) -> Array:
    """Float64 values as another dtype, with the bits that they had when the results of others were kept."""
    # ml_dtypes 0.7 rounds once. Before, values became float32 on the way to bfloat16 and fp8, as they do here.
    is_numpys = np.dtype(dtype).isbuiltin == 1
    return values.astype(dtype) if is_numpys else values.astype(np.float32).astype(dtype)


def build(call: RpaCall) -> dict[str, Array]:
    """The arrays of the call by the names of its arguments."""
    rng = np.random.RandomState(zlib.crc32(call.name.encode()))  # whose numbers are the same in all releases
    dtype, cache_dtype = DTYPES[call.dtype], DTYPES[call.cache_dtype or call.dtype]
    live, rows = len(call.q_lens), sum(call.q_lens) + call.dead
    num_seqs, max_pages = max(live + call.dead, 1), max([aligned(n, call.page_size) for n in call.kv_lens] + [0])
    max_pages = max_pages // call.page_size + 1
    num_pages = sum(-(-n // call.page_size) for n in call.kv_lens) + 3

    def numbers(dtype: Any, *shape: int) -> Array:
        spread = 40.0 if dtype == np.int8 else 1.0
        return rounded((rng.standard_normal(shape) * spread).clip(-120, 120), dtype)

    order, tables = list(rng.permutation(num_pages)), np.zeros((num_seqs, max_pages), np.int32)
    if call.poisoned:
        tables[:] = rng.choice(GARBAGE, tables.shape)
    used = np.zeros((num_pages, call.page_size), bool)
    for b, length in enumerate(call.kv_lens):
        for token in range(length):
            if token % call.page_size == 0:
                tables[b, token // call.page_size] = order.pop()
            used[tables[b, token // call.page_size], token % call.page_size] = True

    width = 2 * call.head_dim if call.cache == "pairs" else aligned(call.head_dim, 128)
    heads = call.kv_heads if call.cache == "pairs" else 2 * call.kv_heads
    kept = heads if call.cache == "flat" else aligned(heads, call.pack)
    cache = np.zeros((num_pages, call.page_size, kept, width), cache_dtype)
    own = cache[:, :, :heads, : width if call.cache == "pairs" else call.head_dim]
    own[:] = numbers(cache_dtype, *own.shape)
    if call.poisoned and cache_dtype != np.int8:
        cache[~used] = np.nan
    if call.cache != "flat":
        cache = cache.reshape(num_pages, call.page_size, kept // call.pack, call.pack, width)

    behind = rng.randint(0, 9, call.dead + 1) if call.poisoned else np.zeros(call.dead + 1, np.int64)
    kv_lens = np.concatenate([call.kv_lens, behind])[:num_seqs]
    ends = np.cumsum([0, *call.q_lens])
    cu_q_lens = np.concatenate([ends, ends[-1] + behind])[: num_seqs + 1]
    arrays = {
        "queries": numbers(dtype, rows, call.num_heads, call.head_dim),
        "keys": numbers(cache_dtype, rows, call.kv_heads, call.head_dim),
        "values": numbers(cache_dtype, rows, call.kv_heads, call.head_dim),
        "kv_cache": cache,
        "kv_lens": kv_lens.astype(np.int32),
        "page_indices": tables.reshape(-1),
        "cu_q_lens": cu_q_lens.astype(np.int32),
        "distribution": np.array([0, 0, live], np.int32),
    }
    if call.sinks:
        arrays["attention_sink"] = numbers(np.float32, call.num_heads)
    return arrays


def expected(call: RpaCall, arrays: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """`(out, cache, lse)`: float64, and the cache bit by bit."""
    cache = arrays["kv_cache"].copy()
    pages, page_size = cache.shape[:2]
    flat = cache.reshape(pages, page_size, -1, cache.shape[-1])
    if call.cache == "pairs":
        flat = flat.reshape(pages, page_size, -1, call.head_dim)
    keys, values = flat[:, :, : 2 * call.kv_heads : 2], flat[:, :, 1 : 2 * call.kv_heads : 2]  # views
    rows, heads, head_dim = arrays["queries"].shape
    out, lse = np.zeros((rows, heads, head_dim)), np.full((rows, heads), -np.inf)
    tables = arrays["page_indices"].reshape(len(arrays["kv_lens"]), -1)
    for b in range(int(arrays["distribution"][2])):
        begin, end = arrays["cu_q_lens"][b : b + 2]
        length = int(arrays["kv_lens"][b])
        slots = tables[b, np.arange(length) // page_size], np.arange(length) % page_size
        if call.writes:
            new = tuple(x[max(length - end + begin, 0) :] for x in slots)
            flat[new] = 0
            for pool, tokens in ((keys, arrays["keys"]), (values, arrays["values"])):
                written = tokens[end - len(new[0]) : end]
                pool[(*new, slice(None), slice(head_dim))] = written
        for t in range(begin, end):
            position = length - int(end) + t
            row = (arrays["queries"][t], keys[slots][..., :head_dim], values[slots][..., :head_dim])
            out[t], lse[t] = _row(call, *row, position, arrays.get("attention_sink"))
    return out, cache, lse


def _row(
    call: RpaCall, q: Array, keys: Array, values: Array, position: int, sinks: Array | None
) -> tuple[Array, Array]:
    """One row of a sequence with `keys`, `values [L, K, H]`: `(out [N, H], lse [N])`."""
    get, cache_dtype = call.keywords.get, keys.dtype
    scale = get("sm_scale", 1.0)
    k_scale, v_scale = (np.asarray(1.0 if get(name) is None else get(name)) for name in ("k_scale", "v_scale"))
    if get("scale_rule") == "reference":
        k_scale, v_scale, q = 1 / k_scale, 1 / v_scale, q.astype(np.float64) / get("q_scale", 1.0)
    elif (q_scale := get("q_scale")) is not None:
        q, scale = _rounded(q, q_scale, cache_dtype), scale * q_scale
    key = np.arange(len(keys))
    seen = key <= position if get("use_causal_mask", True) else (key >= 0) & (position >= 0)
    seen &= key > position - get("sliding_window", math.inf)
    if chunk := get("attention_chunk_size"):
        seen &= key // chunk == position // chunk
    keys, values = (
        np.repeat(x[seen].astype(np.float64) * y.reshape(-1, 1), len(q) // x.shape[1], axis=1)
        for x, y in ((keys, k_scale), (values, v_scale))
    )
    scores = np.einsum("nh,lnh->nl", q.astype(np.float64), keys) * scale
    if cap := get("soft_cap"):
        scores = cap * np.tanh(scores / cap)
    sinks = np.full(len(q), -np.inf) if sinks is None else sinks
    lse = np.logaddexp.reduce(np.concatenate([scores, sinks[:, None]], axis=1), axis=1)
    weights = np.exp(scores - np.where(np.isneginf(lse), 0.0, lse)[:, None])
    return np.einsum("nl,lnh->nh", weights, values), lse


def _rounded(q: Array, q_scale: float, dtype: Any) -> Array:
    divided = (q / np.asarray(q_scale, q.dtype)).astype(np.float32)
    if dtype == np.int8:
        return divided.round().clip(-127, 127)
    limit = float(ml_dtypes.finfo(dtype).max)
    return divided.clip(-limit, limit).astype(dtype)


# Calls with garbage wherever nothing may be read.
CALLS = [
    RpaCall("bf16", (1, 6, 0, 1), (9, 13, 3, 4), dtype="bf16", keywords={"sm_scale": 0.1}),
    RpaCall("no sequence", (), ()),
    RpaCall("all decode, odd heads of e4m3", (1, 1, 1, 1), (1, 5, 16, 9), num_heads=6, kv_heads=3, cache_dtype="e4m3",
            keywords={"sm_scale": 0.1, "q_scale": 0.5, "k_scale": 0.75, "v_scale": 1.5}),
    RpaCall("all prefill, f16 over e5m2", (7, 3, 12), (7, 3, 12), num_heads=8, kv_heads=1, dtype="f16",
            cache_dtype="e5m2", keywords={"sm_scale": 0.1, "sliding_window": 5}),
    RpaCall("int8", (3, 1), (9, 13), cache_dtype="int8", page_size=16,
            keywords={"sm_scale": 0.1, "k_scale": (0.02, 0.03), "v_scale": 0.01, "soft_cap": -3.0}),
    RpaCall("int8 queries", (3, 1), (9, 13), cache_dtype="int8", keywords={"q_scale": 0.02, "k_scale": 0.002}),
    RpaCall("pairs", (4, 1), (6, 9), num_heads=6, kv_heads=3, head_dim=64, dtype="bf16", cache="pairs", sinks=True,
            keywords={"sm_scale": 0.1, "sliding_window": 3}),
    RpaCall("pairs of e4m3", (1, 5), (6, 5), kv_heads=1, head_dim=64, cache_dtype="e4m3", cache="pairs",
            keywords={"sm_scale": 0.2, "v_scale": 2.0}),
    RpaCall("head dim 40, no write", (2, 2), (5, 9), head_dim=40, page_size=1,
            keywords={"update_kv_cache": False, "use_causal_mask": False, "sliding_window": 4}),
    RpaCall("more rows than tokens", (6, 2), (4, 0), cache="flat", sinks=True),
    RpaCall("chunks", (1, 13, 1, 20, 9, 0), (17, 13, 8, 37, 24, 5), dtype="bf16",
            keywords={"sm_scale": 0.1, "attention_chunk_size": 8}),
    RpaCall("chunks of pages, window", (3, 14, 2), (11, 30, 1), sinks=True,
            keywords={"sm_scale": 0.1, "attention_chunk_size": 4, "sliding_window": 3}),
    RpaCall("chunks, not causal", (7, 5), (19, 3), head_dim=64, cache="pairs", kv_heads=4,
            keywords={"sm_scale": 0.2, "attention_chunk_size": 12, "use_causal_mask": False}),
    RpaCall("one chunk", (7, 1), (19, 3), keywords={"sm_scale": 0.1, "attention_chunk_size": 2**31}),
]  # fmt: skip
_MIXED: dict[str, Any] = {"q_lens": (1, 6, 1), "kv_lens": (9, 13, 4), "dead": 1, "poisoned": False}
# Calls that were run by other packages too, by the function that ran them.
THEIRS = {
    "tokamax": [
        RpaCall("tokamax f32", **_MIXED, cache="flat", keywords={"sm_scale": 0.09, "return_lse": True}),
        RpaCall("tokamax bf16, decode", (1, 1), (9, 12), dtype="bf16", cache="flat", poisoned=False),
        RpaCall(
            "tokamax head dim 64, window, cap", **_MIXED, head_dim=64, cache="flat",
            keywords={"sm_scale": 0.2, "sliding_window": 3, "soft_cap": 1.5, "return_lse": True},
        ),
        RpaCall("tokamax head dim 80, not causal", **_MIXED, head_dim=80, cache="flat",
                keywords={"sm_scale": 0.1, "use_causal_mask": False, "sliding_window": 4, "return_lse": True}),
        RpaCall("tokamax without a write", **_MIXED, cache="flat", keywords={"sm_scale": 0.1, "skip_kv_update": True}),
        RpaCall(
            "tokamax scales of its reference", **_MIXED, cache_dtype="e4m3", cache="flat",
            keywords={"sm_scale": 0.1, "q_scale": 0.5, "k_scale": 0.5, "v_scale": 0.25, "scale_rule": "reference"},
        ),
    ],
    "tpu-inference": [
        RpaCall("v3 f32", **_MIXED, keywords={"sm_scale": 0.09}),
        RpaCall("v3 bf16, prefill", (5, 8), (5, 8), dtype="bf16", poisoned=False, keywords={"sm_scale": 0.1}),
        RpaCall("v3 head dim 80, window, cap", **_MIXED, head_dim=80,
                keywords={"sm_scale": 0.1, "sliding_window": 5, "soft_cap": 2.0}),
        RpaCall("v3 not causal", **_MIXED, keywords={"sm_scale": 0.1, "use_causal_mask": False}),
        RpaCall("v3 e4m3", **_MIXED, kv_heads=1, cache_dtype="e4m3",
                keywords={"sm_scale": 0.1, "q_scale": 0.5, "k_scale": 0.75, "v_scale": 1.5}),
    ],
    "tpu-inference hd64": [
        RpaCall("hd64 f32", **_MIXED, head_dim=64, cache="pairs", sinks=True,
                keywords={"sm_scale": 0.2, "sliding_window": 6}),
        RpaCall("hd64 bf16, one head", **_MIXED, kv_heads=1, head_dim=64, dtype="bf16", cache="pairs", sinks=True),
    ],
}  # fmt: skip
