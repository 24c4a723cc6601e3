"""The jitted steps: the host's numbers go in as one array, the model runs, and tokens are sampled on the device.

A program has static shapes. Its operands are the weights, the cache, the last token of each row (which stays on the
device, so that the next step need not wait until the host has read it), and one int32 array with all that the host
decides: a transfer per step, and few operands to dispatch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jax_paged_attn._step import StepMetadata
from jax_paged_attn.serving._groups import LayerGroups
from jax_paged_attn.serving._model import GroupedModel
from jax_paged_attn.serving._requests import Generation
from jax_paged_attn.serving._sampling import LogProbabilities, Sampling, greedy, log_probabilities, sample
from jax_paged_attn.serving._schedule import Plan

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


class Sampled(NamedTuple):
    """What a program gives the host.

    Attributes:
      tokens: int32 `[repeats, B]` of a decode step, else `[B, 1 + drafts]`.
      logprobs: of the tokens, with the same leading axes; None if nobody asked for them.
    """

    tokens: Array
    logprobs: LogProbabilities | None


Program = Callable[[list[Array], list[Array], Array, Any], tuple[Sampled, Array, list[Array]]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """The static part of a step: one program each.

    Attributes:
      size: T, tokens; in a decode step also B, sequences.
      repeats: decode steps in one dispatch; 0 for a step that is no decode step.
      samples: False where every request is greedy, so that nothing has to be drawn.
      logprobs: True where some request wants log probabilities.
    """

    size: int
    repeats: int
    samples: bool
    logprobs: bool


class Programs:
    """Makes the programs of a model, each when it is first needed, and their operands.

    Args:
      model: what runs.
      cache_leaves, cache_tree: its cache, flat.
      weights_tree: the structure of its weights.
      page_size, table_width, max_seqs: S, M and B.
      num_drafts: the most drafts per request.
      max_logprobs: the likeliest tokens of which log probabilities are told.
      compiler_options: XLA's, for each program.

    Attributes:
      traces: how often a program was traced.
      weights_tree: the structure of the weights.
      replicated: the sharding of what every device has; None where there is no mesh.
    """

    def __init__(
        self,
        model: GroupedModel,
        cache_leaves: list[Array],
        cache_tree: Any,
        weights_tree: Any,
        *,
        page_size: int,
        table_width: int,
        max_seqs: int,
        num_drafts: int,
        max_logprobs: int,
        compiler_options: Mapping[str, Any] | None,
    ):
        self.traces = 0
        self._model = model
        self._groups = range(len(model.windows))
        self._cache_tree = cache_tree
        self.weights_tree = weights_tree
        self._page_size = page_size
        self._table_width = table_width
        self._max_seqs = max_seqs
        self._num_drafts = num_drafts
        self._max_logprobs = max_logprobs
        self._compiler_options = None if compiler_options is None else dict(compiler_options)
        self._programs: dict[Kind, Program] = {}
        self._fields_of: dict[Kind, _Fields] = {}
        self._out_shardings = _out_shardings(cache_leaves)
        self.replicated = None if self._out_shardings is None else self._out_shardings[1]

    def __call__(self, kind: Kind) -> Program:
        """The compiled step of a kind."""
        if kind not in self._programs:
            options: dict[str, Any] = {} if self._out_shardings is None else {"out_shardings": self._out_shardings}
            function = self.function(kind)

            def counted(*operands: Any) -> tuple[Sampled, Array, list[Array]]:
                self.traces += 1  # Python runs this when JAX traces it
                return function(*operands)

            self._programs[kind] = jax.jit(
                counted, donate_argnums=(1, 2), compiler_options=self._compiler_options, **options
            )
        return self._programs[kind]

    def function(self, kind: Kind) -> Program:
        """The same, not compiled."""
        fields, run = self._fields(kind), self._decode if kind.repeats else self._mixed

        def step(
            weights: list[Array], cache: list[Array], last: Array, operand: Array
        ) -> tuple[Sampled, Array, list[Array]]:
            tree = jax.tree.unflatten(self.weights_tree, weights)
            sampled, last, new = run(
                kind, tree, jax.tree.unflatten(self._cache_tree, cache), last, fields.unpack(operand)
            )
            return sampled, last, jax.tree.leaves(new)

        return step

    # ---- operands

    def operand(self, kind: Kind, plan: Plan | None, groups: LayerGroups) -> np.ndarray:
        """The array of a step; without a plan, of one that holds no token."""
        chunks = [] if plan is None else plan.chunks
        generations = [chunk.generation for chunk in chunks]
        number = len(chunks)
        counts = np.fromiter((chunk.count for chunk in chunks), np.int32, number)
        rows = self._rows(kind)
        of_groups = groups.step(
            [g._sequence for g in generations],
            counts,
            num_tokens=kind.size * max(kind.repeats, 1),
            max_seqs=rows,
            max_pages=self._table_width,
        )
        values: dict[str, Any] = {_tables(group): of_groups[group].block_tables for group in self._groups}
        arrays = of_groups[0]
        if kind.repeats:
            kv_lens = np.zeros(rows, np.int32)
            kv_lens[:number] = arrays.kv_lens[:number] - counts + 1
            values |= {"kv_lens": kv_lens, "steps_left": counts, "rows": [g._row for g in generations]}
            values["tokens"] = [_source(g, g._computed) for g in generations]
        else:
            values |= {_slots(group): of_groups[group].slot_mapping for group in self._groups}
            values |= {name: getattr(arrays, name) for name in ("positions", "kv_lens", "cu_q_lens")}
            values["num_seqs"] = arrays.num_seqs.reshape(1)
            values["rows"] = [chunk.generation._row if chunk.samples else self._max_seqs for chunk in chunks]
            values["drafts"] = [len(chunk.drafts) for chunk in chunks]
            values["tokens"] = [token for chunk in chunks for token in _tokens(chunk)]
        if kind.samples:
            requests = [g.request for g in generations]
            values["temperature"] = [min(r.temperature, _LARGEST_FLOAT32) for r in requests]
            for name in ("top_k", "top_p", "min_p", "seed"):
                values[name] = [getattr(r, name) for r in requests]
        return self._fields(kind).pack(values)

    def _rows(self, kind: Kind) -> int:
        return kind.size if kind.repeats else self._max_seqs

    def _fields(self, kind: Kind) -> _Fields:
        if kind not in self._fields_of:
            self._fields_of[kind] = self._make_fields(kind)
        return self._fields_of[kind]

    def _make_fields(self, kind: Kind) -> _Fields:
        rows, int32 = self._rows(kind), np.int32
        tables = ((rows, self._table_width), int32, -1)
        fields: dict[str, tuple[tuple[int, ...], Any, float]] = {
            **dict.fromkeys(map(_tables, self._groups), tables),
            "kv_lens": ((rows,), int32, 0),
            "rows": ((rows,), int32, self._max_seqs),
            "tokens": ((kind.size,), int32, 0),
        }
        if kind.repeats:
            fields["steps_left"] = ((rows,), int32, 0)
        else:
            fields |= dict.fromkeys(("positions", *map(_slots, self._groups)), ((kind.size,), int32, 0))
            fields |= {"cu_q_lens": ((rows + 1,), int32, 0), "num_seqs": ((1,), int32, 0)}
            fields["drafts"] = ((rows,), int32, 0)
        if kind.samples:
            fields |= {"temperature": ((rows,), np.float32, 0), "top_k": ((rows,), int32, 0)}
            fields |= {"top_p": ((rows,), np.float32, 1), "min_p": ((rows,), np.float32, 0)}
            fields["seed"] = ((rows,), np.uint32, 0)
        return _Fields(fields)

    # ---- on the device

    def _mixed(
        self, kind: Kind, weights: Any, cache: Any, last: Array, x: dict[str, Array]
    ) -> tuple[Sampled, Array, Any]:
        """Chunks of prompts, single tokens, and tokens with drafts behind them."""
        common = {"num_seqs": x["num_seqs"][0], **{name: x[name] for name in ("positions", "kv_lens", "cu_q_lens")}}
        steps = tuple(
            StepMetadata(slot_mapping=x[_slots(group)], block_tables=x[_tables(group)], **common)
            for group in self._groups
        )
        hidden, cache = self._model.hidden(weights, cache, _known(x["tokens"], last), steps)
        # From the token in front of the first draft to the last one; a request with fewer drafts repeats its last row.
        back = jnp.maximum(x["drafts"][:, None] - jnp.arange(1 + self._num_drafts), 0)
        ends = jnp.maximum(x["cu_q_lens"][1:] - 1, 0)[:, None]
        sampled = self._sample(kind, weights, hidden[(ends - back).reshape(-1)], x["kv_lens"][:, None] - back, x)
        last = last.at[x["rows"]].set(sampled.tokens[:, 0], mode="drop")
        return sampled, last, cache

    def _decode(
        self, kind: Kind, weights: Any, cache: Any, last: Array, x: dict[str, Array]
    ) -> tuple[Sampled, Array, Any]:
        """One token per sequence, several times: each step takes the tokens that the one before it sampled."""

        def one(carry: tuple[Any, Array], index: Array | int) -> tuple[tuple[Any, Array], Sampled]:
            cache, tokens = carry
            is_live = index < x["steps_left"]
            kv_lens = jnp.where(is_live, x["kv_lens"] + index, 0)
            steps = tuple(StepMetadata.decode(x[_tables(group)], kv_lens, self._page_size) for group in self._groups)
            hidden, cache = self._model.hidden(weights, cache, tokens, steps)
            sampled = self._sample(kind, weights, hidden, kv_lens[:, None], x)
            return (cache, jnp.where(is_live, sampled.tokens[:, 0], tokens)), jax.tree.map(lambda y: y[:, 0], sampled)

        carry = (cache, _known(x["tokens"], last))
        if kind.repeats == 1:
            carry, sampled = one(carry, 0)
            sampled = jax.tree.map(lambda y: y[None], sampled)
        else:
            carry, sampled = jax.lax.scan(one, carry, jnp.arange(kind.repeats, dtype=jnp.int32))
        cache, tokens = carry
        return sampled, last.at[x["rows"]].set(tokens, mode="drop"), cache

    def _sample(self, kind: Kind, weights: Any, hidden: Array, lengths: Array, x: dict[str, Array]) -> Sampled:
        """The tokens `[B, n]` after hidden states `[B · n, ...]` whose sequences have `lengths [B, n]` tokens there."""
        logits = self._model.logits(weights, hidden).astype(jnp.float32)
        if kind.samples:
            each = {name: jnp.repeat(x[name], lengths.shape[1]) for name in _sampling_names()}
            tokens = sample(logits, lengths.reshape(-1), Sampling(**each))
        else:
            tokens = greedy(logits)
        logprobs = log_probabilities(logits, tokens, self._max_logprobs) if kind.logprobs else None
        return jax.tree.map(lambda y: y.reshape(*lengths.shape, *y.shape[1:]), Sampled(tokens, logprobs))


class _Fields:
    """Named arrays of 32-bit numbers in one vector.

    Args:
      fields: shape, dtype, and the number that pads what is given.
    """

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], Any, float]]):
        self._fields = fields
        self._blank = np.concatenate(
            [np.full(math.prod(shape), fill, dtype).view(np.int32) for shape, dtype, fill in fields.values()]
        )

    def pack(self, values: Mapping[str, Any]) -> np.ndarray:
        """int32 `[n]`. Values are flat and may be shorter than their fields."""
        vector, start = self._blank.copy(), 0
        for name, (shape, dtype, _) in self._fields.items():
            value = values[name]
            value = value.reshape(-1) if isinstance(value, np.ndarray) else value
            vector[start : start + len(value)].view(dtype)[:] = value
            start += math.prod(shape)
        return vector

    def unpack(self, vector: Array) -> dict[str, Array]:
        """The arrays, traced."""
        values, start = {}, 0
        for name, (shape, dtype, _) in self._fields.items():
            flat = jax.lax.slice_in_dim(vector, start, start + math.prod(shape))
            values[name] = jax.lax.bitcast_convert_type(flat, dtype).reshape(shape)
            start += math.prod(shape)
        return values


def _tables(group: int) -> str:
    return f"block_tables of group {group}"


def _slots(group: int) -> str:
    return f"slot_mapping of group {group}"


def _sampling_names() -> list[str]:
    return [field.name for field in dataclasses.fields(Sampling)]


def _source(generation: Generation, index: int) -> int:
    """Token `index` of a request; if only the device knows it, −1 − the row that it is the last token of."""
    return generation.tokens[index] if index < len(generation.tokens) else -1 - generation._row


def _tokens(chunk: Any) -> list[int]:
    generation, start = chunk.generation, chunk.generation._computed
    if chunk.drafts:
        return [_source(generation, start), *chunk.drafts]
    if chunk.count == 1:
        return [_source(generation, start)]
    return generation.tokens[start : start + chunk.count]


def _known(tokens: Array, last: Array) -> Array:
    """Token ids, those included that only the device knows: see `_source`."""
    return jnp.where(tokens >= 0, tokens, last[jnp.maximum(-1 - tokens, 0)])


def _out_shardings(cache: list[Array]) -> tuple[Any, Any, list[Any]] | None:
    """On a mesh: sampled tokens on every device, the cache as it came in, so that it can be updated in place."""
    shardings = [leaf.sharding for leaf in cache]
    named = [sharding for sharding in shardings if isinstance(sharding, NamedSharding)]
    if not named:
        return None
    everywhere = NamedSharding(named[0].mesh, PartitionSpec())
    return everywhere, everywhere, [s if isinstance(s, NamedSharding) else everywhere for s in shardings]
