"""Attention over paged key/value caches for JAX."""

from jax_paged_attn._allocator import (
    AllocatorStats,
    DoubleFree,
    ForeignPage,
    OutOfPages,
    PageAllocator,
    PageAllocatorError,
    Sequence,
    StepArrays,
)
from jax_paged_attn._attention import (
    merge_attention_states,
    paged_attention,
    paged_attention_reference,
    ragged_paged_attention,
    ragged_paged_attention_reference,
)
from jax_paged_attn._cache import PagedKVCache, copy_kv_pages, write_kv_pages
from jax_paged_attn._cost import Cost, cost_analysis
from jax_paged_attn._debug import debug
from jax_paged_attn._donation import check_in_place
from jax_paged_attn._engines import Explanation
from jax_paged_attn._explain import explain
from jax_paged_attn._parallel import context_parallel_attention
from jax_paged_attn._step import StepMetadata
from jax_paged_attn._warnings import PagedAttentionWarning

__version__ = "0.1.0"

__all__ = [
    "AllocatorStats",
    "Cost",
    "DoubleFree",
    "Explanation",
    "ForeignPage",
    "OutOfPages",
    "PageAllocator",
    "PageAllocatorError",
    "PagedAttentionWarning",
    "PagedKVCache",
    "Sequence",
    "StepArrays",
    "StepMetadata",
    "check_in_place",
    "context_parallel_attention",
    "copy_kv_pages",
    "cost_analysis",
    "debug",
    "explain",
    "merge_attention_states",
    "paged_attention",
    "paged_attention_reference",
    "ragged_paged_attention",
    "ragged_paged_attention_reference",
    "write_kv_pages",
]
