"""The paged decode step of lalamo's attention, with JAX's deprecated GPU kernel. `lalamo_after.py` is its port."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention


@partial(jax.jit, static_argnames=("scale", "soft_cap"), donate_argnames=("key_pages", "value_pages"))
def paged_decode(
    queries: Array,  # [batch, heads, channels]
    keys: Array,  # [batch, groups, channels]
    values: Array,  # likewise
    key_pages: Array,  # [groups, pages, page size, channels]
    value_pages: Array,  # likewise
    block_tables: Array,  # [batch, pages of a sequence]
    lengths: Array,  # [batch], without the new token
    *,
    scale: float,
    soft_cap: float | None = None,
) -> tuple[Array, Array, Array]:
    """Stores one new token per sequence and attends: `(out, key_pages, value_pages)`."""
    page_size = key_pages.shape[2]
    pages = jnp.take_along_axis(block_tables, (lengths // page_size)[:, None], axis=1)[:, 0]
    groups = jnp.arange(key_pages.shape[0])[:, None]
    where = groups, pages[None], (lengths % page_size)[None]
    key_pages = key_pages.at[where].set(keys.swapaxes(0, 1))
    value_pages = value_pages.at[where].set(values.swapaxes(0, 1))
    out = paged_attention(
        queries * scale,
        key_pages,
        value_pages,
        block_tables,
        lengths + 1,
        pages_per_compute_block=1,
        k_splits=min(block_tables.shape[1], 16),
        num_stages=1,
        attn_logits_soft_cap=soft_cap,
    )
    return out, key_pages, value_pages


def main() -> None:
    """Three sequences, of which the second one begins."""
    rngs = jax.random.split(jax.random.key(0), 5)
    queries, keys, values = (
        jax.random.normal(rng, (3, n, 64), jnp.bfloat16) for rng, n in zip(rngs, (8, 2, 2), strict=False)
    )
    pools = (jax.random.normal(rng, (2, 12, 16, 64), jnp.bfloat16) for rng in rngs[3:])
    tables, lengths = jnp.arange(12, dtype=jnp.int32).reshape(3, 4), jnp.array([40, 0, 17], jnp.int32)
    out, *_ = paged_decode(queries, keys, values, *pools, tables, lengths, scale=64**-0.5)
    print("the sequence that begins sees itself alone:", bool((out[1, 0] == values[1, 0]).all()))


if __name__ == "__main__":
    main()
