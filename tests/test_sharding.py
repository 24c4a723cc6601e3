"""Many devices: `sharded.py` in a process with eight CPU devices, and two processes that share a mesh.

JAX has as many CPU devices as XLA_FLAGS said when it started, so such tests need processes of their own, and no other
test sees more devices than before.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent


def environment(devices: int) -> dict[str, str]:
    """For a process with so many CPU devices that finds the suite's own modules."""
    paths = [str(HERE), str(HERE.parent / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        "family",
        pytest.param("partitioned and not family", marks=pytest.mark.partitioning),
        pytest.param("not partitioned and not family", marks=pytest.mark.partitioning),
    ],
)
def test_on_eight_devices(part: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", part]
    done = subprocess.run(
        [*command, str(HERE / "sharded.py")], env=environment(8), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.skipif(not (HERE.parent / "benchmarks").is_dir(), reason="needs the benchmarks of a checkout")
def test_two_gpus_are_nearly_twice_as_fast() -> None:
    command = [sys.executable, "-m", "benchmarks.sharded", "--require", "1.9"]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


TWO_PROCESSES = """
import sys, jax, numpy as np
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec as P
import sharded
mesh = sharded.mesh_of(x=2, y=2)
assert len({device.process_index for device in mesh.devices[:, 0]}) == 2  # sequences by process
problem = sharded.Problem.of(sharded.DECODE)
operands = sharded.finite(problem.operands)
specs = problem.specs(rows="x", kv_heads="y", heads="y")

def place(x, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

for derivative, collectives in (("forward", set()), ("gradient", {"all-reduce"})):
    function = sharded.derived(problem.attend, derivative)
    placed = [place(x, spec) for x, spec in zip(operands, specs, strict=True)]
    compiled = jax.jit(function).lower(*placed).compile()
    assert set(sharded.collectives(compiled)) == collectives
    with jax.default_device(jax.local_devices()[0]):
        want = jax.device_get(jax.jit(function)(*operands))
    for got, whole in zip(compiled(*placed), want, strict=True):
        for shard in got.addressable_shards:
            np.testing.assert_allclose(shard.data, whole[shard.index], rtol=1e-5, atol=1e-5)
print("same")
"""


def test_on_two_processes() -> None:
    """Sequences by process, heads by the devices of each: forward without a collective, gradients with a sum."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, port, str(rank)],
            env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-4000:]
            assert out.splitlines()[-1] == "same"  # after what the collectives say of their connections
    finally:
        for process in processes:
            process.kill()
