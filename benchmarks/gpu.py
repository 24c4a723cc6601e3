"""The GPU engines beside every installed peer, the write beside a plain copy, and how the cost of decode grows.

`python -m benchmarks.gpu COMMAND` from the repository's root prints tables and writes records to build/bench:

- `all`, `decode`, `prefill`, `mla`, `wide`, `mixed`, `writes`: gpu.json, and gpu.png of the attention calls.
- `sweep`: sweep.json and sweep.png. `host`: host.json. `layers`: layers.json.
- `plot JSON` draws gpu.png or sweep.png from a record, where matplotlib was missing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from benchmarks import attention, options, peers, plots, report, steps, sweep, writes
from benchmarks.attention import Ceilings, Result
from benchmarks.cases import GPU, GPU_DECODE, GPU_MLA, GPU_PREFILL, GPU_WIDE, Workload, random_decode

# The commands that measure attention, with their workloads.
ATTENTION = {
    "all": GPU,
    "decode": GPU_DECODE,
    "prefill": tuple(w for w in GPU_PREFILL if w.name.startswith("prefill")),
    "mla": GPU_MLA,
    "wide": GPU_WIDE,
    "mixed": tuple(w for w in GPU_PREFILL if w.name.startswith("mixed")),
    "random": random_decode(20, seed=0),
}
HELP = {
    "all": "every attention workload, and the writes",
    "decode": "one query token per sequence",
    "prefill": "prompts and chunks of prompts",
    "mla": "decode whose values are in the keys; its peer: python -m benchmarks.flash_mla",
    "wide": "decode and prompts of head dim 512, with and without a pool of values",
    "mixed": "decode rows and a chunk of a prompt in one call",
    "random": "decode of twenty shapes drawn at random",
    "writes": "new tokens into pages, beside a plain copy",
    "sweep": "how the cost of decode grows with batch, length and group",
    "host": "what one jitted call costs from Python",
    "layers": "a step of 32 layers, as a CUDA graph and without",
}
# With `--short`: the engine and the peers that the table of decode is about, each peer in its likeliest settings.
SHORT_CONTENDERS = ("fused", "FA3", "cuDNN")
SHORT_VARIANTS = 3
# Contenders of these commands, unless --contenders names others; all in the other commands.
FEW_CONTENDERS = {"sweep": ("fused", "FA3"), "host": ("fused", "FA3"), "layers": ("fused", "cublaslt", "FA3")}


def make_parser() -> argparse.ArgumentParser:
    parser = options.parser("gpu", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, text in HELP.items():
        sub = commands.add_parser(command, help=text, description=text)
        if command != "writes":
            sub.add_argument("--contenders", default="", metavar="A,B", help="names; default: all, or a few")
        if command in ATTENTION:
            options.add_only(sub)
        if command in ATTENTION:
            sub.add_argument("--short", action="store_true", help="fused beside FA3 and cuDNN, one table")
        if command not in ("host", "layers"):
            options.add_calls(sub, 12)
        sub.add_argument("--label", default="", metavar="TEXT", help="kept in the record: what is special in this run")
        options.add_out(sub, "the record and its plot")
    sub = commands.add_parser("plot", help="draw the plot of an earlier run's record", description="Draws a record.")
    sub.add_argument("record", type=Path, metavar="JSON")
    return parser


def contenders_of(args: argparse.Namespace, present: Sequence[peers.Peer]) -> list[peers.Peer]:
    """The contenders of a command, of those that are present; ValueError if none of the wanted is."""
    wanted = args.contenders.split(",") if args.contenders else FEW_CONTENDERS.get(args.command, ())
    if not wanted and getattr(args, "short", False):
        wanted = SHORT_CONTENDERS
    unfit = sweep.POOLS_OF_THEIR_OWN if args.command == "sweep" else ()
    found = [peer for peer in present if peer.name not in unfit and (not wanted or peer.name in wanted)]
    if not found:
        raise ValueError(f"--contenders: expected names of {', '.join(peer.name for peer in present)}, got {wanted}")
    return found


def measure_all(
    workloads: Sequence[Workload], contenders: Sequence[peers.Peer], ceilings: Ceilings, calls: int, short: bool
) -> list[Result]:
    """All contenders in each workload: a short run prints a line for each, when it is there; another one a table."""
    results = []
    few: dict[str, Any] = {"graphs": "ours", "most_variants": SHORT_VARIANTS} if short else {}
    if short:
        print(f"\n{attention.TITLES}", flush=True)
    for workload in workloads:
        results.append(attention.measure_attention(workload, contenders, ceilings, calls, **few))
        print(attention.line(results[-1]) if short else f"\n{results[-1]}", flush=True)
    print("\n".join(attention.relations(results)) if short else f"\n{attention.table(results)}")
    return results


def about_this_run(label: str) -> dict[str, Any]:
    about = {**report.machine(len(os.sched_getaffinity(0))), "device": jax.devices()[0].device_kind}
    about |= {"label": label} if label else {}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    return about


def save(record: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.command == "plot":
        plots.gpu_record(args.record)
        return
    workloads = options.chosen(parser, ATTENTION[args.command], args.only) if args.command in ATTENTION else []
    contenders: list[peers.Peer] = []
    if args.command != "writes":
        try:
            contenders = contenders_of(args, [*peers.engines(), *peers.installed()])
        except ValueError as error:
            parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    about = about_this_run(args.label)

    if args.command in ("host", "layers"):
        table = steps.host_table if args.command == "host" else steps.step_table
        save({"machine": about, args.command: table(contenders)}, args.out / f"{args.command}.json")
        return
    ceilings = attention.measure_ceilings()
    print(ceilings, flush=True)
    if args.command == "sweep":
        sweep.run(about, ceilings, contenders, args.calls, args.out)
        return
    record = {"machine": about, "ceilings": asdict(ceilings), "write": [], "attention": []}
    if args.command == "writes" or (args.command == "all" and not args.only):
        record["write"] = [asdict(written) for written in writes.measure(ceilings, args.calls)]
    if workloads:
        results = measure_all(workloads, contenders, ceilings, args.calls, getattr(args, "short", False))
        record["attention"] = [asdict(result) for result in results]
    save(record, args.out / "gpu.json")
    if workloads:
        plots.save(lambda: plots.gpu(record["attention"], args.out / "gpu.png"))


if __name__ == "__main__":
    main()
