"""Checks of arguments: each error names the argument, what was expected, and what came."""

import math
import weakref
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")
PAGE_DTYPES = (*COMPUTE_DTYPES, *QUANTIZED_DTYPES)
INT32 = np.iinfo(np.int32)


class Dims:
    """The sizes that one call's letters stand for, learnt from one argument after the other.

    A letter has one size in all arguments; the first argument that shows it decides.
    """

    def __init__(self, **sizes: int):
        self._sizes = dict(sizes)

    def __getitem__(self, letter: str) -> int:
        return self._sizes[letter]

    def match(self, name: str, x: jax.Array, letters: str, dtypes: Sequence[str]) -> None:
        """Raises ValueError unless `x` has the shape `letters` ("P S 2K H", "B+1", "1") and one of the dtypes.

        An axis such as ">=2K" may be longer, where an argument before has shown the letter.
        """
        pattern = letters.split()
        if x.dtype not in [jnp.dtype(d) for d in dtypes]:
            raise ValueError(f"{name}: expected dtype {' or '.join(dtypes)}, got {x.dtype}")
        if len(x.shape) != len(pattern):
            expected = f"rank {len(pattern)}, shape [{', '.join(pattern)}]"
            raise ValueError(f"{name}: expected {expected}, got rank {len(x.shape)}, shape {x.shape}")
        for axis, letter in enumerate(pattern):
            base, _, plus = letter.removeprefix(">=").partition("+")
            size, factor = x.shape[axis], 1
            if base[0] == "2" and len(base) > 1:
                base, factor = base[1:], 2
            known = int(base) if base.isdigit() else self._sizes.get(base)
            if known is None and size % factor == 0:
                self._sizes[base] = size // factor
                continue
            wanted = None if known is None else factor * known + int(plus or 0)
            if wanted is not None and letter.startswith(">=") and size > wanted:
                continue
            if size != wanted:
                expected = "an even size" if wanted is None else f"{letter} = {wanted}"
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


def as_int32(name: str, x: ArrayLike) -> jax.Array:
    """Page ids, slots, lengths and counts as an int32 JAX array, from integers of any width; nothing wraps.

    Host values (NumPy, Python numbers, lists) outside int32 raise a ValueError that says which. Those of JAX arrays,
    which may be traced, are clamped to int32: as an id that is one outside every pool, as a length one beyond every
    table. An empty list has no dtype of its own, so it counts as integers. Bools and floats are refused.
    """
    if isinstance(x, jax.Array):
        return _clamped_to_int32(name, x)
    if hasattr(x, "__jax_array__"):
        return _clamped_to_int32(name, as_array(name, x))
    if isinstance(x, (list, tuple)) and any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
        # NumPy would wait for the values of these, or refuse them if they are traced.
        return as_array(name, jax.tree.map(lambda leaf: as_int32(name, leaf), x))
    try:
        values = np.asarray(x)
    except (TypeError, ValueError) as error:  # nested lists of unequal lengths, for one
        raise TypeError(f"{name}: expected an array of int32, got {type(x).__name__}") from error
    if values.size == 0 and not hasattr(x, "dtype"):
        values = values.astype(np.int32)
    beyond_64_bits = values.dtype == object and all(isinstance(value, int) for value in values.flat)
    if not beyond_64_bits:
        if not (jnp.issubdtype(values.dtype, np.number) or values.dtype == bool):
            raise TypeError(f"{name}: expected an array of int32, got {type(x).__name__}")
        _check_integer(name, values.dtype)
    if beyond_64_bits or jnp.iinfo(values.dtype).bits >= INT32.bits:
        outside = (values < INT32.min) | (values > INT32.max)
        if outside.any():
            where = tuple(int(i) for i in np.argwhere(outside)[0])
            place = f" at {list(where)}" if where else ""
            raise ValueError(f"{name}: expected values that fit in int32, got {values[where]}{place}")
    return jnp.asarray(values.astype(np.int32))


def _clamped_to_int32(name: str, x: jax.Array) -> jax.Array:
    if x.dtype == jnp.int32:
        return x
    _check_integer(name, x.dtype)
    limits = jnp.iinfo(x.dtype)
    if limits.max > INT32.max:
        x = jnp.clip(x, max(int(limits.min), INT32.min), INT32.max)
    return x.astype(jnp.int32)


def _check_integer(name: str, dtype: np.dtype) -> None:
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name}: expected dtype int32, or another integer one, got {dtype}")


def as_float32(name: str, x: ArrayLike) -> jax.Array:
    """`x` as a JAX array; float32 where it is a Python number, or float64, which x64 makes of lists and `np.array`."""
    if isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name}: expected float32 numbers, got {type(x).__name__}")
    array = as_array(name, _to_float32(name, x) if isinstance(x, (int, float)) else x)
    return array.astype(jnp.float32) if array.dtype == jnp.float64 else array


def _to_float32(name: str, x: ArrayLike) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # too large is infinite
            return np.asarray(x, np.float32)
    except OverflowError as error:
        raise ValueError(f"{name}: expected numbers that fit in float32, got {x}") from error


# Scales that were found good, by identity: JAX arrays never change, and a weak reference tells whether it is the same.
_good_scales: dict[int, weakref.ref[jax.Array]] = {}


def check_scales(name: str, given: ArrayLike, scales: jax.Array) -> None:
    """Raises ValueError unless all scales are positive and finite in float32.

    Traced scales, and those on devices of other hosts, pass. Reading an array from a device makes the host wait for all
    that the device still has to do, so each is read once in its life, not at each call. The transfer is explicit:
    `jax.transfer_guard("disallow")` allows it.

    Args:
      name: what errors call them.
      given: the user's argument; while JAX traces, host values can only be read here.
      scales: the same as a JAX array.
    """
    if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(given)):
        values = _to_float32(name, given)
    elif isinstance(scales, Tracer) or scales.is_deleted() or not scales.is_fully_addressable or _known_good(scales):
        return
    else:
        values = np.asarray(jax.device_get(scales))
    bad = ~((values > 0) & np.isfinite(values))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        place = f" at {list(where)}" if where else ""
        raise ValueError(f"{name}: expected positive, finite scales, got {values[where]}{place}")
    note_good_scales(scales)


def _known_good(scales: jax.Array) -> bool:
    reference = _good_scales.get(id(scales))
    return reference is not None and reference() is scales


def note_good_scales(scales: jax.Array) -> None:
    """Spares `check_scales` from reading an array that was made of checked ones."""
    if not isinstance(scales, Tracer):
        key = id(scales)
        _good_scales[key] = weakref.ref(scales, lambda _: _good_scales.pop(key, None))


def static_number(name: str, x: object) -> float:
    """`x` as a float; TypeError for tracers (the number is compiled into the kernel) and for what is no number."""
    if isinstance(x, Tracer):
        raise TypeError(f"{name}: expected a static number, got a tracer; close over it or mark it as static")
    if isinstance(x, (jax.Array, np.ndarray)) and x.ndim == 0:
        x = x.item()
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    try:
        number = float(x)
    except OverflowError as error:
        raise ValueError(f"{name}: expected a number that a float holds, got an integer of many digits") from error
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return number


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
