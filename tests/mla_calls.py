"""Calls of multi-head latent attention as tpu-inference and tokamax have them: inputs by seed, and float64 results.

`parity/make_mla.py` uses the inputs too.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from rpa_calls import DTYPES, GARBAGE, Array, aligned, rounded


@dataclasses.dataclass(frozen=True)
class MlaCall:
    """One call.

    Attributes:
      name: decides about the random numbers.
      q_lens, kv_lens: of the live sequences.
      num_heads, latent_dim, rotary_dim: N, L and R.
      page_size: S, a multiple of `pack`.
      dtype, cache_dtype: names in `DTYPES`; None is that of the queries.
      pack: tokens of the second axis of a page but one; None is 32 / bits of the cache's dtype.
      dead: sequences behind the live ones, and rows that none has.
      poisoned: whether unused tokens, pages and table entries hold garbage.
      keywords: of the call.
    """

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_heads: int = 4
    latent_dim: int = 40
    rotary_dim: int = 24
    page_size: int = 4
    dtype: str = "f32"
    cache_dtype: str | None = None
    pack: int | None = None
    dead: int = 2
    poisoned: bool = True
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def build(call: MlaCall) -> dict[str, Array]:
    """The arrays of the call by the names of its arguments, with tokens as the first axis of all queries."""
    rng = np.random.RandomState(zlib.crc32(call.name.encode()))  # whose numbers are the same in all releases
    dtype, cache_dtype = DTYPES[call.dtype], DTYPES[call.cache_dtype or call.dtype]
    live, rows = len(call.q_lens), sum(call.q_lens) + call.dead
    num_seqs = max(live + call.dead, 1)
    pages_of = [-(-length // call.page_size) for length in call.kv_lens]
    num_pages, max_pages = sum(pages_of) + 3, max([*pages_of, 0]) + 1

    def numbers(dtype: Any, *shape: int) -> Array:
        return rounded(rng.standard_normal(shape), dtype)

    order, tables = list(rng.permutation(num_pages)), np.zeros((num_seqs, max_pages), np.int32)
    if call.poisoned:
        tables[:] = rng.choice(GARBAGE, tables.shape)
    rotated_from = aligned(call.latent_dim, 128)
    cache = np.zeros((num_pages, call.page_size, rotated_from + aligned(call.rotary_dim, 128)), cache_dtype)
    cache[..., : call.latent_dim] = numbers(cache_dtype, num_pages, call.page_size, call.latent_dim)
    rotated = slice(rotated_from, rotated_from + call.rotary_dim)
    cache[..., rotated] = numbers(cache_dtype, num_pages, call.page_size, call.rotary_dim)
    used = np.zeros(cache.shape[:2], bool)
    for b, (length, count) in enumerate(zip(call.kv_lens, pages_of, strict=True)):
        for page in range(count):
            tables[b, page] = order.pop()
            used[tables[b, page], : length - page * call.page_size] = True
    if call.poisoned:
        cache[~used] = np.nan

    behind = rng.randint(0, 9, call.dead + 1) if call.poisoned else np.zeros(call.dead + 1, np.int64)
    ends = np.cumsum([0, *call.q_lens])
    pack = call.pack or 4 // cache_dtype.itemsize
    return {
        "ql_nope": numbers(dtype, rows, call.num_heads, call.latent_dim),
        "q_pe": numbers(dtype, rows, call.num_heads, call.rotary_dim),
        "new_kv_c": numbers(cache_dtype, rows, call.latent_dim),
        "new_k_pe": numbers(cache_dtype, rows, call.rotary_dim),
        "cache_kv": cache.reshape(num_pages, call.page_size // pack, pack, -1),
        "kv_lens": np.concatenate([call.kv_lens, behind])[:num_seqs].astype(np.int32),
        "page_indices": tables.reshape(-1),
        "cu_q_lens": np.concatenate([ends, ends[-1] + behind])[: num_seqs + 1].astype(np.int32),
        "distribution": np.array([0, 0, live], np.int32),
    }


def expected(call: MlaCall, arrays: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """`(out, cache, lse)`: float64 with tokens as the first axis, and the cache bit by bit."""
    cache = arrays["cache_kv"].copy()
    flat = cache.reshape(len(cache), call.page_size, -1)  # a view
    rotated_from = aligned(call.latent_dim, 128)
    rotated = slice(rotated_from, rotated_from + call.rotary_dim)
    out = np.zeros((*arrays["ql_nope"].shape[:2], call.latent_dim))
    lse = np.full(out.shape[:2], -np.inf)
    tables = arrays["page_indices"].reshape(len(arrays["kv_lens"]), -1)
    for b in range(int(arrays["distribution"][2])):
        begin, end = map(int, arrays["cu_q_lens"][b : b + 2])
        length = int(arrays["kv_lens"][b])
        pages, tokens = tables[b, np.arange(length) // call.page_size], np.arange(length) % call.page_size
        new = slice(max(length - end + begin, 0), length)
        first = end - (length - new.start)
        flat[pages[new], tokens[new]] = 0
        flat[pages[new], tokens[new], : call.latent_dim] = arrays["new_kv_c"][first:end]
        flat[pages[new], tokens[new], rotated] = arrays["new_k_pe"][first:end]
        keys = flat[pages, tokens].astype(np.float64)
        latents, rotated_keys = keys[:, : call.latent_dim], keys[:, rotated]
        for t in range(begin, end):
            q, q_pe = (arrays[name][t].astype(np.float64) for name in ("ql_nope", "q_pe"))
            scores = q @ latents.T + q_pe @ rotated_keys.T
            out[t], lse[t] = _row(call, scores, latents, length - end + t)
    return out, cache, lse


def _row(call: MlaCall, scores: Array, latents: Array, position: int) -> tuple[Array, Array]:
    """One row: `(out [N, L], lse [N])`."""
    factors = {name: call.keywords.get(name) or 1.0 for name in ("sm_scale", "q_scale", "k_scale", "v_scale")}
    scores = scores * factors["sm_scale"] * factors["q_scale"] * factors["k_scale"]
    if cap := call.keywords.get("soft_cap"):
        scores = cap * np.tanh(scores / cap)
    window = call.keywords.get("sliding_window") or position + 1
    seen = slice(max(position + 1 - window, 0), max(position + 1, 0))
    scores, latents = scores[:, seen], latents[seen]
    if not scores.size:
        return np.zeros((len(scores), call.latent_dim)), np.full(len(scores), -np.inf)
    lse = np.logaddexp.reduce(scores, axis=1)
    return np.exp(scores - lse[:, None]) @ latents * factors["v_scale"], lse


# Calls with garbage wherever nothing may be read.
CALLS = [
    MlaCall("bf16", (1, 6, 0, 1), (9, 13, 3, 4), dtype="bf16", keywords={"sm_scale": 0.1}),
    MlaCall("no sequence", (), ()),
    MlaCall("decode, sizes of DeepSeek", (1, 1, 1), (1, 21, 16), num_heads=16, latent_dim=512, rotary_dim=64,
            page_size=8, dtype="bf16", keywords={"sm_scale": 0.07}),
    MlaCall("e4m3, scales", (1, 1, 7), (1, 5, 9), num_heads=6, cache_dtype="e4m3",
            keywords={"sm_scale": 0.1, "q_scale": 0.5, "k_scale": 0.75, "v_scale": 1.5}),
    MlaCall("queries of e4m3", (1, 2), (7, 5), dtype="e4m3", cache_dtype="e4m3", latent_dim=128,
            keywords={"sm_scale": 0.1, "q_scale": 0.5, "v_scale": 0.25}),
    MlaCall("f16 over e5m2, window", (7, 3, 12), (7, 3, 12), num_heads=1, dtype="f16", cache_dtype="e5m2",
            keywords={"sm_scale": 0.1, "sliding_window": 5}),
    MlaCall("cap, tokens first", (3, 1), (9, 13), keywords={"sm_scale": 0.2, "soft_cap": -2.0, "heads_first": False}),
    MlaCall("more rows than tokens", (6, 2), (4, 0), latent_dim=130, rotary_dim=128, page_size=1),
    MlaCall("wide packing", (5, 1), (17, 8), dtype="bf16", page_size=16, pack=8, keywords={"sm_scale": 0.1}),
]  # fmt: skip
_MIXED: dict[str, Any] = {"q_lens": (1, 6, 1), "kv_lens": (9, 13, 4), "dead": 0, "poisoned": False}
# Their plain functions slice as many rows for each sequence.
_ALIKE: dict[str, Any] = {"q_lens": (3, 3), "kv_lens": (9, 6), "dead": 0, "poisoned": False}
_SCALES = {"sm_scale": 0.1, "q_scale": 0.5, "k_scale": 0.75, "v_scale": 1.5}
# Calls that were run by other packages too, by the function that ran them.
THEIRS = {
    "tpu-inference": [
        MlaCall("f32", **_MIXED, keywords={"sm_scale": 0.09}),
        MlaCall("bf16, sizes of DeepSeek", (2, 1), (5, 9), latent_dim=512, rotary_dim=64, dtype="bf16", dead=0,
                poisoned=False, keywords={"sm_scale": 0.07}),
        MlaCall("window, cap", **_MIXED, latent_dim=128, keywords={"sm_scale": 0.1, "sliding_window": 5,
                                                                  "soft_cap": 2.0}),
        MlaCall("e4m3 with scales", **_MIXED, cache_dtype="e4m3", keywords=_SCALES),
    ],
    "tokamax": [
        MlaCall("tokamax f32", **_ALIKE, keywords={"sm_scale": 0.09}),
        MlaCall("tokamax window, cap", **_ALIKE, latent_dim=128,
                keywords={"sm_scale": 0.1, "sliding_window": 4, "soft_cap": 1.5}),
        MlaCall("tokamax e4m3", **_ALIKE, cache_dtype="e4m3", keywords=_SCALES),
    ],
}  # fmt: skip
