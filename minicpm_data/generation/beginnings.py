"""What the prompts of an engine begin with: the text that is worth a file, because most of them share it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK = 32  # tokens: a beginning is a number of whole blocks
MOST = 1 << 15  # blocks that are counted


@dataclass
class _Node:
    count: int = 0
    after: dict[tuple[int, ...], "_Node"] = field(default_factory=dict)


class Beginnings:
    """Counts the prompts by their beginnings."""

    def __init__(self) -> None:
        self._root, self._nodes = _Node(), 0

    def add(self, prompt: Sequence[int]) -> None:
        """Count a prompt. Blocks beyond `MOST` are not counted."""
        node = self._root
        node.count += 1
        for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
            block = tuple(prompt[start : start + BLOCK])
            if block not in node.after:
                if self._nodes >= MOST:
                    return
                self._nodes += 1
                node.after[block] = _Node()
            node = node.after[block]
            node.count += 1

    def common(self) -> list[int]:
        """The longest beginning of at least two prompts, and at least half of those that are a block long."""
        found: list[int] = []
        least = max(2, sum(node.count for node in self._root.after.values()) / 2)
        node = self._root
        while node.after:
            block, node = max(node.after.items(), key=lambda item: item[1].count)
            if node.count < least:
                break
            found.extend(block)
        return found
