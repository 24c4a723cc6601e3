"""The paged step of Levanter's attention layer, on its arrays with named axes. `levanter_after.py` is its port.

On GPUs and CPUs Levanter's function is a loop of plain JAX over rows and pages.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from levanter.layers.attention import ragged_paged_attention  # pyright: ignore[reportMissingImports]
from levanter.layers.kv_cache import kv_update_unified_prefix  # pyright: ignore[reportMissingImports]


@partial(jax.jit, donate_argnames="kv_pages")
def paged_step(
    q: Any,  # named [position, kv_head, q_heads_per_group, head_size]
    k: Array,  # [position, kv_head, head_size]
    v: Array,  # likewise
    kv_pages: Any,  # named [page, slot, 2 · kv_head, head_size], keys and values in turn
    pages_and_slots: tuple[Array, Array],  # [position] each, −1 where there is no token
    kv_lens: Any,  # named [seq]
    page_indices: Any,  # named [seq, page], −1 where there is no page
    cu_q_lens: Any,  # named [seq + 1]
    num_seqs: Array,  # scalar or [1]
    sm_scale: Array,  # a scalar: here it is traced
) -> tuple[Any, Any]:
    """Stores the tokens of a batch and lets each attend to its sequence: `(out, kv_pages)`."""
    count = jnp.take(cu_q_lens.array, num_seqs.reshape(()))
    stored = kv_update_unified_prefix(kv_pages.array, *pages_and_slots, k, v, count)
    kv_pages = type(kv_pages)(stored, kv_pages.axes)
    out = ragged_paged_attention(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale=sm_scale, soft_cap=20.0
    )
    return out, kv_pages


def main() -> None:
    """Two prompts of 5 and 3 tokens in pages of 4, and room for a third one."""
    import haliax as hax  # pyright: ignore[reportMissingImports]

    rngs = jax.random.split(jax.random.key(0), 3)
    q = hax.named(jax.random.normal(rngs[0], (10, 2, 4, 64)), ("position", "kv_head", "q_heads_per_group", "head_size"))
    k, v = (jax.random.normal(rng, (10, 2, 64)) for rng in rngs[1:])
    kv_pages = hax.named(jnp.zeros((8, 4, 4, 64)), ("page", "slot", "kv_head", "head_size"))
    where = jnp.array([0, 0, 0, 0, 1, 2, 2, 2, -1, -1]), jnp.array([0, 1, 2, 3, 0, 0, 1, 2, -1, -1])
    lens, rows = hax.named(jnp.array([5, 3, -1]), "seq"), hax.named(jnp.array([0, 5, 8, 8]), "seq")
    tables = hax.named(jnp.array([[0, 1], [2, -1], [-1, -1]]), ("seq", "page"))
    out, _ = paged_step(q, k, v, kv_pages, where, lens, tables, rows, jnp.array(2), jnp.float32(0.125))
    sees_itself = jnp.allclose(out.array[jnp.array([0, 5]), :, 0], v[jnp.array([0, 5])])
    print("the first token of each prompt sees itself alone:", bool(sees_itself))


if __name__ == "__main__":
    main()
