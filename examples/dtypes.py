"""The dtypes of weights, computation and caches that the command lines offer."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from models import Decoder

from jax_paged_attn.nnx import calibrate
from jax_paged_attn.serving import NnxModel, Tokenizer

GENERAL_PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "A list of prime numbers: 2, 3, 5,",
    "Water boils at a lower temperature on a mountain because",
)
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
CACHE_DTYPES = {**DTYPES, "fp8": jnp.float8_e4m3fn, "int8": jnp.int8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype and --cache-dtype."""
    parser.add_argument("--dtype", choices=DTYPES, help="by default f32 on CPUs, elsewhere the checkpoint's")
    parser.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help="by default as --dtype; fp8 and int8 are calibrated"
    )


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program if a cache of 16 or 32 bits has another dtype than the computation."""
    if arguments.cache_dtype in DTYPES and arguments.dtype not in (None, arguments.cache_dtype):
        parser.error(f"--cache-dtype {arguments.cache_dtype}: expected --dtype to be the same, or an 8-bit cache")


def dtype_of(arguments: argparse.Namespace) -> Any:
    """That of weights and computation; None for the checkpoint's."""
    name = arguments.dtype or (arguments.cache_dtype if arguments.cache_dtype in DTYPES else None)
    if name is None:
        return jnp.float32 if jax.default_backend() == "cpu" else None
    return DTYPES[name]


def served(
    model: Decoder, tokenizer: Tokenizer, arguments: argparse.Namespace, prompts: Iterable[Sequence[int]] = ()
) -> NnxModel:
    """The model with its cache. An 8-bit one is calibrated on general prompts, and on those that are known."""
    if arguments.cache_dtype is None:
        return model.served()
    cache_dtype = CACHE_DTYPES[arguments.cache_dtype]
    if arguments.cache_dtype in DTYPES:
        return model.served(cache_dtype)
    return model.served(cache_dtype, calibrate(model, [*prompts, *map(tokenizer.encode, GENERAL_PROMPTS)], cache_dtype))
