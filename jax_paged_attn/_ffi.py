"""The compiled modules: the only importer of them, their FFI targets, and the calls of these targets.

A platform has one compiled module, `_cpu` for "cpu" and `_cuda` for "cuda". An absent module is normal (a build without
it); one that is there but does not load raises on import of this package.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_paged_attn._layouts import LAYOUTS

_MODULES = {"cpu": "jax_paged_attn._cpu", "cuda": "jax_paged_attn._cuda"}
# What XLA calls the platforms that JAX lowers for.
_XLA_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}

ATTENTION_TARGET = "jax_paged_attn.attention.v1"
# For pools of every layout; what "split" ones need, v1 does, so that programs exported with them stay as they were.
ATTENTION_LAYOUT_TARGET = "jax_paged_attn.attention.v2"
WRITE_TARGET = "jax_paged_attn.write.v1"

# How many ranges the keys of a sequence are cut into at most; kMaxSplits in cpp/core/workspace.h.
_MAX_SPLITS = 16


def _load(platform: str) -> ModuleType | None:
    name = _MODULES[platform]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None
        raise ImportError(f"{name} is installed but does not load: {error}", name=name, path=error.path) from error
    if platform == "cuda":
        for type_name, registration in module.state_types().items():
            jax.ffi.register_ffi_type(type_name, registration, platform=_XLA_PLATFORMS[platform])
        module.set_library_directory(_cublas_directory())
    for target, handler in module.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform=_XLA_PLATFORMS[platform], api_version=1)
    return module


def _cublas_directory() -> str:
    """Where NVIDIA's packages keep cuBLAS, which JAX's CUDA plugin depends on; empty if they are not installed."""
    if importlib.util.find_spec("nvidia") is None:
        return ""
    spec = importlib.util.find_spec("nvidia.cu13")
    locations = spec.submodule_search_locations if spec else None
    return os.path.join(locations[0], "lib") if locations else ""


_loaded = {platform: _load(platform) for platform in _MODULES}


def has(platform: str) -> bool:
    """Whether this installation has a compiled module for the platform ("cpu" or "cuda")."""
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
        line = f"{name}: built by {build['compiler']} for XLA FFI {build['ffi_api']}; "
        if platform == "cpu":
            line += f"runs {module.isa()} (of {', '.join(module.available_isas())})"
        else:
            line += f"has kernels for compute capabilities {build['architectures']}"
        lines.append(line)
    return lines


def attention_workspace_bytes(num_seqs: Any, num_q_heads: Any, head_dim: Any) -> Any:
    """Size of the attention target's workspace, as a polynomial in dimensions that may be symbolic."""
    return num_seqs * num_q_heads * _MAX_SPLITS * (head_dim + 2) * 4


def workspace_limit_cuda() -> int:
    """Bytes that attention on CUDA may use for scores and copies of pages: 256 MiB, or JPA_CUDA_WORKSPACE_MIB.

    Raises:
      ValueError: the variable is not a whole number of at least 1.
    """
    text = os.environ.get("JPA_CUDA_WORKSPACE_MIB")
    if text is None:
        return compiled("cuda").DEFAULT_WORKSPACE_LIMIT
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ValueError(f"JPA_CUDA_WORKSPACE_MIB: expected a whole number of at least 1, got {text!r}")
    return int(text) << 20


def cublaslt_workspace_bytes(
    q: Array,
    k_pages: Array,
    block_tables: Array,
    *,
    decode: bool,
    batch_invariant: bool,
    workspace_limit: int,
    layout: str = "split",
) -> Any:
    """Size of the workspace of "cublaslt", exact for known sizes and enough for symbolic ones.

    The handler makes its plan by the same function, so for known sizes no byte is left over. Of symbolic sizes the
    plan cannot be known, but it keeps to the limit and what rows and sequences add.
    """
    del batch_invariant  # which it does not promise
    module = compiled("cuda")
    dtypes = (str(q.dtype), str(k_pages.dtype))
    num_rows, num_q_heads, head_dim = q.shape
    page_size, num_kv_heads = LAYOUTS[layout].page_size(k_pages), LAYOUTS[layout].kv_heads(k_pages)
    num_seqs, max_pages = block_tables.shape
    if all(isinstance(size, int) for size in (num_rows, num_seqs, max_pages)):
        sizes = (num_rows, num_q_heads, num_kv_heads, head_dim, page_size, num_seqs, max_pages)
        return module.attention_plan(*dtypes, *sizes, decode, workspace_limit, layout)["workspace_bytes"]
    bound = module.workspace_bound(*dtypes, num_q_heads, num_kv_heads, head_dim, page_size, workspace_limit, layout)
    return (num_rows + num_seqs) * module.WORKSPACE_BYTES_PER_ROW + bound


def fused_workspace_bytes(
    q: Array,
    k_pages: Array,
    block_tables: Array,
    *,
    decode: bool,
    batch_invariant: bool,
    workspace_limit: int,
    layout: str = "split",
) -> Any:
    """Size of the workspace of "fused", exact for known sizes and enough for symbolic ones.

    It has room for the most CTAs that a grid may have, on any device, and does not go with rows; that of a
    batch-invariant call does. Each sequence of a call with prompts adds a few bytes, and where their pages have to be
    copied row by row, copies have up to half of the limit.
    """
    module = compiled("cuda")
    dtypes = (str(q.dtype), str(k_pages.dtype))
    num_rows, num_q_heads, head_dim = q.shape
    heads = (num_q_heads, LAYOUTS[layout].kv_heads(k_pages), head_dim)
    page_size, (num_seqs, max_pages) = LAYOUTS[layout].page_size(k_pages), block_tables.shape
    options = (decode, batch_invariant, workspace_limit)
    if all(isinstance(size, int) for size in (num_rows, num_seqs, max_pages)):
        return module.fused_workspace_bytes(*dtypes, num_rows, *heads, page_size, num_seqs, max_pages, *options)
    bound = module.fused_workspace_bound(*dtypes, *heads, page_size, *options)
    of_sequences = 0 if decode else num_seqs * module.FUSED_WORKSPACE_BYTES_PER_SEQUENCE
    of_rows = num_rows * module.fused_workspace_bytes_per_row(num_q_heads, head_dim) if batch_invariant else 0
    return of_rows + of_sequences + bound


# How much scratch memory the engines for CUDA need.
_CUDA_WORKSPACES: dict[str, Callable[..., Any]] = {
    "fused": fused_workspace_bytes,
    "cublaslt": cublaslt_workspace_bytes,
}


def attention_cpu(*operands: Array, decode: bool, batch_invariant: bool, **parameters: Any) -> tuple[Array, Array]:
    """Attention on the CPU engine; operands and parameters as in docs/primitive.md.

    It finds out by itself which sequences have one row, and is batch-invariant whether asked or not.

    Returns:
      `out [T, N, H]` in q's dtype and `lse [T, N]` f32.
    """
    del decode, batch_invariant
    q, block_tables = operands[0], operands[3]
    workspace = attention_workspace_bytes(block_tables.shape[0], *q.shape[1:])
    return _attention(operands, workspace, **parameters)


def attention_cuda(
    *operands: Array, engine: str, decode: bool, batch_invariant: bool, layout: str, **parameters: Any
) -> tuple[Array, Array]:
    """Attention on an engine for CUDA; operands and parameters as in docs/primitive.md.

    Returns:
      `out [T, N, H]` in q's dtype and `lse [T, N]` f32.
    """
    limit = workspace_limit_cuda()
    q, k_pages, _, block_tables, *_ = operands
    workspace = _CUDA_WORKSPACES[engine](
        q, k_pages, block_tables, decode=decode, batch_invariant=batch_invariant, workspace_limit=limit, layout=layout
    )
    attributes = {
        "decode": bool(decode),
        "engine": engine,
        "workspace_limit": np.int64(limit),
        "batch_invariant": bool(batch_invariant),
    }
    if decode:
        # The rows are known then: XLA would make both arrays anew in each call.
        none = jnp.zeros(0, jnp.int32)
        operands = (*operands[:5], none, none, *operands[7:])
    return _attention(operands, workspace, attributes, layout=layout, **parameters)


def _attention(
    operands: tuple[Array, ...],
    workspace_bytes: Any,
    attributes: Mapping[str, Any] | None = None,
    *,
    scale: float,
    soft_cap: float,
    sliding_window: int,
    causal: bool,
    layout: str,
) -> tuple[Array, Array]:
    """Calls the attention target; `attributes` are those that one platform has beyond the common ones."""
    q = operands[0]
    results = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct(q.shape[:2], jnp.float32),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    target, of_layout = (ATTENTION_TARGET, {}) if layout == "split" else (ATTENTION_LAYOUT_TARGET, {"layout": layout})
    out, lse, _ = jax.ffi.ffi_call(target, results)(
        *operands,
        scale=np.float32(scale),
        soft_cap=np.float32(soft_cap),
        sliding_window=np.int64(sliding_window),
        causal=bool(causal),
        **of_layout,
        **(attributes or {}),
    )
    return out, lse


def write(
    k_pages: Array,
    v_pages: Array,
    k: Array,
    v: Array,
    slot_mapping: Array,
    k_scale: Array,
    v_scale: Array,
) -> tuple[Array, Array]:
    """Writes new keys and values, on a platform with a compiled module; operands as in docs/primitive.md.

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
ATTENTION: dict[str, Callable[..., tuple[Array, Array]]] = {
    "cpu": attention_cpu,
    **{name: functools.partial(attention_cuda, engine=name) for name in _CUDA_WORKSPACES},
}
