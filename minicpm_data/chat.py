"""Chat prompts: the checkpoint's Jinja template, and message contents that cannot forge its special tokens."""

import functools
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

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
ROLES = ("system", "user", "assistant")
PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))  # code points that mean nothing by themselves

Message = Mapping[str, str]


def check_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The role and content of each message (other keys are dropped). InputError where one is missing or no text."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InputError('messages must be a list such as [{"role": "user", "content": "Hello"}], with one or more.')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise InputError(f'message {i} must have a "role" and a "content".')
        if message["role"] not in ROLES:
            raise InputError(f"message {i} has the role {message['role']!r}; the roles are {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise InputError(f"the content of message {i} is of type {kind}; it must be a string.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def render(template: str, messages: Sequence[Message], add_generation_prompt: bool = True, /, **variables: Any) -> str:
    """The prompt text. ``variables`` are ``bos_token`` and the like. InputError where the template fails or refuses."""
    import jinja2

    given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
        return _compiled(template).render({"tools": None, "documents": None, **variables, **given})
    # A template is a program: besides Jinja's own errors it can fail as any expression can.
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise InputError(f"the chat template cannot be applied to these messages: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise InputError("the chat template needs more memory than is reasonable.") from error


def variables_of(template: str) -> frozenset[str]:
    """The names that ``template`` may be given values for. InputError where it cannot be read."""
    import jinja2
    from jinja2.meta import find_undeclared_variables

    try:
        environment = _compiled(template).environment
        return frozenset(find_undeclared_variables(environment.parse(template)))
    except (jinja2.TemplateError, RecursionError) as error:
        raise InputError(f"the chat template cannot be read: {error}") from error


def cut_at_answers(prompt: str, marked: str, contents: Sequence[str], mark: str) -> list[str]:
    """``prompt`` in pieces: what stands before the first answer, the answer, what stands between it and the next, ...

    ``marked`` is the same prompt with ``mark`` on either side of each content of ``contents``, the answers; the
    template may have stripped them in ``prompt``. InputError where it changed them otherwise.
    """
    outside = marked.split(mark)[::2]
    pieces, at = outside[:1], len(outside[0])
    if marked.count(mark) == 2 * len(contents):
        for content, after in zip(contents, outside[1:], strict=True):
            forms = (content, content.lstrip(), content.rstrip(), content.strip())  # the longest that fits
            answer = next((form for form in forms if prompt.startswith(form + after, at)), content)
            pieces += [answer, after]
            at += len(answer + after)
    if "".join(pieces) != prompt or len(pieces) != 2 * len(contents) + 1:
        raise InputError(
            "the chat template leaves out, reorders or rewrites assistant turns, so that they cannot be told apart "
            "from the rest; train conversations with one such turn, or give the model a plainer template."
        )
    return pieces


@functools.lru_cache(maxsize=16)
def _compiled(template: str):
    """``template`` in a sandbox: it reaches no attribute that leads out of the values it is given, and changes none."""
    import json

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}`` marks an assistant's turn for training; prints what is inside."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return env.from_string(template)


class Disguise:
    """Hides special tokens that are spelled out in ``texts``, so that only the template's own are seen as such.

    The first character of each is replaced by a private-use character that occurs in none of ``texts``. The same goes
    for the beginning of a special token at the end of a text, which the next text could complete.

    ``end`` is one more character that occurs in none of ``texts``.
    """

    def __init__(self, specials: Sequence[str], texts: Sequence[str]):
        used = set().union(*texts)
        firsts = sorted({special[0] for special in specials})
        unused = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        self.end = next(unused)
        self._hide = dict(zip(firsts, unused, strict=False))
        self._show = str.maketrans({hidden: first for first, hidden in self._hide.items()})
        whole = [re.escape(special) for special in specials]
        begun = {re.escape(special[:n]) + r"\s*\Z" for special in specials for n in range(1, len(special))}
        # Zero-width, so that overlapping ones are found too. No special tokens: a pattern that never matches.
        self._pattern = re.compile(f"(?=(?:{'|'.join([*whole, *sorted(begun)]) or '(?!)'})).", re.DOTALL)

    def hide(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._hide[match[0]], text)

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
