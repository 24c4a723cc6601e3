"""The JAX primitives: attention, its tangent and cotangent, and writes to the cache.

Each has abstract evaluation, one lowering per platform that XLA partitions, batching by folding and differentiation.
The public functions check the user's arguments; the shape rules here hold for whoever binds a primitive,
transformations included.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import NamedSharding, PartitionSpec

from jax_paged_attn import _checks, _differentiation, _engines, _ffi, _modes, _partitioning, _reference, _rows
from jax_paged_attn._folding import POOLS, Axis, fold, unfold
from jax_paged_attn._layouts import LAYOUTS, head_dim_of, keys_and_values

# The ten operands of attention that every call has, as in docs/primitive.md.
_AXES = (
    Axis.ROWS,
    Axis.K_POOL,
    Axis.V_POOL,
    Axis.TABLES,
    Axis.SEQUENCES,
    Axis.FIRST_ROWS,
    Axis.SEQUENCES,
    Axis.SINKS,
    Axis.SCALES,
    Axis.SCALES,
)
# The indices of q, k_pages, v_pages and sinks among them, which can be differentiated.
_DIFFERENTIABLE = (0, 1, 2, 7)

# The parameters that derivatives share with attention.
_STATIC = ("scoring", "decode", "layout", "token_scales")

# The axes of a primitive's operands and of its results.
_Axes = tuple[tuple[Axis, ...], tuple[Axis, ...]]

attention_p = Primitive("paged_attention")
attention_p.multiple_results = True
tangent_p = Primitive("paged_attention_tangent")
tangent_p.multiple_results = True
cotangent_p = Primitive("paged_attention_cotangent")
cotangent_p.multiple_results = True
write_p = Primitive("write_kv_pages")
write_p.multiple_results = True


# ---- the axes of operands and results, as functions of the parameters ------------------------------------------------


def _operand_axes(token_scales: tuple[bool, bool]) -> tuple[Axis, ...]:
    """Scales per token follow where there are some; they count pages as their pool does."""
    return (*_AXES, *(axis for axis, has in zip(POOLS, token_scales, strict=True) if has))


def _attention_axes(*, token_scales: tuple[bool, bool], cumulative: bool, **_: Any) -> _Axes:
    axes = _operand_axes(token_scales)
    if cumulative:
        axes = (*axes[:5], Axis.CUMULATIVE, Axis.CUMULATIVE, *axes[7:])
    return axes, (Axis.ROWS, Axis.ROWS)


def _axes_with_respect_to(wrt: tuple[bool, ...]) -> tuple[Axis, ...]:
    return tuple(_AXES[i] for i, w in zip(_DIFFERENTIABLE, wrt, strict=True) if w)


def _tangent_axes(*, wrt: tuple[bool, ...], token_scales: tuple[bool, bool], **_: Any) -> _Axes:
    results = (Axis.ROWS, Axis.ROWS)
    return (*_axes_with_respect_to(wrt), *_operand_axes(token_scales), *results), results


def _cotangent_axes(*, wrt: tuple[bool, ...], token_scales: tuple[bool, bool], **_: Any) -> _Axes:
    results = (Axis.ROWS, Axis.ROWS)
    return (*results, *_operand_axes(token_scales), *results), _axes_with_respect_to(wrt)


def _write_axes(*, layout: str, **_: Any) -> _Axes:
    pools = (Axis.K_POOL, Axis.V_POOL)[: LAYOUTS[layout].num_pools]
    return (*pools, Axis.TOKENS, Axis.TOKENS, Axis.SLOTS, Axis.SCALES, Axis.SCALES), pools


# ---- binding ---------------------------------------------------------------------------------------------------------


def attention(
    *operands: Array, token_scales: tuple[bool, bool] = (False, False), cumulative: bool = False, **parameters: Any
) -> tuple[Array, Array]:
    """Binds the attention primitive: `(out, lse)` for its operands and its static parameters."""
    parameters |= {"partitioned": _partitioning.call_that_needs_devices()}
    parameters |= {"token_scales": token_scales, "cumulative": cumulative}
    out, lse = attention_p.bind(*_vary_alike(operands), **parameters)
    return out, lse


def write(*operands: Array, layout: str = "split") -> tuple[Array, ...]:
    """Binds the write primitive: the pools after the write, as many as the layout has."""
    partitioned = _partitioning.call_that_needs_devices()
    return tuple(write_p.bind(*_vary_alike(operands), partitioned=partitioned, layout=layout))


def check_sizes(
    num_heads: int, kv_heads: int, head_dims: tuple[int, int], page_size: int, pools: tuple[str, str]
) -> None:
    """Raises ValueError for sizes that no call can have.

    Args:
      head_dims: that of queries and keys, and that of values.
      pools: what errors call the pools of keys and of values.
    """
    for name, size in (
        ("q: query heads N", num_heads),
        ("q: head dim H", head_dims[0]),
        (f"{pools[0]}: page size S", page_size),
        (f"{pools[0]}: key/value heads K", kv_heads),
        (f"{pools[1]}: head dim Hv", head_dims[1]),
    ):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if num_heads % kv_heads:
        raise ValueError(
            f"q: expected query heads divisible by the {kv_heads} key/value heads of {pools[0]}, got {num_heads}"
        )


def _vary_alike(operands: Sequence[Array]) -> tuple[Array, ...]:
    """Inside `shard_map`, casts operands to vary over every mesh axis that one of them varies over."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    everywhere = frozenset[str]().union(*varying)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(everywhere - axes)), to="varying") if axes != everywhere else x
        for x, axes in zip(operands, varying, strict=True)
    )


def _aval(like: Any, shape: tuple[int, ...], dtype: Any, spec: Sequence[Any]) -> ShapedArray:
    """An abstract result that varies over the same manual mesh axes as `like`, sharded by `spec` over explicit ones."""
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*spec))
    return like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


def _aval_of(x: Any) -> ShapedArray:
    """An abstract result with the shape, dtype and sharding of an operand."""
    return _aval(x, x.shape, x.dtype, x.sharding.spec)


# ---- abstract evaluation ---------------------------------------------------------------------------------------------


def describe(operands: Sequence[Any], parameters: Mapping[str, Any]) -> _engines.Call:
    """The facts that the choice of an engine depends on, from abstract operands and the primitive's parameters."""
    q, k_pages, v_pages, *_ = operands
    k_scale, layout = operands[8], LAYOUTS[parameters["layout"]]
    return _engines.Call(
        num_heads=q.shape[1],
        kv_heads=k_scale.shape[1],
        head_dim=q.shape[2],
        value_dim=v_pages.shape[-1],
        values_in_keys=layout.values_in_keys,
        padded_keys=k_pages.shape[-1] > q.shape[2],
        page_size=layout.page_size(k_pages),
        q_dtype=str(q.dtype),
        page_dtype=str(k_pages.dtype),
        scoring=parameters["scoring"],
        decode=parameters["decode"],
        batch_invariant=parameters["batch_invariant"],
        token_scales=any(parameters["token_scales"]),
    )


def _attention_abstract(*operands: Any, implementation: str | None, **parameters: Any) -> list[Any]:
    decode, layout = parameters["decode"], LAYOUTS[parameters["layout"]]
    q, k_pages, v_pages, block_tables, kv_lens, *rows, sinks, k_scale, v_scale = operands[:10]
    dims = _checks.Dims()
    dims.match("q", q, "T N H", _checks.COMPUTE_DTYPES)
    # The columns of scales say how many key/value heads there are, which a pool with padding heads does not.
    dims.match("k_scale", k_scale, "Xk K", ("float32",))
    dims.match("v_scale", v_scale, "Xv K", ("float32",))
    k_name, v_name = layout.pools
    k_shape = layout.padded_shape.replace("P", "Pk").replace("H", ">=H" if layout.values_in_keys else "H")
    dims.match(k_name, k_pages, k_shape, (str(q.dtype), *_checks.QUANTIZED_DTYPES))
    if k_pages.shape[-1] != dims["H"] and k_pages.shape[-1] * k_pages.dtype.itemsize % 16:
        raise ValueError(f"{k_name}: expected padded keys of a multiple of 16 bytes, got shape {k_pages.shape}")
    v_shape = layout.padded_shape if layout.interleaved else layout.value_shape
    dims.match(v_name, v_pages, v_shape.replace("P", "0" if layout.values_in_keys else "Pv"), (str(k_pages.dtype),))
    k_tokens, v_tokens = keys_and_values(operands[10:], parameters["token_scales"])
    _check_token_scales("k_token_scales", k_tokens, k_pages)
    _check_token_scales("v_token_scales", v_tokens, v_pages)
    dims.match("block_tables", block_tables, "B M", ("int32",))
    dims.match("kv_lens", kv_lens, "B", ("int32",))
    cumulative = parameters["cumulative"]
    first, second = (("cu_q_lens", "B+1"), ("num_seqs", "X")) if cumulative else (("q_starts", "B"), ("q_counts", "B"))
    for (name, letters), x in zip((first, second), rows, strict=True):
        dims.match(name, x, letters, ("int32",))
    if cumulative and dims["X"] > 1:
        raise ValueError(f"num_seqs: expected one number at most, got {dims['X']}")
    dims.match("sinks", sinks, "Xs N", ("float32",))
    value_dim = v_pages.shape[-1]
    check_sizes(dims["N"], dims["K"], (dims["H"], value_dim), dims["S"], layout.pools)
    if layout.values_in_keys and (value_dim > dims["H"] or any(parameters["token_scales"])):
        expected = f"at most the {dims['H']} numbers of a key, and no scales per token"
        raise ValueError(f"value_dim: expected {expected}, got {value_dim} and {parameters['token_scales']}")
    for name, x in (("sinks", sinks), ("k_scale", k_scale), ("v_scale", v_scale)):
        _check_divides(name, x.shape[0], dims["B"])
    if decode and dims["T"] != dims["B"]:
        raise ValueError(f"q: expected one row for each of the {dims['B']} sequences, got {dims['T']}")
    _engines.check_supported(describe(operands, parameters), implementation)
    # On explicit mesh axes results are sharded as q is, or at least by head as the pools are.
    rows, heads, _ = q.sharding.spec
    if not decode:
        rows = None
    if heads is None and not layout.padding_heads(k_pages, dims["K"]):
        of_pool = k_pages.sharding.spec[layout.head_axis]
        ways = math.prod(q.sharding.mesh.shape[name] for name in _names(of_pool))
        heads = None if _names(of_pool) & _names(rows) or dims["K"] % ways else of_pool
    out = _aval(q, (*q.shape[:2], value_dim), q.dtype, (rows, heads, None))
    return [out, _aval(q, q.shape[:2], jnp.float32, (rows, heads))]


def _check_token_scales(name: str, scales: Any | None, pages: Any) -> None:
    if scales is not None and (scales.shape, scales.dtype) != (pages.shape[:-1], jnp.float32):
        expected, got = f"float32{list(pages.shape[:-1])}", f"{scales.dtype}{list(scales.shape)}"
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _names(entry: Any) -> set[str]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return set(entry) if isinstance(entry, tuple) else {entry} - {None}


def _check_divides(name: str, rows: int, count: int) -> None:
    if rows not in (0, 1) and count % rows:
        raise ValueError(f"{name}: expected a number of rows that divides {count}, got {rows}")


def _tangent_abstract(*operands: Any, wrt: tuple[bool, ...], **_: Any) -> list[Any]:
    out, lse = operands[-2:]
    return [_aval_of(out), _aval_of(lse)]


def _cotangent_abstract(*operands: Any, wrt: tuple[bool, ...], **_: Any) -> list[Any]:
    originals = [operands[2 + i] for i, w in zip(_DIFFERENTIABLE, wrt, strict=True) if w]
    return [_aval_of(x) for x in originals]


def _write_abstract(*operands: Any, layout: str, **_: Any) -> list[Any]:
    *pools, k, v, slot_mapping, k_scale, v_scale = operands
    # Numbers per token and head lack the head dim, as their pools do.
    head_dim = head_dim_of(k)
    dims = _checks.Dims(H=1, Hv=1) if len(k.shape) == 2 else _checks.Dims()
    tokens = "T K" if len(k.shape) == 2 else "T K H"
    of_values = "T K 0" if LAYOUTS[layout].values_in_keys else tokens.replace("H", "Hv")
    if LAYOUTS[layout].interleaved:
        of_values = tokens
    dims.match("k", k, tokens, _checks.COMPUTE_DTYPES)
    shapes = (LAYOUTS[layout].padded_shape, LAYOUTS[layout].value_shape)
    for which, (name, pool) in enumerate(zip(LAYOUTS[layout].pools, pools, strict=False)):
        dtypes = (str(pools[0].dtype),) if which else _checks.PAGE_DTYPES
        by_heads: Any = jax.ShapeDtypeStruct(LAYOUTS[layout].shape_by_heads(pool, head_dim, k.shape[1]), pool.dtype)
        dims.match(name, by_heads, shapes[which], dtypes)
    dims.match("v", v, of_values, (str(k.dtype),))
    dims.match("slot_mapping", slot_mapping, "T", ("int32",))
    dims.match("k_scale", k_scale, "Xk K", ("float32",))
    dims.match("v_scale", v_scale, "Xv K", ("float32",))
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        _check_divides(name, x.shape[0], dims["T"])
    return [_aval_of(pool) for pool in pools]


# ---- lowering --------------------------------------------------------------------------------------------------------


def _lowering(impl: Callable[..., Sequence[Array]], axes_of: Callable[..., _Axes]) -> Callable[..., Any]:
    """The lowering that puts `impl(*operands, **parameters)` in the place of the primitive, on each device's shards."""

    def lower(ctx: mlir.LoweringRuleContext, *operands: Any, partitioned: Any, **parameters: Any) -> Any:
        axes, result_axes = axes_of(**parameters)
        decode, layout = parameters.get("decode", False), LAYOUTS[parameters["layout"]]

        def run(*shards: Array) -> Sequence[Array]:
            if decode:  # row numbers are those of the shard
                shards = tuple(
                    jnp.arange(x.shape[0], dtype=jnp.int32) if axis is Axis.FIRST_ROWS else x
                    for x, axis in zip(shards, axes, strict=True)
                )
            return impl(*shards, **parameters)

        if partitioned is not None:
            rule = _partitioning.rule(axes, result_axes, ctx.avals_in, ctx.avals_out, decode, layout)
            run = _partitioning.partitioned(run, rule)
        return _inline(ctx, run, operands)

    return lower


def _inline(ctx: mlir.LoweringRuleContext, run: Callable[..., Sequence[Array]], operands: Sequence[Any]) -> Any:
    """Puts the operations of a traceable function in the place of a primitive.

    Inside `shard_map` the operands' types say over which mesh axes they vary. What a shard does has no need to know,
    and loops would insist on carries of the same type, so the function is traced as if there was no mesh.
    """

    def without_mesh(avals: Sequence[Any]) -> list[ShapedArray]:
        return [ShapedArray(aval.shape, aval.dtype) for aval in avals]

    with _partitioning.no_mesh():
        unsharded = ctx.replace(avals_in=without_mesh(ctx.avals_in), avals_out=without_mesh(ctx.avals_out))
        return mlir.lower_fun(run, multiple_results=True)(unsharded, *operands)


def _attention_lowering(platform: str | None) -> Callable[..., Any]:
    def lower(ctx: mlir.LoweringRuleContext, *operands: Any, **parameters: Any) -> Any:
        here = platform or _platform_of(ctx)
        engine = _engines.choose_to_run(describe(ctx.avals_in, parameters), here, parameters["implementation"])
        attend = _reference_attention if engine == "reference" else _ffi.ATTENTION[engine]

        def impl(*operands: Array, implementation: str | None, cumulative: bool, **static: Any) -> Sequence[Array]:
            del implementation  # `engine` is the one that was chosen
            if cumulative and _engines.is_cumulative(engine):
                return attend(*operands, **static, cumulative=True)
            return attend(*(_rows.with_ranges(operands) if cumulative else operands), **static)

        return _lowering(impl, _attention_axes)(ctx, *operands, **parameters)

    return lower


def _reference_attention(*operands: Array, batch_invariant: bool, **static: Any) -> Sequence[Array]:
    del batch_invariant  # no such guarantee
    return _reference.attention(*operands, **static)


def _platform_of(ctx: mlir.LoweringRuleContext) -> str:
    platforms = ctx.platforms or ctx.module_context.platforms
    return platforms[0]


def _tangent_impl(
    *operands: Array, wrt: tuple[bool, ...], token_scales: tuple[bool, bool], **static: Any
) -> Sequence[Array]:
    dots = iter(operands[: sum(wrt)])
    saved = _differentiation.Saved.of(operands[sum(wrt) :], token_scales)
    q_dot, k_dot, v_dot, sinks_dot = (next(dots) if w else None for w in wrt)
    return _differentiation.tangent(q_dot, k_dot, v_dot, sinks_dot, saved, **static)


def _cotangent_impl(
    out_bar: Array,
    lse_bar: Array,
    *residuals: Array,
    wrt: tuple[bool, bool, bool, bool],
    token_scales: tuple[bool, bool],
    **static: Any,
) -> Sequence[Array]:
    saved = _differentiation.Saved.of(residuals, token_scales)
    return _differentiation.cotangent(out_bar, lse_bar, saved, wrt, **static)


# ---- batching --------------------------------------------------------------------------------------------------------


def _batcher(primitive: Primitive, axes_of: Callable[..., _Axes]) -> Callable[..., Any]:
    """The batching rule; `axes_of(**parameters)`: what the leading axes of operands and results count."""

    def batch(
        operands: Sequence[Array], dims: Sequence[int | None], **parameters: Any
    ) -> tuple[list[Array], list[int]]:
        if parameters.get("cumulative", False):
            operands, dims = _rows.mapped_with_ranges(operands, dims)
            parameters["cumulative"] = False
        axes, result_axes = axes_of(**parameters)
        page_axis = LAYOUTS[parameters["layout"]].page_axis
        # Each copy of the batch has a result of its own, of pools and sinks too, shared by all copies or not.
        folded, size = fold(axes, operands, dims, frozenset(result_axes) - {Axis.ROWS}, page_axis)
        return unfold(result_axes, primitive.bind(*folded, **parameters), size, page_axis)

    return batch


# ---- differentiation -------------------------------------------------------------------------------------------------


def _has_tangent(tangent: Any) -> bool:
    return not isinstance(tangent, ad.Zero) and tangent.dtype != jax.dtypes.float0


def _reject_fp8(name: str, pages: Any) -> None:
    if pages.dtype != jnp.int8 and jnp.finfo(pages.dtype).bits == 8:
        raise TypeError(
            f"{name}: {pages.dtype} pages cannot be differentiated, expected float32, bfloat16 or float16; "
            "use jax.lax.stop_gradient on them"
        )


def _instantiated(tangent: Any) -> Any:
    return _zeros_of(tangent.aval) if isinstance(tangent, ad.Zero) else tangent


@functools.partial(_modes.compiled, static_argnums=0)
def _zeros_of(aval: ShapedArray) -> Any:
    return ad.instantiate_zeros(ad.Zero(aval))


def _zero_tangents(results: Sequence[Array]) -> list[Any]:
    return [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]


def _attention_jvp(
    primals: Sequence[Array],
    tangents: Sequence[Any],
    *,
    implementation: str | None,
    batch_invariant: bool,
    cumulative: bool,
    **static: Any,
) -> tuple[Any, Any]:
    # Derivatives are plain JAX, whichever engine runs.
    engine = {"implementation": implementation, "batch_invariant": batch_invariant}
    results = attention_p.bind(*primals, **engine, cumulative=cumulative, **static)
    dots = [tangents[i] for i in _DIFFERENTIABLE]  # scales are constants
    wrt = tuple(_has_tangent(dot) for dot in dots)
    for index, name in enumerate(LAYOUTS[static["layout"]].pools, start=1):
        if wrt[index]:
            _reject_fp8(name, primals[index])
    if not any(wrt):
        return results, _zero_tangents(results)
    present = [dot for dot, w in zip(dots, wrt, strict=True) if w]
    ranged = _rows.with_ranges(primals) if cumulative else primals
    return results, tangent_p.bind(*present, *ranged, *results, wrt=wrt, **static)


def _tangent_transpose(bars: Sequence[Any], *operands: Any, wrt: tuple[bool, ...], **parameters: Any) -> list[Any]:
    residuals = operands[sum(wrt) :]
    grads = cotangent_p.bind(*map(_instantiated, bars), *residuals, wrt=wrt, **parameters)
    return [*grads, *[None] * len(residuals)]


def _write_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, layout: str, **parameters: Any) -> tuple[Any, Any]:
    results = write_p.bind(*primals, layout=layout, **parameters)
    num_pools = LAYOUTS[layout].num_pools
    linear = num_pools + 2  # pools and tokens
    for name, tangent in zip((*LAYOUTS[layout].pools[:num_pools], "k", "v"), tangents[:linear], strict=True):
        if _has_tangent(tangent):
            _reject_fp8(name, primals[0])
    if primals[0].dtype == jnp.int8 or not any(map(_has_tangent, tangents[:linear])):
        return results, _zero_tangents(results)
    # The write is linear in pools and tokens: its tangent is the same write of the tangents.
    dots = map(_instantiated, tangents[:linear])
    return results, write_p.bind(*dots, *primals[linear:], layout=layout, **parameters)


def _write_transpose(bars: Sequence[Any], *operands: Any, layout: str, **parameters: Any) -> list[Any]:
    pool_bars = list(map(_instantiated, bars))
    *_, k, v, slots, k_scale, v_scale = operands
    k, v = (x.aval if ad.is_undefined_primal(x) else x for x in (k, v))
    others = (slots, k_scale, v_scale)
    # An overwritten value has no influence, so its slot of the pools' cotangent becomes zero.
    nothing = [_modes.zeros(x.shape, x.dtype) for x in (k, v)]
    kept = write_p.bind(*pool_bars, *_vary_like(pool_bars[0], nothing), *others, layout=layout, **parameters)
    tokens = [
        _shard_like(_reference.read_tokens(bar, slots, scale, which, head_dim_of(x), layout).astype(x.dtype), x)
        for which, (bar, scale, x) in enumerate(
            zip((pool_bars[0], pool_bars[-1]), (k_scale, v_scale), (k, v), strict=True)
        )
    ]
    grads = [*kept, *tokens]
    undefined = [ad.is_undefined_primal(x) for x in operands[: len(grads)]]
    return [g if u else None for g, u in zip(grads, undefined, strict=True)] + [None] * 3


def _shard_like(x: Array, like: Any) -> Array:
    """Reshards an array whose type differs from that of `like` (an array or its type): on explicit mesh axes."""
    sharding = like.sharding if isinstance(like, ShapedArray) else jax.typeof(like).sharding
    return x if sharding.mesh.empty or jax.typeof(x).sharding == sharding else jax.sharding.reshard(x, sharding)


def _vary_like(like: Array, arrays: Sequence[Array]) -> tuple[Array, ...]:
    return _vary_alike((like, *arrays))[1:]


# ---- registration ----------------------------------------------------------------------------------------------------


def _second_order(impl: Callable[..., Sequence[Array]]) -> Callable[..., Any]:
    """Derivatives of derivatives go through the plain JAX code; forward over reverse, since its loops are dynamic."""
    # Compiled for calls outside of `jit`. Inlined in others: XLA of JAX 0.11.2 crashes at a call of such loops in a
    # `shard_map`.
    impl = jax.jit(impl, static_argnames=("wrt", *_STATIC), inline=True)

    def jvp(primals: Sequence[Array], tangents: Sequence[Any], **parameters: Any) -> tuple[Any, Any]:
        held = [i for i, t in enumerate(tangents) if _has_tangent(t)]
        del parameters["partitioned"]  # plain JAX code is XLA's to partition

        def of_held(*xs: Array) -> Sequence[Array]:
            operands = list(primals)
            for i, x in zip(held, xs, strict=True):
                operands[i] = x
            return impl(*operands, **parameters)

        return jax.jvp(of_held, [primals[i] for i in held], [tangents[i] for i in held])

    return jvp


for _primitive, _abstract, _axes_of in (
    (attention_p, _attention_abstract, _attention_axes),
    (tangent_p, _tangent_abstract, _tangent_axes),
    (cotangent_p, _cotangent_abstract, _cotangent_axes),
    (write_p, _write_abstract, _write_axes),
):
    _primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
    _primitive.def_abstract_eval(_abstract)
    batching.primitive_batchers[_primitive] = _batcher(_primitive, _axes_of)

mlir.register_lowering(attention_p, _attention_lowering(None))
mlir.register_lowering(tangent_p, _lowering(_tangent_impl, _tangent_axes))
mlir.register_lowering(cotangent_p, _lowering(_cotangent_impl, _cotangent_axes))
mlir.register_lowering(write_p, _lowering(_reference.write, _write_axes))
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(attention_p, _attention_lowering(_platform), platform=_platform)
    if _ffi.has(_platform):
        mlir.register_lowering(write_p, _lowering(_ffi.write, _write_axes), platform=_platform)

attention_p.def_impl(
    _modes.allowing_rows_without_keys(functools.partial(xla.apply_primitive, attention_p), "paged_attention")
)

ad.primitive_jvps[attention_p] = _attention_jvp
ad.primitive_jvps[tangent_p] = _second_order(_tangent_impl)
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_jvps[cotangent_p] = _second_order(_cotangent_impl)
ad.primitive_jvps[write_p] = _write_jvp
ad.primitive_transposes[write_p] = _write_transpose
