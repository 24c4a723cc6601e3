"""Qwen 3: each head of q and k is normalised before its rotation, in place of the biases of Qwen 2."""

from __future__ import annotations

from typing import Any

from .family import Family
from .fields import Fields
from .qwen2 import qwen_windows


def qwen3_special(fields: Fields) -> dict[str, Any]:
    return {
        "attention_bias": fields.boolean("attention_bias", False),
        "qk_norm": True,
        "sliding_windows": qwen_windows(fields),
    }


QWEN3 = Family(qwen3_special, {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128})
