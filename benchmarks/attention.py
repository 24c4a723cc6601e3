"""Attention on a GPU: our engines and their peers on one workload, in one trace, beside what the device can do."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_paged_attn as jpa
from benchmarks import peers, steps
from benchmarks.cases import RELATIONS, Operands, Workload, make_ragged, sampled_rows
from benchmarks.device import time_calls, time_series, wall_seconds, warm_up

# Sets of operands in turn hold so many bytes together that none is in the L2 cache (50 MB on an H100) when its turn
# comes.
ROTATE_BYTES = 256 << 20
# Sets of operands in turn: enough for XLA to make a graph of as many calls, and no more than queues of calls need.
FEWEST_COPIES, MOST_COPIES = 6, 64
SAMPLED_ROWS = 16


@dataclass(frozen=True)
class Ceilings:
    """The rates that this device reaches in this process."""

    read: float  # bytes/s
    copy: float  # bytes/s, read and written ones added up
    matmul: float  # bf16 FLOP/s

    def __str__(self) -> str:
        return (
            f"ceilings: read {self.read / 1e12:.2f} TB/s, copy {self.copy / 1e12:.2f} TB/s,"
            f" bf16 products {self.matmul / 1e12:.0f} TFLOP/s"
        )


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
    # Microseconds per call where one function makes a call for each set of operands: its span, and by the host's clock.
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
        # The time of "fused" counts where it runs, be it the fastest or not.
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


class Sample:
    """Some query rows, with their outputs by the reference in float32."""

    def __init__(self, workload: Workload, operands: Operands) -> None:
        self._rows, sequences, seen = sampled_rows(workload, SAMPLED_ROWS)
        x = operands
        scales: dict[str, Any] = {}
        k_pages, v_pages = x.k_pages, x.v_pages
        if workload.values_in_keys:
            v_pages, scales["value_dim"] = None, workload.value_dim
        if workload.quantized:
            scales |= {"k_scale": x.k_scale, "v_scale": None if workload.values_in_keys else x.v_scale}
        else:
            k_pages = k_pages.astype(jnp.float32)
            v_pages = None if v_pages is None else v_pages.astype(jnp.float32)
        # Columns past the longest sequence would only be gathered.
        tables = x.block_tables[sequences, : max(workload.pages)]
        out = jpa.paged_attention_reference(
            x.q[self._rows].astype(jnp.float32), k_pages, v_pages, tables, jnp.asarray(seen), **scales
        )
        self._exact = np.asarray(out)

    def error(self, out: Array) -> float:
        """The error of the sampled rows of an output `[T, N, H]`, relative to their norm."""
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
      graphs: the contenders for which one function that makes a call for each set of operands is timed too.
      most_variants: how many variants of each contender are tried; None is all.
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


_COLUMNS = {"us of a call": -34, "ours": 8, "graph": 8, "peer": 8, "ratio": 6, "floor": 8, "error": 8}
TITLES = " ".join(f"{name:{'<' if width < 0 else '>'}{abs(width)}}" for name, width in _COLUMNS.items())
TITLES += "  ours / fastest peer"


def line(result: Result) -> str:
    """Ours, the fastest peer, and how many times longer that takes; empty where none of ours ran."""
    ours, peer = result.best(ours=True), result.best(ours=False)
    if ours is None:
        return ""
    in_graph = "" if ours.in_graph is None else f"{ours.in_graph:.1f}"
    theirs = f"{peer.microseconds:8.1f} {peer.microseconds / ours.microseconds:6.2f}" if peer else f"{'-':>8} {'-':>6}"
    error = "" if ours.error is None else f"{ours.error:.1e}"
    names = f"{ours.contender} / {peer.contender} {peer.variant}".rstrip() if peer else ours.contender
    numbers = f"{ours.microseconds:8.1f} {in_graph:>8} {theirs} {result.floor:8.1f} {error:>8}"
    return f"{result.workload.name:34} {numbers}  {names}"


def relations(results: list[Result]) -> list[str]:
    """How many times the cost of another workload each has, of those that have a goal."""
    best = {result.workload.name: result.best(ours=True) for result in results}
    times = {name: ours.microseconds for name, ours in best.items() if ours is not None}
    return [
        f"{first} / {second}: {times[first] / times[second]:.3f}, goal <= {goal:.3f}"
        for first, second, goal in RELATIONS
        if first in times and second in times
    ]


def table(results: list[Result]) -> str:
    """A line per workload, then the relations."""
    return "\n".join([TITLES, *filter(None, map(line, results)), *relations(results)])
