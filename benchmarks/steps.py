"""The cost of a serving step: one jitted call from Python, and a step of many layers, as a CUDA graph and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax import Array

from benchmarks import peers
from benchmarks.cases import HOST, LAYERS, STEPS, Operands, Workload, make_ragged
from benchmarks.device import time_series, wall_seconds, warm_up
from jax_paged_attn import _ffi

# More operations than any step has: XLA then makes no graph.
NO_GRAPHS = {"xla_gpu_graph_min_graph_size": 1 << 30}


def one_after_the_other(attend: peers.Attend, copies: Sequence[Operands]) -> list[Array]:
    """A call for each set of operands; no call may start before the one in front of it is done."""
    outs: list[Array] = []
    for x in copies:
        if outs:
            outs[-1], q = jax.lax.optimization_barrier((outs[-1], x.q))
            x = x._replace(q=q)
        outs.append(attend(x))
    return outs


@dataclass(frozen=True)
class HostTimes:
    """The cost of one jitted call on the host. Microseconds, medians."""

    workload: str
    contender: str
    dispatch: float  # until the call returns, the device being far behind
    blocking: float  # until its result is there, the device being idle

    def __str__(self) -> str:
        return f"{self.workload:20} {self.contender:10} {self.dispatch:12.1f} {self.blocking:12.1f}"


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
    dispatch, blocking = (seconds(block) * 1e6 for block in (False, True))
    return HostTimes(workload.name, contender.name, dispatch, blocking)


@dataclass(frozen=True)
class StepTimes:
    """A step of `LAYERS` layers of attention, each with a cache of its own. Microseconds, medians."""

    workload: str
    contender: str
    graphs: bool  # whether XLA may make graphs
    wall: float  # of a step among many, by the host's clock, no profiler running
    span: float | None  # on the device, from the first kernel's start to the last one's end
    kernels: int | None
    host_calls: float | None  # of the handler, per step; None for a peer

    def __str__(self) -> str:
        layer = f"{'-':>10} {'-':>10}" if self.span is None else f"{self.span:10.1f} {self.span / LAYERS:10.2f}"
        calls = "-" if self.host_calls is None else f"{self.host_calls:.1f}"
        kernels = "differ" if self.kernels is None else self.kernels
        return (
            f"{self.workload:20} {self.contender:10} {'on' if self.graphs else 'off':>6} {self.wall:10.1f} {layer}"
            f" {kernels:>8} {calls:>10}"
        )


def measure_step(workload: Workload, contenders: Sequence[peers.Peer], steps: int) -> list[StepTimes]:
    """All contenders, with graphs and without, in one trace."""
    layers = make_ragged(workload, LAYERS)
    module = _ffi.compiled("cuda")
    ready = []
    for contender in contenders:
        attend = next(contender.variants(workload)).attend
        for graphs in (True, False):
            step = jax.jit(
                lambda layers, attend=attend: one_after_the_other(attend, layers),
                compiler_options=None if graphs else NO_GRAPHS,
            )
            calls = [lambda step=step: step(layers)] * 6
            warm_up(calls)
            ready.append((contender, graphs, calls))
    timings = time_series([calls for *_, calls in ready])
    results = []
    for (contender, graphs, calls), timing in zip(ready, timings, strict=True):
        before = module.host_calls()
        for call in calls:
            jax.block_until_ready(call())
        host_calls = (module.host_calls() - before) / len(calls)
        results.append(
            StepTimes(
                workload.name,
                contender.name,
                graphs,
                wall=wall_seconds(calls[0], steps) * 1e6,
                span=None if timing is None else timing.median * 1e6,
                kernels=None if timing is None else len(timing.kernels),
                host_calls=host_calls if contender.ours else None,
            )
        )
    return results


def host_table(contenders: Sequence[peers.Peer]) -> list[dict[str, Any]]:
    """Prints what a call costs the host; returns it for the record."""
    print(f"\n{'us of a jitted call':20} {'':10} {'returns':>12} {'result there':>12}")
    results = []
    for workload in HOST:
        for contender in contenders:
            results.append(measure_host(workload, contender))
            print(results[-1], flush=True)
    return [asdict(result) for result in results]


def step_table(contenders: Sequence[peers.Peer], steps: int = 30) -> list[dict[str, Any]]:
    """Prints what steps cost; returns it for the record."""
    print(
        f"\n{f'us of {LAYERS} layers':20} {'':10} {'graphs':>6} {'wall':>10} {'span':>10} {'per layer':>10}"
        f" {'kernels':>8} {'host calls':>10}"
    )
    results = []
    for workload in STEPS:
        for times in measure_step(workload, contenders, steps):
            results.append(times)
            print(times, flush=True)
    return [asdict(result) for result in results]
