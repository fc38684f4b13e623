"""The pages of a key/value cache: which are free, which rows hold them, and which hold a text that others may share.

The cache of an engine is a pool of pages of P tokens. A row holds the pages of its text, in order. A page that is full
gets a key: its tokens, and the page before it. A later prompt that begins with the same pages shares them. A page that
no row holds any more keeps its text until its place is needed, the least recently used first.

The host's half: numbers of pages alone. Source of the scheme: vLLM (arXiv 2309.06180); keys compare the tokens, not a
hash of them.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from weights_io.errors import InputError

NOBODY = 0  # the page to which empty rows write
NONE = 0  # the parent of a row's first page, without an adapter


@dataclass
class Row:
    """The pages of a request.

    Attributes:
        pages: their numbers, in the order of the text.
        shared: how many of them held the beginning of the text before the row came.
        named: how many have a key, or hold a text that another page has a key for.
        parent: serial of the last of those; the root (see `PagePool.take`) without one.
    """

    pages: list[int]
    shared: int
    named: int
    parent: int


class PagePool:
    """Pages 1 .. ``pages`` - 1 of ``page`` tokens each.

    Every page is in exactly one of three states: free; held by one or more rows; kept, with a text and no row.
    """

    def __init__(self, pages: int, page: int):
        if pages < 2:
            raise InputError(f"a pool of {pages} pages holds no request; give it room for at least one page.")
        self.pages, self.page = pages, page
        self._free = list(range(pages - 1, NOBODY, -1))  # the last is next
        self._references = [0] * pages
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}  # page -> (parent's serial, tokens)
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}  # and back
        self._serials: dict[int, int] = {}  # page with a key -> number that no other text ever had
        self._next_serial = itertools.count(NONE + 1)

    @property
    def available(self) -> int:
        """Pages that a row can get: free or kept."""
        return len(self._free) + len(self._kept)

    def needed(self, tokens: int) -> int:
        """Pages of ``tokens`` tokens."""
        return -(-tokens // self.page)

    def shared(self, text: Sequence[int], root: int = NONE) -> tuple[list[int], int]:
        """The pages that hold the beginning of a text, and the serial of the last; ``root`` without one.

        Whole pages, and never all of the text, because its last token must be run.
        """
        found, parent = [], root
        for start in range(0, len(text) - self.page, self.page):
            page = self._known.get((parent, tuple(text[start : start + self.page])))
            if page is None:
                break
            found.append(page)
            parent = self._serials[page]
        return found, parent

    def fits(self, text: Sequence[int], share: bool = True, spare: int = 0, root: int = NONE) -> bool:
        """Whether there are pages for a text; arguments as for `take`."""
        return self._fits(self.shared(text, root)[0] if share else [], self.needed(len(text)), spare)

    def _fits(self, shared: Sequence[int], count: int, spare: int) -> bool:
        kept = sum(page in self._kept for page in shared)
        return count - len(shared) <= self.available - kept - spare

    def take(self, text: Sequence[int], share: bool = True, spare: int = 0, root: int = NONE) -> "Row | None":
        """A row with pages for a text; None if there are too few.

        Arguments:
            text: token ids.
            share: whether to look for pages that hold its beginning.
            spare: pages that must stay available.
            root: parent of the first page: `NONE`, or a negative number for each adapter, as its keys are its own.
        """
        shared, parent = self.shared(text, root) if share else ([], root)
        count = self.needed(len(text))
        if not self._fits(shared, count, spare):
            return None
        for page in shared:
            self._kept.pop(page, None)
            self._references[page] += 1
        return Row([*shared, *(self._take() for _ in range(count - len(shared)))], len(shared), len(shared), parent)

    def fork(self, row: "Row") -> "Row":
        """Another row with the same pages."""
        for page in row.pages:
            self._references[page] += 1
        return Row(list(row.pages), row.shared, row.named, row.parent)

    def extend(self, row: "Row", count: int) -> None:
        """Give a row more pages, ``count`` in all. There must be as many."""
        row.pages.extend(self._take() for _ in range(count - len(row.pages)))

    def name(self, row: "Row", text: Sequence[int]) -> None:
        """Give keys to the full pages of a row, in which ``text`` is final, but to none whose text another page has."""
        while (row.named + 1) * self.page <= len(text):
            key = row.parent, tuple(text[row.named * self.page : (row.named + 1) * self.page])
            page = self._known.setdefault(key, row.pages[row.named])
            if page == row.pages[row.named]:
                self._keys[page], self._serials[page] = key, next(self._next_serial)
            row.parent, row.named = self._serials[page], row.named + 1

    def release(self, row: "Row") -> None:
        """A row ends. Its last pages are given away first."""
        for page in reversed(row.pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._keys:
                    self._kept[page] = None
                else:
                    self._free.append(page)
        row.pages.clear()

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            del self._known[self._keys.pop(page)], self._serials[page]
        self._references[page] = 1
        return page
