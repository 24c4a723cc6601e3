"""The query rows of ragged sequences: from cumulative numbers of rows to a first row and a row count per sequence.

The primitive takes either. Transformations ask for the second form, which they can fold and differentiate, and so do
engines without code of their own for the first.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jax_paged_attn import _modes

# Where the primitive has `cu_q_lens` and `num_seqs`, or first rows and row counts.
_FIRST, _SECOND = 5, 6
# Beyond, all pairs of sequences would cost more than a running maximum.
_FEW_SEQUENCES = 512


@functools.partial(_modes.compiled, static_argnums=2)
def rows_of_each(cu_q_lens: Array, num_seqs: Array, num_rows: int) -> tuple[Array, Array]:
    """The first rows and the row counts of ragged sequences; dead ones have no row.

    These are two reductions over all pairs of sequences, of which XLA makes one kernel for a GPU. It makes two or three
    of a running maximum, and attention waits for them.

    Args:
      num_seqs: a scalar, `[1]`, or `[0]` where all sequences live.
    """
    ends = jnp.clip(cu_q_lens, 0, num_rows)
    num_sequences = cu_q_lens.shape[0] - 1
    index = jnp.arange(num_sequences, dtype=jnp.int32)
    live = jnp.ones(num_sequences, bool) if num_seqs.shape == (0,) else index < num_seqs  # a [1] broadcasts
    if isinstance(num_sequences, int) and num_sequences <= _FEW_SEQUENCES:
        before = jnp.arange(num_sequences + 1, dtype=jnp.int32)[None] <= index[:, None]
        rows_since = jnp.where(live[:, None], jnp.maximum(ends[1:, None] - ends[None], 0), 0)
        return jnp.where(before, ends[None], 0).max(axis=1), jnp.where(before, rows_since, num_rows).min(axis=1)
    ends = jax.lax.cummax(ends)
    return ends[:-1], jnp.where(live, ends[1:] - ends[:-1], 0)


def with_ranges(operands: Sequence[Array]) -> tuple[Array, ...]:
    """The operands of a cumulative call with first rows and row counts."""
    ranges = rows_of_each(operands[_FIRST], operands[_SECOND], operands[0].shape[0])
    return (*operands[:_FIRST], *ranges, *operands[_SECOND + 1 :])


def mapped_with_ranges(
    operands: Sequence[Array], dims: Sequence[int | None]
) -> tuple[tuple[Array, ...], tuple[int | None, ...]]:
    """The same for a call that is mapped over axis `dims[i]` of each operand; and the axes of the new operands."""
    rows, mapped = (operands[_FIRST], operands[_SECOND]), (dims[_FIRST], dims[_SECOND])
    num_rows = operands[0].shape[1 if dims[0] == 0 else 0]

    def ranges(cu_q_lens: Array, num_seqs: Array) -> tuple[Array, Array]:
        return rows_of_each(cu_q_lens, num_seqs, num_rows)

    is_mapped = mapped != (None, None)
    made = jax.vmap(ranges, in_axes=mapped)(*rows) if is_mapped else ranges(*rows)
    axis = 0 if is_mapped else None
    return (
        (*operands[:_FIRST], *made, *operands[_SECOND + 1 :]),
        (*dims[:_FIRST], axis, axis, *dims[_SECOND + 1 :]),
    )
