"""Rotary embeddings: rotations as complex numbers, and frequencies stretched to longer contexts."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_paged_attn.rope import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    ProportionalRopeScaling,
    RopeScaling,
    YarnRopeScaling,
    apply_rope,
    rope_frequencies,
)

HEAD_DIM = 12
POSITIONS = np.array([0, 1, 7, 100, 3], np.int32)
X = np.asarray(jax.random.normal(jax.random.key(0), (5, 3, HEAD_DIM)), np.float64)


@pytest.mark.parametrize("columns", [HEAD_DIM, 8, 2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers(columns: int, interleaved: bool) -> None:
    frequencies = rope_frequencies(columns, theta=50.0)
    head = X[..., :columns]
    parts = (head[..., 0::2], head[..., 1::2]) if interleaved else np.split(head, 2, axis=-1)
    turned = 1.5 * (parts[0] + 1j * parts[1]) * np.exp(1j * POSITIONS[:, None, None] * frequencies.astype(np.float64))
    both = (turned.real, turned.imag)
    want = np.stack(both, -1).reshape(head.shape) if interleaved else np.concatenate(both, -1)
    x = jnp.asarray(X, jnp.float32)
    got = apply_rope(x, jnp.asarray(POSITIONS), frequencies, interleaved=interleaved, factor=1.5)
    np.testing.assert_allclose(got[..., :columns], want, atol=2e-4)
    np.testing.assert_array_equal(got[..., columns:], x[..., columns:])


def test_scores_depend_on_the_distance_alone() -> None:
    frequencies = rope_frequencies(8, scaling=YarnRopeScaling(4.0, 64))
    q, k = (jnp.asarray(X[:1, :1], jnp.float32) for _ in range(2))

    def score(at: int, other: int, interleaved: bool) -> float:
        both = [apply_rope(x, jnp.array([i]), frequencies, interleaved=interleaved) for x, i in ((q, at), (k, other))]
        return float((both[0] * both[1]).sum())

    for interleaved in (False, True):
        assert math.isclose(score(9, 4, interleaved), score(105, 100, interleaved), rel_tol=1e-4)


def yarn(
    size: int, theta: float, factor: float, original: int, fast: float, slow: float, truncate: bool
) -> list[float]:
    """The paper's formula, a frequency at a time."""

    def border(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = border(fast), border(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    result = []
    for index in range(size // 2):
        plain = theta ** (-2 * index / size)
        share = min(max((index - low) / (high - low), 0.0), 1.0)
        result.append(plain * (1 - share) + plain / factor * share)
    return result


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("size", "theta", "factor", "original"), [(64, 150000.0, 32.0, 4096), (128, 1e6, 4.0, 32768)])
def test_yarn_mixes_frequencies_as_its_paper_says(
    size: int, theta: float, factor: float, original: int, truncate: bool
) -> None:
    scaling = YarnRopeScaling(factor, original, truncate=truncate)
    got = rope_frequencies(size, theta, scaling)
    np.testing.assert_allclose(got, yarn(size, theta, factor, original, 32.0, 1.0, truncate), rtol=1e-6)
    assert math.isclose(scaling.rotation_factor, 0.1 * math.log(factor) + 1)


def test_yarns_factor_may_be_given() -> None:
    assert YarnRopeScaling(40.0, 4096, attention_factor=0.7).rotation_factor == 0.7
    assert YarnRopeScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0).rotation_factor == 1.0
    quotient = (0.0707 * math.log(40.0) + 1) / (0.1 * math.log(40.0) + 1)
    assert math.isclose(YarnRopeScaling(40.0, 4096, mscale=0.707, mscale_all_dim=1.0).rotation_factor, quotient)
    assert YarnRopeScaling(0.5, 4096).rotation_factor == 1.0


def test_one_border_is_a_step() -> None:
    """Where no frequency lies between the borders, YaRN divides by nothing."""
    scaling = YarnRopeScaling(4.0, 16, beta_fast=1e9, beta_slow=1e8)
    assert np.isfinite(rope_frequencies(8, scaling=scaling)).all()


def test_simple_kinds_divide() -> None:
    plain = rope_frequencies(8)
    np.testing.assert_allclose(rope_frequencies(8, scaling=LinearRopeScaling(8.0)), plain / 8)
    factors = (1.0, 2.0, 4.0, 8.0)
    scaling = LongRopeScaling(factors, attention_factor=1.2)
    np.testing.assert_allclose(rope_frequencies(8, scaling=scaling), plain / np.array(factors), rtol=1e-6)
    assert scaling.rotation_factor == 1.2


def test_a_share_of_the_columns_is_rotated_from_either_half() -> None:
    """Proportional: pairs are as without scaling, and the last ones of them stay as they are, bit by bit."""
    scaling = ProportionalRopeScaling(0.3, factor=2.0)
    np.testing.assert_allclose(rope_frequencies(16, 50.0, scaling), rope_frequencies(16, 50.0) / 2 * (np.arange(8) < 2))
    assert scaling.rotation_factor == 1.0
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 16)), jnp.float32)
    got = apply_rope(x, jnp.array([3, 90, 7]), rope_frequencies(16, 50.0, scaling))
    moved = [0, 1, 8, 9]
    assert not (got[..., jnp.array(moved)] == x[..., jnp.array(moved)]).any()
    kept = jnp.array([column for column in range(16) if column not in moved])
    np.testing.assert_array_equal(got[..., kept], x[..., kept])


@pytest.mark.parametrize(("size", "max_len"), [(12, 100), (128, 16384), (2, 100), (12, 64), (12, 7)])
def test_dynamic_scaling_is_that_of_its_longest_context(size: int, max_len: int) -> None:
    """The base grows; up to the original context nothing changes. The first frequency never does."""
    original = 64
    growth = 3.0 * max(max_len, original) / original - 2.0
    theta = 500.0 * growth ** (size / (size - 2)) if size > 2 else 500.0
    got = rope_frequencies(size, 500.0, DynamicRopeScaling(3.0, original, max_len))
    np.testing.assert_allclose(got, rope_frequencies(size, theta), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearRopeScaling(0.0), "expected positive factor"),
        (lambda: DynamicRopeScaling(2.0, 64, 0), "expected positive factor and .* and max_len"),
        (lambda: Llama3RopeScaling(8.0, 4.0, 1.0, 8192), "expected 0 < low_freq_factor < high_freq_factor"),
        (lambda: YarnRopeScaling(4.0, 0), "expected positive factor and original_max_position_embeddings"),
        (lambda: YarnRopeScaling(4.0, 64, beta_fast=1.0), "expected 0 < beta_slow < beta_fast"),
        (lambda: LongRopeScaling((1.0, -1.0)), "expected positive factors"),
        (lambda: LongRopeScaling((1.0,), 0.0), "expected positive attention_factor"),
        (lambda: rope_frequencies(8, scaling=LongRopeScaling((1.0,))), "factors: expected one for each of 4"),
        (lambda: ProportionalRopeScaling(0.0), "expected positive partial_rotary_factor and factor"),
        (lambda: ProportionalRopeScaling(1.25), "expected partial_rotary_factor <= 1"),
        (lambda: rope_frequencies(7), "head_dim: expected an even number"),
        (lambda: apply_rope(jnp.ones((1, 1, 4)), jnp.zeros(1, jnp.int32), np.ones(3)), "frequencies: expected at most"),
    ],
)
def test_bad_numbers_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_every_kind_can_be_part_of_a_program() -> None:
    """Layers keep a scaling as a static part of jitted functions."""
    kinds: list[RopeScaling] = [
        LinearRopeScaling(2.0),
        DynamicRopeScaling(2.0, 64, 128),
        Llama3RopeScaling(8.0, 1.0, 4.0, 64),
        YarnRopeScaling(4.0, 64),
        LongRopeScaling((1.0, 2.0)),
    ]
    assert len({hash(kind) for kind in kinds}) == len(kinds)
    assert all(kind == type(kind)(**vars(kind)) for kind in kinds)
