"""Mistral: a Llama whose layers all have the same window. Null is none; a missing field is the first Mistral's."""

from __future__ import annotations

from typing import Any

from .family import Family, if_missing, windows
from .fields import Fields


def _special(fields: Fields) -> dict[str, Any]:
    return {"sliding_windows": windows(fields, if_missing(fields, "sliding_window", 4096))}


MISTRAL = Family(
    _special,
    {"max_position_embeddings": 131072, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2},
)
