"""Render chat prompts with a checkpoint's Jinja template, and keep message contents from forging special tokens."""

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
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # the contents only
TURN_MARKERS = ("<用户>", "<AI>")  # plain text, not special tokens: a model may write one and start a turn
# Tokens with which chat templates end a turn, whatever the tokenizer's EOS is. llama.cpp finds them by their text too.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
ROLES = ("system", "user", "assistant")
LONGEST_MARKERS = 200_000  # characters of all special tokens together; Gemma's 6,400 have 80,000
END = ""  # marks the end of a token in the tree of `Markers`
THINK, THOUGHT = "<think>", "</think>"  # around the reasoning at the start of an answer
PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))  # code points without an assigned meaning

Message = Mapping[str, str]


def check_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Check messages.

    Arguments:
        messages: a list with a role and a content each.

    Returns:
        The role and content of each message.

    Raises:
        InputError: the list is empty; a role or content is missing or wrong; or a message has another key with a
            value, which would not reach the template.
    """
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
    """Render a chat template in a separate process with limits of time and memory.

    Arguments:
        template: Jinja source.
        messages: role and content each.
        add_generation_prompt: end with the start of an assistant turn.
        variables: other variables of the template such as ``bos_token``, JSON values.

    Returns:
        The prompt text.

    Raises:
        InputError: the template fails, raises an exception of its own, or exceeds a limit.
    """
    from minicpm_data.conversation import template_process

    given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    return template_process.render(template, {"tools": None, "documents": None, **variables, **given})


def variables_of(template: str) -> frozenset[str]:
    """The variables that a template uses and does not set.

    Arguments:
        template: Jinja source.

    Returns:
        Their names.

    Raises:
        InputError: the template cannot be parsed within the limits of time and memory.
    """
    from minicpm_data.conversation import template_process

    return template_process.variables_of(template)


def cut_at_answers(prompt: str, outside: Sequence[str], contents: Sequence[str]) -> list[str]:
    """Split a rendered prompt at its answers.

    The template may have stripped the answers, changed the spaces around ``<think>`` and ``</think>``, and dropped the
    reasoning of all answers but the last.

    Arguments:
        prompt: the rendered conversation.
        outside: the texts that the template writes around plain answers.
        contents: the answers.

    Returns:
        The text before the first answer, the first answer, the text up to the second answer, and so on.

    Raises:
        InputError: the template changed the answers in another way.
    """
    pieces: list[str] = []
    at, last = 0, len(contents) - 1

    def befores(k: int) -> list[str]:
        """The texts that may precede answer k. Reasoning replaces an empty reasoning block of the template."""
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
    """Yields the possible ends of an answer that starts at ``start``. The longest form of the answer comes first."""
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
            yield len(prompt) - len(prompt[end:].lstrip())  # reasoning without an answer after it


class Markers:
    """Finds the special tokens of a vocabulary in texts."""

    def __init__(self, specials: Iterable[str]):
        """Raises `InputError` where the special tokens together have more than `LONGEST_MARKERS` characters."""
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
        """``text`` with the first character of each special token replaced by its value in ``hidden``."""
        solid = len(text.rstrip())
        return self._candidate.sub(
            lambda match: hidden[match[0]] if self._begins(text, match.start(), solid) else match[0], text
        )

    def _begins(self, text: str, at: int, solid: int) -> bool:
        """Whether a special token is at ``at``, or the start of one that reaches the end of the text (``solid``)."""
        node = self._tree
        while at < len(text) and text[at] in node:
            node, at = node[text[at]], at + 1
            if END in node or at >= solid:
                return True
        return False


class Disguise:
    """Hides special tokens that are spelled out in ``texts``, so that only the template's special tokens take effect.

    The first character of each is replaced by a private-use character that occurs in none of ``texts``. The start of a
    special token at the end of a text is replaced too, because the next text could complete it.

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
        """``text`` with its special tokens hidden."""
        return self._markers.hide(text, self._hidden)

    def hide_all(self, value: Any) -> Any:
        """A JSON value with the special tokens in all its strings hidden."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {key: self.hide_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_all(item) for item in value]
        return value

    def show(self, text: str) -> str:
        """``text`` with the hidden special tokens restored."""
        return text.translate(self._show)
