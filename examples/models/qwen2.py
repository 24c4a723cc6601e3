"""Qwen 2 and 2.5: biases of q, k and v alone. If windows are used at all, the layers from one on have them."""

from __future__ import annotations

from typing import Any

from .family import Family, if_missing, windows
from .fields import Fields


def qwen_windows(fields: Fields) -> tuple[int | None, ...] | None:
    """The window of each layer, as all Qwen have them."""
    if not fields.boolean("use_sliding_window", False):
        return None
    first = fields.integer("max_window_layers", 28, least=0)
    return windows(fields, if_missing(fields, "sliding_window", 4096), lambda layer: layer >= first)


def _special(fields: Fields) -> dict[str, Any]:
    return {"attention_bias": ("q", "k", "v"), "sliding_windows": qwen_windows(fields)}


QWEN2 = Family(_special, {"max_position_embeddings": 32768, "num_key_value_heads": 32})
