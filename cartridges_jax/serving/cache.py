"""Which page of the device's memory holds what: cartridges and beginnings of prompts, each once, however many use it.

Pages form trees: a root is a cartridge (or none), and every other node is one page of tokens behind its parent's, so
that a path spells the beginning of a prompt. A request has acquired the nodes of a path, and has pages behind it that
nobody else sees. A node that no request uses stays until its pages are wanted; the one that was used longest ago is
dropped first. Whoever uses a node uses its parents and releases them last, so that the end of a path is always dropped
before its beginning. No JAX is needed here.

A page has a head page for every kv head of every layer. Tokens take whole pages. A cartridge takes as many head pages
as it needs: whole pages, and for the rest a *fragment* of a page, which it shares with the fragments of others.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Prefix:
    """A loaded cartridge: `key` is its identity, version included, and `length` how many slots a head has.

    Where heads have different numbers of slots, it is their average, rounded up.
    """

    key: str
    length: int
    cartridge: object = field(compare=False)
    thinking: bool | None = None  # the mode in which it was trained to answer; None: as the chat template has it

    @classmethod
    def of(cls, key: str, cartridge: Any) -> Prefix:
        """Takes the length and the mode from the cartridge; few formats know the latter, or lengths by head."""
        lengths = getattr(cartridge, "lengths", None)
        length = cartridge.num_slots if lengths is None else math.ceil(lengths.mean())
        return cls(key, length, cartridge, getattr(cartridge, "thinking", None))


WORTH_COPYING = 8  # a page of which less than this part is wanted is not copied: to write the tokens again costs less


class Fragment(NamedTuple):
    """Head pages `start` to `start` + `count` - 1 of a page."""

    page: int
    start: int
    count: int


@dataclass(eq=False)
class Node:
    """A cartridge's pages and its fragment of one, or one page of tokens (all of whose parents' pages are full)."""

    pages: list[int]
    fragment: Fragment | None = None
    tokens: tuple[int, ...] = ()
    parent: Node | None = None
    key: str | None = None  # of a root
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    ordered: list[tuple[int, ...]] = field(default_factory=list)  # what the children are found by, sorted
    users: int = 0

    def add(self, child: Node) -> None:
        self.children[child.tokens] = child
        bisect.insort(self.ordered, child.tokens)

    def remove(self, child: Node) -> None:
        del self.children[child.tokens]
        del self.ordered[bisect.bisect_left(self.ordered, child.tokens)]


@dataclass
class Allocation:
    """A request's pages: those of the nodes of `path`, and `own`. Its first `cached` tokens are written already.

    In `slots` it is said where the head pages of its cartridge begin, page by page, as in a `BlockTable`.
    """

    path: list[Node]
    own: list[int]
    slots: tuple[int, ...]
    cached: int
    load: bool = False  # whether the cartridge has still to be written to its head pages
    copy: tuple[int, int] | None = None  # a page and the first own one, to which it is copied before all else

    @property
    def pages(self) -> list[int]:
        """The pages of its tokens."""
        return [page for node in self.path[1:] for page in node.pages] + self.own


class PageCache:
    """Allocates the pages of requests, and remembers what those that were used hold.

    Args:
      heads_per_page: how many head pages a page has.
      head_pages: how many of them a cartridge takes.
    """

    def __init__(self, num_pages: int, page_size: int, heads_per_page: int, head_pages: Callable[[Prefix], int]):
        self.num_pages, self.page_size, self.heads_per_page = num_pages, page_size, heads_per_page
        self._head_pages = head_pages
        self._free_pages = list(range(num_pages))[::-1]
        self._fragments: dict[int, set[Fragment]] = {}  # those that are taken, by the pages that have any
        self._roots: dict[str | None, Node] = {}
        self._idle: dict[Node, None] = {}  # nodes that no request uses; the one used longest ago comes first
        self._num_idle_pages = 0  # that are theirs alone

    @property
    def num_used(self) -> int:
        """Pages that requests hold; any others are free, or can be freed at once.

        Another thread may ask: it sees lists that were copied in one piece, of about the same moment.
        """
        dropped = {node.fragment for node in list(self._idle)}
        emptied = sum(taken <= dropped for taken in list(self._fragments.values()))
        return self.num_pages - len(self._free_pages) - self._num_idle_pages - emptied

    def pages_needed(self, prefix: Prefix | None, num_tokens: int) -> int:
        """How many pages a request takes if it has nothing in common with others; part of a page counts as one."""
        slots = -(-self._head_pages(prefix) // self.heads_per_page) if prefix else 0
        return slots + self._count(num_tokens)

    def allocate(
        self, prefix: Prefix | None, known: Sequence[int], num_tokens: int, spare: int = 0
    ) -> Allocation | None:
        """Allocates pages for so many tokens; None if there are too few, with `spare` more for others.

        Pages that hold the cartridge already, or a beginning of the tokens that are `known`, are shared.
        """
        key = prefix.key if prefix else None
        root = self._roots.setdefault(key, Node([], key=key))
        is_missing = prefix is not None and not root.pages and root.fragment is None
        whole, rest = divmod(self._head_pages(prefix), self.heads_per_page) if prefix and is_missing else (0, 0)
        path = [root, *self._known(root, known)]
        shared = (len(path) - 1) * self.page_size
        self._acquire(path)
        wanted = whole + self._count(num_tokens - shared)
        source, copied = _longest(path[-1], known[shared:])
        if copied * WORTH_COPYING < self.page_size:
            source, copied = None, 0
        is_there = self._make_room(wanted, rest, source, spare)
        if not is_there:
            source, copied = None, 0
            is_there = self._make_room(wanted, rest, None, spare)
        if not is_there:
            self._release(path)
            return None
        if rest:
            root.fragment = self._take_fragment(rest)
        taken = [self._free_pages.pop() for _ in range(wanted)]
        root.pages += taken[:whole]
        own = taken[whole:]
        copy = (source.pages[0], own[0]) if source else None
        return Allocation(path, own, self._slots(root), shared + copied, whole + rest > 0, copy)

    def extend(self, allocation: Allocation) -> int | None:
        """Gives a request one more page for its tokens; None if there is none."""
        while not self._free_pages and self._idle:
            self._drop(next(iter(self._idle)))
        if not self._free_pages:
            return None
        allocation.own.append(self._free_pages.pop())
        return allocation.own[-1]

    def insert(self, allocation: Allocation, tokens: Sequence[int]) -> None:
        """Lets others use what a request has written: `tokens`, from the first behind the cartridge."""
        parent, size = allocation.path[-1], self.page_size
        if parent.tokens and len(parent.tokens) < size:  # inserted half full: its page is an own one again
            node = allocation.path.pop()
            assert node.parent is not None and not node.children
            node.parent.remove(node)
            allocation.own.insert(0, node.pages[0])
            parent = node.parent
        done = (len(allocation.path) - 1) * size
        while done < len(tokens) and allocation.own:
            part = tuple(tokens[done : done + size])
            page = allocation.own.pop(0)
            node = parent.children.get(part)
            if node is None:
                node = Node([page], tokens=part, parent=parent)
                parent.add(node)
            elif len(part) < size:  # the page of another request, which goes on writing there
                allocation.own.insert(0, page)
                return
            else:
                self._free_pages.append(page)
            self._acquire([node])
            allocation.path.append(node)
            parent, done = node, done + size

    def free(self, allocation: Allocation, tokens: Sequence[int]) -> None:
        """Ends a request's use of its pages; the tokens that it has written are kept as long as there is room."""
        self.insert(allocation, tokens)
        self._free_pages += allocation.own
        self._release(allocation.path)

    def _known(self, root: Node, tokens: Sequence[int]) -> list[Node]:
        """The nodes whose full pages spell the beginning of `tokens`."""
        path, node = [], root
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            child = node.children.get(tuple(tokens[start : start + self.page_size]))
            if child is None:
                break
            path.append(node := child)
        return path

    def _make_room(self, count: int, rest: int, kept: Node | None, spare: int = 0) -> bool:
        """Drops idle nodes other than `kept` until `count` pages and a fragment of `rest` head pages are free.

        If dropping all of them were not enough, with so many pages to spare, none is dropped, and the result is False.
        """
        pages = len(self._free_pages) + self._num_idle_pages - (len(kept.pages) if kept in self._idle else 0)
        if rest or pages < count + spare:  # then it takes a closer look
            idle = [node for node in self._idle if node is not kept]
            if not self._has_room(count + spare, rest, idle):
                return False
        while not self._has_room(count, rest, ()):
            self._drop(next(node for node in self._idle if node is not kept))
        return True

    def _has_room(self, count: int, rest: int, gone: Collection[Node]) -> bool:
        """Whether so much would be free if these nodes were dropped."""
        dropped = {node.fragment for node in gone}
        kept = {page: taken - dropped for page, taken in self._fragments.items()}
        emptied = sum(not taken for taken in kept.values())
        pages = len(self._free_pages) + sum(len(node.pages) for node in gone) + emptied
        return pages >= count + (rest > 0 and self._gap(rest, kept) is None)

    def _gap(self, count: int, fragments: dict[int, set[Fragment]]) -> Fragment | None:
        """The smallest free part, of the pages that have fragments, that has so many head pages."""
        gaps = []
        for page, taken in fragments.items():
            ends = [0, *sorted(end for f in taken for end in (f.start, f.start + f.count)), self.heads_per_page]
            gaps += [(end - start, page, start) for start, end in zip(ends[::2], ends[1::2], strict=True) if taken]
        found = min((gap for gap in gaps if gap[0] >= count), default=None)
        return None if found is None else Fragment(found[1], found[2], count)

    def _take_fragment(self, count: int) -> Fragment:
        fragment = self._gap(count, self._fragments) or Fragment(self._free_pages.pop(), 0, count)
        self._fragments.setdefault(fragment.page, set()).add(fragment)
        return fragment

    def _slots(self, root: Node) -> tuple[int, ...]:
        firsts = [page * self.heads_per_page for page in root.pages]
        if root.fragment is not None:
            firsts.append(root.fragment.page * self.heads_per_page + root.fragment.start)
        return tuple(firsts)

    def _drop(self, node: Node) -> None:
        assert not node.children
        del self._idle[node]
        self._num_idle_pages -= len(node.pages)
        self._free_pages += node.pages
        if node.fragment is not None:
            page = node.fragment.page
            self._fragments[page].remove(node.fragment)
            if not self._fragments[page]:
                del self._fragments[page]
                self._free_pages.append(page)
        if node.parent is None:
            del self._roots[node.key]
        else:
            node.parent.remove(node)

    def _acquire(self, path: Sequence[Node]) -> None:
        for node in path:
            node.users += 1
            if node in self._idle:
                del self._idle[node]
                self._num_idle_pages -= len(node.pages)

    def _release(self, path: Sequence[Node]) -> None:
        for node in reversed(path):
            node.users -= 1
            if node.users == 0:
                self._idle[node] = None
                self._num_idle_pages += len(node.pages)

    def _count(self, num_positions: int) -> int:
        return -(-num_positions // self.page_size)


def _longest(parent: Node, tokens: Sequence[int]) -> tuple[Node | None, int]:
    """The child that shares the longest beginning with `tokens`, and the length of that beginning."""
    tokens = tuple(tokens)
    at = bisect.bisect_left(parent.ordered, tokens)
    best, most = None, 0
    for beside in parent.ordered[max(at - 1, 0) : at + 1]:  # no other has more in common with what stands between them
        pairs = zip(beside, tokens, strict=False)
        length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if length > most:
            best, most = parent.children[beside], length
    return best, most
