"""The fixtures `engine` and `compiled_engine`: the name of each engine, skipped where it cannot run.

The latter leaves the plain JAX of "reference" out, and the mark `engines` those that a test is not about. Also says
which cases are slow on which engine, and picks the share of the parameters that JPA_SHARE asks for.
"""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Sequence

# Before NumPy is imported: its threads wait for work by spinning, which takes the cores from the other tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import harness
import jax
import pytest
from cases import Case

from jax_paged_attn import _engines

# Files of tests without JAX, or whose random requests and calls are the same on each release of it.
ONE_RELEASE = {
    f"test_{name}.py"
    for name in (
        "allocator", "allocator_state", "benchmarks", "chat", "fuzz", "live", "readme", "server", "serving_schedule",
        "soak", "text", "tokenizer", "vocabulary",
    )
}  # fmt: skip


def _engine_params(engines: Sequence[_engines.Engine]) -> list[object]:
    # JAX calls the backend "gpu" and the platform it lowers for "cuda".
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    params = []
    for engine in engines:
        marks = [pytest.mark.gpu] if engine.platform == "cuda" else []
        reason = engine.missing(platform)
        if reason is not None:
            marks.append(pytest.mark.skip(reason=reason))
        params.append(pytest.param(engine.name, marks=marks))
    return params


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.definition.get_closest_marker("engines")
    engines = [engine for engine in _engines.ENGINES if chosen is None or chosen.kwargs["that"](engine)]
    if "engine" in metafunc.fixturenames:
        metafunc.parametrize("engine", _engine_params(engines))
    if "compiled_engine" in metafunc.fixturenames:
        metafunc.parametrize("compiled_engine", _engine_params([e for e in engines if e.name != "reference"]))


@pytest.hookimpl(tryfirst=True)  # before marks select tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        case = params.get("case")
        if params.get("engine") == "reference" and isinstance(case, Case) and harness.reference_is_slow(case, place=0):
            item.add_marker(pytest.mark.slow)
        if item.path.name in ONE_RELEASE:
            item.add_marker(pytest.mark.one_release)
    left_out = outside_of_share(items, int(os.environ.get("JPA_SHARE", "1")))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def outside_of_share(items: list[pytest.Item], share: int) -> list[pytest.Item]:
    """What JPA_SHARE=4 leaves out: of each test's parameters three of four, the same ones each time.

    Which ones stay follows from hashes of their names, since each fourth one may have the same value of a parameter.
    Tests of up to two parameters stay whole, and so does what has the mark `whole`.
    """
    alike: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        runs = item.get_closest_marker("skip") is None
        if runs and item.get_closest_marker("whole") is None:
            alike[item.nodeid.partition("[")[0]].append(item)
    left_out = []
    for tests in alike.values():
        if len(tests) > 2:
            tests.sort(key=lambda item: zlib.crc32(item.name.encode()))
            left_out += tests[-(-len(tests) // share) :]
    return left_out
