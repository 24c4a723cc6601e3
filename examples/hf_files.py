"""Files in Hugging Face's layout, read with checks: what is wrong with one is a `CheckpointError` of one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax import Array
from models.fields import CheckpointError, shown
from safetensors import SafetensorError, safe_open

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


def read_tensors(folder: Path) -> Iterator[tuple[Path, str, Array]]:
    """File, name and value of every tensor of the folder, one in memory at a time.

    Raises:
      CheckpointError: a file is missing, is cut off, or is something else.
    """
    for path in _tensor_files(folder):
        check_file(path)
        try:
            with safe_open(path, framework="flax") as file:
                for key in file.keys():  # noqa: SIM118 (the file is no dict)
                    yield path, key, file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: expected a whole safetensors file, got: {one_line(error)}") from error


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
