"""Every `>>>` example of the public docstrings runs in a namespace of its own, and all public names have one."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

MODULES = [
    "jax_paged_attn",
    "jax_paged_attn.compat",
    "jax_paged_attn.compat.ejkernel",
    "jax_paged_attn.compat.levanter",
    "jax_paged_attn.nnx",
    "jax_paged_attn.rope",
    "jax_paged_attn.serving",
    "jax_paged_attn.serving.server",
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def _examples() -> dict[str, doctest.DocTest]:
    """The docstrings with examples, by name: those of modules, functions, classes and methods."""
    finder = doctest.DocTestFinder()
    tests = []
    for name in MODULES:
        module = importlib.import_module(name)
        tests.append(doctest.DocTestParser().get_doctest(module.__doc__ or "", {}, name, module.__file__, 0))
        for member in module.__all__:
            tests += finder.find(getattr(module, member), f"{name}.{member}", module=False, globs={})
    return {test.name: test for test in tests if test.examples}


EXAMPLES = _examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str) -> None:
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=FLAGS).run(EXAMPLES[name], out=said.append)
    assert results.failed == 0, "".join(said)


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_examples(module: str) -> None:
    """A class may have its examples at its methods."""
    members = vars(importlib.import_module(module))
    names = [name for name in members["__all__"] if inspect.isclass(members[name]) or inspect.isfunction(members[name])]
    assert [name for name in names if not any(f"{key}.".startswith(f"{module}.{name}.") for key in EXAMPLES)] == []
