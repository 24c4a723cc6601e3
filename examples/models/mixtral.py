"""Mixtral: a Mistral with experts in place of every MLP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .decoder import DecoderConfig
from .family import Family, Tensor, Tensors, windows
from .fields import Fields
from .layers import Experts

_NAMES = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def _special(fields: Fields) -> dict[str, Any]:
    return {
        "sliding_windows": windows(fields, None),
        "experts": Experts(
            number=fields.integer("num_local_experts", 8),
            per_token=fields.integer("num_experts_per_tok", 2),
            size=fields.integer("intermediate_size"),
        ),
    }


def _tensors(tensors: Tensors, config: DecoderConfig) -> Iterator[tuple[Path, str, Tensor]]:
    """Files have names of their own for the experts and their projections."""
    for file, name, tensor in tensors:
        yield file, ".".join(_NAMES.get(part, part) for part in name.split(".")), tensor


MIXTRAL = Family(
    _special,
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    tensors=_tensors,
)
