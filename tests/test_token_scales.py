"""One scale per token and head: written beside 8-bit pages, in place, and read through every transformation.

The conformance suite has the cases of attention (`cases/layouts.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import BY_NAME, DTYPES, Array, build
from harness import assert_same_bits

import jax_paged_attn as jpa
from jax_paged_attn import _ffi, compat

P, S, K, H, T = 7, 3, 2, 16, 6
SLOTS = np.array([-1, P * S, 4, P * S - 1, 0, 4], np.int32)  # skipped, skipped, ..., and token 5 wins over token 2
LARGEST = {"e4m3": 448, "e5m2": 57344, "int8": 127}


def tokens() -> tuple[Array, Array]:
    """New keys and values of very different magnitudes, one row of them zero."""
    rng = np.random.default_rng(1)
    k, v = (rng.standard_normal((2, T, K, H)) * 10.0 ** rng.integers(-4, 4, (2, T, K, 1))).astype(np.float32)
    k[3, 1] = 0
    return k, v


def pools(page_dtype: str, scale_dtype: str) -> tuple[Array, ...]:
    """Head-major pages, then scales, full of garbage."""
    rng = np.random.default_rng(2)
    pages = (rng.integers(-9, 9, (K, P, S, H)).astype(DTYPES[page_dtype]) for _ in "kv")
    return (*pages, *(np.full((K, P, S), np.nan, np.float32).astype(DTYPES[scale_dtype]) for _ in "kv"))


def write(k_pages: Any, v_pages: Any, k_scales: Any, v_scales: Any, k: Any, v: Any, **scales: Any) -> Any:
    return compat.write_head_major_kv_pages(k_pages, v_pages, k, v, SLOTS, k_scales, v_scales, **scales)


def written(pages: Array, scales: Array, values: Array, given: Array | None, page_dtype: str) -> tuple[Array, Array]:
    """What the write leaves of one pool and of its scales."""
    pages, scales = pages.copy(), scales.copy()
    for token, slot in enumerate(SLOTS):
        if 0 <= slot < P * S:
            amax = np.abs(values[token]).max(axis=-1) / np.float32(LARGEST[page_dtype])
            scale = np.where(amax > 0, amax, np.float32(1)) if given is None else given[token]
            limits = ml_dtypes.finfo(scales.dtype)
            scales[:, slot // S, slot % S] = np.clip(scale, limits.tiny, limits.max).astype(scales.dtype)
            rounded = scales[:, slot // S, slot % S].astype(np.float32)
            pages[:, slot // S, slot % S] = oracle.store(values[token], rounded, pages.dtype)
    return pages, scales


@pytest.mark.parametrize("given", [False, True], ids=["amax", "given"])
@pytest.mark.parametrize(("page_dtype", "scale_dtype"), [("int8", "f32"), ("e4m3", "bf16"), ("e5m2", "f16")])
def test_write_stores_values_and_their_scales(page_dtype: str, scale_dtype: str, given: bool) -> None:
    operands, new = pools(page_dtype, scale_dtype), tokens()
    scales = np.random.default_rng(3).random((2, T, K), np.float32) + 0.1 if given else (None, None)
    named = {"k_scale": scales[0], "v_scale": scales[1]} if given else {}
    with np.errstate(over="ignore"):  # of float16 scales
        got = jax.jit(write)(*operands, *new, **named)
        sides = [written(operands[i], operands[2 + i], new[i], scales[i], page_dtype) for i in range(2)]
    for mine, theirs in zip(got, (sides[0][0], sides[1][0], sides[0][1], sides[1][1]), strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.skipif(not (_ffi.has("cpu") or jax.default_backend() == "gpu"), reason="XLA may copy 8-bit arrays")
def test_donated_pages_and_scales_are_written_in_place() -> None:
    operands = [jax.device_put(x) + np.zeros((), x.dtype) for x in pools("int8", "f32")]
    pointers = [x.unsafe_buffer_pointer() for x in operands]
    donating = jax.jit(write, donate_argnums=(0, 1, 2, 3)).lower(*operands, *tokens()).compile()
    text = donating.as_text() or ""
    assert not any(
        f"[{K},{P},{S}{last}]{{" in line for last in ("", f",{H}") for line in text.split("\n") if " copy(" in line
    )
    got = donating(*operands, *tokens())
    assert [x.unsafe_buffer_pointer() for x in got] == pointers


def test_what_is_written_is_read_again() -> None:
    """Keys of very different magnitudes, within the rounding of 8 bits; garbage has no part in it."""
    (k, v), (k_pages, v_pages, k_scales, v_scales) = tokens(), pools("int8", "f32")
    slots = np.array([4, 3, 11, 10, 9, 5], np.int32)  # all of page 1 and of page 3
    written = compat.write_head_major_kv_pages(k_pages, v_pages, k, v, slots, k_scales, v_scales)
    q = np.random.default_rng(4).standard_normal((1, 4, H)).astype(np.float32) * 1e-4
    tables, lengths = np.array([[1, 3, -1]], np.int32), np.array([6], np.int32)
    out, lse = compat.paged_attention(q, *written[:2], tables, lengths, *written[2:], return_lse=True)
    scores = np.einsum("nh,tnh->nt", q[0], np.repeat(k, 2, axis=1).astype(np.float64))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    want = np.einsum("nt,tnh->nh", weights / weights.sum(axis=1, keepdims=True), np.repeat(v, 2, axis=1))
    np.testing.assert_allclose(out[0], want, atol=0.01 * np.abs(want).max())
    np.testing.assert_allclose(lse[0], np.log(np.exp(scores).sum(axis=1)), atol=0.01)


def attention() -> tuple[Any, Any, tuple[Array, ...]]:
    """Ragged attention with scales per token and without, and finite `(q, k_pages, v_pages, k_scales, v_scales)`."""
    case = BY_NAME["tokens_f32"]
    (q, k_pages, v_pages, tables, lengths), named = build(case).arguments()
    where = (lengths, tables, np.arange(len(lengths) + 1, dtype=np.int32))
    options = {"layout": "split", "kv_heads": k_pages.shape[2], "soft_cap": 2.0, "v_scale": np.float32(0.5)}

    def attend(q: Any, k_pages: Any, v_pages: Any, **scales: Any) -> Any:
        return harness.attend_in_layout(q, k_pages, v_pages, *where, **options, **scales)

    def scaled(q: Any, k_pages: Any, v_pages: Any, k_scales: Any, v_scales: Any) -> Any:
        return attend(q, k_pages, v_pages, k_token_scales=k_scales, v_token_scales=v_scales)

    def dequantised(q: Any, k_pages: Any, v_pages: Any, k_scales: Any, v_scales: Any) -> Any:
        live = jnp.isfinite(k_scales)[..., None]
        k_pages, v_pages = (
            jnp.where(live, x * jnp.where(live, s[..., None], 1), 0)
            for x, s in ((k_pages, k_scales), (v_pages, v_scales))
        )
        return attend(q, k_pages, v_pages)

    finite = (np.nan_to_num(x, nan=0.5, posinf=1.0, neginf=-1.0) for x in (q, k_pages, v_pages))
    return scaled, dequantised, (*finite, named["k_token_scales"], named["v_token_scales"])


def test_derivatives_are_those_of_dequantised_pages() -> None:
    scaled, dequantised, operands = attention()
    bars = harness.normal_like(jax.eval_shape(scaled, *operands), 5)
    dots = harness.normal_like(operands[:3], 6)

    def derivatives(attend: Any) -> Any:
        def of_these(*these: Any) -> Any:
            return attend(*these, *operands[3:])

        return harness.pull_back(of_these, operands[:3], bars), harness.push_forward(of_these, operands[:3], dots)

    for mine, theirs in zip(*map(jax.tree.leaves, map(derivatives, (scaled, dequantised))), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("mapped", [(0,), (1,), (3,), (1, 2, 3, 4)], ids=str)
def test_vmap_is_a_loop(mapped: tuple[int, ...]) -> None:
    scaled, _, operands = attention()
    axes = tuple(0 if i in mapped else None for i in range(5))
    stacked = [np.stack([x, 0.5 * x, 2 * x]) if i in mapped else x for i, x in enumerate(operands)]
    got = jax.jit(jax.vmap(scaled, in_axes=axes))(*stacked)
    one = jax.jit(scaled)
    for i in range(3):
        want = one(*(x[i] if axis == 0 else x for x, axis in zip(stacked, axes, strict=True)))
        for mine, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(mine[i], theirs, rtol=1e-5, atol=1e-6)


def test_export_with_a_symbolic_batch() -> None:
    _, (q, k_pages, v_pages, tables, lengths), named = harness.arguments(BY_NAME["tokens_int8"])
    scales = (named.pop("k_scales_pages"), named.pop("v_scales_pages"))
    attend = functools.partial(compat.paged_attention, attn_logits_soft_cap=2.0)
    b, p, m = jax.export.symbolic_shape("b, p, m")
    spec = jax.ShapeDtypeStruct
    pool, scale = spec((K, p, *k_pages.shape[2:]), jnp.int8), spec((K, p, k_pages.shape[2]), jnp.float32)
    ints = (spec((b, m), jnp.int32), spec((b,), jnp.int32))
    checks = [jax.export.DisabledSafetyCheck.custom_call(_ffi.ATTENTION_TOKENS_TARGET)]
    exporting = jax.export.export(jax.jit(attend), disabled_checks=checks)
    exported = exporting(spec((b, *q.shape[1:]), jnp.float32), pool, pool, *ints, scale, scale)
    operands = (q, k_pages, v_pages, tables, lengths, *scales)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(*operands), attend(*operands), rtol=1e-5, atol=1e-6)


def test_cost_and_debug_know_them() -> None:
    _, (q, k_pages, v_pages, tables, lengths), named = harness.arguments(BY_NAME["tokens_int8"])
    scales = (named["k_scales_pages"], named["v_scales_pages"])
    plain = jpa.cost_analysis(compat.paged_attention, q, k_pages, v_pages, tables, lengths).bytes_accessed
    scaled = jpa.cost_analysis(compat.paged_attention, q, k_pages, v_pages, tables, lengths, *scales).bytes_accessed
    assert scaled - plain == 2 * 4 * K * int(np.clip(lengths, 0, None).sum())

    tables, lengths = np.array([[1, 2]], np.int32), np.array([k_pages.shape[2] + 2], np.int32)
    good = np.ones(k_pages.shape[:-1], np.float32)
    bad = good.copy()
    bad[0, 2, 1] = np.nan
    call = functools.partial(compat.paged_attention, q[:1], k_pages, v_pages, tables, lengths)
    with jpa.debug():
        call(good, good)
        with pytest.raises(ValueError, match=r"^v_scales_pages: expected finite scales, .* page 2, token 1 of it"):
            call(good, bad)


PAGES, SCALES, NEW = jnp.zeros((K, P, S, H), jnp.int8), jnp.ones((K, P, S)), jnp.zeros((T, K, H))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: call_attention(SCALES[:, :1], SCALES), "k_scales_pages: expected the shape of the pages without H"),
        (lambda: call_attention(SCALES, SCALES[0]), "v_scales_pages: expected rank 3"),
        (lambda: call_attention(SCALES.astype(jnp.int8), SCALES), "k_scales_pages: expected dtype float32"),
        (lambda: write(PAGES, PAGES, SCALES, None, NEW, NEW), "v_scales_pages: expected an array"),
        (lambda: write(PAGES, PAGES, SCALES, SCALES[:1], NEW, NEW), "v_scales_pages: expected .*K = 2"),
        (lambda: write(PAGES, PAGES, SCALES, SCALES, NEW, NEW, k_scale=jnp.ones(K)), "k_scale: expected rank 2"),
        (
            lambda: write(PAGES, PAGES, SCALES, SCALES, NEW, NEW, k_scale=jnp.zeros((T, K))),
            "k_scale: expected positive",
        ),
        (lambda: compat.amax_scales(NEW, jnp.bfloat16), "dtype: expected float8_e4m3fn"),
        (lambda: compat.amax_scales(NEW[0], jnp.int8), "values: expected rank 3"),
    ],
)
def test_bad_input_raises_at_trace_time(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def call_attention(k_scales: Any, v_scales: Any) -> Any:
    tables, lengths = jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)
    return compat.paged_attention(jnp.zeros((1, 4, H)), PAGES, PAGES, tables, lengths, k_scales, v_scales)
