"""The GPU engines beside every installed peer, and the write beside a plain copy.

`python -m benchmarks.gpu` from the repository's root prints tables and writes build/bench/gpu.json and gpu.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_paged_attn as jpa
from benchmarks import peers, report
from benchmarks.cases import DTYPES, GPU, RaggedInputs, Workload, make_ragged, sampled_rows
from benchmarks.device import Timing, time_calls

# What caches in turn hold together, so that none is in the L2 cache (50 MB on an H100) when its turn comes.
ROTATE_BYTES = 256 << 20
SAMPLED_ROWS = 16


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches in this process."""

    read: float  # bytes/s
    copy: float  # bytes/s, read and written ones added up
    matmul: float  # bf16 FLOP/s


@dataclass(frozen=True)
class Measured:
    """One contender in one workload."""

    contender: str
    variant: str
    ours: bool
    microseconds: float  # median span of a call
    busy: float  # of that, without gaps between kernels
    kernels: int
    error: float | None  # relative, of sampled rows against the reference in float32


@dataclass
class Result:
    workload: Workload
    floor: float  # microseconds that the bytes and the products take at the ceilings
    measured: list[Measured] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)

    def best(self, ours: bool) -> Measured | None:
        return min((m for m in self.measured if m.ours == ours), key=lambda m: m.microseconds, default=None)

    def __str__(self) -> str:
        lines = [f"{self.workload.name}: at the ceilings {self.floor:.1f} us"]
        peer = self.best(ours=False)
        for m in sorted(self.measured, key=lambda m: m.microseconds):
            ratio = f"{m.microseconds / peer.microseconds:6.2f}x" if peer and m.ours else f"{'':7}"
            error = "" if m.error is None else f"{m.error:8.1e}"
            lines.append(
                f"  {m.contender:12} {m.microseconds:10.1f} us {ratio} {self.floor / m.microseconds:6.1%} of ceiling"
                f" {self.workload.flops() / m.microseconds / 1e6:7.1f} TFLOP/s {m.kernels:4} kernels {error:>8}"
                f"  {m.variant}"
            )
        lines += [f"  {name:12} cannot: {reason}" for name, reason in self.unsupported.items()]
        return "\n".join(lines)


def measure_ceilings() -> Ceilings:
    values = jax.random.randint(jax.random.key(0), (1 << 28,), 0, 100, jnp.int32)
    factor = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    read, copy, product = jax.jit(jnp.max), jax.jit(lambda x: x + 1), jax.jit(jnp.matmul)

    def best(call: Callable[[], Any]) -> float:
        return min(time_calls([call] * 5).spans)

    return Ceilings(
        read=values.nbytes / best(lambda: read(values)),
        copy=2 * values.nbytes / best(lambda: copy(values)),
        matmul=2 * 8192**3 / best(lambda: product(factor, factor)),
    )


# ---- attention -------------------------------------------------------------------------------------------------------


class Sample:
    """Some query rows, with their outputs by the reference in float32."""

    def __init__(self, workload: Workload, inputs: RaggedInputs) -> None:
        self._rows, sequences, seen = sampled_rows(workload, SAMPLED_ROWS)
        q = inputs.q[self._rows].astype(jnp.float32)
        k_pages, v_pages = (pages.astype(jnp.float32) for pages in inputs.pools[0])
        out = jpa.paged_attention_reference(q, k_pages, v_pages, inputs.block_tables[sequences], jnp.asarray(seen))
        self._exact = np.asarray(out)

    def error(self, out: Array) -> float:
        """Of the sampled rows of an output `[T, N, H]`, relative to their norm."""
        difference = np.asarray(out[self._rows], np.float32) - self._exact
        return float(np.linalg.norm(difference) / np.linalg.norm(self._exact))


def measure_variant(
    variant: peers.Variant, inputs: RaggedInputs, pools: Sequence[tuple[Array, Array]], calls: int
) -> tuple[Timing, Array]:
    compiled = jax.jit(variant.attend)

    def call(pool: tuple[Array, Array]) -> Array:
        return compiled(inputs.q, *pool, inputs.block_tables, inputs.kv_lens, inputs.cu_q_lens)

    turns = list(itertools.islice(itertools.cycle(pools), max(calls, len(pools))))
    timing = time_calls([lambda pool=pool: call(pool) for pool in turns])
    return timing, call(pools[0])


def measure_attention(workload: Workload, contenders: Sequence[peers.Peer], ceilings: Ceilings, calls: int) -> Result:
    floor = max(workload.bytes() / ceilings.read, workload.flops() / ceilings.matmul)
    result = Result(workload, floor * 1e6)
    inputs = make_ragged(workload, max(1, -(-ROTATE_BYTES // workload.bytes())))
    sample = Sample(workload, inputs)
    for contender in contenders:
        best: Measured | None = None
        try:
            for variant in contender.variants(workload):
                pools = inputs.pools
                if variant.heads_first:
                    pools = [(jnp.moveaxis(k, 2, 0), jnp.moveaxis(v, 2, 0)) for k, v in inputs.pools]
                timing, out = measure_variant(variant, inputs, pools, calls)
                measured = Measured(
                    contender=contender.name,
                    variant=variant.label,
                    ours=contender.ours,
                    microseconds=timing.median * 1e6,
                    busy=float(np.median(timing.busy)) * 1e6,
                    kernels=len(timing.kernels),
                    error=sample.error(out),
                )
                if best is None or measured.microseconds < best.microseconds:
                    best = measured
        except Exception as error:
            # Whatever a peer fails with is a result: it cannot run this. An engine of ours must not fail.
            if contender.ours:
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            result.unsupported[contender.name] = reason[:160]
        if best is not None:
            result.measured.append(best)
            result.unsupported.pop(contender.name, None)
    return result


# ---- write -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WriteMeasured:
    tokens: int
    dtype: str
    page_dtype: str
    microseconds: float
    kernels: int
    gigabytes_per_s: float
    copy_microseconds: float  # what XLA takes to copy as many bytes


def measure_write(tokens: int, page_dtype: str, calls: int) -> WriteMeasured:
    """bf16 tokens of a Llama 3 8B layer into scattered pages of 16, in place, beside a plain copy."""
    kv_heads, head_dim, page_size, num_pages = 8, 128, 16, 4096
    dtypes = {**DTYPES, "e4m3": jnp.float8_e4m3fn, "int8": jnp.int8}
    rng = np.random.default_rng(0)
    per_call = 2 * tokens * kv_heads * head_dim * (2 + jnp.dtype(dtypes[page_dtype]).itemsize)
    copies = min(max(2, -(-ROTATE_BYTES // per_call)), calls)
    keys = jax.random.split(jax.random.key(0), 2 * copies)
    new = [jax.random.normal(key, (tokens, kv_heads, head_dim), jnp.bfloat16) for key in keys]
    pages = rng.permutation(num_pages)[: -(-tokens // page_size)]
    slots = jnp.asarray((pages[:, None] * page_size + np.arange(page_size)).reshape(-1)[:tokens].astype(np.int32))
    # An array as a cache would hold it; a constant would be broadcast by a kernel of its own in each call.
    scale = None if page_dtype == "bf16" else jnp.full(kv_heads, 0.37, jnp.float32)

    def write(k_pages: Array, v_pages: Array, k: Array, v: Array, scale: Array | None) -> tuple[Array, Array]:
        return jpa.write_kv_pages(k_pages, v_pages, k, v, slots, k_scale=scale, v_scale=scale)

    compiled = jax.jit(write, donate_argnums=(0, 1))
    shape = (num_pages, page_size, kv_heads, head_dim)
    pools = [tuple(jnp.zeros(shape, dtypes[page_dtype]) for _ in "kv") for _ in range(copies)]

    def call(turn: int) -> tuple[Array, ...]:
        pools[turn] = compiled(*pools[turn], *new[2 * turn : 2 * turn + 2], scale)
        return pools[turn]

    turns = itertools.islice(itertools.cycle(range(copies)), calls)
    timing = time_calls([lambda turn=turn: call(turn) for turn in turns])
    plain = jax.jit(lambda x: x + 1)
    sources = [jnp.arange(per_call // 8, dtype=jnp.int32) for _ in range(copies)]  # half of the bytes are written
    turns = itertools.islice(itertools.cycle(sources), calls)
    copy = time_calls([lambda source=source: plain(source) for source in turns])
    return WriteMeasured(
        tokens=tokens,
        dtype="bf16",
        page_dtype=page_dtype,
        microseconds=timing.median * 1e6,
        kernels=len(timing.kernels),
        gigabytes_per_s=per_call / timing.median / 1e9,
        copy_microseconds=copy.median * 1e6,
    )


# ---- report ----------------------------------------------------------------------------------------------------------


def ratios(results: list[Result]) -> str:
    """A line a workload: ours over the fastest peer, below 1 where ours is faster."""
    lines = [f"{'ours / fastest peer':36} {'ours us':>10} {'peer us':>10} {'ratio':>6}"]
    for result in results:
        ours, peer = result.best(ours=True), result.best(ours=False)
        if ours and peer:
            lines.append(
                f"{result.workload.name:36} {ours.microseconds:10.1f} {peer.microseconds:10.1f}"
                f" {ours.microseconds / peer.microseconds:6.2f}  {ours.contender} / {peer.contender}"
            )
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """A group of bars a workload, a bar a contender: its share of the ceiling."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    names = list(dict.fromkeys(m.contender for result in results for m in result.measured))
    places = np.arange(len(results))
    figure, axes = pyplot.subplots(figsize=(14, 5), layout="constrained")
    for i, name in enumerate(names):
        shares = [
            next((result.floor / m.microseconds for m in result.measured if m.contender == name), 0.0)
            for result in results
        ]
        axes.bar(places + (i - (len(names) - 1) / 2) * 0.8 / len(names), shares, 0.8 / len(names), label=name)
    axes.set_ylabel("share of what bytes or products allow")
    axes.set_xticks(places, [result.workload.name.replace(" ", "\n", 2) for result in results], fontsize=7)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measures the GPU engines.")
    parser.add_argument("--only", default="", help="run the workloads whose name contains this; 'write' is one of them")
    parser.add_argument("--contenders", default="", help="names, separated by commas; default: all")
    parser.add_argument("--calls", type=int, default=12, help="calls timed of each contender, at least")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of gpu.json and gpu.png")
    args = parser.parse_args()
    contenders = [*peers.engines(), *peers.installed()]
    if args.contenders:
        contenders = [c for c in contenders if c.name in args.contenders.split(",")]

    about = {**report.machine(len(os.sched_getaffinity(0))), "device": jax.devices()[0].device_kind}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    ceilings = measure_ceilings()
    print(
        f"ceilings: read {ceilings.read / 1e12:.2f} TB/s, copy {ceilings.copy / 1e12:.2f} TB/s,"
        f" bf16 products {ceilings.matmul / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    writes, results = [], []
    if args.only in "write":
        for tokens, page_dtype in ((64, "bf16"), (64, "e4m3"), (16384, "bf16"), (16384, "e4m3"), (16384, "int8")):
            writes.append(w := measure_write(tokens, page_dtype, args.calls))
            print(
                f"write {w.tokens:6} tokens bf16 -> {w.page_dtype}: {w.microseconds:8.2f} us, {w.kernels} kernels,"
                f" {w.gigabytes_per_s * 1e9 / ceilings.copy:6.1%} of the copy ceiling; a copy of as many bytes"
                f" {w.copy_microseconds:.2f} us: {w.copy_microseconds / w.microseconds:.1%}",
                flush=True,
            )
    for workload in GPU:
        if args.only in workload.name:
            results.append(measure_attention(workload, contenders, ceilings, args.calls))
            print(f"\n{results[-1]}", flush=True)
    print(f"\n{ratios(results)}")

    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": about,
        "ceilings": asdict(ceilings),
        "write": [asdict(w) for w in writes],
        "attention": [asdict(result) for result in results],
    }
    (args.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    if not results:
        return
    try:
        plot(results, args.out / "gpu.png")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("\nno plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
