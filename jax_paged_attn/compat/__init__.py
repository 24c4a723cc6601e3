"""Calls of other paged attention kernels, with their signatures and their pages, on the engines of this package.

Code written for `jax.experimental.pallas.ops.tpu.ragged_paged_attention`, for the deprecated
`jax.experimental.pallas.ops.gpu.paged_attention`, or for the RPA v3 kernels of tpu-inference and tokamax runs with
another import, on CPU and CUDA; pages are read where they lie. All that holds of `paged_attention` and
`ragged_paged_attention` holds here: edges, gradients, `vmap`, export, `explain`. The modules `compat.levanter`
and `compat.ejkernel` have the calls of Levanter and of EasyDeL.

`write_interleaved_kv_pages` and `write_head_major_kv_pages` write the pages of JAX's own kernels, in place where they
are donated; the latter also 8-bit ones with a scale per token and head. `ragged_paged_attention_v3`,
`batched_ragged_paged_attention` and `mla_ragged_paged_attention` write the cache themselves.
"""

from jax_paged_attn.compat import ejkernel as ejkernel
from jax_paged_attn.compat import levanter as levanter
from jax_paged_attn.compat._gpu import paged_attention
from jax_paged_attn.compat._keywords import DEFAULT_MASK_VALUE
from jax_paged_attn.compat._mla import mla_ragged_paged_attention
from jax_paged_attn.compat._rpa_v3 import ragged_paged_attention_v3
from jax_paged_attn.compat._tokamax import batched_ragged_paged_attention
from jax_paged_attn.compat._tpu import ragged_paged_attention
from jax_paged_attn.compat._write import amax_scales, write_head_major_kv_pages, write_interleaved_kv_pages

__all__ = [
    "DEFAULT_MASK_VALUE",
    "amax_scales",
    "batched_ragged_paged_attention",
    "mla_ragged_paged_attention",
    "paged_attention",
    "ragged_paged_attention",
    "ragged_paged_attention_v3",
    "write_head_major_kv_pages",
    "write_interleaved_kv_pages",
]
