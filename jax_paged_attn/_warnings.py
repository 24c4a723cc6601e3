"""Warnings about what is right but slow, each cause once per process."""

import warnings


class PagedAttentionWarning(UserWarning):
    """A call gives the right result in a slow way.

    Example:
      Tests can insist on the fast way:

      >>> import warnings
      >>> import jax_paged_attn as jpa
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("error", jpa.PagedAttentionWarning)
    """


_told: set[str] = set()


def warn_once(cause: str, message: str, stacklevel: int = 3) -> None:
    """Warns unless it did so of the same cause; `stacklevel` 3 is the caller of the function that calls this."""
    if cause not in _told:
        _told.add(cause)
        warnings.warn(message, PagedAttentionWarning, stacklevel=stacklevel)
