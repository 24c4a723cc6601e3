"""Bits per byte of a byte-level checkpoint on the held-out text: `python evaluate.py [--model DIR]`.

The text is cut into windows of the model's context that overlap by half, so that every byte after the first window is
predicted from at least half a context. Attention runs over the paged cache, of each dtype that it may have. Beside
these stands the figure of attention without a cache, and those of n-gram models fitted to the same training text.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import command_line
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

try:
    import checkpoint
    import corpus
    from flax import nnx
    from models import Decoder

    from jax_paged_attn.nnx import CacheVariable, StepMetadata, calibrate
except ModuleNotFoundError as error:
    command_line.fail_without(error)

PAGE_SIZE = 16
CACHE_TEXT_BYTES = 12_000  # of the held-out text, for the costs of cache dtypes
EIGHT_BITS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "int8": jnp.int8}


def windows(stream: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and weights, each `[W, context]`: every token but the first is the target of weight 1 once."""
    stride = context // 2
    count = max(1, math.ceil((len(stream) - 1 - context) / stride) + 1)
    padded = np.zeros((count - 1) * stride + context + 1, np.int32)
    padded[: len(stream)] = stream
    starts = np.arange(count)[:, None] * stride + np.arange(context)
    weights = (starts + 1 < len(stream)).astype(np.float32)
    weights[1:, : context - stride] = 0.0
    return padded[starts], padded[starts + 1], weights


def log_probabilities(
    model: Decoder,
    stream: np.ndarray,
    *,
    paged: bool,
    cache_dtype: DTypeLike | None = None,
    scales: Sequence[Mapping[str, ArrayLike]] | None = None,
    context: int | None = None,
    batch: int = 8,
) -> np.ndarray:
    """log₂ p of every byte that might follow each byte of `stream` but the last, float32 `[n − 1, 256]`.

    Args:
      model: over bytes. With `paged` its cache is replaced.
      stream: n bytes, uint8, see `corpus.token_stream`.
      paged: whether attention goes through the paged cache.
      cache_dtype, scales: of that cache, see `Decoder.init_cache`.
      context: length of the windows; by default the model's.
      batch: windows at a time.

    Raises:
      ValueError: fewer than 2 bytes, a context below 2, or no windows at a time.
    """
    context = model.config.max_position_embeddings if context is None else context
    if len(stream) < 2 or context < 2 or batch < 1:
        raise ValueError(
            "stream, context, batch: expected at least 2 bytes, 2 bytes and 1 window, "
            f"got {len(stream)}, {context} and {batch}"
        )
    inputs, _, weights = windows(stream, context)
    step = None
    if paged:
        model.init_cache(batch * math.ceil(context / PAGE_SIZE), PAGE_SIZE, cache_dtype, scales)
        step = StepMetadata.whole_sequences(batch, context, PAGE_SIZE)
    graphdef, cache, rest = nnx.split(model, CacheVariable, ...)
    found = []
    for first in range(0, len(inputs), batch):
        group = inputs[first : first + batch]
        padded = np.zeros((batch, context), inputs.dtype)
        padded[: len(group)] = group
        scores, cache = _scores(graphdef, rest, step, cache, padded)
        found.append(np.asarray(scores)[: len(group)][weights[first : first + batch] == 1])
    nnx.update(model, cache)
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _scores(
    graphdef: nnx.GraphDef[Decoder], rest: nnx.State, step: StepMetadata | None, cache: nnx.State, inputs: Array
) -> tuple[Array, nnx.State]:
    model = nnx.merge(graphdef, cache, rest)
    logits = model(inputs) if step is None else model(inputs.reshape(-1), step).reshape(*inputs.shape, -1)
    return jax.nn.log_softmax(logits) / math.log(2), nnx.state(model, CacheVariable)


def bits_per_byte(model: Decoder, stream: np.ndarray, *, paged: bool, **options: Any) -> float:
    """Mean −log₂ p of the bytes of `stream` after the first; see `log_probabilities`."""
    return mean_bits(log_probabilities(model, stream, paged=paged, **options), stream)


def mean_bits(log_probabilities: np.ndarray, stream: np.ndarray) -> float:
    """Mean −log₂ p of the bytes that do follow in `stream`."""
    return -float(np.take_along_axis(log_probabilities, stream[1:, None].astype(np.intp), axis=1).mean())


@dataclasses.dataclass(frozen=True)
class CacheCost:
    """What a cache dtype costs.

    Attributes:
      bits: per byte of the text.
      divergence: mean Kullback-Leibler divergence of the predictions from those with float32, in bits.
      bytes_per_token: of all layers' keys and values.
    """

    name: str
    bits: float
    divergence: float
    bytes_per_token: int


def cache_costs(folder: Path, stream: np.ndarray, prompts: Sequence[np.ndarray]) -> Iterator[CacheCost]:
    """The costs of all cache dtypes, first float32; 8-bit ones without scales and calibrated on `prompts`."""
    model = checkpoint.load(folder, dtype="float32").model
    config = model.config
    full = log_probabilities(model, stream, paged=True)

    def cost(name: str, log_p: np.ndarray, dtype: DTypeLike) -> CacheCost:
        divergence = float((np.exp2(full) * (full - log_p)).sum(axis=1).mean())
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return CacheCost(name, mean_bits(log_p, stream), divergence, numbers * jnp.dtype(dtype).itemsize)

    yield cost("f32", full, jnp.float32)
    half = checkpoint.load(folder, dtype="bfloat16").model
    yield cost("bf16, weights too", log_probabilities(half, stream, paged=True), jnp.bfloat16)
    for name, dtype in EIGHT_BITS.items():
        scales = calibrate(model, prompts, dtype)
        if dtype != jnp.int8:
            log_p = log_probabilities(model, stream, paged=True, cache_dtype=dtype)
            yield cost(f"{name}, no scales", log_p, dtype)
        log_p = log_probabilities(model, stream, paged=True, cache_dtype=dtype, scales=scales)
        yield cost(f"{name}, calibrated", log_p, dtype)


def calibration_prompts(stream: np.ndarray, length: int, count: int = 4) -> list[np.ndarray]:
    """Parts of the training text, from all over it."""
    return [stream[start : start + length] for start in range(0, count * (len(stream) // count), len(stream) // count)]


def ngram_bits_per_byte(training: bytes, text: bytes, order: int, discount: float = 0.75) -> float:
    """Mean −log₂ p of `text` under an n-gram model of bytes with interpolated absolute discounting."""
    counts: list[dict[bytes, collections.Counter[int]]] = [{} for _ in range(order)]
    for index, byte in enumerate(training):
        for length in range(min(order, index + 1)):
            counts[length].setdefault(training[index - length : index], collections.Counter())[byte] += 1
    totals = [{context: following.total() for context, following in table.items()} for table in counts]
    bits = 0.0
    for index, byte in enumerate(text):
        probability = 1 / 256
        for length in range(min(order, index + 1)):
            context = text[index - length : index]
            following = counts[length].get(context)
            if following is None:
                break
            backed_off = discount * len(following) * probability
            probability = (max(following[byte] - discount, 0.0) + backed_off) / totals[length][context]
        bits -= math.log2(probability)
    return bits / len(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per byte of a byte-level checkpoint on the held-out text.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "checkpoint", help="checkpoint folder")
    arguments = parser.parse_args()
    try:
        model = checkpoint.load(arguments.model, dtype="float32").model
        if model.config.vocab_size != 256:
            raise checkpoint.CheckpointError(f"{arguments.model}: expected a vocabulary of 256 bytes")
        heldout = corpus.token_stream(corpus.heldout_documents())
    except ModuleNotFoundError as error:  # a tokenizer.json needs one more package
        command_line.fail_without(error)
    except (OSError, ValueError) as error:
        command_line.fail(error)

    training = corpus.token_stream(corpus.training_and_validation_documents()[0])
    print(f"held-out text of {len(heldout):,} bytes; bits per byte:")
    print(f"  paged cache   {bits_per_byte(model, heldout, paged=True):.4f}")
    print(f"  no cache      {bits_per_byte(model, heldout, paged=False):.4f}")
    for order in (3, 5):
        print(f"  {order}-gram        {ngram_bits_per_byte(training.tobytes(), heldout.tobytes(), order):.4f}")
    print(f"its first {CACHE_TEXT_BYTES:,} bytes, by dtype of the paged cache:")
    print(f"{'':20} bits per byte  difference  divergence  bytes per token")
    prompts = calibration_prompts(training, model.config.max_position_embeddings)
    f32 = None
    for cost in cache_costs(arguments.model, heldout[:CACHE_TEXT_BYTES], prompts):
        f32 = f32 or cost
        figures = f"{cost.bits:13.4f} {cost.bits - f32.bits:+11.4f} {cost.divergence:11.5f} {cost.bytes_per_token:16}"
        print(f"  {cost.name:18} {figures}")


if __name__ == "__main__":
    main()
