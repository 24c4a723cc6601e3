"""`python -m jax_paged_attn`: what is installed, which engines run here, which calls they take, and why others do not.

`python -m jax_paged_attn --cmakedir`: where CMake's find_package(jax_paged_attn) finds the engines' C++ API.
`python -m jax_paged_attn --version`: the version alone.
"""

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import jax

from jax_paged_attn import __version__, _engines, _ffi


def report() -> str:
    """The text that `python -m jax_paged_attn` prints."""
    backend = jax.default_backend()
    lowering_platform = "cuda" if backend == "gpu" else backend
    devices = ", ".join(str(d.device_kind) for d in jax.devices())
    lines = [
        f"jax_paged_attn {__version__}",
        f"  python {platform.python_version()}, jax {jax.__version__}, jaxlib {version('jaxlib')}",
        f"  backend {backend}: {devices}",
    ]
    lines += [f"  {line}" for line in _ffi.describe()]
    lines.append("engines, best first:")
    verdicts = {}
    for engine in _engines.ENGINES:
        reason = engine.missing(lowering_platform)
        verdicts[engine.name] = "runs here" if reason is None else f"does not run here: {reason}"
    return "\n".join([*lines, *_engines.table(verdicts)])


def cmake_directory() -> Path:
    """The folder of the CMake package, which is installed beside the compiled modules.

    Raises:
      LookupError: this installation has no compiled module for the CPU.
    """
    return Path(_ffi.compiled("cpu").__file__ or "").absolute().parent / "cmake"


def main() -> None:
    """Prints what the options ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_paged_attn", description="Prints what is installed and which engines run here."
    )
    parser.add_argument("--version", action="version", version=f"jax_paged_attn {__version__}")
    parser.add_argument("--cmakedir", action="store_true", help="print the folder of the CMake package instead")
    sys.stdout.write(f"{cmake_directory() if parser.parse_args().cmakedir else report()}\n")


if __name__ == "__main__":
    main()
