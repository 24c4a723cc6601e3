"""The ladder: from one cuBLASLt call per page to the engine and a fused kernel, all computing the same attention.

`python -m benchmarks.ladder` from the repository's root prints a table and writes build/bench/ladder.json and .png. The
first steps are C++ (ladder.cu), compiled on first use: nvcc and cuBLAS's headers have to be there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from numpy.typing import NDArray

from benchmarks import options, peers, plots
from benchmarks.attention import Sample
from benchmarks.cases import PLAN, Workload, make_ragged
from benchmarks.device import time_calls, trace

SOURCE = Path(__file__).with_suffix(".cu")

# The plan's shapes: 16 sequences of 16 heads of head dim 128, 32 pages each.
SHAPES = (
    Workload("decode, 4k keys", "f16", ((1, 4096),) * 16, **PLAN, causal=False),
    Workload("2k rows, 2k keys", "f16", ((2048, 2048),) * 16, **{**PLAN, "page_size": 64}, causal=False),
    Workload("4k rows, 4k keys", "f16", ((4096, 4096),) * 16, **PLAN, causal=False),
)

# In the order of `enum class Step` in ladder.cu.
STEPS = ("nested loops", "heads batched", "one softmax per page", "all batched")


@dataclass(frozen=True)
class Row:
    """One step on one shape."""

    step: str
    milliseconds: float
    launches: int  # that the step itself makes: calls of cuBLASLt and of kernels; 0: not known
    operations: int  # kernels, copies and fills of the device, as its tracer counted them
    error: float  # relative, of some heads against float64, or of some rows against the reference


# ---- the library -----------------------------------------------------------------------------------------------------


def cublas_folder(kind: str) -> Path:
    """The folder "include" or "lib" of the cuBLAS that comes from PyPI beside JAX."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        for folder in (Path(root) / "cu13" / kind, Path(root) / "cublas" / kind):
            if next(folder.glob("*cublasLt*"), None):
                return folder
    raise FileNotFoundError(f"no folder {kind!r} of cuBLAS in this environment: install nvidia-cublas")


def build(folder: Path, architecture: str) -> Path:
    """Compiles ladder.cu unless the folder has a library that is as new."""
    library = folder / "libladder.so"
    if library.exists() and library.stat().st_mtime >= SOURCE.stat().st_mtime:
        return library
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on the PATH: the first steps of the ladder need it")
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC"]
    # cuBLASLt stays undefined: the process that opens the library has opened cuBLASLt before.
    command = [nvcc, *flags, f"-I{cublas_folder('include')}", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return library


class Library:
    """ladder.cu through ctypes."""

    def __init__(self, path: Path) -> None:
        ctypes.CDLL(str(cublas_folder("lib") / "libcublasLt.so.13"), ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(path))
        self._library.ladder_error.restype = ctypes.c_char_p

    def check(self, name: str, *args: object) -> None:
        if getattr(self._library, name)(*args):
            raise RuntimeError(f"{name}: {self._library.ladder_error().decode()}")

    def destroy(self, ladder: ctypes.c_void_p) -> None:
        self._library.ladder_destroy(ladder)


class Ladder:
    """The first steps on one shape, with inputs of their own on the device."""

    def __init__(self, library: Library, shape: Workload) -> None:
        self._library, self._shape = library, shape
        self._heads = shape.batch * shape.num_heads
        self._self = ctypes.c_void_p()
        sizes = (self._heads, shape.rows, shape.keys, shape.head_dim, shape.max_pages)
        library.check("ladder_create", *map(ctypes.c_int64, sizes), ctypes.byref(self._self))

    def close(self) -> None:
        self._library.destroy(self._self)

    def plan(self, step: int) -> None:
        self._library.check("ladder_plan", self._self, ctypes.c_int(step))

    def launch(self) -> int:
        """Runs the step that is planned; returns its number of launches."""
        launches = ctypes.c_int64()
        self._library.check("ladder_launch", self._self, ctypes.byref(launches))
        return launches.value

    def measure(self, step: int, repeats: int) -> Row:
        self.plan(step)
        launches = self.launch()  # warms up
        milliseconds, times = ctypes.c_float(), []
        for _ in range(repeats):
            self._library.check("ladder_time", self._self, ctypes.byref(milliseconds))
            times.append(milliseconds.value)
        error = self._error()
        events = trace(self.launch)
        return Row(STEPS[step], statistics.median(times), launches, len(events), error)

    def _error(self) -> float:
        """The error of the first and the last head's first rows, against float64."""
        rows, keys, dim = min(64, self._shape.rows), self._shape.keys, self._shape.head_dim
        differences, norms = 0.0, 0.0
        for head in (0, self._heads - 1):
            q = self._read(0, head * self._shape.rows * dim, (rows, dim), np.float16)
            k, v = (self._read(i, head * keys * dim, (keys, dim), np.float16) for i in (1, 2))
            out = self._read(3, head * self._shape.rows * dim, (rows, dim), np.float32)
            scores = q @ k.T / np.sqrt(dim)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            want = weights / weights.sum(axis=-1, keepdims=True) @ v
            differences += float(np.sum((out - want) ** 2))
            norms += float(np.sum(want**2))
        return (differences / norms) ** 0.5

    def _read(self, index: int, offset: int, shape: tuple[int, int], dtype: type) -> NDArray[np.float64]:
        values = np.empty(shape, dtype)
        pointer = values.ctypes.data_as(ctypes.c_void_p)
        where = (ctypes.c_int(index), ctypes.c_int64(offset), ctypes.c_int64(values.size))
        self._library.check("ladder_read", self._self, *where, pointer)
        return values.astype(np.float64)


@contextmanager
def ladder(library: Library, shape: Workload) -> Iterator[Ladder]:
    """The first steps on a shape; their memory is freed afterwards."""
    steps = Ladder(library, shape)
    try:
        yield steps
    finally:
        steps.close()


# ---- the last steps --------------------------------------------------------------------------------------------------


def measure_fused(shape: Workload, contender: peers.Peer, calls: int) -> Row:
    """An engine of the package or a peer, on pages of the pool; the fastest of its variants."""
    (operands,) = make_ragged(shape, copies=1)
    sample, rows = Sample(shape, operands), []
    for variant in contender.variants(shape):
        compiled = jax.jit(variant.attend)
        timing = time_calls([lambda call=compiled: call(operands)] * calls)
        error = sample.error(compiled(operands))
        rows.append(Row(contender.name, timing.median * 1e3, 0, len(timing.kernels), error))
    return min(rows, key=lambda row: row.milliseconds)


# ---- report ----------------------------------------------------------------------------------------------------------


def table(shape: Workload, rows: list[Row]) -> str:
    slowest = rows[0].milliseconds
    lines = [
        f"{shape.name}: {shape.batch} sequences of {shape.num_heads} heads, {shape.max_pages} pages each",
        f"  {'':18} {'launches':>8} {'operations':>10} {'ms':>10} {'speed-up':>9} {'error':>8}",
    ]
    for row in rows:
        lines.append(
            f"  {row.step:20} {row.launches or '':>6} {row.operations:10} {row.milliseconds:10.3f}"
            f" {slowest / row.milliseconds:8.1f}x {row.error:8.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = options.parser("ladder", __doc__)
    parser.add_argument("--repeats", type=int, default=3, help="times that a step of the library is timed")
    options.add_calls(parser, 6)
    parser.add_argument("--build", type=Path, default=Path("build/ladder"), help="folder of the compiled library")
    parser.add_argument("--arch", default="native", help="what nvcc compiles for, such as sm_90")
    parser.add_argument("--build-only", action="store_true", help="compile the library and stop")
    options.add_out(parser, "ladder.json and ladder.png")
    args = parser.parse_args()
    library_path = build(args.build, args.arch)
    if args.build_only:
        return
    # The library takes memory of its own.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    library = Library(library_path)
    fused = [*peers.engines(), *(peer for peer in peers.installed() if peer.name in ("cuDNN", "FA3"))]
    results: dict[str, list[Row]] = {}
    for shape in SHAPES:
        with ladder(library, shape) as steps:
            rows = [steps.measure(step, args.repeats) for step in range(len(STEPS))]
        for contender in fused:
            try:
                rows.append(measure_fused(shape, contender, args.calls))
            except peers.UnsupportedError as reason:
                print(f"{contender.name}: {reason}")
        results[shape.name] = rows
        print(f"{table(shape, rows)}\n", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "device": jax.devices()[0].device_kind,
        "results": {name: [asdict(row) for row in rows] for name, rows in results.items()},
    }
    (args.out / "ladder.json").write_text(json.dumps(record, indent=1) + "\n")
    plots.save(lambda: plots.ladder(results, args.out / "ladder.png"))


if __name__ == "__main__":
    main()
