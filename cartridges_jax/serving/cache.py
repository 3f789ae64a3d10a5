"""Which page of the device's memory holds what: cartridges and beginnings of prompts, each once, however many use it.

No JAX. Pages form trees: a root is a cartridge (or none), every other node is one page of tokens behind its parent's,
so that a path spells the beginning of a prompt. A request holds a path, and behind it pages that nobody else sees.
What nobody holds stays until its pages are wanted, the longest unused first; whoever holds a node holds its parents,
and lets go of them last, so that what is dropped first is always the end of a path.
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
class Lease:
    """A request's pages: those of the nodes of `path`, and `own`. Its first `cached` tokens are written already."""

    path: list[Node]
    own: list[int]
    cached: int
    load: bool = False  # whether the cartridge has still to be written to the path's first pages
    copy: tuple[int, int] | None = None  # from another's page to the first own one, before anything else is written

    @property
    def pages(self) -> list[int]:
        return [page for node in self.path for page in node.pages] + self.own


class PageCache:
    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages))[::-1]
        self._roots: dict[str | None, Node] = {}
        self._idle: dict[Node, None] = {}  # held by nobody; the one used longest ago comes first

    def pages_needed(self, prefix: Prefix | None, num_tokens: int) -> int:
        return self._count(prefix.length if prefix else 0) + self._count(num_tokens)

    def lease(self, prefix: Prefix | None, prompt: Sequence[int], num_tokens: int) -> Lease | None:
        """Pages for `num_tokens` behind the cartridge, the prompt the first of them; None if there are too few.

        What is there already is shared, but for the prompt's last token: the answer begins with its decoding.
        """
        key = prefix.key if prefix else None
        root = self._roots.setdefault(key, Node([], key=key))
        missing = self._count(prefix.length) if prefix and not root.pages else 0
        path = [root, *self._known(root, prompt[:-1])]
        known = (len(path) - 1) * self.page_size
        self._hold(path)
        wanted = missing + self._count(num_tokens - known)
        source, copied = _longest(path[-1], prompt[known:-1])
        taken = self._take(wanted, source)
        if taken is None:
            source, copied = None, 0
            taken = self._take(wanted, None)
        if taken is None:
            self._let_go(path)
            return None
        root.pages += taken[:missing]
        own = taken[missing:]
        copy = (source.pages[0], own[0]) if source else None
        return Lease(path, own, known + copied, missing > 0, copy)

    def publish(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Others may use what the lease has written: `tokens`, from the first behind the cartridge."""
        parent, size = lease.path[-1], self.page_size
        if parent.tokens and len(parent.tokens) < size:  # the page that was published half full
            lease.path.pop()
            parent = self._withdraw(parent, lease)
        done = (len(lease.path) - 1) * size
        while done < len(tokens) and lease.own:
            part = tuple(tokens[done : done + size])
            page = lease.own.pop(0)
            node = parent.children.get(part)
            if node is None:
                node = parent.children[part] = Node([page], part, parent)
            elif len(part) < size:  # somebody else's, who goes on writing there
                lease.own.insert(0, page)
                return
            else:
                self._free.append(page)
            self._hold([node])
            lease.path.append(node)
            parent, done = node, done + size

    def release(self, lease: Lease, tokens: Sequence[int]) -> None:
        """The request has ended; what it has written is kept as long as there is room."""
        self.publish(lease, tokens)
        self._free += lease.own
        self._let_go(lease.path)

    def _withdraw(self, node: Node, lease: Lease) -> Node:
        """The lease's last page becomes its own again, to be published with what was written since."""
        assert node.parent is not None and not node.children
        del node.parent.children[node.tokens]
        lease.own.insert(0, node.pages[0])
        return node.parent

    def _known(self, root: Node, tokens: Sequence[int]) -> list[Node]:
        """Nodes whose full pages spell the beginning of `tokens`."""
        path, node = [], root
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            child = node.children.get(tuple(tokens[start : start + self.page_size]))
            if child is None:
                break
            path.append(node := child)
        return path

    def _take(self, count: int, spare: Node | None) -> list[int] | None:
        """So many pages, for which all that is idle may be dropped but `spare`; None if that is not enough."""
        idle = [node for node in self._idle if node is not spare]
        if count > len(self._free) + sum(len(node.pages) for node in idle):
            return None
        for node in idle:
            if len(self._free) >= count:
                break
            self._drop(node)
        return [self._free.pop() for _ in range(count)]

    def _drop(self, node: Node) -> None:
        assert not node.children
        del self._idle[node]
        self._free += node.pages
        if node.parent is None:
            del self._roots[node.key]
        else:
            del node.parent.children[node.tokens]

    def _hold(self, path: Sequence[Node]) -> None:
        for node in path:
            node.users += 1
            self._idle.pop(node, None)

    def _let_go(self, path: Sequence[Node]) -> None:
        for node in reversed(path):
            node.users -= 1
            if node.users == 0:
                self._idle[node] = None

    def _count(self, num_positions: int) -> int:
        return -(-num_positions // self.page_size)


def _longest(parent: Node, tokens: Sequence[int]) -> tuple[Node | None, int]:
    """The child that begins like `tokens` for longest, and how long."""
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
