"""A served step beside what its bytes cost: steady decode, prompts, and a load that comes and goes, with an 8B Llama.

`python -m benchmarks.serve` from the repository's root, on a GPU. The weights are random; the model is a Llama of
examples/models with joined projections, the engine `jax_paged_attn.serving.Engine`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from benchmarks import options
from benchmarks.attention import Ceilings, measure_ceilings
from benchmarks.device import Event, trace
from jax_paged_attn.serving import Engine, Generation, Request

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from models import Decoder, DecoderConfig

PAGE_SIZE = 16
SIZES = {
    "8b": DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    ),
    # For a first look, and for machines without a GPU.
    "tiny": DecoderConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
    ),
}


def tiny_model(num_layers: int, **changes: Any) -> Decoder:
    """A model whose steps cost little beside what is around them."""
    return Decoder(dataclasses.replace(SIZES["tiny"], num_hidden_layers=num_layers, **changes), rngs=nnx.Rngs(0))


@dataclasses.dataclass(frozen=True)
class Decode:
    """Steady decode of `batch` sequences whose prompts had `length` tokens."""

    batch: int
    length: int
    floor: float  # the least: step / bytes at the read ceiling
    goal: float


DECODES = (Decode(64, 1024, 1.6, 1.25), Decode(1, 1024, 1.5, 1.25), Decode(256, 512, 1.5, 1.25))


class Bench:
    """An engine with the model, and what a step of it has to move.

    Args:
      args: the command line's.
      ceilings: of one device.
    """

    def __init__(self, args: argparse.Namespace, ceilings: Ceilings):
        config = self.config = SIZES[args.size]
        max_seqs, budget, decode_steps, devices = args.max_seqs, args.budget, args.decode_steps, args.devices
        self.ceilings = ceilings
        self.model = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        self.model.fuse()
        if devices > 1:
            mesh = jax.make_mesh((devices,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
            self.model.shard(mesh, "model")
        sizes = sorted({decode.batch for decode in DECODES if decode.batch <= max_seqs})
        pages = max(d.batch * (d.length + 1024) for d in DECODES if d.batch <= max_seqs) // PAGE_SIZE
        self.engine = Engine(
            self.model.served(),
            num_pages=pages,
            page_size=PAGE_SIZE,
            max_seqs=max_seqs,
            max_len=5120,
            buckets=[budget >> shift for shift in range(4) if budget >> shift >= max_seqs],
            decode_buckets=sizes,
            decode_steps=decode_steps,
            compiler_options=json.loads(args.compiler_options),
        )
        embedding = config.vocab_size * config.hidden_size
        count = sum(x.size for x in jax.tree.leaves(nnx.state(self.model, nnx.Param)))
        self.weights = count - embedding  # that a step multiplies with: of the embeddings it reads a few rows
        self.draw = np.random.default_rng(0)
        self.engine.warm_up(samples=False)

    def submit(self, length: int, new: int) -> Generation:
        prompt = self.draw.integers(0, self.config.vocab_size, length, np.int32)
        return self.engine.submit(Request(prompt, new))

    def floor(self, tokens_in_cache: float) -> float:
        """Seconds to read the weights and the pages once."""
        config = self.config
        per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        return 2 * (self.weights + tokens_in_cache * per_token) / self.ceilings.read

    def drain(self, generations: list[Generation]) -> None:
        for generation in generations:
            self.engine.cancel(generation)
        while self.engine._tickets:
            self.engine.step()

    def prefill_and_decode(self, decode: Decode, steps: int, profile: bool) -> dict[str, Any]:
        """Seconds of the prompts and of a decode step, and how long the device was idle."""
        engine, dispatches = self.engine, -(-steps // self.engine._decode_steps)
        generations = [self.submit(decode.length, 1000) for _ in range(decode.batch)]
        began = time.perf_counter()
        while any(not generation.output for generation in generations):
            engine.step()
        prefill = time.perf_counter() - began
        for _ in range(4):
            engine.step()
        tokens = sum(generation._computed for generation in generations)
        host, wait, before, began = *self._seconds(), engine.stats.steps, time.perf_counter()
        for _ in range(dispatches):
            engine.step()
        seconds = time.perf_counter() - began
        count = engine.stats.steps - before
        host, wait = (now - then for now, then in zip(self._seconds(), (host, wait), strict=True))
        tokens = (tokens + sum(generation._computed for generation in generations)) / 2
        result = {
            "batch": decode.batch,
            "length": decode.length,
            "prefill_s": prefill,
            "prefill_tokens_per_s": decode.batch * decode.length / prefill,
            "step_ms": 1e3 * seconds / count,
            "floor_ms": 1e3 * self.floor(tokens),
            "host_ms": 1e3 * host / count,
            "wait_ms": 1e3 * wait / count,
        }
        result["ratio"] = result["step_ms"] / result["floor_ms"]
        if profile:
            before = engine.stats.steps

            def run() -> Any:
                for _ in range(12):
                    engine.step()
                return engine._last

            events = trace(run)
            result |= busy(events, engine.stats.steps - before)
        self.drain(generations)
        return result

    def _seconds(self) -> tuple[float, float]:
        return self.engine.stats.host_seconds, self.engine.stats.wait_seconds


def busy(events: list[Event], steps: int) -> dict[str, Any]:
    """What the device did: its time per step by kind of kernel, and the share of the time that it did nothing."""
    start, end = events[0].start_ns, max(event.end_ns for event in events)
    # The first steps have none in front of them that would hide the host, and the last ones none behind them.
    start, end = start + (end - start) / 4, end - (end - start) / 4
    covered, until = 0.0, start
    for event in events:
        if event.end_ns > start and event.start_ns < end:
            covered += max(0.0, min(event.end_ns, end) - max(event.start_ns, until))
            until = max(until, event.end_ns)
    kinds: dict[str, float] = collections.defaultdict(float)
    for event in events:
        kinds[event.name.split("<")[0][:60]] += event.end_ns - event.start_ns
    longest = sorted(kinds.items(), key=lambda kind: -kind[1])[:25]
    return {
        "idle": 1 - covered / (end - start),
        "busy_ms": sum(kinds.values()) / steps / 1e6,
        "kernels": len(events) / steps,
        "kinds": {name: time / steps / 1e6 for name, time in longest},
    }


def mixed(bench: Bench, number: int) -> dict[str, float]:
    """Tokens per second of requests that come one by one, and of the same ones that are all there at once."""
    draw = np.random.default_rng(1)
    sizes = [(int(np.exp(draw.uniform(np.log(64), np.log(4096)))), int(draw.integers(16, 513))) for _ in range(number)]
    rates = {}
    arrivals = np.zeros(number)
    for name in ("at once", "arriving"):
        began, sent, before = time.perf_counter(), 0, bench.engine.stats.tokens
        while sent < number or bench.engine.has_work:
            now = time.perf_counter() - began
            while sent < number and arrivals[sent] <= now:
                bench.submit(*sizes[sent])
                sent += 1
            bench.engine.step()
        seconds = time.perf_counter() - began
        rates[name] = (bench.engine.stats.tokens - before) / seconds
        # As many requests per second as the engine could serve: it is never idle for long, and never far behind.
        arrivals = np.cumsum(draw.exponential(seconds / number, number))
    return {"at_once": rates["at once"], "arriving": rates["arriving"], "ratio": rates["arriving"] / rates["at once"]}


def main() -> None:
    parser = options.parser("serve", __doc__)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--max-seqs", type=int, default=256)
    parser.add_argument("--budget", type=int, default=4096, help="tokens per step")
    parser.add_argument("--decode-steps", type=int, default=1)
    parser.add_argument("--compiler-options", default="{}", metavar="JSON", help="XLA's, for the steps")
    parser.add_argument("--devices", type=int, default=1, help="GPUs to split the model over")
    parser.add_argument("--steps", type=int, default=64, help="decode steps that are timed")
    parser.add_argument("--batches", type=int, nargs="*", help="only these batch sizes")
    parser.add_argument("--load", type=int, default=0, metavar="N", help="also serve N requests that arrive at random")
    parser.add_argument("--profile", action="store_true", help="also say what the device does")
    options.add_out(parser, "serve.json")
    args = parser.parse_args()
    run(args)


def run(args: argparse.Namespace) -> None:
    ceilings = measure_ceilings()
    print(ceilings, flush=True)
    began = time.perf_counter()
    bench = Bench(args, ceilings)
    print(f"model, engine and compilation {time.perf_counter() - began:.1f} s", flush=True)
    results = []
    for decode in DECODES:
        if decode.batch > args.max_seqs or (args.batches and decode.batch not in args.batches):
            continue
        bench.prefill_and_decode(decode, 4, profile=False)  # the first graphs are made
        result = bench.prefill_and_decode(decode, args.steps, args.profile)
        results.append(result)
        products = 2 * bench.weights * decode.batch * decode.length / ceilings.matmul
        print(
            f"{decode.batch:4} x {decode.length:5}: step {result['step_ms']:7.2f} ms, floor {result['floor_ms']:6.2f},"
            f" ratio {result['ratio']:.2f} (wanted {decode.floor}, goal {decode.goal}); host {result['host_ms']:.2f},"
            f" wait {result['wait_ms']:.2f}; prefill {result['prefill_tokens_per_s']:.0f} tokens/s,"
            f" {products / result['prefill_s']:.2f} of the products' rate",
            flush=True,
        )
        if args.profile:
            print(f"     idle {result['idle']:.1%}, busy {result['busy_ms']:.2f} ms, {result['kernels']:.0f} kernels")
            for name, ms in result["kinds"].items():
                print(f"       {ms:7.3f} ms  {name}")
    record: dict[str, Any] = {"ceilings": dataclasses.asdict(ceilings), "decode": results}
    if args.load:
        record["load"] = mixed(bench, args.load)
        print("load:", {name: round(value, 3) for name, value in record["load"].items()}, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "serve.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
