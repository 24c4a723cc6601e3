"""The fixture `engine`: the name of each engine that the package has, skipped where it cannot run.

Also says which cases are slow on which engine.
"""

from __future__ import annotations

import harness
import jax
import pytest
from cases import Case

from jax_paged_attn import _engines


def _engine_params() -> list[object]:
    # JAX calls the backend "gpu" and the platform it lowers for "cuda".
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    params = []
    for engine in _engines.ENGINES:
        marks = [pytest.mark.gpu] if engine.platform == "cuda" else []
        reason = engine.missing(platform)
        if reason is not None:
            marks.append(pytest.mark.skip(reason=reason))
        params.append(pytest.param(engine.name, marks=marks))
    return params


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        metafunc.parametrize("engine", _engine_params())


@pytest.hookimpl(tryfirst=True)  # before marks select tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        case = params.get("case")
        if params.get("engine") == "reference" and isinstance(case, Case) and harness.reference_is_slow(case, place=0):
            item.add_marker(pytest.mark.slow)
