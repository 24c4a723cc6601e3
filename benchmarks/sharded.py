"""Decode split by key/value head over the devices of this machine, against one of them: `python -m benchmarks.sharded`.

The heads are those of a Llama 3 70B. XLA partitions the same jitted function that the one device runs; no device needs
anything of another, which the compiled module shows. Times are by the host's clock, over calls long enough that their
dispatch does not count. A model has more to do: its projections, and one sum over the devices for each.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_paged_attn as jpa
from benchmarks import options

COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
BY_HEAD, POOL_BY_HEAD = P(None, "heads"), P(None, None, "heads")


@dataclass(frozen=True)
class Shape:
    """Sequences of so many tokens each, in so many layers."""

    name: str
    layers: int
    batch: int
    tokens: int
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16


SHAPES = (Shape("one layer", 1, 64, 8192), Shape("32 layers", 32, 64, 8192))
SMOKE = (Shape("one layer", 1, 4, 64), Shape("32 layers", 32, 2, 32))
CALLS_OF_ONE_LAYER = 32  # in one execution, one after the other
MEMORY = "0.95"  # of a device: 32 layers take 64 GiB


def make(shape: Shape, mesh: Mesh) -> tuple[Any, ...]:
    """q, the layers' pools, and tables, lengths and slots: the same numbers on any mesh, made where they are used."""
    pages = shape.tokens // shape.page_size
    keys = jax.random.split(jax.random.key(0), 2 * shape.layers + 1)

    def normals(keys: Any, spec: P, *sizes: int) -> list[Any]:
        normal = jax.jit(
            lambda key: jax.random.normal(key, sizes, jnp.bfloat16), out_shardings=NamedSharding(mesh, spec)
        )
        return [normal(key) for key in keys]

    (q,) = normals(keys[-1:], BY_HEAD, shape.batch, shape.num_heads, shape.head_dim)
    pool = (shape.batch * pages, shape.page_size, shape.num_kv_heads, shape.head_dim)
    of_layers = normals(keys[:-1], POOL_BY_HEAD, *pool)
    pools = tuple(zip(of_layers[::2], of_layers[1::2], strict=True))
    tables = np.random.default_rng(0).permutation(shape.batch * pages).reshape(shape.batch, pages).astype(np.int32)
    lengths = np.full(shape.batch, shape.tokens, np.int32)
    slots = tables[:, -1] * shape.page_size + shape.page_size - 1
    return q, pools, *(jax.device_put(x, NamedSharding(mesh, P())) for x in (tables, lengths, slots))


def step(q: Any, pools: Any, tables: Any, lengths: Any, slots: Any) -> Any:
    """The new tokens' keys and values into the pools, then attention, layer after layer."""
    group = q.shape[1] // pools[0][0].shape[2]
    written = []
    for k_pages, v_pages in pools:
        k_pages, v_pages = jpa.write_kv_pages(k_pages, v_pages, q[:, ::group], q[:, ::group], slots)
        q = q + jpa.paged_attention(q, k_pages, v_pages, tables, lengths)
        written.append((k_pages, v_pages))
    return q, tuple(written)


def repeated(q: Any, pools: Any, *where: Any) -> Any:
    return jax.lax.fori_loop(0, CALLS_OF_ONE_LAYER, lambda _, state: step(*state, *where), (q, pools))


def measure(function: Callable[..., Any], shape: Shape, mesh: Mesh, rounds: int) -> tuple[float, Any]:
    """Median seconds of an execution with donated pools, and the first one's queries."""
    q, pools, *where = make(shape, mesh)
    compiled = jax.jit(function, donate_argnums=1).lower(q, pools, *where).compile()
    moved = COLLECTIVE.findall(compiled.as_text() or "")
    if moved:
        raise RuntimeError(f"expected no collectives in the compiled module, found {moved}")
    first, pools = compiled(q, pools, *where)
    first = np.asarray(first).astype(np.float32)
    seconds = []
    for _ in range(rounds):
        jax.block_until_ready(pools)
        start = time.perf_counter()
        for _ in range(8):
            out, pools = compiled(q, pools, *where)
        jax.block_until_ready((out, pools))
        seconds.append((time.perf_counter() - start) / 8)
    return statistics.median(seconds), first


def main() -> int:
    parser = options.parser("sharded", __doc__)
    parser.add_argument("--devices", type=int, default=2, help="over how many heads are split (default 2)")
    parser.add_argument("--rounds", type=int, default=10, help="executions that are timed (default 10)")
    parser.add_argument("--require", type=float, help="fail below this ratio")
    parser.add_argument("--smoke", action="store_true", help="small shapes, to see that it runs")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY)
    devices = jax.devices()[: args.devices]
    if len(devices) < args.devices:
        parser.error(f"--devices: expected at most {len(devices)} here, got {args.devices}")

    print(f"{devices[0].device_kind}, jax {jax.__version__}, heads over {len(devices)} devices, no collectives")
    print(f"{'ms':12} {'one device':>12} {'split':>12} {'ratio':>8} {'difference':>12}")
    slow = False
    for shape in SMOKE if args.smoke else SHAPES:
        function = repeated if shape.layers == 1 else step
        calls = CALLS_OF_ONE_LAYER if shape.layers == 1 else 1
        (alone, want), (split, got) = (
            measure(function, shape, Mesh(np.array(some), "heads", axis_types=(AxisType.Auto,)), args.rounds)
            for some in (devices[:1], devices)
        )
        difference = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        print(
            f"{shape.name:12} {alone / calls * 1e3:12.4f} {split / calls * 1e3:12.4f} {alone / split:8.3f}"
            f" {difference:12.1e}",
            flush=True,
        )
        slow |= args.require is not None and alone / split < args.require
        if difference > 1e-2:
            raise RuntimeError(f"{shape.name}: expected the same results, got a relative difference of {difference}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
