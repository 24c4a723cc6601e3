"""`debug`: each wrong value is named, in every mode; right ones pass; without it programs stay as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_paged_attn as jpa
from jax_paged_attn import _debug, _donation, _engines, _warnings, compat

Arguments = dict[str, Any]

# Three sequences, of 5, 3 and 7 tokens in pages of 4; what no call may read is garbage.
RAGGED = {
    "kv_lens": [5, 3, 7, 99],
    "block_tables": [[0, 1, -7], [2, 99, -1], [3, 4, 8], [-5, 77, 0]],
    "cu_q_lens": [0, 1, 4, 6, -3],
    "num_seqs": 3,
}
DECODE = {"lengths": [5, 3, 7, 0], "block_tables": [[0, 1, -7], [2, 99, -1], [3, 4, 8], [-5, 77, 0]]}


def arrays(integers: dict[str, Any], rows: int) -> Arguments:
    random = np.random.default_rng(0)
    pages = random.normal(size=(8, 4, 2, 16)).astype(np.float32)
    pages[7] = np.nan
    pages[1, 1:] = np.inf
    q = random.normal(size=(rows, 4, 16)).astype(np.float32)
    q[6:] = np.nan
    integers = {name: np.array(x, np.int32) for name, x in integers.items()}
    return {"q": q, "k_pages": pages, "v_pages": 2 * pages, **integers}


def ragged(**changes: Any) -> Arguments:
    return changed(arrays(RAGGED, rows=8), changes)


def decode(**changes: Any) -> Arguments:
    return changed(arrays(DECODE, rows=4), changes)


def changed(arguments: Arguments, changes: dict[str, Any]) -> Arguments:
    """With other arrays, or, of `{index: value}`, with other elements."""
    for name, change in changes.items():
        if isinstance(change, dict):
            arguments[name] = arguments[name].copy()
            for index, value in change.items():
                arguments[name][index] = value
        else:
            arguments[name] = change
    return arguments


def complaint(call: Callable[[], Any]) -> str:
    """The text that the checks print of a call; empty if they find nothing."""
    try:
        jax.block_until_ready(call())
        jax.effects_barrier()
    except ValueError as error:
        return str(error)
    except jax.errors.JaxRuntimeError as error:
        return next(re.finditer(r"^ValueError: (.*)$", str(error), re.MULTILINE)).group(1)
    return ""


@jax.jit
def jitted_ragged(arguments: Arguments) -> Any:
    return jpa.ragged_paged_attention(**arguments)


@jax.jit
def jitted_decode(arguments: Arguments) -> Any:
    return jpa.paged_attention(**arguments)


RAGGED_FAULTS = [
    ({"num_seqs": np.int32(5)}, r"num_seqs: expected a number in \[0, 4\], got 5"),
    ({"num_seqs": np.int32(-1)}, r"num_seqs: expected a number in \[0, 4\], got -1"),
    ({"cu_q_lens": {0: 1}}, "cu_q_lens: expected 0, .* got 1"),
    ({"cu_q_lens": np.array([1, 4, 6, 6, 6], np.int32)}, "cu_q_lens: expected 0, .* got 1"),
    ({"cu_q_lens": {2: 0}}, "cu_q_lens: expected at least the 1 at index 1, got 0 at index 2"),
    ({"cu_q_lens": {3: 9}}, "cu_q_lens: expected at most the 8 rows of q, got 9 at index 3"),
    ({"kv_lens": {1: 13}}, r"kv_lens: expected 0 to 12 tokens \(3 pages of 4\), got 13 in row 1"),
    ({"kv_lens": {2: -1}}, "kv_lens: expected 0 to 12 .* got -1 in row 2"),
    ({"kv_lens": {1: 2}}, "kv_lens: expected at least the 3 tokens of its query rows, got 2 in row 1"),
    ({"block_tables": {(0, 1): 8}}, r"block_tables: expected pages in \[0, 8\), got 8 at \[0, 1\]"),
    ({"block_tables": {(2, 0): -1}}, r"block_tables: expected pages in \[0, 8\), got -1 at \[2, 0\]"),
    ({"block_tables": {(2, 1): 1}}, r"block_tables: .* got page 1 in row 2 at \[2, 1\] and in row 0"),
    ({"k_pages": {(3, 2, 1, 5): np.nan}}, "k_pages: expected finite keys, .* page 3, token 2 of it, .* 2 in row 2"),
    ({"v_pages": {(1, 0, 0, 0): np.inf}}, "v_pages: expected finite values, .* page 1, token 0 of it, .* 4 in row 0"),
    ({"kv_lens": {0: 6}}, "k_pages: expected finite keys, .* page 1, token 1 of it, .* 5 in row 0"),
    ({"q": {(5, 0, 0): np.nan}}, "q: expected finite queries, .* in row 5"),
    ({"k_scale": jnp.float32(0)}, "k_scale: expected positive, finite scales, got 0.0"),
    ({"v_scale": jnp.array([1, np.inf], np.float32)}, "v_scale: expected positive, finite scales, got inf"),
    ({"sinks": jnp.array([0, 0, np.nan, 0], np.float32)}, "sinks: expected numbers or -inf, got nan of head 2"),
]


@pytest.mark.parametrize(("changes", "message"), RAGGED_FAULTS, ids=lambda x: x[:40] if isinstance(x, str) else "")
def test_wrong_values_of_ragged_attention_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = ragged(**changes)
    with jpa.debug():
        assert re.match(message, complaint(lambda: jpa.ragged_paged_attention(**arguments)))
        assert re.match(message, complaint(lambda: jpa.ragged_paged_attention_reference(**arguments)))
        assert re.match(message, complaint(lambda: jitted_ragged(arguments)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": {0: 13}}, "lengths: expected 0 to 12 .* got 13 in row 0"),
        ({"lengths": {3: 1}}, r"block_tables: expected pages in \[0, 8\), got -5 at \[3, 0\]"),
        ({"block_tables": {(0, 1): 2}}, r"block_tables: .* got page 2 in row 1 at \[1, 0\] and in row 0"),
        ({"q": {(2, 0, 0): np.inf}}, "q: expected finite queries, .* in row 2"),
    ],
    ids=["length", "page", "shared page", "query"],
)
def test_wrong_values_of_decode_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = decode(**changes)
    with jpa.debug():
        assert re.match(message, complaint(lambda: jpa.paged_attention(**arguments)))
        assert re.match(message, complaint(lambda: jitted_decode(arguments)))


def test_other_layouts_are_checked_where_they_stand() -> None:
    r = ragged(k_pages={(3, 2, 1, 5): np.nan})
    tpu = {"q": r["q"], "kv_pages": np.stack([r["k_pages"], r["v_pages"]], axis=3).reshape(8, 4, 4, 16)}
    tpu |= {"page_indices": r["block_tables"], **{name: r[name] for name in ("kv_lens", "cu_q_lens", "num_seqs")}}
    d = decode(v_pages={(3, 2, 1, 5): np.nan})
    gpu = d | {name: np.moveaxis(d[name], 2, 0) for name in ("k_pages", "v_pages")}
    with jpa.debug():
        said = complaint(lambda: compat.ragged_paged_attention(**tpu))
        assert re.match("kv_pages: expected finite keys, .* page 3, token 2", said)
        said = complaint(lambda: compat.paged_attention(**gpu))
        assert re.match("v_pages: expected finite values, .* page 3, token 2", said)
        tpu["page_indices"][0, 0] = 8
        assert complaint(lambda: compat.ragged_paged_attention(**tpu)).startswith("page_indices: expected pages in")


def write(pages: Any, slots: Any, k: Any = None, **scales: Any) -> Any:
    k = np.ones((4, 2, 16), np.float32) if k is None else k
    return jpa.write_kv_pages(pages, pages, k, 2 * k, slots, **scales)


@pytest.mark.parametrize("mode", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_wrong_values_of_the_cache_are_named(mode: Callable[..., Any]) -> None:
    pages = np.zeros((8, 4, 2, 16), np.float32)
    not_finite = np.ones((4, 2, 16), np.float32)
    not_finite[1:3, 1, 3] = np.nan
    with jpa.debug():
        for slots, message in [
            ([5, -1, 31, 5], "slot_mapping: expected slots of their own, got 5 in rows 0 and 3"),
            ([5, -1, 32, 6], r"slot_mapping: expected slots in \[0, 32\), or -1 for none, got 32 in row 2"),
            ([5, -2, 31, 6], "slot_mapping: .* got -2 in row 1"),
            ([-1, -1, 31, -1], ""),
        ]:
            said = complaint(lambda slots=slots: mode(write)(pages, np.array(slots, np.int32)))
            assert re.match(message or "$", said)
        said = complaint(lambda: mode(write)(pages, np.array([0, -1, 9, 2], np.int32), not_finite))
        assert said == "k: expected finite numbers, got NaN or infinity in row 2, of slot 9"
        said = complaint(lambda: mode(write)(pages, np.arange(4, dtype=np.int32), k_scale=jnp.float32(-1)))
        assert said.startswith("k_scale: expected positive")
        for src, dst, message in [
            ([0, 1, 2], [3, -1, 3], "dst: expected pages of their own, got 3 in rows 0 and 2"),
            ([0, 1, 2], [3, 4, 8], r"dst: expected pages in \[0, 8\)"),
            ([0, 9, 2], [3, 4, 5], r"src: expected pages in \[0, 8\), or -1 for none, got 9 in row 1"),
            ([0, -1, 2], [3, 3, -1], ""),
        ]:
            ids = (np.array(src, np.int32), np.array(dst, np.int32))
            said = complaint(lambda ids=ids: mode(jpa.copy_kv_pages)(pages, pages, *ids))
            assert re.match(message or "$", said)


def test_a_stacked_cache_hides_nothing() -> None:
    """The offset of a layer would make a wrong slot, page or layer look like padding."""
    cache = jpa.PagedKVCache.create(2, 8, 4, 2, 16, jnp.float32, stacked=True)
    ones = jnp.ones((2, 2, 16))
    step = jax.jit(lambda index, slots: cache.write(index, ones, ones, slots))
    copy = jax.jit(cache.copy)
    ids = lambda *x: np.array(x, np.int32)  # noqa: E731
    with jpa.debug():
        assert complaint(lambda: step(1, ids(3, -1))) == ""
        assert complaint(lambda: step(1, ids(3, 32))).startswith("slot_mapping: expected slots in [0, 32)")
        assert complaint(lambda: step(2, ids(-1, -1))) == "index: expected a layer in [0, 2), got 2"
        assert complaint(lambda: copy(ids(0, 8), ids(1, 2))).startswith("src: expected pages in [0, 8)")


# ---- Every mode ------------------------------------------------------------------------------------------------------


def of_q(arguments: Arguments) -> Callable[[Any], Any]:
    return lambda q: jpa.ragged_paged_attention(**{**arguments, "q": q})[: int(RAGGED["cu_q_lens"][3])].sum()


def mapped(arguments: Arguments) -> Any:
    """The second of three copies is as given, the others are right."""
    names = ["block_tables", "kv_lens"]
    copies = [jnp.stack([ragged()[name], arguments[name], ragged()[name]]) for name in names]
    rest = {name: x for name, x in arguments.items() if name not in names}
    attend: Any = jpa.ragged_paged_attention
    return jax.vmap(lambda *x: attend(**rest, **dict(zip(names, x, strict=True))))(*copies)


def scanned(arguments: Arguments) -> Any:
    tables = jnp.stack([ragged()["block_tables"], arguments["block_tables"]])

    def layer(q: Any, tables: Any) -> Any:
        changes: Arguments = {"q": q, "block_tables": tables}
        return q + jpa.ragged_paged_attention(**arguments | changes), None

    return jax.lax.scan(layer, arguments["q"], tables)


def in_shard_map(arguments: Arguments) -> Any:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    specs = ({name: P(None, None, "x") if name.endswith("pages") else P() for name in arguments},)
    attend = lambda arguments: jpa.ragged_paged_attention(**arguments)  # noqa: E731
    return jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=P(None, "x")))(arguments)


def donated(arguments: Arguments) -> Any:
    slots = jnp.array([4, 8, 9, 10, 17, 18, -1, -1], jnp.int32)

    def step(k_pages: Any, v_pages: Any) -> Any:
        token = jnp.ones((8, 2, 16))
        k_pages, v_pages = jpa.write_kv_pages(k_pages, v_pages, token, token, slots)
        return jpa.ragged_paged_attention(**{**arguments, "k_pages": k_pages, "v_pages": v_pages}), k_pages, v_pages

    pools = (jnp.array(arguments["k_pages"]), jnp.array(arguments["v_pages"]))
    results = jax.jit(step, donate_argnums=(0, 1))(*pools)
    assert all(pool.is_deleted() for pool in pools)
    return results


MODES: dict[str, Callable[[Arguments], Any]] = {
    "grad": lambda x: jax.grad(of_q(x))(x["q"]),
    "jit of checkpoint": lambda x: jax.jit(jax.grad(jax.checkpoint(of_q(x))))(x["q"]),
    "jvp": lambda x: jax.jit(lambda q: jax.jvp(of_q(x), (q,), (q,)))(x["q"]),
    "vmap": mapped,
    "jit of vmap": lambda x: jax.jit(mapped)(x),
    "scan": scanned,
    "shard_map": in_shard_map,
    "donated": donated,
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_checks(mode: str) -> None:
    wrong = ragged(block_tables={(0, 1): 8})
    with jpa.debug():
        assert complaint(lambda: MODES[mode](ragged())) == ""
        assert complaint(lambda: MODES[mode](wrong)).startswith("block_tables: expected pages in [0, 8), got 8")


def test_context_parallel_has_pages_of_other_devices() -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))

    def call(names: list[str], arguments: Arguments, **keywords: Any) -> Any:
        def part(*operands: Any) -> Any:
            rest = dict(zip(names, operands[5:], strict=True))
            return jpa.context_parallel_attention(*operands[:5], axis_name="x", **rest, **keywords)

        lengths = "kv_lens" if "kv_lens" in arguments else "lengths"
        operands = [arguments[name] for name in ("q", "k_pages", "v_pages", "block_tables", lengths, *names)]
        specs = (P(), P("x"), P("x"), P("x"), *[P()] * (1 + len(names)))
        return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P()))(*operands)

    rows = ["cu_q_lens", "num_seqs"]
    for names, right, keywords in ((rows, ragged, {"sliding_window": 9}), ([], decode, {})):
        lengths = "kv_lens" if names else "lengths"
        with jpa.debug():
            assert complaint(lambda: call(names, right(block_tables={(0, 0): -1}), **keywords)) == ""  # noqa: B023
            said = complaint(lambda: call(names, right(**{lengths: {1: 13}}), **keywords))  # noqa: B023
            assert re.fullmatch(f"{lengths}: expected .*, got 13 in row 1", said)
            said = complaint(lambda: call(names, right(v_pages={(4, 2, 0, 0): np.nan}), **keywords))  # noqa: B023
            assert said.startswith("v_pages: expected finite values")


def test_right_calls_pass() -> None:
    """Padding, garbage that nothing reads, shared prefixes, windows, and more rows than keys without a mask."""
    same_prefix = np.tile(np.array([2, -1, -1], np.int32), (4, 1))
    calls = [
        lambda: jpa.paged_attention(**decode()),
        lambda: jpa.ragged_paged_attention(**ragged()),
        # Pages in front of the window are given back.
        lambda: jpa.paged_attention(**decode(block_tables={(2, 0): -1}), sliding_window=3),
        lambda: jpa.ragged_paged_attention(**ragged(kv_lens={1: 1}), causal=False),
        # A prefix in the pages of several sequences, and one that all attend to.
        lambda: jpa.paged_attention(**decode(lengths=np.array([5, 6, 0, 0], np.int32), block_tables={1: [0, 3, 99]})),
        lambda: jpa.paged_attention(**decode(lengths=np.full(4, 4, np.int32), block_tables=same_prefix)),
        lambda: jpa.paged_attention(**decode(), k_scale=jnp.array([0.5, 2]), sinks=jnp.full(4, -jnp.inf)),
        # No sequence, no rows.
        lambda: jpa.ragged_paged_attention(**ragged(num_seqs=np.int32(0))),
    ]
    for dtype in ("int8", "float8_e4m3fn"):
        pages = np.zeros((8, 4, 2, 16), jnp.dtype(dtype))
        calls.append(
            lambda pages=pages: jpa.paged_attention(**decode(k_pages=pages, v_pages=pages), k_scale=1.0, v_scale=1.0)
        )
    with jpa.debug():
        for call in calls:
            assert complaint(call) == ""


# ---- What stays as it is ---------------------------------------------------------------------------------------------


def step_of(arguments: Arguments) -> Any:
    """All that is checked, in a scan."""

    def layer(pools: Any, _: Any) -> Any:
        token = jnp.ones((4, 2, 16))
        k_pages, v_pages = jpa.write_kv_pages(pools[0], pools[1], token, token, jnp.arange(4, dtype=jnp.int32))
        k_pages, v_pages = jpa.copy_kv_pages(k_pages, v_pages, arguments["lengths"], arguments["lengths"])
        changes: Arguments = {"k_pages": k_pages, "v_pages": v_pages}
        return (k_pages, v_pages), jpa.paged_attention(**arguments | changes)

    return jax.lax.scan(layer, (arguments["k_pages"], arguments["v_pages"]), length=2)


def test_without_debug_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    step, arguments = jax.jit(step_of), decode()
    before = step.lower(arguments).as_text()
    with jpa.debug():
        assert "callback" in step.lower(arguments).as_text()
    assert step.lower(arguments).as_text() == before
    jax.clear_caches()
    assert step.lower(arguments).as_text() == before
    for name in ("check_attention", "check_write", "check_copy"):
        monkeypatch.setattr(_debug, name, lambda *_, **__: None)
    jax.clear_caches()
    assert step.lower(arguments).as_text() == before


def test_a_program_has_checks_inside_only() -> None:
    """A jitted function called before, inside, between and after, in jits and scans that are traced once."""
    inner = jax.jit(lambda arguments: jpa.paged_attention(**arguments))
    outer = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c, inner(x)), 0, length=1))
    wrong = decode(lengths={0: 13})
    for function in (inner, outer):
        for _ in range(2):
            assert complaint(lambda: function(wrong)) == ""  # noqa: B023
            with jpa.debug():
                assert complaint(lambda: function(wrong)).startswith("lengths:")  # noqa: B023

    @jpa.debug()
    def decorated() -> Any:
        return inner(wrong)

    for _ in range(2):
        assert complaint(decorated).startswith("lengths:")
        assert complaint(lambda: inner(wrong)) == ""


def test_the_context_is_that_of_its_thread() -> None:
    wrong, said = decode(lengths={0: 13}), []
    call = jax.jit(lambda arguments: jpa.paged_attention(**arguments))
    with jpa.debug():
        other = threading.Thread(target=lambda: said.append(complaint(lambda: call(wrong))))
        other.start()
        other.join()
        assert complaint(lambda: call(wrong)).startswith("lengths:")
    assert said == [""]


def test_the_environment_asks_for_checks_everywhere() -> None:
    code = """
import numpy as np, jax_paged_attn as jpa
ids = np.zeros(2, np.int32)
pages = np.zeros((3, 4, 1, 8), np.float32)
jpa.copy_kv_pages(pages, pages, ids, ids)
"""
    environment = {**os.environ, "JPA_DEBUG": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "ValueError: dst: expected pages of their own, got 0 in rows 0 and 1"


# ---- Warnings of what is slow ----------------------------------------------------------------------------------------


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_warnings, "_told", set())


def lower_for_cuda(dtype: Any, **keywords: Any) -> None:
    pages = jax.ShapeDtypeStruct((8, 4, 2, 64), dtype)
    operands = (jax.ShapeDtypeStruct((3, 4, 64), dtype), pages, pages, *(jnp.zeros(s, jnp.int32) for s in ((3, 2), 3)))
    attend = jax.jit(lambda *operands: jpa.paged_attention(*operands, **keywords))
    attend.trace(*operands).lower(lowering_platforms=("cuda",))


@pytest.mark.usefixtures("untold")
def test_plain_jax_on_cuda_is_told_once_per_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(engine: Any, platform: str, call: Any = None) -> str | None:
        del call
        return "no module" if engine.platform == "cuda" else "runs on cpu" if engine.platform else None

    monkeypatch.setattr(_engines.Engine, "missing", missing)
    lower_for_cuda(jnp.float32, implementation="reference")  # who asks for it knows
    jpa.explain(lambda arguments: jpa.paged_attention(**arguments), decode(), platform="cuda")
    with pytest.warns(jpa.PagedAttentionWarning, match=r"plain JAX.*\(fused: no module; cublaslt: no module\)"):
        lower_for_cuda(jnp.float32)
    lower_for_cuda(jnp.bfloat16)
    monkeypatch.setattr(_engines.Engine, "missing", lambda engine, *_: engine.platform and "another reason")
    with pytest.warns(jpa.PagedAttentionWarning, match="fused: another reason"):
        lower_for_cuda(jnp.float32)


@pytest.mark.usefixtures("untold")
def test_a_large_pool_written_outside_of_jit_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, slots = np.zeros((8, 4, 2, 16), np.float32), np.arange(4, dtype=np.int32)
    write(pages, slots)
    monkeypatch.setattr(_donation, "_LARGE", pages.nbytes)
    jax.jit(write)(pages, slots)
    with pytest.warns(
        jpa.PagedAttentionWarning, match="^write_kv_pages: outside of jax.jit it copies its pools"
    ) as told:
        write(pages, slots)
    assert [warning.filename for warning in told] == [__file__]
    write(pages, slots)
    with pytest.warns(jpa.PagedAttentionWarning, match="^copy_kv_pages: outside"):
        jpa.copy_kv_pages(pages, pages, slots, slots)


def test_a_compiled_step_tells_whether_it_copies() -> None:
    cache = jpa.PagedKVCache.create(2, 8, 4, 2, 16, jnp.float32)
    ones, slots = jnp.ones((4, 2, 16)), jnp.arange(4, dtype=jnp.int32)

    def step(cache: jpa.PagedKVCache) -> Any:
        return cache.write(0, ones, ones, slots).write(1, ones, ones, slots)

    def reads_old_pages(cache: jpa.PagedKVCache) -> Any:
        new, seen = step(cache), []
        for pools in (new, cache):
            changes: Arguments = {"k_pages": pools.k_pages[0], "v_pages": pools.v_pages[0]}
            seen.append(jpa.paged_attention(**decode() | changes))
        return new, seen

    def compiled(step: Any, **options: Any) -> Any:
        return jax.jit(step, **options).lower(cache).compile()

    jpa.check_in_place(compiled(step, donate_argnums=0), cache)
    half = lambda cache: jax.tree.map(lambda x: x.astype(jnp.bfloat16), step(cache))  # noqa: E731
    for wrong in (compiled(step), compiled(half, donate_argnums=0)):
        with pytest.warns(jpa.PagedAttentionWarning, match="expected results to reuse 16384 bytes of pools, got 0"):
            jpa.check_in_place(wrong, jax.eval_shape(lambda: cache))
    with pytest.warns(jpa.PagedAttentionWarning, match=r"got [1-9] of f32\[8,4,2,16\]: .* old pages are used"):
        jpa.check_in_place(compiled(reads_old_pages, donate_argnums=0), cache)
    with pytest.raises(ValueError, match="cache: expected arrays of four or five axes"):
        jpa.check_in_place(compiled(step), slots)
