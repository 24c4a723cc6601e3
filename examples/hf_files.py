"""Files in Hugging Face's layout, read with checks: what is wrong with one is a `CheckpointError` of one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from models.fields import CheckpointError, shown
from safetensors import SafetensorError, safe_open

# The names that safetensors files have for dtypes.
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"},
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_file(path: Path) -> None:
    """Raises `CheckpointError` if there is no such file, or if it is what git-lfs left in its place."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a file that can be read, got: {error.strerror}") from None
    if start == _LFS_POINTER:
        raise CheckpointError(f"{path}: expected the file itself, got a git-lfs pointer to it: run `git lfs pull`")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CheckpointError: the file is missing or holds something else.
    """
    check_file(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {shown(data)}")
    return data


def read_tensors(folder: Path) -> Iterator[tuple[Path, str, np.ndarray]]:
    """File, name and value of every tensor of the folder.

    The values are views of mapped files, of which one is open at a time: only what is copied from them is read.

    Raises:
      CheckpointError: a file is missing, is cut off, or is something else.
    """
    for path in _tensor_files(folder):
        check_file(path)
        try:
            with safe_open(path, framework="numpy"):  # which checks the header and the size
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{path}: expected a whole safetensors file, got: {one_line(error)}") from error
        for name, tensor in _mapped(path):
            yield path, name, tensor


def _mapped(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a checked file: the length of its header, the header in JSON, and the numbers."""
    file = np.memmap(path, np.uint8, mode="r")
    start = 8 + int.from_bytes(file[:8].tobytes(), "little")
    header = json.loads(file[8:start].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {name!r}: expected a dtype of {', '.join(_DTYPES)}, got {entry['dtype']}")
        begin, end = entry["data_offsets"]
        numbers = file[start + begin : start + end].view(jnp.dtype(_DTYPES[entry["dtype"]]))
        yield name, numbers.reshape(entry["shape"])


def _tensor_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index}: weight_map: expected file names by tensor, got {shown(shards)}")
    files = [folder / name for name in sorted(set(shards.values()))]
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path}: not found, though {index.name} names it")
    return files


def one_line(error: BaseException) -> str:
    """The error's message, however many lines it has."""
    return " ".join(str(error).split())
