"""A step of a server as a pytree: which sequences its tokens belong to, and where their keys and values go."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_paged_attn._allocator_types import StepArrays

IntArray = Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetadata:
    """Which sequences the T tokens of a step belong to, and where their keys and values go. All int32.

    A step in which each of B sequences has one token, its last, is a decode step: T = B, and it has neither `cu_q_lens`
    nor `num_seqs`. Attention then runs on `paged_attention`, which costs less than `ragged_paged_attention`.

    Attributes:
      positions: `[T]`, position of each token in its sequence, from 0.
      slot_mapping: `[T]`, page · S + offset of each token; −1 for padding, which is not written.
      block_tables: `[B, M]`, page ids of each sequence.
      kv_lens: `[B]`, tokens of each sequence in the cache, the new ones included; 0 for padding.
      cu_q_lens: `[B + 1]`, first token of each sequence in the step, then the end; None in a decode step.
      num_seqs: scalar, how many of the B rows are live; None in a decode step.

    Example:
      >>> from jax_paged_attn import StepMetadata
      >>> step = StepMetadata.whole_sequences(num_seqs=2, length=3, page_size=2)
      >>> step.slot_mapping.tolist(), step.cu_q_lens.tolist()
      ([0, 1, 2, 4, 5, 6], [0, 3, 6])
    """

    positions: IntArray
    slot_mapping: IntArray
    block_tables: IntArray
    kv_lens: IntArray
    cu_q_lens: IntArray | None = None
    num_seqs: IntArray | None = None

    @property
    def is_decode(self) -> bool:
        """True if each sequence has one token in the step."""
        return self.cu_q_lens is None

    @classmethod
    def decode(cls, block_tables: IntArray, kv_lens: IntArray, page_size: int) -> StepMetadata:
        """Makes the decode step of the last token of each sequence; may be traced.

        Args:
          block_tables: `[B, M]` int32, page ids.
          kv_lens: `[B]` int32, the new token included; 0 for padding.
          page_size: S, tokens per page.

        Example:
          >>> import jax.numpy as jnp
          >>> from jax_paged_attn import StepMetadata
          >>> step = StepMetadata.decode(jnp.array([[7, 3], [-1, -1]]), jnp.array([5, 0]), page_size=4)
          >>> step.positions.tolist(), step.slot_mapping.tolist()
          ([4, 0], [12, -1])
        """
        kv_lens, tables = jnp.asarray(kv_lens), jnp.asarray(block_tables)
        positions = jnp.maximum(kv_lens - 1, 0)
        pages = jnp.take_along_axis(tables, positions[:, None] // page_size, axis=1, mode="clip")[:, 0]
        slots = jnp.where((kv_lens > 0) & (pages >= 0), pages * page_size + positions % page_size, -1)
        return cls(positions, slots, tables, kv_lens)

    @classmethod
    def whole_sequences(cls, num_seqs: int, length: int, page_size: int) -> StepMetadata:
        """Makes the step that prefills `num_seqs` sequences of `length` tokens each, with pages 0, 1, … in order."""
        pages = -(-length // page_size)
        tables = np.arange(num_seqs * pages, dtype=np.int32).reshape(num_seqs, pages)
        positions = np.arange(length, dtype=np.int32)
        slots = tables[:, positions // page_size] * page_size + positions % page_size
        return cls(
            positions=jnp.tile(positions, num_seqs),
            slot_mapping=jnp.asarray(slots.reshape(-1)),
            block_tables=jnp.asarray(tables),
            kv_lens=jnp.full(num_seqs, length, jnp.int32),
            cu_q_lens=jnp.arange(num_seqs + 1, dtype=jnp.int32) * length,
            num_seqs=jnp.int32(num_seqs),
        )

    @classmethod
    def from_arrays(cls, arrays: StepArrays) -> StepMetadata:
        """Makes the step from the arrays of `jax_paged_attn.PageAllocator.step`."""
        return cls(**{field.name: getattr(arrays, field.name) for field in dataclasses.fields(cls)})
