"""The pools of JAX's own kernels: in place and gathered, with masks, bad ids and scales per head, in every way."""

from __future__ import annotations

from typing import Any

from cases.bases import DECODE, E4M3, MIXED
from cases.case import Case
from cases.inputs import INT32_MAX

INT8: dict[str, Any] = {"page_dtype": "int8", "k_scale": (0.02, 0.01), "v_scale": (0.01, 0.03)}
BAD = ((0, 0, -1), (1, 0, 19), (3, 1, INT32_MAX))


def cases() -> list[Case]:
    return [*_interleaved(), *_padded(), *_head_major(), *_token_scales()]


def _interleaved() -> list[Case]:
    """One pool `[P, S, 2K, H]` for ragged calls."""
    both = {"scale": 0.25, "sliding_window": 20, "soft_cap": 1.5}
    prompts: dict[str, Any] = {"q_lens": (150, 1, 70, 33), "kv_lens": (150, 60, 70, 129), "max_pages": 10, "rows": 254}
    page_64 = {"page_size": 64, "max_pages": 2, "kv_lens": (128, 64, 1, 127), "dtype": "bf16"}
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("f32", "keys and values interleaved, nothing else", {}),
        ("all", "all keywords, with pages outside the pool", {"keywords": both, "sinks": True, "bad_ids": BAD}),
        ("page_size_64", "a page holds a whole key tile", page_64),
        ("page_size_17", "pages end inside key tiles", {"page_size": 17, "dtype": "f16", "head_dim": 96}),
        ("int8", "scales per head beside interleaved heads", {"dtype": "bf16", "head_dim": 64, **INT8}),
        ("prompts", "prefill in place", {"dtype": "bf16", "head_dim": 128, **prompts}),
        ("prompts_window", "prefill with masks", {"num_heads": 6, **prompts, "keywords": both}),
        ("prompts_e4m3", "prefill over fp8", {"dtype": "f16", "head_dim": 80, **prompts, **E4M3}),
        ("one_kv_head", "keys and values alternate by row", {"num_kv_heads": 1, "dtype": "bf16", **prompts}),
    ]
    return [MIXED.vary(f"interleaved_{name}", why, layout="interleaved", **fields) for name, why, fields in variants]


def _padded() -> list[Case]:
    """Interleaved pools with more heads than there are, as RPA v3 pads 8-bit ones to four per 32 bits."""
    prompts: dict[str, Any] = {"q_lens": (150, 1, 70, 33), "kv_lens": (150, 60, 70, 129), "max_pages": 10, "rows": 254}
    page_64 = {"page_size": 64, "max_pages": 2, "kv_lens": (128, 64, 1, 127), "dtype": "bf16"}
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("f32", "an odd number of heads, pages outside the pool", {"padding_heads": 1, "bad_ids": BAD}),
        ("page_size_64", "last pages copied with the pool's stride", {"padding_heads": 2, **page_64}),
        ("prompts", "prefill in place", {"padding_heads": 2, "num_kv_heads": 1, "dtype": "bf16", **prompts}),
        ("int8", "six heads in the place of eight", {"padding_heads": 2, "num_kv_heads": 3, "num_heads": 6}),
    ]
    int8 = {"dtype": "bf16", "page_dtype": "int8", "k_scale": (0.02, 0.01, 0.03), "v_scale": 0.01}
    return [
        MIXED.vary(f"padded_{name}", why, layout="interleaved", **fields, **(int8 if name == "int8" else {}))
        for name, why, fields in variants
    ]


def _head_major() -> list[Case]:
    """Pools `[K, P, S, H]` for decode with scale 1."""
    page_64 = {"page_size": 64, "max_pages": 3, "kv_lens": (1, 64, 130, 192), "dtype": "bf16"}
    long = {"kv_lens": (5000, 37, 0, 1100), "max_pages": 320, "head_dim": 64, "dtype": "bf16"}
    capped = {"keywords": {"scale": 1.0, "soft_cap": 2.0}, "sinks": True, "bad_ids": BAD}
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("f32", "heads lead, nothing else", {}),
        ("cap", "a cap and sinks, with pages outside the pool", capped),
        ("page_size_64", "a page holds a whole key tile", page_64),
        ("page_size_17", "pages end inside key tiles", {"page_size": 17, "dtype": "f16", "head_dim": 96}),
        ("int8", "scales per head, pages outside the pool", {"dtype": "bf16", "head_dim": 64, "bad_ids": BAD, **INT8}),
        ("e4m3", "fp8 and an odd group", {"dtype": "f16", "head_dim": 80, "num_heads": 14, **E4M3}),
        ("long", "KV splits over pages that lie far apart", long),
        ("one_kv_head", "the leading axis has size 1", {"num_kv_heads": 1, "num_heads": 7, "dtype": "bf16"}),
    ]
    unscaled = DECODE.vary("unscaled", "scores as JAX's kernel has them", keywords={"scale": 1.0}, q_factor=0.2)
    return [
        unscaled.vary(f"head_major_{name}", why, **{"layout": "head_major", **fields}) for name, why, fields in variants
    ]


def _token_scales() -> list[Case]:
    """A scale per token and head, NaN where no token is."""
    both: dict[str, Any] = {"token_scales": (True, True)}
    int8: dict[str, Any] = {"page_dtype": "int8", **both}
    capped = {"keywords": {"scale": 1.0, "soft_cap": 2.0}, "sinks": True, "bad_ids": BAD}
    many_rows: dict[str, Any] = {"num_heads": 40, "num_kv_heads": 1, "dtype": "bf16", **int8}
    long = {"kv_lens": (5000, 37, 0, 1100), "max_pages": 320, "head_dim": 64, "dtype": "bf16"}
    unscaled = DECODE.vary("unscaled", "scores as JAX's kernel has them", keywords={"scale": 1.0}, q_factor=0.2)
    decode: list[tuple[str, str, dict[str, Any]]] = [
        ("int8", "a cap and sinks, with pages outside the pool", {**int8, **capped}),
        (
            "keys",
            "keys alone have them, beside a scale per head",
            {**int8, "token_scales": (True, False), "v_scale": 0.01},
        ),
        ("values", "values alone have them", {"page_dtype": "e5m2", "dtype": "f16", "token_scales": (False, True)}),
        ("f32", "pages that are not quantised", both),
        ("many_rows", "a group for which the CPU engine converts keys first", many_rows),
        ("long", "KV splits", {**int8, **long}),
    ]
    prompts: dict[str, Any] = {"q_lens": (150, 1, 70, 33), "kv_lens": (150, 60, 70, 129), "max_pages": 10, "rows": 254}
    masks = {"scale": 0.25, "sliding_window": 20, "soft_cap": 1.5}
    ragged: list[tuple[str, str, dict[str, Any]]] = [
        ("split", "prompts, with masks", {**prompts, **int8, "keywords": masks, "k_scale": (0.5, 2.0)}),
        ("padded", "interleaved, with padding", {"layout": "interleaved", "padding_heads": 1, "dtype": "f16", **int8}),
    ]
    return [
        *(unscaled.vary(f"tokens_{name}", why, layout="head_major", **fields) for name, why, fields in decode),
        *(MIXED.vary(f"tokens_{name}", why, **fields) for name, why, fields in ragged),
    ]
