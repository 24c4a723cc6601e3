"""Gemma 3, text: Gemma 2 without caps, with norms of q and k.

Five of six layers have a window, and with it a rotary base of their own, without the scaling of the others.
"""

from __future__ import annotations

from typing import Any

from .family import Family
from .fields import Fields
from .gemma2 import GEMMA_DEFAULTS, gemma_activation, gemma_special
from .rotary import rope_section


def _special(fields: Fields) -> dict[str, Any]:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.has(name):
            raise fields.error(name, "null, as all Gemma 3 have it")
    if _has_two_sections(fields):
        local_theta = rope_section(fields).section("sliding_attention").number("rope_theta", 10000.0)
    else:
        local_theta = fields.number("rope_local_base_freq", 10000.0)
    return {
        **gemma_special(fields, period=fields.integer("sliding_window_pattern", 6)),
        "qk_norm": True,
        "local_rope_theta": local_theta,
    }


def _global_rope(fields: Fields) -> Fields:
    section = rope_section(fields)
    return section.section("full_attention") if _has_two_sections(fields) else section


def _has_two_sections(fields: Fields) -> bool:
    """True for files with rotary embeddings per kind of layer, as newer ones have them."""
    rope = fields.section("rope_parameters")
    return rope.has("full_attention") or rope.has("sliding_attention")


GEMMA3 = Family(
    _special,
    {**GEMMA_DEFAULTS, "max_position_embeddings": 131072, "rope_theta": 1e6},
    activation=gemma_activation,
    rope=_global_rope,
)
