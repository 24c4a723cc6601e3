"""Families of models, told by `model_type` of Hugging Face's config.json: what is special about each, and its defaults.

All are decoders of `llama.py`. A field that is missing or null has the default of the family's config in
`transformers`. Where missing and null differ there, they do here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_files import CheckpointError, Fields
from llama import LlamaConfig
from mlp import Experts

from jax_paged_attn.rope import (
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeScaling,
    YarnRopeScaling,
)


def config_from_hf(data: dict[str, Any], source: Path) -> LlamaConfig:
    """The config of a Hugging Face config.json, old (`rope_scaling`) or new (`rope_parameters`).

    Raises:
      CheckpointError: the model is of no family here, or a field has a value that none of the family has.
    """
    fields = Fields(data, source)
    family = fields.choice("model_type", tuple(FAMILIES), "llama")
    special = FAMILIES[family](fields)
    defaults = DEFAULTS[family]
    if "hidden_act" not in special:
        fields.choice("hidden_act", ("silu",), "silu")
    vocab_size = fields.integer("vocab_size")
    hidden_size = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", defaults.get("num_key_value_heads", heads))
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    head_dim = fields.integer("head_dim", defaults.get("head_dim"))
    if head_dim is None and hidden_size % heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads = {heads}, as there is no head_dim")
    head_dim = head_dim or hidden_size // heads
    if head_dim % 2:
        raise CheckpointError(f"{source}: head_dim: expected an even number, got {head_dim}")
    context = fields.integer("max_position_embeddings", defaults["max_position_embeddings"])
    rope = special.pop("rope", None) or _rope_fields(fields)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=fields.number("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
        rope_theta=rope.number("rope_theta", fields.number("rope_theta", defaults.get("rope_theta", 10000.0))),
        rope_scaling=_rope_scaling(rope, context, fields),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
        bos_token_id=next(iter(_token_ids(fields, "bos_token_id", vocab_size, defaults)), None),
        eos_token_ids=_token_ids(fields, "eos_token_id", vocab_size, defaults),
        **special,
    )


def _llama(fields: Fields) -> dict[str, Any]:
    return {
        "attention_bias": fields.boolean("attention_bias", False),
        "mlp_bias": fields.boolean("mlp_bias", False),
    }


def _mistral(fields: Fields) -> dict[str, Any]:
    """Every layer has the same window. Null is none; a missing field is the first Mistral's."""
    return {"sliding_windows": _windows(fields, _missing(fields, "sliding_window", 4096))}


def _qwen2(fields: Fields) -> dict[str, Any]:
    return {"attention_bias": ("q", "k", "v"), "sliding_windows": _qwen_windows(fields)}


def _qwen3(fields: Fields) -> dict[str, Any]:
    bias = fields.boolean("attention_bias", False)
    return {"attention_bias": bias, "qk_norm": True, "sliding_windows": _qwen_windows(fields)}


def _mixtral(fields: Fields) -> dict[str, Any]:
    return {
        "sliding_windows": _windows(fields, None),
        "experts": Experts(
            number=fields.integer("num_local_experts", 8),
            per_token=fields.integer("num_experts_per_tok", 2),
            size=fields.integer("intermediate_size"),
            normalised=True,
        ),
    }


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    """As Qwen 3, with experts in every n-th layer, but for layers that are named."""
    layers = fields.integer("num_hidden_layers")
    period, dense = fields.integer("decoder_sparse_step", 1), fields.indices("mlp_only_layers", layers)
    return {
        **_qwen3(fields),
        "experts": Experts(
            number=fields.integer("num_experts", fields.integer("num_local_experts", 128)),
            per_token=fields.integer("num_experts_per_tok", 8),
            size=fields.integer("moe_intermediate_size", 768),
            normalised=fields.boolean("norm_topk_prob", False),
        ),
        "dense_layers": tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % period),
    }


def _qwen_windows(fields: Fields) -> tuple[int | None, ...] | None:
    """Some of the layers, or those from one on, have a window, if windows are used at all."""
    if not fields.boolean("use_sliding_window", False):
        return None
    first = fields.integer("max_window_layers", 28, least=0)
    return _windows(fields, _missing(fields, "sliding_window", 4096), lambda layer: layer >= first)


def _phi3(fields: Fields) -> dict[str, Any]:
    """Tensors hold q, k and v, and gate and up, together; a part of each head is rotated, by LongRoPE's frequencies."""
    rope = _rope_fields(fields)
    share = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    head_dim = fields.integer("head_dim", None)
    head_dim = head_dim or fields.integer("hidden_size") // fields.integer("num_attention_heads")
    return {
        "sliding_windows": _windows(fields, None),
        "rotary_dim": None if share == 1.0 else int(head_dim * share),
    }


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    """Every second layer has a window, from the first one on; sinks, biases and experts everywhere."""
    if fields.number("swiglu_alpha", 1.702) != 1.702:
        raise fields.error("swiglu_alpha", "1.702")
    return {
        "attention_bias": fields.boolean("attention_bias", True),
        "sinks": True,
        "sliding_windows": _windows(fields, 128, lambda layer: (layer + 1) % 2 > 0),
        "experts": Experts(
            number=fields.integer("num_local_experts", 128),
            per_token=fields.integer("num_experts_per_tok", 4),
            size=fields.integer("intermediate_size"),
            normalised=True,
        ),
        "swiglu_limit": fields.number("swiglu_limit", 7.0),
    }


def _windows(
    fields: Fields, default: int | None, has_window: Callable[[int], bool] = lambda layer: True
) -> tuple[int | None, ...] | None:
    """The window of each layer: as `layer_types` says, else as `has_window` does; None where there is no window.

    Args:
      default: the window where the field has none.
      has_window: which layers have it.
    """
    window, layers = fields.integer("sliding_window", default), fields.integer("num_hidden_layers")
    kinds = fields.strings("layer_types", ("full_attention", "sliding_attention"), layers)
    if window is None:
        return None
    local = [has_window(layer) if kinds is None else kinds[layer] == "sliding_attention" for layer in range(layers)]
    return tuple(window if is_local else None for is_local in local)


def _gemma2(fields: Fields) -> dict[str, Any]:
    """Every second layer has a window, from the first one on; scores and logits are capped."""
    return {
        **_gemma(fields, period=2),
        "attention_soft_cap": fields.number("attn_logit_softcapping", _missing(fields, "attn_logit_softcapping", 50.0)),
        "logit_soft_cap": fields.number("final_logit_softcapping", _missing(fields, "final_logit_softcapping", 30.0)),
    }


def _gemma3(fields: Fields) -> dict[str, Any]:
    """Five of six layers have a window and a rotary base of their own; q and k are normalised."""
    special = {**_gemma(fields, period=fields.integer("sliding_window_pattern", 6)), "qk_norm": True}
    rope = fields.section("rope_parameters")
    if rope.has("full_attention") or rope.has("sliding_attention"):
        local = rope.section("sliding_attention")
        special["rope"] = rope.section("full_attention")
    else:
        local = fields
    special["local_rope_theta"] = local.number("rope_theta" if local is not fields else "rope_local_base_freq", 10000.0)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.has(name):
            raise fields.error(name, "null, as all Gemma 3 have it")
    return special


def _gemma(fields: Fields, period: int) -> dict[str, Any]:
    name = "hidden_activation" if fields.has("hidden_activation") else "hidden_act"
    fields.choice(name, ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    return {
        "attention_bias": fields.boolean("attention_bias", False),
        "sliding_windows": _windows(fields, 4096, lambda layer: (layer + 1) % period > 0),
        "hidden_act": "gelu_tanh",
        "norm_offset": True,
        "sandwich_norms": True,
        "embedding_scale": math.sqrt(fields.integer("hidden_size")),
        "attention_scale": fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
    }


def _missing(fields: Fields, name: str, default: Any) -> Any:
    """The default of a field that is missing; null is none."""
    return None if name in fields else default


FAMILIES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "gpt_oss": _gpt_oss,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "gpt_oss": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
    },
    "mixtral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen3_moe": {"max_position_embeddings": 32768, "num_key_value_heads": 4},
    "phi3": {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 32000},
    "gemma2": {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "gemma3_text": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
}


def _rope_fields(fields: Fields) -> Fields:
    """The object with the kind of rotary embeddings, under its new name or its old one."""
    return fields.section("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")


def _rope_scaling(rope: Fields, context: int, fields: Fields) -> RopeScaling | None:
    """The kind of rotary embeddings and its numbers; None for the plain one."""
    name = "rope_type" if "rope_type" in rope else "type"
    kind = rope.choice(name, ("default", "linear", "llama3", "yarn", "longrope"), "default")
    if kind == "default":
        return None
    if kind == "llama3":
        original = rope.integer("original_max_position_embeddings")
        factor, low, high = (rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise rope.error("low_freq_factor", f"less than high_freq_factor = {high}")
        return Llama3RopeScaling(factor, low, high, original)
    if kind == "longrope":
        return _long_rope(rope, context, fields)
    factor = rope.number("factor")
    if kind == "linear":
        return LinearRopeScaling(factor)
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if slow >= fast:
        raise rope.error("beta_slow", f"less than beta_fast = {fast}")
    original = rope.integer("original_max_position_embeddings", context)
    factors = {key: rope.number(key) for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.has(key)}
    return YarnRopeScaling(factor, original, fast, slow, truncate=rope.boolean("truncate", True), **factors)


def _long_rope(rope: Fields, context: int, fields: Fields) -> LongRopeScaling:
    """The long factors where contexts may be longer than in pretraining: keys in the cache must be rotated alike."""
    name = "original_max_position_embeddings"
    original = rope.integer(name, fields.integer(name, context))
    if context <= original:
        return LongRopeScaling(rope.numbers("short_factor"), rope.number("attention_factor", 1.0))
    factor = math.sqrt(1 + math.log(rope.number("factor", context / original)) / math.log(original))
    return LongRopeScaling(rope.numbers("long_factor"), rope.number("attention_factor", factor))


def _token_ids(fields: Fields, name: str, vocab_size: int, defaults: dict[str, int]) -> tuple[int, ...]:
    """Missing and null differ: null means that there is none."""
    if name in fields:
        return fields.token_ids(name, vocab_size)
    return tuple(token for token in (defaults.get(name),) if token is not None and token < vocab_size)
