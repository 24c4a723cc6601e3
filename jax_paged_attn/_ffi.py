"""The compiled modules: the only importer of them, their FFI targets, and the calls of these targets.

A platform has one compiled module, `_cpu` for "cpu". An absent module is normal (a build without it); one that is there
but does not load raises on import of this package.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_MODULES = {"cpu": "jax_paged_attn._cpu"}

ATTENTION_TARGET = "jax_paged_attn.attention.v1"
WRITE_TARGET = "jax_paged_attn.write.v1"

# How many ranges the keys of a sequence are cut into at most; kMaxSplits in cpp/core/workspace.h.
_MAX_SPLITS = 16


def _load(platform: str) -> ModuleType | None:
    name = _MODULES[platform]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    for target, handler in module.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform=platform, api_version=1)
    return module


_loaded = {platform: _load(platform) for platform in _MODULES}


def has(platform: str) -> bool:
    """Whether this installation has a compiled module for the platform ("cpu")."""
    return _loaded.get(platform) is not None


def compiled(platform: str) -> ModuleType:
    """The platform's compiled module; LookupError if there is none."""
    module = _loaded.get(platform)
    if module is None:
        raise LookupError(missing(platform))
    return module


def missing(platform: str) -> str | None:
    """Why there is no compiled module for the platform, or None if there is one."""
    if has(platform):
        return None
    if platform in _MODULES:
        return f"this installation was built without {_MODULES[platform]}"
    return f"there is no compiled module for platform {platform!r}"


def describe() -> list[str]:
    """A line a compiled module: how it was built and what it uses here."""
    lines = []
    for platform, name in _MODULES.items():
        if not has(platform):
            lines.append(f"{name}: {missing(platform)}")
            continue
        module = compiled(platform)
        build = module.build_info()
        lines.append(
            f"{name}: built by {build['compiler']} for XLA FFI {build['ffi_api']}; runs {module.isa()} "
            f"(of {', '.join(module.available_isas())})"
        )
    return lines


def attention_workspace_bytes(num_seqs: Any, num_q_heads: Any, head_dim: Any) -> Any:
    """Size of the attention target's workspace, as a polynomial in dimensions that may be symbolic."""
    return num_seqs * num_q_heads * _MAX_SPLITS * (head_dim + 2) * 4


def attention_cpu(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    kv_lens: Array,
    q_starts: Array,
    q_counts: Array,
    sinks: Array,
    k_scale: Array,
    v_scale: Array,
    *,
    scale: float,
    soft_cap: float,
    sliding_window: int,
    causal: bool,
) -> tuple[Array, Array]:
    """Attention on the CPU engine; operands and attributes as in docs/architecture.md.

    Returns:
      `out [T, N, H]` in q's dtype and `lse [T, N]` f32.
    """
    num_rows, num_q_heads, head_dim = q.shape
    workspace = attention_workspace_bytes(block_tables.shape[0], num_q_heads, head_dim)
    call = jax.ffi.ffi_call(
        ATTENTION_TARGET,
        (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((num_rows, num_q_heads), jnp.float32),
            jax.ShapeDtypeStruct((workspace,), jnp.uint8),
        ),
    )
    out, lse, _ = call(
        *(q, k_pages, v_pages, block_tables, kv_lens, q_starts, q_counts, sinks, k_scale, v_scale),
        scale=np.float32(scale),
        soft_cap=np.float32(soft_cap),
        sliding_window=np.int64(sliding_window),
        causal=bool(causal),
    )
    return out, lse


def write_cpu(
    k_pages: Array,
    v_pages: Array,
    k: Array,
    v: Array,
    slot_mapping: Array,
    k_scale: Array,
    v_scale: Array,
) -> tuple[Array, Array]:
    """Writes new keys and values on the CPU; operands as in docs/architecture.md.

    Returns:
      Both pools, in the buffers of the operands where these are donated.
    """
    call = jax.ffi.ffi_call(
        WRITE_TARGET,
        (jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype), jax.ShapeDtypeStruct(v_pages.shape, v_pages.dtype)),
        input_output_aliases={0: 0, 1: 1},
    )
    k_pages, v_pages = call(k_pages, v_pages, k, v, slot_mapping, k_scale, v_scale)
    return k_pages, v_pages


# The call of each engine that has a compiled one.
ATTENTION: dict[str, Callable[..., tuple[Array, Array]]] = {"cpu": attention_cpu}
