"""The pages of a pool: who owns them, which tokens they hold, and which goes next. No sequences here.

Known tokens form a tree. A node is a prefix that ends on a page boundary; its edge is the tuple of tokens of its last
page, so a lookup compares tokens, and equal hashes alone never match. A node whose pages are gone stays while
it has children or a live sequence ends there, since with a window later pages are of use without earlier ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np

from jax_paged_attn._allocator_types import OutOfPages


@dataclass(eq=False, slots=True)
class Node:
    """A known prefix that ends on a page boundary.

    Its pages all hold the same content: either each has an owner, or there is a single one and it is free.
    """

    parent: Node | None  # None for a root, the empty prefix of one salt
    key: Hashable  # the tokens of its last page; a root's salt
    children: dict[Hashable, Node] = field(default_factory=dict)
    pages: dict[int, None] = field(default_factory=dict)
    holders: int = 0  # live sequences whose findable pages end here


class PagePool:
    """Pages are blank, or owned, or free but findable: blank → owned → findable → owned or blank again.

    Attributes:
      owners: per page, how many sequences have it in their table.
      claims: int32 `[P]`, owners, and one more if the page is findable. An owner may write where this is 1.
      evictions: how many findable pages were taken for new content.
    """

    def __init__(self, num_pages: int):
        self.owners = [0] * num_pages
        self.claims = np.zeros(num_pages, np.int32)
        self.evictions = 0
        self._node_of: list[Node | None] = [None] * num_pages
        self._computed = bytearray(num_pages)  # 1 where somebody said that a findable page is in the cache
        self._blank = list(range(num_pages))[::-1]  # free, content worthless; the last one goes first
        self._cached: OrderedDict[int, None] = OrderedDict()  # free but findable, freed longest ago first
        self._roots: dict[Hashable, Node] = {}

    @property
    def num_blank(self) -> int:
        return len(self._blank)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def cached(self) -> tuple[int, ...]:
        """Pages without an owner that are findable, freed longest ago first."""
        return tuple(self._cached)

    def require(self, needed: int, reserved: int = 0) -> None:
        """Raises OutOfPages unless `needed` pages can be taken while `reserved` free ones stay."""
        free = len(self._blank) + len(self._cached) - reserved
        if needed > free:
            raise OutOfPages(needed, free)

    # ---- owners

    def take(self) -> int:
        """A free page with one owner; forgets the content of the least recently used one if none is blank."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self.forget(page)
            self.evictions += 1
        self.owners[page] = self.claims[page] = 1
        return page

    def own(self, page: int) -> None:
        """One more owner for a page with content."""
        if self.owners[page] == 0:
            del self._cached[page]
        self.owners[page] += 1
        self.claims[page] += 1

    def disown(self, page: int) -> None:
        """One owner less. Without any, the page stays findable if it is the only one with its content."""
        self.owners[page] -= 1
        self.claims[page] -= 1
        if self.owners[page] > 0:
            return
        node = self._node_of[page]
        if node is not None and len(node.pages) == 1 and self._computed[page]:
            self._cached[page] = None
        else:
            self.forget(page)
            self._blank.append(page)

    # ---- the tree

    def root(self, salt: Hashable) -> Node:
        """The empty prefix of a salt; the caller has to hold it."""
        return self._roots.setdefault(salt, Node(None, salt))

    def find(
        self, salt: Hashable, tokens: tuple[Hashable, ...], page_size: int, at_hand: int | None
    ) -> tuple[list[Node], list[int]]:
        """The longest reusable prefix of whole pages: its nodes, and those of its pages that have to be there.

        Args:
          at_hand: how many of its last pages have to be there; None for all.
        """
        node = self._roots.get(salt)
        nodes: list[Node] = []
        if node is None:
            return nodes, []
        best = run = 0
        for start in range(0, len(tokens) - page_size + 1, page_size):
            node = node.children.get(tokens[start : start + page_size])
            if node is None or (at_hand is None and not node.pages):
                break
            nodes.append(node)
            run = run + 1 if node.pages else 0
            if at_hand is None or run >= min(at_hand, len(nodes)):
                best = len(nodes)
        first = 0 if at_hand is None else max(best - at_hand, 0)
        return nodes[:best], [next(iter(node.pages)) for node in nodes[first:best]]

    def enter(self, page: int, parent: Node, key: Hashable, computed: bool) -> Node:
        """Makes an owned page findable. A free page with the same content is now useless."""
        node = self.child(parent, key)
        if page in node.pages:  # a fork was first
            return node
        self.forget(page)  # a fork was told other tokens; no page may have two nodes
        other = next(iter(node.pages), page)
        node.pages[page] = None
        self._node_of[page] = node
        self._computed[page] = computed
        self.claims[page] += 1
        if self.owners[other] == 0:
            self._discard(other)
        return node

    def child(self, parent: Node, key: Hashable) -> Node:
        """The prefix that is one page longer; a new one has no pages and the caller has to hold it."""
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(parent, key)
        return node

    def vouch(self, pages: Iterable[int]) -> None:
        """Says that findable pages are in the cache: the last first, as far as this is news."""
        for page in pages:
            if self._computed[page]:
                return
            self._computed[page] = True

    def forget(self, page: int) -> None:
        """Makes a page unfindable."""
        node = self._node_of[page]
        if node is None:
            return
        self._node_of[page] = None
        self._computed[page] = False
        self.claims[page] -= 1
        del node.pages[page]
        self._prune(node)

    def forget_free(self, node: Node) -> None:
        """Blanks the page of a node that nobody owns."""
        for page in [page for page in node.pages if self.owners[page] == 0]:
            self._discard(page)

    def hold(self, node: Node, instead_of: Node | None = None) -> None:
        """Keeps a node for a live sequence, and no longer the one that the sequence held before."""
        node.holders += 1
        if instead_of is not None:
            instead_of.holders -= 1
            self._prune(instead_of)

    def let_go(self, node: Node) -> None:
        node.holders -= 1
        self._prune(node)

    def reset(self) -> None:
        """Forgets every prefix. Whoever holds a node has to hold a new one."""
        self._node_of = [None] * len(self._node_of)
        self._computed = bytearray(len(self._computed))
        self.claims[:] = self.owners
        self._blank.extend(self._cached)
        self._cached.clear()
        self._roots.clear()

    def _discard(self, page: int) -> None:
        """Blanks a findable page without an owner."""
        del self._cached[page]
        self.forget(page)
        self._blank.append(page)

    def _prune(self, node: Node | None) -> None:
        """Removes a node that nothing needs, then its parents likewise."""
        while node is not None and not (node.pages or node.children or node.holders):
            if node.parent is None:
                del self._roots[node.key]
            else:
                del node.parent.children[node.key]
            node = node.parent
