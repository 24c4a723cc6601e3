"""The operands of a case, in memory that is poisoned wherever no engine may look.

A pool starts out full of NaN and Inf (of NaN bytes or 127 where the dtype has no better). Only tokens that a sequence
owns are overwritten; unused table entries hold ids no pool has; query rows that no sequence claims are NaN. So a case
passes only if none of that is ever used.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import ml_dtypes
import numpy as np

from cases.case import Array, Case

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int8": np.dtype(np.int8),
}

# Bounds of the specification by query dtype: the relative error of the output and the absolute one of lse.
OUT_BOUND = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2}
LSE_BOUND = {"f32": 1e-5, "f16": 1e-3, "bf16": 1e-3}


@dataclass(frozen=True)
class Inputs:
    """A case's operands as NumPy arrays; `call` hands them to a function in the order that it wants."""

    decode: bool
    q: Array
    k_pages: Array
    v_pages: Array | None  # None: values are the first `value_dim` numbers of each key
    block_tables: Array
    kv_lens: Array
    cu_q_lens: Array
    num_seqs: Array | None
    sinks: Array | None
    k_scale: Array | None
    v_scale: Array | None
    k_token_scales: Array | None = None  # [P, S, K]
    v_token_scales: Array | None = None
    value_dim: int | None = None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the public function, without the static keywords but for `value_dim`."""
        pools = (self.q, self.k_pages, self.v_pages)
        if self.decode:
            positional = (*pools, self.block_tables, self.kv_lens)
        else:
            positional = (*pools, self.kv_lens, self.block_tables, self.cu_q_lens, self.num_seqs)
        named = {"sinks": self.sinks, "k_scale": self.k_scale, "v_scale": self.v_scale}
        of_tokens: dict[str, Any] = {"k_token_scales": self.k_token_scales, "v_token_scales": self.v_token_scales}
        of_tokens["value_dim"] = self.value_dim
        return positional, named | {name: x for name, x in of_tokens.items() if x is not None}


def poison(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """NaN and infinities in turn, as far as the dtype has them."""
    if dtype == np.int8:
        return np.full(shape, 127, dtype)
    values = [np.nan] if dtype == DTYPES["e4m3"] else [np.nan, np.inf, -np.inf]
    return np.resize(np.array(values, np.float32), shape).astype(dtype)


def random_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Standard normal values; int8 uses its whole range."""
    if dtype == np.int8:
        return rng.integers(-127, 128, shape).astype(np.int8)
    return rng.standard_normal(shape, np.float32).astype(dtype)


def build(case: Case) -> Inputs:
    """The inputs of a case, a function of the case alone."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    q_dtype, page_dtype = DTYPES[case.dtype], DTYPES[case.page_dtype or case.dtype]
    batch, page_size, max_pages = len(case.kv_lens), case.page_size, case.max_pages
    live = batch if case.num_seqs is None else min(max(case.num_seqs, 0), batch)
    num_pages = batch * max_pages + 3
    rows = case.rows or sum(case.q_lens)
    cu_q_lens = np.array(case.cu_q_lens or (0, *np.cumsum(case.q_lens)), np.int32)

    pool_shape = (num_pages, page_size, case.num_kv_heads, case.head_dim)
    value_dim = case.value_dim or case.head_dim
    k_pages, v_pages = poison(pool_shape, page_dtype), poison((*pool_shape[:3], value_dim), page_dtype)
    garbage = cycle([-1, num_pages, INT32_MAX, INT32_MIN, num_pages + 9])
    written = np.zeros(pool_shape[:2], bool)
    block_tables = np.array([next(garbage) for _ in range(batch * max_pages)], np.int32).reshape(batch, max_pages)
    free_pages = iter(rng.permutation(num_pages))
    bad = {(b, column): page for b, column, page in case.bad_ids}
    for b in range(batch):
        if b >= live and b % 2 == 0:
            continue  # half of the dead sequences have garbage, the others what they had when they were alive
        kv_len = min(max(case.kv_lens[b], 0), max_pages * page_size)
        for column in range(-(-kv_len // page_size)):
            if (b, column) in bad:
                block_tables[b, column] = bad[b, column]
            elif b > 0 and column < case.shared_pages:
                block_tables[b, column] = block_tables[0, column]
            else:
                page = block_tables[b, column] = next(free_pages)
                used = (min(page_size, kv_len - column * page_size), *pool_shape[2:])
                k_pages[page, : used[0]] = random_values(rng, used, page_dtype)
                v_pages[page, : used[0]] = random_values(rng, (*used[:2], value_dim), page_dtype)
                written[page, : used[0]] = True
                if case.rising:
                    steps = (column * page_size + np.arange(used[0])) // 64
                    risen = k_pages[page, : used[0]].astype(np.float32)
                    risen += (case.rising * steps / np.sqrt(case.head_dim))[:, None, None]
                    k_pages[page, : used[0]] = risen.astype(page_dtype)

    q = poison((rows, case.num_heads, case.head_dim), q_dtype)
    starts = np.maximum.accumulate(np.clip(cu_q_lens, 0, rows))
    claimed = slice(starts[0], starts[live])
    values = random_values(rng, q[claimed].shape, np.dtype(np.float32))
    if case.rising:
        values += 1.0  # a length of sqrt(H) along the diagonal, which the scale takes back
    q[claimed] = (values * np.float32(case.q_factor)).astype(q_dtype)
    sinks = rng.standard_normal(case.num_heads, np.float32) + np.float32(case.sink_offset) if case.sinks else None
    largest = 127 if page_dtype == np.int8 else 1
    k_token_scales, v_token_scales = (
        np.where(written[..., None], 2 * rng.random(pool_shape[:3]) / largest, poison(pool_shape[:3], DTYPES["f32"]))
        if has
        else None
        for has in case.token_scales
    )
    return Inputs(
        decode=case.function == "paged_attention",
        q=q,
        k_pages=k_pages,
        v_pages=None if case.values_in_keys else v_pages,
        block_tables=block_tables,
        kv_lens=np.array(case.kv_lens, np.int32),
        cu_q_lens=cu_q_lens,
        num_seqs=None if case.num_seqs is None else np.array([case.num_seqs], np.int32),
        sinks=sinks,
        k_scale=None if case.k_scale is None else np.array(case.k_scale, np.float32),
        v_scale=None if case.v_scale is None else np.array(case.v_scale, np.float32),
        k_token_scales=None if k_token_scales is None else k_token_scales.astype(np.float32),
        v_token_scales=None if v_token_scales is None else v_token_scales.astype(np.float32),
        value_dim=value_dim if case.values_in_keys else None,
    )
