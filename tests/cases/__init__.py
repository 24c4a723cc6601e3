"""The calls of attention that the tests run, as data: one file per family, each case with the reason why it is there.

`BY_NAME["mixed_sinks"].why` is the reason of one; `build(case)` makes its operands. A family is a file:

- `edges`: values at and beyond the edge of their meaning.
- `keywords`: masks, caps, sinks and scales, alone and together.
- `dtypes`: every query dtype with every page dtype.
- `shapes`: groups, head dims and page sizes.
- `long`: enough keys for KV splits.
- `large_groups`: many packed rows of few query rows.
- `many_row_blocks`: many sequences of few keys.
- `tiles`: shapes that matter to engines which work by key tiles and row tiles.
- `layouts`: the pools of JAX's own kernels.
- `beside`: decode rows and a chunk on one multiprocessor.
- `value_dims`: values of another head dim than keys, or in the keys.

A new shape costs a compilation, which takes longer than the computation. So cases that differ in values only share
their shapes and keywords.
"""

from cases import (
    beside,
    dtypes,
    edges,
    keywords,
    large_groups,
    layouts,
    long,
    many_row_blocks,
    shapes,
    tiles,
    value_dims,
)
from cases.bases import DECODE, MIXED, PROMPT
from cases.case import Array, Case
from cases.inputs import DTYPES, INT32_MAX, INT32_MIN, LSE_BOUND, OUT_BOUND, Inputs, build, poison, random_values

__all__ = [
    "BY_NAME",
    "CASES",
    "DECODE",
    "DTYPES",
    "FAMILIES",
    "INT32_MAX",
    "INT32_MIN",
    "LSE_BOUND",
    "MIXED",
    "OUT_BOUND",
    "PROMPT",
    "Array",
    "Case",
    "Inputs",
    "build",
    "poison",
    "random_values",
]

_MODULES = (edges, keywords, dtypes, shapes, long, large_groups, many_row_blocks, tiles, beside, layouts, value_dims)
FAMILIES: dict[str, tuple[Case, ...]] = {
    module.__name__.rpartition(".")[2]: tuple(module.cases()) for module in _MODULES
}
CASES: tuple[Case, ...] = tuple(case for family in FAMILIES.values() for case in family)
BY_NAME: dict[str, Case] = {case.name: case for case in CASES}
if len(BY_NAME) != len(CASES):
    raise ValueError("two cases share a name")
