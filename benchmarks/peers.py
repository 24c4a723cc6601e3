"""The package's engines on the GPU and every peer that can be called from JAX, each behind the same signature."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_paged_attn as jpa
from benchmarks.cases import Workload
from benchmarks.cpu import gather_and_einsum
from jax_paged_attn import _engines

# (q [T, N, H], k_pages, v_pages, block_tables, kv_lens, cu_q_lens) -> [T, N, H]
Attend = Callable[[Array, Array, Array, Array, Array, Array], Array]


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


# ---- ours ------------------------------------------------------------------------------------------------------------


def _engine(name: str, workload: Workload) -> Iterator[Variant]:
    def attend(q: Array, k_pages: Array, v_pages: Array, tables: Array, kv_lens: Array, cu_q_lens: Array) -> Array:
        if workload.decode:
            return jnp.asarray(jpa.paged_attention(q, k_pages, v_pages, tables, kv_lens, implementation=name))
        out = jpa.ragged_paged_attention(
            q, k_pages, v_pages, kv_lens, tables, cu_q_lens, causal=workload.causal, implementation=name
        )
        return jnp.asarray(out)

    yield Variant("", attend)


# ---- XLA -------------------------------------------------------------------------------------------------------------


def _gather(workload: Workload) -> Iterator[Variant]:
    w = workload
    _need(w.rows > 0 and w.causal, "written for equal numbers of rows, causal")
    scores = 4 * w.batch * w.rows * w.num_heads * w.max_pages * w.page_size
    _need(scores <= 8 << 30, f"{scores >> 30} GiB of scores")

    def attend(q: Array, k_pages: Array, v_pages: Array, tables: Array, kv_lens: Array, cu_q_lens: Array) -> Array:
        rows = q.reshape(w.batch, w.rows, w.num_heads, w.head_dim)
        return gather_and_einsum(rows, k_pages, v_pages, tables, kv_lens).reshape(q.shape)

    yield Variant("", attend)


# ---- cuDNN -----------------------------------------------------------------------------------------------------------


def _cudnn(workload: Workload) -> Iterator[Variant]:
    w = workload
    _need(w.rows > 0, "written for equal numbers of rows")
    _need(sum(w.pages) == w.batch * w.max_pages, "its pool has exactly B times M pages")
    # JAX has no public name for cuDNN's paged attention.
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    masks = cudnn.MaskType
    # Its causal mask starts at the first key, ours ends at the last: the same only for whole prompts.
    aligned = w.decode or not w.causal or w.rows == w.keys
    _need(aligned, "its causal mask is not aligned to the end")
    mask = masks.PADDING_CAUSAL if w.causal and not w.decode else masks.PADDING

    def attend(q: Array, k_pages: Array, v_pages: Array, tables: Array, kv_lens: Array, cu_q_lens: Array) -> Array:
        rows = q.reshape(w.batch, w.rows, w.num_heads, w.head_dim)
        pages = tables[:, None, :, None]
        q_lens = jnp.full(w.batch, w.rows, jnp.int32)
        out = cudnn.paged_attention(
            rows, k_pages, v_pages, q_lens, kv_lens, pages, pages, scale=w.head_dim**-0.5, mask_type=mask
        )
        return (out[0] if isinstance(out, (tuple, list)) else out).reshape(q.shape)

    yield Variant("", attend)


# ---- Pallas ----------------------------------------------------------------------------------------------------------


def _pallas(workload: Workload) -> Iterator[Variant]:
    w = workload
    _need(w.decode, "decode only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it will be removed, but nothing replaces it
        pallas = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")

    def attend(
        splits: int, q: Array, k_pages: Array, v_pages: Array, tables: Array, kv_lens: Array, cu_q_lens: Array
    ) -> Array:
        scaled = q * jnp.asarray(w.head_dim**-0.5, q.dtype)
        return pallas.paged_attention(scaled, k_pages, v_pages, tables, kv_lens, k_splits=splits)

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
    _need(w.rows > 0, "one number of rows for all sequences")
    _need(w.head_dim == 128, "head dim 128 only")
    _register_fa3()

    def attend(
        splits: int, q: Array, k_pages: Array, v_pages: Array, tables: Array, kv_lens: Array, cu_q_lens: Array
    ) -> Array:
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
            *(q.reshape(shape), k_pages, v_pages),
            *(no_values, no_values, no_values),  # new keys, new values, q for the values' side
            *(no_ids, no_ids, no_ids, no_ids),  # three cumulative lengths, used queries
            *(kv_lens, tables),
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

    for splits in (1, 2, 4, 8, 16, 32, 64) if w.decode else (1,):
        # With more than a few parts a multiprocessor, splitting only adds work.
        if splits == 1 or w.batch * w.num_kv_heads * splits <= 1024:
            yield Variant(f"{splits} splits", functools.partial(attend, splits))
