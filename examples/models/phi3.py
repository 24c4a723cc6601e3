"""Phi 3: tensors that hold q, k and v, and gate and up, together; a part of each head rotated, with LongRoPE."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .decoder import DecoderConfig
from .family import Family, Tensor, Tensors, head_dim, windows
from .fields import Fields
from .rotary import rope_section


def _special(fields: Fields) -> dict[str, Any]:
    share = rope_section(fields).number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    return {
        "sliding_windows": windows(fields, None),
        "rotary_dim": None if share == 1.0 else int(head_dim(fields) * share),
    }


def _tensors(tensors: Tensors, config: DecoderConfig) -> Iterator[tuple[Path, str, Tensor]]:
    """Those that hold several projections are cut."""
    heads = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
    parts = {
        "qkv_proj": (("q_proj", "k_proj", "v_proj"), [number * config.head_dim for number in heads]),
        "gate_up_proj": (("gate_proj", "up_proj"), [config.intermediate_size] * 2),
    }
    for file, name, tensor in tensors:
        module = name.split(".")[-2] if "." in name else ""
        names, sizes = parts.get(module, ((), []))
        if not names or len(tensor) != sum(sizes):
            yield file, name, tensor
            continue
        ends = list(itertools.accumulate(sizes))
        for part, size, end in zip(names, sizes, ends, strict=True):
            yield file, name.replace(module, part), tensor[end - size : end]


PHI3 = Family(
    _special,
    {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 32000},
    tensors=_tensors,
)
