"""Checks of arguments: each error names the argument, what was expected, and what came."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")


class Dims:
    """The sizes that one call's letters stand for, learnt from the arguments in turn.

    A letter has one size in all arguments; the first argument that shows it decides.
    """

    def __init__(self, **sizes: int):
        self._sizes = dict(sizes)

    def __getitem__(self, letter: str) -> int:
        return self._sizes[letter]

    def match(self, name: str, x: jax.Array, letters: str, dtypes: Sequence[str]) -> None:
        """Raises ValueError unless `x` has the shape `letters` ("P S 2K H", "B+1", "1") and one of the dtypes."""
        pattern = letters.split()
        if x.dtype not in [jnp.dtype(d) for d in dtypes]:
            raise ValueError(f"{name}: expected dtype {' or '.join(dtypes)}, got {x.dtype}")
        if len(x.shape) != len(pattern):
            expected = f"rank {len(pattern)}, shape [{', '.join(pattern)}]"
            raise ValueError(f"{name}: expected {expected}, got rank {len(x.shape)}, shape {x.shape}")
        for axis, letter in enumerate(pattern):
            base, _, plus = letter.partition("+")
            size, factor = x.shape[axis], 1
            if base[0] == "2" and len(base) > 1:
                base, factor = base[1:], 2
            known = int(base) if base.isdigit() else self._sizes.get(base)
            if known is None and size % factor == 0:
                self._sizes[base] = size // factor
            elif known is None or size != factor * known + int(plus or 0):
                expected = "an even size" if known is None else f"{letter} = {factor * known + int(plus or 0)}"
                raise ValueError(
                    f"{name}: expected shape [{', '.join(pattern)}] with {expected} (axis {axis}), got shape {x.shape}"
                )


def as_array(name: str, x: ArrayLike) -> jax.Array:
    """`x` as a JAX array (tracers stay tracers); TypeError for what is none."""
    if isinstance(x, jax.Array):
        return x
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array, got {type(x).__name__}") from error


def static_number(name: str, x: object) -> float:
    """`x` as a float; TypeError for tracers (the number is compiled into the kernel) and for what is no number."""
    if isinstance(x, Tracer):
        raise TypeError(f"{name}: expected a static number, got a tracer; close over it or mark it as static")
    if isinstance(x, (jax.Array, np.ndarray)) and x.ndim == 0:
        x = x.item()
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return float(x)


def static_positive(name: str, x: object) -> float:
    number = static_number(name, x)
    if number <= 0:
        raise ValueError(f"{name}: expected a positive number, got {number}")
    return number


def static_count(name: str, x: object) -> int:
    """`x` as an int ≥ 1."""
    number = static_number(name, x)
    if number != int(number):
        raise TypeError(f"{name}: expected an integer, got {number}")
    if number < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {int(number)}")
    # Beyond int32 no length can tell the difference.
    return min(int(number), 2**31 - 1)


def static_bool(name: str, x: object) -> bool:
    if isinstance(x, Tracer):
        raise TypeError(f"{name}: expected a static bool, got a tracer; close over it or mark it as static")
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a bool, got {type(x).__name__}")
    return bool(x)
