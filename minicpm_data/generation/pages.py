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

from weights_io.errors import InputError

NOBODY = 0  # the page to which empty rows write
FIRST = 0  # the key's parent of a row's first page


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
        self._next_serial = itertools.count(FIRST + 1)

    @property
    def available(self) -> int:
        """Pages that a row can get: free or kept."""
        return len(self._free) + len(self._kept)

    def needed(self, tokens: int) -> int:
        """Pages of ``tokens`` tokens."""
        return -(-tokens // self.page)

    def shared(self, text: Sequence[int]) -> list[int]:
        """The pages that hold the beginning of a text: whole pages, and never all of the text, because its last token must
        be run."""
        found, parent = [], FIRST
        for start in range(0, len(text) - self.page, self.page):
            page = self._known.get((parent, tuple(text[start : start + self.page])))
            if page is None:
                break
            found.append(page)
            parent = self._serials[page]
        return found

    def take(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """The pages of a new row: the ``shared`` ones and others, ``count`` in all; None if there are too few."""
        kept = sum(page in self._kept for page in shared)
        if count - len(shared) > self.available - kept:
            return None
        for page in shared:
            self._kept.pop(page, None)
            self._references[page] += 1
        return [*shared, *(self._take() for _ in range(count - len(shared)))]

    def extend(self, held: list[int], count: int) -> bool:
        """Give a row more pages, ``count`` in all. Returns whether there are enough; if not, nothing changes."""
        more = count - len(held)
        if more > self.available:
            return False
        held.extend(self._take() for _ in range(more))
        return True

    def name(self, held: Sequence[int], text: Sequence[int], named: int = 0) -> int:
        """Give keys to the full pages of a row, whose first ``len(text)`` slots are final.

        Arguments:
            held: the row's pages.
            text: the tokens in them.
            named: pages that have keys already.

        Returns:
            How many have keys now. A page whose text another page holds stays without one, and so do those behind it.
        """
        parent = self._serials[held[named - 1]] if named else FIRST
        while (named + 1) * self.page <= len(text):
            key = parent, tuple(text[named * self.page : (named + 1) * self.page])
            if key in self._known:
                break
            page = held[named]
            self._known[key], self._keys[page] = page, key
            parent = self._serials[page] = next(self._next_serial)
            named += 1
        return named

    def release(self, held: Sequence[int]) -> None:
        """A row ends. Its last pages are given away first."""
        for page in reversed(held):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._keys:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            del self._known[self._keys.pop(page)], self._serials[page]
        self._references[page] = 1
        return page
