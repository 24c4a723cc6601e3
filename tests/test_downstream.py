"""The engines' C++ API for others: `examples/downstream`, a wheel on the CPU engine; a program that links `fused`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jax_paged_attn import __main__, _ffi

DOWNSTREAM = Path(__file__).parent.parent / "examples" / "downstream"

RUN = """
import jax, jax.numpy as jnp, numpy as np
import jax_paged_attn as jpa
from gated_attention import gated_paged_attention

rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
q, gate = draw(5, 8, 24), draw(5, 8, 24)
pages = draw(40, 16, 2, 24), draw(40, 16, 2, 24)
lengths = jnp.asarray([1, 100, 0, 97, 600], jnp.int32)  # one without keys, one longer than its table
tables = jnp.asarray(rng.permutation(40)[:35].reshape(5, 7), jnp.int32)

got = jax.jit(gated_paged_attention)(q, gate, *pages, tables, lengths)
expected = jax.nn.sigmoid(gate) * jpa.paged_attention(q, *pages, tables, lengths, implementation="reference")
error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
assert error < 1e-5, error
try:
    gated_paged_attention(q, gate, *pages, tables, lengths[:3])
except Exception as refused:
    assert "lengths: expected a row of q for each sequence" in str(refused), refused
else:
    raise SystemExit("lengths of another batch were taken")
print("relative error", error)
"""

# Without a GPU: the program links all of the engine and prints the scratch memory that a call takes.
CUDA_PROJECT = """
cmake_minimum_required(VERSION 3.22)
project(scratch LANGUAGES CXX)
find_package(jax_paged_attn 0.1 CONFIG REQUIRED COMPONENTS cuda)
find_package(CUDAToolkit 13 REQUIRED)
add_executable(scratch scratch.cc)
target_link_libraries(scratch PRIVATE jax_paged_attn::fused CUDA::cudart_static)
"""
CUDA_PROGRAM = """
#include <cstdio>
#include "cache/write.h"
#include "cache/write_cuda.h"
#include "engines/fused/run.h"
int main() {
  jpa::AttentionProblem problem = {};
  problem.q_dtype = problem.kv_dtype = jpa::DType::kBF16;
  problem.num_rows = 70;
  problem.num_q_heads = 32;
  problem.num_kv_heads = 8;
  problem.head_dim = problem.value_dim = 128;
  problem.page_size = 16;
  problem.num_seqs = 5;
  problem.max_pages = 9;
  std::printf("%lld", static_cast<long long>(jpa::fused::WorkspaceBytes(problem, {false, true})));
}
"""


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_cmakedir_holds_the_package():
    directory = Path(run(sys.executable, "-m", "jax_paged_attn", "--cmakedir").strip())
    assert directory == __main__.cmake_directory()
    assert (directory / "jax_paged_attn-config.cmake").is_file()
    # Wherever the wheel is unpacked: no path of the machine that built it.
    for file in directory.iterdir():
        assert 'PATHS "/' not in file.read_text()
        assert str(Path(__file__).parent.parent) not in file.read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_another_wheel_runs_the_engine(tmp_path: Path):
    source = shutil.copytree(DOWNSTREAM, tmp_path / "downstream")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    # Without isolation, against the installation under test.
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("gated_attention-*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    print(run(sys.executable, "-c", RUN, PYTHONPATH=str(tmp_path / "site"), JAX_PLATFORMS="cpu"))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_paged_attn._cuda") is None, reason="the libraries come with the module for CUDA 13"
)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA toolkit")
def test_a_program_links_the_cuda_engine(tmp_path: Path):
    (tmp_path / "CMakeLists.txt").write_text(CUDA_PROJECT)
    (tmp_path / "scratch.cc").write_text(CUDA_PROGRAM)
    cmake = (sys.executable, "-m", "cmake")
    run(*cmake, "-S", tmp_path, "-B", tmp_path / "build", f"-Djax_paged_attn_ROOT={__main__.cmake_directory()}")
    run(*cmake, "--build", tmp_path / "build")
    expected = _ffi.compiled("cuda").fused_workspace_bytes(
        *("bfloat16", "bfloat16", 70, 32, 8, 128, 128, 16, 5, 9), decode=False, batch_invariant=True, workspace_limit=0
    )
    assert run(tmp_path / "build" / "scratch") == str(expected)
