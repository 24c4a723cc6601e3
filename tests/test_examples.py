"""The examples: checkpoints, the committed model, training, and the command line of `generate.py`."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import checkpoint
import corpus
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
from llama import Llama, LlamaConfig
from safetensors.flax import load_file, save_file
from serving import Engine, Request

from jax_paged_attn.nnx import Llama3RopeScaling, StepMetadata

EXAMPLES = corpus.HELDOUT_FILE.parent
SMALL = LlamaConfig(
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


def small_model(config: LlamaConfig = SMALL) -> Llama:
    return Llama(config, rngs=nnx.Rngs(0))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 256, 40), jnp.int32)


# ---- checkpoints


@pytest.mark.parametrize("config", [SCALED, TIED], ids=["untied", "tied"])
def test_saved_models_load_unchanged(tmp_path: Path, config: LlamaConfig):
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


def test_the_byte_tokenizer_round_trips():
    tokenizer = checkpoint.ByteTokenizer(bos=0)
    tokens = tokenizer.encode("naïve →")
    assert tokens[0] == 0
    assert tokenizer.decode(tokens) == "naïve →"
    assert tokenizer.decode(tokens[:4]) == "na\ufffd"


def test_broken_checkpoints_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        checkpoint.load(tmp_path)
    checkpoint.save(small_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def write_config(**changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))

    write_config(model_type="mistral")
    with pytest.raises(CheckpointError, match="model_type: expected 'llama', got 'mistral'"):
        checkpoint.load(tmp_path)
    write_config(rope_scaling={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(CheckpointError, match="rope type"):
        checkpoint.load(tmp_path)
    write_config(num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.layers\.2\.input_layernorm\.weight"):
        checkpoint.load(tmp_path)
    write_config(num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'model\.layers\.1\."):
        checkpoint.load(tmp_path)
    write_config(intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"expected shape \(.*40.*\), got"):
        checkpoint.load(tmp_path)
    write_config(bos_token_id=None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not found"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        checkpoint.load(tmp_path)
    write_config()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not found"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("config", [SCALED, TIED], ids=["untied", "tied"])
def test_transformers_agrees(tmp_path: Path, config: LlamaConfig):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs_config = transformers.LlamaConfig(**checkpoint.config_to_hf(config, jnp.dtype("float32")))
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
    engine = Engine(ours, num_pages=16, page_size=4, buckets=(8, 16))
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


def test_the_committed_model_on_heldout_text_through_the_paged_cache():
    files = list((EXAMPLES / "checkpoint").iterdir())
    assert {file.name for file in files} == {"config.json", "model.safetensors"}
    assert sum(file.stat().st_size for file in files) <= 6_000_000
    model = checkpoint.load(EXAMPLES / "checkpoint", dtype="float32").model
    part = corpus.token_stream(corpus.heldout_documents())[:6000]
    paged = bits_per_byte(model, part, paged=True)
    assert paged < 1.75  # the whole text: see examples/README.md
    assert abs(paged - bits_per_byte(model, part, paged=False)) < 1e-4


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
    assert f"jax {jax.__version__}" in out
    assert "\x1b" not in out  # no terminal, no control sequences


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8", "int8"])
def test_generate_with_other_caches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache_dtype: str
):
    run_generate(monkeypatch, "--prompt=The following", "--max-new-tokens=30", f"--cache-dtype={cache_dtype}")
    assert "30 tokens, length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=/nowhere"], "config.json: not found"),
        (["--num-pages=2"], "expected at most 32 tokens together"),
        (["--max-new-tokens=0"], "expected at least 1, got 0"),
        (["--temperature=hot"], "expected a number, got 'hot'"),
        (["--cache-dtype=bf16", "--dtype=f32"], "--cache-dtype bf16: expected --dtype to be the same"),
        (["--prompt=" + "x" * 600], "prompt"),
    ],
)
def test_generate_refuses_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    with pytest.raises(SystemExit) as exit_info:
        run_generate(monkeypatch, *arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
