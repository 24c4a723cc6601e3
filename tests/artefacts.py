"""Exports what lies in artefacts/: programs that every later release of the package and of JAX must run.

Usage: python tests/artefacts.py [cpu|cuda], with the package and the oldest supported JAX. What is there already stays
as it is: a file is what its release wrote. `cuda` needs the CUDA module, but no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
from cases import BY_NAME, Case

import jax_paged_attn as jpa
from jax_paged_attn import compat

FOLDER = Path(__file__).parent / "artefacts"


@dataclass(frozen=True)
class Program:
    """A function that is exported for symbolic sizes.

    Attributes:
      targets: the FFI targets that it calls.
      cuda_targets: those on CUDA, if they are others there.
      case: the name of the case whose shapes and keywords it has.
      others: names of cases that it runs as well.
      sizes: the symbolic sizes of the first operands' leading axes; the others keep their shapes.
      run: takes a case's operands, see `operands_of`.
    """

    targets: tuple[str, ...]
    case: str
    others: tuple[str, ...]
    sizes: tuple[str, ...]
    run: Callable[..., Any]
    cuda_targets: tuple[str, ...] = ()

    def targets_on(self, platform: str) -> tuple[str, ...]:
        return self.cuda_targets if platform == "cuda" and self.cuda_targets else self.targets

    def exported(self, platform: str) -> jax.export.Exported:
        scope = jax.export.SymbolicScope()
        specs = []
        for i, x in enumerate(operands_of(BY_NAME[self.case])):
            leading = jax.export.symbolic_shape(self.sizes[i], scope=scope) if i < len(self.sizes) else ()
            specs.append(jax.ShapeDtypeStruct((*leading, *x.shape[len(leading) :]), x.dtype))
        checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in self.targets_on(platform)]
        return jax.export.export(jax.jit(self.run), platforms=[platform], disabled_checks=checks)(*specs)


def operands_of(case: Case) -> list[Any]:
    """The positional arguments of a case, then its sinks and scales, without what it does not have."""
    _, positional, named = harness.arguments(case)
    arrays = ("sinks", "k_scale", "v_scale", "k_scales_pages", "v_scales_pages")
    return [x for x in (*positional, *(named.get(name) for name in arrays)) if x is not None]


def ragged(*operands: Any) -> Any:
    """Attention with a scale, a window, a cap and sinks."""
    *positional, sinks = operands
    keywords = BY_NAME["mixed_all"].keywords
    return jpa.ragged_paged_attention(*positional, sinks=sinks, **keywords, return_lse=True)


def rows(*operands: Any) -> Any:
    """Drafts and prompts as "fused" on CUDA takes them: by `cu_q_lens`."""
    return jpa.ragged_paged_attention(*operands, return_lse=True)


def step(q: Any, k_pages: Any, v_pages: Any, block_tables: Any, lengths: Any, k_scale: Any, v_scale: Any) -> Any:
    """Takes a page out of 8-bit pools and writes its tokens back, then decodes."""
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    page = block_tables[0, 0]
    slots = page * k_pages.shape[1] + jnp.arange(k_pages.shape[1], dtype=jnp.int32)
    k, v = k_pages[page].astype(jnp.float32) * k_scale, v_pages[page].astype(jnp.float32) * v_scale
    k_new, v_new = jpa.write_kv_pages(k_pages.at[page].set(0), v_pages.at[page].set(0), k, v, slots, **scales)
    return jpa.paged_attention(q, k_new, v_new, block_tables, lengths, **scales, return_lse=True)


def interleaved(*operands: Any) -> Any:
    """The call of JAX's TPU kernel."""
    *positional, sinks = operands
    _, _, named = harness.arguments(BY_NAME["interleaved_all"])
    return compat.ragged_paged_attention(*positional, **{**named, "sinks": sinks}, return_lse=True)


def head_major(*operands: Any) -> Any:
    """The call of JAX's GPU kernel."""
    *positional, k_scale, v_scale = operands
    return compat.paged_attention(*positional, k_scale=k_scale, v_scale=v_scale, return_lse=True)


def tokens(q: Any, k_pages: Any, v_pages: Any, tables: Any, lengths: Any, k_scales: Any, v_scales: Any) -> Any:
    """Takes a page out of pools with scales per token and writes its tokens back, then decodes."""
    page, size = tables[-1, 0], k_pages.shape[2]
    slots = page * size + jnp.arange(size, dtype=jnp.int32)
    of_page = [scales[:, page].T for scales in (k_scales, v_scales)]  # [S, K]
    k, v = (
        pages[:, page].swapaxes(0, 1).astype(jnp.float32) * scales[..., None]
        for pages, scales in zip((k_pages, v_pages), of_page, strict=True)
    )
    k_pages, v_pages, k_scales, v_scales = (x.at[:, page].set(0) for x in (k_pages, v_pages, k_scales, v_scales))
    scales = {"k_scale": of_page[0], "v_scale": of_page[1]}
    pools = compat.write_head_major_kv_pages(k_pages, v_pages, k, v, slots, k_scales, v_scales, **scales)
    k_pages, v_pages, k_scales, v_scales = pools
    return compat.paged_attention(q, k_pages, v_pages, tables, lengths, k_scales, v_scales, return_lse=True)


def values(q: Any, k_pages: Any, tables: Any, lengths: Any) -> Any:
    """Takes a page out of a pool of keys that hold the values, and writes its tokens back, then decodes."""
    page, size = tables[0, 0], k_pages.shape[1]
    slots = page * size + jnp.arange(size, dtype=jnp.int32)
    pool, _ = jpa.write_kv_pages(k_pages.at[page].set(0), None, k_pages[page], None, slots)
    return jpa.paged_attention(q, pool, None, tables, lengths, value_dim=24, return_lse=True)


PROGRAMS = {
    "ragged": Program(
        ("jax_paged_attn.attention.v1",),
        "mixed_all",
        ("mixed_all_short",),
        ("t", "p", "p", "b", "b, m", "b+1"),
        ragged,
    ),
    "rows": Program(
        ("jax_paged_attn.attention.v1",),
        "drafts",
        ("drafts_of_9",),
        ("t", "p", "p", "b", "b, m", "b+1"),
        rows,
        ("jax_paged_attn.attention.v5",),
    ),
    "step": Program(
        ("jax_paged_attn.attention.v1", "jax_paged_attn.write.v1"),
        "decode_bf16_int8",
        (),
        ("b", "p", "p", "b, m", "b"),
        step,
    ),
    "interleaved": Program(
        ("jax_paged_attn.attention.v2",),
        "interleaved_all",
        (),
        ("t", "p", "b", "b, m", "b+1"),
        interleaved,
    ),
    "head_major": Program(
        ("jax_paged_attn.attention.v2",),
        "head_major_int8",
        (),
        ("b", "2, p", "2, p", "b, m", "b"),
        head_major,
    ),
    "tokens": Program(
        ("jax_paged_attn.attention.v3", "jax_paged_attn.write.v2"),
        "tokens_many_rows",
        (),
        ("b", "1, p", "1, p", "b, m", "b", "1, p", "1, p"),
        tokens,
    ),
    "values": Program(
        ("jax_paged_attn.attention.v4", "jax_paged_attn.write.v3"),
        "decode_in_keys",
        (),
        ("b", "p", "b, m", "b"),
        values,
    ),
}


def path_of(name: str, platform: str) -> Path:
    return FOLDER / f"{name}-{platform}.bin"


def main(platform: str = "cpu") -> None:
    """Writes the files that are missing."""
    for name, program in PROGRAMS.items():
        path = path_of(name, platform)
        if path.exists():
            print(f"{path.name}: kept")
            continue
        path.write_bytes(program.exported(platform).serialize())
        print(f"{path.name}: {path.stat().st_size} bytes, jax {jax.__version__}, jax_paged_attn {jpa.__version__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
