"""The package's engines on the GPU and every peer that can be called from JAX, each behind the same signature."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_paged_attn as jpa
from benchmarks.cases import Operands, Workload
from benchmarks.cpu import gather_and_einsum
from jax_paged_attn import _engines

Attend = Callable[[Operands], Array]  # -> [T, N, H]


class UnsupportedError(Exception):
    """The workload is not one that this contender can run; the message says why."""


@dataclass(frozen=True)
class Variant:
    """One setting of a contender: the fastest of its variants counts."""

    label: str
    attend: Attend
    heads_first: bool = False  # wants its pools as [K, P, S, H]


@dataclass(frozen=True)
class Peer:
    """A contender: the variants to try for a workload, or UnsupportedError."""

    name: str
    variants: Callable[[Workload], Iterator[Variant]]
    ours: bool = False


def engines() -> list[Peer]:
    """The package's engines that run on this GPU."""
    names = [e.name for e in _engines.ENGINES if e.platform == "cuda" and e.missing("cuda") is None]
    return [Peer(name, functools.partial(_engine, name), ours=True) for name in names]


def installed() -> list[Peer]:
    """The peers that this environment has; FlashAttention-3 comes with the package `flash-attn3-jax`."""
    peers = [Peer("XLA gather", _gather), Peer("cuDNN", _cudnn), Peer("Pallas", _pallas)]
    if importlib.util.find_spec("flash_attn3_jax_lib") is not None:
        peers.append(Peer("FA3", _fa3))
    return peers


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedError(reason)


def _plain(workload: Workload) -> None:
    """Requires pages of the queries' dtype, and a workload that asks for nothing that only this package has."""
    _need(not workload.quantized, "pages of the queries' dtype only")
    _need(not workload.ragged, "as the call of one row per sequence")
    _need(workload.head_dim_of_values == workload.head_dim, "one head dim for keys and values")
    _need(not workload.values_in_keys, "a pool of values")
    _need(not workload.batch_invariant, "not asked for it: as without")


# ---- ours ------------------------------------------------------------------------------------------------------------


def _engine(name: str, workload: Workload) -> Iterator[Variant]:
    w, row = workload, next(engine for engine in _engines.ENGINES if engine.name == name)
    _need(row.batch_invariant or not w.batch_invariant, "is not batch-invariant")

    def attend(x: Operands) -> Array:
        options: dict[str, Any] = {"implementation": name, "batch_invariant": w.batch_invariant}
        if w.quantized:
            options |= {"k_scale": x.k_scale, "v_scale": None if w.values_in_keys else x.v_scale}
        v_pages = None if w.values_in_keys else x.v_pages
        if w.values_in_keys:
            options["value_dim"] = w.value_dim
        if w.decode and not w.ragged:
            return jnp.asarray(jpa.paged_attention(x.q, x.k_pages, v_pages, x.block_tables, x.kv_lens, **options))
        operands = (x.q, x.k_pages, v_pages, x.kv_lens, x.block_tables, x.cu_q_lens)
        return jnp.asarray(jpa.ragged_paged_attention(*operands, causal=w.causal, **options))

    yield Variant("batch-invariant" if w.batch_invariant else "", attend)


# ---- XLA -------------------------------------------------------------------------------------------------------------


def _gather(workload: Workload) -> Iterator[Variant]:
    w = workload
    _plain(w)
    _need(w.rows > 0 and w.causal, "written for equal numbers of rows, causal")
    scores = 4 * w.batch * w.rows * w.num_heads * w.max_pages * w.page_size
    _need(scores <= 8 << 30, f"{scores >> 30} GiB of scores")

    def attend(x: Operands) -> Array:
        rows = x.q.reshape(w.batch, w.rows, w.num_heads, w.head_dim)
        return gather_and_einsum(rows, x.k_pages, x.v_pages, x.block_tables, x.kv_lens).reshape(x.q.shape)

    yield Variant("", attend)


# ---- cuDNN -----------------------------------------------------------------------------------------------------------


def _cudnn(workload: Workload) -> Iterator[Variant]:
    w = workload
    _plain(w)
    _need(w.rows > 0, "written for equal numbers of rows")
    _need(sum(w.pages) == w.batch * w.max_pages, "its pool has exactly B times M pages")
    # JAX has no public name for cuDNN's paged attention.
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    masks = cudnn.MaskType
    # Its causal mask starts at the first key, ours ends at the last: the same only for whole prompts.
    aligned = w.decode or not w.causal or w.rows == w.keys
    _need(aligned, "its causal mask is not aligned to the end")
    mask = masks.PADDING_CAUSAL if w.causal and not w.decode else masks.PADDING

    def attend(x: Operands) -> Array:
        rows = x.q.reshape(w.batch, w.rows, w.num_heads, w.head_dim)
        pages = x.block_tables[:, None, :, None]
        operands = (rows, x.k_pages, x.v_pages, x.q_lens, x.kv_lens, pages, pages)
        out = cudnn.paged_attention(*operands, scale=w.head_dim**-0.5, mask_type=mask)
        return (out[0] if isinstance(out, (tuple, list)) else out).reshape(x.q.shape)

    yield Variant("", attend)


# ---- Pallas ----------------------------------------------------------------------------------------------------------


def _pallas(workload: Workload) -> Iterator[Variant]:
    w = workload
    _plain(w)
    _need(w.decode, "decode only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it will be removed, but nothing replaces it
        pallas = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")

    def attend(splits: int, x: Operands) -> Array:
        scaled = x.q * jnp.asarray(w.head_dim**-0.5, x.q.dtype)
        return pallas.paged_attention(scaled, x.k_pages, x.v_pages, x.block_tables, x.kv_lens, k_splits=splits)

    for splits in (1, 16) if w.batch > 1 else (16, 64):
        if w.max_pages % splits == 0 and w.max_pages // splits >= 8:
            yield Variant(f"{splits} splits", functools.partial(attend, splits), heads_first=True)


# ---- FlashAttention-3 ------------------------------------------------------------------------------------------------


@functools.cache
def _register_fa3() -> None:
    # Its handlers alone: the package's Python layer has no call for a paged prefill with splits.
    library = importlib.import_module("flash_attn3_jax_lib.flash_api")
    for name, handler in library.get_ffi_registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform="CUDA")


def _fa3(workload: Workload) -> Iterator[Variant]:
    w = workload
    _plain(w)
    _need(w.rows > 0, "one number of rows for all sequences")
    _need(w.head_dim == 128, "head dim 128 only")
    _register_fa3()

    def attend(splits: int, x: Operands) -> Array:
        q = x.q
        shape = (w.batch, w.rows, w.num_heads, w.head_dim)
        partial = (splits, w.batch, w.num_heads, w.rows) if splits > 1 else (1, 1, 1)
        struct = jax.ShapeDtypeStruct
        results = (
            struct(shape, q.dtype),
            struct((w.batch, w.num_heads, w.rows), jnp.float32),  # lse
            struct((*partial, w.head_dim if splits > 1 else 1), jnp.float32),
            struct(partial, jnp.float32),
        )
        # An absent operand is an empty one.
        no_values, no_ids, no_floats = (jnp.zeros(0, dtype) for dtype in (q.dtype, jnp.int32, jnp.float32))
        operands = (
            *(q.reshape(shape), x.k_pages, x.v_pages),
            *(no_values, no_values, no_values),  # new keys, new values, q for the values' side
            *(no_ids, no_ids, no_ids, no_ids),  # three cumulative lengths, used queries
            *(x.kv_lens, x.block_tables),
            *(no_ids, no_ids),  # batch index, left padding
            *(no_values, no_values, no_ids),  # rotary cosine, sine, lengths
            *(no_floats, no_floats, no_floats, no_ids),  # three descales, scheduler metadata
        )
        out, *_ = jax.ffi.ffi_call("flash_mha_fwd", results)(
            *operands,
            max_seqlen_q=np.int64(w.rows),
            max_seqlen_q_has_value=True,
            max_seqlen_k=np.int64(0),
            max_seqlen_k_has_value=False,
            softmax_scale_val=np.float64(w.head_dim**-0.5),
            softmax_scale_has_value=True,
            pack_gqa_val=False,
            pack_gqa_has_value=False,
            is_causal=w.causal,
            window_size_left=np.int64(-1),
            window_size_right=np.int64(-1),
            attention_chunk=np.int64(0),
            softcap=np.float64(0),
            is_rotary_interleaved=True,
            num_splits=np.int64(splits),
            sm_margin=np.int64(0),
        )
        return out.reshape(q.shape)

    # With more than a few KV splits per multiprocessor, splitting only adds work; one or two for each are likeliest.
    parts = {splits: w.batch * w.num_kv_heads * splits for splits in (1, 2, 4, 8, 16, 32, 64)}
    choices = [splits for splits, count in parts.items() if splits == 1 or count <= 1024] if w.decode else [1]
    for splits in sorted(choices, key=lambda splits: abs(math.log2(parts[splits] / 200))):
        yield Variant(f"{splits} splits", functools.partial(attend, splits))
