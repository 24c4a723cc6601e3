"""Many sequences of few keys, so that each CTA has several whole row blocks: an engine may end these in its own way."""

from __future__ import annotations

from typing import Any

from cases.bases import E4M3
from cases.case import Case
from cases.inputs import INT32_MAX
from cases.tiles import INT8

# On a GPU of 132 multiprocessors, with two CTAs each, 16 heads of 40 sequences are 2.4 row blocks per CTA.
SEQS, KV_HEADS = 40, 16
LENGTHS = (1, 16, 0, 63, 64, 65, 24, 129, 128, 7, 150, 192, 33)
KV_LENS = (LENGTHS * 4)[:SEQS]
ROW_COUNTS = ((3, 1, 3, 2, 0, 3, 3) * 6)[:SEQS]
# Enough keys for KV splits beside whole row blocks.
MIXED_LENGTHS = ((1, 300, 64, 70, 2, 384, 0, 180) * 5)[:SEQS]


def cases() -> list[Case]:
    decode = Case(
        "many_row_blocks",
        (1,) * SEQS,
        KV_LENS,
        "paged_attention",
        num_heads=4 * KV_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=64,
        max_pages=12,
        dtype="bf16",
        why="row blocks of one to three key tiles, and sequences of one key or none",
    )
    group = {n: {"num_heads": n * KV_HEADS} for n in (1, 8, 11, 16)}
    masks: dict[str, Any] = {"sliding_window": 40, "soft_cap": 3.0}
    wide: dict[str, Any] = {"head_dim": 128, "max_pages": 24, "kv_lens": MIXED_LENGTHS}
    return [
        decode,
        decode.vary("many_row_blocks_mha", "a packed row each", **group[1]),
        decode.vary("many_row_blocks_11", "more than eight packed rows, of head dim 96", head_dim=96, **group[11]),
        decode.vary("many_row_blocks_16", "as many packed rows as a warp has", **group[16]),
        decode.vary("many_row_blocks_f16", "f16, and pages that end inside key tiles", dtype="f16", page_size=17),
        decode.vary("many_row_blocks_masks", "a window, a cap and sinks", sinks=True, keywords=masks),
        decode.vary("many_row_blocks_gone", "ids outside the pool", bad_ids=((3, 1, -1), (7, 0, INT32_MAX))),
        decode.vary("many_row_blocks_wide", "longer ones of head dim 128, some of them split", **wide),
        decode.vary("many_row_blocks_wide_16", "and many packed rows", **wide, **group[16]),
        decode.vary("many_row_blocks_e4m3", "over 8-bit pages, of tiles in odd and even numbers", **wide, **_E4M3),
        decode.vary("many_row_blocks_int8", "integers, of eight packed rows", **wide, **group[8], **_INT8),
        decode.vary("many_row_blocks_e4m3_masks", "masks and sinks", **wide, **_E4M3, sinks=True, keywords=masks),
        *_drafts(decode),
    ]


_E4M3: dict[str, Any] = {**E4M3, "k_scale": 0.7, "v_scale": 1.9}
_INT8: dict[str, Any] = {**INT8, "v_scale": 0.03}


def _drafts(decode: Case) -> list[Case]:
    rows: dict[str, Any] = {"q_lens": ROW_COUNTS, "function": "ragged_paged_attention", "rows": 3 * SEQS}
    drafts = decode.vary("many_row_blocks_drafts", "three drafts of which some rows see no key", **rows)
    return [
        drafts,
        drafts.vary("many_row_blocks_drafts_window", "the same with a window", keywords={"sliding_window": 20}),
        drafts.vary("many_row_blocks_drafts_e4m3", "of two heads", **_E4M3, head_dim=128, num_heads=2 * KV_HEADS),
    ]
