"""Properties of the MLA kernels that only a GPU can show: KV splits, prompts, repeats, graphs, batch invariance."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_paged_attn as jpa
from jax_paged_attn import _ffi

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu" or _ffi.compute_capability() != "9.0" or not _ffi.has("cuda"),
        reason="needs a GPU of compute capability 9.0 and a CUDA build",
    ),
]

VALUE_DIM = 512
SCALE = 0.05  # of 8-bit pages
PAGE_DTYPES = {"bf16": jnp.bfloat16, "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "int8": jnp.int8}
# Head dims and heads: (keys, whether values have a pool of their own, query heads, KV heads, pages).
MLA_16, MLA_128 = (576, False, 16, 1, "bf16"), (576, False, 128, 1, "bf16")
MLA_8_BIT = tuple((576, False, heads, 1, page_dtype) for heads in (16, 128) for page_dtype in ("e4m3", "e5m2", "int8"))
ONE_POOL, TWO_POOLS = (512, False, 32, 4, "bf16"), (512, True, 32, 4, "bf16")
ONE_POOL_8_BIT = (512, False, 32, 4, "e4m3")
Kind = tuple[int, bool, int, int, str]
Inputs = tuple[Any, ...]


def kinds(*some: Kind) -> Any:
    names = [
        f"{'mla' if k == 576 else 'two_pools' if own else 'one_pool'}_{heads}_{dtype}"
        for k, own, heads, _, dtype in some
    ]
    return pytest.mark.parametrize("kind", some, ids=names)


ALL_KINDS = kinds(MLA_16, MLA_128, *MLA_8_BIT, ONE_POOL, ONE_POOL_8_BIT, TWO_POOLS)
KINDS = kinds(MLA_16, MLA_128, MLA_8_BIT[0], ONE_POOL, ONE_POOL_8_BIT, TWO_POOLS)


def make_inputs(
    kind: Kind, lengths: tuple[int, ...], page_size: int, rows: tuple[int, ...] | None = None, *, may_grow: bool = False
) -> Inputs:
    """q in bf16, pools, tables and lengths, of `rows` query rows per sequence.

    Tokens that no sequence has are NaN or 127; with `may_grow` those of pages that no table names.
    """
    key_dim, own_pool, heads, kv_heads, page_dtype = kind
    batch, width = len(lengths), max(-(-max(lengths) // page_size), 1)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (sum(rows) if rows else batch, heads, key_dim), jnp.bfloat16)
    counts = [width if may_grow else -(-length // page_size) for length in lengths]
    ids = np.random.default_rng(0).permutation(2 * max(sum(counts), 1)).astype(np.int32)
    # The rest of a table names pages that no sequence has.
    used = np.resize(ids[len(ids) // 2 :], (batch, width))
    live = np.zeros((len(ids), page_size, 1, 1), bool)
    firsts = np.cumsum([0, *counts])
    for table, first, count, length in zip(used, firsts, counts, lengths, strict=False):
        table[:count] = ids[first : first + count]
        tokens = np.arange(width * page_size if may_grow else length)
        live[table[tokens // page_size], tokens % page_size] = True
    pools = []
    for key, dim in zip(keys[1:], (key_dim, VALUE_DIM) if own_pool else (key_dim,), strict=False):
        pool = jax.random.normal(key, (len(ids), page_size, kv_heads, dim), jnp.bfloat16)
        pool = (pool if page_dtype == "bf16" else pool / SCALE).astype(PAGE_DTYPES[page_dtype])
        pools.append(jnp.where(live, pool, jnp.asarray(127 if page_dtype == "int8" else jnp.nan, pool.dtype)))
    return q, tuple(pools), jnp.asarray(used), jnp.asarray(lengths, jnp.int32)


def attend(function: Any, q: Any, pools: Any, tables: Any, lengths: Any, *starts: Any, **keywords: Any) -> Any:
    """A call of a public function or its reference; `starts` is `cu_q_lens` of a ragged one."""
    k_pages, v_pages = pools if len(pools) == 2 else (pools[0], None)
    options = {"return_lse": True, **({} if len(pools) == 2 else {"value_dim": VALUE_DIM}), **keywords}
    options["k_scale"] = SCALE if k_pages.dtype.itemsize == 1 else None
    where = (lengths, tables, *starts) if starts else (tables, lengths)
    return function(q, k_pages, v_pages, *where, **options)


@functools.cache
def compiled(function: Any = jpa.paged_attention, **keywords: Any) -> Any:
    return jax.jit(functools.partial(attend, function, implementation="fused", **keywords))


def assert_close(got: Any, want: Any) -> None:
    error = np.linalg.norm(np.asarray(got[0] - want[0], np.float32)) / np.linalg.norm(np.asarray(want[0], np.float32))
    assert error < 1e-2
    np.testing.assert_allclose(got[1], want[1], atol=1e-3)


@jax.jit
def same_bits(results: Any, others: Any) -> jax.Array:
    """On the device: there are many repeats, and results of prompts are large."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32}
    views = [[lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize]) for x in some] for some in (results, others)]
    return jnp.stack([(x == y).all() for x, y in zip(*views, strict=True)]).all()


def bits(results: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in results]


BATCHES = {
    "one": (9000,),
    "few": (4096,) * 5,
    "skewed": (1, 0, 777, 30000, 64, 5000),
    # Several row blocks per CTA: their ends count in the split, and some ranges start within one.
    "many": (*(i * 37 % 700 for i in range(90)), 6000),
}


@pytest.mark.parametrize("page_size", [64, 16, 17])
@ALL_KINDS
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_kv_splits_are_merged_and_repeats_agree(lengths: tuple[int, ...], kind: Kind, page_size: int) -> None:
    inputs = make_inputs(kind, lengths, page_size)
    got = compiled()(*inputs)
    assert_close(got, attend(jpa.paged_attention_reference, *inputs))
    for _ in range(300):
        assert same_bits(compiled()(*inputs), got)


# Rows and lengths of each sequence. Where the mean number of rows is large, two query heads' groups share keys.
PROMPTS = {
    "prompt": ((1000, 1000),),
    "prompts": ((300, 300), (257, 900), (64, 64), (1, 700), (40, 30)),
    "chunk": ((130, 9000),),
    "drafts": ((3, 700), (2, 5000), (1, 64), (4, 4)),
    # Numbers that 2 or 4 divide: then query rows with the same keys are in CTAs side by side.
    "even_drafts": ((2, 700), (4, 5000), (2, 64), (2, 1)),
    "drafts_of_4": ((4, 9000), (4, 700), (4, 3), (4, 130)),
    "many_short": tuple((2, i % 150) for i in range(600)),
}


@pytest.mark.parametrize("page_size", [64, 17])
@KINDS
@pytest.mark.parametrize("sequences", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("keywords", [{}, {"causal": False, "sliding_window": 100}], ids=["causal", "window"])
def test_rows_of_prompts_and_chunks(
    sequences: tuple[tuple[int, int], ...], kind: Kind, page_size: int, keywords: dict[str, Any]
) -> None:
    rows, lengths = (tuple(numbers) for numbers in zip(*sequences, strict=True))
    inputs = make_inputs(kind, lengths, page_size, rows)
    starts = jnp.asarray(np.cumsum((0, *rows)), jnp.int32)
    call = compiled(jpa.ragged_paged_attention, **keywords)
    got = call(*inputs, starts)
    assert_close(got, attend(jpa.ragged_paged_attention_reference, *inputs, starts, **keywords))
    for _ in range(30):
        assert same_bits(call(*inputs, starts), got)


@pytest.mark.parametrize("page_size", [64, 17])
@KINDS
def test_a_sequence_has_the_same_bits_in_any_batch(kind: Kind, page_size: int) -> None:
    lengths = tuple(int(n) for n in np.random.default_rng(1).integers(0, 3000, 40))
    q, pools, tables, kv_lens = make_inputs(kind, lengths, page_size)
    call = compiled(batch_invariant=True)
    whole = tuple(map(np.asarray, call(q, pools, tables, kv_lens)))
    for some in ([0], [39, 3, 12], range(0, 40, 2)):
        mine = np.array(list(some))
        assert bits(call(q[mine], pools, tables[mine], kv_lens[mine])) == bits(x[mine] for x in whole)


@KINDS
def test_a_prompt_has_the_same_bits_in_any_batch(kind: Kind) -> None:
    rows, lengths = (100, 1, 7, 9), (100, 800, 2000, 9)
    q, pools, tables, kv_lens = make_inputs(kind, lengths, 64, rows)
    starts = np.cumsum((0, *rows))
    call = compiled(jpa.ragged_paged_attention, batch_invariant=True)
    whole = tuple(map(np.asarray, call(q, pools, tables, kv_lens, jnp.asarray(starts, jnp.int32))))
    for i, count in enumerate(rows):
        mine = slice(starts[i], starts[i + 1])
        alone = call(q[mine], pools, tables[i : i + 1], kv_lens[i : i + 1], jnp.asarray([0, count], jnp.int32))
        assert bits(alone) == bits(x[mine] for x in whole)


@kinds(MLA_128, MLA_8_BIT[3], TWO_POOLS)
def test_lengths_grow_between_replays_of_a_graph(kind: Kind) -> None:
    q, pools, tables, lengths = make_inputs(kind, (1, 500, 63, 64), 64, may_grow=True)
    layers, steps, growth = 8, 10, 40

    @functools.partial(jax.jit, donate_argnames="lengths")
    def step(q: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        outs = [compiled()(q + layer, pools, tables, lengths)[0] for layer in range(layers)]
        return jnp.stack(outs), jnp.minimum(lengths + growth, 512)

    firsts = np.asarray(lengths)
    results, calls = [], []
    for _ in range(steps):
        before = _ffi.compiled("cuda").host_calls()
        outs, lengths = step(q, lengths)
        results.append(np.asarray(outs))
        del outs  # its memory is the next step's, so that the graph's addresses stay
        calls.append(_ffi.compiled("cuda").host_calls() - before)
    assert calls.count(0) > steps // 2, f"calls of the handler per step: {calls}"
    for i, result in enumerate(results):
        kv_lens = jnp.asarray(np.minimum(firsts + growth * i, 512))
        want = [compiled()(q + layer, pools, tables, kv_lens)[0] for layer in range(layers)]
        np.testing.assert_array_equal(result, np.stack(want))


def test_the_smaller_of_two_pools_is_repeated() -> None:
    """As `vmap` over one of the pools leaves them."""
    q, (k_pages, v_pages), tables, lengths = make_inputs(TWO_POOLS, (700, 64), 64)
    more = jnp.stack([v_pages, -v_pages])
    call = jax.vmap(lambda values: compiled()(q, (k_pages, values), tables, lengths))
    outs, lses = call(more)
    out, lse = compiled()(q, (k_pages, v_pages), tables, lengths)
    assert_close((outs[0], lses[0]), (out, lse))
    assert_close((outs[1], lses[1]), (-out, lse))
