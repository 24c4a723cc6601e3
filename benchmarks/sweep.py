"""How the cost of decode grows with the batch, the length of sequences and the group."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from benchmarks import peers, plots
from benchmarks.attention import MOST_COPIES, ROTATE_BYTES, Ceilings, Measured, Result
from benchmarks.cases import SWEEPS, Workload, make_in_pools, make_pools
from benchmarks.device import time_series, warm_up

VARIANTS = 2
# Contenders that cannot take part, since the workloads of an axis share pools.
POOLS_OF_THEIR_OWN = ("cuDNN", "Pallas")


def sweep_axis(
    workloads: dict[int, Workload], contenders: Sequence[peers.Peer], ceilings: Ceilings, calls: int
) -> dict[int, Result]:
    """The workloads of an axis, in one trace and in one pair of pools: making pools for each would take minutes.

    Errors are not told here: `measure_attention` tells them on much the same workloads.
    """
    first = next(iter(workloads.values()))
    # Two sets of the largest workload fit, so that none is in the L2 cache when its turn comes.
    pools = make_pools(first, 2 * max(sum(w.pages) for w in workloads.values()))
    results: dict[int, Result] = {}
    ready: list[tuple[int, str, bool, str, list[Callable[[], Any]]]] = []
    for value, w in workloads.items():
        floor = max(w.bytes() / ceilings.read, w.flops() / ceilings.matmul)
        copies = make_in_pools(w, pools, min(max(2, -(-ROTATE_BYTES // w.bytes())), MOST_COPIES))
        results[value] = Result(w, floor * 1e6, len(copies))
        for contender in contenders:
            try:
                for variant in itertools.islice(contender.variants(w), VARIANTS):
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


def run(about: dict[str, Any], ceilings: Ceilings, contenders: Sequence[peers.Peer], calls: int, out: Path) -> None:
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
    plots.save(lambda: plots.sweep(record["sweep"], out / "sweep.png"))
