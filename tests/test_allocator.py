"""PageAllocator: each guarantee of its docstrings by itself. Random histories are in test_allocator_state.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from allocators import SHARE_MODES, every_use, raises_unchanged, same_arrays, snapshot

import jax_paged_attn as jpa
from jax_paged_attn._allocator import (
    AllocatorStats,
    DoubleFree,
    ForeignPage,
    OutOfPages,
    PageAllocator,
    PageAllocatorError,
    Sequence,
)


def written(allocator: PageAllocator, tokens: Any, salt: Any = None) -> Sequence:
    """A sequence whose tokens are all in the cache."""
    sequence = allocator.allocate(tokens, salt)
    allocator.mark_written(sequence.id, allocator.length(sequence.id))
    return sequence


# ---- sharing


def test_a_known_prefix_is_shared_but_never_the_last_token() -> None:
    allocator = PageAllocator(16, 4, share="allocated")
    first = allocator.allocate(range(12))
    assert (first.cached_len, len(first.pages)) == (0, 3)

    same = allocator.allocate(range(12))
    assert same.cached_len == 8  # the page of token 11 has to be computed again for its logits
    assert same.pages[:2] == first.pages[:2]
    assert same.pages[2] != first.pages[2]

    longer = allocator.allocate(range(13))
    assert (longer.cached_len, longer.pages[:3]) == (12, first.pages)
    assert allocator.allocate([0, 1, 2, 3, 9, 9, 9, 9, 8, 9]).cached_len == 4
    assert allocator.allocate([4, 5, 6, 7, 8]).cached_len == 0  # the same page behind another prefix
    assert allocator.pages_in_use == 3 + 1 + 1 + 2 + 2


def test_an_empty_prompt_owns_nothing_until_it_grows() -> None:
    allocator = PageAllocator(4, 2, share="allocated")
    empty = allocator.allocate([], salt="s")
    assert (empty.pages, empty.cached_len, allocator.length(empty.id)) == ((), 0, 0)
    assert allocator.block_tables([empty.id], 2).tolist() == [[-1, -1]]
    slots, copies = allocator.append(empty.id, "ab")
    page = allocator.pages(empty.id)[0]
    assert (slots.tolist(), copies) == ([page * 2, page * 2 + 1], [])
    assert allocator.allocate("abc", salt="s").pages[0] == page


def test_salts_keep_tenants_apart() -> None:
    allocator = PageAllocator(16, 2, share="allocated")
    mine = allocator.allocate("abcde", salt="mine")
    assert allocator.allocate("abcde", salt="yours").cached_len == 0
    assert allocator.allocate("abcde").cached_len == 0
    again = allocator.allocate("abcde", salt="mine")
    assert (again.cached_len, again.pages[:2]) == (4, mine.pages[:2])


def test_equal_hashes_do_not_share() -> None:
    @dataclass(frozen=True)
    class Colliding:
        name: str

        def __hash__(self) -> int:
            return 7

    allocator = PageAllocator(8, 2, share="allocated")
    a, b = Colliding("a"), Colliding("b")
    first = allocator.allocate([a, a, a], salt=a)
    assert hash((b, b, b)) == hash((a, a, a))
    assert allocator.allocate([b, b, b], salt=a).cached_len == 0
    assert allocator.allocate([a, a, a], salt=b).cached_len == 0
    assert allocator.allocate([Colliding("a")] * 3, salt=Colliding("a")).pages[0] == first.pages[0]


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_arrays_and_lists_of_the_same_tokens_share(dtype: Any) -> None:
    allocator = PageAllocator(8, 2, share="allocated")
    allocator.allocate(np.arange(5, dtype=dtype))
    assert allocator.allocate([0, 1, 2, 3, 4]).cached_len == 4
    assert allocator.allocate(bytes([0, 1, 2])).cached_len == 2


def test_appended_tokens_share_and_appended_numbers_do_not() -> None:
    allocator = PageAllocator(16, 2, share="allocated")
    told = allocator.allocate("ab", salt="told")
    allocator.append(told.id, "cd")
    assert allocator.allocate("abcde", salt="told").cached_len == 4

    counted = allocator.allocate("ab", salt="counted")
    allocator.append(counted.id, 1)
    allocator.append(counted.id, "de")  # the page before it is unknown, so this one is too
    assert allocator.allocate("abcde", salt="counted").cached_len == 2
    assert allocator.allocate("abdex", salt="counted").cached_len == 2


def test_written_mode_shares_only_what_was_marked() -> None:
    allocator = PageAllocator(32, 2, share="written")
    first = allocator.allocate("abcdef")
    assert allocator.allocate("abcdefg").cached_len == 0
    allocator.mark_written(first.id, 3)
    assert allocator.allocate("abcdefg").cached_len == 2
    allocator.mark_written(first.id, 2)  # less than before: nothing changes
    assert allocator.fork(first.id).cached_len == 3
    allocator.mark_written(first.id, 6)
    assert allocator.allocate("abcdefg").cached_len == 6

    cancelled = allocator.allocate("vwxyz")
    allocator.free(cancelled.id)
    assert allocator.allocate("vwxyz").cached_len == 0


def test_the_prefix_of_a_live_sequence_is_found_though_its_twin_is_gone() -> None:
    allocator = PageAllocator(4, 2, share="written")
    one, two = allocator.allocate("abc"), allocator.allocate("abc")
    allocator.mark_written(one.id, 2)
    allocator.mark_written(two.id, 2)
    allocator.free(one.id)
    assert allocator.allocate("abz").pages[0] == two.pages[0]
    assert allocator.num_free == 1  # one's page with "ab" was of no more use and went blank
    allocator.allocate("x")
    assert allocator.num_free == 0
    raises_unchanged(allocator, OutOfPages, "1 needed, 0 free", lambda: allocator.allocate("aby"))


def test_a_free_page_goes_blank_when_a_live_one_holds_the_same() -> None:
    allocator = PageAllocator(4, 2, share="written")
    gone, live, other = allocator.allocate("abx"), allocator.allocate("ab"), allocator.allocate("c")
    allocator.free(other.id)
    allocator.mark_written(gone.id, 2)
    allocator.free(gone.id)
    allocator.mark_written(live.id, 2)
    assert allocator.allocate("aby").pages[0] == live.pages[0]
    assert allocator.num_free == 2
    assert allocator.stats.pages_cached == 0


# ---- forks


def test_copy_on_write_of_a_shared_last_page() -> None:
    allocator = PageAllocator(8, 4, share="allocated")
    parent = allocator.allocate("abcdef")
    child = allocator.fork(parent.id)
    assert (child.pages, child.cached_len, allocator.pages_in_use) == (parent.pages, 6, 2)

    slots, copies = allocator.append(child.id, 1)
    last = allocator.pages(child.id)[-1]
    assert copies == [(parent.pages[-1], last)]
    assert last not in parent.pages
    assert slots.tolist() == [last * 4 + 2]

    slots, copies = allocator.append(parent.id, 3)  # alone in its last page now
    assert copies == []
    assert slots.tolist()[:2] == [parent.pages[-1] * 4 + 2, parent.pages[-1] * 4 + 3]
    assert allocator.pages(parent.id)[:2] == parent.pages


def test_a_fork_of_whole_pages_copies_nothing() -> None:
    allocator = PageAllocator(8, 4, share="allocated")
    parent = allocator.allocate("abcd")
    child = allocator.fork(parent.id)
    assert allocator.append(child.id, 1)[1] == []
    assert allocator.append(parent.id, 0)[1] == []
    assert allocator.pages(child.id)[0] == parent.pages[0]


def test_forks_are_found_by_their_own_tokens() -> None:
    allocator = PageAllocator(8, 2, share="allocated")
    parent = allocator.allocate("abc")
    child = allocator.fork(parent.id)
    allocator.append(parent.id, "d")
    allocator.append(child.id, "e")
    assert allocator.allocate("abcdx").pages[1] == allocator.pages(parent.id)[1]
    assert allocator.allocate("abcex").pages[1] == allocator.pages(child.id)[1]
    assert allocator.allocate("abcxx").cached_len == 2


# ---- reuse


def test_blank_pages_go_first_then_the_least_recently_used_tails_before_prefixes() -> None:
    allocator = PageAllocator(4, 1)
    ab = written(allocator, "ab")
    c = written(allocator, "c")
    allocator.free(ab.id)
    allocator.free(c.id)
    cached = allocator.cached_pages
    assert cached == (ab.pages[1], ab.pages[0], c.pages[0])
    takes = [written(allocator, letter).pages[0] for letter in "wxyz"]
    assert takes == [3, *cached]
    assert allocator.cached_pages == ()


def test_finding_a_page_makes_it_recently_used() -> None:
    allocator = PageAllocator(3, 1)
    for prompt in ("ab", "c"):
        allocator.free(written(allocator, prompt).id)
    ad = written(allocator, "ad")  # finds a, forgets b
    allocator.free(ad.id)
    takes = [written(allocator, letter).pages[0] for letter in "xyz"]
    assert takes[1:] == [ad.pages[1], ad.pages[0]]


def test_freed_pages_are_found_again() -> None:
    allocator = PageAllocator(3, 2)
    first = written(allocator, "abcde")
    allocator.free(first.id)
    assert allocator.num_free == 3
    again = written(allocator, "abcdx")
    assert (again.cached_len, again.pages[:2]) == (4, first.pages[:2])


def test_a_forgotten_page_is_not_found() -> None:
    allocator = PageAllocator(3, 1)
    allocator.free(written(allocator, "abc").id)
    allocator.free(written(allocator, "xy").id)  # takes the pages of c and b, that of a stays
    assert written(allocator, "abc").cached_len == 1


ALLOCATOR = {str(path) for path in Path(jpa.__file__).parent.glob("_allocator*.py")}


def operations(num_pages: int) -> tuple[int, set[str]]:
    """Lines run and C functions called by the allocator during a fixed history in a used pool of `num_pages`."""
    allocator = PageAllocator(num_pages, 2)
    allocator.free(written(allocator, range(1000, 1000 + 2 * num_pages)).id)  # no page is blank: each take evicts
    lines, functions = 0, set[str]()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in ALLOCATOR:
            return None
        lines += event == "line"  # also each time a loop comes back to its line
        return trace

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "c_call" and frame.f_code.co_filename in ALLOCATOR:
            functions.add(argument.__qualname__)

    tracing, profiling = sys.gettrace(), sys.getprofile()
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        first = written(allocator, [1, 2, 3, 4, 5])
        second = written(allocator, [1, 2, 3, 4, 6])
        third = allocator.fork(second.id)
        for _ in range(4):
            allocator.append(third.id, [7])
            allocator.append(second.id, 1)
        for sequence in (first, second, third):
            allocator.free(sequence.id)
        allocator.free(written(allocator, [1, 2, 3, 4, 7]).id)
    finally:
        sys.setprofile(profiling)
        sys.settrace(tracing)
    return lines, functions


def test_the_work_does_not_grow_with_the_pool() -> None:
    small, functions = operations(16)
    large, _ = operations(4096)
    assert small == large > 100
    assert "OrderedDict.popitem" in functions  # C functions are seen, and none of those that search a container
    assert functions.isdisjoint({f"list.{name}" for name in ("index", "remove", "insert", "count", "sort", "copy")})
    assert functions.isdisjoint({"sorted", "max", "dict.copy", "OrderedDict.copy"})


def test_groups_of_layers_agree_on_a_prefix() -> None:
    full, window = PageAllocator(16, 2), PageAllocator(8, 2, window=3)
    written(full, range(8))
    s = window.allocate(range(12))
    window.mark_written(s.id, 4)
    assert window.find_prefix(range(12)) == 4
    window.mark_written(s.id, 12)
    assert (full.find_prefix(range(12)), window.find_prefix(range(12))) == (8, 10)
    assert window.find_prefix(range(12), max_cached_len=9) == 8
    assert window.allocate(range(12), max_cached_len=3).cached_len == 2
    assert full.find_prefix(range(12), salt="other") == full.find_prefix(range(12), max_cached_len=1) == 0


# ---- only what was computed is found


def test_a_sampled_token_that_never_ran_is_not_found() -> None:
    """Turn 2 of a chat has the last sampled token of turn 1, which ended the turn before it went through the model."""
    for share in SHARE_MODES:
        allocator = PageAllocator(8, 4, share=share)
        turn = written(allocator, [1, 2, 3])
        allocator.append(turn.id, [4])
        allocator.free(turn.id)
        assert allocator.allocate([1, 2, 3, 4, 5]).cached_len == 0
    assert "share='written'" in repr(PageAllocator(1, 1))


def test_allocated_mode_keeps_what_was_marked_and_nothing_else() -> None:
    allocator = PageAllocator(8, 2, share="allocated")
    first = allocator.allocate("abcdef")
    second = allocator.allocate("abcdefg")
    assert second.cached_len == 6  # at once, as long as the first one lives
    allocator.mark_written(first.id, 5)
    allocator.free(first.id)
    allocator.free(second.id)
    assert allocator.allocate("abcdefg").cached_len == 4


# ---- truncation


@pytest.mark.parametrize("share", SHARE_MODES)
@pytest.mark.parametrize("mark", [6, 8])
def test_rejected_drafts_are_not_found_and_accepted_tokens_are(share: Any, mark: int) -> None:
    allocator = PageAllocator(8, 4, share=share)
    a = written(allocator, [1, 2, 3, 4, 5, 6]).id
    drafts, _ = allocator.append(a, [90, 91])
    allocator.mark_written(a, mark)
    allocator.truncate(a, 6)
    assert allocator.length(a) == 6
    slots, copies = allocator.append(a, [7, 8])
    assert (slots.tolist(), copies) == (drafts.tolist(), [])
    allocator.mark_written(a, 8)
    assert allocator.allocate([1, 2, 3, 4, 5, 6, 90, 91, 92]).cached_len == 4
    assert allocator.allocate([1, 2, 3, 4, 5, 6, 7, 8, 9]).cached_len == 8


def test_truncation_gives_back_empty_pages_and_the_next_tokens_land_behind_what_is_left() -> None:
    allocator = PageAllocator(16, 4)
    s = written(allocator, [1, 2, 3, 4, 5, 6])
    allocator.append(s.id, [10, 11, 12, 13])
    assert len(allocator.pages(s.id)) == 3
    allocator.truncate(s.id, 8)
    allocator.mark_written(s.id, 8)
    assert (allocator.length(s.id), allocator.pages(s.id), allocator.num_free) == (8, s.pages, 14)
    allocator.append(s.id, [20, 21, 30, 31])
    allocator.mark_written(s.id, 12)
    assert allocator.allocate([1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 30, 31, 0]).cached_len == 8
    assert allocator.allocate([1, 2, 3, 4, 5, 6, 10, 11, 20, 21, 30, 31, 0]).cached_len == 12


def test_truncating_unknown_tokens_away_makes_a_sequence_shareable_again() -> None:
    allocator = PageAllocator(16, 4)
    s = written(allocator, [1, 2, 3, 4, 5, 6])
    allocator.append(s.id, 4)
    allocator.mark_written(s.id, 10)
    allocator.truncate(s.id, 7)  # one unknown token stays
    allocator.append(s.id, [10])
    allocator.mark_written(s.id, 8)
    assert allocator.allocate([1, 2, 3, 4, 5, 6, 9, 10, 20]).cached_len == 4
    allocator.truncate(s.id, 6)
    allocator.append(s.id, [10, 11])
    assert allocator.allocate([1, 2, 3, 4, 5, 6, 10, 11, 20]).cached_len == 4  # dropped tokens have to be written again
    allocator.mark_written(s.id, 8)
    assert allocator.allocate([1, 2, 3, 4, 5, 6, 10, 11, 20]).cached_len == 8


def test_truncation_into_a_shared_page_copies_it_before_the_next_token() -> None:
    allocator = PageAllocator(16, 4)
    a = written(allocator, "abcdefgh")
    found = allocator.allocate("abcdefghi")
    fork = allocator.fork(a.id)
    allocator.truncate(a.id, 6)
    assert allocator.allocate("abcdefghx").cached_len == 8  # two others hold it
    allocator.truncate(fork.id, 5)
    (slot,), (copy,) = allocator.append(a.id, "x")
    assert copy == (found.pages[1], allocator.pages(a.id)[1])
    assert slot == copy[1] * 4 + 2
    assert allocator.append(fork.id, "y")[1] == [(found.pages[1], allocator.pages(fork.id)[1])]


@pytest.mark.parametrize("batch", [False, True])
def test_a_truncated_owner_that_outlives_the_others_makes_its_page_unfindable_before_it_writes(batch: bool) -> None:
    allocator = PageAllocator(16, 4)
    a = written(allocator, "abcdefgh")
    fork = allocator.fork(a.id)
    allocator.truncate(a.id, 6)
    allocator.free(fork.id)
    probe = allocator.allocate("abcdefgh!")
    assert probe.cached_len == 8  # the page still holds all eight tokens
    allocator.free(probe.id)
    _, copies = allocator.append_batch([a.id], ["x"]) if batch else allocator.append(a.id, "x")
    assert len(copies) == 0
    assert allocator.allocate("abcdefgh!").cached_len == 4


def test_a_page_that_every_owner_truncated_is_not_found() -> None:
    allocator = PageAllocator(16, 4)
    a = written(allocator, "abcdefgh")
    fork = allocator.fork(a.id)
    allocator.truncate(a.id, 6)
    probe = allocator.allocate("abcdefgh!")
    assert probe.cached_len == 8
    allocator.free(probe.id)
    allocator.truncate(fork.id, 4)
    assert allocator.allocate("abcdefgh!").cached_len == 4


def test_truncation_below_what_was_found_in_the_cache() -> None:
    allocator = PageAllocator(16, 2)
    allocator.free(written(allocator, "abcdef").id)
    s = allocator.allocate("abcdefg")
    allocator.truncate(s.id, 3)
    slots, copies = allocator.append(s.id, "xyz")
    assert (copies, slots[0]) == ([], s.pages[1] * 2 + 1)
    other = allocator.allocate("abcdefg")
    assert other.cached_len == 2
    allocator.free(other.id)
    allocator.truncate(s.id, 0)
    assert allocator.pages(s.id) == ()
    assert allocator.allocate("abcdefg").cached_len == 0
    allocator.append(s.id, "ab")
    allocator.mark_written(s.id, 2)
    assert allocator.allocate("abc").cached_len == 2


def test_a_prefix_with_a_gap_is_found_up_to_the_gap_and_wholly_once_it_is_filled() -> None:
    allocator = PageAllocator(16, 2)
    allocator.free(written(allocator, "abcdef").id)
    s = allocator.allocate("abcdx")
    allocator.truncate(s.id, 3)  # the page of c and d is not findable any more, that of e and f is
    assert allocator.find_prefix("abcdefg") == 2
    written(allocator, "abcd")
    assert allocator.find_prefix("abcdefg") == 6


# ---- tokens told later


@pytest.mark.parametrize("share", SHARE_MODES)
@pytest.mark.parametrize("window", [None, 20])  # longer than the sequences, so no page goes before it is told
@pytest.mark.parametrize("parts", [[7], [1, 6], [3, 1, 3], [1] * 7])
@pytest.mark.parametrize("form", [list, np.array])
def test_telling_later_equals_giving_the_values_at_once(share: Any, window: Any, parts: list[int], form: Any) -> None:
    prompts, sampled = [[1, 2, 3], [1, 2, 3, 9], []], [[*range(10 * i, 10 * i + 7)] for i in range(1, 4)]
    early, late = (PageAllocator(16, 2, share=share, window=window) for _ in range(2))
    for allocator in (early, late):
        ids = [allocator.allocate(prompt).id for prompt in prompts]
        allocator.append_batch(ids, form(sampled) if allocator is early else [7] * 3)
        allocator.mark_written_batch(ids, [9, 2, 7])  # all of one, some of another, just a full page of the last
        ends = np.cumsum(parts).tolist() if allocator is late else []
        for begin, end in zip([0, *ends], ends, strict=False):
            allocator.tell_batch(form(ids), form([tokens[begin:end] for tokens in sampled]))
    for id in (0, 1, 2, None):
        for prompt, tokens in zip(prompts, sampled, strict=True):
            for n in range(13):
                prefix = [*prompt, *tokens, 0, 0][:n]
                assert late.find_prefix(prefix) == early.find_prefix(prefix)
        assert late.stats == early.stats
        if id is not None:
            early.free(id)
            late.free(id)
    assert late.stats.pages_cached == 4 + 0 + 3


@pytest.mark.parametrize("share", SHARE_MODES)
def test_values_behind_unknown_tokens_are_told_again(share: Any) -> None:
    allocator = PageAllocator(16, 2, share=share)
    id = written(allocator, "ab").id
    allocator.append(id, 1)
    allocator.append(id, "def")
    allocator.mark_written(id, 6)
    allocator.tell_batch([id], ["c"])
    assert allocator.find_prefix("abcdef!") == 2
    allocator.tell_batch([id], ["d"])
    assert allocator.find_prefix("abcdef!") == 4
    allocator.tell_batch([id], ["ef"])
    allocator.append(id, "gh")  # all is known, so values count at once
    allocator.mark_written(id, 8)
    assert allocator.find_prefix("abcdefgh!") == 8


def test_told_pages_that_nobody_marked_do_not_outlive_their_owners() -> None:
    allocator = PageAllocator(16, 2, share="allocated")
    found = [allocator.allocate("abc").id, allocator.allocate("abd").id]
    allocator.append_batch(found, [3, 3])
    fork = allocator.fork(found[0]).id
    allocator.tell_batch([*found, fork], ["xyz", "uvw", "xyz"])
    assert (allocator.find_prefix("abcxyz!"), allocator.find_prefix("abduvw!")) == (6, 6)
    allocator.mark_written(found[1], 5)
    for id in (fork, *found):
        allocator.free(id)
    assert (allocator.find_prefix("abcxyz!"), allocator.find_prefix("abduvw!")) == (2, 4)


@pytest.mark.parametrize("share", SHARE_MODES)
def test_a_mark_of_a_fork_counts_like_one_of_its_original(share: Any) -> None:
    allocator = PageAllocator(16, 2, share=share)
    a = allocator.allocate("abcd")
    fork = allocator.fork(a.id)
    allocator.mark_written_batch([fork.id], [4])
    allocator.free(a.id)
    allocator.free(fork.id)
    assert allocator.find_prefix("abcd!") == 4


@pytest.mark.parametrize("share", SHARE_MODES)
def test_pages_given_back_before_their_tokens_are_told(share: Any) -> None:
    allocator = PageAllocator(8, 2, share=share, window=3)
    id = allocator.allocate("a").id
    allocator.append(id, 9)
    allocator.mark_written(id, 10)
    assert allocator.pages(id)[:3] == (-1, -1, -1)
    assert allocator.stats == AllocatorStats(2, 0, 6, hits=0, misses=1, evictions=0, tokens_found=0)
    allocator.tell_batch([id], ["bcde"])
    assert allocator.find_prefix("abcdefghij!") == 0
    allocator.tell_batch([id], ["fghij"])
    assert allocator.find_prefix("abcdefghij!") == 10  # though the pages in front are gone
    assert allocator.find_prefix("abcdefgh!") == 0
    allocator.free(id)
    again = allocator.allocate("abcdefghij!")
    assert (again.cached_len, again.pages[:3]) == (10, (-1, -1, -1))


@pytest.mark.parametrize("share", SHARE_MODES)
def test_what_is_told_after_a_reset_is_not_found(share: Any) -> None:
    allocator = PageAllocator(16, 2, share=share)
    id, empty = written(allocator, "ab").id, allocator.allocate([]).id
    allocator.append(id, 4)
    allocator.mark_written(id, 6)
    allocator.reset_prefix_cache()
    fork = allocator.fork(id).id
    allocator.tell_batch([id, fork], ["cdef", "abcdef"])  # as before the reset; as if nothing were known
    allocator.truncate(fork, 2)
    allocator.append_batch([fork], [2])
    allocator.tell_batch([fork], ["ab"])
    assert [allocator.find_prefix(prompt) for prompt in ("abcdef!", "cdef!", "abab!")] == [0, 0, 0]
    raises_unchanged(
        allocator, ValueError, "tokens: expected at most 6, .* got 7", lambda: allocator.tell_batch([id], ["abcdefg"])
    )
    allocator.truncate(id, 0)
    for restarted, tokens in ((id, "xy"), (empty, "uv")):
        allocator.append(restarted, 2)
        allocator.mark_written(restarted, 2)
        allocator.tell_batch([restarted], [tokens])
        assert allocator.find_prefix([*tokens, "!"]) == 2


def test_a_page_is_found_by_what_was_told_last() -> None:
    allocator = PageAllocator(4, 2)
    a = allocator.allocate("a").id
    allocator.append(a, 1)
    allocator.mark_written(a, 2)
    b = allocator.fork(a).id
    allocator.tell_batch([a, b], ["x", "y"])  # the same token of the same page: one of the two is wrong
    assert (allocator.find_prefix("ax!"), allocator.find_prefix("ay!")) == (0, 2)
    allocator.free(a)
    allocator.free(b)
    assert allocator.stats == AllocatorStats(0, 1, 3, hits=0, misses=1, evictions=0, tokens_found=0)
    allocator.allocate(range(8))
    assert (allocator.find_prefix("ax!"), allocator.find_prefix("ay!")) == (0, 0)


@pytest.mark.parametrize("share", SHARE_MODES)
def test_bad_tellings(share: Any) -> None:
    allocator: Any = PageAllocator(8, 2, share=share)
    a, b, gone = (allocator.allocate(prompt).id for prompt in ("abc", "xy", "z"))
    allocator.append_batch([a, b], [2, 1])
    allocator.mark_written_batch([a, b], [5, 3])
    allocator.free(gone)
    number = "tokens: expected the tokens of each sequence, got their number"
    calls: list[tuple[type[Exception], str, Any, Any]] = [
        (ValueError, "tokens: expected at most 1, .* sequence 1 that are unknown, got 2", [a, b], ["de", "zz"]),
        (ValueError, "tokens: expected at most 1, .* sequence 1 .* got 2", [a, b], np.ones((2, 2), int)),
        (TypeError, number, [a, b], [2, 1]),
        (TypeError, number, [a, b], np.array([2, 1])),
        (TypeError, number, [a, b], [["d"], 1]),
        (TypeError, r"tokens: .*, got int", [a], 1),
        (TypeError, r"tokens: .*, got str", [a], "d"),
        (TypeError, r"tokens\[1\]: expected an iterable of tokens, got float", [a, b], [["d"], 1.0]),
        (TypeError, "tokens: expected hashable", [a, b], [["d"], [[]]]),
        (ValueError, r"tokens: .* got float64\[1, 1\]", [a], np.ones((1, 1))),
        (ValueError, "tokens: expected 2, one for each of ids, got 1", [a, b], [["d"]]),
        (ValueError, "tokens: expected 0, one for each of ids, got 1", [], [["d"]]),
        (ValueError, "ids: expected each sequence once, got sequence 0 twice", [a, a], ["d", "e"]),
        (TypeError, "ids: expected a list of integers, got int", a, ["d"]),
        (TypeError, r"ids\[0\]: expected an integer, got bool", [True], ["d"]),
        (DoubleFree, "sequence 2 was freed", [a, gone], ["d", ""]),
        (ForeignPage, "sequence 3 is not", [a, 3], ["d", ""]),
    ]
    for error, match, ids, tokens in calls:
        raises_unchanged(allocator, error, match, lambda ids=ids, tokens=tokens: allocator.tell_batch(ids, tokens))
    before = snapshot(allocator)
    for ids, tokens in (([], []), ([], np.empty((0, 1), int)), ([a, b], [[], []]), ([a, b], np.empty((2, 0), int))):
        assert allocator.tell_batch(ids, tokens) is None
    assert snapshot(allocator) == before


# ---- batches


def test_a_step_of_a_batch() -> None:
    allocator = PageAllocator(16, 4)
    a, b = written(allocator, "abc"), allocator.allocate("vwxyz")
    fork = allocator.fork(a.id)
    slots, copies = allocator.append_batch([a.id, b.id, fork.id], [2, "0", []])
    page = allocator.pages(a.id)
    assert (slots.tolist(), slots.dtype) == ([page[0] * 4 + 3, page[1] * 4, b.pages[1] * 4 + 1], np.int32)
    assert (copies.tolist(), copies.dtype) == ([[fork.pages[0], page[0]]], np.int32)

    arrays = allocator.step([b.id, a.id], [5, 2], num_tokens=9, max_seqs=3, max_pages=4)
    b_slots, a_slots = allocator.slots(b.id, 0, 5), allocator.slots(a.id, 3, 5)
    assert arrays.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 0, 0]
    assert arrays.slot_mapping.tolist() == [*b_slots, *a_slots, -1, -1]
    assert arrays.block_tables.tolist() == [[*b.pages, -1, -1], [*page, -1, -1], [-1] * 4]
    assert arrays.kv_lens.tolist() == [5, 5, 0]
    assert arrays.cu_q_lens.tolist() == [0, 5, 7, 7]
    assert (arrays.num_seqs.shape, int(arrays.num_seqs)) == ((), 2)
    assert {getattr(arrays, name).dtype for name in vars(arrays)} == {np.dtype(np.int32)}

    allocator.mark_written_batch([a.id, b.id], [5, 5])
    assert allocator.allocate("vwxy!").cached_len == 4
    empty = allocator.step([], [], num_tokens=2, max_seqs=1, max_pages=0)
    assert (empty.slot_mapping.tolist(), empty.cu_q_lens.tolist()) == ([-1, -1], [0, 0])


def test_a_batch_of_empty_sequences() -> None:
    allocator = PageAllocator(4, 2)
    ids = [allocator.allocate([]).id for _ in range(2)]
    assert len(allocator.append_batch(ids, [0, 0])[0]) == 0
    arrays = allocator.step(ids, [0, 0], num_tokens=1, max_seqs=2, max_pages=1)
    assert (arrays.block_tables.tolist(), arrays.kv_lens.tolist()) == ([[-1], [-1]], [0, 0])
    assert allocator.append_batch(ids, [1, 2])[0].tolist() == [0, 2, 3]


@pytest.mark.parametrize("share", SHARE_MODES)
@pytest.mark.parametrize(
    "form", [list, tuple, np.array, iter, lambda x: np.array(x, np.uint16), lambda x: map(np.int64, x)]
)
def test_batches_take_lists_and_arrays(form: Any, share: Any) -> None:
    allocator = PageAllocator(16, 2, share=share)
    ids = [allocator.allocate([i]).id for i in range(3)]
    allocator.append_batch(form(ids), form([1, 0, 2]))
    assert [allocator.length(id) for id in ids] == [2, 1, 3]
    allocator.append_batch(form(ids), np.array([[7, 8]] * 3, np.int32))
    allocator.mark_written_batch(form(ids), form([4, 2, 0]))
    assert allocator.allocate([1, 7, 0]).cached_len == 2
    assert allocator.step(form(ids), form([0, 1, 5]), num_tokens=6, max_seqs=3, max_pages=4).kv_lens.tolist() == [
        4,
        2 + 1,
        5,
    ]
    assert allocator.block_tables(form(ids), 4).shape == (3, 4)


def test_forks_that_append_in_one_batch_copy_all_but_one() -> None:
    allocator = PageAllocator(4, 2)
    a = allocator.allocate("a")
    ids = [a.id, allocator.fork(a.id).id, allocator.fork(a.id).id]
    slots, copies = allocator.append_batch(ids, ["x", "y", "z"])
    assert [source for source, _ in copies.tolist()] == [a.pages[0]] * 2
    assert len({int(slot) for slot in slots}) == 3
    assert allocator.pages(ids[2]) == a.pages  # the last owner keeps it
    assert allocator.num_free == 1


def test_a_step_is_made_into_the_metadata_of_the_layers() -> None:
    nnx = pytest.importorskip("jax_paged_attn.nnx", exc_type=ImportError)
    allocator = jpa.PageAllocator(8, 4)
    id = allocator.allocate([1, 2, 3]).id
    arrays = allocator.step([id], [3], num_tokens=4, max_seqs=2, max_pages=2)
    assert isinstance(arrays, jpa.StepArrays)
    assert same_arrays(nnx.StepMetadata.from_arrays(arrays), arrays)


# ---- windows


def test_pages_in_front_of_the_window_are_given_back_when_written() -> None:
    allocator = PageAllocator(16, 4, window=6)
    s = allocator.allocate(range(13))
    assert allocator.pages_in_use == 4
    allocator.mark_written(s.id, 9)  # token 9 sees 4 … 9
    assert allocator.pages(s.id) == s.pages
    allocator.mark_written_batch([s.id], [10])
    assert allocator.pages(s.id) == (-1, *s.pages[1:])
    assert allocator.block_tables([s.id], 5).tolist() == [[-1, *s.pages[1:], -1]]
    assert allocator.slots(s.id, 2, 5).tolist() == [-1, -1, s.pages[1] * 4]
    assert (allocator.pages_in_use, allocator.stats.pages_cached) == (3, 1)
    fork = allocator.fork(s.id)
    assert fork.pages == allocator.pages(s.id)
    for id in (s.id, fork.id):
        allocator.free(id)
    assert allocator.pages_in_use == 0


def test_a_prefix_is_reused_if_the_pages_of_its_last_w_tokens_hold_it() -> None:
    allocator = PageAllocator(8, 2, window=3)
    s = written(allocator, range(12))
    assert allocator.pages(s.id)[:4] == (-1,) * 4
    other = allocator.allocate(range(90, 102))  # takes the four pages, and two that were blank
    assert allocator.num_free == 0
    allocator.free(other.id)
    again = allocator.allocate(range(13))
    assert (again.cached_len, again.pages[:6]) == (12, (-1, -1, -1, -1, *s.pages[4:]))
    assert allocator.allocate(range(10)).cached_len == 0  # the last three tokens of its prefixes are gone
    assert allocator.stats == AllocatorStats(8, 0, 0, hits=1, misses=3, evictions=4, tokens_found=12)


def test_a_truncation_that_needs_keys_given_back_is_refused() -> None:
    allocator = PageAllocator(16, 4, window=6)
    s = allocator.allocate(range(14))
    allocator.mark_written(s.id, 14)  # pages 0 and 1 go
    raises_unchanged(
        allocator,
        ValueError,
        "length: expected 0 or at least 13, since the first 2 pages",
        lambda: allocator.truncate(s.id, 12),
    )
    allocator.truncate(s.id, 13)
    allocator.truncate(s.id, 0)
    assert (allocator.pages(s.id), allocator.pages_in_use) == ((), 0)
    assert allocator.stats.pages_cached == 0  # nothing is found under dropped tokens, in front of the window either
    allocator.append(s.id, range(5))
    allocator.mark_written(s.id, 5)
    assert allocator.allocate(range(6)).cached_len == 4
    allocator.append(s.id, range(5, 10))
    allocator.mark_written(s.id, 10)
    assert [page < 0 for page in allocator.pages(s.id)] == [True, False, False]


# ---- the pool


def test_stats() -> None:
    allocator = PageAllocator(4, 2)
    allocator.free(written(allocator, "abcd").id)
    allocator.allocate("abx")
    with pytest.raises(OutOfPages):
        allocator.allocate(range(99))
    assert allocator.stats == AllocatorStats(2, 1, 1, hits=1, misses=1, evictions=0, tokens_found=2)
    allocator.allocate("vwxy")
    assert allocator.stats == AllocatorStats(4, 0, 0, hits=1, misses=2, evictions=1, tokens_found=2)


def test_a_reset_forgets_every_prefix() -> None:
    allocator = PageAllocator(16, 2)
    live = written(allocator, "abcd")
    allocator.free(written(allocator, "xyz").id)
    allocator.reset_prefix_cache()
    assert allocator.stats.pages_cached == 0
    assert (allocator.allocate("abcde").cached_len, allocator.allocate("xyz").cached_len) == (0, 0)
    allocator.append(live.id, "ef")
    allocator.mark_written(live.id, 6)
    assert allocator.allocate("abcdefg").cached_len == 0
    allocator.truncate(live.id, 0)
    allocator.append(live.id, "ab")
    allocator.mark_written(live.id, 2)
    assert allocator.allocate("abcdefg").cached_len == 2


def test_a_cache_of_another_size_is_refused() -> None:
    allocator = PageAllocator(8, 16)
    allocator.check(SimpleNamespace(num_pages=8, page_size=16))
    for name, sizes in (("page_size", (8, 8)), ("num_pages", (9, 16))):
        cache = SimpleNamespace(num_pages=sizes[0], page_size=sizes[1])
        raises_unchanged(allocator, ValueError, f"cache: expected {name} .*, got", partial(allocator.check, cache))
    allocator.check(jpa.PagedKVCache.create(1, 8, 16, 1, 8))
    with pytest.raises(ValueError, match="cache: expected page_size 16, as the allocator has, got 8"):
        allocator.check(jpa.PagedKVCache.create(1, 8, 8, 1, 8))


# ---- errors


def test_errors_have_a_common_base() -> None:
    assert all(issubclass(error, PageAllocatorError) for error in (OutOfPages, DoubleFree, ForeignPage))


def test_out_of_pages_says_how_many_are_missing() -> None:
    allocator = PageAllocator(4, 2)
    first = allocator.allocate("abcde")
    raises_unchanged(allocator, OutOfPages, "3 needed, 1 free", lambda: allocator.allocate("vwxyz"))
    raises_unchanged(allocator, OutOfPages, "2 needed, 1 free", lambda: allocator.append(first.id, 5))
    fork = allocator.fork(first.id)
    raises_unchanged(allocator, OutOfPages, "2 needed, 1 free", lambda: allocator.append(fork.id, 2))
    with pytest.raises(OutOfPages) as caught:
        allocator.append(first.id, 99)
    assert (caught.value.needed, caught.value.free) == (50 - 1 + 1, 1)


def test_pages_to_be_shared_are_not_counted_as_free() -> None:
    allocator = PageAllocator(3, 2)
    allocator.free(written(allocator, "abcde").id)
    raises_unchanged(allocator, OutOfPages, "2 needed, 1 free", lambda: allocator.allocate("abcdefg"))


@pytest.mark.parametrize("use", range(14))
def test_freed_and_foreign_sequences(use: int) -> None:
    allocator = PageAllocator(4, 2)
    allocator.allocate("abc")
    gone = allocator.allocate("abd")
    allocator.free(gone.id)
    raises_unchanged(allocator, DoubleFree, "sequence 1 was freed", every_use(allocator, gone.id)[use])
    raises_unchanged(allocator, ForeignPage, "sequence 2 is not", every_use(allocator, 2)[use])
    raises_unchanged(allocator, ForeignPage, "sequence -1 is not", every_use(allocator, -1)[use])
    raises_unchanged(
        allocator, TypeError, r"ids?(\[0\])?: expected an integer, got bool", every_use(allocator, True)[use]
    )
    wrong: Any = gone
    raises_unchanged(allocator, TypeError, r"ids?(\[0\])?: .* integer, got Sequence", every_use(allocator, wrong)[use])


@pytest.mark.parametrize("share", SHARE_MODES)
def test_bad_arguments(share: Any) -> None:
    allocator: Any = PageAllocator(4, 2, share=share)
    id = allocator.allocate("abc").id
    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "n: expected at least 0, got -1", lambda: allocator.append(id, -1)),
        (TypeError, "n: expected an iterable of tokens, got float", lambda: allocator.append(id, 1.5)),
        (TypeError, "n: expected an iterable of tokens, got bool", lambda: allocator.append(id, True)),
        (TypeError, "n: expected hashable", lambda: allocator.append(id, [1, []])),
        (ValueError, r"n: expected a 1-d integer array, got float64\[2\]", lambda: allocator.append(id, np.ones(2))),
        (ValueError, "n: expected at most 3, the length of sequence 0, got 4", lambda: allocator.mark_written(id, 4)),
        (ValueError, "n: expected at least 0", lambda: allocator.mark_written(id, -1)),
        (TypeError, "n: expected an integer, got float", lambda: allocator.mark_written(id, 2.0)),
        (ValueError, "length: expected at most 3, the length of sequence 0", lambda: allocator.truncate(id, 4)),
        (ValueError, "length: expected at least 0, got -1", lambda: allocator.truncate(id, -1)),
        (TypeError, "length: expected an integer, got float", lambda: allocator.truncate(id, 1.0)),
        (TypeError, "length: expected an integer, got bool", lambda: allocator.truncate(id, True)),
        (TypeError, "tokens: expected an iterable", lambda: allocator.allocate(3)),
        (TypeError, "tokens: expected hashable", lambda: allocator.allocate([1, 2, {}])),
        (ValueError, r"tokens: .* got int64\[2, 2\]", lambda: allocator.allocate(np.eye(2, dtype=int))),
        (ValueError, "tokens: .* got float64", lambda: allocator.allocate(np.ones(2))),
        (ValueError, "tokens: .* got bool", lambda: allocator.allocate(np.ones(2, bool))),
        (ValueError, "max_cached_len: .* at least 0", lambda: allocator.allocate("ab", max_cached_len=-1)),
        (TypeError, "max_cached_len: .* got bool", lambda: allocator.find_prefix("ab", max_cached_len=True)),
        (TypeError, "salt: expected hashable", lambda: allocator.find_prefix("a", salt=[])),
        (TypeError, "salt: expected hashable", lambda: allocator.allocate("a", salt=[])),
        (ValueError, "start, stop: .* <= 3, .* got 2, 1", lambda: allocator.slots(id, 2, 1)),
        (ValueError, "start, stop: .* <= 3, .* got 0, 4", lambda: allocator.slots(id, 0, 4)),
        (ValueError, "start: expected at least 0", lambda: allocator.slots(id, -1, 1)),
        (TypeError, "stop: expected an integer, got bool", lambda: allocator.slots(id, 0, True)),
        (ValueError, "M: expected at least 2, the pages of sequence 0, got 1", lambda: allocator.block_tables([id], 1)),
        (ValueError, "M: expected at least 0", lambda: allocator.block_tables([], -1)),
        (TypeError, "M: expected an integer, got float", lambda: allocator.block_tables([id], 2.0)),
        (TypeError, "ids: expected a list of integers, got int", lambda: allocator.block_tables(id, 4)),
        (TypeError, "ids: expected a list of integers, got str", lambda: allocator.block_tables("0", 4)),
        (TypeError, r"ids\[1\]: expected an integer, got float", lambda: allocator.block_tables([id, 0.0], 4)),
        (ValueError, r"ids: .* got float64\[1\]", lambda: allocator.block_tables(np.zeros(1), 4)),
        (ValueError, r"ids: .* got bool\[1\]", lambda: allocator.block_tables(np.zeros(1, bool), 4)),
        (ValueError, r"ids: .* got int64\[1, 1\]", lambda: allocator.block_tables(np.zeros((1, 1), int), 4)),
        (TypeError, "cache: expected a cache with num_pages, got int", lambda: allocator.check(4)),
    ]
    for error, match, call in calls:
        raises_unchanged(allocator, error, match, call)


@pytest.mark.parametrize("share", SHARE_MODES)
def test_bad_arguments_of_batches(share: Any) -> None:
    allocator: Any = PageAllocator(8, 2, share=share)
    a, b = (allocator.allocate(prompt).id for prompt in ("abc", "xy"))
    name = "tokens_or_counts"

    def step(
        ids: Any = (a, b), counts: Any = (1, 1), num_tokens: Any = 4, max_seqs: Any = 2, max_pages: Any = 2
    ) -> Any:
        return allocator.step(ids, counts, num_tokens=num_tokens, max_seqs=max_seqs, max_pages=max_pages)

    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            ValueError,
            "ids: expected each sequence once, got sequence 0 twice",
            lambda: allocator.append_batch([a, a], [1, 1]),
        ),
        (TypeError, "ids: expected a list of integers, got int", lambda: allocator.append_batch(a, [1])),
        (TypeError, f"{name}: expected a list of .*, got int", lambda: allocator.append_batch([a], 1)),
        (TypeError, f"{name}: expected a list of .*, got str", lambda: allocator.append_batch([a, b], "xy")),
        (ValueError, f"{name}: expected 2, one for each of ids, got 1", lambda: allocator.append_batch([a, b], [1])),
        (
            ValueError,
            f"{name}: expected 2, one for each of ids, got 3",
            lambda: allocator.append_batch([a, b], np.ones((3, 1), int)),
        ),
        (ValueError, f"{name}: expected integers from 0 to .* got -1", lambda: allocator.append_batch([a, b], [1, -1])),
        (
            ValueError,
            f"{name}: expected integers from 0 to .* got {2**70}",
            lambda: allocator.append_batch([a], [2**70]),
        ),
        (ValueError, rf"{name}\[1\]: expected at least 0, got -1", lambda: allocator.append_batch([a, b], [[1], -1])),
        (
            TypeError,
            rf"{name}\[1\]: expected an iterable of tokens, got bool",
            lambda: allocator.append_batch([a, b], [1, True]),
        ),
        (
            TypeError,
            rf"{name}\[0\]: expected an iterable of tokens, got float",
            lambda: allocator.append_batch([a], [1.0]),
        ),
        (TypeError, f"{name}: expected hashable", lambda: allocator.append_batch([a, b], [[1], [[]]])),
        (ValueError, rf"{name}: .* got float64\[1\]", lambda: allocator.append_batch([a], np.ones(1))),
        (ValueError, rf"{name}: .* got bool\[1, 1\]", lambda: allocator.append_batch([a], np.ones((1, 1), bool))),
        (OutOfPages, "7 needed, 5 free", lambda: allocator.append_batch([a, b], [3, 11])),
        (
            ValueError,
            "ids: expected each sequence once, got sequence 1 twice",
            lambda: allocator.mark_written_batch([b, b], [1, 1]),
        ),
        (
            ValueError,
            "lengths: expected at most 2, the length of sequence 1, got 3",
            lambda: allocator.mark_written_batch([a, b], [3, 3]),
        ),
        (ValueError, "lengths: expected integers from 0", lambda: allocator.mark_written_batch([a, b], [3, -1])),
        (TypeError, r"lengths\[0\]: expected an integer, got float", lambda: allocator.mark_written_batch([a], [1.0])),
        (
            ValueError,
            "ids: expected each sequence once, got sequence 0 twice",
            lambda: step(ids=[a, b, a], counts=[0] * 3),
        ),
        (ValueError, "ids: expected at most max_seqs = 1 sequences, got 2", lambda: step(max_seqs=1)),
        (ValueError, "counts: expected at most num_tokens = 1 tokens together, got 2", lambda: step(num_tokens=1)),
        (
            ValueError,
            "counts: expected at most 2, the tokens of sequence 1 that have slots",
            lambda: step(counts=[1, 3]),
        ),
        (ValueError, "counts: expected integers from 0", lambda: step(counts=[1, -1])),
        (TypeError, r"counts\[0\]: expected an integer, got bool", lambda: step(counts=[True, 1])),
        (
            ValueError,
            "max_pages: expected at least 2, the pages of sequence 0, got 1",
            lambda: step(counts=[3, 1], max_pages=1),
        ),
        (TypeError, "num_tokens: expected an integer, got float", lambda: step(num_tokens=4.0)),
        (ValueError, "max_seqs: expected at least 0", lambda: step(max_seqs=-1)),
    ]
    for error, match, call in calls:
        raises_unchanged(allocator, error, match, call)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 1), "num_pages: expected at least 1, got 0"),
        ((1, 0), "page_size: expected at least 1, got 0"),
        ((2**20, 2**11), "slots are int32"),
        ((1, 1, "read"), "share: expected 'allocated' or 'written', got 'read'"),
        ((1, 1, "written", 0), "window: expected at least 1, got 0"),
    ],
)
def test_bad_pools(arguments: tuple[Any, ...], match: str) -> None:
    keywords: Any = dict(zip(("num_pages", "page_size", "share", "window"), arguments, strict=False))
    with pytest.raises(ValueError, match=match):
        PageAllocator(**keywords)


@pytest.mark.parametrize("argument", ["num_pages", "page_size", "window"])
@pytest.mark.parametrize("value", [True, 2.0, "2", [2]])
def test_sizes_are_integers(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{argument}: expected an integer, got {type(value).__name__}"):
        PageAllocator(**{"num_pages": 2, "page_size": 2, argument: value})


def test_the_largest_slot_is_int32() -> None:
    allocator = PageAllocator(3, (2**31 - 1) // 3)
    ids = [allocator.allocate([i]).id for i in range(3)]
    assert allocator.slots(ids[2], 0, 1).tolist() == [allocator.pages(ids[2])[0] * ((2**31 - 1) // 3)]
    last = max(ids, key=lambda id: allocator.pages(id)[0])
    assert allocator.append(last, 2)[0].max() > 2 * ((2**31 - 1) // 3) > 0
