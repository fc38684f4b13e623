"""A chat in a terminal: what is done with each line that is typed, and the settings that it may change."""

import dataclasses
import difflib
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from minicpm_data.cli.meter import Meter
from minicpm_data.cli.terminal import COMMANDS, Conversation, Message, printed
from minicpm_data.cli.thoughts import ShownThought
from minicpm_data.generation.api import answer_message
from minicpm_data.generation.image_prompt import chat_prompt
from minicpm_data.generation.options import MOST, Sampling
from minicpm_data.generation.responses import Response
from minicpm_data.generation.thinking import check_budget, check_thinks, thinks
from weights_io.command_line import check_numbers
from weights_io.errors import InputError, short

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer
    from weights_io.config import ModelConfig

MODES = {"on": True, "off": False, "auto": None}  # /think -> enable_thinking


@dataclasses.dataclass
class Settings:
    """The settings of the next answers; /set and /think change them.

    ``own``: the sampling parameters that the user has chosen. The others follow the model's defaults.
    """

    sampling: Sampling
    max_tokens: int
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    own: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Chat:
    """A chat.

    Attributes:
        conversation: its messages.
        settings: of the next answers.
        tokenizer, config: of the model.
        answer: (ids, settings) -> the stream of the answer.
        meter: makes the meter of an answer.
        note: called with the tokens of the conversation; returns whether it printed a note about them.
        show_thinking: whether thoughts are printed; None: on a terminal.
    """

    conversation: Conversation
    settings: Settings
    tokenizer: "Tokenizer"
    config: "ModelConfig"
    answer: Callable[[Sequence[int], Settings], Iterator[Response]]
    meter: Callable[[], Meter]
    note: Callable[[int], bool | None]
    show_thinking: bool | None = None
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
            case "/think", []:
                self._say_mode()
            case "/think", ["on" | "off" | "auto" as chosen]:
                self._think(MODES[chosen])
            case "/stats", []:
                print(self._stats or "(there is no answer yet)")
            case "/stats", ["on" | "off" as chosen]:
                self._always = chosen == "on"
                print(f"(the speed is {'shown after each answer' if self._always else 'shown on /stats only'})")
            case "/stats" | "/retry" | "/think", _:
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
        settings, thought = self.settings, ShownThought(self.show_thinking)
        prompt = chat_prompt(self.tokenizer, self.config, messages, enable_thinking=settings.enable_thinking)
        meter = self.meter()
        answer = self.answer(prompt, settings)
        said = "reading the prompt .." if self._stats else "compiling .."  # JAX compiles before its first answer
        reply = printed(meter.watch(answer), said, thought)
        if reply:
            self.conversation.messages = [*messages, answer_message(reply, thought.text)]
            self.conversation.images = []
            self._stats = meter.report(len(prompt)).removeprefix("=" * 10).strip()
            if self._always:
                print(f"({'; '.join(self._stats.splitlines())})")
        if meter.reason == "length" and self._cut != settings.max_tokens and sys.stdout.isatty():
            self._cut = settings.max_tokens
            more = f"/set max_tokens {2 * settings.max_tokens} allows more"
            more += (
                "" if reply else f", /set thinking_budget {max(1, settings.max_tokens // 2)} ends the thought sooner"
            )
            print(f"(the answer was cut at {settings.max_tokens} tokens; {more})")
        if not reply:
            return False
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
        sampling = self.settings.sampling
        if sampling.greedy or sampling.seed is not None:
            why = "temperature 0" if sampling.greedy else "a seed"
            remedy = "/set temperature 0.7" if sampling.greedy else "/set seed none"
            print(f"(with {why} the answer to a question is always the same; {remedy} changes that)")
        self._ask(asked)

    def _think(self, mode: bool | None) -> None:
        """Let the model think before it answers, or not; None leaves it to the chat template."""
        if mode and not thinks(self.tokenizer):
            raise InputError("this model's chat template has no thinking mode; leave it off.")
        settings, usual = self.settings, self.tokenizer.sampling.of(mode)
        defaults: dict[str, Any] = {"temperature": usual.temperature, "top_p": usual.top_p}
        kept = {name: value for name, value in defaults.items() if name not in settings.own}
        settings.enable_thinking, settings.sampling = mode, dataclasses.replace(settings.sampling, **kept)
        self._say_mode()

    def _say_mode(self) -> None:
        chosen = next(name for name, mode in MODES.items() if mode is self.settings.enable_thinking)
        temperature, top_p = (self._setting(name) for name in ("temperature", "top_p"))
        print(f"(thinking is {chosen}; temperature {temperature}, top_p {top_p})")

    def _set(self, words: list[str]) -> None:
        """Show the settings, or change one."""
        kinds: dict[str, Any] = {**typing.get_type_hints(Sampling), "max_tokens": int}
        kinds |= {"thinking_budget": int | None} if words or thinks(self.tokenizer) else {}
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
            self._change(name, _value(name, kinds[name], words[1:]))
        print(f"({name} is {self._setting(name)})")

    def _change(self, name: str, value: Any) -> None:
        """Change a setting. Raises `InputError` where the value is out of range."""
        try:
            if name == "max_tokens" and not 1 <= value <= MOST:
                raise InputError(f"max_tokens is {value}; it must be from 1 to {MOST}.")
            if name == "thinking_budget" and value is not None:
                check_budget(value)
                check_thinks(self.tokenizer, name)
            if name in ("max_tokens", "thinking_budget"):
                setattr(self.settings, name, value)
                return
            sampling = dataclasses.replace(self.settings.sampling, **{name: value})
            check_numbers(sampling)
        except InputError as error:
            raise InputError(str(error)) from None  # it is no flag that is wrong
        self.settings.sampling = sampling
        self.settings.own.add(name)

    def _setting(self, name: str) -> Any:
        of_answer = name in ("max_tokens", "thinking_budget")
        value = getattr(self.settings if of_answer else self.settings.sampling, name)
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
