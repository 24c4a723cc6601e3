"""Checkpoints in Hugging Face's layout: config.json, model.safetensors (or shards with an index), tokenizer.json.

`models` has the families that load.

A checkpoint without tokenizer.json and with a vocabulary of 256 is one over bytes, like the one that `train.py` writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hf_files import check_file, read_json, read_tensors
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from models import CheckpointError, Decoder, DecoderConfig, config_from_hf, family_of
from models.family import Tensor, Tensors
from models.fields import Fields
from models.llama import config_to_hf
from safetensors.flax import save_file

from jax_paged_attn.serving import ByteTokenizer, FileTokenizer, Tokenizer

__all__ = [
    "ByteTokenizer",
    "Checkpoint",
    "CheckpointError",
    "FileTokenizer",
    "Tokenizer",
    "config_from_hf",
    "config_to_hf",
    "load",
    "save",
]

_DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model without a cache, and its tokenizer."""

    model: Decoder
    tokenizer: Tokenizer


def load(
    folder: Path,
    *,
    dtype: DTypeLike | None = None,
    max_len: int | None = None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
    axis: str = "model",
    progress: Callable[[int, int], object] | None = None,
) -> Checkpoint:
    """Reads a checkpoint folder, a tensor at a time: no more than one is in the host's memory.

    Args:
      folder: with config.json, model.safetensors or model.safetensors.index.json, and mostly tokenizer.json.
      dtype: of weights and computation; None for the one that config.json names.
      max_len: the longest context to be served, in tokens; None for the model's. See `models.family.Family.config`.
      implementation: engine of every attention; None for the best one.
      mesh, axis: for tensor parallelism over this axis, as `Decoder.shard` does it. Each device's share of a tensor
        goes there straight from the file. None for the default device.
      progress: called after each tensor with the bytes of weights that are loaded, and those of all.

    Raises:
      ValueError: the model has no contexts of `max_len` tokens, or is not to be split so; see `Decoder.shard`.
      CheckpointError: a file is missing, is damaged, or belongs to no model here; the message names it, in one line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder, got {'a file' if folder.exists() else 'none'}")
    source = folder / "config.json"
    data = read_json(source)
    fields = Fields(data, source)
    family = family_of(fields)
    config = family.config(fields, max_len)
    generation_file = folder / "generation_config.json"
    if generation_file.exists():
        config = _with_stop_tokens_of(Fields(read_json(generation_file), generation_file), config, data)
    if dtype is None:
        dtype = _dtype(fields)

    def build() -> Decoder:
        return family.decoder(config, dtype=dtype, param_dtype=dtype, implementation=implementation, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(build)
    shardings = {} if mesh is None else model.shardings(mesh, axis)
    placing = _Placing(shardings, progress or (lambda done, total: None))
    _load_weights(model, folder, family.tensors(read_tensors(folder), config), placing)
    if mesh is not None:
        model.shard(mesh, axis)
    return Checkpoint(model, _tokenizer(folder, config))


@dataclasses.dataclass(frozen=True)
class _Placing:
    """How weights get to their devices.

    Attributes:
      shardings: by path in the model; the default device for those without.
      progress: see `load`.
    """

    shardings: dict[tuple[Any, ...], NamedSharding]
    progress: Callable[[int, int], object]

    def place(self, path: tuple[Any, ...], tensor: Tensor, dtype: jnp.dtype) -> Array:
        """The tensor on its devices, each share read and cast by itself. Kernels are transposed there."""

        def piece(index: Any) -> np.ndarray:
            return np.array(tensor[index], dtype)

        sharding, is_kernel = self.shardings.get(path), path[-1] == "kernel"
        if sharding is None:
            placed = jax.device_put(piece((slice(None),) * len(tensor.shape)))
            return (placed.T if is_kernel else placed).block_until_ready()
        if not is_kernel:
            return jax.make_array_from_callback(tensor.shape, sharding, piece).block_until_ready()
        as_in_file = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[::-1]))
        placed = jax.make_array_from_callback(tensor.shape, as_in_file, piece)
        return jax.device_put(placed.T, sharding).block_until_ready()


def _load_weights(model: Decoder, folder: Path, tensors: Tensors, placing: _Placing) -> None:
    """Puts the folder's tensors in the place of the model's abstract weights."""
    by_name = {_hf_name(path): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    missing = dict.fromkeys(by_name)
    loaded: dict[tuple[Any, ...], Any] = {}
    total = sum(math.prod(variable.shape) * variable.dtype.itemsize for _, variable in by_name.values())
    done = 0
    for file, name, tensor in tensors:
        if name not in by_name:
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
                continue  # what older files repeat
            raise CheckpointError(f"{file}: unexpected tensor {name!r}")
        if name not in missing:
            raise CheckpointError(f"{file}: {name!r}: expected in one file, got it in a second one")
        del missing[name]
        path, variable = by_name[name]
        shape = variable.shape[::-1] if path[-1] == "kernel" else variable.shape
        if tensor.shape != shape:
            raise CheckpointError(f"{file}: {name!r}: expected shape {shape}, got {tensor.shape}")
        if tensor.dtype.name not in _DTYPES:
            raise CheckpointError(f"{file}: {name!r}: expected {' or '.join(_DTYPES)}, got {tensor.dtype}")
        placed = placing.place(path, tensor, variable.dtype)
        loaded[path] = variable.replace(placed)
        done += placed.nbytes
        placing.progress(done, total)
    if missing:
        first = ", ".join(sorted(missing)[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"{folder}: missing tensors: {first}{more}")
    nnx.update(model, nnx.from_flat_state(loaded))


def save(model: Decoder, folder: Path, *, dtype: DTypeLike = jnp.bfloat16) -> None:
    """Writes config.json and model.safetensors with the weights in `dtype`; makes the folder if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_to_hf(model.config, jnp.dtype(dtype).name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors: dict[str, Array] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        tensor = variable[...].astype(dtype)
        tensors[_hf_name(path)] = tensor.T if path[-1] == "kernel" else tensor
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _with_stop_tokens_of(generation: Fields, config: DecoderConfig, data: dict[str, Any]) -> DecoderConfig:
    """Adds the end tokens of generation_config.json, where instruction-tuned models name those of their turns."""
    named = generation.token_ids("eos_token_id", config.vocab_size)
    if named and "eos_token_id" not in data:  # a default counts where neither file names any
        return dataclasses.replace(config, eos_token_ids=named)
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *named))))


def _dtype(fields: Fields) -> str:
    """The dtype that config.json names, under its new or its old name."""
    return fields.choice("dtype", _DTYPES, fields.choice("torch_dtype", _DTYPES, "float32"))


def _hf_name(path: tuple[Any, ...]) -> str:
    """("layers", 0, "mlp", "up_proj", "kernel") is "model.layers.0.mlp.up_proj.weight"."""
    *modules, leaf = (part for part in path if part != "attention")
    prefix = [] if modules[0] == "lm_head" else ["model"]
    ours = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    return ".".join([*prefix, *map(str, modules), str(ours.get(leaf, leaf))])


def _tokenizer(folder: Path, config: DecoderConfig) -> Tokenizer:
    if (folder / "tokenizer.json").exists():
        check_file(folder / "tokenizer.json")
        try:
            return FileTokenizer(folder / "tokenizer.json")
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if config.vocab_size == 256 and config.bos_token_id is not None:
        return ByteTokenizer(config.bos_token_id)
    raise CheckpointError(f"{folder / 'tokenizer.json'}: not found, and the vocabulary is not bytes")
