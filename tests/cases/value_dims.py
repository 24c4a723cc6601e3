"""Values of another head dim than keys, and values that are the first numbers of each key, as in MLA."""

from __future__ import annotations

from typing import Any

from cases.bases import DECODE, E4M3, MIXED, PROMPT
from cases.case import Case
from cases.inputs import INT32_MAX

BAD = ((0, 0, -1), (1, 0, 19), (3, 1, INT32_MAX))
MASKS = {"scale": 0.25, "sliding_window": 20, "soft_cap": 1.5}
INT8: dict[str, Any] = {"page_dtype": "int8", "k_scale": (0.02, 0.01), "v_scale": 0.03}
# DeepSeek's, in decode, where one key serves all heads, and in prompts, where every head has its own.
MLA: dict[str, Any] = {"head_dim": 576, "value_dim": 512, "values_in_keys": True, "num_kv_heads": 1, "dtype": "bf16"}
WIDE: dict[str, Any] = {"head_dim": 512, "dtype": "bf16"}  # Gemma 4's layers without a window
PLAIN: dict[str, Any] = {"head_dim": 192, "value_dim": 128, "dtype": "bf16"}


def cases() -> list[Case]:
    return [*_apart(), *_plain_tiles(), *_in_keys(), *_mla(), *_wide()]


def _apart() -> list[Case]:
    narrow, wide = {"head_dim": 40, "value_dim": 24}, {"head_dim": 24, "value_dim": 40}
    both = {"keywords": MASKS, "sinks": True, "bad_ids": BAD}
    return [
        DECODE.vary("decode_values_narrow", "Hv < H in decode", **narrow),
        MIXED.vary("mixed_values_narrow_all", "Hv < H with all keywords, pages outside the pool", **narrow, **both),
        PROMPT.vary("prompt_values_narrow_e4m3", "Hv < H in fp8 pages", dtype="f16", **narrow, **E4M3),
        DECODE.vary("decode_values_wide_int8", "Hv > H in int8 pages", dtype="bf16", **wide, **INT8),
        MIXED.vary("mixed_values_wide", "Hv > H in a mixed batch; three rows are slack", **wide),
        PROMPT.vary("prompt_values_wide", "Hv > H by row tiles", dtype="f16", sinks=True, **wide),
        MIXED.vary("mixed_values_of_one", "a value is a number", head_dim=7, value_dim=1),
        MIXED.vary("mixed_keys_of_one", "a key is a number", head_dim=1, value_dim=33, page_size=17),
        DECODE.vary("decode_192_128", "the plain form of MLA, in decode", **PLAIN),
        PROMPT.vary("prompt_192_128", "prompts of DeepSeek and MiMo", **{**PLAIN, "dtype": "f16"}),
    ]


def _plain_tiles() -> list[Case]:
    """Keys of 192 and values of 128 by key tiles and row tiles, in every kind of page and way to load them."""
    f16 = {**PLAIN, "dtype": "f16"}
    all_keywords = {"keywords": {**MASKS, "sliding_window": 700}, "sinks": True}
    dense = {"keywords": {"causal": False, "sliding_window": 30}}
    rows = {"num_heads": 8, "q_lens": (140, 1, 3, 70), "kv_lens": (590, 300, 9, 70), "max_pages": 74}
    small = {**rows, "page_size": 8}
    bad = ((0, 0, -1), (0, 9, INT32_MAX), (1, 2, -19), (3, 8, INT32_MAX))
    long = {**rows, "q_lens": (135, 1, 60, 8), "kv_lens": (2100, 1500, 60, 700), "max_pages": 132}
    return [
        PROMPT.vary("rows_192_128", "TMA loads of boxes of 8 tokens, KV splits", **small, **PLAIN),
        PROMPT.vary("rows_192_128_bad_ids", "boxes without a page", **small, **f16, bad_ids=bad),
        PROMPT.vary("rows_192_128_all", "all keywords over several key tiles", **long, **all_keywords, **PLAIN),
        PROMPT.vary("rows_192_128_dense", "no causality, with a window", **long, **dense, **f16),
        PROMPT.vary("rows_192_128_page_size_17", "cp.async loads", **{**long, "page_size": 17}, **PLAIN),
        PROMPT.vary("rows_192_128_e4m3", "fp8 pages become f16", **long, **E4M3, **PLAIN),
        PROMPT.vary("rows_192_128_int8", "int8 pages become f16, all keywords", **long, **all_keywords, **INT8, **f16),
        MIXED.vary("mixed_192_128", "decode rows and short chunks; three rows are slack", **f16),
        MIXED.vary("mixed_192_128_e4m3", "the same over fp8 pages", bad_ids=BAD, **E4M3, **PLAIN),
        DECODE.vary("decode_192_128_int8", "int8 pages in decode, with sinks", sinks=True, **INT8, **PLAIN),
        DECODE.vary(
            "decode_192_128_long", "KV splits in decode", **{**PLAIN, "kv_lens": (2500, 37, 0, 1100), "max_pages": 160}
        ),
        PROMPT.vary("prompt_192_128_in_keys", "values are the first 128 of each key", values_in_keys=True, **PLAIN),
    ]


def _in_keys() -> list[Case]:
    in_keys: dict[str, Any] = {"values_in_keys": True, "head_dim": 40, "value_dim": 24}
    same: dict[str, Any] = {"values_in_keys": True, "head_dim": 32}
    scaled = {"page_dtype": "int8", "k_scale": (0.02, 0.01), "dtype": "f16"}
    both = {"keywords": MASKS, "sinks": True, "bad_ids": BAD}
    dense = {"keywords": {"causal": False, "sliding_window": 9}, "num_seqs": 3}
    return [
        DECODE.vary("decode_in_keys", "one pool, Hv < H", **in_keys),
        DECODE.vary("decode_in_keys_odd", "vectors of values end inside those of keys", **{**in_keys, "value_dim": 5}),
        MIXED.vary("mixed_in_keys_all", "one pool, all keywords, pages outside it", **in_keys, **both),
        MIXED.vary("mixed_in_keys_dense", "one pool without causality, a dead sequence", **in_keys, **dense),
        PROMPT.vary("prompt_in_keys", "one pool by row tiles", **{**in_keys, "value_dim": 39, "dtype": "f16"}),
        PROMPT.vary("prompt_in_keys_int8", "the scales of keys are those of values", **in_keys, **scaled),
        DECODE.vary("decode_k_eq_v", "values are keys", dtype="bf16", **same),
        MIXED.vary("mixed_k_eq_v_e4m3", "values are keys, in fp8", page_dtype="e4m3", k_scale=(0.5, 1.5), **same),
        PROMPT.vary("prompt_k_eq_v_512", "the widest head dim of today's models", **{**same, "head_dim": 512}),
    ]


def _mla() -> list[Case]:
    e4m3 = {"page_dtype": "e4m3", "k_scale": 0.7}
    e5m2 = {"page_dtype": "e5m2", "k_scale": 1.5}
    int8 = {"page_dtype": "int8", "k_scale": 0.02}
    two_heads = {**MLA, **e4m3, "dtype": "f16", "num_kv_heads": 2, "num_heads": 24, "k_scale": (0.5, 1.5)}
    long: dict[str, Any] = {"kv_lens": (2500, 37, 0, 1100), "max_pages": 40, "page_size": 64}
    masks = {"keywords": {**MASKS, "scale": 0.05}, "sinks": True}
    return [
        *(
            DECODE.vary(f"mla_decode_{heads}", f"{heads} heads share one key", num_heads=heads, **MLA)
            for heads in (1, 16, 128)
        ),
        DECODE.vary("mla_decode_long", "KV splits of MLA, pages of 64", num_heads=8, **long, **MLA),
        DECODE.vary("mla_decode_e4m3", "MLA over fp8 pages, with bad ids", num_heads=16, bad_ids=BAD, **e4m3, **MLA),
        DECODE.vary("mla_decode_e5m2_long", "KV splits of MLA over e5m2", num_heads=20, **long, **e5m2, **MLA),
        DECODE.vary("mla_decode_int8_masks", "all keywords, int8 pages of 1", num_heads=128, **masks, **int8, **MLA),
        DECODE.vary("mla_decode_masks", "MLA with all keywords, pages of 1", num_heads=5, **masks, **MLA),
        DECODE.vary(
            "mla_bad_ids", "pages outside the pool in boxes of TMA loads", num_heads=16, page_size=8, bad_ids=BAD, **MLA
        ),
        MIXED.vary("mla_mixed", "chunks over an MLA cache", **{**MLA, "dtype": "f16"}),
        MIXED.vary(
            "mla_mixed_128", "two groups of 64 heads, copied by rows", num_heads=128, page_size=17, **masks, **MLA
        ),
        MIXED.vary("mla_mixed_e4m3", "chunks over an fp8 MLA cache, two heads", **two_heads),
        PROMPT.vary("mla_prompt", "many rows over an MLA cache", **MLA),
        PROMPT.vary("mla_prompt_e4m3", "many rows over an fp8 MLA cache", page_size=8, **e4m3, **MLA),
    ]


def _wide() -> list[Case]:
    """A head dim of 512, values in the keys or in a pool of their own."""
    f16 = {**WIDE, "dtype": "f16"}
    same = {**WIDE, "values_in_keys": True}
    masks: dict[str, Any] = {"keywords": {**MASKS, "scale": 0.1}, "sinks": True, "bad_ids": BAD}
    long: dict[str, Any] = {"kv_lens": (2500, 37, 0, 1100), "max_pages": 40, "page_size": 64}
    dense = {"keywords": {"causal": False, "sliding_window": 30}}
    # So many rows that query heads may count as two groups.
    rows: dict[str, Any] = {
        "num_heads": 8, "q_lens": (140, 1, 3, 70), "kv_lens": (590, 300, 9, 70), "page_size": 8, "max_pages": 74,
    }  # fmt: skip
    bad = {"bad_ids": ((0, 0, -1), (0, 9, INT32_MAX), (1, 2, -19), (3, 8, INT32_MAX))}
    return [
        DECODE.vary("decode_512", "a head dim of 512 with a pool of values", **WIDE),
        DECODE.vary("decode_512_long", "KV splits", num_heads=8, **long, **f16),
        DECODE.vary("decode_512_masks", "all keywords, pages outside the pool", page_size=8, **masks, **WIDE),
        DECODE.vary("decode_512_in_keys", "one pool, several heads of keys", num_heads=8, **long, **same),
        DECODE.vary("decode_512_e4m3", "fp8 pages of this head dim", **E4M3, **WIDE),
        MIXED.vary("mixed_512", "decode rows and chunks, copied by rows", page_size=17, **masks, **WIDE),
        MIXED.vary("mixed_512_in_keys", "the same over one pool", page_size=17, **masks, **same),
        MIXED.vary("mixed_512_interleaved", "keys and values in one pool side by side", layout="interleaved", **WIDE),
        PROMPT.vary("prompt_512", "three query heads per key", **f16),
        PROMPT.vary("rows_512", "prompts of several row tiles", **rows, **WIDE),
        PROMPT.vary(
            "rows_512_bad_ids",
            "boxes without a page, two query heads per key",
            **{**rows, "num_heads": 4},
            **bad,
            **f16,
        ),
        PROMPT.vary(
            "rows_512_all", "all keywords", keywords={**MASKS, "sliding_window": 200}, sinks=True, **rows, **WIDE
        ),
        PROMPT.vary("rows_512_dense", "no causality, with a window", **rows, **dense, **WIDE),
        PROMPT.vary("rows_512_mha", "as many heads of keys as of queries", **{**rows, "num_heads": 2}, **WIDE),
        PROMPT.vary("rows_512_in_keys", "prompts over one pool, with all keywords", **rows, **{**masks, **bad}, **same),
    ]
