"""Llama checkpoints in Hugging Face's layout: config.json, model.safetensors (or shards with an index), tokenizer.json.

A checkpoint without tokenizer.json and with a vocabulary of 256 is one over bytes, like the one that `train.py` writes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import tokenizers
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from llama import Llama, LlamaConfig
from safetensors import safe_open
from safetensors.flax import save_file

from jax_paged_attn.nnx import Llama3RopeScaling


class CheckpointError(ValueError):
    """A folder that holds no checkpoint that this model can run; the message names the file and what was expected."""


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]:
        """Token ids, with what a text begins with."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens; U+FFFD where a character is incomplete."""
        ...


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model without a cache, and its tokenizer."""

    model: Llama
    tokenizer: Tokenizer


class ByteTokenizer:
    """UTF-8 bytes; a text begins with byte `bos`, which `decode` leaves out."""

    def __init__(self, bos: int):
        self._bos = bos

    def encode(self, text: str) -> list[int]:
        return [self._bos, *text.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t != self._bos).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: Path):
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def load(folder: Path, *, dtype: DTypeLike | None = None, implementation: str | None = None) -> Checkpoint:
    """Reads a checkpoint folder.

    Args:
      folder: with config.json, model.safetensors or model.safetensors.index.json, and mostly tokenizer.json.
      dtype: of weights and computation; None for the one that config.json names.
      implementation: engine of every attention; None for the best one.

    Raises:
      CheckpointError: a file is missing or is not a Llama's.
    """
    data = _read_json(folder / "config.json")
    config = config_from_hf(data, folder / "config.json")
    if (folder / "generation_config.json").exists():  # instruction-tuned models end their turns with tokens named here
        more = _token_ids(_read_json(folder / "generation_config.json").get("eos_token_id"))
        config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))
    dtype = jnp.dtype(dtype or data.get("dtype") or data.get("torch_dtype") or "float32")

    def build() -> Llama:
        return Llama(config, dtype=dtype, param_dtype=dtype, implementation=implementation, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(build)
    weights = nnx.state(model, nnx.Param)
    by_name = {_hf_name(path): (path, variable) for path, variable in nnx.to_flat_state(weights)}
    loaded: dict[tuple[Any, ...], Any] = {}
    for name, tensor in _tensors(folder):
        if name not in by_name:
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
                continue  # what older files repeat
            raise CheckpointError(f"{folder}: unexpected tensor {name!r}")
        path, variable = by_name.pop(name)
        if path[-1] == "kernel":
            tensor = tensor.T
        if tensor.shape != variable.shape:
            raise CheckpointError(f"{folder}: {name!r}: expected shape {variable.shape}, got {tensor.shape}")
        loaded[path] = variable.replace(tensor.astype(dtype))
    if by_name:
        raise CheckpointError(f"{folder}: missing tensors: {', '.join(sorted(by_name))}")
    nnx.update(model, nnx.from_flat_state(loaded))
    return Checkpoint(model, _tokenizer(folder, config))


def save(model: Llama, folder: Path, *, dtype: DTypeLike = jnp.bfloat16) -> None:
    """Writes config.json and model.safetensors with the weights in `dtype`; makes the folder if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_to_hf(model.config, jnp.dtype(dtype))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors: dict[str, Array] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        tensor = variable[...].astype(dtype)
        tensors[_hf_name(path)] = tensor.T if path[-1] == "kernel" else tensor
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def config_from_hf(data: dict[str, Any], source: Path) -> LlamaConfig:
    """The config of a Hugging Face config.json, old (`rope_scaling`) or new (`rope_parameters`)."""
    expected = {"model_type": "llama", "hidden_act": "silu"}
    for key, value in expected.items():
        if data.get(key, value) != value:
            raise CheckpointError(f"{source}: {key}: expected {value!r}, got {data[key]!r}")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{source}: rope type: expected 'default' or 'llama3', got {kind!r}")
    try:
        heads = data["num_attention_heads"]
        return LlamaConfig(
            vocab_size=data["vocab_size"],
            hidden_size=data["hidden_size"],
            intermediate_size=data["intermediate_size"],
            num_hidden_layers=data["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=data.get("num_key_value_heads") or heads,
            head_dim=data.get("head_dim") or data["hidden_size"] // heads,
            max_position_embeddings=data["max_position_embeddings"],
            rms_norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", data.get("rope_theta", 10000.0))),
            rope_scaling=_rope_scaling(rope) if kind == "llama3" else None,
            attention_bias=data.get("attention_bias", False),
            mlp_bias=data.get("mlp_bias", False),
            tie_word_embeddings=data.get("tie_word_embeddings", False),
            bos_token_id=data.get("bos_token_id"),
            eos_token_ids=_token_ids(data.get("eos_token_id")),
        )
    except KeyError as error:
        raise CheckpointError(f"{source}: missing {error.args[0]!r}") from error


def config_to_hf(config: LlamaConfig, dtype: jnp.dtype) -> dict[str, Any]:
    """What `config_from_hf` and `transformers` read."""
    data = dataclasses.asdict(config)
    eos = data.pop("eos_token_ids")
    scaling = data.pop("rope_scaling")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **data,
        "rope_scaling": {"rope_type": "llama3", **scaling} if scaling else None,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "torch_dtype": dtype.name,
    }


def _rope_scaling(rope: dict[str, Any]) -> Llama3RopeScaling:
    return Llama3RopeScaling(**{field.name: rope[field.name] for field in dataclasses.fields(Llama3RopeScaling)})


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _hf_name(path: tuple[Any, ...]) -> str:
    """("layers", 0, "mlp", "up_proj", "kernel") is "model.layers.0.mlp.up_proj.weight"."""
    *modules, leaf = path
    prefix = [] if modules[0] == "lm_head" else ["model"]
    return ".".join([*prefix, *map(str, modules), "bias" if leaf == "bias" else "weight"])


def _tensors(folder: Path) -> Iterator[tuple[str, Array]]:
    """Every tensor of the folder, one in memory at a time."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: not found")
        with safe_open(folder / name, framework="flax") as file:
            for key in file.keys():  # noqa: SIM118 (the file is no dict)
                yield key, file.get_tensor(key)


def _tokenizer(folder: Path, config: LlamaConfig) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return FileTokenizer(folder / "tokenizer.json")
    if config.vocab_size == 256 and config.bos_token_id is not None:
        return ByteTokenizer(config.bos_token_id)
    raise CheckpointError(f"{folder / 'tokenizer.json'}: not found, and the vocabulary is not bytes")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
