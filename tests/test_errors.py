"""Bad input raises at trace time, and the message names the argument, what was expected, and what came."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_paged_attn as jpa

# B = 2 sequences, T = 5 rows, N = 4, K = 2, H = 8, P = 6, S = 4, M = 3.
POOLS = {"k_pages": jnp.zeros((6, 4, 2, 8)), "v_pages": jnp.zeros((6, 4, 2, 8))}
TABLES = {"block_tables": jnp.zeros((2, 3), jnp.int32)}
DECODE = {"q": jnp.zeros((2, 4, 8)), **POOLS, **TABLES, "lengths": jnp.ones(2, jnp.int32)}
RAGGED = {
    "q": jnp.zeros((5, 4, 8)),
    **POOLS,
    **TABLES,
    "kv_lens": jnp.ones(2, jnp.int32),
    "cu_q_lens": jnp.zeros(3, jnp.int32),
}
WRITE = {
    **POOLS,
    "k": jnp.zeros((5, 2, 8)),
    "v": jnp.zeros((5, 2, 8)),
    "slot_mapping": jnp.zeros(5, jnp.int32),
}
COPY = {**POOLS, "src": jnp.zeros(2, jnp.int32), "dst": jnp.zeros(2, jnp.int32)}
MERGE = {"outs": jnp.zeros((3, 5, 4, 8)), "lses": jnp.zeros((3, 5, 4))}
FUNCTIONS: dict[Callable[..., Any], dict[str, Any]] = {
    jpa.paged_attention: DECODE,
    jpa.paged_attention_reference: DECODE,
    jpa.ragged_paged_attention: RAGGED,
    jpa.ragged_paged_attention_reference: RAGGED,
    jpa.write_kv_pages: WRITE,
    jpa.copy_kv_pages: COPY,
    jpa.merge_attention_states: MERGE,
}
ATTENTION = tuple(FUNCTIONS)[:4]
ENGINES = (jpa.paged_attention, jpa.ragged_paged_attention)
EVERY_DECODE, EVERY_RAGGED = ATTENTION[:2], ATTENTION[2:]


class Bad(NamedTuple):
    """A change to a good call that must raise; `expected` and `got` are what the message must say."""

    functions: tuple[Callable[..., Any], ...]
    changes: dict[str, Any]
    error: type[Exception]
    argument: str
    expected: str
    got: str


def _zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


def _int8(**scales: Any) -> dict[str, Any]:
    return {"k_pages": _zeros((6, 4, 2, 8), jnp.int8), "v_pages": _zeros((6, 4, 2, 8), jnp.int8), **scales}


WRITES, COPIES, MERGES = (jpa.write_kv_pages,), (jpa.copy_kv_pages,), (jpa.merge_attention_states,)
TAKE_POOLS = (*ATTENTION, *WRITES, *COPIES)
TAKE_SCALES = (*ATTENTION, *WRITES)

ARRAYS = [
    # Queries.
    Bad(ATTENTION, {"q": _zeros((5, 8))}, ValueError, "q", "rank 3", r"\(5, 8\)"),
    Bad(ATTENTION, {"q": _zeros((2, 1, 4, 8))}, ValueError, "q", "rank 3", r"\(2, 1, 4, 8\)"),
    Bad(ATTENTION, {"q": _zeros((5, 4, 8), jnp.int32)}, ValueError, "q", "float32", "int32"),
    Bad(ATTENTION, {"q": _zeros((5, 4, 8), jnp.float8_e5m2)}, ValueError, "q", "float32", "float8_e5m2"),
    Bad(ATTENTION, {"q": _zeros((2, 5, 8))}, ValueError, "q", "divisible by the 2", "5"),
    Bad(EVERY_DECODE, {"q": _zeros((3, 4, 8))}, ValueError, "block_tables", "3", r"\(2, 3\)"),
    Bad(
        ATTENTION,
        {"q": _zeros((2, 4, 0)), "k_pages": _zeros((6, 4, 2, 0)), "v_pages": _zeros((6, 4, 2, 0))},
        ValueError, "q", "head dim.*at least 1", "0",
    ),
    # Pools.
    Bad(TAKE_POOLS, {"k_pages": _zeros((6, 8, 8))}, ValueError, "k_pages", "rank 4", r"\(6, 8, 8\)"),
    Bad(TAKE_POOLS, {"v_pages": _zeros((6, 8, 8))}, ValueError, "v_pages", "rank 4", r"\(6, 8, 8\)"),
    Bad(TAKE_POOLS, {"v_pages": _zeros((7, 4, 2, 8))}, ValueError, "v_pages", "6", r"\(7, 4, 2, 8\)"),
    Bad(TAKE_POOLS, {"v_pages": _zeros((6, 5, 2, 8))}, ValueError, "v_pages", "4", r"\(6, 5, 2, 8\)"),
    Bad(TAKE_POOLS, {"v_pages": _zeros((6, 4, 1, 8))}, ValueError, "v_pages", "2", r"\(6, 4, 1, 8\)"),
    Bad(TAKE_POOLS, {"v_pages": _zeros((6, 4, 2, 8), jnp.bfloat16)}, ValueError, "v_pages", "float32", "bfloat16"),
    Bad(ATTENTION, {"k_pages": _zeros((6, 4, 2, 9))}, ValueError, "k_pages", "8", r"\(6, 4, 2, 9\)"),
    Bad(ATTENTION, {"k_pages": _zeros((6, 4, 2, 8), jnp.bfloat16)}, ValueError, "k_pages", "float32", "bfloat16"),
    Bad(ATTENTION, {"k_pages": _zeros((6, 4, 2, 8), jnp.uint8)}, ValueError, "k_pages", "int8", "uint8"),
    Bad(ATTENTION, {"k_pages": _zeros((6, 4, 2, 8), jnp.float8_e4m3b11fnuz)}, ValueError, "k_pages", "e4m3fn", "b11"),
    Bad(
        ATTENTION,
        {"k_pages": _zeros((6, 4, 0, 8)), "v_pages": _zeros((6, 4, 0, 8))},
        ValueError, "k_pages", "heads.*at least 1", "0",
    ),
    Bad(
        ATTENTION,
        {"k_pages": _zeros((6, 0, 2, 8)), "v_pages": _zeros((6, 0, 2, 8))},
        ValueError, "k_pages", "page size.*at least 1", "0",
    ),
    # Values of another head dim, or in the keys.
    Bad(ATTENTION, {"v_pages": _zeros((6, 4, 2, 0))}, ValueError, "v_pages", "head dim Hv: expected at least 1", "0"),
    Bad(ATTENTION, {"v_pages": None}, ValueError, "value_dim", "the head dim of values", "None"),
    Bad(ATTENTION, {"v_pages": None, "value_dim": 9}, ValueError, "value_dim", "at most the 8 numbers of a key", "9"),
    Bad(ATTENTION, {"v_pages": None, "value_dim": 0}, ValueError, "value_dim", ">= 1", "0"),
    Bad(ATTENTION, {"v_pages": None, "value_dim": 4.5}, TypeError, "value_dim", "integer", "4.5"),
    Bad(ATTENTION, {"value_dim": 8}, ValueError, "value_dim", "None with v_pages", "8"),
    Bad(
        ATTENTION,
        {"v_pages": None, "value_dim": 8, "v_scale": 2.0},
        ValueError, "v_scale", "None where v_pages is None, since k_scale", "one",
    ),
    Bad(
        ATTENTION,
        {"v_pages": None, "value_dim": 8, "k_pages": _zeros((6, 4, 2, 8), jnp.int8)},
        ValueError, "k_scale", "required.*int8", "None",
    ),
    Bad(WRITES, {"v_pages": None}, ValueError, "v", "None where v_pages is None", "an array"),
    Bad(WRITES, {"v": None}, ValueError, "v", "an array with v_pages", "None"),
    Bad(WRITES, {"v_pages": None, "v": None, "v_scale": 2.0}, ValueError, "v_scale", "None where v_pages", "one"),
    Bad(WRITES, {"v_pages": _zeros((6, 4, 2, 9))}, ValueError, "v", "Hv = 9", r"\(5, 2, 8\)"),
    # Tables and lengths.
    Bad(ATTENTION, {"block_tables": _zeros((6,), jnp.int32)}, ValueError, "block_tables", "rank 2", r"\(6,\)"),
    Bad(ATTENTION, {"block_tables": _zeros((2, 3))}, ValueError, "block_tables", "int32", "float32"),
    Bad(ATTENTION, {"block_tables": _zeros((2, 3), jnp.bool_)}, ValueError, "block_tables", "int32", "bool"),
    Bad(EVERY_DECODE, {"lengths": _zeros((3,), jnp.int32)}, ValueError, "lengths", "2", r"\(3,\)"),
    Bad(EVERY_DECODE, {"lengths": _zeros((2, 1), jnp.int32)}, ValueError, "lengths", "rank 1", r"\(2, 1\)"),
    Bad(EVERY_DECODE, {"lengths": _zeros((2,), jnp.float16)}, ValueError, "lengths", "int32", "float16"),
    Bad(EVERY_RAGGED, {"block_tables": _zeros((3, 3), jnp.int32)}, ValueError, "block_tables", "2", r"\(3, 3\)"),
    Bad(EVERY_RAGGED, {"kv_lens": _zeros((2,))}, ValueError, "kv_lens", "int32", "float32"),
    Bad(EVERY_RAGGED, {"kv_lens": _zeros((), jnp.int32)}, ValueError, "kv_lens", "rank 1", r"\(\)"),
    Bad(EVERY_RAGGED, {"cu_q_lens": _zeros((2,), jnp.int32)}, ValueError, "cu_q_lens", "3", r"\(2,\)"),
    Bad(EVERY_RAGGED, {"cu_q_lens": _zeros((3,))}, ValueError, "cu_q_lens", "int32", "float32"),
    Bad(EVERY_RAGGED, {"num_seqs": _zeros((2,), jnp.int32)}, ValueError, "num_seqs", "1", r"\(2,\)"),
    Bad(EVERY_RAGGED, {"num_seqs": _zeros((1, 1), jnp.int32)}, ValueError, "num_seqs", "rank 1", r"\(1, 1\)"),
    Bad(EVERY_RAGGED, {"num_seqs": _zeros((1,))}, ValueError, "num_seqs", "int32", "float32"),
    # Sinks and scales.
    Bad(ATTENTION, {"sinks": _zeros((2,))}, ValueError, "sinks", "4", r"\(2,\)"),
    Bad(ATTENTION, {"sinks": _zeros((4,), jnp.bfloat16)}, ValueError, "sinks", "float32", "bfloat16"),
    Bad(TAKE_SCALES, {"k_scale": _zeros((4,))}, ValueError, "k_scale", "2", r"\(4,\)"),
    Bad(TAKE_SCALES, {"v_scale": _zeros((1, 2))}, ValueError, "v_scale", "rank 1", r"\(1, 2\)"),
    Bad(TAKE_SCALES, {"v_scale": _zeros((2,), jnp.float16)}, ValueError, "v_scale", "float32", "float16"),
    Bad(TAKE_SCALES, _int8(v_scale=jnp.ones(())), ValueError, "k_scale", "required.*int8", "None"),
    Bad(TAKE_SCALES, _int8(k_scale=jnp.ones(())), ValueError, "v_scale", "required.*int8", "None"),
    # Writing, copying, merging.
    Bad(WRITES, {"k": _zeros((5, 16))}, ValueError, "k", "rank 3", r"\(5, 16\)"),
    Bad(WRITES, {"k": _zeros((5, 3, 8))}, ValueError, "k", "2", r"\(5, 3, 8\)"),
    Bad(WRITES, {"v": _zeros((4, 2, 8))}, ValueError, "v", "5", r"\(4, 2, 8\)"),
    Bad(WRITES, {"v": _zeros((5, 2, 7))}, ValueError, "v", "8", r"\(5, 2, 7\)"),
    Bad(WRITES, {"k": _zeros((5, 2, 8), jnp.int8)}, ValueError, "k", "float32", "int8"),
    Bad(WRITES, {"v": _zeros((5, 2, 8), jnp.bfloat16)}, ValueError, "v", "float32", "bfloat16"),
    Bad(WRITES, {"slot_mapping": _zeros((4,), jnp.int32)}, ValueError, "slot_mapping", "5", r"\(4,\)"),
    Bad(WRITES, {"slot_mapping": _zeros((5,))}, ValueError, "slot_mapping", "int32", "float32"),
    Bad(COPIES, {"dst": _zeros((3,), jnp.int32)}, ValueError, "dst", "2", r"\(3,\)"),
    Bad(COPIES, {"src": _zeros((2, 1), jnp.int32)}, ValueError, "src", "rank 1", r"\(2, 1\)"),
    Bad(COPIES, {"src": _zeros((2,))}, ValueError, "src", "int32", "float32"),
    Bad(
        MERGES,
        {"outs": _zeros((0, 5, 4, 8)), "lses": _zeros((0, 5, 4))},
        ValueError, "outs", "at least one part", "none",
    ),
    Bad(MERGES, {"lses": _zeros((3, 5, 8))}, ValueError, "lses", r"\(3, 5, 4\)", r"\(3, 5, 8\)"),
    Bad(MERGES, {"lses": _zeros((3, 5, 4), jnp.bfloat16)}, ValueError, "lses", "float32", "bfloat16"),
    Bad(MERGES, {"outs": _zeros((3, 5, 4, 8), jnp.int32)}, ValueError, "outs", "float32", "int32"),
]  # fmt: skip

KEYWORDS = [
    Bad(ATTENTION, {"scale": "0.5"}, TypeError, "scale", "number", "str"),
    Bad(ATTENTION, {"scale": True}, TypeError, "scale", "number", "bool"),
    Bad(ATTENTION, {"scale": float("nan")}, ValueError, "scale", "finite", "nan"),
    Bad(ATTENTION, {"sliding_window": 0}, ValueError, "sliding_window", "1", "0"),
    Bad(ATTENTION, {"sliding_window": -4}, ValueError, "sliding_window", "1", "-4"),
    Bad(ATTENTION, {"sliding_window": 1.5}, TypeError, "sliding_window", "integer", "1.5"),
    Bad(ATTENTION, {"sliding_window": [4]}, TypeError, "sliding_window", "number", "list"),
    Bad(ATTENTION, {"soft_cap": 0.0}, ValueError, "soft_cap", "positive", "0"),
    Bad(ATTENTION, {"soft_cap": -2.0}, ValueError, "soft_cap", "positive", "-2"),
    Bad(ATTENTION, {"soft_cap": float("inf")}, ValueError, "soft_cap", "finite", "inf"),
    Bad(EVERY_RAGGED, {"causal": 1}, TypeError, "causal", "bool", "int"),
    Bad(ATTENTION, {"return_lse": "yes"}, TypeError, "return_lse", "bool", "str"),
    Bad(ATTENTION, {"batch_invariant": 1}, TypeError, "batch_invariant", "bool", "int"),
    Bad(
        ENGINES,
        {"batch_invariant": True, "implementation": "reference"},
        ValueError, "batch_invariant", "an engine that guarantees it .*cpu or fused", "True with .*'reference'",
    ),
    Bad(ENGINES, {"batch_invariant": True, "implementation": "cublaslt"}, ValueError, "batch_invariant", "cpu", "'cub"),
    Bad(ENGINES, {"implementation": "flash"}, ValueError, "implementation", "cpu.*reference|reference.*cpu", "flash"),
    Bad(ENGINES, {"implementation": 3}, TypeError, "implementation", "name", "int"),
    Bad(ENGINES, {"implementation": "fused"}, ValueError, "implementation", "bfloat16 or float16", "float32"),
    Bad(
        EVERY_DECODE[:1],
        {
            "implementation": "fused",
            "q": _zeros((2, 4, 8), jnp.float16),
            "k_pages": _zeros((6, 4, 2, 8), jnp.float16),
            "v_pages": _zeros((6, 4, 2, 8), jnp.float16),
        },
        ValueError, "implementation", "for 'fused' expected a head dim of 64 or 80 .* or 256", "8",
    ),
    # Host numbers can be looked at; for arrays of JAX see below.
    Bad(TAKE_SCALES, {"k_scale": 0.0}, ValueError, "k_scale", "positive", "0"),
    Bad(TAKE_SCALES, {"v_scale": np.array([1, -1], np.float32)}, ValueError, "v_scale", "positive", "-1"),
    Bad(TAKE_SCALES, {"k_scale": float("inf")}, ValueError, "k_scale", "positive, finite", "inf"),
    Bad(TAKE_SCALES, {"v_scale": 1e-60}, ValueError, "v_scale", "positive", "0.0"),
    Bad(TAKE_SCALES, {"v_scale": 1e60}, ValueError, "v_scale", "finite", "inf"),
    Bad(TAKE_SCALES, {"v_scale": [0.5, float("nan")]}, ValueError, "v_scale", "finite", r"nan at \[1\]"),
    Bad(TAKE_SCALES, {"k_scale": True}, TypeError, "k_scale", "numbers", "bool"),
    Bad(TAKE_SCALES, {"k_scale": "0.5"}, TypeError, "k_scale", "array", "str"),
    Bad(ATTENTION, {"sinks": True}, TypeError, "sinks", "numbers", "bool"),
    Bad(ATTENTION, {"q": "text"}, TypeError, "q", "array", "str"),
    Bad(ATTENTION, {"block_tables": None}, TypeError, "block_tables", "array", "NoneType"),
    Bad((*WRITES,), {"slot_mapping": None}, TypeError, "slot_mapping", "array", "NoneType"),
]  # fmt: skip


# Values that int32 cannot hold, which would wrap to others, and what holds no integers.
IDS: dict[Callable[..., Any], tuple[str, ...]] = {
    **dict.fromkeys(EVERY_DECODE, ("block_tables", "lengths")),
    **dict.fromkeys(EVERY_RAGGED, ("block_tables", "kv_lens", "cu_q_lens", "num_seqs")),
    jpa.write_kv_pages: ("slot_mapping",),
    jpa.copy_kv_pages: ("src", "dst"),
}


def _ids_that_do_not_fit() -> Iterator[Bad]:
    for function, names in IDS.items():
        for name in names:
            like = FUNCTIONS[function].get(name, _zeros((1,), jnp.int32))
            ids = np.zeros(like.shape, np.int64)
            ids.flat[-1] = 2**32
            place = re.escape(str([size - 1 for size in ids.shape]))
            yield Bad((function,), {name: ids}, ValueError, name, "fit in int32", rf"4294967296 at {place}")
            yield Bad((function,), {name: (-ids).tolist()}, ValueError, name, "fit in int32", "-4294967296 at")
            yield Bad((function,), {name: ids.astype(np.float64)}, ValueError, name, "int32", "float64")
            yield Bad((function,), {name: ids > 0}, ValueError, name, "int32", "bool")
            yield Bad((function,), {name: "text"}, TypeError, name, "array", "str")


def _params(table: list[Bad]) -> list[Any]:
    """Each function with each of its bad calls, named by function, arguments and values."""
    params = []
    for bad in table:
        for function in bad.functions:
            what = "-".join(f"{name}:{_describe(value)}" for name, value in bad.changes.items())
            params.append(pytest.param(function, bad, id=f"{function.__name__}-{what}"))
    return params


def _describe(value: Any) -> str:
    if isinstance(value, jax.Array):
        return f"{value.dtype}{list(value.shape)}".replace(" ", "")
    return f"{value.dtype}-{value.flat[-1]}" if isinstance(value, np.ndarray) else str(value)


# The places where a user may make the call; all trace, none needs a value of an array.
CONTEXTS: dict[str, Callable[[Callable[..., Any], dict[str, Any]], Any]] = {
    "eager": lambda call, arrays: call(**arrays),
    "jit": lambda call, arrays: jax.jit(call)(**arrays),
    "eval_shape": lambda call, arrays: jax.eval_shape(call, **arrays),
    "vmap": lambda call, arrays: jax.vmap(lambda mapped: call(**mapped))({name: x[None] for name, x in arrays.items()}),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("function", "bad"), _params([*ARRAYS, *KEYWORDS, *_ids_that_do_not_fit()]))
def test_bad_argument_raises(function: Callable[..., Any], bad: Bad, context: str) -> None:
    arguments = {**FUNCTIONS[function], **bad.changes}
    arrays = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
    host = {name: x for name, x in arguments.items() if name not in arrays}
    message = rf"(?s)^({bad.argument})\b.*({bad.expected}).*got.*({bad.got})"
    with pytest.raises(bad.error, match=message):
        CONTEXTS[context](functools.partial(function, **host), arrays)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_calls_that_errors_are_made_of_are_good(function: Callable[..., Any], context: str) -> None:
    jax.block_until_ready(CONTEXTS[context](function, FUNCTIONS[function]))


@pytest.mark.parametrize("function", TAKE_SCALES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_scales_of_jax_arrays_are_checked_where_concrete(function: Callable[..., Any], value: float) -> None:
    scale = jnp.array([1.0, value], jnp.float32)
    for call in (function, jax.jit(lambda k_scale=scale, **arrays: function(k_scale=scale, **arrays))):
        with pytest.raises(ValueError, match=r"^k_scale: expected positive, finite scales, got \S+ at \[1\]"):
            call(**FUNCTIONS[function], k_scale=scale)
    jax.jit(function)(**FUNCTIONS[function], k_scale=scale)  # a tracer passes


def test_scales_are_read_from_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits for the device, so a loop of eager calls must not repeat it."""
    reads, device_get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: reads.append(x) or device_get(x))
    scale = jnp.full(2, 0.5)
    for _ in range(3):
        with jax.transfer_guard("disallow"):
            jpa.write_kv_pages(**WRITE, k_scale=scale, v_scale=scale)
    assert len(reads) == 1
    cache = jpa.PagedKVCache.create(3, 6, 4, 2, 8, k_scale=np.full((3, 2), 0.5, np.float32))
    for layer in (0, 1, 2, 0):
        cache = cache.write(layer, WRITE["k"], WRITE["v"], WRITE["slot_mapping"])
    assert len([x for x in reads if isinstance(x, jax.Array)]) == 1


@pytest.mark.parametrize("function", ATTENTION, ids=lambda f: f.__name__)
def test_float64_of_x64_is_as_good_as_float32(function: Callable[..., Any]) -> None:
    sinks, scale = [0.0, 1.0, 2.0, 3.0], [0.5, 2.0]
    want = function(**FUNCTIONS[function], sinks=jnp.asarray(sinks), k_scale=jnp.asarray(scale))
    with jax.enable_x64(True):
        for form in (lambda x: x, np.array, jnp.array):
            got = function(**FUNCTIONS[function], sinks=form(sinks), k_scale=form(scale))
            assert got.dtype == jnp.float32
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("function", IDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_integers_of_any_width_are_ids(function: Callable[..., Any], x64: bool) -> None:
    """Lists, and arrays of the dtypes that `np.array` and `jnp.array` choose, with and without x64."""
    good = FUNCTIONS[function]
    names = [name for name in IDS[function] if name in good]
    host = {name: np.asarray(good[name], np.int64) for name in names}
    with jax.enable_x64(x64):
        want = jax.tree.leaves(function(**good))
        forms: list[Callable[[Any], Any]] = [
            lambda x: x,
            lambda x: x.tolist(),
            lambda x: x.astype(np.uint8),
            jnp.asarray,
            lambda x: jnp.asarray(x, jnp.int16),
            lambda x: jnp.asarray(x, jnp.uint32),
        ]
        for form in forms:
            ids = {name: form(x) for name, x in host.items()}
            traced = isinstance(ids[names[0]], jax.Array)
            call = jax.jit(function) if traced else function
            for mine, theirs in zip(jax.tree.leaves(call(**{**good, **ids})), want, strict=True):
                np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_int64_ids_of_jax_arrays_are_clamped(transform: Callable[..., Any]) -> None:
    """2³² is an id outside the pool, whose low half would be page 0; as a length it means all of the table."""
    pages, q = jnp.ones((6, 4, 2, 8)), jnp.ones((2, 4, 8))
    with jax.enable_x64(True):
        tables = jnp.array([[1, 2**32], [2**32 + 3, 2]])
        attend = transform(functools.partial(jpa.paged_attention, return_lse=True))
        _, lse = attend(q, pages, pages, tables, jnp.array([2**32, -(2**40)]))
        _, want = attend(q, pages, pages, jnp.array([[1, -1], [-1, 2]], jnp.int32), jnp.array([8, 0], jnp.int32))
    np.testing.assert_array_equal(lse, want)
    assert np.isfinite(lse[0]).all()


def test_merging_empty_lists_raises() -> None:
    with pytest.raises(ValueError, match=r"^outs: expected at least one part, got none"):
        jpa.merge_attention_states([], [])


STATIC = [
    (f, name) for f in ATTENTION for name in ("scale", "sliding_window", "soft_cap", "return_lse", "batch_invariant")
]


@pytest.mark.parametrize(("function", "name"), [*STATIC, *((f, "causal") for f in EVERY_RAGGED)])
def test_static_keyword_rejects_tracer(function: Callable[..., Any], name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected a static (number|bool), got a tracer"):
        jax.jit(lambda value: function(**FUNCTIONS[function], **{name: value}))(2)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_unknown_keyword_raises(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="softcap"):
        function(**FUNCTIONS[function], softcap=1.0)
