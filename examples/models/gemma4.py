"""Gemma 4, text: two kinds of layers, with heads of different sizes and rotary embeddings of their own.

- Layers with a window have heads of 256, the others heads of 512, of which a quarter is rotated. In larger models the
  latter have no projection of values, which then come from that of keys.
- Heads of q, k and v are normalised, those of v without weights, and scores are not scaled.
- Where there are experts, each token has a plain MLP besides.
- In smaller models the last layers have no keys and values, but see those of the last layer of their kind that has.
- There each layer gets a vector of its own for each token. The result of any layer is multiplied by a learnt number.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from .decoder import DecoderConfig
from .family import Family, Tensor, Tensors, windows
from .fields import CheckpointError, Fields
from .gemma2 import GEMMA_DEFAULTS, gemma_activation
from .gemma4_decoder import Gemma4Block, Gemma4Config, Gemma4Decoder, LayerKind
from .layers import Experts
from .rotary import proportional

# Rotary embeddings by kind of layer, where config.json does not say them.
_ROPE: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


def _rope(fields: Fields, kind: str) -> Fields:
    if not fields.has("rope_parameters"):
        return Fields(_ROPE[kind], fields.source)
    return fields.section("rope_parameters").section(kind)


def _kind(rope: Fields, head_dim: int, kv_heads: int, values_from_keys: bool = False) -> LayerKind:
    is_plain = rope.choice("rope_type", ("default", "proportional"), "default") == "default"
    scaling = None if is_plain else proportional(rope)
    return LayerKind(head_dim, kv_heads, rope.number("rope_theta", 1e4), scaling, values_from_keys)


def _special(fields: Fields) -> dict[str, Any]:
    if fields.has("use_bidirectional_attention"):  # it may be so within images, which are not seen here
        fields.choice("use_bidirectional_attention", ("vision",), "vision")
    layers = fields.integer("num_hidden_layers")
    local = windows(fields, 512, lambda layer: (layer + 1) % 6 > 0) or ()
    local = (*local[:-1], None)  # whatever config.json says of the last layer
    head_dim, kv_heads = fields.integer("head_dim", 256), fields.integer("num_key_value_heads", 4)
    from_keys, input_size = fields.boolean("attention_k_eq_v", False), _layer_input_size(fields)
    global_sizes = _global_sizes(fields, [layer for layer in range(layers) if local[layer] is None])
    experts = _experts(fields) if fields.boolean("enable_moe_block", False) else None
    return {
        "attention_bias": fields.boolean("attention_bias", False),
        "sliding_windows": local,
        "local_kind": _kind(_rope(fields, "sliding_attention"), head_dim, kv_heads),
        "global_kind": _kind(_rope(fields, "full_attention"), *global_sizes, from_keys),
        "shared_layers": _shared_layers(fields, local),
        "wide_shared_mlps": fields.boolean("use_double_wide_mlp", False),
        "layer_input_size": input_size,
        "layer_input_vocab_size": fields.integer("vocab_size_per_layer_input", 262144),
        "experts": experts,
        "dense_layers": () if experts is None else tuple(range(layers)),
        "hidden_act": "gelu_tanh",
        "block": Gemma4Block,
        "embedding_scale": math.sqrt(fields.integer("hidden_size")),
        "attention_scale": 1.0,
        "logit_soft_cap": fields.number("final_logit_softcapping", None),
    }


def _global_sizes(fields: Fields, layers: list[int]) -> tuple[int, int]:
    """H and K of layers without a window: newer files say them for each layer, older ones for all together."""
    kv_heads = fields.integer("num_key_value_heads", 4)
    if fields.has("per_layer_config"):
        sections = [fields.section("per_layer_config").section(str(layer)) for layer in layers]
        head_dim = fields.integer("head_dim", 256)
        sizes = {(x.integer("head_dim", head_dim), x.integer("num_key_value_heads", kv_heads)) for x in sections}
        if len(sizes) > 1:
            raise fields.error("per_layer_config", "the same for all layers of full attention")
        head_dim, kv_heads = sizes.pop()
    else:
        head_dim = fields.integer("global_head_dim", 512)
        if fields.boolean("attention_k_eq_v", False):
            kv_heads = fields.integer("num_global_key_value_heads", kv_heads)
    heads = fields.integer("num_attention_heads")
    if heads % kv_heads or head_dim % 2:
        expected = f"an even head dim, and a divisor of num_attention_heads = {heads} as key/value heads"
        raise CheckpointError(
            f"{fields.source}: layers of full attention: expected {expected}, got {head_dim} and {kv_heads}"
        )
    return head_dim, kv_heads


def _shared_layers(fields: Fields, local: tuple[int | None, ...]) -> int:
    name = "num_kv_shared_layers"
    count = fields.integer(name, 0, least=0)
    own, shared = local[: max(len(local) - count, 0)], local[max(len(local) - count, 0) :]
    if not set(shared) <= set(own):
        raise fields.error(name, "so few that a layer of each kind is in front of these")
    return count


def _layer_input_size(fields: Fields) -> int:
    size = fields.integer("hidden_size_per_layer_input", 256, least=0)
    vocab_size, name = fields.integer("vocab_size"), "vocab_size_per_layer_input"
    if size and fields.integer(name, 262144) < vocab_size:
        raise fields.error(name, f"at least vocab_size = {vocab_size}")
    return size


def _experts(fields: Fields) -> Experts:
    number = fields.integer("num_experts")
    per_token, size = fields.integer("top_k_experts"), fields.integer("moe_intermediate_size")
    if per_token > number:
        raise fields.error("top_k_experts", f"at most num_experts = {number}")
    return Experts(number, per_token, size)


def _tensors(tensors: Tensors, config: DecoderConfig) -> Iterator[tuple[Path, str, Tensor]]:
    """The weights of each expert from those of all, and none of keys and values that no layer has."""
    is_shared = cast(Gemma4Config, config).is_shared
    for file, name, tensor in tensors:
        match = re.fullmatch(r"(model\.layers\.(\d+))\.(.*)", name)
        layer, rest = (match[1], match[3]) if match else ("", "")
        if match and is_shared(int(match[2])) and re.match(r"self_attn\.[kv]_", rest):
            continue
        if rest.startswith("router."):
            ours = "norm.weight" if rest == "router.scale" else rest.removeprefix("router.")
            yield file, f"{layer}.experts.gate.{ours}", tensor
        elif rest in ("experts.gate_up_proj", "experts.down_proj"):
            if len(tensor.shape) != 3:
                raise CheckpointError(f"{file}: {name!r}: expected three axes, got shape {tensor.shape}")
            for index, weights in enumerate(tensor):
                half = len(weights) // 2
                parts = {"gate": weights[:half], "up": weights[half:]} if "gate" in rest else {"down": weights}
                for part, value in parts.items():
                    yield file, f"{layer}.experts.experts.{index}.{part}_proj.weight", value
        else:
            yield file, name, tensor


def _text_tensors(tensors: Tensors, config: DecoderConfig) -> Iterator[tuple[Path, str, Tensor]]:
    """Those of the language model in a model that sees images and hears too."""
    others = tuple(f"model.{name}." for name in ("vision_tower", "embed_vision", "audio_tower", "embed_audio"))
    text = ((file, name, tensor) for file, name, tensor in tensors if not name.startswith(others))
    yield from _tensors(((f, n.replace("model.language_model.", "model.", 1), t) for f, n, t in text), config)


GEMMA4 = Family(
    _special,
    {**GEMMA_DEFAULTS, "max_position_embeddings": 131072},
    activation=gemma_activation,
    rope=lambda fields: _rope(fields, "full_attention"),
    tensors=_tensors,
    config_type=Gemma4Config,
    decoder=Gemma4Decoder,
)
# As released: with a vision tower, which is not loaded.
GEMMA4_WITH_IMAGES = dataclasses.replace(GEMMA4, text="text_config", tensors=_text_tensors)
