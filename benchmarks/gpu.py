"""The GPU engines beside every installed peer, the write beside a plain copy, and how the cost of decode grows.

`python -m benchmarks.gpu` from the repository's root prints tables and writes build/bench/gpu.json and gpu.png;
with `--only sweep` sweep.json and sweep.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_paged_attn as jpa
from benchmarks import peers, report
from benchmarks.cases import (
    DTYPES,
    GPU,
    GPU_DECODE,
    RELATIONS,
    SWEEPS,
    Operands,
    Workload,
    make_ragged,
    sampled_rows,
)
from benchmarks.device import time_calls, time_series, wall_seconds, warm_up

# What operands in turn hold together, so that none is in the L2 cache (50 MB on an H100) when its turn comes.
ROTATE_BYTES = 256 << 20
# Sets of operands in turn: enough for XLA to make a graph of as many calls, and no more than queues of calls need.
FEWEST_COPIES, MOST_COPIES = 6, 64
SAMPLED_ROWS = 16
# `--short`: the engine and the peers that the table of decode is about, each peer in its likeliest settings.
SHORT_CONTENDERS = ("fused", "FA3", "cuDNN")
SHORT_VARIANTS = 3


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
    # Microseconds a call where one function makes a call for each set of operands: its span, and by the host's clock.
    in_graph: float | None = None
    in_graph_wall: float | None = None


@dataclass
class Result:
    workload: Workload
    floor: float  # microseconds that the bytes and the products take at the ceilings
    copies: int  # sets of operands, taken in turn
    measured: list[Measured] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)

    def best(self, ours: bool) -> Measured | None:
        measured = [m for m in self.measured if m.ours == ours]
        # Where "fused" runs it is what counts, be it the fastest or not.
        fused = [m for m in measured if m.contender == "fused"]
        return min(fused or measured, key=lambda m: m.microseconds, default=None)

    def __str__(self) -> str:
        lines = [f"{self.workload.name}: at the ceilings {self.floor:.1f} us"]
        peer = self.best(ours=False)
        for m in sorted(self.measured, key=lambda m: m.microseconds):
            ratio = f"{m.microseconds / peer.microseconds:6.2f}x" if peer and m.ours else f"{'':7}"
            error = "" if m.error is None else f"{m.error:8.1e}"
            in_graph = f"in a graph {m.in_graph:.1f}, by wall {m.in_graph_wall:.1f}" if m.in_graph else ""
            lines.append(
                f"  {m.contender:12} {m.microseconds:10.1f} us {ratio} {self.floor / m.microseconds:6.1%} of ceiling"
                f" {self.workload.flops() / m.microseconds / 1e6:7.1f} TFLOP/s {m.kernels:4} kernels {error:>8}"
                f" {in_graph:>34}  {m.variant}"
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

    def __init__(self, workload: Workload, operands: Operands) -> None:
        self._rows, sequences, seen = sampled_rows(workload, SAMPLED_ROWS)
        x = operands
        scales: dict[str, Any] = {}
        k_pages, v_pages = x.k_pages, x.v_pages
        if workload.quantized:
            scales = {"k_scale": x.k_scale, "v_scale": x.v_scale}
        else:
            k_pages, v_pages = k_pages.astype(jnp.float32), v_pages.astype(jnp.float32)
        # Columns past the longest sequence would only be gathered.
        tables = x.block_tables[sequences, : max(workload.pages)]
        out = jpa.paged_attention_reference(
            x.q[self._rows].astype(jnp.float32), k_pages, v_pages, tables, jnp.asarray(seen), **scales
        )
        self._exact = np.asarray(out)

    def error(self, out: Array) -> float:
        """Of the sampled rows of an output `[T, N, H]`, relative to their norm."""
        difference = np.asarray(out[self._rows], np.float32) - self._exact
        return float(np.linalg.norm(difference) / np.linalg.norm(self._exact))


@dataclass(frozen=True)
class _Ready:
    """A variant that compiled and ran: what is left is to time it."""

    contender: peers.Peer
    variant: peers.Variant
    calls: list[Callable[[], Any]]  # one after the other on the next operands
    graph: list[Callable[[], Any]]  # each a call for every set of operands; empty where it is not asked for
    error: float


def prepare(
    contender: peers.Peer,
    variant: peers.Variant,
    copies: Sequence[Operands],
    sample: Sample,
    calls: int,
    graph: bool,
) -> _Ready:
    if variant.heads_first:
        copies = [
            x._replace(k_pages=jnp.moveaxis(x.k_pages, 2, 0), v_pages=jnp.moveaxis(x.v_pages, 2, 0)) for x in copies
        ]
    compiled = jax.jit(variant.attend)
    turns = itertools.islice(itertools.cycle(copies), max(calls, len(copies)))
    series = [lambda x=x: compiled(x) for x in turns]
    warm_up(series)
    graphs: list[Callable[[], Any]] = []
    if graph:
        together = jax.jit(lambda copies: one_after_the_other(variant.attend, copies))
        graphs = [lambda: together(tuple(copies))] * 4
        warm_up(graphs)
    return _Ready(contender, variant, series, graphs, sample.error(compiled(copies[0])))


def one_after_the_other(attend: Callable[[Operands], Array], copies: Sequence[Operands]) -> list[Array]:
    """A call for each set of operands; no call may start before the one in front of it is done."""
    outs: list[Array] = []
    for x in copies:
        if outs:
            outs[-1], q = jax.lax.optimization_barrier((outs[-1], x.q))
            x = x._replace(q=q)
        outs.append(attend(x))
    return outs


def measure_attention(
    workload: Workload,
    contenders: Sequence[peers.Peer],
    ceilings: Ceilings,
    calls: int,
    *,
    graphs: Literal["none", "ours", "all"] = "all",
    most_variants: int | None = None,
) -> Result:
    """Times all contenders of a workload in one trace; of a contender's variants the fastest counts.

    Args:
      calls: how many calls of each variant are timed, at least.
      graphs: of whom one function that makes a call for each set of operands is timed too.
      most_variants: of each contender; None is all.
    """
    floor = max(workload.bytes() / ceilings.read, workload.flops() / ceilings.matmul)
    num_copies = min(max(FEWEST_COPIES, -(-ROTATE_BYTES // workload.bytes())), MOST_COPIES)
    result = Result(workload, floor * 1e6, num_copies)
    copies = make_ragged(workload, num_copies)
    sample = Sample(workload, copies[0])
    ready: list[_Ready] = []
    for contender in contenders:
        try:
            for variant in itertools.islice(contender.variants(workload), most_variants):
                with_graph = graphs == "all" or (graphs == "ours" and contender.ours)
                ready.append(prepare(contender, variant, copies, sample, calls, with_graph))
        except Exception as error:
            # Whatever a peer fails with is a result: it cannot run this. An engine of ours must not fail.
            if contender.ours and not isinstance(error, peers.UnsupportedError):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            result.unsupported[contender.name] = reason[:160]

    series = [calls for one in ready for calls in (one.calls, one.graph) if calls]
    timings = iter(time_series(series) if series else [])
    best: dict[str, Measured] = {}
    for one in ready:
        timing, in_graph = next(timings), next(timings) if one.graph else None
        name = one.contender.name
        if timing is None:
            result.unsupported[name] = f"{one.variant.label}: its calls launch different numbers of kernels".lstrip(
                ": "
            )
            continue
        measured = Measured(
            contender=name,
            variant=one.variant.label,
            ours=one.contender.ours,
            microseconds=timing.median * 1e6,
            busy=statistics.median(timing.busy) * 1e6,
            kernels=len(timing.kernels),
            error=one.error,
            in_graph=None if in_graph is None else in_graph.median / num_copies * 1e6,
            in_graph_wall=wall_seconds(one.graph[0]) / num_copies * 1e6 if one.graph else None,
        )
        if name not in best or measured.microseconds < best[name].microseconds:
            best[name] = measured
    result.measured += best.values()
    for name in best:
        result.unsupported.pop(name, None)
    return result


# ---- how the cost grows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostTimes:
    """What one jitted call costs the host. Microseconds, medians."""

    dispatch: float  # until the call returns, the device being far behind
    blocking: float  # until its result is there, the device being idle


def measure_host(workload: Workload, contender: peers.Peer, calls: int = 300) -> HostTimes:
    (x,) = make_ragged(workload, copies=1)
    compiled = jax.jit(next(contender.variants(workload)).attend)

    def seconds(block: bool) -> float:
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            out = compiled(x)
            if block:
                out.block_until_ready()
            times.append(time.perf_counter() - start)
        jax.block_until_ready(out)
        return statistics.median(times)

    seconds(block=True)
    return HostTimes(dispatch=seconds(block=False) * 1e6, blocking=seconds(block=True) * 1e6)


def sweep(contenders: Sequence[peers.Peer], ceilings: Ceilings, calls: int) -> dict[str, dict[int, Result]]:
    """Decode along each axis of `SWEEPS`."""
    results: dict[str, dict[int, Result]] = {}
    for axis, workloads in SWEEPS.items():
        results[axis] = {}
        print(f"\n{axis:>8} {'floor us':>10} " + " ".join(f"{c.name:>12}" for c in contenders))
        for value, workload in workloads.items():
            result = measure_attention(workload, contenders, ceilings, calls, graphs="none")
            results[axis][value] = result
            times = {m.contender: f"{m.microseconds:12.1f}" for m in result.measured}
            cells = " ".join(times.get(c.name, f"{'cannot':>12}") for c in contenders)
            print(f"{value:8} {result.floor:10.1f} {cells}", flush=True)
    return results


def plot_sweep(results: dict[str, dict[int, Result]], path: Path) -> None:
    """A panel an axis: microseconds of each contender, and the floor."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, panels = pyplot.subplots(1, len(results), figsize=(5 * len(results), 4.5), layout="constrained")
    for panel, (axis, of_values) in zip(np.atleast_1d(panels), results.items(), strict=True):
        times: dict[str, list[tuple[int, float]]] = {}
        for value, result in of_values.items():
            times.setdefault("floor", []).append((value, result.floor))
            for m in result.measured:
                times.setdefault(m.contender, []).append((value, m.microseconds))
        for name, points in times.items():
            line = "--" if name == "floor" else "-"
            panel.plot(*zip(*points, strict=True), line, marker="" if name == "floor" else "o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(axis)
        panel.set_ylabel("us a call")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


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


def table(results: list[Result]) -> str:
    """A line a workload: ours, the fastest peer, and how many times longer that takes; then what must stay close."""
    titles = f"{'us of a call':34} {'ours':>8} {'graph':>8} {'peer':>8} {'ratio':>6} {'floor':>8} {'error':>8}"
    lines = [f"{titles}  ours / fastest peer"]
    times: dict[str, float] = {}
    for result in results:
        ours, peer = result.best(ours=True), result.best(ours=False)
        if ours is None:
            continue
        times[result.workload.name] = ours.microseconds
        in_graph = "" if ours.in_graph is None else f"{ours.in_graph:.1f}"
        theirs = (
            f"{peer.microseconds:8.1f} {peer.microseconds / ours.microseconds:6.2f}" if peer else f"{'-':>8} {'-':>6}"
        )
        error = "" if ours.error is None else f"{ours.error:.1e}"
        names = f"{ours.contender} / {peer.contender} {peer.variant}".rstrip() if peer else ours.contender
        lines.append(
            f"{result.workload.name:34} {ours.microseconds:8.1f} {in_graph:>8} {theirs} {result.floor:8.1f} {error:>8}"
            f"  {names}"
        )
    for first, second, goal in RELATIONS:
        if first in times and second in times:
            lines.append(f"{first} / {second}: {times[first] / times[second]:.3f}, goal <= {goal:.3f}")
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


def save_plot(draw: Callable[[], None]) -> None:
    """Draws unless matplotlib is not installed."""
    try:
        draw()
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("\nno plot: matplotlib is not installed")


def run_sweep(
    about: dict[str, Any], ceilings: Ceilings, contenders: Sequence[peers.Peer], calls: int, out: Path
) -> None:
    one = Workload("decode 1x1k", "bf16", ((1, 1024),))
    host = {c.name: asdict(measure_host(one, c)) for c in contenders if c.ours}
    for name, times in host.items():
        print(f"one jitted call of {name} from Python, {one.name}: {times}")
    results = sweep(contenders, ceilings, calls)
    record = {
        "machine": about,
        "ceilings": asdict(ceilings),
        "host": host,
        "sweep": {axis: {n: asdict(result) for n, result in of.items()} for axis, of in results.items()},
    }
    (out / "sweep.json").write_text(json.dumps(record, indent=1) + "\n")
    save_plot(lambda: plot_sweep(results, out / "sweep.png"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measures the GPU engines.")
    parser.add_argument(
        "--only", default="", help="run the workloads whose name contains this; 'write' and 'sweep' are two of them"
    )
    parser.add_argument("--contenders", default="", help="names, separated by commas; default: all, of a sweep: fused")
    parser.add_argument("--short", action="store_true", help="decode only, fused beside FA3 and cuDNN")
    parser.add_argument("--calls", type=int, default=12, help="calls timed of each contender, at least")
    parser.add_argument("--label", default="", help="kept in the record: what is special about this run")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of gpu.json and gpu.png")
    args = parser.parse_args()
    contenders = [*peers.engines(), *peers.installed()]
    wanted = args.contenders.split(",") if args.contenders else ()
    if not wanted and args.short:
        wanted = SHORT_CONTENDERS
    if not wanted and args.only == "sweep":
        wanted = ("fused",)
    if wanted:
        contenders = [c for c in contenders if c.name in wanted]
    if not contenders:
        parser.error(f"--contenders: none of {', '.join(wanted)} is installed")
    args.out.mkdir(parents=True, exist_ok=True)

    about = {**report.machine(len(os.sched_getaffinity(0))), "device": jax.devices()[0].device_kind}
    about |= {"label": args.label} if args.label else {}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    ceilings = measure_ceilings()
    print(
        f"ceilings: read {ceilings.read / 1e12:.2f} TB/s, copy {ceilings.copy / 1e12:.2f} TB/s,"
        f" bf16 products {ceilings.matmul / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    if args.only == "sweep":
        run_sweep(about, ceilings, contenders, args.calls, args.out)
        return
    writes, results = [], []
    if args.only in "write" and not args.short:
        for tokens, page_dtype in ((64, "bf16"), (64, "e4m3"), (16384, "bf16"), (16384, "e4m3"), (16384, "int8")):
            writes.append(w := measure_write(tokens, page_dtype, args.calls))
            print(
                f"write {w.tokens:6} tokens bf16 -> {w.page_dtype}: {w.microseconds:8.2f} us, {w.kernels} kernels,"
                f" {w.gigabytes_per_s * 1e9 / ceilings.copy:6.1%} of the copy ceiling; a copy of as many bytes"
                f" {w.copy_microseconds:.2f} us: {w.copy_microseconds / w.microseconds:.1%}",
                flush=True,
            )
    for workload in GPU_DECODE if args.short else GPU:
        if args.only in workload.name:
            if args.short:
                few: dict[str, Any] = {"graphs": "ours", "most_variants": SHORT_VARIANTS}
                results.append(measure_attention(workload, contenders, ceilings, args.calls, **few))
            else:
                results.append(measure_attention(workload, contenders, ceilings, args.calls))
                print(f"\n{results[-1]}", flush=True)
    print(f"\n{table(results)}")

    record = {
        "machine": about,
        "ceilings": asdict(ceilings),
        "write": [asdict(w) for w in writes],
        "attention": [asdict(result) for result in results],
    }
    (args.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    if results:
        save_plot(lambda: plot(results, args.out / "gpu.png"))


if __name__ == "__main__":
    main()
