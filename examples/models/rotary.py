"""The rotary embeddings that a config.json asks for, under their new name (`rope_parameters`) or their old ones."""

from __future__ import annotations

import math

from jax_paged_attn.rope import LinearRopeScaling, Llama3RopeScaling, LongRopeScaling, RopeScaling, YarnRopeScaling

from .fields import Fields

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


def rope_section(fields: Fields) -> Fields:
    """The object that says the kind of rotary embeddings."""
    return fields.section("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")


def rope_scaling(rope: Fields, context: int, fields: Fields) -> RopeScaling | None:
    """The scaling of frequencies; None for none.

    Args:
      rope: the object that says the kind.
      context: the longest one, in tokens.
      fields: those around the object, where Phi 3 has one of its numbers.
    """
    kind = rope.choice("rope_type" if "rope_type" in rope else "type", KINDS, "default")
    if kind == "default":
        return None
    if kind == "llama3":
        return _llama3(rope)
    if kind == "longrope":
        return _long(rope, context, fields)
    if kind == "linear":
        return LinearRopeScaling(rope.number("factor"))
    return _yarn(rope, context)


def _llama3(rope: Fields) -> Llama3RopeScaling:
    original = rope.integer("original_max_position_embeddings")
    factor, low, high = (rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise rope.error("low_freq_factor", f"less than high_freq_factor = {high}")
    return Llama3RopeScaling(factor, low, high, original)


def _yarn(rope: Fields, context: int) -> YarnRopeScaling:
    factor, fast, slow = rope.number("factor"), rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if slow >= fast:
        raise rope.error("beta_slow", f"less than beta_fast = {fast}")
    original = rope.integer("original_max_position_embeddings", context)
    factors = {key: rope.number(key) for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.has(key)}
    return YarnRopeScaling(factor, original, fast, slow, truncate=rope.boolean("truncate", True), **factors)


def _long(rope: Fields, context: int, fields: Fields) -> LongRopeScaling:
    """The long factors where contexts may be longer than in pretraining: keys in the cache must be rotated alike."""
    name = "original_max_position_embeddings"
    original = rope.integer(name, fields.integer(name, context))
    if context <= original:
        return LongRopeScaling(rope.numbers("short_factor"), rope.number("attention_factor", 1.0))
    factor = math.sqrt(1 + math.log(rope.number("factor", context / original)) / math.log(original))
    return LongRopeScaling(rope.numbers("long_factor"), rope.number("attention_factor", factor))
