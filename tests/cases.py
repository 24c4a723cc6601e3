"""What the conformance suite runs: named calls of attention as data, and how their inputs are made.

Memory is always poisoned. A pool starts out full of NaN and Inf (of NaN bytes or 127 where the dtype has no better)
and only tokens that a sequence owns are overwritten; unused table entries hold ids no pool has; query rows
that no sequence claims are NaN. So a case passes only if nothing of that is ever used.

Every compilation costs more than the computation, so edges that differ in values only share their shapes and keywords.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
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
class Case:
    """One call. Lengths may be out of range on purpose; `cu_q_lens` follows from `q_lens` unless given."""

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    function: Literal["paged_attention", "ragged_paged_attention"] = "ragged_paged_attention"
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    page_size: int = 16
    max_pages: int = 4  # M: columns of the block table
    dtype: str = "f32"
    page_dtype: str | None = None  # None: as dtype
    rows: int | None = None  # T, if more than the sum of q_lens
    num_seqs: int | None = None
    cu_q_lens: tuple[int, ...] | None = None
    bad_ids: tuple[tuple[int, int, int], ...] = ()  # (sequence, column, id) that stand in used entries
    shared_pages: int = 0  # leading pages that every sequence shares with the first
    sinks: bool = False
    sink_offset: float = 0.0  # added to standard normal sinks
    q_factor: float = 1.0  # multiplies standard normal queries
    rising: float = 0.0  # how much higher, about, the scores of each 64 keys are than those of the 64 before
    k_scale: float | tuple[float, ...] | None = None
    v_scale: float | tuple[float, ...] | None = None
    keywords: dict[str, Any] = field(default_factory=dict)  # the static ones
    # Of the pools that engines get: [P, S, K, H] each; or, by `jax_paged_attn.compat`, one [P, S, 2K, H] for ragged
    # calls, and [K, P, S, H] each for decode with scale 1.
    layout: Literal["split", "interleaved", "head_major"] = "split"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Inputs:
    """A case's operands as NumPy arrays; `call` hands them to a function in the order that it wants."""

    decode: bool
    q: Array
    k_pages: Array
    v_pages: Array
    block_tables: Array
    kv_lens: Array
    cu_q_lens: Array
    num_seqs: Array | None
    sinks: Array | None
    k_scale: Array | None
    v_scale: Array | None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the public function, without the static keywords."""
        pools = (self.q, self.k_pages, self.v_pages)
        if self.decode:
            positional = (*pools, self.block_tables, self.kv_lens)
        else:
            positional = (*pools, self.kv_lens, self.block_tables, self.cu_q_lens, self.num_seqs)
        return positional, {"sinks": self.sinks, "k_scale": self.k_scale, "v_scale": self.v_scale}


def _poison(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
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
    k_pages, v_pages = _poison(pool_shape, page_dtype), _poison(pool_shape, page_dtype)
    garbage = cycle([-1, num_pages, INT32_MAX, INT32_MIN, num_pages + 9])
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
                v_pages[page, : used[0]] = random_values(rng, used, page_dtype)
                if case.rising:
                    steps = (column * page_size + np.arange(used[0])) // 64
                    risen = k_pages[page, : used[0]].astype(np.float32)
                    risen += (case.rising * steps / np.sqrt(case.head_dim))[:, None, None]
                    k_pages[page, : used[0]] = risen.astype(page_dtype)

    q = _poison((rows, case.num_heads, case.head_dim), q_dtype)
    starts = np.maximum.accumulate(np.clip(cu_q_lens, 0, rows))
    claimed = slice(starts[0], starts[live])
    values = random_values(rng, q[claimed].shape, np.dtype(np.float32))
    if case.rising:
        values += 1.0  # a length of sqrt(H) along the diagonal, which the scale takes back
    q[claimed] = (values * np.float32(case.q_factor)).astype(q_dtype)
    return Inputs(
        decode=case.function == "paged_attention",
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        block_tables=block_tables,
        kv_lens=np.array(case.kv_lens, np.int32),
        cu_q_lens=cu_q_lens,
        num_seqs=None if case.num_seqs is None else np.array([case.num_seqs], np.int32),
        sinks=rng.standard_normal(case.num_heads, np.float32) + np.float32(case.sink_offset) if case.sinks else None,
        k_scale=None if case.k_scale is None else np.array(case.k_scale, np.float32),
        v_scale=None if case.v_scale is None else np.array(case.v_scale, np.float32),
    )


# Ragged queries over four sequences: a decode row, a whole prompt, no row, a later chunk; three rows are slack.
MIXED = Case("mixed", q_lens=(1, 5, 0, 7), kv_lens=(17, 5, 9, 33), rows=16)
DECODE = Case("decode", (1, 1, 1, 1), (1, 17, 48, 64), function="paged_attention")
# Enough rows a key that an engine may take them by tiles: a chunk, a whole prompt, a decode row, no row.
PROMPT = Case("prompt", q_lens=(40, 9, 1, 0), kv_lens=(75, 9, 33, 5), num_heads=6, max_pages=5)


def _edges() -> list[Case]:
    """Values at and beyond the edge of what they mean. All share MIXED's or DECODE's shapes."""
    live = replace(MIXED, num_seqs=4)
    return [
        MIXED,
        DECODE,
        PROMPT,
        replace(PROMPT, name="prompt_more_rows_than_keys", kv_lens=(20, 0, 1, 5)),
        replace(PROMPT, name="prompt_used_ids_bad", bad_ids=((0, 0, -1), (0, 2, 23), (1, 0, INT32_MAX))),  # P is 23
        replace(MIXED, name="length_zero", kv_lens=(0, 5, 0, 33)),
        replace(MIXED, name="length_zero_everywhere", kv_lens=(0, 0, 0, 0)),
        replace(MIXED, name="length_negative", kv_lens=(-1, INT32_MIN, 9, -33)),
        replace(MIXED, name="length_beyond_table", kv_lens=(65, INT32_MAX, 1000, 64)),
        replace(MIXED, name="more_rows_than_keys", kv_lens=(1, 2, 0, 3)),
        replace(MIXED, name="shared_prefix", kv_lens=(40, 33, 32, 50), shared_pages=2),
        replace(MIXED, name="cu_starts_late", cu_q_lens=(2, 3, 8, 8, 13)),
        replace(MIXED, name="cu_outside", kv_lens=(17, 30, 9, 33), cu_q_lens=(-5, 3, 3, 40, INT32_MAX)),
        replace(MIXED, name="cu_far_outside", cu_q_lens=(INT32_MIN, -1, 6, INT32_MAX, 16)),
        replace(MIXED, name="cu_decreasing", kv_lens=(17, 30, 9, 33), cu_q_lens=(0, 7, 3, 9, 14)),
        replace(MIXED, name="cu_all_beyond", cu_q_lens=(99, 99, 99, 99, 99)),
        replace(MIXED, name="used_ids_bad", bad_ids=((0, 0, -1), (3, 0, INT32_MAX), (3, 2, INT32_MIN))),
        replace(MIXED, name="used_ids_just_bad", bad_ids=((0, 1, 19), (3, 1, 20), (3, 2, 38))),  # P is 19
        replace(MIXED, name="used_ids_all_bad", bad_ids=((0, 0, -1), (0, 1, 19), (1, 0, INT32_MIN))),
        replace(live, name="num_seqs_all"),
        replace(live, name="num_seqs_two", num_seqs=2, cu_q_lens=(0, 1, 6, -7, INT32_MAX)),
        replace(live, name="num_seqs_zero", num_seqs=0),
        replace(live, name="num_seqs_beyond", num_seqs=99),
        replace(live, name="num_seqs_negative", num_seqs=-3),
        replace(DECODE, name="decode_length_zero", kv_lens=(0, 17, 0, 64)),
        replace(DECODE, name="decode_length_outside", kv_lens=(-1, INT32_MIN, 65, INT32_MAX)),
        replace(DECODE, name="decode_used_ids_bad", bad_ids=((0, 0, -1), (1, 0, 19), (2, 1, INT32_MAX), (3, 3, -19))),
    ]


def _keywords() -> list[Case]:
    """Each keyword alone, then together, over decode and mixed batches."""
    variants: list[tuple[str, dict[str, Any]]] = [
        ("scale", {"keywords": {"scale": 0.3}}),
        ("window_one", {"keywords": {"sliding_window": 1}}),
        ("window", {"keywords": {"sliding_window": 9}}),
        ("window_huge", {"keywords": {"sliding_window": INT32_MAX}}),
        ("cap", {"keywords": {"soft_cap": 2.0}}),
        ("sinks", {"sinks": True}),
        ("all", {"keywords": {"scale": 0.25, "sliding_window": 20, "soft_cap": 1.5}, "sinks": True}),
    ]
    dense: list[tuple[str, dict[str, Any]]] = [
        ("dense", {"keywords": {"causal": False}}),
        ("dense_window", {"keywords": {"causal": False, "sliding_window": 9}}),
        ("dense_window_sinks", {"keywords": {"causal": False, "sliding_window": 9}, "sinks": True}),
    ]
    cases = [replace(base, name=f"{base.name}_{name}", **kw) for base in (MIXED, DECODE) for name, kw in variants]
    cases += [replace(MIXED, name=f"mixed_{name}", **kw) for name, kw in dense]
    several = [(name, kw) for name, kw in variants + dense if name in ("window", "cap", "all", "dense_window_sinks")]
    cases += [replace(PROMPT, name=f"prompt_{name}", **kw) for name, kw in several]
    by_name = {case.name: case for case in cases}
    short = (0, 2, 0, 3)
    passed = ((0, 0, -1), (3, 0, 19), (3, 1, INT32_MAX))
    cases += [
        # The same shapes and keywords as above, at their edges.
        replace(by_name["mixed_sinks"], name="sinks_without_keys", kv_lens=short),
        replace(by_name["mixed_sinks"], name="sinks_used_ids_all_bad", bad_ids=((0, 0, -1), (0, 1, 19), (1, 0, -1))),
        replace(by_name["decode_sinks"], name="decode_sinks_without_keys", kv_lens=(0, 17, -1, 64)),
        replace(MIXED, name="sinks_dead_rows", num_seqs=2, sinks=True),
        replace(by_name["mixed_window_huge"], name="window_huge_short", kv_lens=short),
        replace(by_name["mixed_dense"], name="dense_more_rows_than_keys", kv_lens=short),
        replace(by_name["mixed_dense_window"], name="dense_window_more_rows_than_keys", kv_lens=(1, 2, 9, 3)),
        replace(by_name["mixed_all"], name="mixed_all_short", kv_lens=short),
        # A server frees pages that a window has passed: their entries are garbage.
        replace(by_name["mixed_window"], name="window_passed_pages", kv_lens=(33, 5, 9, 60), bad_ids=passed),
        replace(by_name["decode_window"], name="decode_window_passed_pages", kv_lens=(33, 17, 48, 64), bad_ids=passed),
        replace(MIXED, name="sinks_large", dtype="bf16", sinks=True, sink_offset=150.0),
        replace(DECODE, name="decode_sinks_large", dtype="bf16", sinks=True, sink_offset=150.0),
        replace(DECODE, name="decode_sinks_small", dtype="bf16", sinks=True, sink_offset=-300.0),
        replace(MIXED, name="sinks_absent", sinks=True, sink_offset=-np.inf),
        # exp overflows f32 from 89 on; the maximum must be taken off first.
        replace(MIXED, name="large_logits", dtype="bf16", keywords={"scale": 20.0}),
        replace(DECODE, name="decode_large_logits", dtype="bf16", keywords={"scale": 20.0}),
    ]
    return cases


def _dtypes() -> list[Case]:
    """Every query dtype with every page dtype; scales are absent, scalar or one a head."""
    cases = []
    for dtype in ("f32", "bf16", "f16"):
        scalar, per_head = {"k_scale": 0.7, "v_scale": 1.9}, {"k_scale": (0.5, 1.5)}
        for base, scales in ((MIXED, scalar), (DECODE, per_head), (PROMPT, per_head)):
            for page_dtype in ("e4m3", "e5m2"):
                name = f"{base.name}_{dtype}_{page_dtype}"
                cases.append(replace(base, name=name, dtype=dtype, page_dtype=page_dtype, **scales))
        int8 = {"dtype": dtype, "page_dtype": "int8"}
        cases.append(replace(MIXED, name=f"mixed_{dtype}_int8", k_scale=(0.02, 0.01), v_scale=(0.01, 0.03), **int8))
        cases.append(replace(DECODE, name=f"decode_{dtype}_int8", k_scale=0.02, v_scale=0.01, **int8))
        cases.append(replace(PROMPT, name=f"prompt_{dtype}_int8", k_scale=0.01, v_scale=(0.01, 0.03), **int8))
    for dtype in ("bf16", "f16"):
        cases += [replace(base, name=f"{base.name}_{dtype}", dtype=dtype) for base in (MIXED, DECODE, PROMPT)]
    cases += [
        replace(MIXED, name="fp8_unscaled", dtype="bf16", page_dtype="e4m3"),
        replace(MIXED, name="f32_scaled", k_scale=(0.5, 2.0), v_scale=3.0),
        replace(MIXED, name="bf16_v_scaled", dtype="bf16", v_scale=(0.5, 3.0)),
        # Scales come before the cap.
        replace(DECODE, name="fp8_scaled_cap", page_dtype="e4m3", k_scale=4.0, keywords={"soft_cap": 1.5}, sinks=True),
    ]
    return cases


def _shapes() -> list[Case]:
    """Groups, head dims and page sizes, powers of two or not."""
    cases = []
    for group in (*range(1, 17), 24, 64, 65):
        heads = {"num_heads": 2 * group, "num_kv_heads": 2}
        cases.append(replace(DECODE, name=f"decode_group_{group}", **heads))
        if group in (1, 3, 5, 7, 8, 12, 16, 24):
            cases.append(replace(MIXED, name=f"mixed_group_{group}", dtype="bf16", **heads))
    cases.append(replace(MIXED, name="one_kv_head", num_heads=7, num_kv_heads=1))
    cases.append(replace(DECODE, name="odd_kv_heads", num_heads=15, num_kv_heads=3))
    for head_dim in (40, 64, 80, 96, 128, 160, 192, 256):
        cases.append(replace(DECODE, name=f"decode_head_dim_{head_dim}", head_dim=head_dim, dtype="bf16"))
        if head_dim in (40, 80, 128, 256):
            cases.append(replace(MIXED, name=f"mixed_head_dim_{head_dim}", head_dim=head_dim))
    int8 = {"page_dtype": "int8", "k_scale": 0.02, "v_scale": 0.01}
    for head_dim, page in ((1, {}), (7, int8), (33, {"page_dtype": "e4m3"}), (40, int8), (80, {"page_dtype": "e5m2"})):
        for base in (DECODE, PROMPT):
            name = f"{base.name}_head_dim_{head_dim}_{page.get('page_dtype', 'f16')}"
            cases.append(replace(base, name=name, head_dim=head_dim, dtype="f16", **page))
    # The one head dim whose prompts take the kernel for other devices on a Hopper GPU, too.
    other = replace(PROMPT, head_dim=80, dtype="bf16", sinks=True)
    keywords = {"sliding_window": 30, "soft_cap": 3.0}
    cases.append(replace(other, name="prompt_head_dim_80_bf16"))
    cases.append(replace(other, name="prompt_head_dim_80_f16_window", dtype="f16", keywords=keywords))
    cases.append(replace(other, name="prompt_head_dim_80_int8_not_causal", keywords={"causal": False}, **int8))
    cases.append(replace(PROMPT, name="prompt_head_dim_128", head_dim=128, dtype="bf16"))
    cases.append(replace(PROMPT, name="prompt_head_dim_576", head_dim=576))
    cases.append(replace(PROMPT, name="prompt_page_size_1", page_size=1, max_pages=80))
    cases.append(replace(PROMPT, name="prompt_page_size_17", page_size=17, dtype="bf16"))
    cases.append(replace(PROMPT, name="prompt_group_7", num_heads=7, num_kv_heads=1, dtype="bf16"))
    cases.append(replace(DECODE, name="decode_group_40", num_heads=40, num_kv_heads=1))
    cases.append(replace(DECODE, name="decode_heads_32_8", num_heads=32, num_kv_heads=8, head_dim=128, dtype="bf16"))
    for page_size in (1, 3, 17, 64, 256):
        max_pages = max(2, 60 // page_size)
        most = max_pages * page_size
        size = {"page_size": page_size, "max_pages": max_pages}
        ends = (1, page_size, page_size + 1, most)  # one token, a full page, one token more, a full table
        cases.append(replace(DECODE, name=f"decode_page_size_{page_size}", kv_lens=ends, **size))
        ends = (most, page_size, 1, most - 1)
        cases.append(replace(MIXED, name=f"mixed_page_size_{page_size}", kv_lens=ends, **size))
    by_name = {case.name: case for case in cases}
    window = {"dtype": "bf16", "keywords": {"sliding_window": 5}}
    cases.append(replace(by_name["mixed_page_size_1"], name="page_size_1_bf16_window", **window))
    return cases


def _long() -> list[Case]:
    """Enough keys that an engine splits them between workers, with parts that are empty or short."""
    long: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "max_pages": 320}
    decode = Case("long_decode", (1, 1), (5000, 37), function="paged_attention", **long)
    prefill = Case("long_prefill", (20, 1), (4107, 4096), **long)
    passed = tuple((0, column, -1) for column in range(200))
    return [
        decode,
        replace(decode, name="long_decode_empty_parts", kv_lens=(5000, 5119), bad_ids=passed),
        replace(decode, name="long_decode_full_table", kv_lens=(INT32_MAX, 0)),
        replace(decode, name="long_decode_window", keywords={"sliding_window": 100}, sinks=True),
        replace(decode, name="long_decode_window_wide", keywords={"sliding_window": 3000}, bad_ids=passed[:100]),
        replace(decode, name="long_decode_sinks", sinks=True, kv_lens=(5000, 4500)),
        replace(decode, name="long_decode_bf16", dtype="bf16"),
        replace(decode, name="long_decode_int8", dtype="bf16", page_dtype="int8", k_scale=0.02, v_scale=0.02),
        replace(decode, name="long_decode_e4m3", dtype="f16", page_dtype="e4m3", keywords={"soft_cap": 3.0}),
        replace(decode, name="long_decode_group_24", num_heads=24),
        prefill,
        replace(prefill, name="long_prefill_bf16", dtype="bf16"),
        replace(prefill, name="long_prefill_window", keywords={"sliding_window": 700}, sinks=True),
        replace(prefill, name="whole_prompt", q_lens=(150, 70), kv_lens=(150, 70), max_pages=10, dtype="bf16"),
        replace(prefill, name="chunked_prompt", q_lens=(64, 33), kv_lens=(150, 129), max_pages=10, num_heads=6),
    ]


def _tiles() -> list[Case]:
    """What engines that work by tiles of keys and of packed rows (tokens x group) have to tell apart."""
    e4m3: dict[str, Any] = {"page_dtype": "e4m3", "k_scale": (0.5, 1.5), "v_scale": 1.9}
    e5m2: dict[str, Any] = {**e4m3, "page_dtype": "e5m2"}
    int8: dict[str, Any] = {"page_dtype": "int8", "k_scale": 0.02, "v_scale": (0.01, 0.03)}
    decode = replace(DECODE, head_dim=64, dtype="bf16")
    cases = []

    # Speculative drafts over long caches. All share their shapes; rows that no draft takes are slack.
    drafts = Case(
        "drafts", (8, 9, 1, 8, 9), (4107, 1500, 700, 8, 65), num_heads=8, head_dim=64, max_pages=260, dtype="bf16"
    )
    cases += [
        drafts,
        replace(drafts, name="drafts_of_8", q_lens=(8, 8, 8, 8, 0), rows=35),
        replace(drafts, name="drafts_of_9", q_lens=(9, 9, 9, 0, 0), rows=35),
        replace(drafts, name="drafts_longer_than_keys", kv_lens=(7, 9, 0, 4107, 1)),
        replace(drafts, name="drafts_all", sinks=True, keywords={"sliding_window": 700, "soft_cap": 3.0}),
        replace(drafts, name="drafts_e4m3", dtype="f16", **e4m3),
        replace(drafts, name="drafts_int8", **int8),
    ]
    pair = Case("packed_rows_64", (8, 8), (300, 77), num_heads=16, head_dim=64, max_pages=20, dtype="bf16")
    cases += [
        pair,
        replace(pair, name="packed_rows_65", q_lens=(5, 5), num_heads=26),
        replace(pair, name="packed_rows_65_e4m3", q_lens=(5, 5), num_heads=26, **e4m3),
        replace(pair, name="packed_rows_72", q_lens=(9, 9)),
    ]
    # Enough row tiles and keys that an engine may keep what it made of a tile for the row tiles that follow, and that
    # whatever it loads tiles into is filled again and again.
    many = replace(pair, name="row_tiles_page_size_17", num_heads=64, q_lens=(140, 3), kv_lens=(2100, 5), page_size=17)
    whole = replace(many, name="row_tiles_page_size_16", page_size=16, max_pages=132)
    int8_pages = replace(many, name="row_tiles_int8", kv_lens=(590, 5), page_size=16, max_pages=37, dtype="f16", **int8)
    # As many that two parts of each keep a Hopper GPU busy: they share tiles while they run.
    parts = replace(many, name="row_tiles_in_parts_e4m3", q_lens=(126, 3), page_size=16, max_pages=132, **e4m3)
    # So many row tiles that each multiprocessor of a GPU takes several.
    takes = {"q_lens": (130,) * 7, "kv_lens": (150, 130, 144, 3, 160, 131, 128), "page_size": 16, "max_pages": 10}
    items = replace(many, name="row_tiles_of_many_e4m3", **takes, **e4m3)
    cases += [replace(many, max_pages=124), whole, int8_pages, parts, items]

    for i, page_size in enumerate((1, 8, 24, 48, 80, 256, 1024)):
        max_pages = max(2, -(-200 // page_size))
        most = max_pages * page_size
        ends = (most, page_size, min(page_size + 1, most), most - 1)
        size = {"page_size": page_size, "max_pages": max_pages, "kv_lens": ends}
        cases.append(replace(decode, name=f"tiles_page_size_{page_size}_bf16", **size))
        narrow = (e4m3, int8, e5m2)[i % 3]
        name = f"tiles_page_size_{page_size}_{narrow['page_dtype']}"
        cases.append(replace(decode, name=name, dtype=("bf16", "f16")[i % 2], **size, **narrow))

    # P is 19, and 24 for pages of 1 and 64 tokens.
    bad = ((0, 0, -1), (1, 0, 19), (1, 1, INT32_MIN), (2, 1, INT32_MAX), (3, 0, 20), (3, 2, -19))
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "bf16": ("bf16", {}), "f16": ("f16", {}), "e4m3": ("bf16", e4m3), "e5m2": ("f16", e5m2), "int8": ("bf16", int8)
    }  # fmt: skip
    for kind, (dtype, pages) in kinds.items():
        cases.append(replace(decode, name=f"decode_ids_bad_{kind}", dtype=dtype, bad_ids=bad, **pages))
    more_bad = ((0, 0, -1), (1, 1, 24), (2, 1, INT32_MAX), (2, 6, INT32_MIN))
    for page_size in (1, 64):
        lens = (1, 2 * page_size + 1, 7 * page_size)
        for kind in ("bf16", "e4m3"):
            dtype, pages = kinds[kind]
            size = {"q_lens": (1,) * 3, "kv_lens": lens, "page_size": page_size, "max_pages": 7}
            name = f"decode_ids_bad_{kind}_page_size_{page_size}"
            cases.append(replace(decode, name=name, dtype=dtype, bad_ids=more_bad, **size, **pages))

    # Queries that no 16-bit float but bf16 holds; one scale or the other brings the logits back.
    for pages in (e4m3, e5m2):
        kind = pages["page_dtype"]
        for power in (30, -30):
            scale = {"keywords": {"scale": 10.0**-power / 8}}
            cases.append(replace(decode, name=f"q_1e{power}_{kind}", q_factor=10.0**power, **scale, **pages))
            factors = {"k_scale": (10.0**-power, 3 * 10.0**-power), "v_scale": 10.0**power}
            name = f"q_1e{power}_{kind}_k_scale"
            cases.append(replace(decode, name=name, q_factor=10.0**power, **{**pages, **factors}))

    long = replace(decode, q_lens=(1, 1), kv_lens=(5000, 130), max_pages=320, rising=4.0)
    cases += [
        replace(long, name="rising_bf16"),
        replace(long, name="rising_e4m3", dtype="f16", page_dtype="e4m3"),
        replace(drafts, name="rising_drafts", kv_lens=(4107, 1500, 700, 8, 650), rising=4.0),
        replace(long, name="falling_bf16", rising=-4.0),
    ]

    for head_dim in (64, 80, 96, 128, 192, 256):
        for kind in ("e4m3", "int8") if head_dim % 96 else ("e5m2", "int8"):
            dtype = "f16" if kind == "int8" and head_dim % 64 else "bf16"
            name = f"tiles_head_dim_{head_dim}_{kind}"
            cases.append(replace(decode, name=name, head_dim=head_dim, dtype=dtype, **kinds[kind][1]))
    cases += [
        replace(MIXED, name="mixed_head_dim_96_e4m3", head_dim=96, dtype="bf16", **e4m3),
        replace(MIXED, name="mixed_head_dim_192", head_dim=192, dtype="f16"),
        replace(MIXED, name="mixed_head_dim_256_int8", head_dim=256, dtype="bf16", **int8),
    ]

    lengths = tuple(37 * i % 201 for i in range(300))
    batch = replace(decode, q_lens=(1,) * 300, kv_lens=lengths, max_pages=13)
    ragged = {"q_lens": tuple((1, 0, 2, 8, 1)[i % 5] for i in range(100)), "kv_lens": lengths[:100]}
    cases += [
        replace(batch, name="batch_of_300"),
        replace(batch, name="batch_of_100", function="ragged_paged_attention", dtype="f16", **ragged, **e4m3),
        replace(decode, name="wide_table", max_pages=1024),
        replace(decode, name="long_window_bf16", kv_lens=(5000, 1100, 1000, 37), max_pages=320,
                keywords={"sliding_window": 1000}, bad_ids=tuple((0, column, -1) for column in range(250))),
    ]  # fmt: skip
    return cases


def _layouts() -> list[Case]:
    """The pools of JAX's own kernels: in place and gathered, with masks, bad ids and scales a head, in every way."""
    bad = ((0, 0, -1), (1, 0, 19), (3, 1, INT32_MAX))
    int8: dict[str, Any] = {"page_dtype": "int8", "k_scale": (0.02, 0.01), "v_scale": (0.01, 0.03)}
    e4m3: dict[str, Any] = {"page_dtype": "e4m3", "k_scale": (0.5, 1.5), "v_scale": 1.9}
    both = {"scale": 0.25, "sliding_window": 20, "soft_cap": 1.5}
    prompts: dict[str, Any] = {"q_lens": (150, 1, 70, 33), "kv_lens": (150, 60, 70, 129), "max_pages": 10}
    ragged: list[tuple[str, dict[str, Any]]] = [
        ("f32", {}),
        ("all", {"keywords": both, "sinks": True, "bad_ids": bad}),
        ("page_size_64", {"page_size": 64, "max_pages": 2, "kv_lens": (128, 64, 1, 127), "dtype": "bf16"}),
        ("page_size_17", {"page_size": 17, "dtype": "f16", "head_dim": 96}),
        ("int8", {"dtype": "bf16", "head_dim": 64, **int8}),
        ("prompts", {"dtype": "bf16", "head_dim": 128, "rows": 254, **prompts}),
        ("prompts_window", {"num_heads": 6, "rows": 254, **prompts, "keywords": both}),
        ("prompts_e4m3", {"dtype": "f16", "head_dim": 80, "rows": 254, **prompts, **e4m3}),
        ("one_kv_head", {"num_kv_heads": 1, "dtype": "bf16", "rows": 254, **prompts}),
    ]
    decode: list[tuple[str, dict[str, Any]]] = [
        ("f32", {}),
        ("cap", {"keywords": {"scale": 1.0, "soft_cap": 2.0}, "sinks": True, "bad_ids": bad}),
        ("page_size_64", {"page_size": 64, "max_pages": 3, "kv_lens": (1, 64, 130, 192), "dtype": "bf16"}),
        ("page_size_17", {"page_size": 17, "dtype": "f16", "head_dim": 96}),
        ("int8", {"dtype": "bf16", "head_dim": 64, "bad_ids": bad, **int8}),
        ("e4m3", {"dtype": "f16", "head_dim": 80, "num_heads": 14, **e4m3}),
        ("long", {"kv_lens": (5000, 37, 0, 1100), "max_pages": 320, "head_dim": 64, "dtype": "bf16"}),
        ("one_kv_head", {"num_kv_heads": 1, "num_heads": 7, "dtype": "bf16"}),
    ]
    unscaled = replace(DECODE, keywords={"scale": 1.0}, q_factor=0.2)
    return [
        *(replace(MIXED, name=f"interleaved_{name}", **{"layout": "interleaved", **kw}) for name, kw in ragged),
        *(replace(unscaled, name=f"head_major_{name}", **{"layout": "head_major", **kw}) for name, kw in decode),
    ]


CASES: tuple[Case, ...] = (*_edges(), *_keywords(), *_dtypes(), *_shapes(), *_long(), *_tiles(), *_layouts())
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
if len(BY_NAME) != len(CASES):
    raise ValueError("two cases share a name")
