"""PageAllocator: random histories against a simulated pool, then each promise of its docstrings by itself."""

from __future__ import annotations

import copy
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import jax_paged_attn._allocator as allocator_module
from jax_paged_attn._allocator import (
    DoubleFree,
    ForeignPage,
    OutOfPages,
    PageAllocator,
    PageAllocatorError,
)

SHARE_MODES = ("allocated", "written")


def snapshot(allocator: PageAllocator) -> dict[str, Any]:
    """All of the allocator's state: comparing it before and after an error shows that nothing changed."""
    return copy.deepcopy(vars(allocator))


def raises_unchanged(allocator: PageAllocator, error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    before = snapshot(allocator)
    with pytest.raises(error, match=match):
        call()
    assert vars(allocator) == before


def every_use(allocator: PageAllocator, id: int) -> list[Callable[[], Any]]:
    """Every method that takes an existing sequence."""
    return [
        lambda: allocator.append(id, 1),
        lambda: allocator.append(id, [1]),
        lambda: allocator.fork(id),
        lambda: allocator.free(id),
        lambda: allocator.mark_written(id, 0),
        lambda: allocator.slots(id, 0, 0),
        lambda: allocator.block_tables([id], 4),
        lambda: allocator.pages(id),
        lambda: allocator.length(id),
    ]


# ---- random histories


@dataclass
class Owner:
    """What the model knows of a live sequence."""

    id: int
    salt: Hashable
    tokens: list[Hashable]
    computed: int  # leading tokens that this sequence wrote, or found written
    known: int  # leading tokens that the allocator was told
    written: int  # leading tokens that the allocator may take as written

    def tag(self, i: int) -> tuple[Hashable, ...]:
        """What the cache holds for token i: keys and values depend on all tokens up to it."""
        return (self.salt, *self.tokens[: i + 1])


class Histories(RuleBasedStateMachine):
    """Random calls, while a simulated pool holds for each slot the tag that was last written or copied there."""

    @initialize(share=st.sampled_from(SHARE_MODES), num_pages=st.integers(1, 12), page_size=st.integers(1, 4))
    def start(self, share: Any, num_pages: int, page_size: int) -> None:
        self.allocator = PageAllocator(num_pages, page_size, share=share)
        self.share = share
        self.pool: list[Any] = [None] * (num_pages * page_size)
        self.owners: list[Owner] = []
        self.freed: list[int] = []
        self.fresh = itertools.count()

    def owner(self, choice: int) -> Owner:
        return self.owners[choice % len(self.owners)]

    def attempt(self, call: Callable[[], Any]) -> Any:
        """The call's result, or None where the pool was too small, which must have changed nothing."""
        before = snapshot(self.allocator)
        try:
            return call()
        except OutOfPages as error:
            shortage = error
        assert shortage.needed > shortage.free
        assert vars(self.allocator) == before
        return None

    def write(self, owner: Owner, slots: Iterable[int], stop: int) -> None:
        for i, slot in zip(range(owner.computed, stop), slots, strict=True):
            self.pool[slot] = owner.tag(i)
        owner.computed = stop

    def must_share(self, tokens: list[Hashable], salt: Hashable) -> int:
        """Tokens in whole pages that the prompt has in common with some live sequence, its last token excluded."""
        size, best = self.allocator.page_size, 0
        for owner in self.owners:
            shareable = min(owner.known, owner.written) if owner.salt == salt else 0
            pairs = zip(tokens[:-1], owner.tokens[:shareable], strict=False)
            common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            best = max(best, common // size * size)
        return best

    @rule(tokens=st.lists(st.sampled_from("ab"), max_size=14), salt=st.sampled_from([None, "tenant"]))
    def allocate(self, tokens: list[Hashable], salt: Hashable) -> None:
        must_share = self.must_share(tokens, salt)
        sequence = self.attempt(lambda: self.allocator.allocate(tokens, salt))
        if sequence is None:
            return
        assert sequence.pages == self.allocator.pages(sequence.id)
        assert must_share <= sequence.cached_len <= max(len(tokens) - 1, 0)
        written = len(tokens) if self.share == "allocated" else sequence.cached_len
        owner = Owner(sequence.id, salt, tokens, sequence.cached_len, len(tokens), written)
        self.owners.append(owner)
        self.readable()  # what is called cached has been written, before anything else is
        if self.share == "allocated":
            self.write(owner, self.allocator.slots(owner.id, owner.computed, len(tokens)), len(tokens))

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0), new=st.one_of(st.integers(0, 5), st.lists(st.sampled_from("ab"), max_size=5)))
    def append(self, choice: int, new: int | list[Hashable]) -> None:
        owner = self.owner(choice)
        result = self.attempt(lambda: self.allocator.append(owner.id, new))
        if result is None:
            return
        slots, copies = result
        size, before = self.allocator.page_size, list(self.pool)
        for source, destination in copies:
            self.pool[destination * size : (destination + 1) * size] = before[source * size : (source + 1) * size]
        if owner.known == len(owner.tokens) and not isinstance(new, int):
            owner.known += len(new)
        start = len(owner.tokens)
        owner.tokens = owner.tokens + ([next(self.fresh) for _ in range(new)] if isinstance(new, int) else new)
        assert slots.dtype == np.int32
        assert np.array_equal(slots, self.allocator.slots(owner.id, start, len(owner.tokens)))
        if self.share == "allocated":
            owner.written = len(owner.tokens)
            self.write(owner, slots, len(owner.tokens))

    @precondition(lambda self: self.owners and self.share == "written")
    @rule(choice=st.integers(0), tokens=st.integers(1, 14), mark=st.integers(0, 14))
    def compute(self, choice: int, tokens: int, mark: int) -> None:
        owner = self.owner(choice)
        stop = min(owner.computed + tokens, len(owner.tokens))
        self.write(owner, self.allocator.slots(owner.id, owner.computed, stop), stop)
        mark = min(mark, owner.computed)
        self.allocator.mark_written(owner.id, mark)
        owner.written = max(owner.written, mark)

    @precondition(lambda self: 0 < len(self.owners) < 8)
    @rule(choice=st.integers(0))
    def fork(self, choice: int) -> None:
        owner = self.owner(choice)
        sequence = self.allocator.fork(owner.id)
        assert sequence.pages == self.allocator.pages(owner.id)
        assert sequence.cached_len == owner.written
        self.owners.append(copy.deepcopy(owner))
        self.owners[-1].id = sequence.id

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0))
    def free(self, choice: int) -> None:
        owner = self.owner(choice)
        self.owners.remove(owner)
        self.allocator.free(owner.id)
        self.freed.append(owner.id)

    @precondition(lambda self: self.freed)
    @rule(choice=st.integers(0), use=st.integers(0, 8))
    def use_freed(self, choice: int, use: int) -> None:
        id = self.freed[choice % len(self.freed)]
        raises_unchanged(self.allocator, DoubleFree, str(id), every_use(self.allocator, id)[use])

    @rule(beyond=st.integers(0, 2), use=st.integers(0, 8))
    def use_foreign(self, beyond: int, use: int) -> None:
        id = len(self.owners) + len(self.freed) + beyond
        raises_unchanged(self.allocator, ForeignPage, str(id), every_use(self.allocator, id)[use])

    @invariant()
    def readable(self) -> None:
        """Every sequence reads its own tokens through its block table."""
        size, ids = self.allocator.page_size, [owner.id for owner in self.owners]
        tables = self.allocator.block_tables(ids, self.allocator.num_pages)
        for owner, table in zip(self.owners, tables, strict=True):
            assert self.allocator.length(owner.id) == len(owner.tokens)
            for i in range(owner.computed):
                assert self.pool[table[i // size] * size + i % size] == owner.tag(i)

    @invariant()
    def accounted(self) -> None:
        """Each page has as many owners as it has rows, and they agree about its place and tokens; the rest is free."""
        size = self.allocator.page_size
        rows, meanings = Counter[int](), {}
        for owner in self.owners:
            pages = self.allocator.pages(owner.id)
            assert len(pages) == -(-len(owner.tokens) // size)
            for i, page in enumerate(pages):
                rows[page] += 1
                meaning = (i, owner.tag(min((i + 1) * size, len(owner.tokens)) - 1))
                assert meanings.setdefault(page, meaning) == meaning
        assert self.allocator._owners == [rows[page] for page in range(self.allocator.num_pages)]
        assert self.allocator.pages_in_use == len(rows)
        assert self.allocator.num_free == self.allocator.num_pages - len(rows)

    def teardown(self) -> None:
        if not hasattr(self, "allocator"):
            return
        for owner in self.owners:
            self.allocator.free(owner.id)
        assert self.allocator.num_free == self.allocator.num_pages
        # None is lost: a prompt of tokens never seen takes each page once, whatever the cache remembers.
        whole = self.allocator.allocate([object() for _ in self.pool])
        assert sorted(whole.pages) == list(range(self.allocator.num_pages))


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


# ---- sharing


def test_a_known_prefix_is_shared_but_never_the_last_token() -> None:
    allocator = PageAllocator(16, 4)
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
    allocator = PageAllocator(4, 2)
    empty = allocator.allocate([], salt="s")
    assert (empty.pages, empty.cached_len, allocator.length(empty.id)) == ((), 0, 0)
    assert allocator.block_tables([empty.id], 2).tolist() == [[-1, -1]]
    slots, copies = allocator.append(empty.id, "ab")
    page = allocator.pages(empty.id)[0]
    assert (slots.tolist(), copies) == ([page * 2, page * 2 + 1], [])
    assert allocator.allocate("abc", salt="s").pages[0] == page


def test_salts_keep_tenants_apart() -> None:
    allocator = PageAllocator(16, 2)
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

    allocator = PageAllocator(8, 2)
    a, b = Colliding("a"), Colliding("b")
    first = allocator.allocate([a, a, a], salt=a)
    assert hash((b, b, b)) == hash((a, a, a))
    assert allocator.allocate([b, b, b], salt=a).cached_len == 0
    assert allocator.allocate([a, a, a], salt=b).cached_len == 0
    assert allocator.allocate([Colliding("a")] * 3, salt=Colliding("a")).pages[0] == first.pages[0]


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_arrays_and_lists_of_the_same_tokens_share(dtype: Any) -> None:
    allocator = PageAllocator(8, 2)
    allocator.allocate(np.arange(5, dtype=dtype))
    assert allocator.allocate([0, 1, 2, 3, 4]).cached_len == 4
    assert allocator.allocate(bytes([0, 1, 2])).cached_len == 2


def test_appended_tokens_share_and_appended_numbers_do_not() -> None:
    allocator = PageAllocator(16, 2)
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
    assert allocator._cached == {}


# ---- forks


def test_copy_on_write_of_a_shared_last_page() -> None:
    allocator = PageAllocator(8, 4)
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
    allocator = PageAllocator(8, 4)
    parent = allocator.allocate("abcd")
    child = allocator.fork(parent.id)
    assert allocator.append(child.id, 1)[1] == []
    assert allocator.append(parent.id, 0)[1] == []
    assert allocator.pages(child.id)[0] == parent.pages[0]


def test_forks_are_found_by_their_own_tokens() -> None:
    allocator = PageAllocator(8, 2)
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
    ab = allocator.allocate("ab")
    c = allocator.allocate("c")
    allocator.free(ab.id)
    allocator.free(c.id)
    takes = [allocator.allocate(letter).pages[0] for letter in "wxyz"]
    assert takes == [3, ab.pages[1], ab.pages[0], c.pages[0]]


def test_finding_a_page_makes_it_recently_used() -> None:
    allocator = PageAllocator(3, 1)
    for prompt in ("ab", "c"):
        allocator.free(allocator.allocate(prompt).id)
    ad = allocator.allocate("ad")  # finds a, forgets b
    allocator.free(ad.id)
    takes = [allocator.allocate(letter).pages[0] for letter in "xyz"]
    assert takes[1:] == [ad.pages[1], ad.pages[0]]


def test_freed_pages_are_found_again() -> None:
    allocator = PageAllocator(3, 2)
    first = allocator.allocate("abcde")
    allocator.free(first.id)
    assert allocator.num_free == 3
    again = allocator.allocate("abcdx")
    assert (again.cached_len, again.pages[:2]) == (4, first.pages[:2])


def test_a_forgotten_page_is_not_found() -> None:
    allocator = PageAllocator(3, 1)
    allocator.free(allocator.allocate("abc").id)
    allocator.free(allocator.allocate("xy").id)  # takes the pages of c and b, that of a stays
    assert allocator.allocate("abc").cached_len == 1


def operations(num_pages: int) -> tuple[int, set[str]]:
    """Lines run and C functions called by the allocator during a fixed history in a used pool of `num_pages`."""
    allocator = PageAllocator(num_pages, 2)
    allocator.free(allocator.allocate(range(1000, 1000 + 2 * num_pages)).id)  # no page is blank: each take evicts
    lines, functions = 0, set[str]()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != allocator_module.__file__:
            return None
        lines += event == "line"  # also each time a loop comes back to its line
        return trace

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "c_call" and frame.f_code.co_filename == allocator_module.__file__:
            functions.add(argument.__qualname__)

    tracing, profiling = sys.gettrace(), sys.getprofile()
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        first = allocator.allocate([1, 2, 3, 4, 5])
        second = allocator.allocate([1, 2, 3, 4, 6])
        third = allocator.fork(second.id)
        for _ in range(4):
            allocator.append(third.id, [7])
            allocator.append(second.id, 1)
        for sequence in (first, second, third):
            allocator.free(sequence.id)
        allocator.free(allocator.allocate([1, 2, 3, 4, 7]).id)
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
    allocator.free(allocator.allocate("abcde").id)
    raises_unchanged(allocator, OutOfPages, "2 needed, 1 free", lambda: allocator.allocate("abcdefg"))


@pytest.mark.parametrize("use", range(9))
def test_freed_and_foreign_sequences(use: int) -> None:
    allocator = PageAllocator(4, 2)
    allocator.allocate("abc")
    gone = allocator.allocate("abd")
    allocator.free(gone.id)
    raises_unchanged(allocator, DoubleFree, "sequence 1 was freed", every_use(allocator, gone.id)[use])
    raises_unchanged(allocator, ForeignPage, "sequence 2 is not", every_use(allocator, 2)[use])
    raises_unchanged(allocator, ForeignPage, "sequence -1 is not", every_use(allocator, -1)[use])
    raises_unchanged(allocator, TypeError, "id: expected an integer, got Sequence", every_use(allocator, gone)[use])  # type: ignore[arg-type]


@pytest.mark.parametrize("share", SHARE_MODES)
def test_bad_arguments(share: Any) -> None:
    allocator = PageAllocator(4, 2, share=share)
    id = allocator.allocate("abc").id
    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "n: expected at least 0, got -1", lambda: allocator.append(id, -1)),
        (TypeError, "n: expected an iterable of tokens, got float", lambda: allocator.append(id, 1.5)),  # type: ignore[arg-type]
        (TypeError, "n: expected hashable", lambda: allocator.append(id, [1, []])),  # type: ignore[list-item]
        (ValueError, "n: expected at most 3, the length of sequence 0, got 4", lambda: allocator.mark_written(id, 4)),
        (ValueError, "n: expected at least 0", lambda: allocator.mark_written(id, -1)),
        (TypeError, "tokens: expected an iterable", lambda: allocator.allocate(3)),  # type: ignore[arg-type]
        (TypeError, "tokens: expected hashable", lambda: allocator.allocate([1, 2, {}])),  # type: ignore[list-item]
        (
            ValueError,
            r"tokens: .* 1-d integer array, got int64\[2, 2\]",
            lambda: allocator.allocate(np.eye(2, dtype=int)),
        ),
        (ValueError, "tokens: .* got float64", lambda: allocator.allocate(np.ones(2))),
        (TypeError, "salt: expected hashable", lambda: allocator.allocate("a", salt=[])),  # type: ignore[arg-type]
        (ValueError, "start, stop: .* <= 3, .* got 2, 1", lambda: allocator.slots(id, 2, 1)),
        (ValueError, "start, stop: .* <= 3, .* got 0, 4", lambda: allocator.slots(id, 0, 4)),
        (ValueError, "start: expected at least 0", lambda: allocator.slots(id, -1, 1)),
        (ValueError, "M: expected at least 2, the pages of sequence 0, got 1", lambda: allocator.block_tables([id], 1)),
        (ValueError, "M: expected at least 0", lambda: allocator.block_tables([], -1)),
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
    ],
)
def test_bad_pools(arguments: tuple[Any, ...], match: str) -> None:
    num_pages, page_size, *share = arguments
    with pytest.raises(ValueError, match=match):
        PageAllocator(num_pages, page_size, **({"share": share[0]} if share else {}))


def test_the_largest_slot_is_int32() -> None:
    allocator = PageAllocator(3, (2**31 - 1) // 3)
    ids = [allocator.allocate([i]).id for i in range(3)]
    assert allocator.slots(ids[2], 0, 1).tolist() == [allocator.pages(ids[2])[0] * ((2**31 - 1) // 3)]
    last = max(ids, key=lambda id: allocator.pages(id)[0])
    assert allocator.append(last, 2)[0].max() > 2 * ((2**31 - 1) // 3) > 0
