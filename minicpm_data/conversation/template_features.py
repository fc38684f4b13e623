"""What a chat template supports, found by rendering it: tools, the form of a call, thinking. No name is looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from minicpm_data.conversation import template_process
from minicpm_data.conversation.messages import Message
from weights_io.errors import InputError

CallForm = Literal["xml", "python"]
ThoughtKey = Literal["reasoning_content", "thought"]

OPENINGS = ("<think>", "<|thought_start|>")  # a thought begins, in MiniCPM4.1 and 5, and in MiniCPM3

# What the templates are rendered with. The names occur in no template.
NAME, KEY, VALUE, THOUGHT, ANSWER = "probe_tool", "probe_key", "probe_value", "probe_thought", "probe_answer"
SCHEMA = {"type": "object", "properties": {KEY: {"type": "string", "description": "A text."}}, "required": [KEY]}
FUNCTION = {"name": NAME, "description": "Probes.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "probe0000", "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
USER = {"role": "user", "content": "probe_question"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}

CALL_FORMS: Mapping[CallForm, str] = {
    "xml": f'<function name="{NAME}"><param name="{KEY}">{VALUE}</param></function>',  # MiniCPM5
    "python": f'<|tool_call_start|>\n```python\n{NAME}({KEY}="{VALUE}")\n```\n<|tool_call_end|>',  # MiniCPM3
}


@dataclass(frozen=True)
class TemplateFeatures:
    """What a chat template supports.

    Attributes:
        tools: it writes the definitions of tools into the prompt.
        call_form: how it writes a tool call: MiniCPM5's XML, MiniCPM3's Python, or None where it writes none or
            writes it in a form that is not known here.
        thinking: it reads the variable ``enable_thinking``.
        calls: it writes the calls of earlier answers, in whatever form.
        thought_key: the key of a message under which it expects the thought; None where it writes no thoughts.
    """

    tools: bool
    call_form: CallForm | None
    thinking: bool
    calls: bool = False
    thought_key: ThoughtKey | None = None

    def check_tools(self, parsed: bool = False) -> None:
        """Check that tools can be used with this template.

        Arguments:
            parsed: the calls of an answer are to be read, so that their form has to be known.

        Raises:
            InputError: the template ignores tools, or writes calls in another form.
        """
        if not self.tools:
            raise InputError(
                "cannot be used: the model's chat template has no place for them; leave them out.", "tools"
            )
        if parsed and self.call_form is None:
            raise InputError(
                "cannot be used: the model's chat template writes tool calls in a form that is not known here "
                "(MiniCPM5's XML and MiniCPM3's Python are); leave them out.",
                "tools",
            )

    def check(self, messages: Sequence[Message], tools: Sequence[Any] | None, thinking: bool) -> None:
        """Check that the template has a place for all that a prompt asks for.

        Arguments:
            messages: cleaned messages.
            tools: definitions of tools.
            thinking: ``enable_thinking`` is true. A template without it is fine where it is false.

        Raises:
            InputError: the template would ignore tools, calls in the messages, or ``enable_thinking``.
        """
        if tools:
            self.check_tools()
        calling = next((i for i, message in enumerate(messages) if message.get("tool_calls")), None)
        if calling is not None and not self.calls:
            raise InputError(
                f"message {calling} has tool_calls, for which the model's chat template has no place; leave out the "
                "calls and their results."
            )
        if thinking and not self.thinking:
            raise InputError(
                "is true, and the model's chat template does not know it; leave it out.", "enable_thinking"
            )

    def check_thoughts(self, messages: Sequence[Message]) -> None:
        """Check that the template has a place for the thoughts of cleaned messages. Raises `InputError`."""
        thinking = next((i for i, message in enumerate(messages) if message.get("reasoning_content")), None)
        if thinking is not None and self.thought_key is None:
            raise InputError(
                f"message {thinking} has a thought beside its content, and the model's chat template has no place for "
                "it; write it into the content, as <think>\\n...\\n</think>\\n\\n before the answer."
            )

    def with_thought_key(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Cleaned messages with their thoughts under the key that the template expects."""
        renamed = {"reasoning_content": self.thought_key or "reasoning_content"}
        return [{renamed.get(key, key): value for key, value in message.items()} for message in messages]


@lru_cache(maxsize=16)
def features_of(template: str, tool_template: str | None = None) -> TemplateFeatures:
    """Find out what a template supports. It is rendered a few times, in its own process, with limits.

    Arguments:
        template: Jinja source.
        tool_template: the template that is used where tools are given, if it is another one.

    Returns:
        The features of both.

    Raises:
        InputError: a template cannot be parsed within the limits of time and memory.
    """
    with_tools = template if tool_template is None else tool_template
    names = {name for source in {template, with_tools} for name in template_process.variables_of(source)}
    takes_tools = "tools" in names and any(NAME in _rendered(with_tools, [USER], [t]) for t in (TOOL, FUNCTION))
    called = _rendered(with_tools, [USER, CALLING], [TOOL]) if takes_tools else ""
    form = next((form for form, text in CALL_FORMS.items() if text in called), None)
    keys: tuple[ThoughtKey, ...] = ("reasoning_content", "thought")
    thoughts = (key for key in keys if THOUGHT in _rendered(template, [USER, _thinking(key)]))
    return TemplateFeatures(
        tools=takes_tools,
        call_form=form,
        thinking="enable_thinking" in names,
        calls=VALUE in (called or _rendered(template, [USER, CALLING])),
        thought_key=next(thoughts, None),
    )


def opens_thought(rendered_prompt: str) -> bool:
    """Whether a prompt ends in an open thought, so that the answer begins inside of it.

    Arguments:
        rendered_prompt: the text of a prompt, special tokens included, or its end.
    """
    return rendered_prompt.rstrip().endswith(OPENINGS)


def _thinking(key: ThoughtKey) -> dict[str, str]:
    return {"role": "assistant", "content": ANSWER, key: THOUGHT}


def _rendered(template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
    """The rendered text; empty where the template refuses what it is given."""
    given = {"messages": messages, "add_generation_prompt": False, "tools": tools, "documents": None}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": ""}
    try:
        return template_process.render(template, {**special, **given})
    except InputError:
        return ""
