"""One attention layer of a server, written for TPUs with JAX's kernel. `diff before.py after.py` shows its port."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

PAGE_SIZE = 16


@partial(jax.jit, donate_argnames="kv_pages")
def attention_layer(
    q: Array,  # [tokens, query heads, head dim]
    k: Array,  # [tokens, key/value heads, head dim]
    v: Array,  # likewise
    kv_pages: Array,  # [pages, page size, 2 · key/value heads, head dim], keys and values in turn
    slots: Array,  # [tokens], page · page size + offset of each token
    kv_lens: Array,  # [sequences]
    page_indices: Array,  # [sequences, pages of a sequence]
    cu_q_lens: Array,  # [sequences + 1]
    num_seqs: Array,  # [1]
) -> tuple[Array, Array]:
    """Stores the keys and values of new tokens, and lets each token attend to its sequence: `(out, kv_pages)`."""
    heads, head_dim = kv_pages.shape[2:]
    new = jnp.stack([k, v], axis=2).reshape(-1, heads, head_dim)
    kv_pages = kv_pages.reshape(-1, heads, head_dim).at[slots].set(new, mode="drop").reshape(kv_pages.shape)
    out = ragged_paged_attention(
        q,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        sm_scale=head_dim**-0.5,
        num_kv_pages_per_block=2,
        num_queries_per_block=32,
    )
    return out, kv_pages


def main() -> None:
    """Two prompts of 20 and 5 tokens, whose pages are [0, 1] and [2]."""
    rngs = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(rng, (25, n, 128), jnp.bfloat16) for rng, n in zip(rngs, (8, 2, 2), strict=True))
    slots = jnp.concatenate([jnp.arange(20), 2 * PAGE_SIZE + jnp.arange(5)])
    tables = jnp.array([[0, 1], [2, 0]], jnp.int32)
    lens, rows = jnp.array([20, 5], jnp.int32), jnp.array([0, 20, 25], jnp.int32)
    kv_pages = jnp.zeros((8, PAGE_SIZE, 4, 128), jnp.bfloat16)
    out, _ = attention_layer(q, k, v, kv_pages, slots, lens, tables, rows, jnp.array([2], jnp.int32))
    print("the first token of each prompt sees itself alone:", bool((out[rows[:2], 0] == v[rows[:2], 0]).all()))


if __name__ == "__main__":
    main()
