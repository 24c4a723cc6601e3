"""Qwen 3 MoE: Qwen 3 with experts in every n-th layer, but for layers that are named."""

from __future__ import annotations

from typing import Any

from .family import Family
from .fields import Fields
from .layers import Experts
from .qwen3 import qwen3_special


def _special(fields: Fields) -> dict[str, Any]:
    layers = fields.integer("num_hidden_layers")
    period, dense = fields.integer("decoder_sparse_step", 1), fields.indices("mlp_only_layers", layers)
    return {
        **qwen3_special(fields),
        "experts": Experts(
            number=fields.integer("num_experts", fields.integer("num_local_experts", 128)),
            per_token=fields.integer("num_experts_per_tok", 8),
            size=fields.integer("moe_intermediate_size", 768),
            normalised=fields.boolean("norm_topk_prob", False),
        ),
        "dense_layers": tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % period),
    }


QWEN3_MOE = Family(_special, {"max_position_embeddings": 32768, "num_key_value_heads": 4})
