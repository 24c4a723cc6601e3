"""The GPU engines beside every installed peer, the write beside a plain copy, and how the cost of decode grows.

`python -m benchmarks.gpu` from the repository's root prints tables and writes build/bench/gpu.json and gpu.png;
with `--only sweep` sweep.json and sweep.png, with `--only host` or `--only layers` host.json or layers.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_paged_attn as jpa
from benchmarks import peers, report, steps
from benchmarks.cases import (
    DTYPES,
    GPU,
    GPU_DECODE,
    RELATIONS,
    SWEEPS,
    Operands,
    Workload,
    make_in_pools,
    make_pools,
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
# Of what is run by name, unless --contenders names others.
FEW_CONTENDERS = {"sweep": ("fused", "FA3"), "host": ("fused", "FA3"), "layers": ("fused", "cublaslt", "FA3")}
SWEEP_VARIANTS = 2
# Contenders that cannot take part in a sweep, whose workloads share pools.
POOLS_OF_THEIR_OWN = ("cuDNN", "Pallas")


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
        together = jax.jit(lambda copies: steps.one_after_the_other(variant.attend, copies))
        graphs = [lambda: together(tuple(copies))] * 4
        warm_up(graphs)
    return _Ready(contender, variant, series, graphs, sample.error(compiled(copies[0])))


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


def sweep_axis(
    workloads: dict[int, Workload], contenders: Sequence[peers.Peer], ceilings: Ceilings, calls: int
) -> dict[int, Result]:
    """The workloads of an axis, in one trace and in one pair of pools: making pools for each would take minutes.

    Errors are not told here: `measure_attention` tells them on much the same workloads.
    """
    first = next(iter(workloads.values()))
    # Room for two sets of the largest workload, of which none is in the L2 cache when its turn comes.
    pools = make_pools(first, 2 * max(sum(w.pages) for w in workloads.values()))
    results: dict[int, Result] = {}
    ready: list[tuple[int, str, bool, str, list[Callable[[], Any]]]] = []
    for value, w in workloads.items():
        floor = max(w.bytes() / ceilings.read, w.flops() / ceilings.matmul)
        copies = make_in_pools(w, pools, min(max(2, -(-ROTATE_BYTES // w.bytes())), MOST_COPIES))
        results[value] = Result(w, floor * 1e6, len(copies))
        for contender in contenders:
            try:
                for variant in itertools.islice(contender.variants(w), SWEEP_VARIANTS):
                    compiled = jax.jit(variant.attend)
                    turns = itertools.islice(itertools.cycle(copies), max(calls, len(copies)))
                    series = [lambda x=x, compiled=compiled: compiled(x) for x in turns]
                    warm_up(series)
                    ready.append((value, contender.name, contender.ours, variant.label, series))
            except Exception as error:
                if contender.ours and not isinstance(error, peers.UnsupportedError):
                    raise
                results[value].unsupported[contender.name] = str(error).strip().partition("\n")[0][:160]
    timings = time_series([series for *_, series in ready])
    for (value, name, ours, label, _), timing in zip(ready, timings, strict=True):
        if timing is None:
            results[value].unsupported[name] = f"{label}: its calls launch different numbers of kernels".lstrip(": ")
            continue
        busy, kernels = statistics.median(timing.busy) * 1e6, len(timing.kernels)
        results[value].measured.append(Measured(name, label, ours, timing.median * 1e6, busy, kernels, error=None))
    return results


def run_sweep(
    about: dict[str, Any], ceilings: Ceilings, contenders: Sequence[peers.Peer], calls: int, out: Path
) -> None:
    """Decode along each axis of `SWEEPS`. The record is written after each of them."""
    record: dict[str, Any] = {"machine": about, "ceilings": asdict(ceilings), "sweep": {}}
    for axis, workloads in SWEEPS.items():
        print(f"\n{axis:>8} {'floor us':>10} " + " ".join(f"{c.name:>12}" for c in contenders))
        results = sweep_axis(workloads, contenders, ceilings, calls)
        for value, result in results.items():
            times: dict[str, float] = {}
            for m in result.measured:
                times[m.contender] = min(m.microseconds, times.get(m.contender, m.microseconds))
            cells = " ".join(f"{times[c.name]:12.1f}" if c.name in times else f"{'cannot':>12}" for c in contenders)
            print(f"{value:8} {result.floor:10.1f} {cells}", flush=True)
        record["sweep"][axis] = {str(value): asdict(result) for value, result in results.items()}
        (out / "sweep.json").write_text(json.dumps(record, indent=1) + "\n")
    save_plot(lambda: plot_sweep(record["sweep"], out / "sweep.png"))


def plot_sweep(axes: dict[str, dict[str, Any]], path: Path) -> None:
    """From a record: a panel an axis, microseconds of each contender, and the floor."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, len(axes), figsize=(5 * len(axes), 4.5), layout="constrained")
    for panel, (axis, results) in zip(np.atleast_1d(panels), axes.items(), strict=True):
        times: dict[str, dict[int, float]] = {}
        for value, result in results.items():
            times.setdefault("floor", {})[int(value)] = result["floor"]
            for m in result["measured"]:
                points = times.setdefault(m["contender"], {})
                points[int(value)] = min(m["microseconds"], points.get(int(value), m["microseconds"]))
        for name, points in times.items():
            line = "--" if name == "floor" else "-"
            panel.plot(*zip(*points.items(), strict=True), line, marker="" if name == "floor" else "o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(
            {"batch": "sequences", "length": "tokens of each sequence", "group": "query heads a group"}[axis]
        )
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


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """From a record: a group of bars a workload, a bar a contender, its share of the ceiling."""
    pyplot = _pyplot()
    names = list(dict.fromkeys(m["contender"] for result in results for m in result["measured"]))
    places = np.arange(len(results))
    figure, axes = pyplot.subplots(figsize=(14, 5), layout="constrained")
    for i, name in enumerate(names):
        shares = [
            next((r["floor"] / m["microseconds"] for m in r["measured"] if m["contender"] == name), 0.0)
            for r in results
        ]
        axes.bar(places + (i - (len(names) - 1) / 2) * 0.8 / len(names), shares, 0.8 / len(names), label=name)
    axes.set_ylabel("share of what bytes or products allow")
    axes.set_xticks(places, [r["workload"]["name"].replace(" ", "\n", 2) for r in results], fontsize=7)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    return pyplot


def plot_record(path: Path) -> None:
    """Draws an earlier run's record, beside it."""
    record = json.loads(path.read_text())
    if "sweep" in record:
        plot_sweep(record["sweep"], path.with_suffix(".png"))
    else:
        plot(record["attention"], path.with_suffix(".png"))


def save_plot(draw: Callable[[], None]) -> None:
    """Draws unless matplotlib is not installed."""
    try:
        draw()
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("\nno plot: matplotlib is not installed; --plot draws one from the JSON")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measures the GPU engines.")
    parser.add_argument(
        "--only",
        default="",
        help="run the workloads whose name contains this; 'write', 'sweep', 'host' and 'layers' are some of them",
    )
    parser.add_argument("--contenders", default="", help="names, separated by commas; default: all, or a few")
    parser.add_argument("--short", action="store_true", help="decode only, fused beside FA3 and cuDNN")
    parser.add_argument("--calls", type=int, default=12, help="calls timed of each contender, at least")
    parser.add_argument("--label", default="", help="kept in the record: what is special about this run")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder of gpu.json and gpu.png")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the plot of an earlier run's record")
    args = parser.parse_args()
    if args.plot:
        plot_record(args.plot)
        return
    contenders = [*peers.engines(), *peers.installed()]
    wanted = args.contenders.split(",") if args.contenders else ()
    if not wanted and args.short:
        wanted = SHORT_CONTENDERS
    if not wanted:
        wanted = FEW_CONTENDERS.get(args.only, ())
    if wanted:
        contenders = [c for c in contenders if c.name in wanted]
    if args.only == "sweep":
        contenders = [c for c in contenders if c.name not in POOLS_OF_THEIR_OWN]
    if not contenders:
        parser.error(f"--contenders: none of {', '.join(wanted)} is installed")
    args.out.mkdir(parents=True, exist_ok=True)

    about = {**report.machine(len(os.sched_getaffinity(0))), "device": jax.devices()[0].device_kind}
    about |= {"label": args.label} if args.label else {}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if args.only in ("host", "layers"):
        table_of = {"host": steps.host_table, "layers": steps.step_table}[args.only]
        record = {"machine": about, args.only: table_of(contenders)}
        (args.out / f"{args.only}.json").write_text(json.dumps(record, indent=1) + "\n")
        return
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
        save_plot(lambda: plot(record["attention"], args.out / "gpu.png"))


if __name__ == "__main__":
    main()
