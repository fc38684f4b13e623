"""A chat in a terminal: reading input, showing answers, and the slash commands."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_data.cli.thoughts import ShownThought
from minicpm_data.cli.wrapping import Wrapper, waiting
from minicpm_data.conversation.messages import with_images
from minicpm_data.datasets.jsonl import read_documents
from minicpm_data.datasets.preview import CONTROLS
from minicpm_data.datasets.turns import messages_of, read_turns
from minicpm_data.images.tags import with_parts, with_tags
from minicpm_data.keys import KeyRules
from weights_io.errors import InputError, short

if TYPE_CHECKING:
    from minicpm_data.generation.responses import Response
    from minicpm_data.images.processing import ProcessedImage

# At most 60 columns wide.
HELP = """/retry         ask the last question again
/image FILE    show the model an image with the next
               question; a dragged file works too
/reset         forget the conversation
/system TEXT   begin anew with this system message, or none
/set           show the settings
/set top_p 0.9 change one: max_tokens, thinking_budget, ..
/think on|off  let the model think before it answers; auto
               leaves it to its chat template
/stats         the speed of the last answer
/stats on|off  show it after each answer
/save FILE     add the conversation to a .jsonl file
               that lora can train on
/load FILE     continue the last conversation of a file
/help          this text
/quit          end, as Ctrl-D; Ctrl-C stops an answer
A line that begins with a space is a question, even if a
slash follows."""
COMMANDS = "/retry /image /reset /system /set /think /stats /save /load /help /quit /exit".split()
LONGEST = 16 << 20  # bytes of a file of conversations

Message = dict[str, Any]


class Conversation:
    """The messages of a chat, and the slash commands that change them.

    Arguments:
        system: the system message.
        before: a text that the first question continues.
        see: opens and cuts the image of a path; None for a model that does not see.
    """

    def __init__(self, system: str | None, before: str = "", see: "Callable[[str], ProcessedImage] | None" = None):
        self.system, self.before, self.see = system, before, see
        self.messages = self._beginning()
        self.images: list[ProcessedImage] = []  # that belong to the next question
        self._saved: dict[Path, tuple[int, int]] = {}  # files saved by this chat: inode and bytes

    def _beginning(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def asked(self, question: str) -> list[Message]:
        """The messages with one more question."""
        first = not any(message["role"] == "user" for message in self.messages)
        content = with_images((self.before if first else "") + question, self.images)
        return [*self.messages, {"role": "user", "content": content}]

    def reset(self) -> None:
        self.messages, self.images = self._beginning(), []

    def show(self, names: str) -> None:
        """Open the images of /image, which belong to the next question.

        Arguments:
            names: a path, or several with the quotes or backslashes of a shell, as a terminal writes a dragged file.

        Raises:
            InputError: the model does not see, or as `process`.
        """
        if self.see is None:
            raise InputError("this model takes no images; load one that sees, such as openbmb/MiniCPM-V-2.")
        if not names:
            raise InputError("/image needs the name of a file: /image FILE.")
        try:
            paths = [names] if Path(names).expanduser().is_file() else shlex.split(names)
        except (ValueError, OSError, RuntimeError):  # a quote that is not closed; no such user
            paths = [names]
        found = [self.see(path) for path in paths]
        self.images += found
        for image in found:
            print(f"({image})")

    def command(self, line: str) -> bool:
        """Run a slash command, and return whether the chat continues. Raises `InputError` where a file cannot be
        written."""
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
            case "/image":
                self.show(rest)
            case "/save" | "/load" if not rest:
                raise InputError(f"{name} needs the name of a file: {name} FILE.")
            case "/save":
                print(f"({self.save(Path(rest))})")
            case "/load":
                print(f"({self.load(Path(rest))})")
            case _:
                print(HELP)
        return True

    def load(self, path: Path) -> str:
        """Continue the last conversation of a file that /save wrote, and return a line that says so.

        Raises `InputError` where the file cannot be read or holds no conversation.
        """
        try:
            path = path.expanduser().resolve()
            if not path.is_file():
                raise InputError(f"{path} does not exist, or is no file; give one that /save wrote.")
            if path.stat().st_size > LONGEST:
                raise InputError(f"{path} is larger than {LONGEST:,} bytes; give a file that /save wrote.")
            found = [document for _, document in read_documents(path)]
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path} cannot be read ({reason}); give another file.") from error
        if not found:
            raise InputError(f"{path} is empty; give a file that /save wrote.")
        if unknown := sorted(found[-1].keys() - {"messages", "images"}):
            raise InputError(f"{path} has the key {short(unknown[0])!r}; give a file that /save wrote.")
        turns = read_turns(found[-1].get("messages"), KeyRules())
        images = found[-1].get("images", [])
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise InputError(f"{path} has images that are no paths; give a file that /save wrote.")
        if images and self.see is None:
            raise InputError(f"{path} holds images, and this model takes none; load one that sees.")
        messages = messages_of(turns)
        if images and self.see is not None:
            messages = with_parts(messages, [*map(self.see, images)], str(path))
        self.messages, self.images = messages, []
        self.system = next((turn.content for turn in turns[:1] if turn.role == "system"), None)
        which = f"the last of {len(found)} conversations, " if len(found) > 1 else ""
        more = "" if turns[-1].role == "assistant" else "; /retry answers the last question"
        return f"{which}{len(turns)} messages loaded from {path}{more}"

    def save(self, path: Path) -> str:
        """Append the chat to a file, and return a line that says so.

        The user is asked before a file that existed already is changed. Raises `InputError` where the input is no
        terminal, or the file cannot be written.
        """
        if not any(message["role"] == "assistant" for message in self.messages):
            raise InputError("there is no answer to save yet; ask something first.")
        messages, images = with_tags(self.messages)
        whole = {"messages": messages, **({"images": images} if images else {})}
        line = json.dumps(whole, ensure_ascii=False) + "\n"
        try:
            path = path.expanduser().resolve()
            if path.exists() and not path.is_file():
                raise InputError(f"{path} is no file that a conversation could be added to; choose another.")
            if path.exists() and self._saved.get(path) != _state(path) and path.stat().st_size and not may_add_to(path):
                return f"nothing is added to {path}"
            with path.open("ab+") as file:
                if file.tell():  # complete a last line without a newline
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
    """Inode and size, by which a replaced or changed file is recognized."""
    found = path.stat()
    return found.st_ino, found.st_size


def may_add_to(path: Path) -> bool:
    """Ask whether to append to a file that this chat did not write. Raises `InputError` where input is no terminal."""
    if not sys.stdin.isatty():
        raise InputError(f"{path} is there already, and this conversation did not write it; choose another file.")
    print(f"{path} is there already, and this conversation did not write it. Add to it? (y / n)")
    try:
        return asker()().strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def typed_lines() -> Iterator[str]:
    """Yield the user's input until its end. A terminal has line editing, a history, and multi-line paste."""
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
    """The function that reads the next line."""
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
    except OSError:  # no permission to write the home folder: the history is not kept
        pass
    session: PromptSession[str] = PromptSession(">>> ", history=history)
    return session.prompt


def complain(error: InputError) -> None:
    """Print an error on a terminal, where the chat continues; raise it where the input is a file."""
    if not sys.stdin.isatty():
        raise error
    print(f"error: {error}", file=sys.stderr)


def printed(answer: "Iterable[Response]", said: str = "", thought: ShownThought | None = None) -> str:
    """Print an answer as it arrives, with its thought before it, and return it. Ctrl-C ends it.

    A terminal is sent no control characters, and its lines are broken at words.

    Arguments:
        answer: the stream.
        said: shown while the first token takes long.
        thought: prints the thought, and keeps it; None: there is none to print.
    """
    terminal, thought = sys.stdout.isatty(), thought or ShownThought(False)
    text, wrapper = "", Wrapper()

    def show(new: str) -> None:
        print(wrapper.add(new.translate(CONTROLS)) if terminal else new, end="", flush=True)

    def end_thought() -> None:
        nonlocal wrapper
        print(wrapper.finish(), thought.end(), sep="", end="")
        if terminal or thought.shown:
            print(f"({thought.length()})")
        wrapper = Wrapper()

    try:
        responses = iter(answer)
        with waiting(said):
            first = next(responses, None)
        for response in chain([] if first is None else [first], responses):
            before, reasoning = thought.take(response)
            print(before, end="")
            show(reasoning)
            if response.text:
                if thought.open:
                    end_thought()
                text += response.text
                show(response.text)
    except KeyboardInterrupt:
        pass
    if thought.open:
        end_thought()
    print(wrapper.finish())
    return text.strip()
