"""Bits a byte of a byte-level checkpoint on the held-out text: `python evaluate.py [--model DIR] [--dense]`.

The text is cut into windows of the model's context that overlap by half; every byte but those of the first window is predicted
from at least half a context. The windows are served through the paged cache; `--dense` attends without one.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jax_paged_attn.nnx import CacheVariable, StepMetadata
from llama import Llama


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


def bits_per_byte(model: Llama, stream: np.ndarray, *, paged: bool, context: int | None = None, batch: int = 8) -> float:
    """Mean −log₂ p of the bytes of `stream` after the first.

    Args:
      model: over bytes. With `paged` its cache is replaced.
      stream: uint8, see `corpus.token_stream`.
      paged: whether attention goes through the paged cache.
      context: length of the windows; by default the model's.
      batch: windows at a time.
    """
    context = context or model.config.max_position_embeddings
    inputs, targets, weights = windows(stream, context)
    bits = 0.0
    step = None
    if paged:
        page_size = 16
        pages = math.ceil(context / page_size)
        model.init_cache(batch * pages, page_size)
        step = _whole_windows(batch, context, pages, page_size)
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
    graphdef: nnx.GraphDef[Llama],
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


def _whole_windows(batch: int, context: int, pages: int, page_size: int) -> StepMetadata:
    """A step that prefills `batch` sequences of `context` tokens, each with `pages` pages of its own."""
    tables = np.arange(batch * pages, dtype=np.int32).reshape(batch, pages)
    positions = np.tile(np.arange(context, dtype=np.int32), batch)
    slots = tables[:, positions[:context] // page_size] * page_size + positions[:context] % page_size
    return StepMetadata(
        positions=jnp.asarray(positions),
        slot_mapping=jnp.asarray(slots.reshape(-1)),
        block_tables=jnp.asarray(tables),
        kv_lens=jnp.full(batch, context, jnp.int32),
        cu_q_lens=jnp.arange(batch + 1, dtype=jnp.int32) * context,
        num_seqs=jnp.int32(batch),
    )
