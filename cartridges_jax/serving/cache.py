"""Which page of the device's memory holds what: cartridges and beginnings of prompts, each once, however many use it.

Pages form trees: a root is a cartridge (or none), and every other node is one page of tokens behind its parent's, so
that a path spells the beginning of a prompt. A request has acquired the nodes of a path, and has pages behind it that
nobody else sees. A node that no request uses stays until its pages are wanted; the one that was used longest ago is
dropped first. Whoever uses a node uses its parents and releases them last, so that the end of a path is always dropped
before its beginning. No JAX is needed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prefix:
    """A loaded cartridge: `key` is its identity, version included, and `length` its number of slots p."""

    key: str
    length: int
    cartridge: object = field(compare=False)
    thinking: bool | None = None  # the mode in which it was trained to answer; None: as the chat template has it


@dataclass(eq=False)
class Node:
    """A cartridge's pages, or one page of tokens (all of whose parents' pages are full)."""

    pages: list[int]
    tokens: tuple[int, ...] = ()
    parent: Node | None = None
    key: str | None = None  # of a root
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    users: int = 0


@dataclass
class Allocation:
    """A request's pages: those of the nodes of `path`, and `own`. Its first `cached` tokens are written already."""

    path: list[Node]
    own: list[int]
    cached: int
    load: bool = False  # whether the cartridge has still to be written to the path's first pages
    copy: tuple[int, int] | None = None  # a page and the first own one, to which it is copied before all else

    @property
    def pages(self) -> list[int]:
        return [page for node in self.path for page in node.pages] + self.own


class PageCache:
    """Allocates the pages of requests, and remembers what those that were used hold."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._free_pages = list(range(num_pages))[::-1]
        self._roots: dict[str | None, Node] = {}
        self._idle: dict[Node, None] = {}  # nodes that no request uses; the one used longest ago comes first

    def pages_needed(self, prefix: Prefix | None, num_tokens: int) -> int:
        return self._count(prefix.length if prefix else 0) + self._count(num_tokens)

    def allocate(self, prefix: Prefix | None, prompt: Sequence[int], num_tokens: int) -> Allocation | None:
        """Allocates pages for a prompt and its answer, `num_tokens` together; None if there are too few.

        Pages that hold the cartridge or a beginning of the prompt already are shared. The prompt's last token is never
        taken from them, since the answer begins with its decoding.
        """
        key = prefix.key if prefix else None
        root = self._roots.setdefault(key, Node([], key=key))
        missing = self._count(prefix.length) if prefix and not root.pages else 0
        path = [root, *self._known(root, prompt[:-1])]
        known = (len(path) - 1) * self.page_size
        self._acquire(path)
        wanted = missing + self._count(num_tokens - known)
        source, copied = _longest(path[-1], prompt[known:-1])
        taken = self._take(wanted, source)
        if taken is None:
            source, copied = None, 0
            taken = self._take(wanted, None)
        if taken is None:
            self._release(path)
            return None
        root.pages += taken[:missing]
        own = taken[missing:]
        copy = (source.pages[0], own[0]) if source else None
        return Allocation(path, own, known + copied, missing > 0, copy)

    def insert(self, allocation: Allocation, tokens: Sequence[int]) -> None:
        """Lets others use what a request has written: `tokens`, from the first behind the cartridge."""
        parent, size = allocation.path[-1], self.page_size
        if parent.tokens and len(parent.tokens) < size:  # the page that was inserted half full
            allocation.path.pop()
            parent = self._remove(parent, allocation)
        done = (len(allocation.path) - 1) * size
        while done < len(tokens) and allocation.own:
            part = tuple(tokens[done : done + size])
            page = allocation.own.pop(0)
            node = parent.children.get(part)
            if node is None:
                node = parent.children[part] = Node([page], part, parent)
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

    def _remove(self, node: Node, allocation: Allocation) -> Node:
        """Makes the path's last page an own one again, to be inserted with what was written since."""
        assert node.parent is not None and not node.children
        del node.parent.children[node.tokens]
        allocation.own.insert(0, node.pages[0])
        return node.parent

    def _known(self, root: Node, tokens: Sequence[int]) -> list[Node]:
        """The nodes whose full pages spell the beginning of `tokens`."""
        path, node = [], root
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            child = node.children.get(tuple(tokens[start : start + self.page_size]))
            if child is None:
                break
            path.append(node := child)
        return path

    def _take(self, count: int, spare: Node | None) -> list[int] | None:
        """Takes `count` pages, for which idle nodes other than `spare` may be dropped; None if that is not enough."""
        idle = [node for node in self._idle if node is not spare]
        if count > len(self._free_pages) + sum(len(node.pages) for node in idle):
            return None
        for node in idle:
            if len(self._free_pages) >= count:
                break
            self._drop(node)
        return [self._free_pages.pop() for _ in range(count)]

    def _drop(self, node: Node) -> None:
        assert not node.children
        del self._idle[node]
        self._free_pages += node.pages
        if node.parent is None:
            del self._roots[node.key]
        else:
            del node.parent.children[node.tokens]

    def _acquire(self, path: Sequence[Node]) -> None:
        for node in path:
            node.users += 1
            self._idle.pop(node, None)

    def _release(self, path: Sequence[Node]) -> None:
        for node in reversed(path):
            node.users -= 1
            if node.users == 0:
                self._idle[node] = None

    def _count(self, num_positions: int) -> int:
        return -(-num_positions // self.page_size)


def _longest(parent: Node, tokens: Sequence[int]) -> tuple[Node | None, int]:
    """The child that shares the longest beginning with `tokens`, and the length of that beginning."""
    best, most = None, 0
    for child in parent.children.values():
        length = 0
        for held, wanted in zip(child.tokens, tokens, strict=False):
            if held != wanted:
                break
            length += 1
        if length > most:
            best, most = child, length
    return best, most
