"""The description of one call of attention."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One call. Lengths may be out of range on purpose; `cu_q_lens` follows from `q_lens` unless given."""

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    function: Literal["paged_attention", "ragged_paged_attention"] = "ragged_paged_attention"
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    value_dim: int | None = None  # None: as head_dim
    values_in_keys: bool = False  # they are the first numbers of each key, and there is no pool of values
    page_size: int = 16
    max_pages: int = 4  # M: columns of the block table
    dtype: str = "f32"
    page_dtype: str | None = None  # None: as dtype
    rows: int | None = None  # T, if more than the sum of q_lens
    num_seqs: int | None = None
    cu_q_lens: tuple[int, ...] | None = None
    bad_ids: tuple[tuple[int, int, int], ...] = ()  # (sequence, column, id) that stand in used entries
    shared_pages: int = 0  # leading pages that every sequence shares with the first
    sinks: bool = False
    sink_offset: float = 0.0  # added to standard normal sinks
    q_factor: float = 1.0  # multiplies standard normal queries
    rising: float = 0.0  # how much higher, about, the scores of each 64 keys are than those of the 64 before
    k_scale: float | tuple[float, ...] | None = None
    v_scale: float | tuple[float, ...] | None = None
    token_scales: tuple[bool, bool] = (False, False)  # whether keys and values have a scale per token and head
    keywords: dict[str, Any] = field(default_factory=dict)  # the static ones
    # The layout of the pools that engines get: [P, S, K, H] each; or, by `jax_paged_attn.compat`, one [P, S, 2K, H] for
    # ragged calls, and [K, P, S, H] each for decode with scale 1.
    layout: Literal["split", "interleaved", "head_major"] = "split"
    padding_heads: int = 0  # of an interleaved pool: garbage behind the heads of each token
    why: str = field(default="", compare=False, repr=False)  # the reason why the suite has it

    def __str__(self) -> str:
        return self.name

    def vary(self, name: str, why: str, **changes: Any) -> Case:
        """This case with other fields, under another name and for another reason."""
        return replace(self, name=name, why=why, **changes)
