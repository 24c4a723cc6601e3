"""Shapes that matter to engines which work by key tiles and row tiles: packed rows (tokens x group) of a KV head."""

from __future__ import annotations

from typing import Any

from cases.bases import DECODE, E4M3, E5M2, MIXED
from cases.case import Case
from cases.inputs import INT32_MAX, INT32_MIN

INT8: dict[str, Any] = {"page_dtype": "int8", "k_scale": 0.02, "v_scale": (0.01, 0.03)}
# By page dtype: the query dtype, and the fields of the pages. Each narrow dtype is converted by code of its own.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("bf16", {}),
    "f16": ("f16", {}),
    "e4m3": ("bf16", E4M3),
    "e5m2": ("f16", E5M2),
    "int8": ("bf16", INT8),
}

TILED = DECODE.vary("tiled", "decode as engines for GPUs take it", head_dim=64, dtype="bf16")
# Speculative drafts over long caches. All share their shapes; rows that no draft takes are slack.
DRAFTS = Case(
    "drafts",
    (8, 9, 1, 8, 9),
    (4107, 1500, 700, 8, 65),
    num_heads=8,
    head_dim=64,
    max_pages=260,
    dtype="bf16",
    why="a few rows per sequence over long caches, on both sides of where decode becomes prefill",
)
PAIR = Case(
    "packed_rows_64",
    (8, 8),
    (300, 77),
    num_heads=16,
    head_dim=64,
    max_pages=20,
    dtype="bf16",
    why="64 packed rows fill a row tile",
)


def cases() -> list[Case]:
    return [
        *_drafts(),
        *_packed_rows(),
        *_row_tiles(),
        *_page_sizes(),
        *_page_ids(),
        *_powers(),
        *_rising_scores(),
        *_head_dims(),
        *_batches(),
    ]


def _drafts() -> list[Case]:
    every: dict[str, Any] = {"sinks": True, "keywords": {"sliding_window": 700, "soft_cap": 3.0}}
    return [
        DRAFTS,
        DRAFTS.vary("drafts_of_8", "drafts of one length, with slack", q_lens=(8, 8, 8, 8, 0), rows=35),
        DRAFTS.vary("drafts_of_9", "one token more, with slack", q_lens=(9, 9, 9, 0, 0), rows=35),
        DRAFTS.vary("drafts_longer_than_keys", "drafts of which rows have no keys", kv_lens=(7, 9, 0, 4107, 1)),
        DRAFTS.vary("drafts_all", "all keywords over KV splits of several rows", **every),
        DRAFTS.vary("drafts_e4m3", "fp8 in KV splits of several rows", dtype="f16", **E4M3),
        DRAFTS.vary("drafts_int8", "int8 in KV splits of several rows", **INT8),
    ]


def _packed_rows() -> list[Case]:
    more = {"q_lens": (5, 5), "num_heads": 26}
    return [
        PAIR,
        PAIR.vary("packed_rows_65", "one packed row begins a second row tile", **more),
        PAIR.vary("packed_rows_65_e4m3", "a second row tile of one row, over fp8", **more, **E4M3),
        PAIR.vary("packed_rows_72", "a token's group lies in two row tiles", q_lens=(9, 9)),
    ]


def _row_tiles() -> list[Case]:
    """Enough row tiles and keys that an engine may keep key tiles it converted for the row tiles that follow."""
    many = {"num_heads": 64, "q_lens": (140, 3), "kv_lens": (2100, 5)}
    int8 = {**many, "kv_lens": (590, 5), "page_size": 16, "max_pages": 37, "dtype": "f16", **INT8}
    splits = {**many, "q_lens": (126, 3), "page_size": 16, "max_pages": 132, **E4M3}
    lengths = {"q_lens": (130,) * 7, "kv_lens": (150, 130, 144, 3, 160, 131, 128)}
    several = {**many, **lengths, "page_size": 16, "max_pages": 10, **E4M3}
    return [
        PAIR.vary(
            "row_tiles_page_size_17",
            "stages are filled again and again, by pages that end inside key tiles",
            **many,
            page_size=17,
            max_pages=124,
        ),
        PAIR.vary(
            "row_tiles_page_size_16",
            "stages are filled again and again, by whole pages",
            **many,
            page_size=16,
            max_pages=132,
        ),
        PAIR.vary("row_tiles_int8", "row tiles share converted int8 key tiles", **int8),
        PAIR.vary("row_tiles_in_parts_e4m3", "two KV splits keep a Hopper GPU busy and share key tiles", **splits),
        PAIR.vary("row_tiles_of_many_e4m3", "each multiprocessor of a GPU takes several work tiles", **several),
    ]


def _page_sizes() -> list[Case]:
    """Pages smaller and larger than a key tile, multiples of TMA's boxes or not, in each width."""
    every = []
    for i, page_size in enumerate((1, 8, 24, 48, 80, 256, 1024)):
        max_pages = max(2, -(-200 // page_size))
        most = max_pages * page_size
        ends = (most, page_size, min(page_size + 1, most), most - 1)
        size = {"page_size": page_size, "max_pages": max_pages, "kv_lens": ends}
        why = f"key tiles over pages of {page_size}"
        every.append(TILED.vary(f"tiles_page_size_{page_size}_bf16", f"{why}, 16 bits", **size))
        narrow = (E4M3, INT8, E5M2)[i % 3]
        name = f"tiles_page_size_{page_size}_{narrow['page_dtype']}"
        every.append(TILED.vary(name, f"{why}, 8 bits", dtype=("bf16", "f16")[i % 2], **size, **narrow))
    return every


def _page_ids() -> list[Case]:
    # P is 19, and 24 for pages of 1 and 64 tokens.
    bad = ((0, 0, -1), (1, 0, 19), (1, 1, INT32_MIN), (2, 1, INT32_MAX), (3, 0, 20), (3, 2, -19))
    why = "pages outside the pool are never loaded"
    every = [
        TILED.vary(f"decode_ids_bad_{kind}", f"{why}, {kind}", dtype=dtype, bad_ids=bad, **pages)
        for kind, (dtype, pages) in KINDS.items()
    ]
    more_bad = ((0, 0, -1), (1, 1, 24), (2, 1, INT32_MAX), (2, 6, INT32_MIN))
    for page_size in (1, 64):
        lens = (1, 2 * page_size + 1, 7 * page_size)
        size = {"q_lens": (1,) * 3, "kv_lens": lens, "page_size": page_size, "max_pages": 7, "bad_ids": more_bad}
        for kind in ("bf16", "e4m3"):
            dtype, pages = KINDS[kind]
            name = f"decode_ids_bad_{kind}_page_size_{page_size}"
            every.append(TILED.vary(name, f"{why}, {kind} pages of {page_size}", dtype=dtype, **size, **pages))
    return every


def _powers() -> list[Case]:
    """Queries that no 16-bit float but bf16 holds; one scale or the other brings the logits back."""
    every = []
    for pages in (E4M3, E5M2):
        kind = pages["page_dtype"]
        for power in (30, -30):
            why = f"queries of 1e{power} must not pass through float16"
            scale = {"keywords": {"scale": 10.0**-power / 8}}
            name = f"q_1e{power}_{kind}"
            every.append(TILED.vary(name, f"{why}: scale", q_factor=10.0**power, **scale, **pages))
            factors = {"k_scale": (10.0**-power, 3 * 10.0**-power), "v_scale": 10.0**power}
            every.append(TILED.vary(f"{name}_k_scale", f"{why}: k_scale", q_factor=10.0**power, **{**pages, **factors}))
    return every


def _rising_scores() -> list[Case]:
    """The running maximum of the online softmax changes at every key tile, or never after the first."""
    long = {"q_lens": (1, 1), "kv_lens": (5000, 130), "max_pages": 320}
    drafts = (4107, 1500, 700, 8, 650)
    fp8 = {"dtype": "f16", "page_dtype": "e4m3"}
    return [
        TILED.vary("rising_bf16", "each key tile rescales all before it", rising=4.0, **long),
        TILED.vary("rising_e4m3", "each key tile rescales all before it, over fp8", rising=4.0, **long, **fp8),
        DRAFTS.vary(
            "rising_drafts", "each key tile rescales several rows by factors of their own", kv_lens=drafts, rising=4.0
        ),
        TILED.vary("falling_bf16", "later key tiles weigh next to nothing", rising=-4.0, **long),
    ]


def _head_dims() -> list[Case]:
    every = []
    for head_dim in (64, 80, 96, 128, 192, 256):
        for kind in ("e4m3", "int8") if head_dim % 96 else ("e5m2", "int8"):
            dtype = "f16" if kind == "int8" and head_dim % 64 else "bf16"
            name = f"tiles_head_dim_{head_dim}_{kind}"
            why = f"key tiles of {kind} with a head dim of {head_dim}"
            every.append(TILED.vary(name, why, head_dim=head_dim, dtype=dtype, **KINDS[kind][1]))
    why = "key tiles of the other head dims in a mixed batch"
    every.append(MIXED.vary("mixed_head_dim_96_e4m3", why, head_dim=96, dtype="bf16", **E4M3))
    every.append(MIXED.vary("mixed_head_dim_192", why, head_dim=192, dtype="f16"))
    every.append(MIXED.vary("mixed_head_dim_256_int8", why, head_dim=256, dtype="bf16", **INT8))
    return every


def _batches() -> list[Case]:
    lengths = tuple(37 * i % 201 for i in range(300))
    decode = {"q_lens": (1,) * 300, "kv_lens": lengths, "max_pages": 13}
    rows = tuple((1, 0, 2, 8, 1)[i % 5] for i in range(100))
    ragged = {"q_lens": rows, "kv_lens": lengths[:100], "max_pages": 13, "function": "ragged_paged_attention"}
    window: dict[str, Any] = {"keywords": {"sliding_window": 1000}, "bad_ids": tuple((0, i, -1) for i in range(250))}
    long = {"kv_lens": (5000, 1100, 1000, 37), "max_pages": 320}
    # No more rows than sequences, as in steps of decode rows, but one sequence has most of them: from 17 on more than
    # decode has where prefill is launched, too.
    slots = {"q_lens": (0, 35, *(i % 3 // 2 for i in range(58))), "kv_lens": lengths[100:160], "rows": 57}
    prompt: dict[str, Any] = {**slots, "num_heads": 8, "max_pages": 13, "function": "ragged_paged_attention"}
    # With two key/value heads about as many row blocks as an H100 or H200 has multiprocessors.
    few: dict[str, Any] = {"q_lens": (1,) * 64, "max_pages": 20}
    return [
        TILED.vary("batch_of_64_alike", "a block for each row block, if they are alike", kv_lens=(300,) * 64, **few),
        TILED.vary("batch_of_64", "as many of unequal lengths", kv_lens=lengths[:64], **few),
        TILED.vary("batch_of_300", "more sequences than multiprocessors, of unequal lengths", **decode),
        TILED.vary(
            "batch_of_100", "decode rows, drafts and no rows among many sequences", dtype="f16", **ragged, **E4M3
        ),
        TILED.vary("slots_with_prompt", "a prompt among slots of which few are taken, with slack", **prompt),
        TILED.vary("slots_with_prompt_int8", "likewise over int8", **prompt, **INT8),
        TILED.vary("wide_table", "a table far wider than any sequence", max_pages=1024),
        TILED.vary("long_window_bf16", "a window over several key tiles, behind pages that are gone", **long, **window),
    ]
