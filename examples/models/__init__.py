"""Families of models over one decoder. A new family is a file with a `Family`, and a line here.

Each file shows what is special about its family: the fields of config.json, defaults, and modules of its own. What
families share is in decoder.py, latent.py, layers.py, rotary.py, family.py and fields.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .decoder import Decoder, DecoderConfig
from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .family import Family
from .fields import CheckpointError, Fields
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3
from .gemma4 import GEMMA4, GEMMA4_WITH_IMAGES
from .gpt_oss import GPT_OSS
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .olmo2 import OLMO2
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE
from .smollm3 import SMOLLM3

__all__ = ["FAMILIES", "CheckpointError", "Decoder", "DecoderConfig", "config_from_hf", "family_of"]

# By `model_type` of config.json.
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gemma4_text": GEMMA4,
    "gemma4": GEMMA4_WITH_IMAGES,
    "phi3": PHI3,
    "gpt_oss": GPT_OSS,
    "olmo2": OLMO2,
    "smollm3": SMOLLM3,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
}


def family_of(fields: Fields) -> Family:
    """The family that config.json names; Llama where it names none.

    Raises:
      CheckpointError: there is no such family here.
    """
    return FAMILIES[fields.choice("model_type", tuple(FAMILIES), "llama")]


def config_from_hf(data: dict[str, Any], source: Path, max_len: int | None = None) -> DecoderConfig:
    """The config of a Hugging Face config.json; see `Family.config`.

    Raises:
      CheckpointError: the model is of no family here, or a field has a value that none of the family has.
    """
    fields = Fields(data, source)
    return family_of(fields).config(fields, max_len)
