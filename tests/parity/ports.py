"""Makes `ports/`: calls of other JAX stacks, and what those stacks give.

`PYTHONPATH=. python tests/parity/ports.py levanter`, in an environment with marin-levanter 0.2.227, and so on for
the other names, each with the package that its function names. Each function also holds the port to the original there,
on the stack's own classes; `tests/test_ports.py` does without them, on the files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FOLDER = Path(__file__).parent / "ports"
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


STACKS: dict[str, Callable[[], dict[str, Any]]] = {"levanter": levanter}


def main() -> None:
    """Writes the files of the stacks named on the command line."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:]:
        with jax.default_matmul_precision("highest"):
            arrays = STACKS[name]()
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
        print(name, (FOLDER / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main()
