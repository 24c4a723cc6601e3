"""PageAllocator: random histories beside a simulated pool that records which token stands in each slot.

The simulation writes through slots, copies through the returned pairs, and marks what it wrote. Tokens appended by
number have values too, which the allocator is told later or never. Whatever is called cached must be exactly those
tokens, whatever was truncated, forked, freed, evicted, preempted or computed with other weights in between.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
from allocators import SHARE_MODES, every_use, raises_unchanged, same_arrays, snapshot
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jax_paged_attn._allocator import DoubleFree, ForeignPage, OutOfPages, PageAllocator, StepArrays


@dataclass
class Owner:
    """A live sequence as the model knows it."""

    id: int
    salt: Hashable
    tokens: list[Hashable]
    computed: int  # leading tokens that this sequence wrote, or found written
    known: int  # leading tokens that the allocator was told; stays 0 after a reset
    marked: int  # leading tokens that the allocator may take as written
    weights: int  # how many resets there had been when it last was without tokens

    def tag(self, i: int) -> tuple[Hashable, ...]:
        """The content of the cache for token i: keys and values depend on the weights and on all tokens up to it."""
        return (self.weights, self.salt, *self.tokens[: i + 1])


@dataclass
class New:
    """Tokens to be appended."""

    tokens: list[Hashable]
    told: bool

    @property
    def argument(self) -> int | list[Hashable]:
        return self.tokens if self.told else len(self.tokens)


TOKENS = st.lists(st.sampled_from("ab"), max_size=5)
NEW = st.builds(New, TOKENS, st.booleans())
# More than a history's tokens can fill: a window gives pages back, so sequences outgrow the pool.
MAX_PAGES = 512


class Histories(RuleBasedStateMachine):
    """Random calls. With ``share="allocated"``, tokens are written at once, as the caller's duty is."""

    @initialize(
        share=st.sampled_from(SHARE_MODES),
        num_pages=st.integers(3, 16),
        page_size=st.integers(1, 4),
        window=st.one_of(st.none(), st.integers(1, 7)),
    )
    def start(self, share: Any, num_pages: int, page_size: int, window: int | None) -> None:
        self.allocator = PageAllocator(num_pages, page_size, share=share, window=window)
        self.share, self.size, self.window = share, page_size, window
        self.pool: list[Any] = [None] * (num_pages * page_size)
        self.owners: list[Owner] = []
        self.freed: list[int] = []
        self.seen: list[list[Hashable]] = [[*"abaabbabab"]]
        self.weights = self.lookups = self.found = 0

    # ---- the simulation

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
        assert snapshot(self.allocator) == before
        return None

    def write(self, owner: Owner, slots: Iterable[int], stop: int) -> None:
        holders = Counter(page for other in self.owners for page in self.allocator.pages(other.id))
        for i, slot in zip(range(owner.computed, stop), slots, strict=True):
            if self.pool[slot] != owner.tag(i):  # forks that share what neither has computed write the same twice
                assert holders[slot // self.size] == 1 or not self.found_elsewhere(owner, slot)
            self.pool[slot] = owner.tag(i)
        owner.computed = max(owner.computed, stop)

    def found_elsewhere(self, writer: Owner, slot: int) -> bool:
        """True if another sequence counts on the content of the slot."""
        page, offset = divmod(slot, self.size)
        for other in self.owners:
            pages = self.allocator.pages(other.id)
            if other is not writer and page in pages and pages.index(page) * self.size + offset < other.computed:
                return True
        return False

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        before = list(self.pool)
        for source, target in copies:
            self.pool[target * self.size : (target + 1) * self.size] = before[
                source * self.size : (source + 1) * self.size
            ]

    def must_share(self, tokens: list[Hashable], salt: Hashable) -> int:
        """Tokens in whole pages that the prompt has in common with some live sequence, its last token excluded."""
        best = 0
        for owner in self.owners:
            shareable = min(owner.known, owner.marked) if owner.salt == salt else 0
            pairs = zip(tokens[:-1], owner.tokens[:shareable], strict=False)
            whole = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) // self.size
            if self.window is not None:  # as far as the pages of the last w tokens are held
                held, need = self.allocator.pages(owner.id), -(-self.window // self.size)
                whole = max(n for n in range(whole + 1) if -1 not in held[max(n - need, 0) : n])
            best = max(best, whole * self.size)
        return best

    def pages_found(self, salt: Hashable, tokens: list[Hashable]) -> set[int]:
        """The pages that can be found as the last one of this prefix."""
        node = self.allocator._pool._roots.get(salt)
        for start in range(0, len(tokens), self.size):
            node = node and node.children.get(tuple(tokens[start : start + self.size]))
        return set(node.pages) if node else set()

    def appended(self, owner: Owner, new: New) -> None:
        if owner.known == len(owner.tokens) and new.told:
            owner.known += len(new.tokens)
        owner.tokens = owner.tokens + new.tokens
        if self.share == "allocated":
            owner.marked = len(owner.tokens)

    def write_all(self, owner: Owner) -> None:
        stop = len(owner.tokens)
        self.write(owner, self.allocator.slots(owner.id, owner.computed, stop), stop)

    # ---- calls

    @rule(
        choice=st.integers(0),
        stop=st.integers(0, 20),
        more=TOKENS,
        salt=st.sampled_from([None, None, "tenant"]),
        limit=st.sampled_from([None, None, 5]),
    )
    def prompt(self, choice: int, stop: int, more: list[Hashable], salt: Hashable, limit: int | None) -> None:
        """A prompt that begins as an earlier one."""
        self.allocate([*self.seen[choice % len(self.seen)][:stop], *more], salt, limit)

    def allocate(self, tokens: list[Hashable], salt: Hashable, limit: int | None = None) -> None:
        must_share = self.must_share(tokens if limit is None else tokens[: limit + 1], salt)
        expected = self.allocator.find_prefix(tokens, salt, max_cached_len=limit)
        sequence = self.attempt(lambda: self.allocator.allocate(tokens, salt, max_cached_len=limit))
        if sequence is None:
            return
        assert sequence.cached_len == expected <= (len(tokens) if limit is None else limit)
        assert sequence.pages == self.allocator.pages(sequence.id)
        assert must_share <= sequence.cached_len <= max(len(tokens) - 1, 0)
        assert sequence.cached_len % self.size == 0
        self.lookups += 1
        self.found += sequence.cached_len
        marked = len(tokens) if self.share == "allocated" else sequence.cached_len
        owner = Owner(sequence.id, salt, tokens, sequence.cached_len, len(tokens), marked, self.weights)
        self.owners.append(owner)
        self.readable()  # what is called cached has been written, before anything else is
        if self.share == "allocated":
            self.write_all(owner)

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0), new=NEW)
    def append(self, choice: int, new: New) -> None:
        owner = self.owner(choice)
        result = self.attempt(lambda: self.allocator.append(owner.id, new.argument))
        if result is None:
            return
        slots, copies = result
        start = len(owner.tokens)
        self.copy_pages(copies)
        self.appended(owner, new)
        assert slots.dtype == np.int32
        assert np.array_equal(slots, self.allocator.slots(owner.id, start, len(owner.tokens)))
        if self.share == "allocated":
            self.write_all(owner)

    @precondition(lambda self: self.owners)
    @rule(choices=st.lists(st.integers(0, 7), max_size=6), news=st.lists(NEW, min_size=6, max_size=6), data=st.data())
    def append_batch(self, choices: list[int], news: list[New], data: st.DataObject) -> None:
        owners = list({id(o): o for o in map(self.owner, choices)}.values())
        kind = data.draw(st.sampled_from(["mixed", "numbers", "tokens"]))
        if kind != "mixed":
            news = [New(new.tokens, told=kind == "tokens") for new in news]
        ids, news = [owner.id for owner in owners], news[: len(owners)]
        arguments = [new.argument for new in news]
        twin = copy.deepcopy(self.allocator)
        result = self.attempt(lambda: self.allocator.append_batch(ids, arguments))
        if result is None:
            return
        one_by_one = [twin.append(*each) for each in zip(ids, arguments, strict=True)]
        slots, copies = result
        assert (slots.dtype, copies.dtype, copies.shape[1:]) == (np.int32, np.int32, (2,))
        assert len(copies) == sum(len(pairs) for _, pairs in one_by_one)
        assert len(slots) == sum(len(each) for each, _ in one_by_one)
        self.copy_pages(copies.tolist())
        end = 0
        for owner, new in zip(owners, news, strict=True):
            start = len(owner.tokens)
            self.appended(owner, new)
            begin, end = end, end + len(owner.tokens) - start
            assert np.array_equal(slots[begin:end], self.allocator.slots(owner.id, start, len(owner.tokens)))
        if self.share == "allocated":
            for owner in owners:
                self.write_all(owner)

    @precondition(lambda self: self.owners)
    @rule(choices=st.lists(st.integers(0, 7), max_size=4), counts=st.lists(st.integers(0, 9), min_size=4, max_size=4))
    def tell(self, choices: list[int], counts: list[int]) -> None:
        """The values of tokens that were appended by number, or behind such ones."""
        owners = list({id(o): o for o in map(self.owner, choices)}.values())
        ids = [owner.id for owner in owners]
        unknown = [owner.tokens[owner.known :] for owner in owners]
        told = [tokens[:count] for tokens, count in zip(unknown, counts, strict=False)]
        if owners:
            too_many = [*told[:-1], [*unknown[-1], "a"]]
            raises_unchanged(
                self.allocator, ValueError, "tokens: .* unknown", lambda: self.allocator.tell_batch(ids, too_many)
            )
        one_by_one = copy.deepcopy(self.allocator)
        for owner, tokens in zip(owners, told, strict=True):
            for token in tokens:
                one_by_one.tell_batch([owner.id], [[token]])
        self.allocator.tell_batch(ids, told)
        one_by_one._sequence_pages = self.allocator._sequence_pages  # which has no state of its own
        assert snapshot(self.allocator) == snapshot(one_by_one)
        for owner, tokens in zip(owners, told, strict=True):
            owner.known += len(tokens) if owner.weights == self.weights else 0
        for owner in owners:
            probe = [*owner.tokens, "a"]
            assert self.allocator.find_prefix(probe, owner.salt) >= self.must_share(probe, owner.salt)

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0), back=st.integers(0, 12))
    def truncate(self, choice: int, back: int) -> None:
        owner = self.owner(choice)
        length = max(len(owner.tokens) - back, 0)
        held = self.allocator.pages(owner.id)
        if self.window is not None and 0 < length < len(owner.tokens):
            # The next token's own page, and the keys that it sees.
            visible = range(min(max(length - self.window + 1, 0), length - 1), length)
            if any(held[i // self.size] < 0 for i in visible):
                raises_unchanged(
                    self.allocator, ValueError, "length: .* window", lambda: self.allocator.truncate(owner.id, length)
                )
                return
        self.allocator.truncate(owner.id, length)
        shared = min(owner.known, owner.marked)  # by this sequence; later tokens may stand in pages of freed ones
        for stop in range((length // self.size + 1) * self.size, shared + 1, self.size):
            others = [other for other in self.owners if other is not owner and other.salt == owner.salt]
            has_it = any(other.tokens[:stop] == owner.tokens[:stop] for other in others)
            # A page of others may stay: one that had these tokens and was truncated or freed.
            assert has_it or held[stop // self.size - 1] not in self.pages_found(owner.salt, owner.tokens[:stop])
        owner.tokens = owner.tokens[:length]
        if length == 0:
            owner.weights = self.weights
        for name in ("computed", "known", "marked"):
            setattr(owner, name, min(getattr(owner, name), length))

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0), drafts=TOKENS, accepted=st.integers(0, 5))
    def speculate(self, choice: int, drafts: list[Hashable], accepted: int) -> None:
        """Drafts are appended and written, some are rejected."""
        owner = self.owner(choice)
        start = len(owner.tokens)
        self.append(choice, New(drafts, told=True))
        if len(owner.tokens) > start:
            self.write_all(owner)
            self.truncate(choice, max(len(drafts) - accepted, 0))

    @precondition(lambda self: self.owners)
    @rule(choices=st.lists(st.integers(0, 7), max_size=4), counts=st.lists(st.integers(0, 9), min_size=4, max_size=4))
    def compute(self, choices: list[int], counts: list[int]) -> None:
        """A step of the model over some sequences, and its marks."""
        owners = list({id(o): o for o in map(self.owner, choices)}.values())
        ids, written = [o.id for o in owners], []
        for owner in owners:
            row = self.allocator._row_of[owner.id]
            written.append(int(self.allocator._rows.written[row]))
            assert written[-1] <= owner.computed
        counts = [min(n, len(o.tokens) - w) for n, o, w in zip(counts, owners, written, strict=False)]
        arrays = self.allocator.step(ids, counts, num_tokens=40, max_seqs=5, max_pages=MAX_PAGES)
        assert same_arrays(arrays, self.expected_step(owners, written, counts))
        end = 0
        for owner, first, count in zip(owners, written, counts, strict=True):
            end += count
            stop = first + count
            if stop > owner.computed:
                self.write(owner, arrays.slot_mapping[end - (stop - owner.computed) : end].tolist(), stop)
            owner.marked = max(owner.marked, stop)
        if len(owners) == 1:
            self.allocator.mark_written(ids[0], int(arrays.kv_lens[0]))
        else:
            self.allocator.mark_written_batch(ids, arrays.kv_lens[: len(ids)])

    def expected_step(self, owners: list[Owner], written: list[int], counts: list[int]) -> StepArrays:
        """The step's arrays from the calls per sequence."""
        positions, slots = np.zeros(40, np.int32), np.full(40, -1, np.int32)
        tables, kv_lens = np.full((5, MAX_PAGES), -1, np.int32), np.zeros(5, np.int32)
        cu_q_lens = np.zeros(6, np.int32)
        end = 0
        for b, (owner, first, count) in enumerate(zip(owners, written, counts, strict=True)):
            begin, end = end, end + count
            positions[begin:end] = range(first, first + count)
            slots[begin:end] = self.allocator.slots(owner.id, first, first + count)
            pages = self.allocator.pages(owner.id)[
                : -(-max(written[i] + counts[i] for i in range(len(owners))) // self.size)
            ]
            tables[b, : len(pages)] = pages
            kv_lens[b] = first + count
            cu_q_lens[b + 1 :] = end
        return StepArrays(positions, slots, tables, kv_lens, cu_q_lens, np.array(len(owners), np.int32))

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0), mark=st.integers(0, 18))
    def mark(self, choice: int, mark: int) -> None:
        """Less than what was written is marked."""
        owner = self.owner(choice)
        mark = min(mark, owner.computed)
        self.allocator.mark_written(owner.id, mark)
        owner.marked = max(owner.marked, mark)

    @precondition(lambda self: 0 < len(self.owners) < 8)
    @rule(choice=st.integers(0))
    def fork(self, choice: int) -> None:
        owner = self.owner(choice)
        sequence = self.allocator.fork(owner.id)
        assert sequence.pages == self.allocator.pages(owner.id)
        assert sequence.cached_len <= owner.computed
        self.owners.append(copy.deepcopy(owner))
        self.owners[-1].id = sequence.id

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0), use=st.integers(0, 13))
    def free(self, choice: int, use: int = 0) -> None:
        owner = self.owner(choice)
        self.owners.remove(owner)
        self.allocator.free(owner.id)
        self.freed.append(owner.id)
        self.seen.append(owner.tokens)
        raises_unchanged(self.allocator, DoubleFree, str(owner.id), every_use(self.allocator, owner.id)[use])
        foreign = len(self.owners) + len(self.freed)
        raises_unchanged(self.allocator, ForeignPage, str(foreign), every_use(self.allocator, foreign)[use])

    @precondition(lambda self: 0 < len(self.owners) < 8)
    @rule(choice=st.integers(0), back=st.integers(0, 5), new=NEW, kept=st.integers(0, 1))
    def part(self, choice: int, back: int, new: New, kept: int) -> None:
        """A fork goes back some tokens, one of the two ends, and the other goes on."""
        self.fork(choice)
        pair = [choice % (len(self.owners) - 1), len(self.owners) - 1]
        self.truncate(pair[kept], back)
        survivor = self.owners[pair[kept]]
        self.free(pair[1 - kept])
        self.append(self.owners.index(survivor), new)

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0), tokens=TOKENS, ends=st.booleans())
    def sample_in_vain(self, choice: int, tokens: list[Hashable], ends: bool) -> None:
        """Tokens are appended, never computed, and dropped; or their sequence ends with them."""
        owner = self.owner(choice)
        result = self.attempt(lambda: self.allocator.append(owner.id, tokens))
        if result is None:
            return
        self.copy_pages(result[1])
        if ends:
            self.free(choice)
            self.seen.append([*owner.tokens, *tokens, "a"])
        else:
            self.allocator.truncate(owner.id, len(owner.tokens))

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0))
    def preempt(self, choice: int) -> None:
        """A sequence loses its pages and comes back with its tokens, as far as they are known."""
        owner = self.owner(choice)
        self.free(choice)
        self.allocate(owner.tokens[: owner.known], owner.salt)

    @precondition(lambda self: len(self.freed) % 4 == 3)
    @rule()
    def reset(self) -> None:
        self.allocator.reset_prefix_cache()
        assert self.allocator.stats.pages_cached == 0
        self.weights += 1
        for owner in self.owners:
            owner.known = 0
            if not owner.tokens:
                owner.weights = self.weights
            assert self.allocator.pages_in_use == len(
                {p for o in self.owners for p in self.allocator.pages(o.id)} - {-1}
            )

    # ---- what always holds

    @invariant()
    def readable(self) -> None:
        """Every sequence reads its own tokens through its block table, as far as the next token sees them."""
        ids = [owner.id for owner in self.owners]
        tables = self.allocator.block_tables(ids, max([20, *(len(o.tokens) for o in self.owners)]))
        for owner, table in zip(self.owners, tables, strict=True):
            assert self.allocator.length(owner.id) == len(owner.tokens)
            written = int(self.allocator._rows.written[self.allocator._row_of[owner.id]])
            visible = 0 if self.window is None else max(written - self.window + 1, 0)
            assert (table[visible // self.size : -(-len(owner.tokens) // self.size)] >= 0).all()
            for i in range(owner.computed):
                page = table[i // self.size]
                assert page < 0 or self.pool[page * self.size + i % self.size] == owner.tag(i)
            if self.window is not None and self.share == "written" and owner.marked == written:
                assert (table[: max(written - self.window, 0) // self.size] == -1).all()

    @invariant()
    def cached_pages_hold_their_tokens(self) -> None:
        """Every page that can be found and was computed holds the tokens that it is found by."""
        pool = self.allocator._pool
        pending: list[tuple[tuple[Hashable, ...], Any]]
        pending = [((self.weights, root.key), root) for root in pool._roots.values()]
        while pending:
            prefix, node = pending.pop()
            assert node.pages or node.children or node.holders
            pending += [((*prefix, *tokens), child) for tokens, child in node.children.items()]
            for page in node.pages:
                slots = range(page * self.size, (page + 1) * self.size)
                start = len(prefix) - self.size
                assert [self.pool[slot] for slot in slots] == [prefix[: start + i + 1] for i in range(self.size)]

    @invariant()
    def accounted(self) -> None:
        """Each page has as many owners as it has rows, and they agree about its place and tokens; the rest is free."""
        rows, meanings = Counter[int](), {}
        for owner in self.owners:
            pages = self.allocator.pages(owner.id)
            assert len(pages) == -(-len(owner.tokens) // self.size)
            for i, page in enumerate(pages):
                if page < 0:
                    continue
                rows[page] += 1
                place, tags = meanings.setdefault(page, (i, []))
                assert place == i
                tags.append(owner.tag(min((i + 1) * self.size, len(owner.tokens)) - 1))
        for _, tags in meanings.values():
            longest = max(tags, key=len)
            assert all(longest[: len(tag)] == tag for tag in tags)
        pool, stats = self.allocator._pool, self.allocator.stats
        assert pool.owners == [rows[page] for page in range(self.allocator.num_pages)]
        findable = [node is not None for node in pool._node_of]
        assert pool.claims.tolist() == [a + b for a, b in zip(pool.owners, findable, strict=True)]
        free = [*pool._blank, *pool._cached]
        assert sorted(free) == [page for page in range(self.allocator.num_pages) if not rows[page]]
        assert [page for page in pool._blank if findable[page]] == []
        assert (stats.pages_in_use, self.allocator.pages_in_use) == (len(rows), len(rows))
        assert stats.pages_cached + stats.pages_free == self.allocator.num_free == len(free)
        assert (stats.hits + stats.misses, stats.tokens_found) == (self.lookups, self.found)

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
TestHistories.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
