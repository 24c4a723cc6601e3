"""Partitioning by XLA: along which axes an operation is split where arrays are sharded, and along which never.

Key/value heads are split, each with the query heads of its group, and so are the sequences of a decode call. Pages
are not split, since their ids count the whole pool. XLA reshards an operand whose sharding does not fit.

`jax.experimental.custom_partitioning` does the work in two steps. Shardy propagates shardings through the operation by
a rule that names the factors of each axis; then XLA's partitioner asks for shardings that fit together, and for the
function that each device runs on its shards.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_paged_attn._folding import POOLS, Axis
from jax_paged_attn._layouts import Layout, head_dim_of

MeshAxes = tuple[str, ...]


class Dim(enum.Enum):
    """The kinds of axes of operands and results, as far as they matter to a split."""

    ROWS = enum.auto()  # sequences, and the query rows of decode
    HEADS = enum.auto()  # query heads: the groups of the key/value heads, one after the other
    KV_HEADS = enum.auto()
    KV_PAIRS = enum.auto()  # of each key/value head a key head and a value head, one after the other
    WHOLE = enum.auto()  # never split


Dims = tuple[Dim, ...]

# The kinds of all axes of an array but a pool, by the kind of its leading axis.
_DIMS: dict[Axis, Dims] = {
    Axis.ROWS: (Dim.ROWS, Dim.HEADS, Dim.WHOLE),
    Axis.SEQUENCES: (Dim.ROWS,),
    Axis.FIRST_ROWS: (Dim.ROWS,),
    Axis.CUMULATIVE: (Dim.WHOLE,),
    Axis.TABLES: (Dim.ROWS, Dim.WHOLE),
    Axis.TOKENS: (Dim.WHOLE, Dim.KV_HEADS, Dim.WHOLE),
    Axis.SLOTS: (Dim.WHOLE,),
    Axis.SINKS: (Dim.WHOLE, Dim.HEADS),
    Axis.SCALES: (Dim.WHOLE, Dim.KV_HEADS),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """How an operation may be split.

    Attributes:
      operands, results: what the axes of each array count.
      num_kv_heads: K. Query heads are split further only between shards of one key/value head.
      group: query heads per key/value head.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    num_kv_heads: int
    group: int

    def shardy(self) -> tuple[str, dict[str, Any]]:
        """The rule in the notation of `custom_partitioning`, with its keywords."""
        # Shardy wants no factor of size 1 beside another one.
        one = self.num_kv_heads == 1
        heads = "kv_heads" if self.group == 1 else "group" if one else "(kv_heads group)"
        pairs = "pair" if one else "(kv_heads pair)"
        names = {Dim.ROWS: "rows", Dim.HEADS: heads, Dim.KV_HEADS: "kv_heads", Dim.KV_PAIRS: pairs}
        whole: list[str] = []  # in the order of the notation, as Shardy wants them

        def factor(dim: Dim) -> str:
            if dim is Dim.WHOLE:
                whole.append(f"whole{len(whole)}")
            elif dim is Dim.KV_PAIRS and "pair" not in whole:
                whole.append("pair")
            return names.get(dim, whole[-1] if whole else "")

        sides = [", ".join(" ".join(map(factor, dims)) for dims in side) for side in (self.operands, self.results)]
        sizes = {"group": self.group} if self.group > 1 and not one else {}
        if "pair" in whole and not one:
            sizes["pair"] = 2
        return " -> ".join(sides), {"need_replication_factors": tuple(whole), **sizes}


def rule(
    axes: Sequence[Axis],
    result_axes: Sequence[Axis],
    avals: Sequence[Any],
    result_avals: Sequence[Any],
    split_rows: bool,
    layout: Layout,
) -> Rule:
    """The rule of an operation whose operands and results have these axes.

    Args:
      axes, result_axes, avals, result_avals: one entry per array.
      split_rows: whether sequences may be split: row b must be the one row of sequence b.
      layout: that of pools. Heads are split unless a pool has padding heads, which no shard could have its share of,
        or more axes of heads of which the first counts neither K nor 2K.
    """
    # Sequence b has row b // (B / X) of the sinks and scales: where X > 1, a shard may not have that.
    shared = all(
        aval.shape[0] in (0, 1) for axis, aval in zip(axes, avals, strict=True) if axis in (Axis.SINKS, Axis.SCALES)
    )

    def first(*kinds: Axis) -> Any:
        return next(aval for axis, aval in zip(axes, avals, strict=True) if axis in kinds)

    # Behind pools come their scales per token, which have the same axes but the last.
    pool, rows, num_kv_heads = first(Axis.K_POOL), first(Axis.ROWS, Axis.TOKENS), first(Axis.SCALES).shape[1]
    num_heads = layout.shape_by_heads(pool, head_dim_of(rows), num_kv_heads)[layout.head_axis]
    kinds = {num_kv_heads: Dim.KV_HEADS} | ({2 * num_kv_heads: Dim.KV_PAIRS} if layout.interleaved else {})
    heads_of_pool = kinds.get(pool.shape[layout.head_axis], Dim.WHOLE)
    whole_heads = heads_of_pool is Dim.WHOLE or num_heads != num_kv_heads * len(kinds)
    whole = ({Dim.HEADS, Dim.KV_HEADS, Dim.KV_PAIRS} if whole_heads else set()) | (
        {Dim.ROWS} if not (split_rows and shared) else set()
    )

    def dims(axis: Axis, aval: Any) -> Dims:
        if axis in POOLS:
            named = tuple(heads_of_pool if i == layout.head_axis else Dim.WHOLE for i in range(aval.ndim))
        else:
            named = _DIMS[axis][: aval.ndim]
        return tuple(Dim.WHOLE if dim in whole else dim for dim in named)

    operands, results = tuple(map(dims, axes, avals)), tuple(map(dims, result_axes, result_avals))
    sizes: dict[Dim, Any] = {}
    for named, aval in zip(operands, avals, strict=True):
        sizes.update(zip(named, aval.shape, strict=True))
    num_kv_heads = sizes.get(Dim.KV_HEADS, 1)
    return Rule(operands, results, num_kv_heads, sizes.get(Dim.HEADS, num_kv_heads) // num_kv_heads)


def partitioned(run: Callable[..., Sequence[Array]], rule: Rule) -> Callable[..., tuple[Array, ...]]:
    """`run` on each device's shards, where there is more than one device; to be called by a lowering rule.

    A result that lacks an axis of the operands, such as rows, is a sum over it: where that axis is split, the results
    of the shards are added up.
    """

    def on_arrays(*operands: Array) -> tuple[Array, ...]:
        return tuple(run(*operands))

    def partition(mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
        split = _Split.choose(mesh, rule, operands, results)

        def on_shards(*shards: Array) -> tuple[Array, ...]:
            with no_mesh():
                lacking = map(split.axes_lacking, rule.results)
                return tuple(
                    jax.lax.psum(x, axes) if axes else x for x, axes in zip(run(*shards), lacking, strict=True)
                )

        shardings = [tuple(map(split.sharding, side)) for side in (rule.results, rule.operands)]
        return split.mesh, on_shards, *shardings

    def infer(mesh: Mesh, operands: Sequence[Any], _: Any) -> tuple[NamedSharding, ...]:
        return tuple(map(_Split.choose(mesh, rule, operands, ()).sharding, rule.results))

    notation, keywords = rule.shardy()
    # As a jitted function it may close over arrays, into which `ensure_compile_time_eval` turns constants, and which
    # `custom_partitioning` itself refuses.
    call = custom_partitioning(jax.jit(on_arrays))
    # JAX's decoding of shardings fails for those that split an axis of the mesh; `_mesh_axes` reads any.
    call.def_partition(partition, infer, decode_shardings=False, sharding_rule=notation, **keywords)
    return call


def no_mesh() -> Any:
    """The context in which what runs on one shard is traced."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def _call_that_needs_devices() -> ClosedJaxpr:
    identity = custom_partitioning(lambda x: x)
    identity.def_partition(None, sharding_rule="->")
    # Without an operand, an import under `ensure_compile_time_eval` would evaluate the call and leave it out.
    return jax.make_jaxpr(identity)(jax.ShapeDtypeStruct((), np.float32))


# JAX tells lowering rules the devices only if it finds `custom_partitioning` in the jaxpr, which it searches with all
# the jaxprs in parameters. A primitive whose rule makes such a call has this one as a parameter, so that it is found.
_NEEDS_DEVICES = _call_that_needs_devices()


def call_that_needs_devices() -> ClosedJaxpr | None:
    """The parameter of a primitive that XLA is to partition; None inside `shard_map`, where the user does that."""
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return None if manual else _NEEDS_DEVICES


@dataclasses.dataclass(frozen=True)
class _Split:
    """The mesh axes that each kind of axis is split over, major to minor."""

    mesh: Mesh
    rows: MeshAxes
    kv_heads: MeshAxes
    heads: MeshAxes

    @classmethod
    def choose(cls, mesh: Mesh, rule: Rule, operands: Sequence[Any], results: Sequence[Any]) -> "_Split":
        """The split that moves no pool if its heads are sharded, and as little else as possible."""
        if mesh.empty:  # no array of the program has a sharding that names one
            mesh = Mesh(np.array(list(operands[0].sharding.devices_indices_map(operands[0].shape))), "devices")
        arrays = [*zip(operands, rule.operands, strict=True), *zip(results, rule.results[: len(results)], strict=True)]

        def candidates(*kinds: Dim) -> Iterable[tuple[int, MeshAxes]]:
            for x, dims in arrays:
                for index in (i for i, dim in enumerate(dims) if dim in kinds):
                    yield x.shape[index], _mesh_axes(mesh, x.sharding, len(dims), index)

        def most(options: Iterable[MeshAxes]) -> MeshAxes:
            return max(options, key=lambda axes: _ways(mesh, axes), default=())

        num_kv_heads, group = rule.num_kv_heads, rule.group
        of_heads = [axes for _, axes in candidates(Dim.HEADS)]
        of_pools = most(_dividing(mesh, axes, num_kv_heads) for _, axes in candidates(Dim.KV_HEADS, Dim.KV_PAIRS))
        kv_heads = of_pools or most(_dividing(mesh, axes, num_kv_heads) for axes in of_heads)
        of_groups: MeshAxes = ()
        if _ways(mesh, kv_heads) == num_kv_heads:
            inner = [axes[len(kv_heads) :] for axes in of_heads if axes[: len(kv_heads)] == kv_heads]
            of_groups = most(_dividing(mesh, axes, group) for axes in inner)
        heads = kv_heads + of_groups
        rows = most(
            _dividing(mesh, tuple(axis for axis in axes if axis not in heads), size)
            for size, axes in candidates(Dim.ROWS)
        )
        return cls(mesh, rows, kv_heads, heads)

    def sharding(self, dims: Dims) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*(self._axes(dim) or None for dim in dims)))

    def axes_lacking(self, dims: Dims) -> MeshAxes:
        """The mesh axes of the split that split none of these axes."""
        present = [axis for dim in dims for axis in self._axes(dim)]
        return tuple(axis for axis in self.rows + self.heads if axis not in present)

    def _axes(self, dim: Dim) -> MeshAxes:
        of_kv_heads = {Dim.KV_HEADS: self.kv_heads, Dim.KV_PAIRS: self.kv_heads}
        return {Dim.ROWS: self.rows, Dim.HEADS: self.heads, **of_kv_heads}.get(dim, ())


def _ways(mesh: Mesh, axes: MeshAxes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _dividing(mesh: Mesh, axes: MeshAxes, size: int) -> MeshAxes:
    """The longest prefix of mesh axes that splits `size` evenly."""
    return next(axes[:n] for n in range(len(axes), -1, -1) if size % _ways(mesh, axes[:n]) == 0)


def _mesh_axes(mesh: Mesh, sharding: Any, rank: int, index: int) -> MeshAxes:
    """The mesh axes that split axis `index` of an array, major to minor; those that split it in part are left out."""
    # An array of this shape can be split over the mesh in any way, so a device's part begins at a multiple of the step.
    parts = sharding.devices_indices_map((mesh.size,) * rank)
    starts = np.array([parts[device][index].start or 0 for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    steps = {}
    for number, axis in enumerate(mesh.axis_names):
        differences = np.diff(starts, axis=number)
        if differences.size and differences.min() == differences.max() > 0:
            steps[axis] = differences.flat[0]
    return tuple(sorted(steps, key=lambda axis: -steps[axis]))
