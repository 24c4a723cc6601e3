"""Attention as one dense softmax over gathered keys, in float64: what derivatives are compared with.

JAX differentiates it by itself. Nothing of the package is used; masks are made by NumPy from the lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Array, Case, build

# q, k_pages, v_pages and sinks (or None).
Differentiable = tuple[Any, Any, Any, Any]


def visibility(case: Case) -> tuple[Array, Array, Array]:
    """Three arrays by row: the pages of its sequence `[T, M]`, the keys it sees `[T, M·S]`, if a sequence claims it."""
    inputs = build(case)
    num_rows, (batch, max_pages) = len(inputs.q), inputs.block_tables.shape
    cu_q_lens = np.arange(batch + 1) if inputs.decode else np.maximum.accumulate(np.clip(inputs.cu_q_lens, 0, num_rows))
    live = batch if case.num_seqs is None else min(max(case.num_seqs, 0), batch)
    pages = np.full((num_rows, max_pages), -1)
    seen = np.zeros((num_rows, max_pages * case.page_size), bool)
    claimed = np.zeros(num_rows, bool)
    keys = np.arange(seen.shape[1])
    for b in range(live):
        start, end = cu_q_lens[b : b + 2]
        kv_len = np.clip(inputs.kv_lens[b], 0, seen.shape[1]).astype(int)
        claimed[start:end] = True
        pages[start:end] = inputs.block_tables[b]
        for row in range(start, end):
            position = kv_len - (end - row)
            last = position if case.keywords.get("causal", True) or position < 0 else kv_len - 1
            seen[row] = (keys <= last) & (keys > position - case.keywords.get("sliding_window", 2**40))
    in_pool = (pages >= 0) & (pages < len(inputs.k_pages))
    seen &= np.repeat(in_pool, case.page_size, axis=1)
    return np.where(in_pool, pages, 0), seen, claimed


def attention(case: Case) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`(q, k_pages, v_pages, sinks) -> (out, lse)` of a case; without v_pages values are the first numbers of keys."""
    pages, seen, claimed = visibility(case)
    inputs = build(case)
    group = case.num_heads // case.num_kv_heads
    scale = case.keywords.get("scale", case.head_dim**-0.5)
    cap = case.keywords.get("soft_cap")

    def gather(pool: Any, factor: Array | None) -> jax.Array:
        tokens = pool[pages].reshape(*seen.shape, case.num_kv_heads, pool.shape[-1])
        tokens = jnp.where(seen[:, :, None, None], tokens, 0)
        tokens = tokens * np.broadcast_to(np.float64(1 if factor is None else factor), case.num_kv_heads)[:, None]
        return jnp.repeat(tokens, group, axis=2)

    def attend(q: Any, k_pages: Any, v_pages: Any, sinks: Any = None) -> tuple[jax.Array, jax.Array]:
        v_scale = inputs.v_scale
        if v_pages is None:
            v_pages, v_scale = k_pages[..., : inputs.value_dim], inputs.k_scale
        q = jnp.where(claimed[:, None, None], q, 0)
        scores = jnp.einsum("tnh,tsnh->tns", q, gather(k_pages, inputs.k_scale)) * scale
        if cap is not None:
            scores = cap * jnp.tanh(scores / cap)
        masked = jnp.where(seen[:, None, :], scores, -jnp.inf)
        sink = jnp.where(claimed[:, None], -jnp.inf if sinks is None else sinks, -jnp.inf)
        masked = jnp.concatenate([masked, jnp.broadcast_to(sink, q.shape[:2])[..., None]], axis=-1)
        some = jnp.isfinite(masked).any(axis=-1)
        # Rows without any logit get a harmless one, so that neither they nor their derivatives are NaN.
        masked = jnp.where(some[..., None], masked, 0)
        out = jnp.einsum("tns,tsnh->tnh", jax.nn.softmax(masked)[..., :-1], gather(v_pages, v_scale))
        lse = jnp.where(some, jax.nn.logsumexp(masked, axis=-1), -jnp.inf)
        return jnp.where(some[..., None], out, 0), lse

    return attend
