# pyright: reportMissingImports=false
"""Makes `rpa-v3.npz` beside this file: what tokamax and tpu-inference give for calls of the RPA v3 family.

`python tests/parity/make_rpa_v3.py WHEEL`, in an environment with tokamax 0.0.17, where WHEEL is that of tpu-inference
0.32.0 (`pip download --no-deps`), whose dependencies are for TPUs. Both have plain JAX functions beside their kernels.
Inputs are made from seeds, so outputs are kept, and digests of caches. `tests/test_rpa_v3.py` compares with them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokamax
from tokamax._src.ops.batched_rpa import reference

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from rpa_calls import THEIRS, build  # noqa: E402


def tpu_inference(wheel: str) -> tuple[Any, Any]:
    """Both kernels' modules, without the package's own `__init__`, which looks for TPUs."""
    package: Any = types.ModuleType("tpu_inference")
    package.__path__ = [f"{wheel}/tpu_inference"]
    v3 = "tpu_inference.kernels.ragged_paged_attention.v3"
    sizes: Any = types.ModuleType(f"{v3}.tuned_block_sizes_hd64")  # the real one imports torch
    sizes.get_tuned_block_sizes = None
    sys.modules |= {"tpu_inference": package, sizes.__name__: sizes}
    sys.path.insert(0, wheel)
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel, kernel_hd64

    return kernel, kernel_hd64


def defaults(function: Callable[..., Any]) -> list[tuple[str, str, str]]:
    """Name, kind and default of each parameter."""
    parameters = inspect.signature(function).parameters.values()
    return [(x.name, x.kind.name, "" if x.default is x.empty else repr(x.default)) for x in parameters]


def main(wheel: str) -> None:
    kernel, hd64 = tpu_inference(wheel)
    runs = {
        "tokamax": reference.batched_ragged_paged_attention_reference,
        "tpu-inference": kernel.ref_ragged_paged_attention,
        "tpu-inference hd64": hd64.ref_ragged_paged_attention_hd64,
    }
    signatures = {
        "tokamax": defaults(tokamax.ops.ragged_paged_attention),
        "tpu-inference": defaults(kernel.ragged_paged_attention),
        "tpu-inference hd64": defaults(hd64.ragged_paged_attention_hd64),
    }
    results: dict[str, Any] = {"signatures": json.dumps(signatures)}
    for stack, calls in THEIRS.items():
        for call in calls:
            keywords = {name: value for name, value in call.keywords.items() if name != "scale_rule"}
            with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
                out, cache, *lse = runs[stack](**{k: jax.numpy.asarray(x) for k, x in build(call).items()}, **keywords)
            results[f"{call.name}/out"] = np.asarray(out).astype(np.float32)
            results[f"{call.name}/cache"] = hashlib.sha256(np.asarray(cache).tobytes()).hexdigest()
            if lse:
                results[f"{call.name}/lse"] = np.asarray(lse[0])
    np.savez_compressed(HERE / "rpa-v3.npz", **results)


if __name__ == "__main__":
    main(sys.argv[1])
