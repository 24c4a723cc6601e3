"""The build backend: scikit-build-core, and as requirements those packages of NVIDIA that the CUDA modules lack.

JPA_CUDA and JPA_CUDA12 come from `--config-settings=cmake.define.JPA_CUDA=ON` or from
SKBUILD_CMAKE_DEFINE="JPA_CUDA=ON;JPA_CUDA12=ON".
"""

import os
import shutil
from pathlib import Path

from scikit_build_core import build as _backend

# The hooks that pip calls by name and that need no change.
from scikit_build_core.build import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# All of one minor version: a newer nvvm beside an older ptxas does not work.
_COMPILER = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]
# For its headers: the library itself is opened at run time.
_CUBLAS = ["nvidia-cublas>=13.0,<14"]
# They take the place of the compiler's own parts in the module for CUDA 12, see cmake/cuda12.cmake.
_CUDA12 = [
    "nvidia-cuda-nvcc-cu12==12.9.*",
    "nvidia-cuda-runtime-cu12==12.9.*",
    "nvidia-cuda-cccl-cu12==12.9.*",
    "nvidia-cublas-cu12==12.9.*",
]

Settings = dict[str, str | list[str]] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """The packages that pip installs before it builds a wheel."""
    return _backend.get_requires_for_build_wheel(config_settings) + _cuda_requirements(config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """The packages that pip installs before it builds an editable install."""
    return _backend.get_requires_for_build_editable(config_settings) + _cuda_requirements(config_settings)


def _cuda_requirements(config_settings: Settings) -> list[str]:
    settings = config_settings or {}
    defines = os.environ.get("SKBUILD_CMAKE_DEFINE", "").split(";")
    cuda13, cuda12 = (
        settings.get(f"cmake.define.{option}") == "ON" or f"{option}=ON" in defines
        for option in ("JPA_CUDA", "JPA_CUDA12")
    )
    requirements = _CUDA12 if cuda12 else []
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if nvcc is None and (cuda13 or cuda12):
        requirements = requirements + _COMPILER
    if cuda13 and not (nvcc and (Path(nvcc).resolve().parent.parent / "include" / "cublasLt.h").exists()):
        requirements = requirements + _CUBLAS
    return requirements
