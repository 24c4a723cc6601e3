#!/usr/bin/env python3
"""Reads a build's log and fails if ptxas spilled registers beyond a bound, or reports that it serialised wgmma.

Usage: tools/check_ptxas.py LOG [--max-spill-bytes N]

ptxas reports where it gets -Xptxas=-v, which CMakeLists.txt passes.
"""

import argparse
import re
import sys
from pathlib import Path

# A kernel may spill a few registers where a bound on them buys occupancy; more is a mistake.
MAX_SPILL_BYTES = 64

_KERNEL = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'")
_SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
_SERIALISED = re.compile(r"C75(08|10)|wgmma.*serializ", re.IGNORECASE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--max-spill-bytes", type=int, default=MAX_SPILL_BYTES)
    arguments = parser.parse_args()

    kernel, kernels, faults = "?", 0, []
    for line in arguments.log.read_text(errors="replace").splitlines():
        if found := _KERNEL.search(line):
            kernel = f"{found['name']} ({found['arch']})"
            kernels += 1
        elif (found := _SPILLS.search(line)) and int(found["stores"]) > arguments.max_spill_bytes:
            faults.append(
                f"{kernel}: {found['stores']} bytes of spills, at most {arguments.max_spill_bytes} are allowed"
            )
        elif _SERIALISED.search(line):
            faults.append(line.strip())
    if kernels == 0:
        faults.append(f"{arguments.log}: no kernel in it; was it built with -Xptxas=-v, and not from a cache?")
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{kernels} kernels, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
