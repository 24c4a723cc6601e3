"""Sampling against plain NumPy with a sort: filters, draws, log probabilities, and logits that no model should give."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_paged_attn.serving import _sampling
from jax_paged_attn.serving._sampling import Sampling, greedy, log_probabilities, sample

# Compiled once for each shape; all draws use few of them.
draw = jax.jit(lambda logits, lengths, sampling: sample(logits, lengths, sampling))
scale = jax.jit(lambda logits, temperature: _sampling._scaled(logits, temperature))
kept = jax.jit(lambda scaled, sampling: _sampling._kept(scaled, sampling))

ROWS, VOCAB = 64, 97
LADDER = np.linspace(-30.0, 30.0, 8, dtype=np.float32)[[4, 1, 6, 2, 5, 7, 0, 3]]  # the best is 5


def options(rows: int = ROWS, **given) -> Sampling:
    """Rows that draw from the whole vocabulary with seeds 0, 1, … but for what is given, one for all or one per row."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": np.arange(rows)}
    dtypes = {"top_k": np.int32, "seed": np.uint32}
    values = {**defaults, **given}
    return Sampling(
        **{name: np.broadcast_to(value, rows).astype(dtypes.get(name, np.float32)) for name, value in values.items()}
    )


def random_options(rng: np.random.Generator, vocab: int) -> Sampling:
    """Each filter is off in a third of the rows, hence all combinations of filters occur."""

    def some(off: float, values: np.ndarray) -> np.ndarray:
        return np.where(rng.random(ROWS) < 1 / 3, off, values)

    return options(
        temperature=rng.choice([0.3, 1.0, 1.7], ROWS),
        top_k=some(0, rng.integers(1, vocab + 3, ROWS)),
        top_p=some(1, rng.uniform(0.01, 1, ROWS)),
        min_p=some(0, 10 ** rng.uniform(-4, 0, ROWS)),
        seed=rng.integers(0, 2**32, ROWS),
    )


def random_logits(rng: np.random.Generator, vocab: int, rows: int = ROWS) -> np.ndarray:
    """Logits in steps of 1/4, so that many are equal, among them 0 and −0; a few are −inf."""
    logits = np.round(4 * rng.normal(0, 2, (rows, vocab))).astype(np.float32) / 4
    logits[:, 1:][rng.random((rows, vocab - 1)) < 0.05] = -np.inf
    return logits


def row_kept_by_sort(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The filters as one would write them for one row, in float64."""
    probabilities = np.exp(scaled.astype(np.float64))
    probabilities /= probabilities.sum()
    chosen = probabilities >= min_p * probabilities.max()
    if top_k > 0:
        chosen &= scaled >= np.sort(scaled)[::-1][: int(top_k)][-1]
    if top_p < 1:
        order = np.argsort(-scaled)
        order = order[chosen[order]]
        reached = np.cumsum(probabilities[order]) >= top_p * probabilities[order].sum()
        chosen &= scaled >= scaled[order[np.argmax(reached)]]
    return chosen


def kept_by_sort(scaled: np.ndarray, sampling: Sampling, lenience: float = 0.0) -> np.ndarray:
    """`lenience` moves the borders of `top_p` and `min_p`, to keep more or, if negative, fewer tokens."""
    top_p = np.where(sampling.top_p < 1, np.asarray(sampling.top_p) * (1 + lenience), 1)
    filters = (sampling.top_k, top_p, np.minimum(np.asarray(sampling.min_p) * (1 - lenience), 1))
    return np.stack([row_kept_by_sort(*row) for row in zip(scaled, *map(np.asarray, filters), strict=True)])


# ---- the filters


@pytest.mark.parametrize("vocab", [1, 2, VOCAB, 1000])
def test_filters_keep_what_a_sort_would(vocab: int):
    rng = np.random.default_rng(vocab)
    exact = 0
    for _ in range(5):
        sampling = random_options(rng, vocab)
        logits = random_logits(rng, vocab)
        scaled = np.asarray(scale(logits, sampling.temperature))
        shifted = logits - logits.max(axis=1, keepdims=True)
        np.testing.assert_allclose(scaled, shifted / np.asarray(sampling.temperature)[:, None], rtol=1e-6)
        ours = np.asarray(kept(scaled, sampling))
        fewest, most = kept_by_sort(scaled, sampling, -1e-5), kept_by_sort(scaled, sampling, 1e-5)
        assert np.all(fewest <= ours)
        assert np.all(ours <= most)
        assert np.all(ours[scaled == 0])
        exact += np.sum(np.all(fewest == most, axis=1))
    assert exact > 0.97 * 5 * ROWS  # in so many rows the two bounds leave one answer


def test_ties_at_each_border_stay():
    scaled = np.log(np.array([0.4, 0.2, 0.2, 0.1, 0.1], np.float32) / np.float32(0.4))
    scaled = np.broadcast_to(scaled, (ROWS, 5))
    counts = {
        1: [{"top_k": 1}, {"top_p": 0.39}, {"min_p": 0.51}, {"top_k": 2, "top_p": 0.49}],  # 0.4 is half of 0.8
        3: [{"top_k": 2}, {"top_k": 3}, {"top_p": 0.49}, {"min_p": 0.49}, {"min_p": 0.3, "top_k": 4}],
        5: [{"top_k": 4}, {"top_p": 0.81}, {"min_p": 0.24}, {"top_k": 9}],
    }
    for count, cases in counts.items():
        assert [int(kept(scaled, options(**given))[0].sum()) for given in cases] == [count] * len(cases)


@pytest.mark.parametrize("top_p", [1e-6, 1e-38, 1e-46])
def test_the_smallest_top_p_keeps_the_best_token(top_p: float):
    tokens = draw(np.broadcast_to(LADDER, (ROWS, 8)), np.full(ROWS, 3, np.int32), options(top_p=top_p))
    assert set(tokens.tolist()) == {5}


def test_a_top_p_of_one_keeps_every_token():
    logits = 10 * jnp.sin(jnp.arange(4096, dtype=jnp.float32))[None]  # in float32 the 2688 likeliest have a sum of 1
    scaled = scale(logits, np.ones(1, np.float32))
    assert np.all(kept(scaled, options(1)))
    half = np.asarray(kept(scaled, options(1, top_p=0.5)))[0]
    assert 0.4999 <= np.asarray(jax.nn.softmax(logits[0]))[half].sum() < 0.51


# ---- the temperature


@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1e-30, 1.2e-38, 1e-38, 1e-42])
def test_the_smallest_temperature_is_greedy(temperature: float):
    logits = np.broadcast_to(LADDER, (ROWS, 8))
    assert set(draw(logits, np.full(ROWS, 3, np.int32), options(temperature=temperature)).tolist()) == {5}


def test_the_largest_temperature_is_uniform():
    logits = np.broadcast_to(LADDER, (ROWS, 8))
    hottest = options(temperature=np.finfo(np.float32).max)
    tokens = [draw(logits, np.full(ROWS, length, np.int32), hottest).tolist() for length in range(4)]
    assert set(np.ravel(tokens).tolist()) == set(range(8))


def test_greedy_rows_stay_greedy_beside_sampled_ones():
    logits = random_logits(np.random.default_rng(0), VOCAB)
    sampling = options(temperature=np.where(np.arange(ROWS) % 2, 2.0, 0.0))
    tokens = np.asarray(draw(logits, np.arange(ROWS, dtype=np.int32), sampling))
    best = logits.argmax(axis=1)
    np.testing.assert_array_equal(greedy(jnp.asarray(logits)), best)
    np.testing.assert_array_equal(tokens[::2], best[::2])
    assert np.mean(tokens[1::2] == best[1::2]) < 0.7


# ---- the draws


def test_a_draw_is_categorical_under_a_key_of_seed_and_length():
    """The tokens that a seed gives are part of the contract: an update must not change them."""
    rng = np.random.default_rng(1)
    logits, sampling = random_logits(rng, VOCAB), random_options(rng, VOCAB)
    lengths = rng.integers(0, 2**31, ROWS).astype(np.int32)
    scaled = np.asarray(scale(logits, sampling.temperature))
    masked = np.where(kept_by_sort(scaled, sampling), scaled, -np.inf)
    alone = [
        int(jax.random.categorical(jax.random.fold_in(jax.random.key(seed), length), row))
        for seed, length, row in zip(np.asarray(sampling.seed), lengths, masked, strict=True)
    ]
    assert draw(logits, lengths, sampling).tolist() == alone
    assert len(set(alone)) > 20


def test_a_draw_does_not_depend_on_other_rows():
    rng = np.random.default_rng(2)
    logits, sampling = random_logits(rng, VOCAB), random_options(rng, VOCAB)
    lengths = rng.integers(0, 1000, ROWS).astype(np.int32)
    tokens = np.asarray(draw(logits, lengths, sampling))

    order = rng.permutation(ROWS)
    moved = jax.tree.map(lambda leaf: leaf[order], sampling)
    np.testing.assert_array_equal(draw(logits[order], lengths[order], moved), tokens[order])

    mine = np.arange(ROWS) < 8
    others = random_options(rng, VOCAB)
    mixed = jax.tree.map(lambda ours, theirs: np.where(mine, ours, theirs), sampling, others)
    beside = np.where(mine[:, None], logits, random_logits(rng, VOCAB))
    np.testing.assert_array_equal(draw(beside, np.where(mine, lengths, 0), mixed)[:8], tokens[:8])


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1.5},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 2.0, "min_p": 0.06, "top_k": 8, "top_p": 0.9},
    ],
    ids=lambda given: "+".join(given),
)
@pytest.mark.parametrize("varied", ["seed", "length"])
def test_draws_have_the_filtered_distribution(given: dict[str, float], varied: str):
    count = 4096
    logits = np.array([[0.5, -1, 1, 0.5, -np.inf, 0, -0.5, -4, 1.5, 0, -0.5, 1]], np.float32)
    many = np.arange(count)
    sampling = options(count, **given, seed=many if varied == "seed" else 5)
    lengths = np.broadcast_to(many if varied == "length" else 9, count).astype(np.int32)
    tokens = np.asarray(draw(np.broadcast_to(logits, (count, 12)), lengths, sampling))

    scaled = (logits - logits.max()) / np.asarray(sampling.temperature)[0]
    chosen = kept_by_sort(scaled, jax.tree.map(lambda leaf: leaf[:1], sampling))[0]
    expected = np.where(chosen, np.exp(scaled[0]), 0)
    expected *= count / expected.sum()
    counts = np.bincount(tokens, minlength=12)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    assert live.sum() > 3
    chi_square = np.sum((counts[live] - expected[live]) ** 2 / expected[live])
    freedom = live.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


# ---- logits that no model should give


def test_bad_logits_spoil_no_other_row():
    rng = np.random.default_rng(4)
    logits, sampling = random_logits(rng, VOCAB), random_options(rng, VOCAB)
    sampling = dataclasses.replace(sampling, temperature=np.where(np.arange(ROWS) % 3, sampling.temperature, 0))
    lengths = np.full(ROWS, 8, np.int32)
    clean = np.asarray(draw(logits, lengths, sampling))

    bad = logits.copy()
    bad[0:6] = np.nan
    bad[6:12] = -np.inf
    bad[12:18, ::2] = np.nan  # the others are finite
    bad[12:18, 1::2] = rng.normal(size=(6, VOCAB // 2))
    bad[18:24, 7] = np.inf
    bad[24:30] = np.where(np.arange(VOCAB) == 11, -3e38, -np.inf)
    tokens = np.asarray(draw(bad, lengths, sampling))
    np.testing.assert_array_equal(tokens[30:], clean[30:])
    assert tokens[:12].tolist() == [0] * 12
    assert np.all(tokens[12:18] % 2 == 1)
    assert tokens[18:24].tolist() == [7] * 6
    assert tokens[24:30].tolist() == [11] * 6
    np.testing.assert_array_equal(greedy(jnp.asarray(bad))[30:], logits[30:].argmax(axis=1))
    np.testing.assert_array_equal(greedy(jnp.asarray(bad))[:30:6], [0, 0, np.nanargmax(bad[12]), 7, 11])
    assert not np.any(np.isnan(scale(bad, sampling.temperature)))


# ---- log probabilities


@pytest.mark.parametrize("num_top", [0, 5, VOCAB])
def test_log_probabilities_are_those_of_the_raw_logits(num_top: int):
    rng = np.random.default_rng(5)
    logits = random_logits(rng, VOCAB)
    tokens = rng.integers(0, VOCAB, ROWS).astype(np.int32)
    found = jax.jit(log_probabilities, static_argnums=2)(logits, tokens, num_top)

    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    order = np.argsort(-wide, axis=1, kind="stable")[:, :num_top]
    assert (found.chosen.dtype, found.top_tokens.dtype, found.top.dtype) == (jnp.float32, jnp.int32, jnp.float32)
    np.testing.assert_allclose(found.chosen, expected[np.arange(ROWS), tokens], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.top_tokens, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, axis=1), rtol=1e-5, atol=1e-6)


def test_log_probabilities_of_large_and_bad_logits():
    logits = jnp.array([[1e38, 0.0], [-1e38, -1e38], [jnp.nan, 0.0], [-jnp.inf, -jnp.inf], [0.0, -jnp.inf]])
    found = log_probabilities(logits, jnp.array([0, 1, 1, 0, 1]), 1)
    np.testing.assert_allclose(found.chosen, [0, -np.log(2), np.nan, np.nan, -np.inf], rtol=1e-6)
    assert found.top_tokens[jnp.array([0, 1, 4])].tolist() == [[0], [0], [0]]


def test_more_top_tokens_than_the_vocabulary_has_are_refused():
    with pytest.raises(ValueError, match="num_top: expected from 0 to the vocabulary's size 3, got 4"):
        log_probabilities(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), 4)


# ---- the compiled code


def test_nothing_is_sorted_and_no_branch_depends_on_data():
    logits = jnp.zeros((2, 50))
    lowered = jax.jit(sample).trace(logits, np.zeros(2, np.int32), options(2)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "while" in text  # as StableHLO spells the radix search; a sort or a branch would be spelled likewise
    assert not [word for word in ("sort", "top_k", "stablehlo.case", "stablehlo.if") if word in text]
