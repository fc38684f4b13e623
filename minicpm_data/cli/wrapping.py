"""The terminal of a chat: wrapping at words, keeping typed keys from being shown, and a word while one waits."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

TAB = 8
PATIENCE = 2.0  # seconds without a token, after which the user is told why
# They belong to the character before them, and do not begin a line.
CLOSING = frozenset("，。、；：？！）】》」』”’…%")


def columns() -> int:
    """The width of the terminal now; the user may resize it at any time."""
    try:
        return max(2, os.get_terminal_size(sys.stdout.fileno()).columns)
    except (OSError, ValueError):  # no terminal
        return 80


class Wrapper:
    """Breaks text that arrives in pieces at spaces, and between wide characters such as Chinese ones.

    The last word is held back until it is complete.
    """

    def __init__(self) -> None:
        self._word, self._column = "", 0  # the held word, with the spaces before it; columns before it

    def add(self, text: str) -> str:
        """What can be printed, now that ``text`` has arrived."""
        return "".join(map(self._add, text))

    def finish(self) -> str:
        """The rest."""
        word, self._word = self._word, ""
        return self._placed(word)

    def _add(self, char: str) -> str:
        if char == "\n":
            ready, self._column = self.finish() + char, 0
            return ready
        last = self._word[-1:]
        starts = char.isspace() and not last.isspace()
        starts |= _wide(char) and char not in CLOSING and not last.isspace()
        starts |= not char.isspace() and (_wide(last) or last in CLOSING) and char not in CLOSING
        ready = self.finish() if starts else ""
        self._word += char
        return ready

    def _placed(self, word: str) -> str:
        """The word, on a line of its own where it does not fit this one. A longer one is left to the terminal."""
        most, bare = columns(), word.lstrip(" ")
        # A terminal that became narrower has broken the line itself.
        self._column = _place(self._column, most)
        if bare and self._column and self._column + self._width(word) > most:
            self._column = _place(self._width(bare), most)
            return f"\n{bare}"
        self._column = _place(self._column + self._width(word), most)
        return word

    def _width(self, word: str) -> int:
        from prompt_toolkit.utils import get_cwidth

        return sum(TAB if char == "\t" else get_cwidth(char) for char in word)


def _place(column: int, most: int) -> int:
    """The column in the last of the lines of ``most`` columns into which a terminal breaks a line."""
    return column and (column - 1) % most + 1


def _wide(char: str) -> bool:
    from prompt_toolkit.utils import get_cwidth

    return bool(char) and get_cwidth(char) > 1


@contextlib.contextmanager
def keys_unseen() -> Iterator[None]:
    """Keep the terminal from showing what is typed within. It stays in the terminal's queue for the next question."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (AttributeError, OSError, ValueError, termios.error):  # no terminal
        yield
        return
    changed = termios.tcgetattr(number)
    changed[0] &= ~termios.ICRNL  # Return arrives as while a question is typed
    changed[3] = changed[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH  # Ctrl-C drops nothing
    termios.tcsetattr(number, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


@contextlib.contextmanager
def waiting(said: str) -> Iterator[None]:
    """Show ``said`` on a terminal if what is within takes longer than `PATIENCE`, and remove it afterwards."""
    if not sys.stderr.isatty():
        yield
        return
    shown = threading.Event()

    def show() -> None:
        shown.set()
        print(said, end="", flush=True, file=sys.stderr)

    timer = threading.Timer(PATIENCE, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if shown.is_set():
            from prompt_toolkit.output import create_output

            output = create_output(sys.stderr)
            output.cursor_backward(len(said))
            output.erase_end_of_line()
            output.flush()
