"""Enough keys that an engine splits them between workers, with KV splits that are empty or short."""

from __future__ import annotations

from typing import Any

from cases.case import Case
from cases.inputs import INT32_MAX

SHAPE: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "max_pages": 320}
PASSED = tuple((0, column, -1) for column in range(200))  # pages of the first sequence that are gone


def cases() -> list[Case]:
    return [*_decode(), *_prefill()]


def _decode() -> list[Case]:
    lengths = (5000, 37)
    decode = Case(
        "long_decode", (1, 1), lengths, "paged_attention", **SHAPE, why="KV splits of one sequence, beside a short one"
    )
    int8: dict[str, Any] = {"dtype": "bf16", "page_dtype": "int8", "k_scale": 0.02, "v_scale": 0.02}
    e4m3: dict[str, Any] = {"dtype": "f16", "page_dtype": "e4m3", "keywords": {"soft_cap": 3.0}}
    gone: dict[str, Any] = {"kv_lens": (5000, 5119), "bad_ids": PASSED, "sinks": True}
    wide: dict[str, Any] = {"keywords": {"sliding_window": 3000}, "bad_ids": PASSED[:100]}
    return [
        decode,
        decode.vary("long_decode_empty_parts", "KV splits without a valid page", kv_lens=(5000, 5119), bad_ids=PASSED),
        decode.vary("long_decode_full_table", "every entry of the table, beside no key", kv_lens=(INT32_MAX, 0)),
        decode.vary(
            "long_decode_window", "a window leaves most KV splits empty", keywords={"sliding_window": 100}, sinks=True
        ),
        decode.vary("long_decode_window_wide", "a window over several KV splits, behind pages that are gone", **wide),
        decode.vary("long_decode_sinks", "a sink counts once, not per KV split", sinks=True, kv_lens=(5000, 4500)),
        decode.vary("long_decode_bf16", "merging KV splits of bf16", dtype="bf16"),
        decode.vary("long_decode_int8", "scales in KV splits", **int8),
        decode.vary("long_decode_e4m3", "a cap in KV splits, over fp8 without scales", **e4m3),
        decode.vary("long_decode_group_7", "merging KV splits of an odd number of rows", num_heads=7, dtype="bf16"),
        decode.vary(
            "long_decode_group_7_empty_parts", "likewise, many of them empty", num_heads=7, dtype="bf16", **gone
        ),
        decode.vary(
            "long_decode_group_12_int8", "many KV splits of more rows than are handed over", num_heads=12, **int8
        ),
        decode.vary("long_decode_group_12", "more rows than are merged at once", num_heads=12, dtype="bf16"),
        decode.vary("long_decode_group_24", "merging KV splits of a large group", num_heads=24),
    ]


def _prefill() -> list[Case]:
    prefill = Case("long_prefill", (20, 1), (4107, 4096), **SHAPE, why="a chunk behind a long context, beside decode")
    window: dict[str, Any] = {"keywords": {"sliding_window": 700}, "sinks": True}
    whole = {"q_lens": (150, 70), "kv_lens": (150, 70), "max_pages": 10, "dtype": "bf16"}
    chunk = {"q_lens": (64, 33), "kv_lens": (150, 129), "max_pages": 10, "num_heads": 6}
    return [
        prefill,
        prefill.vary("long_prefill_bf16", "a chunk behind a long context in bf16", dtype="bf16"),
        prefill.vary("long_prefill_window", "a window begins inside the chunk's context", **window),
        prefill.vary("whole_prompt", "row tiles that each see another number of keys", **whole),
        prefill.vary("chunked_prompt", "row tiles behind a prefix", **chunk),
    ]
