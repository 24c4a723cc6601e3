"""The public attention functions: what they mean. Their keywords stand in `_options.py`, their checks in `_call.py`."""

from collections.abc import Sequence as SequenceOf
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_paged_attn import _call, _checks, _modes, _options, _primitive, _reference, _rows


@overload
def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_options.Options],
) -> Array: ...


@overload
def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[_options.Options],
) -> tuple[Array, Array]: ...


@_options.keywords(_options.Options, return_lse=False)
def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """Decode: one query token per sequence, the newest, attends to the sequence's pages.

    Letters: B sequences, N query heads, K key/value heads (N % K == 0), H head dim of queries and keys, Hv that of
    values (mostly the same), P pages in the pool, S tokens per page, M pages per sequence at most. Pages and tables are
    those of PagedAttention (Kwon et al. 2023).

    Ids and lengths may be integers of any width. Those that int32 cannot hold raise in lists and NumPy arrays. In JAX
    arrays they are clamped to int32, which masks them.

    Args:
      q: `[B, N, H]` bfloat16, float16 or float32.
      k_pages: `[P, S, K, H]`, dtype as q, or float8_e4m3fn, float8_e5m2, int8.
      v_pages: `[P, S, K, Hv]`, dtype as `k_pages`. None: values are the first `value_dim` numbers of each key, as in
        multi-head latent attention (MLA, DeepSeek-AI 2024: H = 576, Hv = 512, K = 1).
      block_tables: `[B, M]` int32; the page of token t of sequence b is `block_tables[b, t // S]`. Entries past the
        length are never read. An entry outside [0, P) that is used masks its tokens.
      lengths: `[B]` int32, tokens in the cache, the new one included; clipped to [0, M·S].
      scale: multiplies the scores; None is 1/sqrt(H). A static number, as are window and cap.
      sliding_window: w ≥ 1: the token at position i sees keys j with i − w < j ≤ i.
      soft_cap: c > 0: scores become c·tanh(scores / c), after the scale, before the mask (Gemma 2).
      sinks: `[N]` float32, one more logit per head in the softmax's denominator, without a value, neither scaled nor
        capped (gpt-oss). Where keys are split over calls, give sinks to one of them only.
      k_scale: positive, finite float32, scalar or `[K]`: key = stored × k_scale. Default 1, required for int8.
      v_scale: likewise for values; None where `v_pages` is None, since `k_scale` then holds for values too.
      value_dim: Hv where `v_pages` is None, 1 ≤ Hv ≤ H, a static integer; else None.
      return_lse: return the log-sum-exp of the scores too.
      implementation: the engine that must run: "cpu", "fused", "cublaslt" or "reference"; None picks the best for the
        call, see `explain`.
      batch_invariant: a static bool. True: a sequence gives the same bits alone and at any place of any batch, in calls
        of this function that differ in B, T and P only. Gradients have no such guarantee. "cpu" gives it anyway,
        "fused" at some cost, "cublaslt" and "reference" never.

    Returns:
      `[B, N, Hv]` in q's dtype; with `return_lse` a tuple of that and lse `[B, N]` float32, natural log, the sink
      included. A sequence without visible keys gives 0, and lse −inf or its sink.

    Raises:
      ValueError: a shape, dtype or value that does not fit; the message names the argument, what was expected, and
        what came. At lowering: the platform lacks the named engine, or any that guarantees `batch_invariant`.
      TypeError: an argument of the wrong kind, such as a tracer for `scale`.

    Example:
      A sequence of five tokens in pages 2 and 0. The last entry of its table is not in use.

      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> pages = jnp.ones((3, 4, 1, 8), jnp.float32)  # P = 3, S = 4, K = 1, H = 8
      >>> block_tables = jnp.array([[2, 0, -1]], jnp.int32)
      >>> out = jpa.paged_attention(jnp.ones((1, 2, 8)), pages, pages, block_tables, jnp.array([5], jnp.int32))
      >>> out.shape, round(float(out.mean()), 4)
      ((1, 2, 8), 1.0)
    """
    return _call.paged(_primitive.attention, q, k_pages, v_pages, block_tables, lengths, options)


@overload
def paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_options.ReferenceOptions],
) -> Array: ...


@overload
def paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[_options.ReferenceOptions],
) -> tuple[Array, Array]: ...


@_options.keywords(_options.ReferenceOptions, return_lse=False)
def paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """`paged_attention` in plain JAX, computed in float32: the reference that engines are compared with.

    Arguments, results and errors are those of `paged_attention`, without `implementation`. `batch_invariant` has no
    effect, since XLA decides about the bits.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> q, pages = jnp.ones((1, 2, 8)), jnp.ones((3, 4, 1, 8))
      >>> where = (jnp.array([[2, 0, -1]], jnp.int32), jnp.array([5], jnp.int32))
      >>> out, lse = jpa.paged_attention_reference(q, pages, pages, *where, scale=0.0, return_lse=True)
      >>> lse.shape, round(float(jnp.exp(lse[0, 0])), 4)  # five keys with scores of 0
      ((1, 2), 5.0)
    """
    return _call.paged(_run_reference, q, k_pages, v_pages, block_tables, lengths, options)


@overload
def ragged_paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_options.RaggedOptions],
) -> Array: ...


@overload
def ragged_paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_options.RaggedOptions],
) -> tuple[Array, Array]: ...


@_options.keywords(_options.RaggedOptions, return_lse=False)
def ragged_paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """Any mix of prompts, chunks of prompts and decode rows: T query tokens of B sequences attend to their pages.

    The order of the arguments is that of JAX's TPU kernel `ragged_paged_attention`. Letters as in `paged_attention`.

    Args:
      q: `[T, N, H]` bfloat16, float16 or float32; the rows of a sequence are adjacent.
      k_pages: `[P, S, K, H]`, dtype as q, or float8_e4m3fn, float8_e5m2, int8.
      v_pages: `[P, S, K, Hv]`, dtype as `k_pages`; None: the values are the first `value_dim` numbers of each key.
      kv_lens: `[B]` int32, tokens in the cache, those of this call included; clipped to [0, M·S].
      block_tables: `[B, M]` int32, see `paged_attention`.
      cu_q_lens: `[B + 1]` int32: the first row of each sequence, then the end; clipped to [0, T] and to its running
        maximum. Rows outside [`cu_q_lens[0]`, `cu_q_lens[num_seqs]`) give 0 and lse −inf.
      num_seqs: int32, scalar or `[1]`: how many of the B sequences are live, clipped to [0, B]; None is all.
      causal: row r of a sequence with n rows stands at position i = kv_len − n + r and sees keys j ≤ i. False: it sees
        all keys of the sequence (with a window those with j > i − w). Rows before position 0 see no key.
      options: the other keywords are those of `paged_attention`.

    Returns:
      `[T, N, Hv]` in q's dtype; with `return_lse` a tuple of that and lse `[T, N]` float32.

    Raises:
      ValueError, TypeError: as `paged_attention`.

    Example:
      A prompt of three tokens and a sequence that decodes its sixth token, in one call.

      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> pages = jnp.ones((3, 4, 1, 8), jnp.float32)
      >>> kv_lens, block_tables = jnp.array([3, 6], jnp.int32), jnp.array([[1, -1], [2, 0]], jnp.int32)
      >>> cu_q_lens = jnp.array([0, 3, 4], jnp.int32)
      >>> jpa.ragged_paged_attention(jnp.ones((4, 2, 8)), pages, pages, kv_lens, block_tables, cu_q_lens).shape
      (4, 2, 8)
    """
    operands = (q, k_pages, v_pages, kv_lens, block_tables, cu_q_lens, num_seqs)
    return _call.ragged(_primitive.attention, *operands, options)


@overload
def ragged_paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_options.RaggedReferenceOptions],
) -> Array: ...


@overload
def ragged_paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_options.RaggedReferenceOptions],
) -> tuple[Array, Array]: ...


@_options.keywords(_options.RaggedReferenceOptions, return_lse=False)
def ragged_paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """`ragged_paged_attention` in plain JAX, computed in float32: the reference.

    Arguments, results and errors are those of `ragged_paged_attention`, without `implementation`. `batch_invariant` has
    no effect, as in `paged_attention_reference`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> q, pages, rows = jnp.ones((3, 2, 8)), jnp.ones((3, 4, 1, 8)), jnp.array([0, 3], jnp.int32)
      >>> where = (jnp.array([3], jnp.int32), jnp.array([[1]], jnp.int32), rows)
      >>> _, lse = jpa.ragged_paged_attention_reference(q, pages, pages, *where, scale=0.0, return_lse=True)
      >>> [round(float(n), 4) for n in jnp.exp(lse[:, 0])]  # a causal row sees the keys up to its own
      [1.0, 2.0, 3.0]
    """
    operands = (q, k_pages, v_pages, kv_lens, block_tables, cu_q_lens, num_seqs)
    return _call.ragged(_run_reference, *operands, options)


def _run_reference(
    *operands: Array, implementation: str | None, batch_invariant: bool, cumulative: bool = False, **static: Any
) -> tuple[Array, Array]:
    del implementation, batch_invariant  # the reference functions offer no choice
    return _checked_reference(*(_rows.with_ranges(operands) if cumulative else operands), **static)


_checked_reference = _modes.allowing_rows_without_keys(_reference.attention, "paged_attention_reference")


def merge_attention_states(
    outs: ArrayLike | SequenceOf[ArrayLike], lses: ArrayLike | SequenceOf[ArrayLike]
) -> tuple[Array, Array]:
    """Merges attention over disjoint sets of keys, such as a shared prefix and the rest, or keys split over devices.

    The rule is that of cascade inference in FlashInfer (Ye et al. 2024).

    Args:
      outs: `[parts, ..., N, H]`, or a sequence of `[..., N, H]`: the partial results, float32, bfloat16 or float16.
      lses: `[parts, ..., N]` float32, or a sequence of `[..., N]`: their log-sum-exps, natural log. −inf marks an empty
        part, whose `out` is ignored. Sinks belong to one part only.

    Returns:
      `(out, lse)`: `[..., N, H]` in the dtype of `outs`, and `[..., N]` float32. Rows empty in all parts give 0, −inf.
      Parts with lse +inf outweigh all others: the result is their mean, with lse +inf, and no gradient goes through
      their lses. A NaN lse makes its row NaN.

    Raises:
      ValueError: zero parts, or shapes that do not fit.

    Example:
      The keys of a sequence in two calls, one per page, give the same as in one call.

      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> q, pages = jnp.ones((1, 2, 8)), jnp.arange(64.0).reshape(2, 4, 1, 8)
      >>> def attend(table, length):
      ...     operands = (q, pages, pages, jnp.array([table], jnp.int32), jnp.array([length], jnp.int32))
      ...     return jpa.paged_attention(*operands, scale=0.01, return_lse=True)
      >>> outs, lses = zip(attend([0], 4), attend([1], 4))
      >>> out, lse = jpa.merge_attention_states(outs, lses)
      >>> bool(jnp.allclose(out, attend([0, 1], 8)[0], rtol=1e-4))
      True
    """
    # The barrier keeps XLA from compiling the merge of a list otherwise than that of an array, with other bits.
    stacked = _stack("outs", outs), _checks.as_float32("lses", _stack("lses", lses))
    out_parts, lse_parts = jax.lax.optimization_barrier(stacked)
    if out_parts.dtype not in [jnp.dtype(d) for d in _checks.COMPUTE_DTYPES]:
        raise ValueError(f"outs: expected dtype {' or '.join(_checks.COMPUTE_DTYPES)}, got {out_parts.dtype}")
    if lse_parts.dtype != jnp.float32:
        raise ValueError(f"lses: expected dtype float32, got {lse_parts.dtype}")
    if out_parts.ndim < 2 or lse_parts.shape != out_parts.shape[:-1]:
        raise ValueError(
            f"lses: expected the shape of outs without its last axis, {out_parts.shape[:-1]}, got {lse_parts.shape}"
        )
    if out_parts.shape[0] == 0:
        raise ValueError("outs: expected at least one part (axis 0), got none")

    return _merged(out_parts, lse_parts)


@_modes.compiled
def _merged(out_parts: Array, lse_parts: Array) -> tuple[Array, Array]:
    top = jax.lax.stop_gradient(lse_parts.max(axis=0, keepdims=True))
    alive = ~jnp.isneginf(lse_parts)
    # Only finite values and NaN are subtracted: inf − inf would be NaN, also in the gradient of a branch not taken.
    infinite = jnp.isinf(lse_parts)
    above = jnp.where(infinite, 0.0, lse_parts) - jnp.where(infinite | jnp.isneginf(top), 0.0, top)
    weights = jnp.where(alive, jnp.exp(above), 0.0)
    total = weights.sum(axis=0, keepdims=True)
    nothing = total == 0  # false for NaN, which stays
    divisor = jnp.where(nothing, 1.0, total)
    weighted = jnp.where(alive[..., None], out_parts.astype(jnp.float32), 0.0) * (weights / divisor)[..., None]
    lse = jnp.where(nothing, -jnp.inf, top + jnp.log(divisor))
    return weighted.sum(axis=0).astype(out_parts.dtype), lse[0]


def _stack(name: str, parts: ArrayLike | SequenceOf[ArrayLike]) -> Array:
    if not isinstance(parts, SequenceOf):
        return _checks.as_array(name, parts)
    if not parts:
        raise ValueError(f"{name}: expected at least one part, got none")
    arrays = [_checks.as_array(f"{name}[{i}]", part) for i, part in enumerate(parts)]
    for i, array in enumerate(arrays):
        if array.shape != arrays[0].shape or array.dtype != arrays[0].dtype:
            expected, got = (f"{x.dtype}{list(x.shape)}" for x in (arrays[0], array))
            raise ValueError(f"{name}[{i}]: expected {expected} as {name}[0], got {got}")
    return jnp.stack(arrays)
