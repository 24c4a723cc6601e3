"""`jax.nn.dot_product_attention` and tokamax's, with this package as one more `implementation`.

Dense keys `[B, S, K, H]` are a pool already: B pages of S tokens, one per sequence. So nothing is copied, and keys past
a sequence's length are not read.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jax_paged_attn as jpa

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def attend(
    query: Array,  # [B, T, N, H]
    key: Array,  # [B, S, K, H]
    value: Array,  # [B, S, K, H]
    lengths: Array | None,  # [B], the keys of each sequence; None is all
    *,
    last_key: int | None,  # row i sees the keys up to i + last_key; None: all
    window: int | None,  # and the last `window` of them
    scale: float | None,
    soft_cap: float | None,
) -> Array:
    """Attention over dense keys. NotImplementedError for what has no counterpart here."""
    (batch, rows, heads, head_dim), tokens = query.shape, key.shape[1]
    if value.shape != key.shape or {key.dtype, value.dtype} != {query.dtype} or query.dtype not in DTYPES:
        raise NotImplementedError("expected keys and values of one shape, and one dtype of 16 or 32 bits")
    if not 0 <= (last_key or 0) <= tokens - rows:
        raise NotImplementedError("expected no rows beyond the last key")
    if (rows > 1 and lengths is not None) or (last_key is not None and lengths is not None):
        raise NotImplementedError("lengths: expected a single row that sees all keys, as in decoding")
    if last_key is None and window is not None:
        raise NotImplementedError("expected a window that ends at the row's own key")
    # Here a sequence's last row sees its last key, so a length says where rows stand.
    count = tokens if last_key is None else rows + last_key
    lengths = jnp.full(batch, count, jnp.int32) if lengths is None else lengths
    tables = jnp.arange(batch, dtype=jnp.int32)[:, None]
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "sliding_window": window}
    if rows == 1:
        return jpa.paged_attention(query[:, 0], key, value, tables, lengths, **options)[:, None]
    starts = jnp.arange(batch + 1, dtype=jnp.int32) * rows
    flat = query.reshape(-1, heads, head_dim)
    out = jpa.ragged_paged_attention(flat, key, value, lengths, tables, starts, causal=last_key is not None, **options)
    return out.reshape(query.shape)


def for_tokamax(
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any,
    mask: Any,
    logits_scale: Any,
    logits_soft_cap: float | None,
    precision: Any = None,
    q_sharding: Any = None,
    **other: Any,
) -> Array:
    """One of the `implementation`s of `tokamax.dot_product_attention`: `implementation=(for_tokamax, "xla")`."""
    del precision  # products are as exact as the engine makes them
    causal = mask.causal_mask
    masks = (mask.bool_mask, mask.q_start, mask.q_end, mask.k_start)
    if bias is not None or q_sharding is not None or other or any(x is not None for x in masks):
        raise NotImplementedError("bias, masks, query lengths and shardings: expected none of them")
    if not all(isinstance(x, jax.Array) and x.ndim == 4 for x in (query, key, value)):
        raise NotImplementedError("expected arrays [B, T, N, H]")
    if causal is not None and not isinstance(causal.offset, int):
        raise NotImplementedError("expected a static offset of the causal mask")
    lengths = mask.k_end
    if lengths is not None:
        if lengths.shape[1:] != (1, 1):
            raise NotImplementedError("expected one length per sequence")
        lengths = jnp.broadcast_to(lengths[:, 0, 0], len(query)).astype(jnp.int32)
    return attend(
        query,
        key,
        value,
        lengths,
        last_key=None if causal is None else causal.offset,
        window=None if causal is None else causal.window_size,
        scale=logits_scale if isinstance(logits_scale, float) else None,
        soft_cap=logits_soft_cap,
    )


@functools.wraps(jax.nn.dot_product_attention)
def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
) -> Array:
    """`jax.nn.dot_product_attention`, which has "paged" too. None is "paged" where that can, else what JAX chooses."""
    if implementation in (None, "paged"):
        try:
            if not all(x is None for x in (bias, mask, query_seq_lengths)):
                raise NotImplementedError("bias, mask, query_seq_lengths: expected none of them")
            if query.ndim != 4:
                raise NotImplementedError("expected arrays [B, T, N, H]")
            around = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
            last_key = 0 if is_causal else around[1] if around else None
            return attend(
                query,
                key,
                value,
                key_value_seq_lengths,
                last_key=last_key,
                window=around[0] + 1 + (last_key or 0) if around else None,
                scale=scale,
                soft_cap=None,
            )
        except NotImplementedError:
            if implementation == "paged":
                raise
    fallback: Any = jax.nn.dot_product_attention
    return fallback(
        *(query, key, value, bias, mask),
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
    )
