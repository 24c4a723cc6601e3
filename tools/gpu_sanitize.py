#!/usr/bin/env python3
"""A few calls of the CUDA module, held to the oracle, for compute-sanitizer: without pytest, and with next to no XLA.

Usage: tools/gpu_sanitize.py write | ENGINE NAME... | little-room NAME...
    Names are those of tests/cases; the directory tests is on PYTHONPATH. `little-room` runs `fused`.
"""

import sys

import cases
import harness
import jax
import numpy as np
import oracle

import jax_paged_attn as jpa
from jax_paged_attn import _ffi


def leave_little_room() -> None:
    """Limits the tile cache of `fused` to 1 MiB, whatever it asks for: kept programs may have no more."""
    asks_for = _ffi._CUDA_WORKSPACES["fused"]
    _ffi._CUDA_WORKSPACES["fused"] = lambda *operands, **options: asks_for(
        *operands, **{**options, "workspace_limit": 1 << 20}
    )


def attention(engine: str, name: str) -> None:
    """Runs the case as the engine takes it, and once more batch-invariant if the engine guarantees that."""
    case = harness.adapted(name, engine)
    for batch_invariant in {False, harness.engine_row(engine).batch_invariant}:
        got = harness.run(case, implementation=engine, batch_invariant=batch_invariant)
        harness.assert_close(got, harness.expected(case), case.dtype)


def write() -> None:
    """Writes bf16 tokens into pages of each width, by large and small thread blocks and bulk copies; slots repeat."""
    rng = np.random.default_rng(0)
    for tokens, page_dtype in ((6, "bf16"), (700, "bf16"), (700, "e4m3"), (5000, "bf16")):
        k_pages, v_pages = (cases.random_values(rng, (50, 8, 2, 16), cases.DTYPES[page_dtype]) for _ in "kv")
        k, v = (cases.random_values(rng, (tokens, 2, 16), cases.DTYPES["bf16"]) for _ in "kv")
        slots = rng.integers(-3, 403, tokens).astype(np.int32)
        got = harness.call("write_kv_pages", k_pages, v_pages, k, v, slots)
        for mine, theirs in zip(got, oracle.write_kv_pages(k_pages, v_pages, k, v, slots), strict=True):
            np.testing.assert_array_equal(np.asarray(mine).view(np.uint8), theirs.view(np.uint8))


def main() -> None:
    assert jax.default_backend() == "gpu", f"no GPU: {jax.devices()}"
    what, *names = sys.argv[1:]
    if what == "write":
        write()
        print("write: as the oracle has it")
    engine = what
    if what == "little-room":
        leave_little_room()
        engine = "fused"
    for name in names:
        attention(engine, name)
        print(f"{what} {name}: as the oracle has it", flush=True)
    print(f"jax_paged_attn {jpa.__version__}: {what} done")


if __name__ == "__main__":
    main()
