"""Programs that the oldest supported JAX exported with an earlier release still run, and give the same results."""

from __future__ import annotations

import artefacts
import harness
import jax
import numpy as np
import pytest
from cases import BY_NAME

# JAX calls the backend "gpu" and the platform it lowers for "cuda".
PLATFORM = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


@pytest.mark.parametrize("name", artefacts.PROGRAMS)
def test_exported_program_runs(name: str) -> None:
    program = artefacts.PROGRAMS[name]
    exported = jax.export.deserialize(bytearray((artefacts.FOLDER / f"{name}-{PLATFORM}.bin").read_bytes()))
    module = exported.mlir_module()
    assert all(f"@{target}" in module for target in program.targets_on(PLATFORM))
    for case in (BY_NAME[name] for name in (program.case, *program.others)):
        out, lse = exported.call(*artefacts.operands_of(case))
        harness.assert_close((np.asarray(out), np.asarray(lse)), harness.expected(case), case.dtype)


def test_every_program_has_a_file_for_each_platform() -> None:
    assert {path.name for path in artefacts.FOLDER.glob("*.bin")} == {
        f"{name}-{platform}.bin" for name in artefacts.PROGRAMS for platform in ("cpu", "cuda")
    }
