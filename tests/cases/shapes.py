"""Groups, head dims and page sizes, powers of two or not."""

from __future__ import annotations

from typing import Any

from cases.bases import DECODE, MIXED, PROMPT
from cases.case import Case

INT8: dict[str, Any] = {"page_dtype": "int8", "k_scale": 0.02, "v_scale": 0.01}


def cases() -> list[Case]:
    return [*_groups(), *_head_dims(), *_prompts(), *_large_groups(), *_page_sizes()]


def _groups() -> list[Case]:
    every = []
    for group in (*range(1, 17), 24, 64, 65):
        heads = {"num_heads": 2 * group, "num_kv_heads": 2}
        every.append(DECODE.vary(f"decode_group_{group}", f"groups of {group} in decode", **heads))
        if group in (1, 3, 5, 7, 8, 12, 16, 24):
            why = f"groups of {group} packed with the tokens of a sequence"
            every.append(MIXED.vary(f"mixed_group_{group}", why, dtype="bf16", **heads))
    every.append(MIXED.vary("one_kv_head", "one KV head, a group that is odd", num_heads=7, num_kv_heads=1))
    every.append(DECODE.vary("odd_kv_heads", "an odd number of KV heads", num_heads=15, num_kv_heads=3))
    return every


def _head_dims() -> list[Case]:
    every = []
    for head_dim in (40, 64, 80, 96, 128, 160, 192, 256):
        why = f"a head dim of {head_dim}"
        every.append(DECODE.vary(f"decode_head_dim_{head_dim}", f"{why} in decode", head_dim=head_dim, dtype="bf16"))
        if head_dim in (40, 80, 128, 256):
            every.append(MIXED.vary(f"mixed_head_dim_{head_dim}", f"{why} in a mixed batch", head_dim=head_dim))
    # Vector loops end inside these, and 8-bit ones at other places than 16-bit ones.
    for head_dim, page in ((1, {}), (7, INT8), (33, {"page_dtype": "e4m3"}), (40, INT8), (80, {"page_dtype": "e5m2"})):
        for base in (DECODE, PROMPT):
            page_dtype = page.get("page_dtype", "f16")
            name = f"{base.name}_head_dim_{head_dim}_{page_dtype}"
            why = f"vector loops over {head_dim} {page_dtype} values have a remainder of their own; {base.name}"
            every.append(base.vary(name, why, head_dim=head_dim, dtype="f16", **page))
    # The one head dim whose prompts take the kernel for other devices on a Hopper GPU, too.
    other, why = {"head_dim": 80, "sinks": True}, "prefill of the kernel that is not Hopper's"
    window = {"dtype": "f16", "keywords": {"sliding_window": 30, "soft_cap": 3.0}}
    dense: dict[str, Any] = {"dtype": "bf16", "keywords": {"causal": False}, **INT8}
    every.append(PROMPT.vary("prompt_head_dim_80_bf16", why, dtype="bf16", **other))
    every.append(PROMPT.vary("prompt_head_dim_80_f16_window", f"{why}, with a window and a cap", **other, **window))
    every.append(PROMPT.vary("prompt_head_dim_80_int8_not_causal", f"{why}, int8 without causality", **other, **dense))
    every.append(PROMPT.vary("prompt_head_dim_128", "the most common head dim", head_dim=128, dtype="bf16"))
    every.append(PROMPT.vary("prompt_head_dim_576", "wider than any buffer of fixed size", head_dim=576))
    return every


def _prompts() -> list[Case]:
    return [
        PROMPT.vary("prompt_page_size_1", "each key of a row tile lies on its own page", page_size=1, max_pages=80),
        PROMPT.vary("prompt_page_size_17", "pages end inside key tiles", page_size=17, dtype="bf16"),
        PROMPT.vary("prompt_group_7", "row tiles end inside a group", num_heads=7, num_kv_heads=1, dtype="bf16"),
    ]


def _large_groups() -> list[Case]:
    model = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bf16"}
    return [
        DECODE.vary("decode_group_40", "a group that takes several row tiles", num_heads=40, num_kv_heads=1),
        DECODE.vary("decode_heads_32_8", "the heads of an 8B model", **model),
    ]


def _page_sizes() -> list[Case]:
    every = []
    for page_size in (1, 3, 17, 64, 256):
        max_pages = max(2, 60 // page_size)
        most = max_pages * page_size
        size = {"page_size": page_size, "max_pages": max_pages}
        ends = (1, page_size, page_size + 1, most)
        why = f"pages of {page_size}: one token, a full page, one token more, a full table"
        every.append(DECODE.vary(f"decode_page_size_{page_size}", why, kv_lens=ends, **size))
        ends = (most, page_size, 1, most - 1)
        why = f"pages of {page_size} in a mixed batch, with a last page that lacks one token"
        every.append(MIXED.vary(f"mixed_page_size_{page_size}", why, kv_lens=ends, **size))
    window = {"dtype": "bf16", "keywords": {"sliding_window": 5}}
    (single,) = (case for case in every if case.name == "mixed_page_size_1")
    return [*every, single.vary("page_size_1_bf16_window", "a window over pages of one token", **window)]
