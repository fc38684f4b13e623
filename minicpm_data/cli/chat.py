"""A chat in a terminal: what is done with each line that is typed, and the settings that it may change."""

import dataclasses
import difflib
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from minicpm_data.cli.terminal import COMMANDS, Conversation, Message, printed
from minicpm_data.generation.options import MOST, Sampling
from minicpm_data.generation.responses import Response
from weights_io.command_line import check_numbers
from weights_io.errors import InputError, short


class Meter(Protocol):
    """Measures the speed of an answer."""

    reason: str | None
    tokens: list[int]

    def watch(self, answer: Iterable[Response]) -> Iterator[Response]: ...
    def report(self, prompt_tokens: int) -> str: ...


@dataclasses.dataclass
class Chat:
    """A chat.

    Attributes:
        conversation: its messages.
        sampling, max_tokens: of the next answers; /set changes them.
        encode: messages -> token ids of the prompt.
        answer: (ids, max_tokens, sampling) -> the stream of the answer.
        meter: makes the meter of an answer.
        note: called with the tokens of the conversation; returns whether it printed a note about them.
    """

    conversation: Conversation
    sampling: Sampling
    max_tokens: int
    encode: Callable[[list[Message]], list[int]]
    answer: Callable[[list[int], int, Sampling], Iterator[Response]]
    meter: Callable[[], Meter]
    note: Callable[[int], bool | None]
    _stats: str | None = None  # of the latest answer
    _always: bool = False  # show them after each answer
    _noted: list[Message] | None = None  # the beginning of the conversation that a note was printed about
    _cut: int = 0  # the max_tokens of the latest note about a cut answer

    def take(self, line: str) -> bool:
        """Do what a line says, and return whether the chat continues. Raises `InputError`.

        A line that begins with a slash is a command, and one that begins with a space is a question.
        """
        if not line.startswith("/"):
            if line.strip():
                self._ask(self.conversation.asked(line.lstrip() or line))
            return True
        name, _, rest = line.strip().partition(" ")
        match name, rest.split():
            case "/retry", []:
                self._retry()
            case "/set", words:
                self._set(words)
            case "/stats", []:
                print(self._stats or "(there is no answer yet)")
            case "/stats", ["on" | "off" as chosen]:
                self._always = chosen == "on"
                print(f"(the speed is {'shown after each answer' if self._always else 'shown on /stats only'})")
            case "/stats" | "/retry", _:
                raise InputError(f"{name} does not take {short(rest)!r}; /help lists the commands.")
            case _ if name not in COMMANDS:
                near = difflib.get_close_matches(name, COMMANDS, 1)
                remedy = f"did you mean {near[0]}?" if near else "/help lists them."
                raise InputError(f"{short(name)} is no command (begin with a space to ask it); {remedy}")
            case _:
                return self.conversation.command(line)
        return True

    def _ask(self, messages: list[Message]) -> bool:
        """Answer the last of the messages. A question without an answer is not kept. Returns whether there is one."""
        prompt = self.encode(messages)
        meter = self.meter()
        answer = self.answer(prompt, self.max_tokens, self.sampling)
        said = "reading the prompt .." if self._stats else "compiling .."  # JAX compiles before its first answer
        reply = printed(meter.watch(answer), said)
        if not reply:
            return False
        self.conversation.messages = [*messages, {"role": "assistant", "content": reply}]
        self._stats = meter.report(len(prompt)).removeprefix("=" * 10).strip()
        if self._always:
            print(f"({'; '.join(self._stats.splitlines())})")
        if meter.reason == "length" and self._cut != self.max_tokens and sys.stdout.isatty():
            self._cut = self.max_tokens
            print(
                f"(the answer was cut at {self.max_tokens} tokens; /set max_tokens {2 * self.max_tokens} allows more)"
            )
        begun = self.conversation.messages[:1]
        if self._noted != begun and self.note(len(prompt) + len(meter.tokens)):
            self._noted = begun
        return True

    def _retry(self) -> None:
        """Ask the last question again. The old answer is kept where there is no new one."""
        messages = self.conversation.messages
        asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        if not asked or asked[-1]["role"] != "user":
            raise InputError("there is no question to ask again; ask one first.")
        if self.sampling.greedy or self.sampling.seed is not None:
            why = "temperature 0" if self.sampling.greedy else "a seed"
            remedy = "/set temperature 0.7" if self.sampling.greedy else "/set seed none"
            print(f"(with {why} the answer to a question is always the same; {remedy} changes that)")
        self._ask(asked)

    def _set(self, words: list[str]) -> None:
        """Show the settings, or change one."""
        kinds: dict[str, Any] = {**typing.get_type_hints(Sampling), "max_tokens": int}
        if not words:
            for name in kinds:
                print(f"{name:20} {self._setting(name)}")
            return
        name = {"temp": "temperature"}.get(words[0], words[0]).replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            remedy = f"did you mean {near[0]}?" if near else "/set alone lists them."
            raise InputError(f"{short(words[0])} is no setting; {remedy}")
        if len(words) > 1:
            value = _value(name, kinds[name], words[1:])
            if name == "max_tokens":
                if not 1 <= value <= MOST:
                    raise InputError(f"max_tokens is {value}; it must be from 1 to {MOST}.")
                self.max_tokens = value
            else:
                try:
                    sampling = dataclasses.replace(self.sampling, **{name: value})
                    check_numbers(sampling)
                except InputError as error:
                    raise InputError(str(error)) from None  # it is no flag that is wrong
                self.sampling = sampling
        print(f"({name} is {self._setting(name)})")

    def _setting(self, name: str) -> Any:
        value = self.max_tokens if name == "max_tokens" else getattr(self.sampling, name)
        return "none" if value is None else value


def _value(name: str, kind: Any, words: list[str]) -> Any:
    """The value of a setting. Raises `InputError`."""
    kinds = typing.get_args(kind) or (kind,)
    if type(None) in kinds and words == ["none"]:
        return None
    number = next((one for one in kinds if one in (int, float)), None)
    if number is None:
        raise InputError(f"{name} cannot be changed in the chat; give it to the command that starts it.")
    try:
        (word,) = words
        return number(word)
    except ValueError:
        what = "a whole number" if number is int else "a number"
        none = " or none" * (type(None) in kinds)
        raise InputError(f"{name} is {short(' '.join(words))!r}; it must be {what}{none}.") from None


def greet(model: str, where: str) -> None:
    """Tell a user in a terminal what answers, and where help is."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(f"{model} on {where}. /help lists the commands, Ctrl-D ends.")
