"""Each keyword alone, then together, over decode, mixed and prompt batches; then its edges, in shapes used already."""

from __future__ import annotations

from typing import Any

import numpy as np

from cases.bases import DECODE, MIXED, PROMPT
from cases.case import Case
from cases.inputs import INT32_MAX

# By name: the reason, and the fields of the case.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "scale": ("a scale that is not the default", {"keywords": {"scale": 0.3}}),
    "window_one": ("the smallest window: each row sees its own key", {"keywords": {"sliding_window": 1}}),
    "window": ("a window that begins inside a page", {"keywords": {"sliding_window": 9}}),
    "window_huge": ("position minus window overflows int32", {"keywords": {"sliding_window": INT32_MAX}}),
    "cap": ("tanh of the scores", {"keywords": {"soft_cap": 2.0}}),
    "sinks": ("a logit per head without a value", {"sinks": True}),
    "all": (
        "all keywords at once, so that their order counts",
        {"keywords": {"scale": 0.25, "sliding_window": 20, "soft_cap": 1.5}, "sinks": True},
    ),
}
NOT_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("rows see later keys as well", {"keywords": {"causal": False}}),
    "dense_window": ("a window bounds earlier keys only", {"keywords": {"causal": False, "sliding_window": 9}}),
    "dense_window_sinks": (
        "sinks beside a window without causality",
        {"keywords": {"causal": False, "sliding_window": 9}, "sinks": True},
    ),
}
IN_PROMPTS = ("window", "cap", "all", "dense_window_sinks")  # whose masks row tiles treat in ways of their own

SHORT = (0, 2, 0, 3)  # fewer keys than rows
# A server frees pages that a window has passed: their entries are garbage.
PASSED = ((0, 0, -1), (3, 0, 19), (3, 1, INT32_MAX))


def cases() -> list[Case]:
    both = {**VARIANTS, **NOT_CAUSAL}
    products = [
        base.vary(f"{base.name}_{name}", f"{why}; {base.name}", **fields)
        for base, variants in (
            (MIXED, VARIANTS),
            (DECODE, VARIANTS),
            (MIXED, NOT_CAUSAL),
            (PROMPT, {name: both[name] for name in IN_PROMPTS}),
        )
        for name, (why, fields) in variants.items()
    ]
    by_name = {case.name: case for case in products}
    return [*products, *_edges_of_masks(by_name), *_edges_of_sinks(by_name), *_large_logits()]


def _edges_of_masks(by_name: dict[str, Case]) -> list[Case]:
    more_rows = (1, 2, 9, 3)
    return [
        by_name["mixed_window_huge"].vary("window_huge_short", "negative positions under a window", kv_lens=SHORT),
        by_name["mixed_dense"].vary(
            "dense_more_rows_than_keys", "rows at negative positions see no key even without causality", kv_lens=SHORT
        ),
        by_name["mixed_dense_window"].vary(
            "dense_window_more_rows_than_keys", "negative positions, window, no causality", kv_lens=more_rows
        ),
        by_name["mixed_all"].vary("mixed_all_short", "all keywords where rows have no keys", kv_lens=SHORT),
        by_name["mixed_window"].vary(
            "window_passed_pages", "pages that a window has passed may be gone", kv_lens=(33, 5, 9, 60), bad_ids=PASSED
        ),
        by_name["decode_window"].vary(
            "decode_window_passed_pages",
            "decode, too, skips pages that a window has passed",
            kv_lens=(33, 17, 48, 64),
            bad_ids=PASSED,
        ),
    ]


def _edges_of_sinks(by_name: dict[str, Case]) -> list[Case]:
    bad = ((0, 0, -1), (0, 1, 19), (1, 0, -1))
    return [
        by_name["mixed_sinks"].vary("sinks_without_keys", "the sink alone makes lse finite", kv_lens=SHORT),
        by_name["mixed_sinks"].vary("sinks_used_ids_all_bad", "keys that are not there leave the sink", bad_ids=bad),
        by_name["decode_sinks"].vary("decode_sinks_without_keys", "a sink alone in decode", kv_lens=(0, 17, -1, 64)),
        MIXED.vary("sinks_dead_rows", "rows of dead sequences get no sink", num_seqs=2, sinks=True),
        MIXED.vary("sinks_large", "exp(150) overflows float32", dtype="bf16", sinks=True, sink_offset=150.0),
        DECODE.vary(
            "decode_sinks_large",
            "exp(150) overflows float32 in decode, too",
            dtype="bf16",
            sinks=True,
            sink_offset=150.0,
        ),
        DECODE.vary("decode_sinks_small", "exp(-300) underflows", dtype="bf16", sinks=True, sink_offset=-300.0),
        MIXED.vary("sinks_absent", "a sink of -inf is none", sinks=True, sink_offset=-np.inf),
    ]


def _large_logits() -> list[Case]:
    why = "exp overflows float32 from 89 on, so the maximum must be taken off first"
    return [
        MIXED.vary("large_logits", why, dtype="bf16", keywords={"scale": 20.0}),
        DECODE.vary("decode_large_logits", f"{why}; decode", dtype="bf16", keywords={"scale": 20.0}),
    ]
