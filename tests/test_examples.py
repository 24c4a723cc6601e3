"""The examples: checkpoints, the committed model, training, and the command line of `generate.py`."""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint
import corpus
import evaluate
import generate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import train
from checkpoint import CheckpointError
from evaluate import bits_per_byte, ngram_bits_per_byte, windows
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from models import Decoder, DecoderConfig
from safetensors import numpy as safetensors_numpy
from safetensors.flax import load_file, save_file

from jax_paged_attn.nnx import Llama3RopeScaling, StepMetadata
from jax_paged_attn.serving import Engine, Request

EXAMPLES = corpus.HELDOUT_FILE.parent
SMALL = DecoderConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_ids=(0,),
)
SCALED = dataclasses.replace(SMALL, rope_theta=500.0, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 32))
TIED = dataclasses.replace(SCALED, tie_word_embeddings=True)


def small_model(config: DecoderConfig = SMALL) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(0))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 256, 40), jnp.int32)


# ---- checkpoints


@pytest.mark.parametrize("config", [SCALED, TIED], ids=["untied", "tied"])
def test_saved_models_load_unchanged(tmp_path: Path, config: DecoderConfig):
    model = small_model(config)
    checkpoint.save(model, tmp_path, dtype=jnp.float32)
    loaded = checkpoint.load(tmp_path)
    assert loaded.model.config == config
    np.testing.assert_array_equal(loaded.model(TOKENS), model(TOKENS))


def test_bfloat16_is_kept_or_converted(tmp_path: Path):
    model = small_model()
    checkpoint.save(model, tmp_path, dtype=jnp.bfloat16)
    kept, converted = checkpoint.load(tmp_path).model, checkpoint.load(tmp_path, dtype="float32").model
    assert kept.embed_tokens.embedding.dtype == jnp.bfloat16
    assert converted.embed_tokens.embedding.dtype == jnp.float32
    np.testing.assert_array_equal(
        np.asarray(converted.embed_tokens.embedding[...]),
        np.asarray(model.embed_tokens.embedding[...].astype(jnp.bfloat16).astype(jnp.float32)),
    )
    assert float(jnp.abs(kept(TOKENS) - model(TOKENS)).max()) < 0.2


def test_shards_and_tokenizer_file(tmp_path: Path):
    model = small_model()
    checkpoint.save(model, tmp_path, dtype=jnp.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, f in weight_map.items() if f == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[?]": 0, "paged": 1, "attention": 2}, unk_token="[?]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))

    loaded = checkpoint.load(tmp_path)
    np.testing.assert_array_equal(loaded.model(TOKENS), model(TOKENS))
    assert loaded.tokenizer.encode("attention paged") == [2, 1]
    assert loaded.tokenizer.decode([1, 2]) == "paged attention"


@pytest.mark.parametrize("on_mesh", [False, True], ids=["no mesh", "mesh"])
def test_loading_tells_how_far_it_is(tmp_path: Path, on_mesh: bool):
    model = small_model(TIED)
    checkpoint.save(model, tmp_path, dtype=jnp.bfloat16)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,)) if on_mesh else None
    told: list[tuple[int, int]] = []
    loaded = checkpoint.load(tmp_path, dtype="float32", mesh=mesh, progress=lambda *bytes_: told.append(bytes_)).model
    weights = jax.tree.leaves(nnx.state(loaded, nnx.Param))
    assert told == sorted(told)
    assert len(told) == len(weights)
    assert told[-1] == (sum(x.nbytes for x in weights),) * 2
    assert {x.sharding.is_fully_addressable and isinstance(x.sharding, NamedSharding) for x in weights} == {on_mesh}


LOAD_LARGE = """
import re, sys
from pathlib import Path
import jax
import checkpoint
from flax import nnx

def memory(kind):
    return 1024 * int(re.search(rf"{kind}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,)) if sys.argv[2] == "mesh" else None
checkpoint.load(Path(checkpoint.__file__).with_suffix(""))  # a small one, since the first needs memory of its own
before = memory("VmRSS")
model = checkpoint.load(Path(sys.argv[1]), mesh=mesh).model
grown = memory("VmHWM") - before
by_device = dict.fromkeys(jax.devices(), 0)
for weight in jax.tree.leaves(nnx.state(model, nnx.Param)):
    for shard in weight.addressable_shards:
        by_device[shard.device] += shard.data.nbytes
print(grown, *by_device.values())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, which tells the peak of a process")
@pytest.mark.parametrize("mode", ["one", "mesh"])
def test_a_model_is_never_in_memory_twice(tmp_path: Path, mode: str):
    """Files of one tensor each, since mapped ones count as memory; the largest has 32 MiB of some 230."""
    config = DecoderConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config_to_hf(config, "float32")))
    shutil.copy(EXAMPLES.parent / "tests" / "parity" / "mistral" / "tokenizer.json", tmp_path)
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    weight_map, sizes = {}, []
    for path, variable in nnx.to_flat_state(nnx.state(abstract, nnx.Param)):
        shape = variable.shape[::-1] if path[-1] == "kernel" else variable.shape
        name, file = checkpoint._hf_name(path), f"{len(sizes)}.safetensors"
        safetensors_numpy.save_file({name: np.zeros(shape, np.float32)}, tmp_path / file)
        weight_map[name] = file
        sizes.append(4 * math.prod(shape))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    total, largest = sum(sizes), max(sizes)
    assert largest < total / 6

    command = [sys.executable, "-c", LOAD_LARGE, str(tmp_path), mode]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    grown, *by_device = map(int, run.stdout.split())
    print(f"{grown / 2**20:.0f} MiB for {total / 2**20:.0f} MiB of weights")
    assert total < grown < 1.5 * total  # a tensor may be mapped, copied and placed at once
    share = total / 8 if mode == "mesh" else total
    assert share <= max(by_device) < 1.01 * share
    assert min(by_device) == (max(by_device) if mode == "mesh" else 0)


@functools.cache
def small_checkpoint() -> dict[str, bytes]:
    """The files of a saved model by name; many tests damage a copy of them."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(small_model(), Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def folder_with(path: Path, **changes: object) -> Path:
    """A checkpoint whose config.json has these fields changed, or left out where the value is `...`."""
    path.mkdir(exist_ok=True)
    for name, content in small_checkpoint().items():
        (path / name).write_bytes(content)
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return path


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type: expected 'llama' or .*, got 'gemma'"),
        ({"hidden_act": 3}, "hidden_act: expected 'silu', got 3"),
        ({"vocab_size": ...}, "vocab_size: expected an integer of at least 1, got no such field"),
        ({"vocab_size": "256"}, "vocab_size: expected an integer of at least 1, got '256'"),
        ({"hidden_size": 0}, "hidden_size: expected an integer of at least 1, got 0"),
        ({"hidden_size": None}, "hidden_size: expected an integer of at least 1, got null"),
        ({"hidden_size": 10**30}, "hidden_size: expected an integer"),
        ({"hidden_size": 30, "head_dim": None}, "hidden_size: expected a multiple of num_attention_heads = 4"),
        ({"intermediate_size": [48]}, r"intermediate_size: expected an integer of at least 1, got \[48\]"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers: expected an integer of at least 1, got 2.5"),
        ({"num_attention_heads": True}, "num_attention_heads: expected an integer of at least 1, got true"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: expected an integer of at least 1, got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads = 4, got 3"),
        ({"head_dim": 0}, "head_dim: expected an integer of at least 1, got 0"),
        ({"head_dim": 7}, "head_dim: expected an even number, got 7"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: expected an integer of at least 1, got 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a positive number, got '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number, got NaN"),
        ({"rope_theta": 0}, "rope_theta: expected a positive number, got 0"),
        ({"rope_theta": -1.0}, "rope_theta: expected a positive number, got -1.0"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters: rope_theta: expected a positive number, got 0"),
        ({"rope_scaling": "llama3"}, "rope_scaling: expected an object, got 'llama3'"),
        (
            {"rope_scaling": {"rope_type": "ntk"}},
            "rope_scaling: rope_type: expected 'default' or .*, got 'ntk'",
        ),
        (
            {"rope_scaling": {"type": "longrope"}},
            "rope_scaling: short_factor: expected a list of positive numbers",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor: expected a positive number, got no such field"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: original_max_position_embeddings: expected"),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": 0}}, "rope_scaling: factor: expected a positive number, got 0"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4}}, "low_freq_factor: expected less than"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false, got 'false'"),
        ({"attention_bias": 0}, "attention_bias: expected true or false, got 0"),
        ({"eos_token_id": 256}, r"eos_token_id: expected token ids in \[0, 256\), got 256"),
        ({"eos_token_id": ["2"]}, "eos_token_id: expected token ids"),
        ({"bos_token_id": -1}, "bos_token_id: expected token ids"),
        ({"torch_dtype": "int8"}, "torch_dtype: expected 'float32' or 'float16' or 'bfloat16', got 'int8'"),
        ({"torch_dtype": 16}, "torch_dtype: expected"),
        ({"num_hidden_layers": 3}, r"missing tensors: model\.layers\.2\.input_layernorm\.weight, .* and 6 more"),
        ({"num_hidden_layers": 1}, r"model\.safetensors: unexpected tensor 'model\.layers\.1\."),
        ({"intermediate_size": 40}, r"model\.safetensors: 'model.*': expected shape \(.*40.*\), got"),
        ({"bos_token_id": None}, r"tokenizer\.json: not found"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_fields_are_named(tmp_path: Path, changes: dict[str, object], message: str):
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(folder_with(tmp_path, **changes))
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("absent", [..., None], ids=["missing", "null"])
def test_fields_left_out_have_the_defaults_of_transformers(absent: object):
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    optional = dict.fromkeys(
        [
            *("model_type", "hidden_act", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
            *("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "attention_bias", "mlp_bias"),
            "tie_word_embeddings",
        ]
    )
    data = {**sizes, "num_attention_heads": 4, **(optional if absent is None else {})}
    assert checkpoint.config_from_hf(data, Path("config.json")) == DecoderConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (..., ..., (2,)),  # the default of transformers.LlamaConfig
        (..., None, (2,)),
        (None, ..., ()),  # said to be none
        (..., 5, (5,)),
        (None, [5, 6], (5, 6)),
        (7, [5, 7], (7, 5)),
        ([7, 8], ..., (7, 8)),
    ],
)
def test_stop_tokens_are_those_of_both_files(tmp_path: Path, config: object, generation: object, expected: object):
    folder_with(tmp_path, eos_token_id=config)
    data = {} if generation is ... else {"eos_token_id": generation}
    (tmp_path / "generation_config.json").write_text(json.dumps(data))
    assert checkpoint.load(tmp_path).model.config.eos_token_ids == expected


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 4039712\n"


def int8_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].astype(jnp.int8)}, folder / "model.safetensors")


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, size)


def index_of(*shards: object) -> Callable[[Path], object]:
    weight_map = {str(index): shard for index, shard in enumerate(shards)}
    return write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, ": expected a folder, got none"),
        (lambda folder: (shutil.rmtree(folder), folder.write_text("")), ": expected a folder, got a file"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: not found"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors: not found"),
        (write("config.json", b"{"), r"config\.json: not JSON"),
        (write("config.json", b"\xff\xfe{}"), r"config\.json: not JSON"),
        (write("config.json", b"[1]"), r"config\.json: expected a JSON object, got \[1\]"),
        (write("config.json", LFS_POINTER), r"config\.json: .* git-lfs pointer"),
        (write("model.safetensors", LFS_POINTER), r"model\.safetensors: .* git-lfs pointer to it: run `git lfs pull`"),
        (write("model.safetensors", b""), r"model\.safetensors: expected a whole safetensors file"),
        (write("model.safetensors", b"<!DOCTYPE html>"), r"model\.safetensors: expected a whole safetensors file"),
        (cut("model.safetensors", 20), r"model\.safetensors: expected a whole safetensors file"),
        (cut("model.safetensors", 40_000), r"model\.safetensors: expected a whole safetensors file"),
        (int8_weights, r"up_proj\.weight': expected float32 or float16 or bfloat16, got int8"),
        (
            index_of("absent.safetensors"),
            r"absent\.safetensors: not found, though .*\.index\.json names it",
        ),
        (index_of(), "weight_map: expected file names by tensor, got {}"),
        (index_of("model.safetensors", 3), "weight_map: expected file names by tensor, got {"),
        (write("model.safetensors.index.json", b"{}"), "weight_map: expected file names by tensor, got null"),
        (
            lambda folder: (
                shutil.copy(folder / "model.safetensors", folder / "again.safetensors"),
                index_of("model.safetensors", "again.safetensors")(folder),
            ),
            "expected in one file, got it in a second one",
        ),
        (write("tokenizer.json", b"{}"), r"tokenizer\.json: expected a tokenizer's JSON"),
        (write("tokenizer.json", b"not JSON"), r"tokenizer\.json: expected a tokenizer's JSON"),
        (write("tokenizer.json", LFS_POINTER), r"tokenizer\.json: .* git-lfs pointer"),
        (lambda folder: (folder / "tokenizer.json").mkdir(), r"tokenizer\.json: .* Is a directory"),
    ],
)
def test_damaged_folders_end_generate_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str,
):
    folder = folder_with(tmp_path / "model")
    damage(folder)
    with pytest.raises(SystemExit) as exit_info:
        run_generate(monkeypatch, f"--model={folder}")
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"generate\.py: error: {re.escape(str(folder))}.*{message}.*\n", error)


@pytest.mark.parametrize("config", [SCALED, TIED], ids=["untied", "tied"])
def test_transformers_agrees(tmp_path: Path, config: DecoderConfig):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs_config = transformers.LlamaConfig(**checkpoint.config_to_hf(config, "float32"))
    theirs = transformers.LlamaForCausalLM(theirs_config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # far from their nearly linear initial values
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load(tmp_path).model
    assert ours.config.rope_scaling == config.rope_scaling

    inputs = torch.tensor(np.asarray(TOKENS)[None], dtype=torch.long)
    with torch.no_grad():
        expected = theirs(inputs).logits[0].numpy()
        continued = theirs.generate(
            inputs[:, :20], attention_mask=torch.ones(1, 20, dtype=torch.long), max_new_tokens=24, do_sample=False
        )
    ours.init_cache(16, 4)
    for logits in (ours(TOKENS), ours(TOKENS, StepMetadata.whole_sequences(1, len(TOKENS), 4))):
        error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
        print(f"logits: relative error {error:.1e}")
        assert error < 1e-5
    engine = Engine(ours.served(), num_pages=16, page_size=4, buckets=(8, 16))
    generation = engine.submit(Request(TOKENS[:20].tolist(), 24, stop_tokens=config.eos_token_ids))
    engine.run()
    assert generation.tokens == [token for token in continued[0].tolist() if token not in config.eos_token_ids]


# ---- the text and the committed model


def test_training_text_holds_nothing_of_the_heldout_text():
    training, validation = (b"\n\n".join(d) for d in corpus.training_and_validation_documents())
    heldout = b"\n\n".join(corpus.heldout_documents())
    assert 250_000 < len(training) < 450_000
    assert 10_000 < len(validation) < 40_000

    def passages(text: bytes) -> set[bytes]:
        flat = re.sub(rb"[-+=|*\s]+", b" ", text)  # without the rules of tables and headings
        return {flat[i : i + 80] for i in range(len(flat) - 80)}

    assert not passages(heldout) & passages(training)
    assert not passages(heldout) & passages(validation)
    assert not passages(validation) & passages(training)


def test_a_changed_heldout_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changed = tmp_path / "heldout.txt"
    changed.write_bytes(corpus.HELDOUT_FILE.read_bytes() + b"\n")
    monkeypatch.setattr(corpus, "HELDOUT_FILE", changed)
    with pytest.raises(ValueError, match="sha256"):
        corpus.heldout_documents()


def test_every_byte_but_the_first_is_scored_once():
    stream = np.random.default_rng(0).integers(0, 256, 150).astype(np.uint8)
    inputs, targets, weights = windows(stream, 32)
    np.testing.assert_array_equal(targets[weights == 1], stream[1:])
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(windows(stream[:10], 32)[1][0, :9], stream[1:10])


def test_ngrams_of_a_known_distribution():
    assert ngram_bits_per_byte(b"ab" * 2000, b"ab" * 100, 2) < 0.05
    uniform = np.random.default_rng(0).integers(0, 4, 20000).astype(np.uint8).tobytes()
    assert abs(ngram_bits_per_byte(uniform[:15000], uniform[15000:], 1) - 2.0) < 0.01


@pytest.mark.one_release
def test_the_committed_model_on_heldout_text_through_the_paged_cache():
    files = list((EXAMPLES / "checkpoint").iterdir())
    assert {file.name for file in files} == {"config.json", "model.safetensors"}
    assert sum(file.stat().st_size for file in files) <= 6_000_000
    model = checkpoint.load(EXAMPLES / "checkpoint", dtype="float32").model
    part = corpus.token_stream(corpus.heldout_documents())[:6000]
    paged = bits_per_byte(model, part, paged=True)
    assert paged < 1.75  # the whole text: see examples/README.md
    assert abs(paged - bits_per_byte(model, part, paged=False)) < 1e-4


@pytest.mark.slow
def test_costs_of_cache_dtypes_on_the_committed_model():
    text = corpus.token_stream(corpus.heldout_documents())[:2000]
    training = corpus.token_stream(corpus.training_and_validation_documents()[0])
    prompts = evaluate.calibration_prompts(training, 256)
    assert len({prompt.tobytes() for prompt in prompts}) == 4
    assert {len(prompt) for prompt in prompts} == {256}
    costs = {cost.name: cost for cost in evaluate.cache_costs(EXAMPLES / "checkpoint", text, prompts)}
    f32 = costs.pop("f32")
    assert f32.divergence == 0.0
    assert f32.bytes_per_token == 2 * 5 * 64 * 4  # keys and values, layers, columns, bytes
    bounds = {"bf16": (0.0005, 2), "e4m3": (0.004, 4), "e5m2": (0.016, 4), "int8": (0.0005, 4)}
    for name, cost in costs.items():
        divergence, times_smaller = bounds[name.partition(",")[0]]
        assert 0.0 < cost.divergence < divergence, name
        assert abs(cost.bits - f32.bits) < 0.01, name
        assert cost.bytes_per_token * times_smaller == f32.bytes_per_token
    assert {"e4m3, no scales", "e4m3, calibrated", "int8, calibrated"} < set(costs)


@pytest.mark.one_release
def test_training_learns(capsys: pytest.CaptureFixture[str]):
    config = train.TrainConfig(steps=40, tokens=512, warmup=5, learning_rate=1e-2, average=0.9, evaluate_every=20)
    config_small = dataclasses.replace(SMALL, tie_word_embeddings=True)
    model, bits = train.train(config_small, config)
    validation = corpus.token_stream(corpus.training_and_validation_documents()[1])
    assert bits < 5.0  # 8 at the start
    assert abs(bits_per_byte(model, validation, paged=False) - bits) < 1e-3
    assert "step 40/40" in capsys.readouterr().out


# ---- the command line


def run_generate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    generate.main()


def test_generate_serves_prompts_together(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    prompts = ["A class definition", "The", "Slicings select a range of items in a sequence object"]
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    run_generate(monkeypatch, *options, "--max-new-tokens=40", "--temperature=0", "--num-pages=8", "--max-seqs=4")
    out = capsys.readouterr().out
    assert all(prompt in out for prompt in prompts)
    assert out.count("40 tokens, length") == 3
    assert "120 tokens in" in out
    assert "8 of 8 pages in use at the peak" in out
    assert ", 0 preemptions" not in out
    assert re.search(r"\d+ steps of \d+\.\d ms, \d+% of it the host's", out)
    assert re.search(r"prefix hit rate \d+%", out)
    assert f"jax {jax.__version__}" in out
    assert "\x1b" not in out  # no terminal, no control sequences


@pytest.mark.parametrize("cache_dtype", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("bf16", "fp8")), "int8"])
def test_generate_with_other_caches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache_dtype: str
):
    run_generate(monkeypatch, "--prompt=The following", "--max-new-tokens=30", f"--cache-dtype={cache_dtype}")
    assert "30 tokens, length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-pages=2"], "expected at most 32 tokens together"),
        (["--max-new-tokens=0"], "expected at least 1, got 0"),
        (["--temperature=hot"], "expected a number, got 'hot'"),
        (["--temperature=nan"], "expected at least 0, got nan"),
        (["--top-p=0"], "top_p: expected a number in (0, 1], got 0.0"),
        (["--top-p=1.5"], "expected at most 1, got 1.5"),
        (["--devices=99"], "--devices: expected at most"),
        (["--max-len=513"], "max_len: expected 1 to max_position_embeddings = 512, got 513"),
        (["--seed=-1"], "expected at least 0, got -1"),
        (["--seed=4294967296"], "expected at most 4294967295, got 4294967296"),
        (["--prompt=\udcff"], "expected UTF-8 text"),
        (["--cache-dtype=bf16", "--dtype=f32"], "--cache-dtype bf16: expected --dtype to be the same"),
        (["--prompt=" + "x" * 600], "prompt, max_new_tokens: expected at most 512 tokens together"),
    ],
)
def test_generate_refuses_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    with pytest.raises(SystemExit) as exit_info:
        run_generate(monkeypatch, *arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.one_release
def test_the_largest_seed_serves_several_prompts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run_generate(monkeypatch, "--seed=4294967295", "--prompt=The", "--prompt=A", "--max-new-tokens=2")
    assert capsys.readouterr().out.count("2 tokens, length") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "argument --steps: expected at least 1, got 0"),
        (["--steps=-3"], "argument --steps: expected at least 1, got -3"),
        (["--steps=2", "--out={file}"], "File exists"),
        (["--steps=2", "--out={file}/sub"], "Not a directory"),
    ],
)
def test_train_refuses_bad_input_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["train.py", *(text.format(file=tmp_path / "file") for text in arguments)])
    monkeypatch.setattr(train, "train", None)
    with pytest.raises(SystemExit) as exit_info:
        train.main()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_evaluate_refuses_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"--model={tmp_path}"])
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"evaluate.py: error: {tmp_path}/config.json: not found\n"
    stream = np.zeros(10, np.uint8)
    for bad in ({"stream": stream[:1]}, {"context": 0}, {"context": 1}, {"batch": 0}):
        with pytest.raises(ValueError, match="stream, context, batch: expected"):
            bits_per_byte(small_model(), **{"stream": stream, "paged": False, **bad})


MISSING_PACKAGES = """
import contextlib, io, runpy, sys

sys.path.insert(0, sys.argv[1])
import jax_paged_attn
before = set(sys.modules)
for script, package in [pair.split(":") for pair in sys.argv[2:]]:
    sys.modules[package] = None
    sys.argv[0] = script
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        runpy.run_path(f"{sys.argv[1]}/{script}", run_name="__main__")
    print(script, package, err.getvalue().splitlines())
    del sys.modules[package]
    for name in set(sys.modules) - before:
        if name.partition(".")[0] not in ("flax", "jax", "jaxlib", "numpy"):  # which cannot be imported twice
            del sys.modules[name]
"""


def test_a_missing_package_is_named():
    scripts = {
        "generate.py": ("flax", "rich", "safetensors"),
        "evaluate.py": ("flax", "safetensors"),
        "train.py": ("optax",),
    }
    pairs = [(script, package) for script, packages in scripts.items() for package in packages]
    arguments = [f"{script}:{package}" for script, package in pairs]
    command = [sys.executable, "-c", MISSING_PACKAGES, str(EXAMPLES), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        f"{script} {package} "
        + repr(
            [
                f"{script}: error: needs the package '{package}', which is not installed: "
                'pip install "jax-paged-attn[examples]"'
            ]
        )
        for script, package in pairs
    ]


def test_a_tokenizer_file_needs_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = folder_with(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for script, main in (("generate.py", generate.main), ("evaluate.py", evaluate.main)):
        monkeypatch.setattr(sys, "argv", [script, f"--model={folder}"])
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().err == (
            f"{script}: error: needs the package 'tokenizers', which is not installed: "
            'pip install "jax-paged-attn[examples]"\n'
        )
