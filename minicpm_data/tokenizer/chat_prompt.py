"""A conversation that is rendered with a chat template: checked, and with the special tokens of its texts disguised."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minicpm_data.conversation.answer_spans import cut_at_answers
from minicpm_data.conversation.messages import Message, clean_messages
from minicpm_data.conversation.template_features import features_of
from minicpm_data.conversation.tool_definitions import checked_tools
from minicpm_data.tokenizer import chat_template
from minicpm_data.tokenizer.chat_template import Disguise, Markers
from weights_io.errors import InputError, short

OWN_PLACE = ("messages", "add_generation_prompt", "tools")  # variables that have arguments of their own


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation before it is rendered.

    Attributes:
        template: Jinja source.
        messages, variables: what the template is given, with special tokens disguised.
        disguise: hides and shows them.
    """

    template: str
    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    disguise: Disguise

    @classmethod
    def of(
        cls,
        messages: Sequence[Message],
        templates: tuple[str, str | None],
        special: Mapping[str, Any],
        markers: Markers,
        tools: Sequence[Any] | None = None,
        enable_thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
        thoughts_matter: bool = False,
    ) -> "ChatPrompt":
        """Check a conversation and disguise its special tokens.

        Arguments:
            messages: in a form that `clean_messages` reads.
            templates: the chat template, and the one for chats with tools or None.
            special: variables that are special tokens; they are not disguised.
            markers: finds the special tokens that are disguised.
            tools, enable_thinking, variables: as for `Tokenizer.apply_chat`.
            thoughts_matter: refuse a template that writes no thoughts, if a message has one.

        Raises:
            InputError: as `Tokenizer.apply_chat`.
        """
        cleaned, tools = clean_messages(messages), checked_tools(tools)
        variables = _with_thinking(variables or {}, enable_thinking)
        asks = tools or variables.get("enable_thinking") is True
        if asks or any(message.keys() & {"tool_calls", "reasoning_content"} for message in cleaned):
            features = features_of(*templates)
            features.check(cleaned, tools, variables.get("enable_thinking") is True)
            if thoughts_matter:
                features.check_thoughts(cleaned)
            cleaned = features.with_thought_key(cleaned)
        template = templates[1] if tools and templates[1] is not None else templates[0]
        given = {**variables, **({"tools": tools} if tools else {})}
        for message in cleaned:
            valid_unicode(message["content"])
        disguise = Disguise(markers, [template, valid_unicode(_as_json([cleaned, given]))])
        hidden = [disguise.hide_message(message) for message in cleaned]
        return cls(template, hidden, {**special, **disguise.hide_all(given)}, disguise)

    def text(self, add_generation_prompt: bool, continue_final_message: bool = False) -> str:
        """The rendered prompt, disguised. Arguments and errors as for `Tokenizer.apply_chat`."""
        if not continue_final_message:
            return self._rendered(add_generation_prompt)
        last = self.messages[-1]
        if last.get("tool_calls"):
            raise InputError("the last message has tool_calls, so its text cannot be continued; leave them out.")
        end = self.disguise.end + " "  # the space shows whether the template strips the content
        marked = replace(self, messages=[*self.messages[:-1], {**last, "content": last["content"] + end}])
        final, found, after = marked._rendered(False).rpartition(self.disguise.end)
        if not found:
            raise InputError("the chat template drops the last message, which the answer should continue.")
        text = last["content"]
        spaces = text[len(text.rstrip()) :]
        return final if after.startswith(" ") else final.removesuffix(spaces)

    def pieces(self, answers: Sequence[int]) -> list[str]:
        """The rendered conversation up to the last of the ``answers`` and its end, split at them, disguised.

        Arguments:
            answers: the indices of the assistant's messages.

        Returns:
            As `cut_at_answers`.

        Raises:
            InputError: the template cannot be applied, or changes answers beyond what `cut_at_answers` allows.
        """
        begun = replace(self, messages=self.messages[: answers[-1] + 1])
        plain = {"role": "assistant", "content": self.disguise.end}
        bare = [plain if message["role"] == "assistant" else message for message in begun.messages]
        outside = replace(begun, messages=bare)._rendered(False).split(self.disguise.end)
        return cut_at_answers(begun._rendered(False), outside, [self.messages[i] for i in answers])

    def _rendered(self, prompted: bool) -> str:
        """The rendered text, disguised. Where something is disguised, it reads as without a disguise."""
        shown = [{key: self.disguise.show_all(value) for key, value in m.items()} for m in self.messages]
        variables = self.disguise.show_all(self.variables)
        if shown == self.messages and variables == self.variables:
            return valid_unicode(chat_template.render(self.template, shown, prompted, **variables))
        hidden = self.disguise.shown
        text = valid_unicode(chat_template.render(self.template, self.messages, prompted, hidden, **self.variables))
        if chat_template.render(self.template, shown, prompted, **variables) != self.disguise.show(text):
            raise InputError(
                "the messages spell out a special token that the chat template changes, so that it cannot be told "
                "apart from the template's own; leave it out."
            )
        return text


def _with_thinking(variables: Mapping[str, Any], enable_thinking: bool | None) -> dict[str, Any]:
    """The template variables. Raises `InputError` where one has an argument of its own, or differs from it."""
    if taken := next((name for name in OWN_PLACE if name in variables), None):
        raise InputError(f"the template variable {taken} cannot be given; it has a place of its own.")
    if enable_thinking is None:
        return dict(variables)
    if not isinstance(enable_thinking, bool):
        raise InputError(f"is {short(repr(enable_thinking))}; it must be true or false.", "enable_thinking")
    if variables.get("enable_thinking", enable_thinking) is not enable_thinking:
        raise InputError("differs from the template variable of that name; give one of them.", "enable_thinking")
    return {**variables, "enable_thinking": enable_thinking}


def _as_json(value: Any) -> str:
    """A value as JSON. Raises `InputError` where it cannot be written."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the template variables are no values of JSON ({error}); give others.") from None


def valid_unicode(text: str) -> str:
    """Return ``text``. Raises `InputError` where it has a lone surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise InputError(f"the text has a lone surrogate ({code}, at {error.start}); send valid Unicode.") from error
    return text
