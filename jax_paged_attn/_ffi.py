"""The compiled modules: the only importer of them, their FFI targets, and the calls of these targets.

A platform has one compiled module here: `_cpu` for "cpu", and for "cuda" `_cuda`, of CUDA 13, or `_cuda12`, of CUDA 12,
whichever JAX's plugin is for. An absent module is normal (a build without it); one that is there but does not load
raises on import of this package.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_paged_attn._layouts import LAYOUTS, keys_and_values
from jax_paged_attn._options import Scoring

_CPU_MODULE = "jax_paged_attn._cpu"
# By the major version of CUDA.
_CUDA_MODULES = {13: "jax_paged_attn._cuda", 12: "jax_paged_attn._cuda12"}
# The package that has its cuBLAS in a folder `lib`, in NVIDIA's namespace.
_CUBLAS_PACKAGES = {13: "cu13", 12: "cublas"}
# XLA's names of the platforms that JAX lowers for.
_XLA_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}

# The environment variable that chooses a CUDA module: 12 or 13.
_CUDA_VERSION = "JPA_CUDA_VERSION"

ATTENTION_TARGET = "jax_paged_attn.attention.v1"
# For pools of every layout. "split" ones stay with v1, so that programs exported with them stay as they were.
ATTENTION_LAYOUT_TARGET = "jax_paged_attn.attention.v2"
# For pools with padding heads, or with scales per token and head, too.
ATTENTION_TOKENS_TARGET = "jax_paged_attn.attention.v3"
# For values of another head dim than keys, or in the keys, too. It has all that v3 has.
ATTENTION_VALUES_TARGET = "jax_paged_attn.attention.v4"
# For ragged calls of "fused" on CUDA, with `cu_q_lens` and `num_seqs` in place of `q_starts` and `q_counts`.
ATTENTION_CUMULATIVE_TARGET = "jax_paged_attn.attention.v5"
WRITE_TARGET = "jax_paged_attn.write.v1"
WRITE_LAYOUT_TARGET = "jax_paged_attn.write.v2"
# As v4 of attention.
WRITE_VALUES_TARGET = "jax_paged_attn.write.v3"

# The most KV splits of a sequence; kMaxSplits in cpp/core/workspace.h.
_MAX_SPLITS = 16


class AttentionOperands(NamedTuple):
    """Operands of the attention targets, in the order of kAttentionTensors in cpp/ffi/targets.h.

    The last ones came with v3. From v5 on `cu_q_lens` and `num_seqs` stand in the places of `q_starts` and `q_counts`.
    """

    q: Array
    k_pages: Array
    v_pages: Array
    block_tables: Array
    kv_lens: Array
    q_starts: Array
    q_counts: Array
    sinks: Array
    k_scale: Array
    v_scale: Array
    k_token_scales: Array | None = None
    v_token_scales: Array | None = None

    @classmethod
    def of(cls, operands: Sequence[Array], token_scales: tuple[bool, bool]) -> "AttentionOperands":
        """From those of the primitive."""
        fields: tuple[Any, ...] = (*operands[:10], *keys_and_values(operands[10:], token_scales))
        return cls(*fields)


class WriteOperands(NamedTuple):
    """Operands of the write targets, in the order of kWriteTensors in cpp/ffi/targets.h."""

    k_pages: Array
    v_pages: Array
    k: Array
    v: Array
    slot_mapping: Array
    k_scale: Array
    v_scale: Array


class _Choice(NamedTuple):
    """The compiled module of a platform: None where this installation lacks it."""

    name: str
    module: ModuleType | None
    why: str = ""  # it is this one of several


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None
        raise ImportError(f"{name} is installed but does not load: {error}", name=name, path=error.path) from error


def _load_cpu() -> _Choice:
    module = _import(_CPU_MODULE)
    if module is not None:
        _register(module, "cpu")
    return _Choice(_CPU_MODULE, module)


def _load_cuda() -> _Choice:
    version, why = _cuda_version()
    name = _CUDA_MODULES[version]
    module = _import(name)
    if module is None and _CUDA_VERSION in os.environ:
        raise ImportError(f"{why} asks for {name}, which this installation was built without", name=name)
    if module is None:
        # XLA does not mind which runtime a module has linked: where the driver is new enough for it, the other serves.
        (other,) = _CUDA_MODULES.keys() - {version}
        module = _import(_CUDA_MODULES[other])
        if module is not None:
            why += f", but this installation was built without {name}"
            version, name = other, _CUDA_MODULES[other]
    if module is not None:
        for type_name, registration in module.state_types().items():
            jax.ffi.register_ffi_type(type_name, registration, platform=_XLA_PLATFORMS["cuda"])
        module.set_library_directory(_cublas_directory(version))
        _register(module, "cuda")
    return _Choice(name, module, why)


def _cuda_version() -> tuple[int, str]:
    """The major version of CUDA whose module is to serve, and why.

    Raises:
      ValueError: JPA_CUDA_VERSION is there, and is neither 12 nor 13.
    """
    asked = os.environ.get(_CUDA_VERSION)
    if asked is not None:
        if asked not in map(str, _CUDA_MODULES):
            raise ValueError(f"{_CUDA_VERSION}: expected 12 or 13, got {asked!r}")
        return int(asked), f"{_CUDA_VERSION}={asked}"
    for version in sorted(_CUDA_MODULES):  # beside both plugins the module of CUDA 12, which runs on every driver
        plugin = f"jax_cuda{version}_plugin"
        if importlib.util.find_spec(plugin) is not None:
            return version, f"{plugin} is installed"
    return max(_CUDA_MODULES), "no CUDA plugin of JAX is installed"


def _register(module: ModuleType, platform: str) -> None:
    for target, handler in module.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform=_XLA_PLATFORMS[platform], api_version=1)


def _cublas_directory(version: int) -> str:
    """Where NVIDIA's packages keep cuBLAS, which JAX's CUDA plugin depends on; empty if they are not installed."""
    if importlib.util.find_spec("nvidia") is None:
        return ""
    spec = importlib.util.find_spec(f"nvidia.{_CUBLAS_PACKAGES[version]}")
    locations = spec.submodule_search_locations if spec else None
    return os.path.join(locations[0], "lib") if locations else ""


_CHOICES = {"cpu": _load_cpu(), "cuda": _load_cuda()}
_loaded = {platform: choice.module for platform, choice in _CHOICES.items()}


def has(platform: str) -> bool:
    """True if this installation has a compiled module for the platform ("cpu" or "cuda")."""
    return _loaded.get(platform) is not None


def compiled(platform: str) -> ModuleType:
    """The platform's compiled module; LookupError if there is none."""
    module = _loaded.get(platform)
    if module is None:
        raise LookupError(missing(platform))
    return module


def compute_capability() -> str | None:
    """That of this process's first GPU, such as "9.0"; None where JAX has no GPU, as in a program for export."""
    try:
        device, *_ = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return device.compute_capability


def missing(platform: str) -> str | None:
    """Why there is no compiled module for the platform, or None if there is one."""
    if has(platform):
        return None
    if platform in _CHOICES:
        return f"this installation was built without {_CHOICES[platform].name}"
    return f"there is no compiled module for platform {platform!r}"


def describe() -> list[str]:
    """One line per compiled module: how it was built and what it uses here."""
    lines = []
    for platform, (name, _, why) in _CHOICES.items():
        if not has(platform):
            lines.append(f"{name}: {missing(platform)}")
            continue
        module = compiled(platform)
        build = module.build_info()
        line = f"{name}: built by {build['compiler']} for XLA FFI {build['ffi_api']}; "
        if platform == "cpu":
            line += f"runs {module.isa()} (of {', '.join(module.available_isas())})"
        else:
            line += f"has the runtime of CUDA {build['cuda']} and kernels for compute capabilities "
            line += f"{build['architectures']}; serves since {why}"
        lines.append(line)
    return lines


def attention_workspace_bytes(num_seqs: Any, num_q_heads: Any, value_dim: Any) -> Any:
    """Size of the attention target's workspace, as a polynomial in dimensions that may be symbolic."""
    return num_seqs * num_q_heads * _MAX_SPLITS * (value_dim + 2) * 4


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
    num_padding_heads: int = 0,
    token_scales: bool = False,
    value_dim: int | None = None,
) -> Any:
    """Size of the workspace of "cublaslt", exact for known sizes and enough for symbolic ones.

    The handler makes its plan by the same function, so for known sizes no byte is left over. The plan for symbolic
    sizes is not known, but it keeps to the limit and adds a fixed number of bytes per row and sequence.
    """
    del batch_invariant  # which it does not guarantee
    module = compiled("cuda")
    fixed, variable = _sizes(q, k_pages, block_tables, layout, num_padding_heads, value_dim)
    options: dict[str, Any] = {"workspace_limit": workspace_limit, "layout": layout}
    options |= {"num_padding_heads": num_padding_heads, "token_scales": token_scales}
    if _are_known(variable):
        return module.attention_plan(**fixed, **variable, **options, decode=decode)["workspace_bytes"]
    rows_and_seqs = variable["num_rows"] + variable["num_seqs"]
    return rows_and_seqs * module.WORKSPACE_BYTES_PER_ROW + module.workspace_bound(**fixed, **options)


def fused_workspace_bytes(
    q: Array,
    k_pages: Array,
    block_tables: Array,
    *,
    decode: bool,
    batch_invariant: bool,
    workspace_limit: int,
    layout: str = "split",
    num_padding_heads: int = 0,
    token_scales: bool = False,
    value_dim: int | None = None,
    cumulative: bool = False,
) -> Any:
    """Size of the workspace of "fused", exact for known sizes and enough for symbolic ones.

    It has room for the most CTAs that a grid may have, on any device, and does not grow with rows, except in a
    batch-invariant call. Each sequence of a call with prompts adds a few bytes. Where TMA cannot load their pages, the
    tile cache may take up to half of the limit.
    """
    del token_scales  # which it does not read
    module = compiled("cuda")
    fixed, variable = _sizes(q, k_pages, block_tables, layout, num_padding_heads, value_dim)
    options = {"decode": decode, "batch_invariant": batch_invariant, "workspace_limit": workspace_limit}
    options["cumulative"] = cumulative
    if _are_known(variable):
        return module.fused_workspace_bytes(**fixed, **variable, **options)
    workspace = module.fused_workspace_bound(**fixed, **options)
    if not decode:
        workspace += variable["num_seqs"] * module.FUSED_WORKSPACE_BYTES_PER_SEQUENCE
    if cumulative:
        workspace += variable["num_seqs"] * module.FUSED_CUMULATIVE_BYTES_PER_SEQUENCE
    if batch_invariant:
        per_row = module.fused_workspace_bytes_per_row(num_q_heads=fixed["num_q_heads"], value_dim=fixed["value_dim"])
        workspace += variable["num_rows"] * per_row
    return workspace


def _sizes(
    q: Array, k_pages: Array, block_tables: Array, layout: str, num_padding_heads: int, value_dim: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call's dtypes and sizes by the keywords of `_cuda`: those that are always known, and those that may not be."""
    num_rows, num_q_heads, head_dim = q.shape
    num_seqs, max_pages = block_tables.shape
    fixed = {
        "q_dtype": str(q.dtype),
        "kv_dtype": str(k_pages.dtype),
        "num_q_heads": num_q_heads,
        "num_kv_heads": LAYOUTS[layout].kv_heads(k_pages, num_padding_heads),
        "head_dim": head_dim,
        "value_dim": head_dim if value_dim is None else value_dim,
        "page_size": LAYOUTS[layout].page_size(k_pages),
    }
    return fixed, {"num_rows": num_rows, "num_seqs": num_seqs, "max_pages": max_pages}


def _are_known(sizes: Mapping[str, Any]) -> bool:
    return all(isinstance(size, int) for size in sizes.values())


# The function of each CUDA engine that says how much scratch memory a call needs.
_CUDA_WORKSPACES: dict[str, Callable[..., Any]] = {
    "fused": fused_workspace_bytes,
    "cublaslt": cublaslt_workspace_bytes,
}


def attention_cpu(
    *operands: Array, decode: bool, batch_invariant: bool, token_scales: tuple[bool, bool], **parameters: Any
) -> tuple[Array, Array]:
    """Attention on the CPU engine; operands and parameters as in docs/primitive.md.

    It finds out by itself which sequences have one row, and is batch-invariant whether asked or not.

    Returns:
      `out [T, N, Hv]` in q's dtype and `lse [T, N]` f32.
    """
    del decode, batch_invariant
    named = AttentionOperands.of(operands, token_scales)
    sizes = (named.block_tables.shape[0], named.q.shape[1], named.v_pages.shape[-1])
    workspace = attention_workspace_bytes(*sizes)
    return _attention(named, workspace, padded=_num_padding_columns(named) > 0, **parameters)


def attention_cuda(
    *operands: Array,
    engine: str,
    decode: bool,
    batch_invariant: bool,
    layout: str,
    token_scales: tuple[bool, bool],
    cumulative: bool = False,
    **parameters: Any,
) -> tuple[Array, Array]:
    """Attention on an engine for CUDA; operands and parameters as in docs/primitive.md.

    Returns:
      `out [T, N, Hv]` in q's dtype and `lse [T, N]` f32.
    """
    limit = workspace_limit_cuda()
    named = AttentionOperands.of(operands, token_scales)
    padded = _num_padding_columns(named) > 0
    if padded and engine == "cublaslt":  # which does not pass over padding
        named = named._replace(q=jnp.pad(named.q, ((0, 0), (0, 0), (0, _num_padding_columns(named)))))
    workspace = _CUDA_WORKSPACES[engine](
        named.q,
        named.k_pages,
        named.block_tables,
        decode=decode,
        batch_invariant=batch_invariant,
        workspace_limit=limit,
        layout=layout,
        num_padding_heads=_padding_heads(named, layout),
        token_scales=any(token_scales),
        value_dim=named.v_pages.shape[-1],
        **({"cumulative": True} if cumulative else {}),
    )
    attributes: dict[str, Any] = {
        "engine": engine,
        "workspace_limit": np.int64(limit),
        "batch_invariant": bool(batch_invariant),
    }
    if not cumulative:
        attributes["decode"] = bool(decode)
    if decode:
        # The rows are known then: XLA would make both arrays anew in each call.
        none = jnp.zeros(0, jnp.int32)
        named = named._replace(q_starts=none, q_counts=none)
    return _attention(named, workspace, attributes, layout=layout, padded=padded, cumulative=cumulative, **parameters)


def _attention(
    operands: AttentionOperands,
    workspace_bytes: Any,
    attributes: Mapping[str, Any] | None = None,
    *,
    scoring: Scoring,
    layout: str,
    padded: bool,
    cumulative: bool = False,
) -> tuple[Array, Array]:
    """Calls the attention target.

    Args:
      attributes: those that one platform has beyond the common ones.
      cumulative: whether the operands q_starts and q_counts are `cu_q_lens` and `num_seqs`.
      padded: whether keys are, see `Layout.values_in_keys`. Their pools are reshaped ones, mostly of one head. XLA
        would copy them if the last reshape added an axis of size 1, so they go without the axis of heads.
    """
    q, value_dim = operands.q, operands.v_pages.shape[-1]
    results = (
        jax.ShapeDtypeStruct((*q.shape[:2], value_dim), q.dtype),
        jax.ShapeDtypeStruct(q.shape[:2], jnp.float32),
        jax.ShapeDtypeStruct((workspace_bytes,), jnp.uint8),
    )
    target, of_layout = (ATTENTION_TARGET, {}) if layout == "split" else (ATTENTION_LAYOUT_TARGET, {"layout": layout})
    num_padding_heads = _padding_heads(operands, layout)
    if padded and operands.k_pages.shape[2] == 1:
        k_pages, v_pages = (jnp.squeeze(pages, 2) for pages in (operands.k_pages, operands.v_pages))
        operands = operands._replace(k_pages=k_pages, v_pages=v_pages)
    arrays, scales = operands[:10], operands[10:]
    own_values = value_dim != q.shape[2] or LAYOUTS[layout].values_in_keys
    if cumulative or own_values or num_padding_heads or any(x is not None for x in scales):
        target = ATTENTION_VALUES_TARGET if own_values else ATTENTION_TOKENS_TARGET
        if cumulative:
            target = ATTENTION_CUMULATIVE_TARGET
        of_layout = {"layout": layout}
        arrays += tuple(jnp.zeros((0, 0, 0), jnp.float32) if x is None else x for x in scales)
    out, lse, _ = jax.ffi.ffi_call(target, results)(
        *arrays,
        **scoring.attributes(),
        **of_layout,
        **(attributes or {}),
    )
    return out, lse


def _num_padding_columns(operands: AttentionOperands) -> int:
    return operands.k_pages.shape[-1] - operands.q.shape[2]


def _padding_heads(operands: AttentionOperands, layout: str) -> int:
    return LAYOUTS[layout].padding_heads(operands.k_pages, operands.k_scale.shape[1])


def write(*operands: Array, layout: str = "split") -> tuple[Array, ...]:
    """Writes new keys and values, on a platform with a compiled module; operands as in docs/primitive.md.

    Returns:
      The pools, in the buffers of the operands where these are donated.
    """
    *pools, k, v, slot_mapping, k_scale, v_scale = operands
    num_pools = len(pools)
    if num_pools == 1:
        (pool,) = pools
        pools.append(jnp.zeros((0, *pool.shape[1:]), pool.dtype))  # in place of values' own
    k_pages, v_pages = pools
    target, of_layout = (WRITE_TARGET, {}) if layout == "split" else (WRITE_LAYOUT_TARGET, {"layout": layout})
    if k.shape != v.shape:
        target, of_layout = WRITE_VALUES_TARGET, {"layout": layout}
    results = tuple(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools)
    call = jax.ffi.ffi_call(target, results, input_output_aliases={i: i for i in range(num_pools)})
    named = WriteOperands(
        k_pages=k_pages, v_pages=v_pages, k=k, v=v, slot_mapping=slot_mapping, k_scale=k_scale, v_scale=v_scale
    )
    return tuple(call(*named, **of_layout))[:num_pools]


# The attention call of each compiled engine.
ATTENTION: dict[str, Callable[..., tuple[Array, Array]]] = {
    "cpu": attention_cpu,
    **{name: functools.partial(attention_cuda, engine=name) for name in _CUDA_WORKSPACES},
}
