"""Bits per byte of a byte-level checkpoint on the held-out text: `python evaluate.py [--model DIR]`.

The text is cut into windows of the model's context that overlap by half, so that every byte after the first window is
predicted from at least half a context. Attention runs over the paged cache; beside it stands the figure of
attention without one, and those of n-gram models fitted to the same training text.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
from pathlib import Path

import command_line
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

try:
    import checkpoint
    import corpus
    from flax import nnx
    from models import Decoder

    from jax_paged_attn.nnx import CacheVariable, StepMetadata
except ModuleNotFoundError as error:
    command_line.fail_without(error)


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


def bits_per_byte(
    model: Decoder, stream: np.ndarray, *, paged: bool, context: int | None = None, batch: int = 8
) -> float:
    """Mean −log₂ p of the bytes of `stream` after the first.

    Args:
      model: over bytes. With `paged` its cache is replaced.
      stream: uint8, see `corpus.token_stream`.
      paged: whether attention goes through the paged cache.
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
    inputs, targets, weights = windows(stream, context)
    bits = 0.0
    step = None
    if paged:
        page_size = 16
        model.init_cache(batch * math.ceil(context / page_size), page_size)
        step = StepMetadata.whole_sequences(batch, context, page_size)
    graphdef, cache, rest = nnx.split(model, CacheVariable, ...)
    score = functools.partial(_bits, graphdef, rest, step)
    for first in range(0, len(inputs), batch):
        group = [np.zeros((batch, context), x.dtype) for x in (inputs, targets, weights)]
        for padded, x in zip(group, (inputs, targets, weights), strict=True):
            padded[: len(x[first : first + batch])] = x[first : first + batch]
        total, cache = score(cache, *group)
        bits += float(total)
    nnx.update(model, cache)
    return bits / float(weights.sum())


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _bits(
    graphdef: nnx.GraphDef[Decoder],
    rest: nnx.State,
    step: StepMetadata | None,
    cache: nnx.State,
    inputs: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, nnx.State]:
    model = nnx.merge(graphdef, cache, rest)
    logits = model(inputs) if step is None else model(inputs.reshape(-1), step).reshape(*inputs.shape, -1)
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -(likelihood * weights).sum() / math.log(2), nnx.state(model, CacheVariable)


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


if __name__ == "__main__":
    main()
