"""The rotary embeddings that a config.json asks for, under their new name (`rope_parameters`) or their old ones."""

from __future__ import annotations

import math

from jax_paged_attn.rope import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    ProportionalRopeScaling,
    RopeScaling,
    YarnRopeScaling,
)

from .fields import Fields

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


def rope_section(fields: Fields) -> Fields:
    """The object that says the kind of rotary embeddings."""
    return fields.section("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")


def rope_scaling(rope: Fields, fields: Fields, context: int, max_len: int) -> RopeScaling | None:
    """The scaling of frequencies; None for none.

    Args:
      rope: the object that says the kind.
      fields: those around the object, where Phi 3 has one of its numbers.
      context: the longest one that the model was made for, in tokens.
      max_len: the longest one that is served. Where frequencies depend on the length, they are those of this one, since
        keys in a cache have to be rotated alike.
    """
    kind = rope_kind(rope)
    if kind == "default":
        return None
    if kind == "llama3":
        return _llama3(rope)
    if kind == "longrope":
        return _long(rope, fields, context, max_len)
    if kind == "yarn":
        return _yarn(rope, context)
    if kind == "proportional":
        return proportional(rope)
    factor = rope.number("factor")
    return LinearRopeScaling(factor) if kind == "linear" else DynamicRopeScaling(factor, context, max_len)


def rope_kind(rope: Fields) -> str:
    """One of `KINDS`."""
    return rope.choice("rope_type" if "rope_type" in rope else "type", KINDS, "default")


def _llama3(rope: Fields) -> Llama3RopeScaling:
    original = rope.integer("original_max_position_embeddings")
    factor, low, high = (rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise rope.error("low_freq_factor", f"less than high_freq_factor = {high}")
    return Llama3RopeScaling(factor, low, high, original)


def proportional(rope: Fields) -> ProportionalRopeScaling:
    """The scaling of kind "proportional"."""
    share = rope.number("partial_rotary_factor", 1.0)
    if share > 1:
        raise rope.error("partial_rotary_factor", "at most 1")
    return ProportionalRopeScaling(share, rope.number("factor", 1.0))


def _yarn(rope: Fields, context: int) -> YarnRopeScaling:
    factor, fast, slow = rope.number("factor"), rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if slow >= fast:
        raise rope.error("beta_slow", f"less than beta_fast = {fast}")
    original = rope.integer("original_max_position_embeddings", context)
    factors = {key: rope.number(key) for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.has(key)}
    return YarnRopeScaling(factor, original, fast, slow, truncate=rope.boolean("truncate", True), **factors)


def _long(rope: Fields, fields: Fields, context: int, max_len: int) -> LongRopeScaling:
    """The long factors where contexts may be longer than in pretraining."""
    name = "original_max_position_embeddings"
    original = rope.integer(name, fields.integer(name, context))
    factor = 1.0
    if context > original:
        factor = math.sqrt(1 + math.log(rope.number("factor", context / original)) / math.log(original))
    factors = rope.numbers("long_factor" if max_len > original else "short_factor")
    return LongRopeScaling(factors, rope.number("attention_factor", factor))
