"""`cost_analysis` against counting what each row sees."""

from __future__ import annotations

import itertools
import math
from typing import Any

import dense
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, Case, build

import jax_paged_attn as jpa
from jax_paged_attn import compat

EXACT = (
    "mixed", "decode", "prompt", "mixed_window", "decode_window", "mixed_dense", "mixed_dense_window",
    "more_rows_than_keys", "dense_more_rows_than_keys", "length_negative", "length_beyond_table", "num_seqs_two",
    "cu_outside", "mixed_bf16_int8", "mixed_all",
)  # fmt: skip


def counted(case: Case) -> tuple[int, int]:
    """Pairs of a row and a key that it sees, and keys that some row of their sequence sees."""
    _, seen, claimed = dense.visibility(case)
    inputs = build(case)
    batch = len(inputs.kv_lens)
    starts = np.arange(batch + 1) if inputs.decode else np.maximum.accumulate(np.clip(inputs.cu_q_lens, 0, len(seen)))
    assert not seen[~claimed].any()
    return int(seen.sum()), sum(int(seen[a:b].any(axis=0).sum()) for a, b in itertools.pairwise(starts))


def call(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    args, traced = build(case).arguments()
    return getattr(jpa, case.function), args, {**traced, **case.keywords}


@pytest.mark.parametrize("name", EXACT)
def test_exact_cost_is_what_rows_see(name: str) -> None:
    case = BY_NAME[name]
    function, args, keywords = call(case)
    cost = jpa.cost_analysis(function, *args, **keywords)
    pairs, tokens = counted(case)
    assert cost.exact
    assert cost.flops == 4 * case.head_dim * case.num_heads * pairs
    assert cost.transcendentals == case.num_heads * pairs * (2 if case.keywords.get("soft_cap") else 1)
    # A call that sees nothing shows the cost that no length changes.
    kv_lens = 4 if len(args) == 5 else 3
    empty = jpa.cost_analysis(function, *(0 * x if i == kv_lens else x for i, x in enumerate(args)), **keywords)
    q, k_pages = args[:2]
    assert (empty.flops, empty.exact) == (0, True)
    assert empty.bytes_accessed >= 2 * q.nbytes + 4 * math.prod(q.shape[:2])
    pages = cost.bytes_accessed - empty.bytes_accessed
    assert pages == tokens * 2 * case.num_kv_heads * case.head_dim * k_pages.dtype.itemsize


@pytest.mark.parametrize("name", EXACT)
def test_cost_of_shapes_is_an_upper_bound(name: str) -> None:
    function, args, keywords = call(BY_NAME[name])
    exact = jpa.cost_analysis(function, *args, **keywords)
    arrays = {i: jax.ShapeDtypeStruct(x.shape, x.dtype) for i, x in enumerate(args) if x is not None}
    bound = jpa.cost_analysis(function, *(arrays.get(i) for i in range(len(args))), **keywords)
    assert not bound.exact
    assert bound.flops >= exact.flops
    assert bound.bytes_accessed >= exact.bytes_accessed
    # Lengths alone are known: then it is closer.
    some = {**arrays, 3: args[3]}
    closer = jpa.cost_analysis(function, *(some.get(i) for i in range(len(args))), **keywords)
    assert exact.flops <= closer.flops <= bound.flops


def test_bound_of_known_sizes() -> None:
    spec = jax.ShapeDtypeStruct
    pages = spec((99, 16, 2, 64), jnp.bfloat16)
    args = (spec((3, 8, 64), jnp.bfloat16), pages, pages, spec((3, 7), jnp.int32), spec((3,), jnp.int32))
    assert jpa.cost_analysis(jpa.paged_attention, *args).flops == 4 * 64 * 8 * 3 * 7 * 16
    assert jpa.cost_analysis(jpa.paged_attention, *args, sliding_window=10).flops == 4 * 64 * 8 * 3 * 10


def test_calls_in_a_model_add_up() -> None:
    """Lengths that the function computes are known; a scan repeats, a cond takes the costliest branch."""
    q, k_pages, v_pages, tables, lengths = build(BY_NAME["decode"]).arguments()[0]
    one = jpa.cost_analysis(jpa.paged_attention, q, k_pages, v_pages, tables, lengths - 1)

    @jax.jit
    def model(q: Any, lengths: Any) -> Any:
        before = jnp.where(lengths > 0, lengths - 1, 0)

        def attend(q: Any) -> Any:
            return jpa.paged_attention(q, k_pages, v_pages, tables, before)

        q, _ = jax.lax.scan(lambda q, _: (jax.checkpoint(attend)(q), None), q, None, length=3)
        q = jax.lax.cond(q.sum() > 0, lambda q: q, attend, q)
        return attend(q)

    cost = jpa.cost_analysis(model, q, lengths)
    assert len(cost.calls) == 3
    assert (cost.flops, cost.bytes_accessed, cost.exact) == (5 * one.flops, 5 * one.bytes_accessed, True)
    assert cost.calls[0].flops == 3 * one.flops


@pytest.mark.parametrize("name", ["interleaved_all", "head_major_cap"])
def test_cost_of_other_layouts(name: str) -> None:
    case = BY_NAME[name]
    function, args, keywords = call(case)
    theirs, their_args, named = harness.arguments(case)
    cost = jpa.cost_analysis(getattr(compat, theirs.rpartition(".")[2]), *their_args, **named)
    assert cost.flops == jpa.cost_analysis(function, *args, **keywords).flops > 0


def test_function_without_attention_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^fn: "):
        jpa.cost_analysis(lambda x: x + 1, jnp.ones(3))
