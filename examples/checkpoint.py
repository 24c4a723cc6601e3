"""Checkpoints in Hugging Face's layout: config.json, model.safetensors (or shards with an index), tokenizer.json.

`families.py` says which kinds of models there are.

A checkpoint without tokenizer.json and with a vocabulary of 256 is one over bytes, like the one that `train.py` writes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import mxfp4
from families import config_from_hf
from flax import nnx
from hf_files import CheckpointError, Fields, check_file, read_json, read_tensors
from jax import Array
from jax.typing import DTypeLike
from llama import Llama, LlamaConfig
from safetensors.flax import save_file

from jax_paged_attn.rope import Llama3RopeScaling, RopeScaling
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
# Fields of `LlamaConfig` that are other families'.
_NO_FIELDS_OF_A_LLAMA = (
    *("qk_norm", "sliding_windows", "rotary_dim", "experts", "dense_layers", "local_rope_theta", "sinks"),
    *("hidden_act", "swiglu_limit"),
    *("norm_offset", "sandwich_norms", "embedding_scale", "attention_scale", "attention_soft_cap", "logit_soft_cap"),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model without a cache, and its tokenizer."""

    model: Llama
    tokenizer: Tokenizer


def load(folder: Path, *, dtype: DTypeLike | None = None, implementation: str | None = None) -> Checkpoint:
    """Reads a checkpoint folder.

    Args:
      folder: with config.json, model.safetensors or model.safetensors.index.json, and mostly tokenizer.json.
      dtype: of weights and computation; None for the one that config.json names.
      implementation: engine of every attention; None for the best one.

    Raises:
      CheckpointError: a file is missing, is damaged, or belongs to no model here; the message names it, in one line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder, got {'a file' if folder.exists() else 'none'}")
    source = folder / "config.json"
    data = read_json(source)
    config = config_from_hf(data, source)
    generation_file = folder / "generation_config.json"
    if generation_file.exists():
        config = _with_stop_tokens_of(Fields(read_json(generation_file), generation_file), config, data)
    if dtype is None:
        dtype = _dtype(Fields(data, source))

    def build() -> Llama:
        return Llama(config, dtype=dtype, param_dtype=dtype, implementation=implementation, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(build)
    _load_weights(model, folder, jnp.dtype(dtype))
    return Checkpoint(model, _tokenizer(folder, config))


def _load_weights(model: Llama, folder: Path, dtype: jnp.dtype) -> None:
    """Puts the folder's tensors in the place of the model's abstract weights."""
    by_name = {_hf_name(path): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    missing = dict.fromkeys(by_name)
    loaded: dict[tuple[Any, ...], Any] = {}
    for file, name, tensor in _in_parts(_dequantised(read_tensors(folder)), model.config):
        if name not in by_name:
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
                continue  # what older files repeat
            raise CheckpointError(f"{file}: unexpected tensor {name!r}")
        if name not in missing:
            raise CheckpointError(f"{file}: {name!r}: expected in one file, got it in a second one")
        del missing[name]
        path, variable = by_name[name]
        if path[-1] == "kernel":
            tensor = tensor.T
        if tensor.shape != variable.shape:
            raise CheckpointError(f"{file}: {name!r}: expected shape {variable.shape}, got {tensor.shape}")
        if tensor.dtype.name not in _DTYPES:
            raise CheckpointError(f"{file}: {name!r}: expected {' or '.join(_DTYPES)}, got {tensor.dtype}")
        loaded[path] = variable.replace(tensor.astype(dtype))
    if missing:
        first = ", ".join(sorted(missing)[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"{folder}: missing tensors: {first}{more}")
    nnx.update(model, nnx.from_flat_state(loaded))


def _dequantised(tensors: Iterable[tuple[Path, str, Array]]) -> Iterator[tuple[Path, str, Array]]:
    """The tensors, where gpt-oss has MXFP4 the numbers that blocks and scales stand for, `[E, inputs, outputs]`."""
    halves: dict[str, dict[str, Array]] = {}
    for file, name, tensor in tensors:
        stem, _, kind = name.rpartition("_")
        if kind not in ("blocks", "scales") or tensor.dtype != jnp.uint8:
            yield file, name, tensor
            continue
        halves.setdefault(stem, {})[kind] = tensor
        if len(halves[stem]) == 2:
            both = halves.pop(stem)
            if both["blocks"].shape != (*both["scales"].shape, 16):
                shapes = both["blocks"].shape, both["scales"].shape
                raise CheckpointError(
                    f"{file}: {stem!r}: expected blocks [..., G, 16] and scales [..., G], got {shapes}"
                )
            yield file, stem, mxfp4.dequantised(both["blocks"], both["scales"]).swapaxes(-1, -2)
    for stem, one in halves.items():
        raise CheckpointError(f"{stem!r}: expected blocks and scales, got {next(iter(one))} alone")


def _in_parts(tensors: Iterable[tuple[Path, str, Array]], config: LlamaConfig) -> Iterator[tuple[Path, str, Array]]:
    """The tensors under Llama's names; those that hold several projections, as Phi 3 has them, are cut."""
    heads = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
    parts = {
        "qkv_proj": (("q_proj", "k_proj", "v_proj"), [number * config.head_dim for number in heads]),
        "gate_up_proj": (("gate_proj", "up_proj"), [config.intermediate_size] * 2),
    }
    for file, original, tensor in tensors:
        name = original.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's names
        for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(f".{theirs}.weight", f".{ours}.weight")
        module = name.split(".")[-2] if "." in name else ""
        names, sizes = parts.get(module, ((), []))
        if not names or len(tensor) != sum(sizes):
            yield file, name, tensor
            continue
        ends = list(itertools.accumulate(sizes))
        for part, size, end in zip(names, sizes, ends, strict=True):
            yield file, name.replace(module, part), tensor[end - size : end]


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


def config_to_hf(config: LlamaConfig, dtype: jnp.dtype) -> dict[str, Any]:
    """What `config_from_hf` and `transformers` read, for a Llama.

    Raises:
      ValueError: the model has what no Llama has.
    """
    data = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NO_FIELDS_OF_A_LLAMA}
    defaults = {field.name: field.default for field in dataclasses.fields(LlamaConfig)}
    is_llama = all(getattr(config, name) == defaults[name] for name in _NO_FIELDS_OF_A_LLAMA)
    if not is_llama or not isinstance(config.attention_bias, bool) or not _is_llama3(config.rope_scaling):
        raise ValueError(f"config: expected a Llama's, which alone can be saved, got {config}")
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


def _is_llama3(scaling: RopeScaling | None) -> bool:
    return scaling is None or isinstance(scaling, Llama3RopeScaling)


def _with_stop_tokens_of(generation: Fields, config: LlamaConfig, data: dict[str, Any]) -> LlamaConfig:
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


def _tokenizer(folder: Path, config: LlamaConfig) -> Tokenizer:
    if (folder / "tokenizer.json").exists():
        check_file(folder / "tokenizer.json")
        try:
            return FileTokenizer(folder / "tokenizer.json")
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if config.vocab_size == 256 and config.bos_token_id is not None:
        return ByteTokenizer(config.bos_token_id)
    raise CheckpointError(f"{folder / 'tokenizer.json'}: not found, and the vocabulary is not bytes")
