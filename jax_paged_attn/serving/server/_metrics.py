"""What a server counts, for Prometheus, in a registry of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jax_paged_attn.serving._engine import Engine

_PREFIX = "jax_paged_attn_"
_COUNTERS = {
    "steps": "Times that the model ran.",
    "tokens": "Generated tokens.",
    "prompt_tokens": "Tokens of the prompts of admitted requests.",
    "cached_tokens": "Tokens of these that were found in the prefix cache.",
    "preemptions": "How often a request gave up its pages.",
}
_GAUGES = {
    "num_running": "Requests that hold pages.",
    "num_waiting": "Requests in the queue.",
    "pages_in_use": "Pages that running requests hold.",
    "num_pages": "Pages of the pool.",
}
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LATER = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Numbers of an engine at one moment, to be taken by its thread."""

    counters: dict[str, int]
    gauges: dict[str, int]

    @classmethod
    def of(cls, engine: Engine) -> Snapshot:
        return cls(
            {name: getattr(engine.stats, name) for name in _COUNTERS}, {name: getattr(engine, name) for name in _GAUGES}
        )


class Metrics(Collector):
    """Counts and times of answers, and the engine's own numbers as they were last taken.

    Attributes:
      first_token: seconds from a request's arrival to its first token.
      per_token: seconds per token after that.
    """

    def __init__(self):
        self._registry = CollectorRegistry()
        self._snapshot = Snapshot({}, {})
        self._registry.register(self)
        requests = Counter(f"{_PREFIX}requests", "Requests by outcome.", ["outcome"], registry=self._registry)
        self._outcomes = {name: requests.labels(name) for name in ("completed", "cancelled", "refused", "failed")}
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST)
        self.per_token = self._histogram("time_per_token_seconds", "Time per token after the first.", _LATER)

    def count(self, outcome: str) -> None:
        """Counts a request that has ended as "completed", "cancelled", "refused" or "failed"."""
        self._outcomes[outcome].inc()

    def text(self, snapshot: Snapshot) -> bytes:
        """All of it in Prometheus' text format."""
        self._snapshot = snapshot
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers."""
        for name, value in self._snapshot.counters.items():
            yield CounterMetricFamily(_PREFIX + name, _COUNTERS[name], value=value)
        for name, value in self._snapshot.gauges.items():
            yield GaugeMetricFamily(_PREFIX + name.removeprefix("num_"), _GAUGES[name], value=value)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, text, registry=self._registry, buckets=buckets)
