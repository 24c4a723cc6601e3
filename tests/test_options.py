"""Keywords that functions share: what `help` and type checkers see, and what callers get."""

from __future__ import annotations

import inspect
from typing import Any, assert_type

import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx
from jax import Array

import jax_paged_attn as jpa
from jax_paged_attn import compat, nnx

SCORES = {"scale": None, "sliding_window": None, "soft_cap": None}
ENGINE = {"implementation": None, "batch_invariant": False}
CACHE = {**SCORES, "sinks": None, **ENGINE, "return_lse": False}
SCALES = {"k_scale": None, "v_scale": None, "value_dim": None}
ROPE = {"rope_theta": 10000.0, "rope_scaling": None, "rotary_dim": None, "rope_interleaved": False}
VALUES = {"value_dim": None, "values_in_keys": False}
REFERENCE = {name: default for name, default in {**CACHE, **SCALES}.items() if name != "implementation"}
KEYWORDS = (
    (jpa.paged_attention, {**CACHE, **SCALES}),
    (jpa.paged_attention_reference, REFERENCE),
    (jpa.ragged_paged_attention, {**CACHE, **SCALES, "causal": True}),
    (jpa.ragged_paged_attention_reference, {**REFERENCE, "causal": True}),
    (jpa.PagedKVCache.attend, CACHE),
    (jpa.PagedKVCache.attend_ragged, {**CACHE, "causal": True}),
    (nnx.PagedAttention.__init__, {**SCORES, **ENGINE, **ROPE, **VALUES, "sinks": False}),
)
ONE, POOL = jnp.ones((1, 1, 8)), jnp.ones((1, 4, 1, 8))
TABLE, LENGTH, ROWS = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.array([0, 1], jnp.int32)
CALLS = (
    (jpa.paged_attention, (ONE, POOL, POOL, TABLE, LENGTH)),
    (jpa.ragged_paged_attention, (ONE, POOL, POOL, LENGTH, TABLE, ROWS)),
    (compat.paged_attention, (ONE, POOL, POOL, TABLE, LENGTH)),
    (jpa.PagedKVCache((POOL,), (POOL,)).attend, (0, ONE, TABLE, LENGTH)),
)


@pytest.mark.parametrize(("function", "keywords"), KEYWORDS)
def test_signatures_show_every_keyword_with_its_default(function: Any, keywords: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert {x.name: x.default for x in parameters if x.kind is x.KEYWORD_ONLY} == keywords
    assert not any(x.kind is x.VAR_KEYWORD for x in parameters)
    assert not [x.name for x in parameters if x.annotation is x.empty and x.name != "self"]
    assert inspect.getdoc(function) or function.__name__ == "__init__"


@pytest.mark.parametrize(("function", "operands"), CALLS)
def test_unknown_keywords_raise_as_in_any_function(function: Any, operands: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) got an unexpected keyword argument 'softcap'$"):
        function(*operands, softcap=30.0)


def test_keywords_reach_the_layer() -> None:
    layer = nnx.PagedSelfAttention(16, 2, 1, 8, rngs=flax_nnx.Rngs(0), sliding_window=3, rope_theta=None)
    assert (layer.attention.sliding_window, layer.attention.rope_theta) == (3, None)  # pyright: ignore
    with pytest.raises(TypeError, match="unexpected keyword argument 'window'"):
        nnx.PagedSelfAttention(16, 2, 1, 8, rngs=flax_nnx.Rngs(0), window=3)  # pyright: ignore[reportCallIssue]


def test_the_type_of_a_result_depends_on_return_lse() -> None:
    """For type checkers, which read this file."""
    out = jpa.paged_attention(ONE, POOL, POOL, TABLE, LENGTH, soft_cap=30.0)
    pair = jpa.paged_attention(ONE, POOL, POOL, TABLE, LENGTH, sliding_window=4, return_lse=True)
    assert_type(out, Array)
    assert_type(pair, tuple[Array, Array])
    ragged = jpa.PagedKVCache((POOL,), (POOL,)).attend_ragged(0, ONE, LENGTH, TABLE, ROWS, causal=False)
    assert_type(ragged, Array)
    assert (out.shape, len(pair), ragged.shape) == (ONE.shape, 2, ONE.shape)
