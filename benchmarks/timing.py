"""Fair timing on a machine that is never quite idle: all contenders in one process, in turn, round after round.

Of its calls each contender's fastest counts, since whatever else runs on the machine only ever makes a call slower.
The processor time of a call, all threads together, tells what it costs where its threads have to wait for cores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

FEWEST_CALLS = 3


@dataclass
class Contender:
    """Something to be timed: an endless supply of calls that block until they are done, each on the next data."""

    name: str
    calls: Iterable[Callable[[], Any]] = field(repr=False)
    seconds: list[float] = field(default_factory=list)
    core_seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def race(contenders: list[Contender], budget: float) -> None:
    """Times the contenders in turn until the first has used `budget` seconds; slower ones drop out when they have.

    So no contender gets more chances of a lucky call than the first, and each gets its fewest calls.
    """
    running = [(contender, iter(contender.calls)) for contender in contenders]
    while running and running[0][0] is contenders[0]:
        for contender, supply in running:
            call = next(supply)
            start, core_start = time.perf_counter(), time.process_time()
            call()
            contender.seconds.append(time.perf_counter() - start)
            contender.core_seconds.append(time.process_time() - core_start)
        running = [
            (contender, supply)
            for contender, supply in running
            if sum(contender.seconds) < budget or len(contender.seconds) < FEWEST_CALLS
        ]
