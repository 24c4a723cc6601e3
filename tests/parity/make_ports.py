"""Makes `levanter.npz` and `sglang_jax.npz`: calls of other JAX stacks, and what those stacks give.

`PYTHONPATH=. python tests/parity/make_ports.py levanter`, in an environment with marin-levanter 0.2.227, and so on for
the other names, each with the package that its function names. Each function also holds the port to the original there,
on the stack's own classes; `tests/test_ports.py` does without them, on the files.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FOLDER = Path(__file__).parent
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal numbers that float16 holds, so that a file of them takes half the space."""
    return rng.standard_normal(shape).astype(np.float16)


def levanter() -> dict[str, Any]:
    """A prompt, a chunk of one and a decode row, two places without a sequence, padding: marin-levanter."""
    import haliax as hax  # pyright: ignore[reportMissingImports]
    from ports import levanter_after, levanter_before

    rng = np.random.default_rng(21)
    page_size, kv_heads, group, head_dim, num_pages = 4, 2, 3, 32, 24
    lens, rows = np.array([9, 37, 22, -1, 2_000_000], np.int32), np.array([9, 6, 1], np.int32)
    tables, where = np.full((5, 12), -1, np.int32), np.full((2, 20), -1, np.int32)
    free, place = rng.permutation(num_pages).astype(np.int32), 0
    for i in range(3):
        pages = -(-lens[i] // page_size)
        tables[i, :pages], free = free[:pages], free[pages:]
        for position in range(lens[i] - rows[i], lens[i]):
            where[:, place] = tables[i, position // page_size], position % page_size
            place += 1
    tables[3, 2:4] = 2_000_000
    calls = {
        "q": draw(rng, 20, kv_heads, group, head_dim),
        "k": draw(rng, 20, kv_heads, head_dim),
        "v": draw(rng, 20, kv_heads, head_dim),
        "kv_pages": draw(rng, num_pages, page_size, 2 * kv_heads, head_dim),
        "where": where,
        "kv_lens": lens,
        "page_indices": tables,
        "cu_q_lens": np.cumsum([0, *rows, 0, 0], dtype=np.int32),
        "num_seqs": np.array(3, np.int32),
        "sm_scale": np.float32(head_dim**-0.5),
    }
    names = {
        "q": ("position", "kv_head", "q_heads_per_group", "head_size"),
        "kv_pages": ("page", "slot", "kv_head", "head_size"),
        "kv_lens": ("seq",),
        "page_indices": ("seq", "page"),
        "cu_q_lens": ("seq",),
    }

    def run(step: Callable[..., Any], dtype: Any) -> list[Any]:
        arrays = {n: jnp.asarray(x, dtype if x.dtype == np.float16 else x.dtype) for n, x in calls.items()}
        named: dict[str, Any] = {n: hax.named(x, names[n]) if n in names else x for n, x in arrays.items()}
        out, kv_pages = step(*named.values())
        assert out.axes == named["q"].axes
        return [np.asarray(x.array, np.float32) for x in (out, kv_pages)]

    for dtype, bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.03)):
        theirs, ours = (run(port.paged_step, dtype) for port in (levanter_before, levanter_after))
        np.testing.assert_allclose(ours[0], theirs[0], rtol=bound, atol=bound)
        np.testing.assert_array_equal(ours[1], theirs[1])
    return {**calls, "out": run(levanter_before.paged_step, jnp.float32)[0]}


def sglang_jax() -> dict[str, Any]:
    """A prompt, a chunk and a decode row in a fused pool, and then a decode step: sglang-jax 0.1.0rc0.

    It wants an environment in which `sgl_jax.test.flashattention_common` can be imported.
    """
    from ports.sglang_jax import PagedAttention
    from sgl_jax.srt.kernels.ragged_paged_attention import (  # pyright: ignore[reportMissingImports]
        ragged_paged_attention_v3 as kernel,
    )
    from sgl_jax.srt.layers.radix_attention import RadixAttention  # pyright: ignore[reportMissingImports]
    from sgl_jax.test import flashattention_common as theirs  # pyright: ignore[reportMissingImports]

    theirs.FlashAttention = PagedAttention
    rng = np.random.default_rng(21)
    heads, kv_heads, head_dim, page_size = 4, 2, 128, 8
    lens = [(9, 9), (5, 21), (1, 18)]
    num_tokens = sum(-(-length // page_size) * page_size for _, length in lens)
    keywords = {"sliding_window_size": 11, "logit_cap": 20.0}
    model = {"bf16": True, "num_kv_heads": kv_heads, "head_dim": head_dim, "num_hidden_layers": 1}
    batch, caches, *_ = theirs.create_test_data(
        *("prefill", lens, heads, head_dim, kv_heads, page_size), model_config=model, max_total_token_size=num_tokens
    )
    metadata = batch.attn_backend.forward_metadata
    where = {n: getattr(metadata, n) for n in ("seq_lens", "page_indices", "cu_q_lens", "cu_kv_lens", "distribution")}
    # All tokens, the new ones among them; the pool has the others.
    q, k, v = (draw(rng, n, h, head_dim) for n, h in ((15, heads), (num_tokens, kv_heads), (num_tokens, kv_heads)))
    sinks = draw(rng, heads)
    new = np.concatenate([np.arange(9), 16 + np.arange(16, 21), [40 + 17]])
    rows, starts = np.asarray(where["cu_q_lens"]), np.asarray(where["cu_kv_lens"])
    pool = np.zeros(caches.get_fused_kv_buffer(0).shape, np.float16)
    places = np.asarray(metadata.page_indices)[np.arange(num_tokens) // page_size], np.arange(num_tokens) % page_size
    held = np.setdiff1d(np.arange(num_tokens), new)
    pool[places[0][held], places[1][held]] = np.stack([k, v], axis=2)[held].reshape(len(held), *pool.shape[2:])

    bf16 = {"q": q, "k": k[new], "v": v[new], "pool": pool}
    arrays = {n: jnp.asarray(x, jnp.bfloat16) for n, x in bf16.items()}
    tables = np.full((3, 3), 0, np.int32)
    for i, (_, length) in enumerate(lens):
        count = -(-length // page_size)
        tables[i, :count] = np.asarray(metadata.page_indices)[starts[i] // page_size :][:count]
    pools = (np.zeros((len(pool), page_size, kv_heads, head_dim), np.float16) for _ in "kv")
    k_pages, v_pages = pools
    k_pages[places], v_pages[places] = k, v
    want = kernel.ref_ragged_paged_attention(
        *(arrays["q"], jnp.asarray(k_pages, jnp.bfloat16), jnp.asarray(v_pages, jnp.bfloat16), metadata.seq_lens),
        *(jnp.asarray(tables), jnp.asarray(rows), jnp.array([3])),
        **{"sm_scale": head_dim**-0.5, "sliding_window": 11, "soft_cap": 20.0, "attention_sink": jnp.asarray(sinks)},
    )
    layer = RadixAttention(heads, head_dim, head_dim**-0.5, kv_heads, 0, **keywords)
    caches.kv_buffer[0] = jax.device_put(arrays["pool"], caches.kv_buffer[0].sharding)
    split = jax.NamedSharding(theirs.mesh, jax.P("data", "tensor"))
    flat = (jax.device_put(arrays[n].reshape(15, -1), split) for n in "qkv")
    sink_operand = jax.device_put(jnp.asarray(sinks, jnp.float32), jax.NamedSharding(theirs.mesh, jax.P("tensor")))
    out, _ = jax.jit(lambda *x: layer(*x, batch, caches, attention_sink=sink_operand))(*flat)
    want = np.asarray(want, np.float32).reshape(15, -1)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, rtol=2e-2, atol=1e-2)
    return {**bf16, "sinks": sinks, **{n: np.asarray(x) for n, x in where.items()}, "out": want}


def tokamax() -> dict[str, Any]:
    """tokamax's own function with ours among its implementations, on all that ours takes: tokamax 0.0.18. No file."""
    import tokamax  # pyright: ignore[reportMissingImports]
    from ports.dot_product_attention import for_tokamax

    rng, taken = np.random.default_rng(21), 0
    choices = itertools.product(
        *([(6, 6), (1, 9), (4, 9)], [False, True], [None, [5, 2]], [None, 2, (2, 0), (1, 3)], [None, 3.0])
    )
    for (rows, keys), causal, lengths, window, cap in choices:
        operands = [
            jnp.asarray(rng.standard_normal((2, n, h, 32), np.float32)) for n, h in ((rows, 4), (keys, 2), (keys, 2))
        ]
        keywords = {"is_causal": causal, "local_window_size": window, "logits_soft_cap": cap}
        keywords["key_value_seq_lengths"] = None if lengths is None else jnp.array(lengths, jnp.int32)
        want = tokamax.dot_product_attention(*operands, **keywords, implementation="xla")
        got = tokamax.dot_product_attention(*operands, **keywords, implementation=(for_tokamax, "xla"))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        try:
            tokamax.dot_product_attention(*operands, **keywords, implementation=(for_tokamax,))
            taken += 1
        except NotImplementedError:
            pass
    print(f"tokamax: {taken} of 96 calls are ours")
    assert taken == 46
    tokamaxs_paged_call(rng)
    return {}


def tokamaxs_paged_call(rng: np.random.Generator) -> None:
    """Its registry, which is private, with ours as one more name."""
    from tokamax._src.ops.batched_rpa import api  # pyright: ignore[reportMissingImports]

    from jax_paged_attn import compat

    api._IMPLEMENTATIONS["jax_paged_attn"] = compat.batched_ragged_paged_attention
    q, k, v, cache = (
        jnp.asarray(rng.standard_normal(shape, np.float32))
        for shape in ((6, 4, 128), (6, 2, 128), (6, 2, 128), (8, 8, 4, 128))
    )
    where = ([9, 4, 0], rng.permutation(8)[:6], [0, 1, 5, 5], [1, 1, 2])
    operands = (q, k, v, cache, *(jnp.array(x, jnp.int32) for x in where))
    theirs, ours = (
        api.batched_ragged_paged_attention(*operands, sm_scale=0.1, implementation=name)
        for name in ("reference", "jax_paged_attn")
    )
    np.testing.assert_allclose(ours[0][:5], theirs[0][:5], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ours[1], theirs[1])


STACKS: dict[str, Callable[[], dict[str, Any]]] = {"levanter": levanter, "sglang_jax": sglang_jax, "tokamax": tokamax}


def main() -> None:
    """Writes the files of the stacks named on the command line."""
    for name in sys.argv[1:]:
        with jax.default_matmul_precision("highest"):
            arrays = STACKS[name]()
        if arrays:
            np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
            print(name, (FOLDER / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main()
