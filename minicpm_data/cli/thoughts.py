"""The thought of an answer in a terminal: dimmed, or hidden, and its length where it ends."""

import os
import sys
import time
from contextlib import ExitStack

from minicpm_data.cli.wrapping import waiting
from minicpm_data.generation.responses import Response

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class ShownThought:
    """Prints the thought of one answer.

    Attributes:
        text: the thought so far.
        shown: whether it is printed: as the user wants it, and by default on a terminal.
        open: whether it has begun and not ended.
        tokens: its length.
    """

    def __init__(self, shown: bool | None = None):
        terminal = sys.stdout.isatty()
        self.shown = terminal if shown is None else shown
        self.text, self.open, self.tokens = "", False, 0
        self._styled = terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._began = time.perf_counter()
        self._seconds = 0.0
        self._responses = 0
        self._hidden = ExitStack()

    def take(self, response: Response) -> tuple[str, str]:
        """Take in the next response.

        Returns:
            What is printed before the thought's next text, and that text; both empty for a response of the answer.
        """
        if not self._responses:
            self._began = time.perf_counter()
        self._responses += response.token is not None
        if not response.reasoning:
            return "", ""
        begins, self.open = not self.open, True
        self.text += response.reasoning
        self.tokens, self._seconds = self._responses, time.perf_counter() - self._began
        if not self.shown:
            if begins:
                self._hidden.enter_context(waiting("thinking .."))
            return "", ""
        return DIM if begins and self._styled else "", response.reasoning

    def end(self) -> str:
        """End the thought, and return what is printed after its text."""
        self._hidden.close()
        printed = self.open and self.shown
        self.open = False
        return (PLAIN if self._styled else "") + "\n" if printed else ""

    def length(self) -> str:
        """Its length as a note: ``thought for 214 tokens, 3.2 s``."""
        return f"thought for {self.tokens} token{'s' * (self.tokens != 1)}, {self._seconds:.1f} s"
