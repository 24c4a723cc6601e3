"""What a family of models says about itself, and how its config.json is read.

A field that is missing or null has the default of the family's config in `transformers`. Where missing and null differ
there, they do here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .decoder import Decoder, DecoderConfig
from .fields import CheckpointError, Fields
from .rotary import rope_kind, rope_scaling, rope_section

# NumPy's arrays, mostly views of mapped files, or what is sliced as these are.
Tensor = Any
# File, name and value of each.
Tensors = Iterable[tuple[Path, str, Tensor]]


def _unchanged(tensors: Tensors, config: DecoderConfig) -> Iterator[tuple[Path, str, Tensor]]:
    yield from tensors


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
      special: reads the fields of `DecoderConfig` that others do not have, or have otherwise; they go before those
        that most families have.
      defaults: of fields that config.json leaves out, where they are not those of most families.
      activation: the field that names the MLP's, and the only value that it may have.
      rope: the object with the kind of rotary embeddings.
      tensors: gives a folder's tensors the names and the shapes of the decoder's.
      text: the field with the language model's config, in models that see images too; None where it is all there is.
      config_type, decoder: of the family's models.
    """

    special: Callable[[Fields], dict[str, Any]]
    defaults: Mapping[str, Any]
    activation: Callable[[Fields], str] = lambda fields: fields.choice("hidden_act", ("silu",), "silu")
    rope: Callable[[Fields], Fields] = rope_section
    tensors: Callable[[Tensors, DecoderConfig], Tensors] = _unchanged
    text: str | None = None
    config_type: type[DecoderConfig] = DecoderConfig
    decoder: type[Decoder] = Decoder

    def config(self, fields: Fields, max_len: int | None = None) -> DecoderConfig:
        """The config of a config.json.

        Args:
          fields: those of config.json.
          max_len: the longest context to be served, in tokens; None for max_position_embeddings. Models with dynamic
            rotary scaling may have longer ones: for all their tokens frequencies are those of this length.

        Raises:
          CheckpointError: a field has a value that no model of the family has.
          ValueError: `max_len` is below 1 or more than the model reaches.
        """
        if self.text is not None:
            fields = fields.section(self.text)
        special, defaults = self.special(fields), self.defaults
        self.activation(fields)
        vocab_size = fields.integer("vocab_size")
        heads = fields.integer("num_attention_heads")
        default = if_missing(fields, "num_key_value_heads", defaults.get("num_key_value_heads"))
        kv_heads = fields.integer("num_key_value_heads", default or heads)
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
        context = fields.integer("max_position_embeddings", defaults["max_position_embeddings"])
        rope = self.rope(fields)
        served = context if max_len is None else max_len
        if served < 1 or (served > context and rope_kind(rope) != "dynamic"):
            raise ValueError(f"max_len: expected 1 to max_position_embeddings = {context}, got {served}")
        common = {
            "vocab_size": vocab_size,
            "hidden_size": fields.integer("hidden_size"),
            "intermediate_size": fields.integer("intermediate_size"),
            "num_hidden_layers": fields.integer("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim(fields, defaults.get("head_dim")),
            "max_position_embeddings": served,
            "rms_norm_eps": fields.number("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
            "rope_theta": rope.number("rope_theta", fields.number("rope_theta", defaults.get("rope_theta", 10000.0))),
            "rope_scaling": rope_scaling(rope, fields, context, served),
            "tie_word_embeddings": fields.boolean("tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
            "bos_token_id": next(iter(self._token_ids(fields, "bos_token_id", vocab_size)), None),
            "eos_token_ids": self._token_ids(fields, "eos_token_id", vocab_size),
        }
        return self.config_type(**{**common, **special})

    def _token_ids(self, fields: Fields, name: str, vocab_size: int) -> tuple[int, ...]:
        """Missing and null differ: null means that there is none."""
        if name in fields:
            return fields.token_ids(name, vocab_size)
        return tuple(token for token in (self.defaults.get(name),) if token is not None and token < vocab_size)


def head_dim(fields: Fields, default: int | None = None) -> int:
    """The size of a head: the field's, the default, or the share that a head has of the hidden size."""
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    size = fields.integer("head_dim", default)
    if size is None and hidden_size % heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads = {heads}, as there is no head_dim")
    size = size or hidden_size // heads
    if size % 2:
        raise CheckpointError(f"{fields.source}: head_dim: expected an even number, got {size}")
    return size


def windows(
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


def if_missing(fields: Fields, name: str, default: Any) -> Any:
    """The default of a field that is missing; null is none."""
    return None if name in fields else default
