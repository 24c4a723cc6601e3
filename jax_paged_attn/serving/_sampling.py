"""Chooses the next token of each row from its logits, in jitted code and without waiting for the host.

Each filter keeps the tokens whose logit reaches some threshold. `_threshold` finds it by a radix search, since sorting
a vocabulary of 128k tokens takes over a millisecond on a GPU. No branch or loop depends on data: a GPU's stream would
stall until the host has read the predicate.

Letters: R rows, V tokens of the vocabulary.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_LARGEST_FLOAT32 = np.finfo(np.float32).max
_SMALLEST_FLOAT32 = np.finfo(np.float32).tiny  # of those that are not denormal, which XLA may take for 0
_LARGEST_INT32 = np.iinfo(np.int32).max
_BEST_KEY = np.uint32(0x7F800000)  # the bits of float32 infinity; see `_kept`
_KEY_BITS = 32
_DIGIT_BITS = 4  # 15 candidates in each of 8 rounds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token of each row.

    Attributes:
      temperature: `[R]` float32, at least 0, which is greedy.
      top_k: `[R]` int32, how many of the likeliest tokens to keep; 0 keeps all.
      top_p: `[R]` float32, the probability that the kept tokens have together; 1 keeps all.
      min_p: `[R]` float32 in [0, 1], the least probability to keep, relative to the likeliest token's; 0 keeps all.
      seed: `[R]` uint32.

    Example:
      A greedy row, and one that draws from the 50 likeliest tokens.

      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.serving import Sampling
      >>> sampling = Sampling(
      ...     temperature=jnp.array([0.0, 0.7]),
      ...     top_k=jnp.array([0, 50]),
      ...     top_p=jnp.ones(2),
      ...     min_p=jnp.zeros(2),
      ...     seed=jnp.array([0, 7], jnp.uint32),
      ... )
    """

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    top_p: Array | np.ndarray
    min_p: Array | np.ndarray
    seed: Array | np.ndarray


class LogProbabilities(NamedTuple):
    """Natural logarithms of probabilities that the model gives, before temperature and filters.

    Attributes:
      chosen: `[R]` float32, those of the chosen tokens.
      top_tokens: `[R, num_top]` int32, the likeliest tokens in descending order; of equal ones the lower id first.
      top: `[R, num_top]` float32, those of `top_tokens`.

    Example:
      >>> from jax_paged_attn.serving import LogProbabilities
      >>> LogProbabilities._fields
      ('chosen', 'top_tokens', 'top')
    """

    chosen: Array
    top_tokens: Array
    top: Array


def greedy(logits: Array) -> Array:
    """The likeliest token of each row; of equal ones the lowest id.

    Args:
      logits: `[R, V]` float32, to which other floats are converted. NaN counts as −inf.

    Returns:
      `[R]` int32.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.serving import greedy
      >>> greedy(jnp.array([[0.0, 2.0, 1.0], [3.0, 3.0, jnp.nan]])).tolist()
      [1, 0]
    """
    return jnp.argmax(_without_nan(logits), axis=-1).astype(jnp.int32)


def sample(logits: Array, lengths: Array | np.ndarray, sampling: Sampling) -> Array:
    """Draws a token for each row; one of temperature 0 gets its likeliest.

    First the temperature divides the logits. Then three filters apply in this order:

    1. `min_p` keeps tokens of at least `min_p` times the largest probability.
    2. `top_k` keeps the likeliest k of these.
    3. `top_p` renormalises what is left, and keeps the fewest likeliest tokens that have probability `top_p` together.

    Tokens as likely as the last one kept stay too, and the likeliest token always stays. A draw depends on the row's
    logits, sampling and length alone, hence not on the rows beside it.

    Args:
      logits: `[R, V]` float32, to which other floats are converted. NaN counts as −inf, whose token is drawn only where
        a row has no other; then it is token 0.
      lengths: `[R]` int32, the tokens of each row's sequence so far. Each length of a seed has a draw of its own.
      sampling: of R rows.

    Returns:
      `[R]` int32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.serving import Sampling, sample
      >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.1, 0.6, 0.3]]))
      >>> temperature, top_k, seed = jnp.array([0.0, 1.0]), jnp.array([0, 1]), jnp.array([0, 7], jnp.uint32)
      >>> sampling = Sampling(temperature, top_k, top_p=jnp.ones(2), min_p=jnp.zeros(2), seed=seed)
      >>> jax.jit(sample)(logits, jnp.array([12, 5]), sampling).tolist()
      [1, 1]
    """
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    scaled = _scaled(logits, temperature)
    keys = jax.vmap(lambda seed, length: jax.random.fold_in(jax.random.key(seed), length))(sampling.seed, lengths)
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(_kept(scaled, sampling), scaled, -jnp.inf))
    return jnp.where(temperature > 0, drawn.astype(jnp.int32), greedy(logits))


def log_probabilities(logits: Array, tokens: Array, num_top: int) -> LogProbabilities:
    """Log probabilities of the chosen tokens and of the likeliest, as the model gives them.

    Args:
      logits: `[R, V]` float32, to which other floats are converted. A row has NaN throughout if one of its logits is
        NaN or +inf, or if all are −inf.
      tokens: `[R]` int32, the chosen ones.
      num_top: how many of the likeliest to give, from 0 to V.

    Returns:
      Those of `log_softmax(logits)`.

    Raises:
      ValueError: `num_top` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_paged_attn.serving import log_probabilities
      >>> found = log_probabilities(jnp.log(jnp.array([[0.25, 0.5, 0.25]])), jnp.array([2]), num_top=2)
      >>> found.top_tokens.tolist()
      [[1, 0]]
      >>> jnp.exp(found.chosen).round(3).tolist(), jnp.exp(found.top).round(3).tolist()
      ([0.25], [[0.5, 0.25]])
    """
    vocab_size = logits.shape[-1]
    if not 0 <= num_top <= vocab_size:
        raise ValueError(f"num_top: expected from 0 to the vocabulary's size {vocab_size}, got {num_top}")
    logits = logits.astype(jnp.float32)
    best = jnp.max(logits, axis=-1, keepdims=True)
    log_total = jnp.log(jnp.sum(jnp.exp(logits - best), axis=-1, keepdims=True))
    # Only the few logits that are asked for are normalised. For `top_k` alone, −0 is less than 0.
    top_logits, top_tokens = jax.lax.top_k(jnp.where(logits == 0, 0, logits), num_top)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    return LogProbabilities((chosen - best - log_total)[:, 0], top_tokens, top_logits - best - log_total)


def _without_nan(logits: Array) -> Array:
    logits = logits.astype(jnp.float32)
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits)


def _scaled(logits: Array, temperature: Array) -> Array:
    """Logits `[R, V]` over `temperature [R]`, without NaN, shifted so that each row's largest is 0."""
    finite = jnp.minimum(_without_nan(logits), _LARGEST_FLOAT32)
    best = jnp.max(finite, axis=-1, keepdims=True, initial=-_LARGEST_FLOAT32)
    # The shift comes first, so that no temperature divides the largest to infinity: exp(inf − inf) is NaN.
    return (finite - best) / jnp.maximum(temperature, _SMALLEST_FLOAT32)[:, None]


def _kept(scaled: Array, sampling: Sampling) -> Array:
    """Which tokens the filters keep, bool `[R, V]`; `scaled [R, V]` is at most 0, and 0 is each row's best."""
    # The bits of non-negative floats are in the floats' order: the key is 0 for −inf, and `_BEST_KEY` for the best.
    keys = _BEST_KEY - jax.lax.bitcast_convert_type(jnp.abs(scaled), jnp.uint32)
    weights = jnp.exp(scaled)  # probabilities relative to the best token's

    top_k = jnp.asarray(sampling.top_k, jnp.int32)
    top_p, min_p = jnp.asarray(sampling.top_p, jnp.float32), jnp.asarray(sampling.min_p, jnp.float32)
    # The likeliest k of all are those of what `min_p` leaves, or all that it leaves.
    kept = weights >= min_p[:, None]
    count = jnp.where(top_k > 0, top_k, _LARGEST_INT32)
    kept &= keys >= _threshold(keys, jnp.ones_like(keys[:, :1], jnp.int32), count)[:, None]

    weights = jnp.where(kept, weights, 0)
    # The rounded sum may reach the rounded total before the last token, so 1 asks for more than there is.
    target = jnp.where(top_p < 1, top_p * jnp.sum(weights, axis=-1), jnp.inf)
    return kept & (keys >= _threshold(keys, weights, target)[:, None])


def _threshold(keys: Array, weights: Array, target: Array) -> Array:
    """The largest threshold for which the tokens with `key >= threshold` reach a weight.

    Digit by digit, from the highest, it takes the largest for which they still do. A rounded sum is monotonic in its
    terms if their order is fixed, so that this is exact. One fused reduction weighs all candidates of a digit.

    Args:
      keys: `[R, V]` uint32, at most `_BEST_KEY`.
      weights: `[R, V]`, or `[R, 1]` where all tokens of a row weigh the same; at least 0.
      target: `[R]`, of the dtype of `weights`.

    Returns:
      `[R]` uint32: 0, which keeps all, if the row weighs less than its target; never above `_BEST_KEY`, even if the
      target is 0.
    """
    digits = jnp.arange(1, 1 << _DIGIT_BITS, dtype=jnp.uint32)

    def fix_digit(place: Array, found: Array) -> Array:
        shift = (_KEY_BITS - _DIGIT_BITS * (place + 1)).astype(jnp.uint32)
        candidates = found[:, None] + (digits << shift)  # [R, 15]
        heavy = jnp.where(keys[:, None, :] >= candidates[:, :, None], weights[:, None, :], 0)  # [R, 15, V], fused
        reached = jnp.sum(heavy, axis=-1, dtype=weights.dtype) >= target[:, None]
        return found + (jnp.sum(reached, axis=-1, dtype=jnp.uint32) << shift)

    start = jnp.zeros_like(target, jnp.uint32)
    return jnp.minimum(jax.lax.fori_loop(0, _KEY_BITS // _DIGIT_BITS, fix_digit, start), _BEST_KEY)
