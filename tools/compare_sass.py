#!/usr/bin/env python3
"""Shows that two builds have the same machine code but for symbol names, kernel by kernel.

Usage: tools/compare_sass.py BEFORE AFTER   (wheels, shared objects, or folders of cubins; needs cuobjdump and nvdisasm)

A renaming changes the names of kernels, so a kernel of one build is paired with any of the other whose instructions
and encodings are the same. The exit status is 1 where some kernel has no such partner.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_FUNCTION = re.compile(r"\s*Function : (?P<name>\S+)")
_ARCHITECTURE = re.compile(r"\s*code for (?P<name>\S+)")
# Symbols in operands, such as 32@lo(_ZN...).
_SYMBOL = re.compile(r"_Z\w+")


def modules(path: Path, folder: Path) -> list[Path]:
    """The files with machine code: those of a folder, those of a wheel, or the file itself."""
    if path.is_dir():
        return sorted(path.glob("*.cubin"))
    if path.suffix != ".whl":
        return [path]
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if Path(name).match("_cuda.*so")]
        return [Path(wheel.extract(name, folder)) for name in names]


def kernels(path: Path) -> Iterator[tuple[str, str]]:
    """The name of each kernel and a hash of its instructions."""
    dump = subprocess.Popen(["cuobjdump", "-sass", str(path)], stdout=subprocess.PIPE, text=True)
    assert dump.stdout is not None
    architecture, name, body = "", None, hashlib.sha256()
    for line in dump.stdout:
        if match := _ARCHITECTURE.match(line):
            architecture = match["name"]
        if match := _FUNCTION.match(line):
            if name is not None:
                yield name, body.hexdigest()
            name, body = f"{architecture} {match['name']}", hashlib.sha256()
        elif name is not None and "/*" in line:
            body.update(_SYMBOL.sub("_", line).encode())
    if name is not None:
        yield name, body.hexdigest()
    if dump.wait() != 0:
        sys.exit(f"cuobjdump failed for {path}")


def by_code(path: Path) -> dict[str, list[str]]:
    """The names of the kernels that have each machine code."""
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for module in modules(path, Path(folder)):
            for name, code in kernels(module):
                found[f"{name.split()[0]} {code}"].append(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", default="", help="kernels whose symbol has this text")
    options = parser.parse_args()
    before, after = by_code(options.before), by_code(options.after)
    equal, alone = 0, []
    for code in sorted({*before, *after}):
        mine = [name for name in before.get(code, []) if options.only in name]
        theirs = [name for name in after.get(code, []) if options.only in name]
        equal += min(len(mine), len(theirs))
        alone += [f"before: {name}" for name in sorted(mine)[len(theirs) :]]
        alone += [f"after:  {name}" for name in sorted(theirs)[len(mine) :]]
    print(f"{equal} kernels have equal machine code; {len(alone)} have none like it in the other build")
    for line in alone:
        print(line)
    return 1 if alone or equal == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
