"""Trains the byte-level example checkpoint: `python train.py [--out DIR]`, under an hour on two CPU cores.

A small text read many times over is mostly a matter of not learning it by heart: dropout, weight decay, and an
exponential moving average of the weights, whose best state on the validation text is kept. Most steps see windows of
half the model's context, which cost less; the last quarter sees all of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import command_line
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

try:
    import checkpoint
    import corpus
    import optax
    from evaluate import bits_per_byte
    from flax import nnx
    from models import Decoder, DecoderConfig
except ModuleNotFoundError as error:
    command_line.fail_without(error)

MODEL = DecoderConfig(
    vocab_size=256,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=corpus.SEPARATOR,
    eos_token_ids=(corpus.SEPARATOR,),
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how to train.

    Attributes:
      steps: optimizer steps; the learning rate warms up linearly, then falls to 1 % along a cosine.
      tokens: bytes per step.
      short_steps: share of the steps with windows of half the context.
      learning_rate, warmup, weight_decay: of AdamW; weight decay acts on matrices only.
      dropout: rate, see `Decoder`.
      average: decay of the moving average of the weights.
      evaluate_every: steps between two looks at the validation text.
      seed: of weights, windows and dropout.
    """

    steps: int = 2600
    tokens: int = 4096
    short_steps: float = 0.75
    learning_rate: float = 3e-3
    warmup: int = 150
    weight_decay: float = 0.1
    dropout: float = 0.25
    average: float = 0.998
    evaluate_every: int = 100
    seed: int = 0


TrainState = tuple[Any, Any, optax.OptState]  # weights, their average, AdamW's


def train(model_config: DecoderConfig, config: TrainConfig) -> tuple[Decoder, float]:
    """Returns the averaged model that was best on the validation text, and its bits per byte there."""
    training, validation = (corpus.token_stream(d) for d in corpus.training_and_validation_documents())
    model = Decoder(model_config, dropout=config.dropout, rngs=nnx.Rngs(config.seed))
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)
    optimizer = _adamw(config)
    state: TrainState = (weights, jax.tree.map(jnp.copy, weights), optimizer.init(weights))
    step = jax.jit(functools.partial(_train_step, graphdef, rest, optimizer, config.average), donate_argnums=0)

    draw = np.random.default_rng(config.seed)
    # XLA's own generator: several times faster than threefry on CPUs, and dropout needs no better.
    key = jax.random.key(config.seed, impl="rbg")
    best, best_bits = weights, math.inf
    print(f"{sum(x.size for x in jax.tree.leaves(weights)):,} weights, {len(training):,} bytes of training text")
    started = time.perf_counter()
    for index in range(1, config.steps + 1):
        short = index <= config.short_steps * config.steps
        context = model_config.max_position_embeddings // (2 if short else 1)
        starts = draw.integers(0, len(training) - context - 1, config.tokens // context)
        batch = training[starts[:, None] + np.arange(context + 1)].astype(np.int32)
        state, loss = step(state, batch, jax.random.fold_in(key, index))
        if index % config.evaluate_every == 0 or index == config.steps:
            average = jax.tree.map(jnp.copy, state[1])
            bits = bits_per_byte(nnx.merge(graphdef, average, rest), validation, paged=False)
            if bits < best_bits:
                best, best_bits = average, bits
            print(
                f"step {index}/{config.steps}: training {float(loss) / math.log(2):.3f}, "
                f"validation {bits:.3f} bits/byte, {index / (time.perf_counter() - started):.2f} steps/s",
                flush=True,
            )
    return nnx.merge(graphdef, best, rest), best_bits


def _adamw(config: TrainConfig) -> optax.GradientTransformation:
    warmup = min(config.warmup, config.steps // 2)  # a short trial run warms up, too
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, config.steps, end_value=config.learning_rate * 0.01
    )

    def matrices(weights: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim == 2, weights)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay, mask=matrices),
    )


def _train_step(
    graphdef: nnx.GraphDef[Decoder],
    rest: nnx.State,
    optimizer: optax.GradientTransformation,
    decay: float,
    state: TrainState,
    batch: Array,
    key: Array,
) -> tuple[TrainState, Array]:
    weights, average, optimizer_state = state

    def loss_of(weights: nnx.State) -> Array:
        logits = nnx.merge(graphdef, weights, rest)(batch[:, :-1], rngs=nnx.Rngs(dropout=key))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    loss, gradients = jax.value_and_grad(loss_of)(weights)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, weights)
    weights = optax.apply_updates(weights, updates)
    average = jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, average, weights)
    return (weights, average, optimizer_state), loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the byte-level example checkpoint.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint", help="folder to write")
    steps = functools.partial(command_line.number, int, 1)
    parser.add_argument("--steps", type=steps, default=TrainConfig.steps, metavar="N", help="default %(default)s")
    arguments = parser.parse_args()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)  # now, and not after an hour
        corpus.heldout_documents()
    except (OSError, ValueError) as error:
        command_line.fail(error)

    started = time.perf_counter()
    model, validation_bits = train(MODEL, TrainConfig(steps=arguments.steps))
    checkpoint.save(model, arguments.out, dtype=jnp.bfloat16)
    heldout = corpus.token_stream(corpus.heldout_documents())
    heldout_bits = bits_per_byte(checkpoint.load(arguments.out).model, heldout, paged=True)
    minutes = (time.perf_counter() - started) / 60
    print(
        f"{arguments.out}: validation {validation_bits:.3f}, held-out {heldout_bits:.3f} bits/byte, {minutes:.0f} min"
    )


if __name__ == "__main__":
    main()
