"""The CPU engine beside the machine's read bandwidth, XLA's gather and einsum, and the reference.

`python -m benchmarks.cpu` from the repository's root prints a table and writes build/bench/cpu.json and cpu.png.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_paged_attn as jpa
from benchmarks import options, report
from benchmarks.cases import CPU, Inputs, Workload, exact, make
from benchmarks.timing import Contender, race

# As many as XLA's own pool has.
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

READ_GOAL = 0.6  # decode: share of the read bandwidth
GATHER_GOAL = 15.0  # decode: times faster than gather and einsum
REFERENCE_GOAL = 3.0  # prefill: times faster than the reference

ENGINE, GATHER, REFERENCE = "cpu engine", "gather + einsum", "reference"

# (q [B, R, N, H], k_pages, v_pages, block_tables, kv_lens) -> [B, R, N, H]
Attend = Callable[[Array, Array, Array, Array, Array], Array]


def package(workload: Workload, implementation: str) -> Attend:
    """An engine through the public API."""
    w = workload

    def attend(q: Array, k_pages: Array, v_pages: Array, block_tables: Array, kv_lens: Array) -> Array:
        rows = q.reshape(w.batch * w.rows, w.num_heads, w.head_dim)
        if w.decode:
            out = jpa.paged_attention(rows, k_pages, v_pages, block_tables, kv_lens, implementation=implementation)
        else:
            cu_q_lens = jnp.arange(w.batch + 1, dtype=jnp.int32) * w.rows
            out = jpa.ragged_paged_attention(
                rows, k_pages, v_pages, kv_lens, block_tables, cu_q_lens, implementation=implementation
            )
        return jnp.asarray(out).reshape(q.shape)

    return attend


def gather_and_einsum(q: Array, k_pages: Array, v_pages: Array, block_tables: Array, kv_lens: Array) -> Array:
    """The code of those without this package: pages gathered into dense keys and values, then dense attention."""
    batch, rows, num_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    keys, values = (pages[block_tables].reshape(batch, -1, kv_heads, head_dim) for pages in (k_pages, v_pages))
    grouped = q.reshape(batch, rows, kv_heads, num_heads // kv_heads, head_dim)
    scores = jnp.einsum("brkgh,bskh->bkgrs", grouped, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    positions = kv_lens[:, None] - rows + jnp.arange(rows)
    visible = jnp.arange(keys.shape[1]) <= positions[:, :, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1).astype(values.dtype)
    return jnp.einsum("bkgrs,bskh->brkgh", weights, values).reshape(q.shape)


def rotated(items: Sequence[Any], turn: int, turns: int) -> Iterator[Any]:
    """Cycles through the items from a start of its own, so that no contender finds in cache what another just read."""
    start = turn * len(items) // turns
    return itertools.cycle([*items[start:], *items[:start]])


def attention_contender(name: str, attend: Attend, inputs: Inputs, turn: int, turns: int) -> tuple[Contender, Array]:
    """The contender, and its result."""
    compiled = jax.jit(attend)

    def call(pool: tuple[Array, Array]) -> Array:
        return compiled(inputs.q, *pool, inputs.block_tables, inputs.kv_lens).block_until_ready()

    calls = (functools.partial(call, pool) for pool in rotated(inputs.pools, turn, turns))
    return Contender(name, calls), call(inputs.pools[0])


def read_contenders(num_bytes: int, copies: int, threads: ThreadPoolExecutor) -> list[Contender]:
    """Several ways to read so many bytes with all threads; the best of them is called the read bandwidth."""
    columns = 4096
    original = np.random.default_rng(0).standard_normal((num_bytes // (4 * columns), columns), np.float32)
    buffers = [jnp.array(original) for _ in range(copies)]
    parts = [np.array_split(np.asarray(buffer).reshape(-1), THREADS) for buffer in buffers]  # views
    ones = jnp.ones(columns, jnp.float32)
    xla_max, xla_matvec = jax.jit(jnp.max), jax.jit(jnp.matmul)

    def in_threads(read: Callable[[np.ndarray], Any], parts: list[np.ndarray]) -> list[Any]:
        return list(threads.map(read, parts))  # NumPy lets go of the interpreter's lock meanwhile

    def contender(turn: int, name: str, read: Callable[[Any], Any], data: list[Any]) -> Contender:
        return Contender(f"read: {name}", (functools.partial(read, item) for item in rotated(data, turn, 4)))

    integer_max = functools.partial(in_threads, lambda part: part.view(np.int64).max())
    dot = functools.partial(in_threads, lambda part: np.dot(part, part))
    return [
        contender(0, "NumPy max", integer_max, parts),
        contender(1, "NumPy dot", dot, parts),
        contender(2, "XLA max", lambda x: xla_max(x).block_until_ready(), buffers),
        contender(3, "XLA matvec", lambda x: xla_matvec(x, ones).block_until_ready(), buffers),
    ]


def measure(workload: Workload, rotate_bytes: int, budget: float, threads: ThreadPoolExecutor) -> report.Result:
    copies = max(2, -(-rotate_bytes // workload.bytes())) if workload.decode else 1
    inputs = make(workload, copies)
    expected = exact(workload, inputs)
    attends = {
        ENGINE: package(workload, "cpu"),
        GATHER: gather_and_einsum,
        REFERENCE: package(workload, "reference"),
    }
    attention, errors = [], {}
    for turn, (name, attend) in enumerate(attends.items()):
        contender, out = attention_contender(name, attend, inputs, turn, len(attends))
        attention.append(contender)
        errors[name] = float(np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected))
    # Prefill is bound by arithmetic, and its few keys fit in caches: reading them says nothing.
    reading = read_contenders(workload.bytes(), copies, threads) if workload.decode else []
    race([*attention, *reading], budget)

    read = min((contender.best for contender in reading), default=None)
    best = {contender.name: contender.best for contender in attention}
    rows = [
        report.Row(
            contender=contender.name,
            best_ms=contender.best * 1e3,
            median_ms=contender.median * 1e3,
            core_ms=statistics.median(contender.core_seconds) * 1e3,
            calls=len(contender.seconds),
            gigabytes_per_s=workload.bytes() / contender.best / 1e9,
            gigaflops=workload.flops() / contender.best / 1e9 if contender.name in attends else None,
            of_read=None if read is None else read / contender.best,
            error=errors.get(contender.name),
        )
        for contender in [*attention, *reading]
    ]
    goals = [report.Goal("speed-up over the reference", best[REFERENCE] / best[ENGINE], REFERENCE_GOAL)]
    if read is not None:
        goals = [
            report.Goal("share of the read bandwidth", read / best[ENGINE], READ_GOAL),
            report.Goal("speed-up over gather + einsum", best[GATHER] / best[ENGINE], GATHER_GOAL),
        ]
    return report.Result(workload, copies, rows, goals)


def main() -> None:
    parser = options.parser("cpu", __doc__)
    options.add_only(parser)
    options.add_seconds(parser, 3.0)
    parser.add_argument("--rotate", type=int, default=1024, help="MiB that decode goes through in turn (default 1024)")
    options.add_out(parser, "cpu.json and cpu.png")
    args = parser.parse_args()
    workloads = options.chosen(parser, CPU, args.only)
    jax.config.update("jax_platforms", "cpu")

    about = report.machine(THREADS)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    with ThreadPoolExecutor(THREADS) as threads:
        for workload in workloads:
            results.append(measure(workload, args.rotate << 20, args.seconds, threads))
            print(f"\n{results[-1]}", flush=True)
    report.write(about, results, args.out, "cpu")


if __name__ == "__main__":
    main()
