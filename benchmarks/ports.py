"""The calls of other JAX stacks: what those stacks run, beside this package on the same operands.

`python -m benchmarks.ports` takes about a minute, on a CPU or a GPU. Stacks that are not installed are left out; JAX's
own kernels and plain functions are always there.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import device, options
from benchmarks.timing import Contender, race
from jax_paged_attn import compat

sys.path.append(str(Path(__file__).parents[1] / "examples"))

Calls = dict[str, Callable[[], Any]]
GPU_KERNEL = "jax.experimental.pallas.ops.gpu.paged_attention"
TPU_KERNEL = "jax.experimental.pallas.ops.tpu.ragged_paged_attention"


@dataclass(frozen=True)
class Decode:
    """One new token for each of several sequences, over one layer of a Llama 3 8B in pages of 16 tokens.

    Attributes:
      q: `[B, N, H]`.
      k_pages, v_pages: `[P, S, K, H]`.
      tables: `[B, M]`.
      lengths: `[B]`.
      on_gpu: whether kernels for GPUs run here.
    """

    q: Array
    k_pages: Array
    v_pages: Array
    tables: Array
    lengths: Array
    on_gpu: bool

    @classmethod
    def made(cls, on_gpu: bool) -> Decode:
        """64 sequences of 4k tokens in bf16 on a GPU; 8 of 1k in f32, which CPUs are better at, elsewhere."""
        batch, length, dtype = (64, 4096, jnp.bfloat16) if on_gpu else (8, 1024, jnp.float32)
        keys, width = jax.random.split(jax.random.key(0), 3), length // 16
        k_pages, v_pages = (jax.random.normal(key, (batch * width, 16, 8, 128), dtype) for key in keys[:2])
        pages = np.random.default_rng(0).permutation(batch * width).astype(np.int32)
        q = jax.random.normal(keys[2], (batch, 32, 128), dtype)
        tables = jnp.asarray(pages.reshape(batch, width))
        return cls(q, k_pages, v_pages, tables, jnp.full(batch, length, jnp.int32), on_gpu)

    @property
    def rows(self) -> Array:
        return jnp.arange(len(self.q) + 1, dtype=jnp.int32)

    @property
    def interleaved(self) -> Array:
        pages, page_size, kv_heads, head_dim = self.k_pages.shape
        return jnp.stack([self.k_pages, self.v_pages], axis=3).reshape(pages, page_size, 2 * kv_heads, head_dim)

    @property
    def head_major(self) -> tuple[Array, Array]:
        k_pages, v_pages = (jnp.moveaxis(x, 2, 0) for x in (self.k_pages, self.v_pages))
        return k_pages, v_pages


def jitted(function: Callable[..., Any], *operands: Any) -> Callable[[], Any]:
    compiled = jax.jit(function)
    return lambda: compiled(*operands)


def quiet(module: str) -> Any:
    """A module that may warn of its end, or of much else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def jaxs_tpu_call(x: Decode) -> Calls:
    """The plain function loops over sequences on the host, which takes too long for the batch of a GPU."""
    plain = quiet(TPU_KERNEL).ref_ragged_paged_attention
    operands = (x.q, x.interleaved, x.lengths, x.tables, x.rows, jnp.array([len(x.q)], jnp.int32))
    calls: Calls = {} if x.on_gpu else {"plain function, eager": lambda: plain(*operands, sm_scale=0.1)}
    return calls | {"ours": jitted(lambda *y: compat.ragged_paged_attention(*y, sm_scale=0.1), *operands)}


def jaxs_gpu_call(x: Decode) -> Calls:
    """With the sizes that lalamo asks for, and with the kernel's own, as jax-llm-examples has them."""
    theirs, operands = quiet(GPU_KERNEL), (x.q, *x.head_major, x.tables, x.lengths)

    def plain(q: Array, k_pages: Array, v_pages: Array, tables: Array, lengths: Array) -> Array:
        k, v = (jnp.moveaxis(p[:, tables], 0, 3).reshape(len(q), -1, *p.shape[::3]) for p in (k_pages, v_pages))
        return theirs.paged_attention_reference(q * 0.1, k, v, lengths)

    calls: Calls = {"plain function": jitted(plain, *operands)}
    if x.on_gpu:
        small = {"pages_per_compute_block": 1, "k_splits": min(x.tables.shape[1], 16), "num_stages": 1}
        calls = {
            "Pallas kernel": jitted(lambda q, *y: theirs.paged_attention(q * 0.1, *y), *operands),
            "Pallas kernel, lalamo's sizes": jitted(
                lambda q, *y: theirs.paged_attention(q * 0.1, *y, **small), *operands
            ),
        } | calls
    return calls | {"ours": jitted(lambda q, *y: compat.paged_attention(q * 0.1, *y), *operands)}


def int8_per_token(x: Decode) -> Calls:
    """jax-llm-examples makes 16-bit pools of int8 ones in each step."""
    kernel = quiet(GPU_KERNEL)
    scales = [jnp.abs(pages).max(-1).astype(jnp.float32) / 127 for pages in x.head_major]
    stored = [jnp.rint(p / s[..., None]).astype(jnp.int8) for p, s in zip(x.head_major, scales, strict=True)]
    operands = (x.q, *stored, x.tables, x.lengths, *scales)

    def dequantized(attend: Callable[..., Array]) -> Callable[..., Array]:
        def call(q: Array, k: Array, v: Array, tables: Array, lengths: Array, *scales: Array) -> Array:
            pools = ((p * s[..., None]).astype(q.dtype) for p, s in zip((k, v), scales, strict=True))
            return attend(q * 0.1, *pools, tables, lengths)

        return call

    calls = {"dequantized, then ours": jitted(dequantized(compat.paged_attention), *operands)}
    if x.on_gpu:
        calls = {"dequantized, then Pallas kernel": jitted(dequantized(kernel.paged_attention), *operands)} | calls
    return calls | {"ours": jitted(lambda q, *y: compat.paged_attention(q * 0.1, *y), *operands)}


def levanter(x: Decode) -> Calls:
    hax, attention = quiet("haliax"), quiet("levanter.layers.attention")
    names = ("position", "kv_head", "q_heads_per_group", "head_size"), ("page", "slot", "kv_head", "head_size")
    names = (*names, ("seq",), ("seq", "page"), ("seq",))
    plain = (x.q.reshape(len(x.q), 8, 4, 128), x.interleaved, x.lengths, x.tables, x.rows)
    operands = [hax.named(y, axes) for y, axes in zip(plain, names, strict=True)]
    operands += [jnp.array(len(x.q), jnp.int32), jnp.float32(0.1)]
    functions = {"levanter": attention.ragged_paged_attention, "ours": compat.levanter.ragged_paged_attention}
    return {name: jitted(function, *operands) for name, function in functions.items()}


def easydel(x: Decode) -> Calls:
    quiet("ejkernel.kernels")
    registry = quiet("ejkernel.kernels._registry").kernel_registry
    platforms = [spec.platform for spec in registry.list_implementations("unified_attention")]
    platform = "triton" if x.on_gpu and "triton" in platforms else "xla"
    theirs = registry.get("unified_attention", platform=platform)
    operands = (x.q, x.k_pages, x.v_pages, x.lengths, x.tables, x.rows)
    return {
        f"ejkernel, {platform}": lambda: theirs(*operands),
        "ours": jitted(compat.ejkernel.unified_attention, *operands),
    }


def jax_nn(x: Decode) -> Calls:
    """Dense keys, of which half are past the length."""
    dense = importlib.import_module("ports.dot_product_attention")
    batch, width = x.tables.shape
    k, v = (y.reshape(batch, width * 16, 8, 128) for y in (x.k_pages, x.v_pages))
    operands = (x.q[:, None], k, v, x.lengths // 2)
    names = ("xla", "cudnn", "paged") if x.on_gpu else ("xla", "paged")

    def call(name: str) -> Callable[[], Any]:
        attend = dense.dot_product_attention
        return jitted(lambda q, k, v, n: attend(q, k, v, key_value_seq_lengths=n, implementation=name), *operands)

    return {"ours" if name == "paged" else name: call(name) for name in names}


STACKS: dict[str, Callable[[Decode], Calls]] = {
    "JAX's TPU call": jaxs_tpu_call,
    "JAX's GPU call: lalamo, jax-llm-examples in 16 bits": jaxs_gpu_call,
    "jax-llm-examples, int8 with scales per token": int8_per_token,
    "Levanter": levanter,
    "EasyDeL": easydel,
    "jax.nn.dot_product_attention": jax_nn,
}


def milliseconds(calls: Calls, on_gpu: bool, seconds: float) -> dict[str, float]:
    """The spans of the device's kernels on a GPU, else the fastest call of each by the clock, taken in turn."""
    if on_gpu:
        return {name: device.time_calls([call] * 10).median * 1e3 for name, call in calls.items()}
    contenders = [
        Contender(name, itertools.repeat(lambda call=call: jax.block_until_ready(call())))
        for name, call in sorted(calls.items(), key=lambda named: named[0] != "ours")  # until ours has had its time
    ]
    race(contenders, seconds)
    return {contender.name: contender.best * 1e3 for contender in contenders}


def rows(only: str, seconds: float) -> Iterator[tuple[str, str, str]]:
    on_gpu = jax.default_backend() == "gpu"
    operands = Decode.made(on_gpu)
    for stack, calls_of in STACKS.items():
        if only not in stack:
            continue
        try:
            calls = calls_of(operands)
        except ImportError as error:
            yield stack, f"not installed: {error}", ""
            continue
        for name in list(calls):
            try:
                jax.block_until_ready(calls[name]())
            except Exception as error:  # a kernel that is not for this device
                yield stack, name, f"failed: {str(error).splitlines()[0]}"
                del calls[name]
        times = milliseconds(calls, on_gpu, seconds)
        for name, time in times.items():
            yield stack, name, f"{time:.3f} ms, {time / times['ours']:.1f} x"


def main() -> None:
    parser = options.parser("ports", __doc__)
    options.add_only(parser)
    options.add_seconds(parser, 2.0)
    arguments = parser.parse_args()
    print(
        f"one decode step on {jax.devices()[0].device_kind}, JAX {jax.__version__}\n\n| stack | what | |\n|---|---|---|"
    )
    for row in rows(arguments.only, arguments.seconds):
        print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
