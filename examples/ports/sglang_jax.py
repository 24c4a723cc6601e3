"""An attention backend of sglang-jax on CPUs and GPUs: its `FlashAttention` with another kernel under the same caches.

`ModelRunner` makes this class in place of `FlashAttention`; metadata, pools and their sharding stay.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from sgl_jax.srt.layers.attention.flashattention_backend import FlashAttention  # pyright: ignore[reportMissingImports]

from jax_paged_attn.compat import ragged_paged_attention_v3


class PagedAttention(FlashAttention):
    """Writes the new tokens and attends, on each device for its heads and its sequences.

    Raises:
      NotImplementedError: for masks of draft trees and for temperatures that depend on positions.
    """

    max_context_len: int | None = None  # tokens; a bound makes tables narrow

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        layer: Any,
        forward_batch: Any,
        token_to_kv_pool: Any,
        causal: int = 1,
        attention_sink: Array | None = None,
    ) -> tuple[Array, Array]:
        """`[T, N · H]` and the layer's pool with the new tokens, from `[T, heads · H]` each."""
        metadata = self.forward_metadata
        if metadata.custom_mask is not None or layer.xai_temperature_len > 0:
            raise NotImplementedError("custom_mask, xai_temperature_len: expected none of them")
        windowed = layer.sliding_window_size and metadata.swa_page_indices is not None
        encoder = getattr(layer.attn_type, "value", None) == "encoder_only"

        def attend(q: Array, k: Array, v: Array, pool: Array, where: tuple[Array, ...], sinks: Array | None) -> Any:
            kv_lens, page_indices, cu_q_lens, cu_kv_lens, distribution = where
            return ragged_paged_attention_v3(
                *(q, k, v, pool, kv_lens, self._tables(page_indices, cu_kv_lens), cu_q_lens, distribution, sinks),
                use_causal_mask=bool(causal) and not encoder,
                sm_scale=layer.head_dim**-0.5 if layer.scaling is None else layer.scaling,
                sliding_window=layer.sliding_window_size,
                soft_cap=layer.logit_cap,
            )

        page_indices = metadata.swa_page_indices if windowed else metadata.page_indices
        if not windowed and self.page_size == 1 and hasattr(token_to_kv_pool, "remap_cache_loc"):
            page_indices = token_to_kv_pool.remap_cache_loc(page_indices, layer.layer_id)
        data, heads = self.attention_data_partition_axis, self.kv_partition_axis
        tokens, pools = PartitionSpec(data, heads), PartitionSpec(data, None, heads)
        where = (metadata.seq_lens, page_indices, metadata.cu_q_lens, metadata.cu_kv_lens, metadata.distribution)
        mapped: Any = jax.shard_map(
            attend,
            in_specs=(tokens, tokens, tokens, pools, PartitionSpec(data), PartitionSpec(heads)),
            out_specs=(tokens, pools),
            check_vma=False,
        )
        flat = (x.reshape(len(x), -1, layer.head_dim) for x in (q, k, v))
        pool = self._get_fused_kv_cache(forward_batch, token_to_kv_pool, layer.layer_id)
        out, pool = mapped(*flat, pool, where, attention_sink)
        return out.reshape(len(q), -1), pool

    def _tables(self, page_indices: Array, cu_kv_lens: Array) -> Array:
        """`[B · M]`, M pages per sequence: sglang-jax lists the pages of all sequences without gaps."""
        firsts = cu_kv_lens[:-1] // self.page_size
        pages = len(page_indices)
        width = pages if self.max_context_len is None else min(pages, -(-self.max_context_len // self.page_size))
        places = firsts[:, None] + jnp.arange(width, dtype=jnp.int32)
        return jnp.where(places < pages, page_indices[jnp.minimum(places, pages - 1)], -1).reshape(-1)
