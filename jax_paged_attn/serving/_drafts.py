"""Drafts without a draft model: what followed the last tokens where the request had them before."""

from __future__ import annotations

from collections.abc import Sequence


class PromptLookup:
    """Prompt-lookup drafts (Saxena 2023) of one request: n-grams of its own prompt and output.

    Keeps, for each n-gram, where it last ended, so that a lookup does not search the tokens again.

    Args:
      longest, shortest: tokens of the n-grams that are looked up, the longest first.

    Example:
      >>> from jax_paged_attn.serving._drafts import PromptLookup
      >>> lookup = PromptLookup()
      >>> lookup.propose([7, 1, 2, 3, 4, 9, 1, 2, 3], 2)
      (4, 9)
    """

    def __init__(self, longest: int = 4, shortest: int = 2):
        self._sizes = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0  # leading tokens whose n-grams are in _ends

    def propose(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """At most `count` tokens that may come after `tokens`, which are those of the call before and more."""
        # The n-grams that end with the last token have nothing behind them yet, so they stay out.
        for end in range(self._indexed + 1, len(tokens)):
            for size in self._sizes:
                if end >= size:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        for size in self._sizes:
            end = self._ends.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if end is not None:
                return tuple(tokens[end : end + count])
        return ()


def accepted(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """How many leading drafts the model confirms: those that it samples itself.

    `sampled[i]` was drawn for the place of `drafts[i]`. A draft is certain of itself, so accepting it where the draw
    agrees, and taking the draw where it does not, is rejection sampling (Leviathan et al. 2023): the output has the
    model's own distribution. As each place has its own random numbers, it even is the output without drafts.
    """
    count = 0
    while count < len(drafts) and drafts[count] == sampled[count]:
        count += 1
    return count
