"""The plots of all records. They need matplotlib, which is not installed with the package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def save(draw: Callable[[], None]) -> None:
    """Draws unless matplotlib is not installed."""
    try:
        draw()
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("\nno plot: matplotlib is not installed")


def gpu_record(path: Path) -> None:
    """Draws an earlier run's record, gpu.json or sweep.json, beside it."""
    record = json.loads(path.read_text())
    if "sweep" in record:
        sweep(record["sweep"], path.with_suffix(".png"))
    else:
        gpu(record["attention"], path.with_suffix(".png"))


def gpu(results: list[dict[str, Any]], path: Path) -> None:
    """From a record: one group of bars per workload and one bar per contender, its share of the ceiling."""
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
    axes.set_ylabel("share of the ceiling")
    axes.set_xticks(places, [r["workload"]["name"].replace(" ", "\n", 2) for r in results], fontsize=7)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def sweep(axes: dict[str, dict[str, Any]], path: Path) -> None:
    """From a record: one panel per axis, microseconds of each contender, and the floor."""
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
            {"batch": "sequences", "length": "tokens of each sequence", "group": "query heads per group"}[axis]
        )
        panel.set_ylabel("us per call")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def cpu(results: Sequence[Any], path: Path) -> None:
    """One group of bars per workload and one bar per contender; a line where the time to read the bytes is."""
    pyplot = _pyplot()
    places = np.arange(len(results))
    names = [row.contender for row in results[0].rows if row.error is not None]
    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    for i, name in enumerate(names):
        times = [next(row.best_ms for row in result.rows if row.contender == name) for result in results]
        bars = axes.bar(places + (i - (len(names) - 1) / 2) * 0.8 / len(names), times, 0.8 / len(names), label=name)
        axes.bar_label(bars, fmt=lambda ms: f"{ms:.1f}" if ms < 100 else f"{ms:.0f}", fontsize=7)
    limits = [min((row.best_ms for row in result.rows if row.error is None), default=np.nan) for result in results]
    axes.hlines(limits, places - 0.45, places + 0.45, "black", label="reading the bytes")
    axes.set_yscale("log")
    axes.set_ylabel("ms per call, the fastest")
    axes.set_xticks(places, [result.workload.name for result in results], fontsize=8)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def ladder(results: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Milliseconds and launches of each step, one line per shape."""
    pyplot = _pyplot()
    figure, (times, launches) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, rows in results.items():
        steps = [row.step for row in rows]
        times.plot(steps, [row.milliseconds for row in rows], marker="o", label=name)
        launches.plot(steps, [row.operations for row in rows], marker="o", label=name)
    for axes, title in ((times, "ms per call"), (launches, "device operations per call")):
        axes.set_yscale("log")
        axes.set_title(title)
        axes.tick_params(axis="x", rotation=30, labelsize=8)
        axes.grid(alpha=0.3)
    times.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    return pyplot
