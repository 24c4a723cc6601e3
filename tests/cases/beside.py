"""Decode rows beside a chunk of which an engine may decode some on multiprocessors that prefill: heads of 128."""

from __future__ import annotations

from typing import Any

from cases.case import Case

# In packed rows: 300 rows are prefill's on a Hopper GPU, the others, with 8 at most, may be decoded beside them. Their
# sequences are so short that PrefillDecodes (work_split.h) says yes on any GPU.
BESIDE = Case(
    "beside",
    (1, 300, 1, 0, 2, 1),
    (600, 333, 65, 9, 128, 1),
    num_heads=8,
    head_dim=128,
    max_pages=38,
    dtype="bf16",
    rows=308,
    why="decode rows of several key tiles, one, and a part of one, beside a chunk; three rows are slack",
)


def cases() -> list[Case]:
    window: dict[str, Any] = {"keywords": {"sliding_window": 100, "soft_cap": 3.0}, "sinks": True}
    bad = ((0, 0, -1), (0, 6, 10**9), (0, 37, -7), (1, 2, -1), (4, 7, 10**9))
    eights = {"num_heads": 16, "q_lens": (1, 140, 1, 0, 1, 1)}
    many: dict[str, Any] = {
        "q_lens": (1,) * 40 + (300,),
        "kv_lens": (*(29 * i % 400 for i in range(40)), 333),
        "max_pages": 26,
        "rows": None,
    }
    return [
        BESIDE,
        BESIDE.vary("beside_f16", "the same in f16, over pages larger than a key tile", dtype="f16", **_pages(128, 5)),
        BESIDE.vary("beside_page_size_24", "boxes of eight tokens", **_pages(24, 25)),
        BESIDE.vary("beside_all", "a window, a cap and sinks, and pages outside the pool", bad_ids=bad, **window),
        BESIDE.vary("beside_dense", "no causality", keywords={"causal": False}),
        BESIDE.vary("beside_rising", "each key tile rescales all before it", rising=4.0),
        BESIDE.vary("beside_without_keys", "drafts of which rows have no keys", kv_lens=(600, 333, 65, 9, 1, 0)),
        BESIDE.vary("beside_wide", "four drafts have more packed rows than that", q_lens=(1, 298, 1, 0, 4, 1)),
        BESIDE.vary("beside_eights", "as many packed rows as there can be, of one row", **eights),
        BESIDE.vary("beside_many", "more row blocks than a multiprocessor takes in one go, some empty", **many),
    ]


def _pages(page_size: int, max_pages: int) -> dict[str, Any]:
    return {"page_size": page_size, "max_pages": max_pages}
