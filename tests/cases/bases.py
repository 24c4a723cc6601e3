"""The three calls that most cases are variations of, and the fields that several families set alike."""

from __future__ import annotations

from typing import Any

from cases.case import Case

MIXED = Case(
    "mixed",
    q_lens=(1, 5, 0, 7),
    kv_lens=(17, 5, 9, 33),
    rows=16,
    why="a decode row, a whole prompt, no row and a later chunk in one batch; three rows are slack",
)
DECODE = Case(
    "decode",
    (1, 1, 1, 1),
    (1, 17, 48, 64),
    function="paged_attention",
    why="one row per sequence, with one key, a page and a token, whole pages, and a full table",
)
PROMPT = Case(
    "prompt",
    q_lens=(40, 9, 1, 0),
    kv_lens=(75, 9, 33, 5),
    num_heads=6,
    max_pages=5,
    why="enough rows per key that an engine may take them by row tiles: a chunk, a prompt, a decode row, no row",
)

# Scales that bring 8-bit values near a standard normal size; one is per head, so that heads cannot be mixed up.
E4M3: dict[str, Any] = {"page_dtype": "e4m3", "k_scale": (0.5, 1.5), "v_scale": 1.9}
E5M2: dict[str, Any] = {**E4M3, "page_dtype": "e5m2"}
