"""Llama 1 to 3: the decoder as it is. The one family that is saved, too."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_paged_attn.rope import Llama3RopeScaling

from .decoder import DecoderConfig
from .family import Family
from .fields import Fields


def _special(fields: Fields) -> dict[str, Any]:
    return {
        "attention_bias": fields.boolean("attention_bias", False),
        "mlp_bias": fields.boolean("mlp_bias", False),
    }


LLAMA = Family(_special, {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2})

# The fields of `DecoderConfig` that a Llama may choose.
_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id", "eos_token_ids"),
)


def config_to_hf(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a Llama with weights in `dtype`.

    Raises:
      ValueError: the model has what no Llama has.
    """
    others = [field for field in dataclasses.fields(config) if field.name not in _FIELDS]
    is_llama = all(getattr(config, field.name) == field.default for field in others)
    scaling = config.rope_scaling
    if not is_llama or not isinstance(config.attention_bias, bool) or not isinstance(scaling, Llama3RopeScaling | None):
        raise ValueError(f"config: expected a Llama's, which alone can be saved, got {config}")
    data = {name: getattr(config, name) for name in _FIELDS}
    eos = data.pop("eos_token_ids")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **data,
        "rope_scaling": {"rope_type": "llama3", **dataclasses.asdict(scaling)} if scaling else None,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "torch_dtype": dtype,
    }
