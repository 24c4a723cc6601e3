"""Every Python block of the README and of the pages in docs/ runs as it stands there.

The blocks of one page share a namespace and run in order. Sybil finds them, so that a failure names the page's line.

- A page whose front matter has `devices: 8` runs in a process of its own with eight CPU devices.
- A block after `<!--- skip: next if(not gpu, reason="needs a GPU") -->` runs where there is a CUDA device. So does one
  after `if(gpus < 2, ...)` where there are two.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

import jax
import pytest
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]
PAGES = [
    str(page.relative_to(ROOT))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if page.is_file() and "\n```python\n" in page.read_text()
]
SYBIL = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])


def devices_of(page: Path) -> int:
    """How many CPU devices the front matter of a page asks for."""
    front_matter = re.match(r"---\n(.*?)\n---\n", page.read_text(), re.DOTALL)
    asked = re.search(r"^devices: (\d+)$", front_matter[1], re.MULTILINE) if front_matter else None
    return int(asked[1]) if asked else 1


def run_blocks(page: Path) -> None:
    document = SYBIL.parse(page)
    gpus = jax.device_count() if jax.default_backend() == "gpu" else 0
    document.namespace.update(gpu=gpus > 0, gpus=gpus)
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as skipped:
            print(f"{page.name}:{example.line}: {skipped}")


def run_with_devices(page: str, devices: int) -> None:
    """JAX has as many CPU devices as XLA_FLAGS said when it started."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"{__file__}::test_examples_run[{page}]"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str) -> None:
    devices = devices_of(ROOT / page)
    if jax.device_count() < devices:
        run_with_devices(page, devices)
    else:
        run_blocks(ROOT / page)
