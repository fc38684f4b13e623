"""The formats of training data, recognized by their keys. Each is read as turns, a text or a pair of answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from minicpm_data.datasets.images import ImageData
from minicpm_data.datasets.turns import (
    Conversation,
    Named,
    Turn,
    asked,
    messages_of,
    read_history,
    read_tools,
    read_turns,
    response,
)
from minicpm_data.keys import NOTES, KeyRules, few, says_nothing
from weights_io.errors import InputError

Document = Mapping[str, Any]
Keys = tuple[str, ...]

# The question with which OpenBMB tunes on OCNLI (finetune/lora_finetune_ocnli.ipynb): one colon is ASCII, one is not.
OCNLI_QUESTION = "请判断下边两个句子的关系属于 [entailment, neutral, contradiction]中的哪一种？\n句子1: {}\n句子2：{}\n"
OCNLI_NOTES = ("label0", "label1", "label2", "label3", "label4", "prem_id")  # the labels of its annotators
# Metadata about the answers of a pair, as in UltraFeedback and Argilla.
PAIR_NOTES = tuple(
    name
    for about in ("score", "rating", "model")
    for kind in ("chosen", "rejected")
    for name in (f"{about}_{kind}", f"{kind}_{about}", f"{kind}-{about}")
)
SHAREGPT_NOTES = ("views", "avatarUrl")  # OpenHermes'
FLAGS = ("skip_prompt_formatting", "custom_instruction")  # OpenHermes': booleans about how a line was made
WEB_NOTES = ("dump", "file_path", "language_score", "token_count")  # FineWeb's
SYSTEM = ("system", "system_prompt")
BESIDE = (*SYSTEM, "history", "tools")  # keys whose content comes before the turns of a conversation
# Keys that may repeat one of the messages, and keys that a text may repeat together.
REPEATED = ("prompt", "query", "question", "instruction", "problem", "solution", "answer", "response")
CONVERSATIONS = ("messages", "conversations", "conversation")
TOGETHER = ("instruction", "input", "context", "output", "response")


class Form(NamedTuple):
    """A format: lines with all of ``keys``, and possibly ``optional`` keys and ``notes``, which are ignored."""

    keys: Keys
    read: Callable[[Document, KeyRules], list[Turn]]
    optional: Keys = BESIDE
    notes: Keys = ()


def _of(question: str, answer: str, *context: str, notes: Keys = ()) -> Form:
    """A question and an answer as texts. The values of ``context`` are appended to the question, as in Alpaca."""

    def read(document: Document, rules: KeyRules) -> list[Turn]:
        return asked(_joined(document, question, *context), _text(document, answer))

    return Form((question, answer), read, (*BESIDE, *context), notes)


def _prompted(answer: str) -> Form:
    """``prompt`` and ``answer``, texts or TRL's lists of messages. Answers in the prompt are not trained."""

    def read(document: Document, rules: KeyRules) -> list[Turn]:
        prompt = [replace(turn, asked=True) for turn in response(document, "prompt", "user", rules)]
        return [*prompt, *response(document, answer, "assistant", rules)]

    return Form(("prompt", answer), read)


def _mlx_advertise_gen(document: Document, rules: KeyRules) -> list[Turn]:
    """OpenBMB's mlx_AdvertiseGen, where the input precedes the prompt."""
    return asked(_text(document, "input") + _text(document, "prompt"), _text(document, "output"))


def _ocnli(document: Document, rules: KeyRules) -> list[Turn]:
    question = OCNLI_QUESTION.format(_text(document, "sentence1"), _text(document, "sentence2"))
    return asked(question, _text(document, "label"))


FORMS = (
    Form(("messages",), lambda document, rules: read_turns(document["messages"], rules)),
    Form(
        ("conversations",), lambda document, rules: read_turns(document["conversations"], rules), notes=SHAREGPT_NOTES
    ),
    Form(("conversation",), lambda document, rules: read_turns(document["conversation"], rules)),  # LMSYS-Chat's
    _prompted("completion"),
    _prompted("response"),
    _of("query", "response", notes=("type", "original_question")),  # MetaMathQA's
    _of("question", "answer"),
    _of("question", "response"),
    _of("input", "output"),
    _of("instruction", "output", "input"),
    _of("instruction", "response", "input", "context"),
    _of("content", "summary"),  # AdvertiseGen
    Form(("input", "prompt", "output"), _mlx_advertise_gen),
    Form(("sentence1", "sentence2", "label"), _ocnli, notes=OCNLI_NOTES),
    Form(("text",), lambda document, rules: [], optional=(), notes=WEB_NOTES),
)
ANSWERS = ("chosen", "rejected")
# ``read`` returns the prompt of a pair. Without a prompt, both answers repeat it.
PAIRS = (
    Form(("prompt", *ANSWERS), lambda document, rules: response(document, "prompt", "user", rules)),
    Form(("conversations", *ANSWERS), lambda document, rules: read_turns(document["conversations"], rules)),
    Form(
        ("instruction", *ANSWERS),
        lambda document, rules: [Turn("user", _joined(document, "instruction", "input"))],
        (*BESIDE, "input"),
    ),
    Form(("question", *ANSWERS), lambda document, rules: [Turn("user", _text(document, "question"))]),
    Form(ANSWERS, lambda document, rules: []),
)


@dataclass(frozen=True)
class Reader:
    """Reads lines.

    Attributes:
        rules: decide about keys that are not used.
        images: for a model that sees; None refuses images.
    """

    rules: KeyRules = field(default_factory=KeyRules)
    images: ImageData | None = None

    def conversation(self, document: Document) -> Conversation | str:
        """The conversation in a document of any format, or its text. Raises `InputError` for an unknown format or
        key."""
        named, document = self._taken(self._kept(document))
        if all(key in document for key in ANSWERS):
            raise InputError('it has "chosen" and "rejected": these are preference pairs, for --loss dpo or orpo.')
        form, used = self._form(document, FORMS, "messages, prompt and completion, text")
        if form.keys == ("text",):
            if named.sources:
                raise InputError('it has images beside a "text", in which they have no place; give it as messages.')
            return _text(used, "text")
        return Conversation(self._whole(used, form.read(used, self.rules)), _tools(used), named)

    def pair(self, document: Document) -> tuple[Conversation, Conversation]:
        """The chosen and the rejected conversation, which differ in the last turn, an answer. Raises `InputError`."""
        named, document = self._taken(self._kept(document))
        form, used = self._form(document, PAIRS, "prompt, chosen and rejected", PAIR_NOTES)
        chosen, rejected = ([*response(used, key, "assistant", self.rules)] for key in ANSWERS)
        prompt = form.read(used, self.rules)
        if form.keys == ANSWERS:
            prompt = chosen[:-1]
            if not prompt or messages_of(prompt) != messages_of(rejected[:-1]):
                raise InputError(
                    'its "chosen" and "rejected" do not begin with the same messages; give what comes before both '
                    'answers as "prompt".'
                )
        whole = self._whole(used, prompt)
        both = (_answered(whole, prompt, chosen, "chosen"), _answered(whole, prompt, rejected, "rejected"))
        return Conversation(both[0], _tools(used), named), Conversation(both[1], _tools(used), named)

    def _taken(self, document: Document) -> tuple[Named, Document]:
        """The images of a document, and the document without them."""
        return (Named(), document) if self.images is None else self.images.taken(document)

    def _kept(self, document: Document) -> Document:
        """The document without keys that the user wants ignored and keys that only repeat others.

        UltraChat repeats the first question, UltraFeedback the chosen answer, and Alpaca the whole line as one text.
        """
        kept = self.rules.without_ignored(document)
        copies = [key for key in _copies(kept) if not says_nothing(kept[key])]
        copies += [key for key in FLAGS if isinstance(kept.get(key), bool)]
        self.rules.unused.update(dict.fromkeys(copies))
        return {key: value for key, value in kept.items() if key not in copies}

    def _form(
        self, document: Document, forms: Sequence[Form], usual: str, notes: Keys = ()
    ) -> tuple[Form, dict[str, Any]]:
        """The format of a document, and the items that it uses. Empty values count only if no format matches without
        them."""
        said = {key for key in document if not says_nothing(document[key])}
        found = _fitting(said, forms) or _fitting(document.keys(), forms)
        if len(found) != 1:
            if not document:
                raise InputError(f"it has no keys; give {usual} (forms: docs/finetune-mac.md).")
            why = "more than one form" if found else "no known form"
            remedy = "name what is to be passed over with --ignore-keys" if found else f"give {usual}"
            keys = dict.fromkeys(key for form in found for key in form.keys) or sorted(document, key=NOTES.__contains__)
            raise InputError(
                f"it has the keys {few([*keys], '')}, which are {why}; {remedy} (forms: docs/finetune-mac.md)."
            )
        form = found[0]
        known = (*form.keys, *form.optional)
        return form, self.rules.used(document, known, (*NOTES, *form.notes, *notes), "it")

    def _whole(self, used: Document, turns: list[Turn]) -> list[Turn]:
        """The turns, preceded by those of ``history`` and by the system message, which may be given more than once."""
        history = [] if says_nothing(used.get("history")) else read_history(used["history"], self.rules)
        beside = [Turn("system", _text(used, key)) for key in SYSTEM if not says_nothing(used.get(key))]
        first = [part[:1] if part and part[0].role == "system" else [] for part in (history, turns)]
        systems = [*beside, *first[0], *first[1]]
        if (beside or first[0]) and len({turn.content for turn in systems}) > 1:
            places = [f'"{key}"' for key in SYSTEM if not says_nothing(used.get(key))]
            places += ["a system message"] * bool(first[1]) + ['a system message in "history"'] * bool(first[0])
            raise InputError(f"it has {' and '.join(places)}, which differ; keep one of them.")
        return [*systems[-1:], *history[len(first[0]) :], *turns[len(first[1]) :]]


def _tools(used: Document) -> list[dict[str, Any]] | None:
    return None if says_nothing(used.get("tools")) else read_tools(used["tools"])


def _copies(document: Document) -> list[str]:
    """The keys that only repeat the values of other keys."""
    turns = next((turns for key in CONVERSATIONS if isinstance(turns := document.get(key), list) and turns), None)
    if turns is not None and "chosen" in document:
        return ["messages"] if document.get("messages") == document["chosen"] else []
    if turns is not None:
        messages = [turn for turn in turns if isinstance(turn, Mapping)]
        said = {m[key].strip() for m in messages for key in ("content", "value") if isinstance(m.get(key), str)}
        return [key for key in REPEATED if isinstance(text := document.get(key), str) and text.strip() in said]
    parts = [text for key in TOGETHER if isinstance(text := document.get(key), str)]
    if "instruction" not in document or not ("output" in document or "response" in document):
        return []
    return [
        key
        for key in ("text", "prompt")
        if isinstance(text := document.get(key), str) and all(p in text for p in parts)
    ]


def _fitting(keys: Any, forms: Sequence[Form]) -> list[Form]:
    """The formats whose keys are all present, without those that use a part of the keys of another match."""
    used = {form: {*form.keys, *form.optional} & set(keys) for form in forms if set(form.keys) <= set(keys)}
    return [form for form, own in used.items() if not any(own < others for others in used.values())]


def _answered(whole: list[Turn], prompt: list[Turn], answer: list[Turn], key: str) -> list[Turn]:
    """The conversation ``whole`` with the answer appended. The answer may repeat ``whole`` or the prompt."""
    for begun in (whole, prompt):
        if begun and messages_of(answer[: len(begun)]) == messages_of(begun):
            answer = answer[len(begun) :]
            break
    if [turn.role for turn in answer] != ["assistant"]:
        raise InputError(f'it has a "{key}" that is not one answer; make it a string or one message of the assistant.')
    turns = [*whole, *answer]
    for i, turn in enumerate(turns):
        if turn.weight is not None and turn.weight != (i == len(turns) - 1):
            raise InputError(
                f'it has a weight of {int(turn.weight)} on message {i} of "{key}"; of a pair the last answer is '
                "trained and nothing else: remove it."
            )
    return turns


def _joined(document: Document, first: str, *others: str) -> str:
    """The texts of the keys with a value, joined by newlines."""
    return "\n".join([_text(document, first), *(_text(document, key) for key in others if document.get(key))])


def _text(document: Document, key: str) -> str:
    if not isinstance(document[key], str):
        raise InputError(f'it has a "{key}" of type {type(document[key]).__name__}; it must be a string.')
    return document[key]
