"""The public attention functions: what they mean, their checks, and the way into the primitive."""

import functools
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_paged_attn import _checks, _debug, _modes, _primitive, _reference
from jax_paged_attn._layouts import LAYOUTS

Attend = Callable[..., tuple[Array, Array]]


class _Options(TypedDict, total=False):
    """The keywords of `paged_attention_reference` but `return_lse`, for the types of what it decides."""

    scale: float | None
    sliding_window: int | None
    soft_cap: float | None
    sinks: ArrayLike | None
    k_scale: ArrayLike | None
    v_scale: ArrayLike | None
    batch_invariant: bool


class _RaggedOptions(_Options, total=False):
    causal: bool


class _EngineOptions(_Options, total=False):
    implementation: str | None


class _RaggedEngineOptions(_RaggedOptions, total=False):
    implementation: str | None


@overload
def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_EngineOptions],
) -> Array: ...


@overload
def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[_EngineOptions],
) -> tuple[Array, Array]: ...


def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    batch_invariant: bool = False,
) -> Array | tuple[Array, Array]:
    """Decode: one query token a sequence, the newest, attends to the sequence's pages.

    Letters: B sequences, N query heads, K key/value heads (N % K == 0), H head dim, P pages in the pool, S tokens a
    page, M pages a sequence may have.

    Ids and lengths may be integers of any width. Those that int32 cannot hold raise where they are lists or NumPy
    arrays, and are clamped to int32, which masks them, where they are JAX arrays.

    Args:
      q: `[B, N, H]` bfloat16, float16 or float32.
      k_pages: `[P, S, K, H]`, dtype as q, or float8_e4m3fn, float8_e5m2, int8.
      v_pages: as `k_pages`.
      block_tables: `[B, M]` int32; the page of token t of sequence b is `block_tables[b, t // S]`. Entries past the
        length are never read. An entry outside [0, P) that is used masks its tokens.
      lengths: `[B]` int32, tokens in the cache, the new one included; clipped to [0, M·S].
      scale: multiplies the scores; None is 1/sqrt(H). A static number, as are window and cap.
      sliding_window: w ≥ 1: the token at position i sees keys j with i − w < j ≤ i.
      soft_cap: c > 0: scores become c·tanh(scores / c), after the scale, before the mask (Gemma 2).
      sinks: `[N]` float32, one more logit a head in the softmax's denominator, without a value, neither scaled nor
        capped (gpt-oss). In split work give them to one part only.
      k_scale: positive, finite float32, scalar or `[K]`: key = stored × k_scale. Default 1, required for int8.
      v_scale: likewise for values.
      return_lse: return the log-sum-exp of the scores too.
      implementation: the engine that must run: "cpu", "fused", "cublaslt" or "reference"; None picks the best for the
        call, see `explain`.
      batch_invariant: True: a sequence gives the same bits alone and in any batch, wherever it stands there and
        whatever the others are, in calls of this function that differ in B, T and P only; gradients promise nothing.
        "cpu" does so anyway, "fused" at some cost, "cublaslt" and "reference" cannot. A static bool.

    Returns:
      `[B, N, H]` in q's dtype; with `return_lse` a tuple of that and lse `[B, N]` float32, natural log, the sink
      included. A sequence without visible keys gives 0, and lse −inf or its sink.

    Raises:
      ValueError: a shape, dtype or value that does not fit; the message names the argument, what was expected, and
        what came. When it is lowered: the platform lacks the named engine, or any that promises `batch_invariant`.
      TypeError: an argument of the wrong kind, such as a tracer for `scale`.
    """
    static = static_parameters(scale, sliding_window, soft_cap, True, return_lse, implementation, batch_invariant)
    return paged(_primitive.attention, static, q, k_pages, v_pages, block_tables, lengths, sinks, k_scale, v_scale)


@overload
def paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...


@overload
def paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Array, Array]: ...


def paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
) -> Array | tuple[Array, Array]:
    """`paged_attention` in plain JAX: the same arguments, results and errors; the oracle that engines are held to.

    `batch_invariant` changes nothing here: what XLA makes of the code decides about bits.
    """
    static = static_parameters(scale, sliding_window, soft_cap, True, return_lse, None, batch_invariant)
    return paged(_run_reference, static, q, k_pages, v_pages, block_tables, lengths, sinks, k_scale, v_scale)


@overload
def ragged_paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_RaggedEngineOptions],
) -> Array: ...


@overload
def ragged_paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_RaggedEngineOptions],
) -> tuple[Array, Array]: ...


def ragged_paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    batch_invariant: bool = False,
) -> Array | tuple[Array, Array]:
    """Any mix of prompts, chunks of prompts and decode rows: T query tokens of B sequences attend to their pages.

    The order of the arguments is that of JAX's TPU `ragged_paged_attention`. Letters as in `paged_attention`.

    Args:
      q: `[T, N, H]` bfloat16, float16 or float32; the rows of a sequence are adjacent.
      k_pages: `[P, S, K, H]`, dtype as q, or float8_e4m3fn, float8_e5m2, int8.
      v_pages: as `k_pages`.
      kv_lens: `[B]` int32, tokens in the cache, those of this call included; clipped to [0, M·S].
      block_tables: `[B, M]` int32, see `paged_attention`.
      cu_q_lens: `[B + 1]` int32: the first row of each sequence, then the end; clipped to [0, T] and to its running
        maximum. Rows outside [`cu_q_lens[0]`, `cu_q_lens[num_seqs]`) give 0 and lse −inf.
      num_seqs: int32, scalar or `[1]`: how many of the B sequences are live, clipped to [0, B]; None is all.
      causal: row r of a sequence with n rows stands at position i = kv_len − n + r and sees keys j ≤ i. False: it sees
        all keys of the sequence (with a window those with j > i − w). Rows before position 0 see no key.
      scale, sliding_window, soft_cap, sinks, k_scale, v_scale, return_lse, implementation, batch_invariant: as in
        `paged_attention`.

    Returns:
      `[T, N, H]` in q's dtype; with `return_lse` a tuple of that and lse `[T, N]` float32.

    Raises:
      ValueError, TypeError: as `paged_attention`.
    """
    static = static_parameters(scale, sliding_window, soft_cap, causal, return_lse, implementation, batch_invariant)
    return ragged(
        _primitive.attention,
        static,
        q,
        k_pages,
        v_pages,
        kv_lens,
        block_tables,
        cu_q_lens,
        num_seqs,
        sinks,
        k_scale,
        v_scale,
    )


@overload
def ragged_paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_RaggedOptions],
) -> Array: ...


@overload
def ragged_paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_RaggedOptions],
) -> tuple[Array, Array]: ...


def ragged_paged_attention_reference(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
) -> Array | tuple[Array, Array]:
    """`ragged_paged_attention` in plain JAX: the same arguments, results and errors; the oracle.

    `batch_invariant` changes nothing, as in `paged_attention_reference`.
    """
    static = static_parameters(scale, sliding_window, soft_cap, causal, return_lse, None, batch_invariant)
    return ragged(
        _run_reference, static, q, k_pages, v_pages, kv_lens, block_tables, cu_q_lens, num_seqs, sinks, k_scale, v_scale
    )


def merge_attention_states(
    outs: ArrayLike | SequenceOf[ArrayLike], lses: ArrayLike | SequenceOf[ArrayLike]
) -> tuple[Array, Array]:
    """Merges attention over disjoint sets of keys, such as a shared prefix and the rest, or keys split over devices.

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
    # Differences only of what is finite or NaN: inf − inf would be NaN, also in the gradient of a branch not taken.
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


def static_parameters(
    scale: float | None,
    sliding_window: int | None,
    soft_cap: float | None,
    causal: bool,
    return_lse: bool,
    implementation: str | None,
    batch_invariant: bool,
) -> dict[str, Any]:
    if implementation is not None and not isinstance(implementation, str):
        raise TypeError(f"implementation: expected the name of an engine or None, got {type(implementation).__name__}")
    return {
        "scale": None if scale is None else _checks.static_number("scale", scale),
        "sliding_window": 0 if sliding_window is None else _checks.static_count("sliding_window", sliding_window),
        "soft_cap": 0.0 if soft_cap is None else _checks.static_positive("soft_cap", soft_cap),
        "causal": _checks.static_bool("causal", causal),
        "return_lse": _checks.static_bool("return_lse", return_lse),
        "implementation": implementation,
        "batch_invariant": _checks.static_bool("batch_invariant", batch_invariant),
    }


def paged(
    attend: Attend,
    static: dict[str, Any],
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: ArrayLike,
    lengths: ArrayLike,
    sinks: ArrayLike | None,
    k_scale: ArrayLike | None,
    v_scale: ArrayLike | None,
    layout: str = "split",
) -> Array | tuple[Array, Array]:
    """Decode through `attend`, with pools of any layout."""
    dims = _checks.Dims()
    q, k_pages, v_pages = _query_and_pages(dims, "B N H", q, k_pages, v_pages, layout)
    block_tables = _int32(dims, "block_tables", block_tables, "B M")
    lengths = _int32(dims, "lengths", lengths, "B")
    per_head = _per_head(dims, q, k_pages, sinks, k_scale, v_scale)
    _debug.check_attention(q, k_pages, v_pages, block_tables, lengths, per_head, static, layout=layout)
    return _attend(
        attend,
        {**static, "decode": True, "layout": layout},
        (q, k_pages, v_pages, block_tables, lengths),
        _one_row_each(dims["B"]),
        per_head,
    )


def ragged(
    attend: Attend,
    static: dict[str, Any],
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    kv_lens: ArrayLike,
    block_tables: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike | None,
    sinks: ArrayLike | None,
    k_scale: ArrayLike | None,
    v_scale: ArrayLike | None,
    layout: str = "split",
    tables_name: str = "block_tables",
) -> Array | tuple[Array, Array]:
    """Ragged attention through `attend`, with pools of any layout; `tables_name` is what errors call the tables."""
    dims = _checks.Dims()
    q, k_pages, v_pages = _query_and_pages(dims, "T N H", q, k_pages, v_pages, layout)
    kv_lens = _int32(dims, "kv_lens", kv_lens, "B")
    block_tables = _int32(dims, tables_name, block_tables, "B M")
    cu_q_lens = _int32(dims, "cu_q_lens", cu_q_lens, "B+1")

    if num_seqs is not None:
        num_seqs = _checks.as_int32("num_seqs", num_seqs)
        num_seqs = _int32(dims, "num_seqs", num_seqs, "1" if num_seqs.ndim else "")
    per_head = _per_head(dims, q, k_pages, sinks, k_scale, v_scale)
    rows: Any = {"cu_q_lens": cu_q_lens, "num_seqs": num_seqs, "layout": layout, "tables_name": tables_name}
    _debug.check_attention(q, k_pages, v_pages, block_tables, kv_lens, per_head, static, **rows)
    return _attend(
        attend,
        {**static, "decode": False, "layout": layout},
        (q, k_pages, v_pages, block_tables, kv_lens),
        _rows_of_each(cu_q_lens, num_seqs, dims["T"]),
        per_head,
    )


@functools.partial(_modes.compiled, static_argnums=0)
def _one_row_each(num_seqs: int) -> tuple[Array, Array]:
    """The first rows and the row counts of sequences with one row each."""
    return jnp.arange(num_seqs, dtype=jnp.int32), jnp.ones(num_seqs, jnp.int32)


@functools.partial(_modes.compiled, static_argnums=2)
def _rows_of_each(cu_q_lens: Array, num_seqs: Array | None, num_rows: int) -> tuple[Array, Array]:
    """The first rows and the row counts of ragged sequences; dead ones have no row."""
    ends = jax.lax.cummax(jnp.clip(cu_q_lens, 0, num_rows))
    counts = ends[1:] - ends[:-1]
    if num_seqs is not None:
        live = jnp.arange(counts.shape[0], dtype=jnp.int32) < num_seqs  # a [1] broadcasts as a scalar does
        counts = jnp.where(live, counts, 0)
    return ends[:-1], counts


def _query_and_pages(
    dims: _checks.Dims, q_letters: str, q: ArrayLike, k_pages: ArrayLike, v_pages: ArrayLike, layout: str
) -> tuple[Array, Array, Array]:
    shape, (k_name, v_name) = LAYOUTS[layout].shape, LAYOUTS[layout].pools
    q, k_pages, v_pages = (_checks.as_array(name, x) for name, x in (("q", q), (k_name, k_pages), (v_name, v_pages)))
    dims.match("q", q, q_letters, _checks.COMPUTE_DTYPES)
    dims.match(k_name, k_pages, shape, (str(q.dtype), *_checks.QUANTIZED_DTYPES))
    dims.match(v_name, v_pages, shape, (str(k_pages.dtype),))
    _primitive.check_sizes(dims["N"], dims["K"], dims["H"], dims["S"], k_name)
    return q, k_pages, v_pages


def _int32(dims: _checks.Dims, name: str, x: ArrayLike, letters: str) -> Array:
    array = _checks.as_int32(name, x)
    dims.match(name, array, letters, ("int32",))
    return array


def _per_head(
    dims: _checks.Dims,
    q: Array,
    k_pages: Array,
    sinks: ArrayLike | None,
    k_scale: ArrayLike | None,
    v_scale: ArrayLike | None,
) -> tuple[Array, Array, Array]:
    """`sinks`, `k_scale`, `v_scale` as the primitive takes them: `[1, heads]`, or `[0, heads]` where absent."""
    if sinks is None:
        sinks = _modes.zeros((0, dims["N"]), jnp.float32)
    else:
        sinks = _checks.as_float32("sinks", sinks)
        dims.match("sinks", sinks, "N", ("float32",))
        sinks = sinks[None]
    return sinks, page_scale(dims, "k_scale", k_scale, k_pages), page_scale(dims, "v_scale", v_scale, k_pages)


def page_scale(dims: _checks.Dims, name: str, scale: ArrayLike | None, pages: Array) -> Array:
    """A page scale as the primitives take it: `[1, K]` float32, or `[0, K]` where absent."""
    if scale is None:
        if pages.dtype == jnp.int8:
            raise ValueError(f"{name}: required for int8 pages, got None")
        return _modes.zeros((0, dims["K"]), jnp.float32)
    array = _checks.as_float32(name, scale)
    dims.match(name, array, "K" if array.ndim else "", ("float32",))
    _checks.check_scales(name, scale, array)
    return jnp.broadcast_to(array, (dims["K"],))[None]


def _attend(
    attend: Attend,
    static: dict[str, Any],
    arrays: tuple[Array, ...],
    row_ranges: tuple[Array, Array],
    per_head: tuple[Array, Array, Array],
) -> Array | tuple[Array, Array]:
    parameters = dict(static)
    return_lse = parameters.pop("return_lse")
    if parameters["scale"] is None:
        parameters["scale"] = float(arrays[0].shape[-1]) ** -0.5
    out, lse = attend(*arrays, *row_ranges, *per_head, **parameters)
    return (out, lse) if return_lse else out


def _run_reference(
    *operands: Array, implementation: str | None, batch_invariant: bool, **parameters: Any
) -> tuple[Array, Array]:
    del implementation, batch_invariant  # the reference functions offer no choice
    return _checked_reference(*operands, **parameters)


_checked_reference = _modes.allowing_rows_without_keys(_reference.attention, "paged_attention_reference")
