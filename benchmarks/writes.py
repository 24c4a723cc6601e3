"""The write on a GPU: new tokens into scattered pages, in place, beside a plain copy of as many bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_paged_attn as jpa
from benchmarks.attention import ROTATE_BYTES, Ceilings
from benchmarks.cases import DTYPES
from benchmarks.device import time_calls

# Numbers of tokens, and the dtype of the pages that they go to.
WRITES = ((64, "bf16"), (64, "e4m3"), (16384, "bf16"), (16384, "e4m3"), (16384, "int8"))


@dataclass(frozen=True)
class WriteMeasured:
    tokens: int
    dtype: str
    page_dtype: str
    microseconds: float
    kernels: int
    gigabytes_per_s: float
    copy_microseconds: float  # of XLA's copy of as many bytes


def measure_write(tokens: int, page_dtype: str, calls: int) -> WriteMeasured:
    """bf16 tokens of a Llama 3 8B layer into scattered pages of 16, in place, beside a plain copy."""
    kv_heads, head_dim, page_size, num_pages = 8, 128, 16, 4096
    dtypes = {**DTYPES, "e4m3": jnp.float8_e4m3fn, "int8": jnp.int8}
    rng = np.random.default_rng(0)
    per_call = 2 * tokens * kv_heads * head_dim * (2 + jnp.dtype(dtypes[page_dtype]).itemsize)
    copies = min(max(2, -(-ROTATE_BYTES // per_call)), calls)
    keys = jax.random.split(jax.random.key(0), 2 * copies)
    new = [jax.random.normal(key, (tokens, kv_heads, head_dim), jnp.bfloat16) for key in keys]
    pages = rng.permutation(num_pages)[: -(-tokens // page_size)]
    slots = jnp.asarray((pages[:, None] * page_size + np.arange(page_size)).reshape(-1)[:tokens].astype(np.int32))
    # An array as a cache would hold it; a constant would be broadcast by a kernel of its own in each call.
    scale = None if page_dtype == "bf16" else jnp.full(kv_heads, 0.37, jnp.float32)

    def write(k_pages: Array, v_pages: Array, k: Array, v: Array, scale: Array | None) -> tuple[Array, Array]:
        return jpa.write_kv_pages(k_pages, v_pages, k, v, slots, k_scale=scale, v_scale=scale)

    compiled = jax.jit(write, donate_argnums=(0, 1))
    shape = (num_pages, page_size, kv_heads, head_dim)
    pools = [tuple(jnp.zeros(shape, dtypes[page_dtype]) for _ in "kv") for _ in range(copies)]

    def call(turn: int) -> tuple[Array, ...]:
        pools[turn] = compiled(*pools[turn], *new[2 * turn : 2 * turn + 2], scale)
        return pools[turn]

    turns = itertools.islice(itertools.cycle(range(copies)), calls)
    timing = time_calls([lambda turn=turn: call(turn) for turn in turns])
    plain = jax.jit(lambda x: x + 1)
    sources = [jnp.arange(per_call // 8, dtype=jnp.int32) for _ in range(copies)]  # half of the bytes are written
    turns = itertools.islice(itertools.cycle(sources), calls)
    copy = time_calls([lambda source=source: plain(source) for source in turns])
    return WriteMeasured(
        tokens=tokens,
        dtype="bf16",
        page_dtype=page_dtype,
        microseconds=timing.median * 1e6,
        kernels=len(timing.kernels),
        gigabytes_per_s=per_call / timing.median / 1e9,
        copy_microseconds=copy.median * 1e6,
    )


def measure(ceilings: Ceilings, calls: int) -> Iterator[WriteMeasured]:
    """Measures and prints each of `WRITES`."""
    for tokens, page_dtype in WRITES:
        w = measure_write(tokens, page_dtype, calls)
        print(
            f"write {w.tokens:6} tokens bf16 -> {w.page_dtype}: {w.microseconds:8.2f} us, {w.kernels} kernels,"
            f" {w.gigabytes_per_s * 1e9 / ceilings.copy:6.1%} of the copy ceiling; a copy of as many bytes"
            f" {w.copy_microseconds:.2f} us: {w.copy_microseconds / w.microseconds:.1%}",
            flush=True,
        )
        yield w
