"""The cost of a call on the GPU: the timestamps that the hardware gave to its kernels, through JAX's profiler.

The span of a call, from the start of its first kernel to the end of its last, holds the gaps between its kernels, but
nothing of Python. Long transforms are queued in front of the calls: meanwhile the host runs ahead, so that the gaps are
those of the device and not of a host that cannot keep up.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
import time
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
    warm_up(calls)
    (timing,) = time_series([calls])
    if timing is None:
        raise RuntimeError(f"expected the same kernels from each of {len(calls)} calls")
    return timing


def warm_up(calls: Sequence[Callable[[], Any]]) -> None:
    """Compiles, and lets the first calls do whatever they do only once, such as making a graph."""
    for call in itertools.islice(itertools.cycle(calls), 3):
        jax.block_until_ready(call())


def wall_seconds(call: Callable[[], Any], repeats: int = 8) -> float:
    """The time of one more call by the host's clock while the device is kept busy, with no profiler running.

    It is told from the times of one call and of one more than `repeats` calls behind the same transforms; the median of
    five such differences counts.
    """
    occupy, operand = _queue_ahead()

    def seconds(count: int) -> float:
        start = time.perf_counter()
        result = occupy(operand)
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)
        return time.perf_counter() - start

    return statistics.median((seconds(1 + repeats) - seconds(1)) / repeats for _ in range(5))


def time_series(series: Sequence[Sequence[Callable[[], Any]]]) -> list[Timing | None]:
    """Several series of calls as `time_calls` takes them, each warmed up, in one trace, which costs about a second.

    None for a series whose calls did not launch the same number of kernels each.
    """
    occupy, operand = _queue_ahead()

    def run() -> Any:
        result = None
        for calls in series:
            # The trace shows by these transforms where a series begins.
            occupy(operand)
            for call in calls:
                result = call()
        return result  # of the last call, which is done when all are

    parts = _after_each(trace(run))
    if len(parts) != len(series):
        raise RuntimeError(f"expected {len(series)} series of kernels in the trace, found {len(parts)}")
    return [_timing(events, len(calls)) for events, calls in zip(parts, series, strict=True)]


def _after_each(events: list[Event]) -> list[list[Event]]:
    """Cuts events at, and without, the transforms that `_queue_ahead` makes."""
    parts: list[list[Event]] = []
    transforming = False
    for event in events:
        if "fft" in event.name.casefold():
            if not transforming:
                parts.append([])
            transforming = True
        elif parts:
            parts[-1].append(event)
            transforming = False
    return parts


def _timing(events: list[Event], calls: int) -> Timing | None:
    each, rest = divmod(len(events), calls)
    if rest or not each:
        return None
    groups = [events[i : i + each] for i in range(0, len(events), each)]
    return Timing(
        spans=[(max(event.end_ns for event in group) - group[0].start_ns) * 1e-9 for group in groups],
        busy=[sum(event.end_ns - event.start_ns for event in group) * 1e-9 for group in groups],
        kernels=[event.name for event in groups[0]],
    )


@functools.cache
def _queue_ahead() -> tuple[Callable[[Any], Any], Any]:
    """A function that keeps the device busy for some milliseconds, with kernels that nothing else here has."""
    occupy = jax.jit(lambda x: functools.reduce(lambda y, _: jnp.fft.fft(y), range(8), x))
    operand = jnp.ones((64, 1 << 20), jnp.complex64)
    occupy(operand).block_until_ready()
    return occupy, operand
