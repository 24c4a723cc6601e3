"""Where the time of a GPU engine's kernels goes, by Nsight Compute: duration, bytes of memory, shares of the peaks.

`python -m benchmarks.profile` from the repository's root runs itself under ncu, one call of each workload, and prints a
table. `ladder` profiles the first kernels of each step of benchmarks/ladder. Every kernel runs alone there,
so durations add up to more than a call takes.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_paged_attn as jpa
from benchmarks import ladder, options, peers
from benchmarks.cases import PLAN, Workload, make_ragged

WORKLOADS = {
    "decode": Workload("decode, 4k keys", "f16", ((1, 4096),) * 16, **PLAN, causal=False),
    "prefill": Workload("4k rows, 4k keys", "f16", ((4096, 4096),) * 2, **PLAN, causal=False),
}
# The ladder, which has to be compiled first, is not a part of all.
COMMANDS = (*WORKLOADS, "writes", "ladder")
_OURS = ("Cut", "Pack", "Softmax", "Combine", "CombineSplits", "Decode", "Prefill", "Schedule", "Write", "MoveRows")
KERNELS = f"({'|'.join(_OURS)})Kernel|nvjet|gemm|cutlass|xmma|cublas"

# Metrics of ncu, with the table's heading and the divisor of a value.
METRICS = {
    "gpu__time_duration.sum": ("us", 1e3),
    "dram__bytes_read.sum": ("MB read", 1e6),
    "dram__bytes_write.sum": ("MB written", 1e6),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("% memory", 1),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("% L2", 1),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("% SM", 1),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("% warps", 1),
    "launch__registers_per_thread": ("registers", 1),
}


def attend(name: str, engine: str) -> None:
    workload = WORKLOADS[name]
    (operands,) = make_ragged(workload, copies=1)
    (peer,) = (peer for peer in peers.engines() if peer.name == engine)
    (variant,) = peer.variants(workload)
    jax.block_until_ready(jax.jit(variant.attend)(operands))


def climb(step: int, build: Path) -> None:
    """One step of the ladder, on the shape that prefill has here."""
    library = ladder.Library(ladder.build(build, "native"))
    with ladder.ladder(library, WORKLOADS["prefill"]) as steps:
        steps.plan(step)
        steps.launch()


def write(tokens: int = 16384) -> None:
    slots = jnp.asarray(
        np.random.default_rng(0).permutation(4096)[: tokens // 16, None] * 16 + np.arange(16), jnp.int32
    )
    pages, new = jnp.zeros((4096, 16, 8, 128), jnp.bfloat16), jnp.ones((tokens, 8, 128), jnp.bfloat16)
    step = jax.jit(jpa.write_kv_pages, donate_argnums=(0, 1))
    jax.block_until_ready(step(pages, jnp.copy(pages), new, new, slots.reshape(-1)))


def profile(ncu: str, name: str, kernels: int, *options_of_run: str) -> list[list[str]]:
    """One row per kernel: its name, then METRICS."""
    flags = [
        "--clock-control",
        "none",
        "--target-processes",
        "all",
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
    ]
    chosen = ["--kernel-name", f"regex:{KERNELS}", "--launch-count", str(kernels), "--metrics", ",".join(METRICS)]
    program = [sys.executable, "-m", "benchmarks.profile", "--run", name, *options_of_run]
    # ncu saves and restores memory around each kernel, and sees the kernels of a graph only as one.
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": "--xla_gpu_enable_command_buffer="}
    done = subprocess.run(
        [ncu, *flags, *chosen, *program],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or len(lines) < 3:
        raise RuntimeError(f"ncu ended with status {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}")
    # The second line has the units.
    rows = list(csv.DictReader(io.StringIO("\n".join([lines[0], *lines[2:]]))))
    return [
        [row["Kernel Name"], *(f"{float(row[m].replace(',', '')) / by:.1f}" for m, (_, by) in METRICS.items())]
        for row in rows
    ]


def main() -> None:
    parser = options.parser("profile", __doc__)
    parser.add_argument("command", nargs="?", choices=[*COMMANDS, "all"], default="all", help="what to profile")
    parser.add_argument("--ncu", default="ncu", help="Nsight Compute's command")
    parser.add_argument("--kernels", type=int, default=9, help="most kernels per workload (default 9)")
    parser.add_argument("--engine", default="cublaslt", help="of attention (default cublaslt)")
    parser.add_argument("--build", type=Path, default=Path("build/ladder"), help="folder of the ladder's library")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # the process that ncu watches
    args = parser.parse_args()
    if args.run == "writes":
        write()
        return
    if args.run in ladder.STEPS:
        climb(ladder.STEPS.index(args.run), args.build)
        return
    if args.run:
        attend(args.run, args.engine)
        return
    names = {"all": COMMANDS[:-1], "ladder": ladder.STEPS}.get(args.command, (args.command,))
    for name in names:
        print(f"{name}\n  {'':44}" + "".join(f"{heading:>11}" for heading, _ in METRICS.values()))
        rows = profile(args.ncu, name, args.kernels, "--engine", args.engine, "--build", str(args.build))
        for kernel, *values in rows:
            print(f"  {kernel.partition('(')[0][-44:]:44}" + "".join(f"{value:>11}" for value in values), flush=True)


if __name__ == "__main__":
    main()
