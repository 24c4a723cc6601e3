"""The results of a run: a table on the terminal, a JSON file, and a plot where matplotlib is installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax_paged_attn
from benchmarks import plots
from benchmarks.cases import Workload


@dataclass(frozen=True)
class Row:
    """One contender in one workload; None where a column does not apply."""

    contender: str
    best_ms: float
    median_ms: float
    core_ms: float  # median processor time of a call, all threads together
    calls: int
    gigabytes_per_s: float
    gigaflops: float | None
    of_read: float | None  # share of the read bandwidth
    error: float | None  # relative, against float64


@dataclass(frozen=True)
class Goal:
    """A ratio within one run, and what it should be at least."""

    name: str
    reached: float
    wanted: float

    def __str__(self) -> str:
        verdict = "reached" if self.reached >= self.wanted else "MISSED"
        return f"{self.name}: {self.reached:.2f}, goal {self.wanted:g}: {verdict}"


@dataclass(frozen=True)
class Result:
    workload: Workload
    copies: int  # of the pool, taken in turn
    rows: list[Row]
    goals: list[Goal]

    def __str__(self) -> str:
        def cell(value: float | None, form: str) -> str:
            return "" if value is None else format(value, form)

        titles = ("", "best ms", "median", "core ms", "calls", "GB/s", "of read", "GFLOP/s", "error")
        cells = [titles] + [
            (
                row.contender,
                f"{row.best_ms:.2f}",
                f"{row.median_ms:.2f}",
                f"{row.core_ms:.2f}",
                str(row.calls),
                f"{row.gigabytes_per_s:.2f}",
                cell(row.of_read, ".1%"),
                cell(row.gigaflops, ".1f"),
                cell(row.error, ".1e"),
            )
            for row in self.rows
        ]
        lines = [
            f"{self.workload.name}: {self.workload.bytes() / 2**20:.0f} MiB per call, {self.copies} copies in turn"
        ]
        lines += [f"  {name:17}" + "".join(f"{column:>10}" for column in columns) for name, *columns in cells]
        return "\n".join([*lines, *(f"  {goal}" for goal in self.goals)])

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "workload": {**asdict(self.workload), "bytes": self.workload.bytes(), "flops": self.workload.flops()},
        }


def machine(threads: int) -> dict[str, Any]:
    """The facts that the figures depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {
        "processor": _processor_name(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **versions,
        "jax-paged-attn": jax_paged_attn.__version__,
    }


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(about: dict[str, Any], results: list[Result], folder: Path, name: str) -> None:
    """Writes `<name>.json` and, with matplotlib, `<name>.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {"machine": about, "results": [result.as_dict() for result in results]}
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    plots.save(lambda: plots.cpu(results, folder / f"{name}.png"))
