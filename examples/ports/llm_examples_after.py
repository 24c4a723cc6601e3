"""The function of `llm_examples_before.py` on CPUs and GPUs: another import, and int8 pools are read as they are."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, P
from jax.sharding import AxisType

from jax_paged_attn import compat as paged_attention


class Quantized(NamedTuple):
    """int8 numbers and a scale per token and head."""

    quant: Array  # [key/value heads, pages, page size, head dim]
    scale: Array  # [key/value heads, pages, page size]


def parts(pages: Array | Quantized) -> tuple[Array, Array | None]:
    """The pool as it is, and its scales."""
    return pages if isinstance(pages, Quantized) else (pages, None)


@partial(jax.jit, static_argnames="mesh")
def attention(
    q: Array,  # [batch, query heads, 1, head dim]
    k: Array | Quantized,  # [key/value heads, pages, page size, head dim]
    v: Array | Quantized,  # likewise
    block_tables: Array,  # [batch, pages of a sequence]
    lengths: Array,  # [batch]
    mesh: jax.sharding.Mesh,  # its axis "heads" splits heads
) -> Array:
    """One decode step of all heads: `[batch, query heads, 1, head dim]`."""

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(None, "heads"), P("heads"), P("heads"), P(), P()),
        out_specs=P(None, "heads"),
        check_vma=False,
    )
    def attend(q: Array, k: Array | Quantized, v: Array | Quantized, block_tables: Array, lengths: Array) -> Array:
        rows = q[:, :, 0] * q.shape[-1] ** -0.5
        (k_pages, k_scales), (v_pages, v_scales) = parts(k), parts(v)
        operands = (rows, k_pages, v_pages, block_tables, lengths, k_scales, v_scales)
        return paged_attention.paged_attention(*operands)[:, :, None]

    return attend(q, k, v, block_tables, lengths)


def main() -> None:
    """Three sequences, of which the second one has a single token."""
    rngs = jax.random.split(jax.random.key(0), 3)
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(AxisType.Auto,))
    q = jax.random.normal(rngs[0], (3, 8, 1, 64), jnp.bfloat16)
    k, v = (jax.random.normal(rng, (2, 12, 16, 64), jnp.bfloat16) for rng in rngs[1:])
    tables, lengths = jnp.arange(12, dtype=jnp.int32).reshape(3, 4), jnp.array([40, 1, 17], jnp.int32)
    out = attention(q, k, v, tables, lengths, mesh)
    print("a single token sees itself alone:", bool((out[1, 0, 0] == v[0, tables[1, 0], 0]).all()))


if __name__ == "__main__":
    main()
