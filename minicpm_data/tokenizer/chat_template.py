"""Render chat prompts with a checkpoint's Jinja template, and keep message contents from forging special tokens."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from minicpm_data.conversation.messages import Message
from weights_io.errors import InputError

# The prompt of MiniCPM-2B, -1B, -S and -MoE (2024): no newline, no EOS between turns; a system message has no tag.
MINICPM_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{'<用户>' + message['content'].strip() + '<AI>'}}"
    "{% else %}{{message['content'].strip()}}{% endif %}{% endfor %}"
)
# The prompts of the models that see. MiniCPM-V strips no spaces; OmniLMM-12B was tuned from Zephyr.
MINICPM_V_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'user': '<用户>', 'assistant': '<AI>'}.get(message['role'], '') + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<AI>{% endif %}"
)
OMNILMM_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # the contents only
TURN_MARKERS = ("<用户>", "<AI>")  # plain text, not special tokens: a model may write one and start a turn
# Tokens with which chat templates end a turn, whatever the tokenizer's EOS is. llama.cpp finds them by their text too.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
LONGEST_MARKERS = 200_000  # characters of all special tokens together; Gemma's 6,400 have 80,000
END = ""  # marks the end of a token in the tree of `Markers`
PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))  # code points without an assigned meaning


def render(
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    hidden: Mapping[str, str] | None = None,
    /,
    **variables: Any,
) -> str:
    """Render a chat template in a separate process with limits of time and memory.

    Arguments:
        template: Jinja source.
        messages: as the template expects them (`clean_messages`).
        add_generation_prompt: end with the start of an assistant turn.
        hidden: characters of messages and variables -> the characters that the template's tests see in their place.
        variables: other variables of the template such as ``bos_token``, JSON values.

    Returns:
        The prompt text.

    Raises:
        InputError: the template fails, raises an exception of its own, or exceeds a limit.
    """
    from minicpm_data.conversation import template_process

    given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    return template_process.render(template, {"tools": None, "documents": None, **variables, **given}, hidden)


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
    special token at the end of a text is replaced too, because the next text could complete it. The tests of a
    template see the replaced character (`DisguisedText`).

    Attributes:
        end: one more character that occurs in none of ``texts``.
        shown: each of the hidden characters -> the character that it stands for.
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
        self.shown = {hidden: first for first, hidden in self._hidden.items()}
        self._show = str.maketrans(self.shown)

    def hide(self, text: str) -> str:
        """``text`` with its special tokens hidden."""
        return self._markers.hide(text, self._hidden)

    def hide_all(self, value: Any) -> Any:
        """A JSON value with the special tokens in all its strings hidden, keys of objects too."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_all(item) for item in value]
        return value

    def hide_message(self, message: Message) -> dict[str, Any]:
        """A message with the special tokens in it hidden."""
        return {key: value if key == "role" else self.hide_all(value) for key, value in message.items()}

    def show(self, text: str) -> str:
        """``text`` with the hidden special tokens restored."""
        return text.translate(self._show)

    def show_all(self, value: Any) -> Any:
        """A JSON value with the hidden special tokens in all its strings restored."""
        if isinstance(value, str):
            return self.show(value)
        if isinstance(value, Mapping):
            return {self.show(key): self.show_all(item) for key, item in value.items()}
        return [self.show_all(item) for item in value] if isinstance(value, list) else value
