#!/usr/bin/env python3
"""Fails if a wheel is too large, bundles libraries, or lacks a CUDA module or its kernels for a compute capability.

Usage: tools/check_wheel.py WHEEL [--modules _cuda _cuda12] [--architectures "80;90a;120-virtual"]

cuobjdump is the one on PATH, or that of NVIDIA's package nvidia-cuda-cuobjdump.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MAX_BYTES = 60_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--modules", nargs="*", default=[], help="the CUDA modules that it has to have, and no others")
    parser.add_argument("--architectures", default="", help="those of each CUDA module")
    arguments = parser.parse_args()
    wheel, architectures = arguments.wheel, [a for a in arguments.architectures.split(";") if a]

    faults = []
    with zipfile.ZipFile(wheel) as archive:
        files = archive.infolist()
        # The CUDA runtime is linked in, and cuBLASLt and the driver are opened at run time.
        faults += [f"{f.filename}: a bundled library" for f in files if ".libs/" in f.filename]
        found = [re.fullmatch(r"jax_paged_attn/(_cuda\d*)\.[^/]*so", f.filename) for f in files]
        modules = {match[1]: match[0] for match in found if match}
        if modules.keys() != set(arguments.modules):
            faults.append(f"CUDA modules: {sorted(modules)}, expected: {sorted(arguments.modules)}")
        with tempfile.TemporaryDirectory() as directory:
            for name, file in sorted(modules.items()):
                faults += [f"{name}: {fault}" for fault in faults_of(archive.extract(file, directory), architectures)]
    size, unpacked = wheel.stat().st_size, sum(f.file_size for f in files)
    if size > MAX_BYTES:
        faults.append(f"{size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} are allowed")
    for fault in faults:
        print(f"{wheel}: {fault}", file=sys.stderr)
    print(f"{wheel.name}: {size / 1e6:.1f} MB, unpacked {unpacked / 1e6:.1f} MB, {len(faults)} faults")
    return 1 if faults else 0


def faults_of(module: str, architectures: list[str]) -> list[str]:
    """What the module lacks of the architectures, or has beyond them; prints how many kernels it has."""
    kernels, ptx = kernels_of(module), ptx_of(module)
    faults = missing_kernels(kernels, [a for a in architectures if not a.endswith("-virtual")])
    expected = {f"sm_{a.removesuffix('-virtual')}" for a in architectures if a.endswith("-virtual")}
    if ptx != expected:
        faults.append(f"PTX for {sorted(ptx)}, expected for {sorted(expected)}")
    counts = ", ".join(f"{len(names)} for {name}" for name, names in sorted(kernels.items()))
    print(f"{Path(module).name}, {Path(module).stat().st_size / 1e6:.1f} MB: kernels {counts or 'as PTX alone'}")
    return faults


def kernels_of(module: str) -> dict[str, set[str]]:
    """The kernels in the module's machine code, by architecture ("sm_80")."""
    kernels: dict[str, set[str]] = {}
    architecture = "?"
    for line in cuobjdump("--dump-elf-symbols", module).splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ").strip()
        elif re.search(r"\b(STO_)?ENTRY\b", line):  # ENTRY in cuobjdump 13.5, STO_ENTRY in 13.2
            kernels.setdefault(architecture, set()).add(line.split()[-1])
    return kernels


def ptx_of(module: str) -> set[str]:
    """The architectures ("sm_120") that the module has PTX for."""
    return set(re.findall(r"\.(sm_\w+)\.ptx", cuobjdump("--list-ptx", module)))


def cuobjdump(option: str, module: str) -> str:
    spec = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    places = [f"{place}/bin" for place in (spec.submodule_search_locations or [] if spec else [])]
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(places))
    if tool is None:
        sys.exit("no cuobjdump on PATH, nor from the package nvidia-cuda-cuobjdump")
    return subprocess.run([tool, option, module], capture_output=True, text=True, check=True).stdout


def missing_kernels(kernels: dict[str, set[str]], architectures: list[str]) -> list[str]:
    """Faults, one line each: every architecture should have every kernel that another one has.

    Prefill kernels count too, though outside 90a they are empty and never launched.
    """
    expected = {f"sm_{name}" for name in architectures}
    if not expected and not kernels:  # a wheel of PTX alone
        return []
    if set(kernels) != expected:
        return [f"kernels for {sorted(kernels)}, expected for {sorted(expected)}"]
    every = set().union(*kernels.values())
    return [f"{name} lacks {kernel}" for name, names in sorted(kernels.items()) for kernel in sorted(every - names)]


if __name__ == "__main__":
    sys.exit(main())
