"""So many packed rows of few query rows, by large groups or drafts, that an engine may have another kernel for them."""

from __future__ import annotations

from typing import Any

from cases.case import Case
from cases.inputs import INT32_MAX

SHAPE: dict[str, Any] = {"num_heads": 64, "num_kv_heads": 1, "head_dim": 128, "dtype": "bf16", "max_pages": 320}
SMALL: dict[str, Any] = {"head_dim": 64, "dtype": "f16"}
GONE = ((0, 3, -1), (0, 200, INT32_MAX), (1, 0, -7))


def cases() -> list[Case]:
    decode = Case(
        "large_group",
        (1, 1, 1),
        (5000, 37, 0),
        "paged_attention",
        **SHAPE,
        why="KV splits of 64 packed rows, beside a short sequence and one without keys",
    )
    masks: dict[str, Any] = {"sliding_window": 3000, "soft_cap": 3.0}
    return [
        decode,
        decode.vary("large_group_f16", "the same of the other head dim and dtype", **SMALL),
        decode.vary("large_group_33", "packed rows end inside a warp's 16", num_heads=66, num_kv_heads=2),
        decode.vary("large_group_72", "a group of two row tiles", num_heads=72),
        decode.vary("large_group_page_size_17", "pages end inside key tiles", page_size=17, max_pages=300),
        decode.vary("large_group_pages_gone", "ids outside the pool between others", bad_ids=GONE),
        decode.vary("large_group_masks", "a window and a cap, with sinks", sinks=True, keywords=masks, bad_ids=GONE),
        decode.vary("large_group_scale", "a scale below 0 turns scores around", keywords={"scale": -0.05}),
        decode.vary("large_group_rising", "maxima rise all the time", rising=3.0),
        *_drafts(decode),
        *_wide(decode),
    ]


def _wide(decode: Case) -> list[Case]:
    wide = decode.vary(
        "large_group_wide",
        "many KV splits of 15 packed rows of the widest heads, beside a short sequence and one without keys",
        num_heads=15,
        head_dim=256,
    )
    rows: dict[str, Any] = {"q_lens": (8, 4, 3), "kv_lens": (3000, 37, 2), "num_heads": 8, "num_kv_heads": 2}
    drafts = wide.vary("large_group_wide_drafts", "drafts of wide heads in f16", **rows, dtype="f16")
    return [
        wide,
        wide.vary("large_group_wide_192", "the same of half as many columns and some", head_dim=192, sinks=True),
        wide.vary("large_group_wide_gone", "ids outside the pool between others", bad_ids=GONE),
        drafts.vary(drafts.name, drafts.why, function="ragged_paged_attention"),
    ]


def _drafts(decode: Case) -> list[Case]:
    rows: dict[str, Any] = {"q_lens": (8, 4, 3, 0), "kv_lens": (5000, 37, 2, 9), "num_heads": 32, "num_kv_heads": 4}
    drafts = decode.vary("large_group_drafts", "drafts, of which a row has no key", **rows)
    drafts = drafts.vary(drafts.name, drafts.why, function="ragged_paged_attention")
    window: dict[str, Any] = {"sinks": True, "keywords": {"sliding_window": 70}}
    return [
        drafts,
        drafts.vary("large_group_drafts_f16", "drafts of the other head dim and dtype, with slack", rows=17, **SMALL),
        drafts.vary("large_group_drafts_window", "each row of a tile sees other keys", **window),
        drafts.vary("large_group_drafts_dense", "drafts without causality", keywords={"causal": False}),
    ]
