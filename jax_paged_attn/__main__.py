"""`python -m jax_paged_attn`: what is installed, which engines run here, what each takes, and why the others do not."""

import platform
import sys
from importlib.metadata import version

import jax

from jax_paged_attn import __version__, _engines, _ffi


def report() -> str:
    """The text that `python -m jax_paged_attn` prints."""
    backend = jax.default_backend()
    lowering_platform = "cuda" if backend == "gpu" else backend
    devices = ", ".join(str(d.device_kind) for d in jax.devices())
    lines = [
        f"jax_paged_attn {__version__}",
        f"  python {platform.python_version()}, jax {jax.__version__}, jaxlib {version('jaxlib')}",
        f"  backend {backend}: {devices}",
    ]
    lines += [f"  {line}" for line in _ffi.describe()]
    lines.append("engines, best first:")
    verdicts = {}
    for engine in _engines.ENGINES:
        reason = engine.missing(lowering_platform)
        verdicts[engine.name] = "runs here" if reason is None else f"does not run here: {reason}"
    return "\n".join([*lines, *_engines.table(verdicts)])


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
