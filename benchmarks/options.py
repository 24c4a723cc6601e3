"""The command-line options that benchmarks have in common, so that one word means one thing in all of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import Workload


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.<module>`; the first line of its docstring describes it."""
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=(doc or "").partition("\n")[0])


def add_only(parser: argparse.ArgumentParser) -> None:
    """`--only`, for `chosen`."""
    parser.add_argument("--only", default="", metavar="TEXT", help="only the workloads whose name contains this")


def add_seconds(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument("--seconds", type=float, default=default, help=f"time per contender (default {default:g})")


def add_calls(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--calls", type=int, default=default, help=f"fewest calls per contender (default {default})")


def add_out(parser: argparse.ArgumentParser, files: str) -> None:
    default = Path("build/bench")
    parser.add_argument("--out", type=Path, default=default, help=f"folder of {files} (default {default})")


def chosen(parser: argparse.ArgumentParser, workloads: Sequence[Workload], only: str) -> list[Workload]:
    """The workloads that `--only` names; ends with an error if there are none."""
    found = [workload for workload in workloads if only in workload.name]
    if not found:
        parser.error(f"--only: expected part of one of {[workload.name for workload in workloads]}, got {only!r}")
    return found
