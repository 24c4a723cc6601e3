"""`explain`: which engine a function's attention calls would get, without running them."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params

from jax_paged_attn import _engines, _primitive

# JAX says "gpu" for either vendor where it means the kind of device; lowering rules go by the vendor's platform.
_PLATFORM_ALIASES = {"gpu": "cuda"}
# Those that JAX lowers for by itself; a plugin's is known where it is installed.
_PLATFORMS = ("cpu", "cuda", "gpu", "rocm", "tpu")


def explain(
    fn: Callable[..., Any],
    *args: Any,
    platform: str | None = None,
    device: Any = None,
    **kwargs: Any,
) -> _engines.Explanation:
    """Tells which engine would run the attention calls of `fn(*args, **kwargs)`, and why the others would not.

    Nothing is computed or compiled: the function is traced, so `jax.ShapeDtypeStruct`s do as arguments.

    Args:
      fn: `paged_attention`, `ragged_paged_attention`, or any function that calls them.
      *args: arrays or `jax.ShapeDtypeStruct`s (in pytrees too).
      platform: "cpu", "cuda", "gpu" (which is "cuda"), "rocm", "tpu", or that of an installed plugin; None is that of
        `device`, or JAX's default backend.
      device: a `jax.Device` whose platform is meant.
      **kwargs: keywords of `fn`; those that are not arrays stay static.

    Returns:
      An `Explanation`: `.engine`, `.rejected` (`{engine: reason}`), and `.calls`, one entry per attention call. Printed
      it also shows the calls that each engine takes.

    Raises:
      ValueError: the function has no attention call. A named implementation does not run on the platform, or no engine
        that guarantees `batch_invariant` does. JAX does not know the platform, or `device` is given too.
      TypeError: a platform that is no string, or a device that is no `jax.Device`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import jax_paged_attn as jpa
      >>> q, pages = jax.ShapeDtypeStruct((1, 2, 8), jnp.float32), jax.ShapeDtypeStruct((3, 4, 1, 8), jnp.float32)
      >>> tables, lengths = jax.ShapeDtypeStruct((1, 3), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
      >>> jpa.explain(jpa.paged_attention, q, pages, pages, tables, lengths, platform="tpu").engine
      'reference'
    """
    lowered_for = _platform(platform, device)

    jaxpr = trace(fn, args, kwargs)[0].jaxpr
    calls = tuple(
        _engines.choose(described, lowered_for, implementation) for described, implementation in _attention_calls(jaxpr)
    )
    if not calls:
        raise ValueError("fn: expected a function that calls paged attention, found no such call")
    rejected = {name: reason for one in reversed(calls) for name, reason in one.rejected.items()}
    engines = list(dict.fromkeys(one.engine for one in calls))
    rejected = {name: reason for name, reason in rejected.items() if name not in engines}
    return dataclasses.replace(calls[0], engine=", ".join(engines), rejected=rejected, calls=calls)


def _platform(platform: str | None, device: Any) -> str:
    """The platform that is meant, by the name that lowering rules use."""
    if platform is not None and device is not None:
        raise ValueError("platform: expected None where a device is given, got both")
    if device is not None and not isinstance(device, jax.Device):
        raise TypeError(f"device: expected a jax.Device, got {type(device).__name__} {device!r}")
    if platform is not None and not isinstance(platform, str):
        raise TypeError(f"platform: expected a name or None, got {type(platform).__name__}")
    default = jax.default_backend() if device is None else device.platform
    name = default if platform is None else platform
    if name not in (*_PLATFORMS, default):
        raise ValueError(f"platform: expected one of {', '.join(_PLATFORMS)} or None, got {name!r}")
    return _PLATFORM_ALIASES.get(name, name)


def trace(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ClosedJaxpr, list[Any]]:
    """The jaxpr of `fn(*args, **kwargs)`, and its operands: arrays and `ShapeDtypeStruct`s. All else stays static."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))}

    def call(arrays: dict[int, Any]) -> Any:
        these_args, these_kwargs = jax.tree.unflatten(tree, [arrays.get(i, x) for i, x in enumerate(leaves)])
        return fn(*these_args, **these_kwargs)

    return jax.make_jaxpr(call)(arrays), list(arrays.values())


def _attention_calls(jaxpr: Jaxpr) -> Iterator[tuple[_engines.Call, str | None]]:
    for eqn in jaxpr.eqns:
        if eqn.primitive is _primitive.attention_p:
            avals = [x.aval for x in eqn.invars]
            yield _primitive.describe(avals, eqn.params), eqn.params["implementation"]
        for inner in jaxprs_in_params(eqn.params):
            yield from _attention_calls(inner)
