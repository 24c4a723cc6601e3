"""What a call costs on the GPU: the timestamps that the hardware gave to its kernels, through JAX's profiler.

The span of a call, from the start of its first kernel to the end of its last, holds the gaps between its kernels, but
nothing of Python. A long product is queued in front of the calls: meanwhile the host runs ahead, so that the gaps are
those of the device and not of a host that cannot keep up.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData, ProfileOptions


@dataclass(frozen=True)
class Event:
    """One operation of the device: a kernel, a copy or a fill."""

    name: str
    start_ns: float
    end_ns: float


def trace(run: Callable[[], Any]) -> list[Event]:
    """The device's operations while `run` runs and until all of them are done, in the order in which they started."""
    options = ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = ProfileData.from_file(str(path))
        events = [
            Event(event.name, event.start_ns, event.start_ns + event.duration_ns)
            for plane in profile.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return sorted(events, key=lambda event: event.start_ns)


@dataclass(frozen=True)
class Timing:
    """Several calls of one function. Seconds."""

    spans: list[float]
    busy: list[float]  # without the gaps
    kernels: list[str]  # of one call

    @property
    def median(self) -> float:
        return statistics.median(self.spans)


def time_calls(calls: Sequence[Callable[[], Any]]) -> Timing:
    """Times calls that launch the same kernels, each on its own data, without waiting between them."""
    for call in calls[:2]:
        jax.block_until_ready(call())  # compiles
    product, factor, ahead = _queue_ahead()

    def run() -> Any:
        result = product(factor)
        for call in calls:
            result = call()
        return result  # of the last call, which is done when all are

    events = trace(run)[ahead:]
    each, rest = divmod(len(events), len(calls))
    if rest or not each:
        raise RuntimeError(f"expected the same kernels from each of {len(calls)} calls, traced {len(events)} in all")
    groups = [events[i : i + each] for i in range(0, len(events), each)]
    return Timing(
        spans=[(max(event.end_ns for event in group) - group[0].start_ns) * 1e-9 for group in groups],
        busy=[sum(event.end_ns - event.start_ns for event in group) * 1e-9 for group in groups],
        kernels=[event.name for event in groups[0]],
    )


@functools.cache
def _queue_ahead() -> tuple[Callable[[Any], Any], Any, int]:
    """A function that keeps the device busy for some milliseconds, its operand, and the number of its kernels."""
    product = jax.jit(lambda x: functools.reduce(jnp.matmul, [x] * 5))
    factor = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product(factor).block_until_ready()
    return product, factor, len(trace(lambda: product(factor)))
