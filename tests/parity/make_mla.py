# pyright: reportMissingImports=false
"""Makes `mla.npz` beside this file: what tpu-inference and tokamax give for calls of multi-head latent attention.

`python tests/parity/make_mla.py FOLDER`, in an environment with tokamax 0.0.17 and sympy, where FOLDER has the files of
tpu-inference 0.32.0's wheel (`pip download --no-deps`), whose dependencies are for TPUs. Both have plain JAX functions
beside their kernels; that of tokamax has no bf16 on CPUs. Inputs are made from seeds, so outputs are kept, and digests
of caches. `tests/test_mla_calls.py` compares with them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokamax._src.ops.experimental.mla import reference

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from make_rpa_v3 import defaults  # noqa: E402
from mla_calls import THEIRS, build  # noqa: E402


def tpu_inference(folder: str) -> tuple[Any, Any]:
    """The modules of both versions of the kernel, without the package's own `__init__`, which looks for TPUs."""
    package: Any = types.ModuleType("tpu_inference")
    package.__path__ = [f"{folder}/tpu_inference"]
    logger: Any = types.ModuleType("tpu_inference.logger")  # the real one imports vLLM
    logger.init_logger = lambda name: None
    sys.modules |= {"tpu_inference": package, "tpu_inference.logger": logger}
    sys.path.insert(0, folder)
    from tpu_inference.kernels.mla.v1 import kernel as first
    from tpu_inference.kernels.mla.v2 import kernel as second

    return first, second


def main(folder: str) -> None:
    first, second = tpu_inference(folder)
    runs = {"tpu-inference": first.ref_mla_ragged_paged_attention, "tokamax": reference.mla_attention}
    own: dict[str, dict[str, Any]] = {"tokamax": {"s_dtype": jax.numpy.float32}, "tpu-inference": {}}
    signatures = {
        "tpu-inference v1": defaults(first.mla_ragged_paged_attention),
        "tpu-inference": defaults(second.mla_ragged_paged_attention),
        "tokamax": defaults(reference.mla_attention),
    }
    results: dict[str, Any] = {"signatures": json.dumps(signatures)}
    for stack, calls in THEIRS.items():
        for call in calls:
            arrays = {name: jax.numpy.asarray(x) for name, x in build(call).items()}
            with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
                out, cache = runs[stack](**arrays, **call.keywords, **own[stack])
            results[f"{call.name}/out"] = np.asarray(out).astype(np.float32)[..., : call.latent_dim]
            results[f"{call.name}/cache"] = hashlib.sha256(np.asarray(cache).tobytes()).hexdigest()
    np.savez_compressed(HERE / "mla.npz", **results)


if __name__ == "__main__":
    main(sys.argv[1])
