"""Chat prompts: the checkpoint's Jinja template, and message contents that cannot forge its special tokens."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from minicpm_data.keys import KeyRules, escaped
from weights_io.errors import InputError

# The prompt of MiniCPM-2B, -1B, -S and -MoE (2024): no newline, no EOS between turns; a system message has no tag.
MINICPM_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{'<用户>' + message['content'].strip() + '<AI>'}}"
    "{% else %}{{message['content'].strip()}}{% endif %}{% endfor %}"
)
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # no template: contents as they stand
)
TURN_MARKERS = ("<用户>", "<AI>")  # plain text, not special tokens: a model may write them and so begin a turn
# Tokens with which chat templates end a turn, whatever the EOS of the tokenizer is. llama.cpp knows them by text too.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
ROLES = ("system", "user", "assistant")
LONGEST_MARKERS = 200_000  # characters of all special tokens together; Gemma's 6,400 have 80,000
END = ""  # no character
THINK, THOUGHT = "<think>", "</think>"  # around the thought with which an answer may begin
PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))  # code points that mean nothing by themselves

Message = Mapping[str, str]


def check_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The role and content of each message. InputError where one is missing or no text, and for another key that says
    something, which no template here is given."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InputError('must be a list such as [{"role": "user", "content": "Hello"}], with one or more.', "messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise InputError(f'message {i} must have a "role" and a "content".')
        if message["role"] not in ROLES:
            raise InputError(
                f"message {i} has the role '{escaped(message['role'])}'; the roles are {', '.join(ROLES)}."
            )
        KeyRules().used(message, ("role", "content"), (), f"message {i}")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise InputError(f"the content of message {i} is of type {kind}; it must be a string.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def render(template: str, messages: Sequence[Message], add_generation_prompt: bool = True, /, **variables: Any) -> str:
    """The prompt text, rendered in a process with limits of time and memory. ``variables`` are ``bos_token`` and the
    like, values of JSON. InputError where the template fails, refuses or goes beyond the limits."""
    from minicpm_data.tokenizer import template_process

    given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    return template_process.render(template, {"tools": None, "documents": None, **variables, **given})


def variables_of(template: str) -> frozenset[str]:
    """The names that ``template`` may be given values for. InputError where it cannot be read within the limits."""
    from minicpm_data.tokenizer import template_process

    return template_process.variables_of(template)


def cut_at_answers(prompt: str, outside: Sequence[str], contents: Sequence[str]) -> list[str]:
    """``prompt`` in pieces: what stands before the first answer, the answer, what stands between it and the next, ...

    ``outside`` is what the template writes around the answers where these are plain texts; ``contents`` are the answers
    of ``prompt``. The template may have stripped them there, have put other spaces around the ``<think>`` and
    ``</think>`` of their thoughts, and have left out the thoughts of all but the last. InputError where it changed them
    otherwise.
    """
    pieces: list[str] = []
    at, last = 0, len(contents) - 1

    def befores(k: int) -> list[str]:
        """What may stand before answer k: a thought takes the place of the empty one that a template writes."""
        whole = outside[k]
        opened = whole.rfind(THINK) if k <= last and _has_thought(contents[k]) else -1
        return [whole] if opened < 0 else [whole, whole[:opened]]

    for k, content in enumerate(contents if len(outside) == last + 2 else ()):
        starts = [at + len(before) for before in befores(k) if prompt.startswith(before, at)]
        spans = [(start, end) for start in starts for end in _ends(prompt, start, content, k == last)]
        fitting = ((s, e) for s, e in spans if any(prompt.startswith(after, e) for after in befores(k + 1)))
        start, end = next(fitting, (-1, -1))
        if start < 0:
            break
        pieces += [prompt[at:start], prompt[start:end]]
        at = end
    if len(pieces) != 2 * len(contents) or prompt[at:] != outside[-1]:
        raise InputError(
            "the chat template leaves out, reorders or rewrites assistant turns, so that they cannot be told apart "
            "from the rest; train conversations with one such turn, or give the model a plainer template."
        )
    return [*pieces, prompt[at:]]


def _has_thought(content: str) -> bool:
    return THINK in content or THOUGHT in content


def _ends(prompt: str, start: int, content: str, last: bool) -> Iterator[int]:
    """Where an answer that begins at ``start`` may end, the longest form first."""
    for form in (content, content.lstrip("\n"), content.lstrip(), content.rstrip(), content.strip()):
        if prompt.startswith(form, start):
            yield start + len(form)
    if not _has_thought(content):
        return
    parts = [part.strip() for part in re.split(f"({THINK}|{THOUGHT})", content)]
    forms = [parts if THINK in content else [THINK, *parts]]
    thought, _, answer = content.partition(THOUGHT)
    thought = thought.strip().removeprefix(THINK)
    if THOUGHT not in answer and THINK not in thought and (not last or not thought.strip()):
        forms.append([answer.strip()])
    spaces = content[len(content.rstrip()) :]
    for wanted in forms:
        end = start
        for part in filter(None, wanted):
            while prompt[end : end + 1].isspace():
                end += 1
            if not prompt.startswith(part, end):
                break
            end += len(part)
        else:
            if prompt.startswith(spaces, end):
                yield end + len(spaces)
            yield end
            yield len(prompt) - len(prompt[end:].lstrip())  # a thought with nothing behind it


class Markers:
    """The special tokens of a vocabulary, to be looked for in texts."""

    def __init__(self, specials: Iterable[str]):
        """InputError where they are too many for any vocabulary: a chat would take the memory that they ask for."""
        specials = [special for special in specials if special]
        if (length := sum(map(len, specials))) > LONGEST_MARKERS:
            raise InputError(f"the vocabulary has special tokens of {length:,} characters in all; they are too many.")
        self.firsts = sorted({special[0] for special in specials})
        self._candidate = re.compile(f"[{''.join(map(re.escape, self.firsts))}]" if specials else "(?!)")
        self._tree: dict[str, dict] = {}  # character -> the characters that may follow; END where a token ends
        for special in specials:
            node = self._tree
            for char in special:
                node = node.setdefault(char, {})
            node[END] = {}

    def hide(self, text: str, hidden: Mapping[str, str]) -> str:
        """``text``, in which the first character of each special token is replaced by that of ``hidden``."""
        solid = len(text.rstrip())
        return self._candidate.sub(
            lambda match: hidden[match[0]] if self._begins(text, match.start(), solid) else match[0], text
        )

    def _begins(self, text: str, at: int, solid: int) -> bool:
        """Whether a special token stands at ``at``, or one begins there and only spaces follow, from ``solid`` on."""
        node = self._tree
        while at < len(text) and text[at] in node:
            node, at = node[text[at]], at + 1
            if END in node or at >= solid:
                return True
        return False


class Disguise:
    """Hides special tokens that are spelled out in ``texts``, so that only the template's own are seen as such.

    The first character of each is replaced by a private-use character that occurs in none of ``texts``. The same goes
    for the beginning of a special token at the end of a text, which the next text could complete.

    ``end`` is one more character that occurs in none of ``texts``.
    """

    def __init__(self, markers: Markers, texts: Sequence[str]):
        used = set().union(*texts)
        firsts = markers.firsts
        unused = [*islice((chr(code) for code in PRIVATE_USE if chr(code) not in used), len(firsts) + 1)]
        if len(unused) <= len(firsts):
            raise InputError("the messages have every private-use character of Unicode in them; leave some out.")
        self.end = unused.pop()
        self._markers = markers
        self._hidden = dict(zip(firsts, unused, strict=True))
        self._show = str.maketrans({hidden: first for first, hidden in self._hidden.items()})

    def hide(self, text: str) -> str:
        return self._markers.hide(text, self._hidden)

    def hide_all(self, value: Any) -> Any:
        """A JSON value with every string in it hidden."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {key: self.hide_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_all(item) for item in value]
        return value

    def show(self, text: str) -> str:
        return text.translate(self._show)
