"""DeepSeek V2 and V3: multi-head latent attention, and experts in groups, of which each token has those of a few.

V2 scores experts by a softmax, and a group by its best expert. V3 scores them by sigmoids and chooses by these plus a
bias that training balances the load with, a group by its best two. Each token has the shared experts, too.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from .block_scaled import BLOCK, block_scaled
from .decoder import DecoderConfig
from .family import Family, Tensor, Tensors
from .fields import CheckpointError, Fields
from .latent import LatentBlock
from .layers import Build, Experts, ExpertsMlp, GatedMlp, Latent
from .rotary import rope_kind, rope_section


@dataclasses.dataclass(frozen=True)
class GroupedExperts(Experts):
    """Experts in groups.

    Attributes:
      groups: of equally many experts.
      groups_per_token: how many groups a token's experts may come from.
      factor: multiplies the weights of a token's experts.
      shared: how many experts each token has besides; they are one MLP.
      shared_bias: whether that MLP has biases.
      sigmoid: True for the scores of V3, False for those of V2.
    """

    groups: int = 1
    groups_per_token: int = 1
    factor: float = 1.0
    shared: int = 1
    shared_bias: bool = False
    sigmoid: bool = False

    def mlp(self, size: int, build: Build, activation: str) -> GroupedExpertsMlp:
        """See `Experts.mlp`."""
        return GroupedExpertsMlp(self, size, build, activation)

    def chosen(self, logits: Array, bias: Array | None) -> tuple[Array, Array]:
        """The weights of each token's experts, and which they are, `[n, per_token]`.

        Args:
          logits: float32 `[n, E]`.
          bias: float32 `[E]`, added to the scores that the choice is by, and not to the weights.
        """
        scores = jax.nn.sigmoid(logits) if self.sigmoid else jax.nn.softmax(logits, axis=-1)
        wanted = scores if bias is None else scores + bias
        if self.groups_per_token < self.groups:
            grouped = wanted.reshape(len(wanted), self.groups, -1)
            of_group = jax.lax.top_k(grouped, 2 if self.sigmoid else 1)[0].sum(axis=-1)
            groups = jax.lax.top_k(of_group, self.groups_per_token)[1]
            is_open = (groups[..., None] == jnp.arange(self.groups)).any(axis=1)
            wanted = jnp.where(is_open[..., None], grouped, -jnp.inf).reshape(scores.shape)
        chosen = jax.lax.top_k(wanted, self.per_token)[1]
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.normalised:
            weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
        return weights * self.factor, chosen


class Router(nnx.Module):
    """Tokens to a logit per expert, in float32 whatever the dtype of the computation is."""

    def __init__(self, config: GroupedExperts, size: int, build: Build):
        initial = nnx.initializers.lecun_normal()(build.rngs.params(), (size, config.number), build.param_dtype)
        self.kernel = nnx.Param(initial)
        bias = nnx.Param(jnp.zeros(config.number, jnp.float32)) if config.sigmoid else None
        self.e_score_correction_bias: nnx.Param | None = nnx.data(bias)

    def __call__(self, x: Array) -> Array:
        return jnp.dot(x, self.kernel[...].astype(x.dtype), preferred_element_type=jnp.float32)


class GroupedExpertsMlp(ExpertsMlp):
    """The experts that a token chooses, and those that all tokens share."""

    config: GroupedExperts

    def __init__(self, config: GroupedExperts, size: int, build: Build, activation: str):
        super().__init__(config, size, build, activation)
        self.gate = Router(config, size, build)
        options: Any = {"activation": activation, "use_bias": config.shared_bias}
        self.shared_experts = GatedMlp(size, config.shared * config.size, build, **options)

    def fuse(self) -> None:
        """See `ExpertsMlp.fuse`."""
        super().fuse()
        self.shared_experts.fuse()

    def route(self, x: Array) -> tuple[Array, Array]:
        """See `ExpertsMlp.route`."""
        bias = self.gate.e_score_correction_bias
        return self.config.chosen(self.gate(x), None if bias is None else bias[...])

    def __call__(self, x: Array) -> Array:
        return super().__call__(x) + self.shared_experts(x)


def _special(fields: Fields, experts: GroupedExperts, dense: int) -> dict[str, Any]:
    """What both share.

    Args:
      fields: those of config.json.
      experts: those of the layers that have them.
      dense: how many of the first layers have none, by default.
    """
    heads = fields.integer("num_attention_heads")
    if fields.integer("num_key_value_heads", heads) != heads:
        raise fields.error("num_key_value_heads", f"num_attention_heads = {heads}")
    if fields.integer("moe_layer_freq", 1) != 1:
        raise fields.error("moe_layer_freq", "1")
    latent = Latent(
        rank=fields.integer("kv_lora_rank", 512),
        rotary_dim=fields.integer("qk_rope_head_dim", 64),
        unrotated_dim=fields.integer("qk_nope_head_dim", 128),
        value_dim=fields.integer("v_head_dim", 128),
        query_rank=fields.integer("q_lora_rank", None if "q_lora_rank" in fields else 1536),
        interleaved=fields.boolean("rope_interleave", True),
    )
    if latent.rotary_dim % 2:
        raise fields.error("qk_rope_head_dim", "an even number")
    quantised = fields.section("quantization_config")
    quantised.choice("quant_method", ("fp8",), "fp8")
    if quantised.has("weight_block_size") and quantised.integers("weight_block_size") != (BLOCK, BLOCK):
        raise quantised.error("weight_block_size", f"[{BLOCK}, {BLOCK}]")
    return {
        "latent": latent,
        "block": LatentBlock,
        "num_key_value_heads": 1,
        "head_dim": latent.rank + latent.rotary_dim,
        "attention_scale": _scale(fields, latent.unrotated_dim + latent.rotary_dim),
        "attention_bias": fields.boolean("attention_bias", False),
        "experts": experts,
        "dense_layers": tuple(range(fields.integer("first_k_dense_replace", dense, least=0))),
    }


def _scale(fields: Fields, head_dim: int) -> float:
    """head_dim^(−1/2), times the square of what YaRN multiplies queries and keys by if `mscale_all_dim` is there."""
    rope, growth = rope_section(fields), 1.0
    if rope_kind(rope) != "default" and rope.has("mscale_all_dim"):
        growth += 0.1 * rope.number("mscale_all_dim") * max(math.log(rope.number("factor")), 0.0)
    return head_dim**-0.5 * growth**2


def _checked(experts: GroupedExperts, fields: Fields) -> GroupedExperts:
    """The experts, if they can be parted into groups, and a token's fit into its groups."""
    least = 2 * experts.groups if experts.sigmoid else experts.groups
    if experts.number % experts.groups or experts.number < least:
        raise fields.error("n_routed_experts", f"a multiple of n_group = {experts.groups}, at least {least}")
    if experts.groups_per_token > experts.groups:
        raise fields.error("topk_group", f"at most n_group = {experts.groups}")
    reached = experts.number // experts.groups * experts.groups_per_token
    if experts.per_token > reached:
        raise fields.error("num_experts_per_tok", f"at most {reached}, the experts of topk_group groups")
    return experts


def _special_v2(fields: Fields) -> dict[str, Any]:
    fields.choice("scoring_func", ("softmax",), "softmax")
    if fields.boolean("norm_topk_prob", False):
        raise fields.error("norm_topk_prob", "false, as all DeepSeek V2 have it")
    mlp_bias = fields.boolean("mlp_bias", False)
    method = fields.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    in_groups = method == "group_limited_greedy"
    experts = GroupedExperts(
        number=fields.integer("n_routed_experts", 64),
        per_token=fields.integer("num_experts_per_tok"),
        size=fields.integer("moe_intermediate_size", 1407),
        normalised=False,
        groups=fields.integer("n_group") if in_groups else 1,
        groups_per_token=fields.integer("topk_group") if in_groups else 1,
        factor=fields.number("routed_scaling_factor", 1.0),
        shared=fields.integer("n_shared_experts", 2),
        shared_bias=mlp_bias,
    )
    return {**_special(fields, _checked(experts, fields), dense=0), "mlp_bias": mlp_bias}


def _special_v3(fields: Fields) -> dict[str, Any]:
    fields.choice("scoring_func", ("sigmoid",), "sigmoid")
    fields.choice("topk_method", ("noaux_tc",), "noaux_tc")
    experts = GroupedExperts(
        number=fields.integer("n_routed_experts", 256),
        per_token=fields.integer("num_experts_per_tok", 8),
        size=fields.integer("moe_intermediate_size", 2048),
        normalised=fields.boolean("norm_topk_prob", True),
        groups=fields.integer("n_group", 8),
        groups_per_token=fields.integer("topk_group", 4),
        factor=fields.number("routed_scaling_factor", 2.5),
        shared=fields.integer("n_shared_experts", 1),
        sigmoid=True,
    )
    return _special(fields, _checked(experts, fields), dense=3)


def _tensors(tensors: Tensors, config: DecoderConfig) -> Iterator[tuple[Path, str, Tensor]]:
    """Without the layers that predict further tokens; the numbers that fp8 weights and their scales stand for."""
    weights: dict[str, dict[str, Tensor]] = {}
    for file, name, tensor in tensors:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is not None and int(layer[1]) >= config.num_hidden_layers:
            continue
        stem = name.removesuffix("_scale_inv")
        if stem == name and tensor.dtype.name != "float8_e4m3fn":
            yield file, name, tensor
            continue
        both = weights.setdefault(stem, {})
        both["weight" if stem == name else "scales"] = tensor
        if len(both) == 2:
            yield file, stem, block_scaled(f"{file}: {stem!r}", **weights.pop(stem))
    for stem, one in weights.items():
        raise CheckpointError(f"{stem!r}: expected fp8 weights and their scales, got {next(iter(one))} alone")


# `head_dim` is that of the rotated part, as in `transformers`; `_special` puts the cache's in its place.
DEEPSEEK_V2 = Family(
    _special_v2,
    {"max_position_embeddings": 2048, "head_dim": 64, "bos_token_id": 1, "eos_token_id": 2},
    tensors=_tensors,
)
DEEPSEEK_V3 = Family(
    _special_v3,
    {"max_position_embeddings": 4096, "head_dim": 64, "bos_token_id": 0, "eos_token_id": 1},
    tensors=_tensors,
)
