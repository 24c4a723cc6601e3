"""SmolLM3: a Llama in which one of four layers, or those that a list names, does not rotate queries and keys.

If windows are used at all, these layers have them.
"""

from __future__ import annotations

from typing import Any

from .family import Family, windows
from .fields import Fields


def _special(fields: Fields) -> dict[str, Any]:
    layers, interval = fields.integer("num_hidden_layers"), fields.integer("no_rope_layer_interval", 4)
    rotated = fields.flags("no_rope_layers", layers)  # 1 where a layer does rotate, in spite of the name
    if rotated is None:
        rotated = tuple((layer + 1) % interval != 0 for layer in range(layers))
    uses_windows = fields.boolean("use_sliding_window", False)
    return {
        "attention_bias": fields.boolean("attention_bias", False),
        "mlp_bias": fields.boolean("mlp_bias", False),
        "unrotated_layers": tuple(layer for layer in range(layers) if not rotated[layer]),
        "sliding_windows": windows(fields, None, lambda layer: not rotated[layer]) if uses_windows else None,
    }


SMOLLM3 = Family(
    _special,
    {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
)
