"""FlashMLA's last Hopper kernel on the MLA workloads, in PyTorch: the peer of `python -m benchmarks.gpu mla`.

`python -m benchmarks.flash_mla` needs PyTorch for CUDA and the wheel `sgl-flash-mla`, of which it loads the library
alone. A process of its own, since PyTorch and JAX would share the profiler and memory. Calls take copies of all
operands in turn, 256 MiB together. The times are those of events around a call, less those around nothing, and those of
a CUDA graph of all copies by their number.
"""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import options
from benchmarks.attention import ROTATE_BYTES
from benchmarks.cases import GPU_MLA, Workload

PAGE_SIZE = 64  # the only one that it takes
COPIES = 16


class Decode:
    """One call on operands of its own. The first run works out the split over multiprocessors, which is not counted."""

    def __init__(self, torch: Any, w: Workload, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Any:
            return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=generator)

        def int32(values: Any) -> Any:
            return torch.tensor(values, dtype=torch.int32, device="cuda")

        pages = np.array(w.pages)
        tables = np.zeros((w.batch, w.max_pages), np.int32)
        ids = np.random.default_rng(seed).permutation(pages.sum())
        tables[np.arange(w.max_pages) < pages[:, None]] = ids
        self._run = torch.ops.flash_mla_legacy.dense_decode_fwd
        self._q = normal(w.batch, w.rows, w.num_heads, w.head_dim)
        self._pages = normal(int(pages.sum()), w.page_size, 1, w.head_dim)
        self._where = (int32([keys for _, keys in w.sequences]), int32(tables))
        self._value_dim, self._scale = w.head_dim_of_values, w.head_dim**-0.5
        self._split: tuple[Any, Any] = (None, None)

    def __call__(self) -> Any:
        causal = True
        out, _, *split = self._run(
            self._q, self._pages, self._value_dim, *self._where, self._scale, causal, *self._split
        )
        if split[0] is not None:
            self._split = (split[0], split[1])
        return out


def microseconds(torch: Any, calls: Sequence[Callable[[], Any]], count: int) -> float:
    """The median time between events around single calls, while the host is ahead of the device."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    torch.cuda._sleep(40_000_000)
    for i, (start, end) in enumerate(pairs):
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in pairs)


def measure(torch: Any, w: Workload) -> tuple[float, float]:
    """Microseconds of a call, and of a call in a CUDA graph."""
    copies = min(max(3, -(-ROTATE_BYTES // w.bytes())), COPIES)
    calls = [Decode(torch, w, seed) for seed in range(copies)]
    for call in calls:
        call()
    nothing = microseconds(torch, [lambda: None], 32)
    single = microseconds(torch, calls, max(12, copies)) - nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return single, (microseconds(torch, [graph.replay], 7) - nothing) / copies


def main() -> None:
    parser = options.parser("flash_mla", __doc__)
    options.add_only(parser)
    workloads = options.chosen(parser, GPU_MLA, parser.parse_args().only)
    import torch  # pyright: ignore[reportMissingImports]

    (library,) = (
        path for path in importlib.metadata.files("sgl-flash-mla") or () if path.name.startswith("_C_legacy.")
    )
    torch.ops.load_library(str(library.locate()))
    print(f"FlashMLA (sgl-flash-mla) on {torch.cuda.get_device_name()}\n{'us of a call':34} {'single':>8} {'graph':>8}")
    for w in workloads:
        if w.page_size == PAGE_SIZE and w.page_dtype is None:
            single, in_graph = measure(torch, w)
            flops = w.flops() / single / 1e6
            print(
                f"{w.name:34} {single:8.1f} {in_graph:8.1f}  {w.bytes() / single / 1e6:5.2f} TB/s {flops:6.0f} TFLOP/s"
            )
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
