"""Importing the package, and using it at all, in surroundings that go wrong: modules, threads, processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from harness import python

from jax_paged_attn import _ffi

# A call that spreads over XLA's threads, and what it must give: the mean of values that are all the same.
CALL = """
import jax, jax.numpy as jnp, numpy as np
def call(attend=None):
    if attend is None:
        import jax_paged_attn
        attend = jax.jit(jax_paged_attn.paged_attention)
    pages = jnp.full((512, 16, 2, 64), 3.0)
    tables = jnp.arange(512, dtype=jnp.int32).reshape(8, 64)
    out = attend(jnp.ones((8, 8, 64)), pages, pages, tables, jnp.full(8, 1000, jnp.int32))
    np.testing.assert_allclose(out, 3.0, rtol=1e-5)
    return attend
"""

# Leads the import system to a file in place of a compiled module.
REDIRECT = """
import importlib.util, sys
class Redirect:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            return importlib.util.spec_from_file_location(name, sys.argv[2])
sys.meta_path.insert(0, Redirect())
"""
IMPORT = """
try:
    import jax_paged_attn
except ImportError as error:
    print(type(error).__name__, error.name, error.path)
    print(error)
else:
    print("imported")
"""


# ---- Compiled modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["_cpu", "_cuda"])
def test_an_absent_module_is_normal(module: str) -> None:
    script = f"""
import sys
for name in ("{module}", "_cuda12"):
    sys.modules["jax_paged_attn." + name] = None  # as if it was not there
{CALL}
call()
import jax_paged_attn as jpa
from jax_paged_attn import _ffi, __main__
platform = "{module[1:]}"
assert not _ffi.has(platform)
print(_ffi.missing(platform))
print(_ffi.missing(platform) in __main__.report())
try:
    print(_ffi.compiled(platform))
except LookupError as error:
    print(error)
"""
    why = f"this installation was built without jax_paged_attn.{module}"
    assert python(script)[-3:] == [why, "True", why]


@pytest.mark.parametrize("module", ["_cpu", "_cuda", "_cuda12"])
@pytest.mark.parametrize("content", ["no ELF", "cut off", "needs what is not there"])
def test_a_broken_module_raises(module: str, content: str, tmp_path) -> None:
    """It is not taken for an absent one, since calls would then be slow without a word."""
    name = f"jax_paged_attn.{module}"
    if content == "needs what is not there":
        path = tmp_path / f"{module}.py"
        path.write_text("import libsomething")
        reason = "No module named 'libsomething'"
    else:
        path = tmp_path / f"{module}.so"
        path.write_bytes(b"not a shared object" * 99 if content == "no ELF" else b"\x7fELF\x02\x01\x01")
        reason = str(path)
    environment = {} if module == "_cpu" else {"JPA_CUDA_VERSION": "12" if module == "_cuda12" else "13"}
    kind, message = python(REDIRECT + IMPORT, name, str(path), **environment)
    assert kind.startswith(f"ImportError {name} ")
    assert message.startswith(f"{name} is installed but does not load: ")
    assert reason in message


class CudaModule(ModuleType):
    """In place of a compiled module: has nothing to register."""

    directory: str

    def state_types(self) -> dict[str, Any]:
        return {}

    def registrations(self) -> dict[str, Any]:
        return {}

    def set_library_directory(self, directory: str) -> None:
        self.directory = directory


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Callable[..., None]:
    """Makes the modules and plugins that it is called with the only ones, with each version's cuBLAS beside them."""

    def spec_of(name: str, folder: str = "") -> ModuleSpec:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / folder)]
        return spec

    def install(modules: str, plugins: str = "", version: str | None = None) -> None:
        for name in ("_cuda", "_cuda12"):
            module = CudaModule(name) if name in modules.split() else None
            monkeypatch.setitem(sys.modules, f"jax_paged_attn.{name}", module)
        there = {f"jax_cuda{plugin}_plugin": spec_of(plugin) for plugin in plugins.split()}
        there |= {"nvidia": spec_of("nvidia"), **{f"nvidia.{n}": spec_of(n, n) for n in ("cu13", "cublas")}}
        monkeypatch.setattr("importlib.util.find_spec", there.get)
        if version is None:
            monkeypatch.delenv("JPA_CUDA_VERSION", raising=False)
        else:
            monkeypatch.setenv("JPA_CUDA_VERSION", version)

    return install


@pytest.mark.parametrize(
    ("modules", "plugins", "version", "chosen", "why"),
    [
        ("_cuda _cuda12", "13", None, "_cuda", "jax_cuda13_plugin is installed"),
        ("_cuda _cuda12", "12", None, "_cuda12", "jax_cuda12_plugin is installed"),
        ("_cuda _cuda12", "12 13", None, "_cuda12", "jax_cuda12_plugin is installed"),
        ("_cuda _cuda12", "", None, "_cuda", "no CUDA plugin of JAX is installed"),
        ("_cuda _cuda12", "13", "12", "_cuda12", "JPA_CUDA_VERSION=12"),
        ("_cuda _cuda12", "12", "13", "_cuda", "JPA_CUDA_VERSION=13"),
        ("_cuda", "12", None, "_cuda", "but this installation was built without jax_paged_attn._cuda12"),
        ("_cuda12", "13", None, "_cuda12", "but this installation was built without jax_paged_attn._cuda"),
        ("", "12", None, None, "jax_cuda12_plugin is installed"),
    ],
)
def test_the_plugin_chooses_the_cuda_module(
    installed: Callable[..., None], modules: str, plugins: str, version: str | None, chosen: str | None, why: str
) -> None:
    installed(modules, plugins, version)
    choice = _ffi._load_cuda()
    assert choice.why.endswith(why)
    if chosen is None:
        assert choice.module is None
        assert choice.name == "jax_paged_attn._cuda12"  # the one to name in messages
        return
    assert isinstance(choice.module, CudaModule)
    assert (choice.name, choice.module.__name__) == (f"jax_paged_attn.{chosen}", chosen)
    assert choice.module.directory.endswith({"_cuda": "/cu13/lib", "_cuda12": "/cublas/lib"}[chosen])


def test_a_version_of_cuda_that_is_asked_for_must_be_there(installed: Callable[..., None]) -> None:
    installed("_cuda", version="12")
    with pytest.raises(ImportError, match=r"JPA_CUDA_VERSION=12 asks for jax_paged_attn._cuda12, which .* without"):
        _ffi._load_cuda()
    installed("_cuda", version="11")
    with pytest.raises(ValueError, match="JPA_CUDA_VERSION: expected 12 or 13, got '11'"):
        _ffi._load_cuda()


def test_there_is_no_module_for_other_platforms() -> None:
    assert not _ffi.has("tpu")
    assert "no compiled module" in (_ffi.missing("tpu") or "")


# ---- Threads and processes -------------------------------------------------------------------------------------------


def test_threads_import_and_call_at_once() -> None:
    script = f"""
{CALL}
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
sys.setswitchinterval(1e-5)
barrier = Barrier(4)
def work(_):
    barrier.wait()
    for _ in range(5):
        attend = call()  # the first one imports
    return "right"
assert "jax_paged_attn" not in sys.modules
with ThreadPoolExecutor(4) as pool:
    print(*pool.map(work, range(4)))
"""
    assert python(script)[-1] == "right right right right"


FORK = """
import os, sys
def fork(work, seconds=60):
    # "done", or what else became of a forked process that does the work.
    import time, warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX has threads, and says so
        child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "done" if status == 0 else f"failed: {status}"
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"
"""
needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="has no fork")


@needs_fork
@pytest.mark.parametrize("parent_imports", ["", "import jax", "import jax_paged_attn"])
def test_a_forked_worker_calls(parent_imports: str) -> None:
    """JAX may be imported before the fork, but not used."""
    assert python(f"{FORK}\n{CALL}\n{parent_imports}\nprint(fork(call), fork(call))")[-1] == "done done"


@needs_fork
def test_a_compiled_call_works_after_a_fork() -> None:
    """The threads of XLA are not there in the forked process; the CPU engine does its work without them."""
    if not _ffi.has("cpu"):
        pytest.skip("built without the CPU engine")
    script = f"""
{FORK}
{CALL}
attend = call()
args = [jnp.ones((8, 8, 64)), *[jnp.full((512, 16, 2, 64), 3.0)] * 2]
args += [jnp.arange(512, dtype=jnp.int32).reshape(8, 64), jnp.full(8, 1000, jnp.int32)]
want = np.asarray(attend(*args)).tobytes()
def same():
    assert np.asarray(attend(*args)).tobytes() == want
print(fork(same, 20))
"""
    assert python(script, JAX_PLATFORMS="cpu")[-1] == "done"


def test_a_spawned_worker_calls(tmp_path) -> None:
    """After the parent has used the package, and from a worker of a pool."""
    script = tmp_path / "spawning.py"
    script.write_text(f"""
{CALL}
import multiprocessing
def work(_):
    call()
    return "right"
if __name__ == "__main__":
    call()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(*pool.map(work, range(2)))
""")
    run = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    assert python(run, str(script))[-1] == "right right"
