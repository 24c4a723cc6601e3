"""The common part of the examples' command lines: checked arguments, and errors of one line."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NoReturn

_PACKAGES = (
    *("flax", "optax", "rich", "safetensors", "tokenizers"),
    *("jinja2", "prometheus_client", "starlette", "uvicorn"),
)


def number(kind: type, least: float, text: str, *, most: float = math.inf) -> float:
    """An argument of the command line as a number in [least, most]; to be used with `functools.partial`."""
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not (value >= least and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
    if value > most:
        raise argparse.ArgumentTypeError(f"expected at most {most}, got {text}")
    return value


def text(argument: str) -> str:
    """An argument that is UTF-8: no tokenizer takes anything else."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"expected UTF-8 text, got {argument!r}") from None
    return argument


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model."""
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(__file__).parent / "checkpoint",
        help="folder of a model in Hugging Face's layout, see models/; by default the small byte-level one here",
    )


def fail(message: object) -> NoReturn:
    """Ends the program with status 2, as `argparse` does, and with a line that says why."""
    line = " ".join(str(message).split())
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    raise SystemExit(2)


def fail_without(error: ModuleNotFoundError) -> NoReturn:
    """Names a missing package of the extra `examples` and how to get it; raises errors of other modules again."""
    package = (error.name or "").partition(".")[0]
    if package not in _PACKAGES:
        raise error
    fail(f'needs the package {package!r}, which is not installed: pip install "jax-paged-attn[examples]"')
