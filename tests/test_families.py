"""Every family of models against what `transformers` computes: see tests/parity/make.py."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint import CheckpointError
from flax import nnx
from hf_files import read_tensors
from models import Decoder, config_from_hf
from models.deepseek import GroupedExperts
from models.gemma4_decoder import LayerKind
from models.gpt_oss import ClampedExperts
from models.latent import LatentAttention
from models.layers import Build, Experts, Latent
from safetensors.numpy import load_file, save_file

from jax_paged_attn.nnx import CacheVariable, StepMetadata, calibrate
from jax_paged_attn.rope import (
    DynamicRopeScaling,
    LinearRopeScaling,
    LongRopeScaling,
    ProportionalRopeScaling,
    YarnRopeScaling,
)
from jax_paged_attn.serving import Engine, Request

PARITY = Path(__file__).parent / "parity"
FOLDERS = sorted(path.parent for path in PARITY.glob("*/config.json"))
PAGE_SIZE = 4


def relative_error(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


# Each of these differs from another one by little; the long tail has them.
ALIKE = ("deepseek-v2", "gemma2", "llama-dynamic", "llama-linear", "llama-yarn", "mixtral", "olmo2", "qwen2", "smollm3")
MODELS = [pytest.param(folder, id=folder.name, marks=[pytest.mark.slow] * (folder.name in ALIKE)) for folder in FOLDERS]


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest) -> tuple[Decoder, dict[str, np.ndarray]]:
    folder = request.param
    found = checkpoint.load(folder)
    assert found.tokenizer.encode("t3 t1") == [3, 1]
    return found.model, load_file(folder / "expected.safetensors")


@nnx.jit
def compiled(model: Decoder, tokens: jax.Array, step: StepMetadata) -> jax.Array:
    """The model as one program, which costs less than its operations one by one."""
    return model(tokens, step)


def test_there_are_all_families() -> None:
    kinds = {json.loads((folder / "config.json").read_text())["model_type"] for folder in FOLDERS}
    assert kinds == {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "phi3",
        "mixtral",
        "qwen3_moe",
        "gpt_oss",
        "olmo2",
        "smollm3",
        "deepseek_v2",
        "deepseek_v3",
    }


def test_logits_are_those_of_transformers(loaded: tuple[Decoder, dict[str, np.ndarray]]) -> None:
    """Dense, over pages at once, over pages in chunks, and with joined projections."""
    model, want = loaded
    tokens = jnp.asarray(want["tokens"], jnp.int32)
    length = len(tokens)
    assert relative_error(model(tokens), want["logits"]) < 1e-5
    model.init_cache(length // PAGE_SIZE, PAGE_SIZE)
    whole = StepMetadata.whole_sequences(1, length, PAGE_SIZE)
    assert relative_error(compiled(model, tokens, whole), want["logits"]) < 1e-5

    chunks = []
    for begin, end in ((0, 13), (13, 14), (14, length)):
        step = StepMetadata(
            positions=whole.positions[begin:end],
            slot_mapping=whole.slot_mapping[begin:end],
            block_tables=whole.block_tables,
            kv_lens=jnp.array([end], jnp.int32),
            cu_q_lens=jnp.array([0, end - begin], jnp.int32),
            num_seqs=jnp.int32(1),
        )
        chunks.append(compiled(model, tokens[begin:end], step))
    assert relative_error(jnp.concatenate(chunks), want["logits"]) < 1e-5


def test_engines_give_the_greedy_tokens_of_transformers(loaded: tuple[Decoder, dict[str, np.ndarray]]) -> None:
    """Requests that share a prefix, in chunks, in pools that make them preempt; layers with windows give pages back."""
    model, want = loaded
    greedy = want["greedy"].tolist()
    prompt, windows = greedy[:18], model.config.windows
    window_pages = 12 if None in windows else 6
    pools: dict[str, Any] = {"num_pages": 24, "window_pages": window_pages, "page_size": PAGE_SIZE}
    engine = Engine(model.served(), **pools, max_seqs=3, buckets=(3, 8), decode_buckets=(3,), decode_steps=2)
    assert [pool.num_pages for pool in engine.pools] == [24 if window is None else window_pages for window in windows]
    generations = [engine.submit(Request(prompt, len(greedy) - 18)) for _ in range(3)]
    engine.run()
    assert engine.stats.preemptions >= 1
    before = engine.submit(Request(prompt, 1))
    engine.run()
    found = engine.stats.cached_tokens
    late = engine.submit(Request(prompt, len(greedy) - 18))
    engine.run()
    assert [generation.tokens for generation in (*generations, before, late)] == [*[greedy] * 3, greedy[:19], greedy]
    assert engine.stats.cached_tokens == found + 16


def test_joined_projections_change_nothing(loaded: tuple[Decoder, dict[str, np.ndarray]]) -> None:
    model, want = loaded
    model.fuse()  # the last test of this model
    assert relative_error(model(jnp.asarray(want["tokens"], jnp.int32)), want["logits"]) < 1e-5


def test_dynamic_frequencies_are_those_of_the_longest_context() -> None:
    """Beyond the original length `transformers` has the frequencies of each length: here those of all 96 tokens."""
    folder = PARITY / "llama-dynamic"
    want = load_file(folder / "expected.safetensors")
    tokens = jnp.asarray(want["long_tokens"], jnp.int32)
    model = checkpoint.load(folder, max_len=len(tokens)).model
    assert model.served().max_len == len(tokens) > 64
    assert relative_error(model(tokens), want["long_logits"]) < 1e-5
    model.init_cache(len(tokens) // PAGE_SIZE, PAGE_SIZE)
    paged = model(tokens, StepMetadata.whole_sequences(1, len(tokens), PAGE_SIZE))
    assert relative_error(paged, want["long_logits"]) < 1e-5


def test_other_models_reach_no_further_than_they_were_made_for() -> None:
    for name, max_len in (("llama-yarn", 65), ("mistral", 0), ("llama-dynamic", 0)):
        with pytest.raises(ValueError, match=f"max_len: expected 1 to max_position_embeddings = 64, got {max_len}"):
            checkpoint.load(PARITY / name, max_len=max_len)


# ---- fields of config.json


def config_of(name: str, max_len: int | None = None, **changes: Any) -> Any:
    """The config of a folder with some fields changed, or left out where the value is `...`."""
    data = {**json.loads((PARITY / name / "config.json").read_text()), **changes}
    return config_from_hf({key: value for key, value in data.items() if value is not ...}, Path("config.json"), max_len)


def test_what_is_special_is_read() -> None:
    assert config_of("mistral").sliding_windows == (7, 7, 7)
    assert config_of("mistral", sliding_window=None).sliding_windows is None
    assert config_of("mistral", sliding_window=...).sliding_windows == (4096,) * 3
    assert config_of("qwen2").sliding_windows == (None, 9, 9)
    assert config_of("qwen2", layer_types=...).sliding_windows == (None, 9, 9)
    assert config_of("qwen2", layer_types=None, max_window_layers=0).sliding_windows == (9, 9, 9)
    assert config_of("qwen2", use_sliding_window=False).sliding_windows is None
    assert config_of("qwen2").attention_bias == ("q", "k", "v")
    qwen3 = config_of("qwen3", head_dim=..., num_attention_heads=32, num_key_value_heads=...)
    assert (qwen3.head_dim, qwen3.num_key_value_heads, qwen3.qk_norm) == (128, 32, True)
    gemma = config_of("gemma2", layer_types=..., attn_logit_softcapping=None, final_logit_softcapping=...)
    assert gemma.sliding_windows == (6, None, 6)
    assert (gemma.attention_soft_cap, gemma.logit_soft_cap) == (None, 30.0)
    old = {"rope_parameters": None, "rope_theta": 2e6, "rope_local_base_freq": 500.0, "layer_types": None}
    gemma = config_of("gemma3", **old, num_hidden_layers=7, sliding_window_pattern=3)
    assert (gemma.rope_theta, gemma.local_rope_theta, gemma.rope_scaling) == (2e6, 500.0, None)
    assert gemma.sliding_windows == (5, 5, None, 5, 5, None, 5)
    phi = config_of("phi3")
    assert (phi.rotary_dim, phi.sliding_windows) == (6, (11, 11, 11))
    assert isinstance(phi.rope_scaling, LongRopeScaling)
    assert phi.rope_scaling.factors == (1.5, 2.5, 4.0)
    assert config_of("phi3", max_position_embeddings=16).rope_scaling == LongRopeScaling((1.0, 1.1, 1.2))
    short = config_of("phi3", max_len=16)
    assert short.max_position_embeddings == 16
    assert short.rope_scaling == LongRopeScaling((1.0, 1.1, 1.2), phi.rope_scaling.attention_factor)
    moe = config_of("qwen3-moe", norm_topk_prob=..., decoder_sparse_step=2)
    assert (moe.experts, moe.dense_layers) == (Experts(5, 2, 12, normalised=False), (0, 1, 2))
    assert config_of("qwen3-moe").dense_layers == (1,)
    assert config_of("mixtral").experts == Experts(4, 2, 40, normalised=True)
    oss = config_of("gpt-oss", layer_types=..., swiglu_limit=...)
    assert (oss.sliding_windows, oss.experts, oss.sinks) == ((6, None, 6), ClampedExperts(4, 2, 12), True)
    smol = config_of("smollm3", layer_types=...)
    assert (smol.unrotated_layers, smol.sliding_windows) == ((1, 3), (None, 8, None, 8))
    smol = config_of("smollm3", no_rope_layers=None, no_rope_layer_interval=..., use_sliding_window=...)
    assert (smol.unrotated_layers, smol.sliding_windows) == ((3,), None)
    assert config_of("smollm3", num_key_value_heads=None, num_attention_heads=8).num_key_value_heads == 8
    assert config_of("smollm3", num_key_value_heads=..., num_attention_heads=8).num_key_value_heads == 4
    v2 = config_of("deepseek-v2", first_k_dense_replace=..., q_lora_rank=...)
    assert (v2.num_key_value_heads, v2.head_dim, v2.dense_layers) == (1, 24, ())
    assert v2.latent == Latent(rank=16, rotary_dim=8, unrotated_dim=12, value_dim=10, query_rank=1536)
    assert v2.attention_scale == pytest.approx(20**-0.5 * (0.15 * math.log(4.0) + 1) ** 2)
    groups: Any = {"groups": 3, "groups_per_token": 2}
    assert v2.experts == GroupedExperts(6, 2, 12, normalised=False, factor=3.0, shared=2, **groups)
    greedy = config_of("deepseek-v2", topk_method="greedy", n_group=..., topk_group=..., mlp_bias=True)
    assert greedy.experts == GroupedExperts(6, 2, 12, normalised=False, factor=3.0, shared=2, shared_bias=True)
    assert greedy.mlp_bias
    v3 = config_of("deepseek-v3", first_k_dense_replace=..., rope_parameters={"rope_type": "yarn", "factor": 4.0})
    assert (v3.dense_layers, v3.latent.query_rank, v3.attention_bias) == ((0, 1, 2), 20, True)
    assert v3.attention_scale == 20**-0.5
    assert v3.experts == GroupedExperts(8, 3, 16, factor=2.5, groups=4, groups_per_token=2, sigmoid=True)
    assert config_of("llama-linear").rope_scaling == LinearRopeScaling(4.0)
    assert config_of("llama-dynamic").rope_scaling == DynamicRopeScaling(3.0, 64, 64)
    assert config_of("llama-yarn").rope_scaling == YarnRopeScaling(4.0, 16, 4.0, 1.0)


def test_what_is_special_about_gemma_4_is_read() -> None:
    """Newer files give the sizes of each layer, those that were released first give them for all global layers."""
    quarter = ProportionalRopeScaling(0.25)
    big = config_of("gemma4")
    assert (big.local_kind, big.global_kind) == (LayerKind(8, 4, 1e4), LayerKind(16, 2, 1e6, quarter, True))
    assert (big.experts, big.dense_layers, big.layer_input_size) == (Experts(5, 2, 12), (0, 1, 2, 3), 0)
    assert (big.sliding_windows, big.shared_layers, big.logit_soft_cap) == ((5, None, 5, None), 0, None)
    assert config_of("gemma4", per_layer_config=...).global_kind == LayerKind(512, 4, 1e6, quarter, True)
    older = {"per_layer_config": ..., "num_global_key_value_heads": 2, "global_head_dim": 24}
    assert config_of("gemma4", **older).global_kind == LayerKind(24, 2, 1e6, quarter, True)
    assert config_of("gemma4", **older, attention_k_eq_v=False).global_kind == LayerKind(24, 4, 1e6, quarter)
    plain = config_of("gemma4", rope_parameters=..., layer_types=..., enable_moe_block=..., sliding_window=...)
    assert (plain.local_kind, plain.global_kind.rope_scaling) == (LayerKind(8, 4, 1e4), quarter)
    assert (plain.sliding_windows, plain.experts, plain.dense_layers) == ((512, 512, 512, None), None, ())
    small = config_of("gemma4-shared", use_bidirectional_attention="vision")
    assert (small.shared_layers, small.layer_input_size, small.layer_input_vocab_size) == (2, 6, 48)
    assert [small.inner_size(layer) for layer in range(5)] == [40, 40, 40, 80, 80]
    assert config_of("gemma4-shared", hidden_size_per_layer_input=..., vocab_size_per_layer_input=...).layer_input_size
    ropes = {kind: {"rope_type": "proportional", "factor": 2.0} for kind in ("full_attention", "sliding_attention")}
    other = config_of("gemma4-shared", rope_parameters=ropes)
    assert other.local_kind == LayerKind(8, 2, 1e4, ProportionalRopeScaling(1.0, 2.0))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen2",
            {"model_type": "gpt2"},
            "model_type: expected 'llama' or .*, got 'gpt2'",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: expected a list of 3 of 'full_attention' or"),
        ("qwen2", {"layer_types": ["full", "full", "full"]}, "layer_types: expected a list of 3"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers: expected an integer of at least 0, got -1"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window: expected true or false, got 1"),
        ("qwen3-moe", {"mlp_only_layers": [3]}, r"mlp_only_layers: expected a list of integers in \[0, 3\), got \[3\]"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: expected a list of at least 4 zeros and ones"),
        ("gpt-oss", {"swiglu_alpha": 1.0}, "swiglu_alpha: expected 1.702, got 1.0"),
        (
            "deepseek-v2",
            {"norm_topk_prob": True},
            "norm_topk_prob: expected false, as all DeepSeek V2 have it, got true",
        ),
        ("deepseek-v2", {"num_key_value_heads": 2}, "num_key_value_heads: expected num_attention_heads = 4, got 2"),
        ("deepseek-v2", {"n_group": 4}, "n_routed_experts: expected a multiple of n_group = 4, at least 4, got 6"),
        ("deepseek-v2", {"topk_group": 4}, "topk_group: expected at most n_group = 3, got 4"),
        (
            "deepseek-v2",
            {"num_experts_per_tok": 5},
            "num_experts_per_tok: expected at most 4, the experts of .*, got 5",
        ),
        ("deepseek-v2", {"qk_rope_head_dim": 7}, "qk_rope_head_dim: expected an even number, got 7"),
        ("deepseek-v3", {"n_group": 8}, "n_routed_experts: expected a multiple of n_group = 8, at least 16, got 8"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq: expected 1, got 2"),
        ("deepseek-v3", {"topk_method": "greedy"}, "topk_method: expected 'noaux_tc', got 'greedy'"),
        (
            "deepseek-v3",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 128]}},
            r"weight_block_size: expected \[128, 128\], got \[64, 128\]",
        ),
        (
            "gemma4",
            {"use_bidirectional_attention": "all"},
            "use_bidirectional_attention: expected 'vision', got 'all'",
        ),
        ("gemma4", {"top_k_experts": 6}, "top_k_experts: expected at most num_experts = 5, got 6"),
        ("gemma4", {"num_experts": None}, "num_experts: expected an integer of at least 1, got null"),
        (
            "gemma4",
            {"per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 32}}},
            "per_layer_config: expected the same for all layers of full attention",
        ),
        (
            "gemma4",
            {"per_layer_config": None, "num_global_key_value_heads": 3},
            "layers of full attention: expected .* a divisor of num_attention_heads = 4 .*, got 512 and 3",
        ),
        ("gemma4-shared", {"num_kv_shared_layers": 3}, "num_kv_shared_layers: expected so few that a layer of each"),
        ("gemma4-shared", {"num_kv_shared_layers": 9}, "num_kv_shared_layers: expected so few that a layer of each"),
        ("gemma4-shared", {"vocab_size": 49}, "vocab_size_per_layer_input: expected at least vocab_size = 49, got 48"),
        (
            "gemma4-shared",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
            "rope_type: expected 'default' or 'proportional', got 'yarn'",
        ),
        (
            "gemma4-shared",
            {"rope_parameters": {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 1.5}}},
            "partial_rotary_factor: expected at most 1, got 1.5",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window: expected an integer of at least 1, got 0"),
        ("llama-yarn", {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "rope_type: expected 'default'"),
        ("llama-dynamic", {"rope_parameters": {"rope_type": "dynamic"}}, "factor: expected a positive number"),
        ("llama-yarn", {"rope_parameters": {"rope_type": "yarn"}}, "factor: expected a positive number"),
        (
            "llama-yarn",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0}},
            "beta_slow: expected less than beta_fast = 1.0",
        ),
    ],
)
def test_wrong_fields_are_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_of(name, **changes)


@pytest.mark.parametrize(
    "name", ["mistral", "qwen2", "qwen3", "llama-yarn", "gemma3", "gemma4", "phi3", "mixtral", "gpt-oss", "smollm3"]
)
def test_only_llamas_are_saved(name: str, tmp_path: Path) -> None:
    model = checkpoint.load(PARITY / name).model
    with pytest.raises(ValueError, match="config: expected a Llama's, which alone can be saved"):
        checkpoint.save(model, tmp_path)


# ---- quantised weights


def e2m1(code: int) -> float:
    """A four-bit float, from its bits."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if sign else magnitude


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """As `mxfp4.dequantised`, a number at a time."""
    out = np.empty((*scales.shape, 32), np.float32)
    for index in np.ndindex(*blocks.shape):
        *block, byte = index
        for half in range(2):
            code = int(blocks[index]) >> 4 * half & 15
            out[(*block, 2 * byte + half)] = e2m1(code) * 2.0 ** (int(scales[tuple(block)]) - 127)
    return out.reshape(*scales.shape[:-1], -1)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss whose experts are MXFP4, and in `plain` beside it the same with the numbers that these stand for."""
    draw, folder = np.random.default_rng(0), tmp_path_factory.mktemp("quantised")
    data = json.loads((PARITY / "gpt-oss" / "config.json").read_text())
    data |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "layer_types": None}
    (folder / "plain").mkdir()
    config = config_from_hf(data, folder)
    model = Decoder(config, rngs=nnx.Rngs(0))
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(variable[...])
        tensors[checkpoint._hf_name(path)] = np.ascontiguousarray(value.T) if path[-1] == "kernel" else value
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        number, inputs, outputs = packed.pop(name).shape
        blocks = draw.integers(0, 256, (number, outputs, inputs // 32, 16), np.uint8)
        scales = draw.integers(120, 130, blocks.shape[:-1], np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = np.ascontiguousarray(dequantised(blocks, scales).swapaxes(-1, -2))
    for where, content in ((folder, packed), (folder / "plain", tensors)):
        save_file(content, where / "model.safetensors")
        (where / "config.json").write_text(json.dumps(data))
        shutil.copy(PARITY / "gpt-oss" / "tokenizer.json", where)
    return folder


def test_mxfp4_experts_are_dequantised(quantised: Path) -> None:
    tokens = jnp.arange(10)
    got, want = (checkpoint.load(folder).model(tokens) for folder in (quantised, quantised / "plain"))
    np.testing.assert_array_equal(got, want)


def test_half_a_quantised_tensor_is_named(quantised: Path, tmp_path: Path) -> None:
    shutil.copytree(quantised, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("_scales"))
    save_file({name: value for name, value in tensors.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts.*: expected blocks and scales, got blocks alone"):
        checkpoint.load(tmp_path)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek V3 in fp8 with scales per block, and in `plain` beside it the same with what these stand for.

    As in real files there is a layer behind the last one, which predicts a second token.
    """
    draw, folder = np.random.default_rng(0), tmp_path_factory.mktemp("fp8")
    data = json.loads((PARITY / "deepseek-v3" / "config.json").read_text())
    data |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "moe_intermediate_size": 130, "dtype": "bfloat16"}
    (folder / "plain").mkdir()
    plain, packed = {}, {"model.layers.1.shared_head.head.weight": np.zeros((2, 2), np.float32)}
    for path, variable in nnx.to_flat_state(nnx.state(Decoder(config_from_hf(data, folder), rngs=nnx.Rngs(0)))):
        if not isinstance(variable, nnx.Param):
            continue
        name, value = checkpoint._hf_name(path), np.asarray(variable[...])
        plain[name] = packed[name] = np.ascontiguousarray(value.T) if path[-1] == "kernel" else value
        if name.endswith("bias"):
            plain[name] = packed[name] = draw.standard_normal(value.shape, np.float32)
        if "layers" in name and path[-1] == "kernel" and "mlp.gate" not in name:
            stored = plain[name].astype(jnp.float8_e4m3fn)
            scales = draw.uniform(0.5, 2.0, [-(-size // 128) for size in stored.shape]).astype(np.float32)
            each = scales.repeat(128, axis=0).repeat(128, axis=1)[: stored.shape[0], : stored.shape[1]]
            packed[name], packed[f"{name}_scale_inv"] = stored, scales
            plain[name] = stored.astype(np.float32) * each
    quantised = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    for where, content, fields in ((folder, packed, data | quantised), (folder / "plain", plain, data)):
        save_file(content, where / "model.safetensors")
        (where / "config.json").write_text(json.dumps(fields))
        shutil.copy(PARITY / "deepseek-v3" / "tokenizer.json", where)
    return folder


def test_fp8_weights_are_dequantised(fp8: Path) -> None:
    """To bfloat16, but for the bias that experts are chosen by, which stays in float32."""
    got, want = (nnx.state(checkpoint.load(folder).model, nnx.Param) for folder in (fp8, fp8 / "plain"))
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    gate = got["layers"][0]["mlp"]["gate"]
    assert (gate["kernel"].dtype, gate["e_score_correction_bias"].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scales: None, "expected fp8 weights and their scales, got weight alone"),
        (
            lambda scales: scales[:1, :1],
            r"expected weights of two axes and a scale for each 128², got .* with \(1, 1\)",
        ),
    ],
    ids=["missing", "shape"],
)
def test_wrong_scales_of_fp8_weights_are_named(fp8: Path, tmp_path: Path, change: Any, message: str) -> None:
    shutil.copytree(fp8, tmp_path, dirs_exist_ok=True)
    tensors = {name: np.array(tensor) for _, name, tensor in read_tensors(tmp_path)}  # `load_file` refuses fp8
    name = "model.layers.0.mlp.experts.0.up_proj.weight_scale_inv"
    changed = {**tensors, name: change(tensors[name])}
    save_file({key: value for key, value in changed.items() if value is not None}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"experts\.0\.up_proj.*: {message}"):
        checkpoint.load(tmp_path)


def test_latents_of_eight_bits() -> None:
    """One scale per layer, found by `calibrate`, for latents and rotated keys."""
    folder = PARITY / "deepseek-v3"
    model, want = checkpoint.load(folder).model, load_file(folder / "expected.safetensors")
    tokens = jnp.asarray(want["tokens"], jnp.int32)
    scales = calibrate(model, [tokens], jnp.int8)
    assert [sorted(of_layer) for of_layer in scales] == [["k_scale"]] * 2
    model.init_cache(len(tokens) // PAGE_SIZE, PAGE_SIZE, jnp.int8, scales)
    whole = StepMetadata.whole_sequences(1, len(tokens), PAGE_SIZE)
    # Prompts have their keys from the step, as they were before they were stored.
    assert relative_error(model(tokens, whole), want["logits"]) < 1e-5
    last = StepMetadata.decode(whole.block_tables, whole.kv_lens, PAGE_SIZE)
    assert 1e-4 < relative_error(model(tokens[-1:], last), want["logits"][-1:]) < 0.1


def test_a_step_has_prompts_and_chunks_over_a_cache_of_latents() -> None:
    """One with all its tokens in the step, one with some of them in the cache, one decode row, and padding."""
    folder = PARITY / "deepseek-v3"
    model, want = checkpoint.load(folder).model, load_file(folder / "expected.safetensors")
    tokens = jnp.asarray(want["tokens"][:9], jnp.int32)
    model.init_cache(12, 4, jnp.float32)
    tables = jnp.arange(12, dtype=jnp.int32).reshape(4, 3)

    def step(parts: list[tuple[int, int]]) -> jax.Array:
        """Logits of the rows of tokens [begin, end) of each sequence."""
        positions = np.concatenate([np.arange(begin, end) for begin, end in parts])
        sequences = np.repeat(np.arange(len(parts)), [end - begin for begin, end in parts])
        slots = np.asarray(tables)[sequences, positions // 4] * 4 + positions % 4
        ends = np.cumsum([0, *(end - begin for begin, end in parts)])
        kv_lens = np.array([end for _, end in parts])
        arrays = (positions, slots, np.asarray(tables), kv_lens, ends, np.array(len(parts)))
        return model(tokens[positions], StepMetadata(*(array.astype(np.int32) for array in arrays)))

    step([(0, 0), (0, 4), (0, 8), (0, 0)])
    got = step([(0, 9), (4, 9), (8, 9), (0, 0)])
    expected = np.concatenate([want["logits"][:9], want["logits"][4:9], want["logits"][8:9]])
    assert relative_error(got, expected) < 1e-5


def test_shared_caches_of_eight_bits() -> None:
    """Scales are those of the layers that have keys and values, which the other layers read with these scales."""
    folder = PARITY / "gemma4-shared"
    model, want = checkpoint.load(folder).model, load_file(folder / "expected.safetensors")
    tokens = jnp.asarray(want["tokens"], jnp.int32)
    scales = calibrate(model, [tokens], jnp.int8)
    assert [of_layer["k_scale"].shape for of_layer in scales] == [(2,)] * 3
    with pytest.raises(ValueError, match="scales: expected those of 3 layers, got 5"):
        model.init_cache(10, PAGE_SIZE, jnp.int8, [*scales, *scales[:2]])
    model.init_cache(len(tokens) // PAGE_SIZE, PAGE_SIZE, jnp.int8, scales)
    pages = [variable.shape for variable in jax.tree.leaves(nnx.state(model, CacheVariable))]
    assert sorted(pages) == [(10, PAGE_SIZE, 2, 8)] * 4 + [(10, PAGE_SIZE, 2, 16)] * 2
    got = compiled(model, tokens, StepMetadata.whole_sequences(1, len(tokens), PAGE_SIZE))
    assert 1e-4 < relative_error(got, want["logits"]) < 0.2  # scores are not scaled, and weights are large


@pytest.mark.parametrize("name", ["gemma4", "gemma4-shared"])
def test_gemma_4_with_images_is_its_language_model(name: str, tmp_path: Path) -> None:
    """As released: a text_config, other weights beside those of the text, and some of layers that do not use them."""
    tensors = {name: tensor for _, name, tensor in read_tensors(PARITY / name)}
    renamed = {key.replace("model.", "model.language_model.", 1): np.array(value) for key, value in tensors.items()}
    unused = ["model.vision_tower.x.weight", "model.embed_audio.y.weight"]
    if name == "gemma4-shared":
        unused.append("model.language_model.layers.4.self_attn.k_proj.weight")
    save_file(renamed | dict.fromkeys(unused, np.zeros(2, np.float32)), tmp_path / "model.safetensors")
    data = json.loads((PARITY / name / "config.json").read_text())
    whole = {"model_type": "gemma4", "text_config": data, "vision_config": {}, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    shutil.copy(PARITY / name / "tokenizer.json", tmp_path)
    got, want = (nnx.state(checkpoint.load(folder).model, nnx.Param) for folder in (tmp_path, PARITY / name))
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_experts_of_gemma_4_have_three_axes(tmp_path: Path) -> None:
    shutil.copytree(PARITY / "gemma4", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.experts.down_proj"
    save_file({**tensors, name: tensors[name][0]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.down_proj': expected three axes, got shape \(24, 12\)"):
        checkpoint.load(tmp_path)


def test_rotated_pairs_may_be_halves() -> None:
    """Columns (i, i + 4) in place of (2i, 2i + 1), with weights in that order, give the same."""
    config, layers = config_of("deepseek-v3"), []
    build = Build(jnp.float32, jnp.float32, nnx.Rngs(0))
    for name in ("interleaved", "halves"):
        sizes = config_of("deepseek-v3", rope_interleave=name == "interleaved").latent
        layers.append(LatentAttention(config, sizes, build))
    interleaved, halves = layers
    nnx.update(halves, nnx.state(interleaved, nnx.Param))
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    for projection, heads in ((halves.q_b_proj, 8), (halves.kv_a_proj_with_mqa, 1)):
        kernel = projection.kernel[...].reshape(len(projection.kernel), heads, -1)
        kept = np.arange(kernel.shape[-1] - 8)
        kernel = kernel[..., np.append(kept, len(kept) + order)]
        projection.kernel.set_value(kernel.reshape(projection.kernel.shape))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 24)), jnp.float32)
    assert relative_error(halves(x), np.asarray(interleaved(x))) < 1e-6
