# pyright: reportMissingImports=false
"""Makes the folders beside this file: tiny random models by `transformers`, and what they give.

`python tests/parity/make.py [NAME ...]`, in an environment with torch 2.13 and transformers 5.24. Weights are large, so
that no model is nearly linear and every difference shows. `tests/test_families.py` compares without either library.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.numpy import save_file

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LENGTH, PROMPT = 40, 18
# A second, longer text: frequencies depend on its length.
LONG = {"llama-dynamic": 96}

# Multi-head latent attention of all DeepSeek, and their experts.
LATENT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}
LATENT_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "rope_theta": 1e4,
}

# Layers with a window and the others, in all Gemma 4.
GEMMA4: dict[str, Any] = {
    "global_head_dim": 16,
    "sliding_window": 5,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}}),
    "llama-yarn": (
        "Llama",
        {
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "rope_theta": 1e4,
            },
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "query_pre_attn_scalar": 10,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    # As the larger models of the family: experts beside the MLP, values from the projection of keys.
    "gemma4": (
        "Gemma4Text",
        {
            **GEMMA4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "num_global_key_value_heads": 2,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 12,
        },
    ),
    # As the smaller ones: embeddings of each layer, and last layers that see keys and values of earlier ones.
    "gemma4-shared": (
        "Gemma4Text",
        {
            **GEMMA4,
            "num_hidden_layers": 5,
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")],
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": 48,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "intermediate_size": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "rope_theta": 1e4,
                "truncate": False,
            },
        },
    ),
    "deepseek-v2": (
        "DeepseekV2",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 6,
            "n_group": 3,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "routed_scaling_factor": 3.0,
            "rope_parameters": {**LATENT_ROPE, "mscale": 0.7, "mscale_all_dim": 1.5},
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **LATENT,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "moe_intermediate_size": 16,
            "q_lora_rank": 20,
            "attention_bias": True,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "num_mtp_layers": 0,
            "rope_parameters": {**LATENT_ROPE, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "phi3": (
        "Phi3",
        {
            "hidden_size": 32,
            "sliding_window": 11,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2],
                "long_factor": [1.5, 2.5, 4.0],
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "olmo2": ("Olmo2", {}),
    "smollm3": (
        "SmolLM3",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def make(name: str, kind: str, options: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(sum(name.encode()))
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options}, attn_implementation="eager")
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
            if buffer_name.endswith("layer_scalar"):
                buffer.normal_(1.0, 0.3)
        tokens = torch.randint(0, config.vocab_size, (1, LENGTH))
        logits = model(tokens).logits[0]
        prompt = tokens[:, :PROMPT]
        greedy = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=LENGTH - PROMPT, do_sample=False
        )
        long_tokens = torch.randint(0, config.vocab_size, (1, LONG.get(name, 0)))
        long_logits = model(long_tokens).logits[0] if name in LONG else None
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = {"tokens": tokens[0], "logits": logits, "greedy": greedy[0]}
    if long_logits is not None:
        tensors |= {"long_tokens": long_tokens[0], "long_logits": long_logits}
    arrays = {key: np.ascontiguousarray(value.numpy()) for key, value in tensors.items()}
    save_file(arrays, folder / "expected.safetensors")


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        make(name, *MODELS[name], Path(__file__).parent / name)
