"""A serving engine over the paged cache: requests in, tokens and text out. Needs the extra `serve` for tokenizers.

    engine = Engine(model, num_pages=1024, page_size=16, max_seqs=64)
    generation = engine.submit(Request(prompt, max_new_tokens=100))
    engine.run()
    generation.output

One file per concern: `_requests` (what is asked for), `_schedule` (who runs in a step), `_programs` (what the device
does), `_groups` (the pages of layers with windows), `_sampling`, `_drafts`, `_text`, `_pool` (who has which page), and
`_engine`, which ties them together.
"""

from jax_paged_attn.serving._engine import Engine, Pool
from jax_paged_attn.serving._groups import group_pages
from jax_paged_attn.serving._model import GroupedModel, Model, NnxModel
from jax_paged_attn.serving._pool import PoolRequest, PoolView
from jax_paged_attn.serving._requests import Generation, QueueFull, Request, TokenLogprobs
from jax_paged_attn.serving._sampling import LogProbabilities, Sampling, greedy, log_probabilities, sample
from jax_paged_attn.serving._stats import Stats
from jax_paged_attn.serving._text import OutputText, TextStream, Tokenizer
from jax_paged_attn.serving._tokenizers import ByteTokenizer, FileTokenizer

__all__ = [
    "ByteTokenizer",
    "Engine",
    "FileTokenizer",
    "Generation",
    "GroupedModel",
    "LogProbabilities",
    "Model",
    "NnxModel",
    "OutputText",
    "Pool",
    "PoolRequest",
    "PoolView",
    "QueueFull",
    "Request",
    "Sampling",
    "Stats",
    "TextStream",
    "TokenLogprobs",
    "Tokenizer",
    "greedy",
    "group_pages",
    "log_probabilities",
    "sample",
]
