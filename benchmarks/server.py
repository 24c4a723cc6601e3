"""The HTTP server beside its engine alone: time to the first byte when idle, and tokens per second of many streams.

`python -m benchmarks.server` from the repository's root. The model is the small one of examples/checkpoint, whose steps
are so short that all that the server adds can be seen. Both are measured in turns, and medians compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import http_client, options
from jax_paged_attn.serving import Engine, Request, Tokenizer
from jax_paged_attn.serving.server._run import Server, make_server

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from checkpoint import load

EXAMPLES = Path(__file__).parents[1] / "examples"
NAME = "small"
PROMPT_TOKENS = 32
MAX_LEN = 256


def make_engine(max_seqs: int) -> tuple[Engine, Tokenizer]:
    """The engine of the small model, compiled for greedy requests."""
    loaded = load(EXAMPLES / "checkpoint", dtype="float32")
    loaded.model.fuse()
    engine = Engine(
        loaded.model.served(),
        num_pages=max_seqs * MAX_LEN // 16,
        max_seqs=max_seqs,
        max_len=MAX_LEN,
        buckets=(max_seqs, 256),
        decode_buckets=(1, 8),
        tokenizer=loaded.tokenizer,
    )
    engine.warm_up(samples=False)
    return engine, loaded.tokenizer


class Bench:
    """A server in a thread of this process, and a client in a process of its own.

    Args:
      max_seqs: requests per step.
    """

    def __init__(self, max_seqs: int):
        self._engine, tokenizer = make_engine(max_seqs)
        self._draw = np.random.default_rng(0)
        self._server: Server = make_server(
            self._engine, tokenizer, model_name=NAME, host="127.0.0.1", port=0, grace=1, log_level="warning"
        )
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        command = [sys.executable, http_client.__file__, "127.0.0.1", str(port)]
        self._client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        """Ends server and client."""
        self._client.communicate()
        self._server.should_exit = True
        self._thread.join()

    def prompts(self, number: int) -> list[list[int]]:
        """New ones, so that no prefix is found."""
        return self._draw.integers(1, 128, (number, PROMPT_TOKENS)).tolist()

    def alone(self, number: int, tokens: int) -> tuple[float, float]:
        """Seconds until all have their first token, and all of them, by the engine without the server."""

        def serve() -> tuple[float, float]:
            requests = [Request(prompt, tokens) for prompt in self.prompts(number)]
            began = time.perf_counter()
            generations = [self._engine.submit(request) for request in requests]
            while not all(generation.output for generation in generations):
                self._engine.step()
            first = time.perf_counter() - began
            self._engine.run()
            return first, time.perf_counter() - began

        return self._ask(serve)

    def served(self, number: int, tokens: int) -> tuple[float, float]:
        """The same as a client of the server sees it."""
        bodies = [
            {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
            for prompt in self.prompts(number)
        ]
        assert self._client.stdin
        assert self._client.stdout
        self._client.stdin.write(json.dumps(bodies) + "\n")
        self._client.stdin.flush()
        firsts, lasts = zip(*json.loads(self._client.stdout.readline()), strict=True)
        return max(firsts), max(lasts)

    def _ask(self, function: Callable[[], Any]) -> Any:
        thread = self._server.service.engine_thread
        return asyncio.run_coroutine_threadsafe(thread.run(function), thread.loop).result()


def run(args: argparse.Namespace) -> None:
    """Measures, prints and writes what came out."""
    bench = Bench(args.streams)
    try:
        firsts: dict[str, list[float]] = {"alone": [], "served": []}
        for _ in range(args.calls):
            firsts["alone"].append(bench.alone(1, 2)[0])
            firsts["served"].append(bench.served(1, 2)[0])
        rates: dict[str, list[float]] = {"alone": [], "served": []}
        for _ in range(args.rounds + 1):
            for name, measure in (("alone", bench.alone), ("served", bench.served)):
                rates[name].append(args.streams * args.tokens / measure(args.streams, args.tokens)[1])
    finally:
        bench.close()
    first = {name: 1e3 * statistics.median(times[3:]) for name, times in firsts.items()}
    rate = {name: statistics.median(values[1:]) for name, values in rates.items()}
    # Neighbours in time are compared, since others may use the machine.
    ratios = [served / alone for alone, served in zip(rates["alone"], rates["served"], strict=True)][1:]
    first_ratio, ratio = first["served"] / first["alone"], statistics.median(ratios)
    print(
        f"first byte: engine {first['alone']:.2f} ms, server {first['served']:.2f}, ratio {first_ratio:.2f} "
        "(wanted at most 1.5)\n"
        f"{args.streams} streams: engine {rate['alone']:.0f} tokens/s, server {rate['served']:.0f}, "
        f"ratio {ratio:.3f} (wanted 0.85, goal 0.95)"
    )
    record = {
        "first_byte_ms": first,
        "first_byte_ratio": first_ratio,
        "tokens_per_s": rate,
        "rate_ratio": ratio,
        "rate_ratios": ratios,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "server.json").write_text(json.dumps(record, indent=1))


def main() -> None:
    parser = options.parser("server", __doc__)
    parser.add_argument("--streams", type=int, default=64, help="streams at once (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per stream (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of streams (default %(default)s)")
    options.add_calls(parser, 40)
    options.add_out(parser, "server.json")
    args = parser.parse_args()
    run(args)


if __name__ == "__main__":
    main()
