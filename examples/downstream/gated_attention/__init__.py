"""Paged attention with an output gate: a package of its own on the C++ API of jax_paged_attn's CPU engine."""

import jax
import numpy as np
from jax import Array

from gated_attention import _gated_attention  # pyright: ignore[reportMissingModuleSource]

_TARGET = "gated_attention.decode.v1"
jax.ffi.register_ffi_target(_TARGET, _gated_attention.handler(), platform="cpu", api_version=1)


def gated_paged_attention(
    q: Array, gate: Array, k_pages: Array, v_pages: Array, block_tables: Array, lengths: Array
) -> Array:
    """`sigmoid(gate) * paged_attention(q, …)` in one call, on the CPU.

    Args:
      q: `[B, N, H]` f32, one query row per sequence.
      gate: `[B, N, H]` f32, before the sigmoid.
      k_pages: `[P, S, K, H]` f32.
      v_pages: `[P, S, K, H]` f32.
      block_tables: `[B, M]` int32.
      lengths: `[B]` int32.

    Returns:
      `[B, N, H]` f32.
    """
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(q, gate, k_pages, v_pages, block_tables, lengths, scale=np.float32(q.shape[-1] ** -0.5))
