"""Every query dtype with every page dtype; scales are absent, scalar or one per head."""

from __future__ import annotations

from typing import Any

from cases.bases import DECODE, MIXED, PROMPT
from cases.case import Case

SCALAR: dict[str, Any] = {"k_scale": 0.7, "v_scale": 1.9}
PER_HEAD: dict[str, Any] = {"k_scale": (0.5, 1.5)}


def cases() -> list[Case]:
    every = []
    for dtype in ("f32", "bf16", "f16"):
        every += [*_fp8(dtype), *_int8(dtype)]
    for dtype in ("bf16", "f16"):
        for base in (MIXED, DECODE, PROMPT):
            every.append(base.vary(f"{base.name}_{dtype}", f"{dtype} throughout, {base.name}", dtype=dtype))
    return [*every, *_scales()]


def _fp8(dtype: str) -> list[Case]:
    return [
        base.vary(
            f"{base.name}_{dtype}_{page_dtype}",
            f"{dtype} queries over {page_dtype} pages, {kind} scales, {base.name}",
            dtype=dtype,
            page_dtype=page_dtype,
            **scales,
        )
        for base, kind, scales in (
            (MIXED, "scalar", SCALAR),
            (DECODE, "per-head", PER_HEAD),
            (PROMPT, "per-head", PER_HEAD),
        )
        for page_dtype in ("e4m3", "e5m2")
    ]


def _int8(dtype: str) -> list[Case]:
    """Whose scales are required; each mix of scalars and one per head."""
    int8 = {"dtype": dtype, "page_dtype": "int8"}
    why = f"{dtype} queries over int8 pages"
    per_head, scalar = {"k_scale": (0.02, 0.01), "v_scale": (0.01, 0.03)}, {"k_scale": 0.02, "v_scale": 0.01}
    return [
        MIXED.vary(f"mixed_{dtype}_int8", f"{why}, scales per head", **per_head, **int8),
        DECODE.vary(f"decode_{dtype}_int8", f"{why}, scalar scales", **scalar, **int8),
        PROMPT.vary(
            f"prompt_{dtype}_int8", f"{why}, one scale of each kind", k_scale=0.01, v_scale=(0.01, 0.03), **int8
        ),
    ]


def _scales() -> list[Case]:
    capped: dict[str, Any] = {"page_dtype": "e4m3", "k_scale": 4.0, "keywords": {"soft_cap": 1.5}, "sinks": True}
    return [
        MIXED.vary("fp8_unscaled", "fp8 pages need no scales", dtype="bf16", page_dtype="e4m3"),
        MIXED.vary("f32_scaled", "pages of any dtype may have scales", k_scale=(0.5, 2.0), v_scale=3.0),
        MIXED.vary("bf16_v_scaled", "values alone may have scales", dtype="bf16", v_scale=(0.5, 3.0)),
        DECODE.vary("fp8_scaled_cap", "scales come before the cap", **capped),
    ]
