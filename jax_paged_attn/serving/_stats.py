"""What an engine has counted since it was made."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Stats:
    """Counts since the engine was made. `Engine.stats` is one that goes on counting.

    Attributes:
      steps: times that the model ran.
      dispatches: calls of jitted functions; fewer than steps where decode steps are repeated on the device.
      tokens: generated tokens that were handed out.
      prompt_tokens: tokens of the prompts of admitted requests; those admitted again after a preemption do not count.
      cached_tokens: of these, tokens that were found in the prefix cache.
      preemptions: how often a request gave up its pages.
      finished: requests that ended, whatever the reason.
      drafted, accepted: tokens that were proposed as drafts, and those that the model confirmed.
      peak_pages: the most pages in use at once.
      host_seconds: time that the engine's own Python took: scheduling, dispatch, handing out.
      wait_seconds: time that the engine waited for results of the device.
      first_token_seconds: sum over requests of the time from `Engine.submit` to their first token.
      first_tokens: how many requests that is.
      later_token_seconds, later_tokens: the same from a request's first token to its last, over the tokens after the
        first.

    Example:
      >>> from jax_paged_attn.serving import Stats
      >>> stats = Stats(prompt_tokens=100, cached_tokens=64, first_token_seconds=0.5, first_tokens=2)
      >>> stats.hit_rate, stats.time_to_first_token
      (0.64, 0.25)
    """

    steps: int = 0
    dispatches: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    drafted: int = 0
    accepted: int = 0
    peak_pages: int = 0
    host_seconds: float = 0.0
    wait_seconds: float = 0.0
    first_token_seconds: float = 0.0
    first_tokens: int = 0
    later_token_seconds: float = 0.0
    later_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were found in the prefix cache; 0 before the first."""
        return self.cached_tokens / max(self.prompt_tokens, 1)

    @property
    def time_to_first_token(self) -> float:
        """Mean seconds from submission to the first token; 0 before the first."""
        return self.first_token_seconds / max(self.first_tokens, 1)

    @property
    def time_per_token(self) -> float:
        """Mean seconds per token after a request's first; 0 before any."""
        return self.later_token_seconds / max(self.later_tokens, 1)
