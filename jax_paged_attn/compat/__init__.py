"""JAX's own paged attention kernels, with their signatures and their pages, on the engines of this package.

Code written for `jax.experimental.pallas.ops.tpu.ragged_paged_attention` or for the deprecated
`jax.experimental.pallas.ops.gpu.paged_attention` runs with another import, on CPU and CUDA; pages are read where they
lie. All that holds of `paged_attention` and `ragged_paged_attention` holds here: edges, gradients, `vmap`, export,
`explain`. The modules `compat.levanter` and `compat.ejkernel` have the calls of other stacks.

Such code writes its pages with plain JAX, in place where they are donated (XLA copies 16-bit ones on CPU). With slots
`page · S + offset`:

    kv_pages.reshape(P * S, 2 * K, H).at[slots].set(jnp.stack([k, v], axis=2).reshape(T, 2 * K, H), mode="drop")
    k_pages.reshape(K, P * S, H).at[:, slots].set(k.swapaxes(0, 1), mode="drop")
"""

from jax_paged_attn.compat import ejkernel as ejkernel
from jax_paged_attn.compat import levanter as levanter
from jax_paged_attn.compat._gpu import paged_attention
from jax_paged_attn.compat._keywords import DEFAULT_MASK_VALUE
from jax_paged_attn.compat._tpu import ragged_paged_attention

__all__ = ["DEFAULT_MASK_VALUE", "paged_attention", "ragged_paged_attention"]
