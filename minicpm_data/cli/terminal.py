"""A conversation in a terminal: what is typed, how an answer is shown, and the commands that begin with a slash."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_data.datasets.preview import CONTROLS
from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.generation.responses import Response

# Read on 60 columns too.
HELP = """/reset         forget the conversation
/system TEXT   begin anew with this system message, or none
/save FILE     add the conversation to a .jsonl file
               that lora can train on
/help          this text
/quit          end, as Ctrl-D; Ctrl-C stops an answer"""

Message = dict[str, str]


class Conversation:
    """The messages so far, and what the slash commands do to them."""

    def __init__(self, system: str | None):
        self.system = system
        self.messages = self._beginning()
        self._saved: dict[Path, tuple[int, int]] = {}  # own files, as they were left: inode and bytes

    def _beginning(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def reset(self) -> None:
        self.messages = self._beginning()

    def command(self, line: str) -> bool:
        """Do what a line that begins with a slash says; whether the conversation goes on. Raises `InputError` for a
        file that cannot be written."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match name:
            case "/quit" | "/exit":
                return False
            case "/reset":
                self.reset()
                print("(the conversation is forgotten)")
            case "/system":
                self.system = rest or None
                self.reset()
                print(f"(begun anew with {'this' if rest else 'no'} system message)")
            case "/save" if rest:
                print(self.save(Path(rest)))
            case _:
                print(HELP)
        return True

    def save(self, path: Path) -> str:
        """Add the conversation to a file; the line that says so. A file that was there before is added to only if the
        user says so. Raises `InputError` where nobody can be asked, or the file cannot be written."""
        if not any(message["role"] == "assistant" for message in self.messages):
            raise InputError("there is no answer to save yet; ask something first.")
        line = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        try:
            path = path.expanduser().resolve()
            if path.exists() and not path.is_file():
                raise InputError(f"{path} is no file that a conversation could be added to; choose another.")
            if path.exists() and self._saved.get(path) != _state(path) and path.stat().st_size and not may_add_to(path):
                return f"nothing is added to {path}"
            with path.open("ab+") as file:
                if file.tell():  # a last line without its end would go on with this one
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else "\n" + line
                file.write(line.encode(errors="replace"))
            state = _state(path)
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links or no such user; a NUL
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path} cannot be written ({reason}); choose another file.") from error
        self._saved[path] = state
        return f"{len(self.messages)} messages added to {path}"


def _state(path: Path) -> tuple[int, int]:
    """By which a file that somebody has replaced or written to is known."""
    found = path.stat()
    return found.st_ino, found.st_size


def may_add_to(path: Path) -> bool:
    """Whether the user wants that of a file that this conversation did not write. `InputError` where the input is no
    terminal."""
    if not sys.stdin.isatty():
        raise InputError(f"{path} is there already, and this conversation did not write it; choose another file.")
    print(f"{path} is there already, and this conversation did not write it. Add to it? (y / n)")
    try:
        return asker()().strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def typed_lines() -> Iterator[str]:
    """What the user types until the end of the input: on a terminal with line editing, earlier lines on the arrow keys,
    and a paste of several lines as one."""
    if sys.stdin is None:
        raise InputError("standard input is closed; run the command where something can be typed.")
    ask = asker()
    while True:
        try:
            line = ask()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("(/quit or Ctrl-D to end)")
        except UnicodeDecodeError:
            complain(InputError("what was typed is not UTF-8 text; set the terminal, or convert the file."))
        else:
            yield line


def asker() -> Callable[[], str]:
    """What reads the next line."""
    if not sys.stdin.isatty():
        return input
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "minicpm"
    history: History = InMemoryHistory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history").touch(mode=0o600)
        history = FileHistory(str(folder / "history"))
    except OSError:  # a home that is not ours to write: what was typed is forgotten at the end
        pass
    session: PromptSession[str] = PromptSession(">>> ", history=history)
    return session.prompt


def complain(error: InputError) -> None:
    """A conversation with a person goes on after a question that cannot be asked; one out of a file ends."""
    if not sys.stdin.isatty():
        raise error
    print(f"error: {error}", file=sys.stderr)


def printed(answer: "Iterable[Response]") -> str:
    """The answer, shown as it comes, on a terminal without control characters. Ctrl-C ends it early."""
    text, hidden = "", CONTROLS if sys.stdout.isatty() else {}
    try:
        for response in answer:
            print(response.text.translate(hidden), end="", flush=True)
            text += response.text
    except KeyboardInterrupt:
        pass
    print()
    return text.strip()
