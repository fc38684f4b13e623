"""The forms that training data comes in, told apart by their keys: each to turns, a text or a pair of answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from minicpm_data.keys import NOTES, KeyRules, few, says_nothing
from minicpm_data.turns import Turn, asked, messages_of, read_history, read_turns, response
from weights_io.errors import InputError

Document = Mapping[str, Any]
Keys = tuple[str, ...]

# The question with which OpenBMB tunes on OCNLI (finetune/lora_finetune_ocnli.ipynb): one colon is ASCII, one is not.
OCNLI_QUESTION = "请判断下边两个句子的关系属于 [entailment, neutral, contradiction]中的哪一种？\n句子1: {}\n句子2：{}\n"
OCNLI_NOTES = ("label0", "label1", "label2", "label3", "label4", "prem_id")  # what each of its annotators said
PAIR_NOTES = ("score_chosen", "score_rejected")  # UltraFeedback's
BESIDE = ("system", "history")  # what may stand before the turns of a conversation


class Form(NamedTuple):
    """A line that has all of ``keys`` and may have ``optional`` ones; of ``notes`` nothing is made."""

    keys: Keys
    read: Callable[[Document, KeyRules], list[Turn]]
    optional: Keys = BESIDE
    notes: Keys = ()


def _of(question: str, answer: str, *context: str) -> Form:
    """Texts of a question and an answer; what a key of ``context`` holds goes below the question, as in Alpaca."""

    def read(document: Document, rules: KeyRules) -> list[Turn]:
        return asked(_joined(document, question, *context), _text(document, answer))

    return Form((question, answer), read, (*BESIDE, *context))


def _prompted(document: Document, rules: KeyRules) -> list[Turn]:
    """``prompt`` and ``completion``, texts or TRL's lists of messages; answers within the prompt are not trained."""
    prompt = [replace(turn, asked=True) for turn in response(document, "prompt", "user", rules)]
    return [*prompt, *response(document, "completion", "assistant", rules)]


def _mlx_advertise_gen(document: Document, rules: KeyRules) -> list[Turn]:
    """OpenBMB's mlx_AdvertiseGen, in which the input comes first."""
    return asked(_text(document, "input") + _text(document, "prompt"), _text(document, "output"))


def _ocnli(document: Document, rules: KeyRules) -> list[Turn]:
    question = OCNLI_QUESTION.format(_text(document, "sentence1"), _text(document, "sentence2"))
    return asked(question, _text(document, "label"))


FORMS = (
    Form(("messages",), lambda document, rules: read_turns(document["messages"], rules)),
    Form(("conversations",), lambda document, rules: read_turns(document["conversations"], rules)),
    Form(("prompt", "completion"), _prompted),
    _of("prompt", "response"),
    _of("query", "response"),
    _of("instruction", "output", "input"),
    _of("instruction", "response", "input", "context"),
    _of("content", "summary"),  # AdvertiseGen
    Form(("input", "prompt", "output"), _mlx_advertise_gen),
    Form(("sentence1", "sentence2", "label"), _ocnli, notes=OCNLI_NOTES),
    Form(("text",), lambda document, rules: [], optional=()),
)
ANSWERS = ("chosen", "rejected")
# What is read of a pair is its prompt; where it has none, both answers repeat it.
PAIRS = (
    Form(("prompt", *ANSWERS), lambda document, rules: response(document, "prompt", "user", rules)),
    Form(("conversations", *ANSWERS), lambda document, rules: read_turns(document["conversations"], rules)),
    Form(
        ("instruction", *ANSWERS),
        lambda document, rules: [Turn("user", _joined(document, "instruction", "input"))],
        (*BESIDE, "input"),
    ),
    Form(ANSWERS, lambda document, rules: []),
)


@dataclass(frozen=True)
class Reader:
    """Reads lines by the ``rules`` for their keys."""

    rules: KeyRules = field(default_factory=KeyRules)

    def conversation(self, document: Document) -> list[Turn] | str:
        """The turns of a document of any form, or its text. InputError where the form or a key is not known."""
        document = self._kept(document)
        if all(key in document for key in ANSWERS):
            raise InputError('it has "chosen" and "rejected": these are preference pairs, for --loss dpo or orpo.')
        form, used = self._form(document, FORMS, "messages, prompt and completion, text")
        if form.keys == ("text",):
            return _text(used, "text")
        return [*self._before(used), *self._rest(used, form.read(used, self.rules))]

    def pair(self, document: Document) -> tuple[list[Turn], list[Turn]]:
        """Two conversations that differ in their last turn, an answer: the chosen and the rejected one."""
        form, used = self._form(self._kept(document), PAIRS, "prompt, chosen and rejected", PAIR_NOTES)
        chosen, rejected = ([*response(used, key, "assistant", self.rules)] for key in ANSWERS)
        prompt = form.read(used, self.rules)
        if form.keys == ANSWERS:
            prompt = chosen[:-1]
            if not prompt or messages_of(prompt) != messages_of(rejected[:-1]):
                raise InputError(
                    'its "chosen" and "rejected" do not begin with the same messages; give what comes before both '
                    'answers as "prompt".'
                )
        whole = [*self._before(used), *self._rest(used, prompt)]
        return _answered(whole, prompt, chosen, "chosen"), _answered(whole, prompt, rejected, "rejected")

    def _kept(self, document: Document) -> Document:
        """Less what the user wants passed over, and less what only repeats: UltraChat has the first question, and
        UltraFeedback the chosen answer, once more."""
        kept = self.rules.without_ignored(document)
        messages = kept.get("messages")
        if isinstance(messages, list) and messages:
            questions = [m.get("content") for m in messages if isinstance(m, Mapping) and m.get("role") == "user"]
            copy = "messages" if messages == kept.get("chosen") else "prompt"
            if copy == "messages" or ("chosen" not in kept and kept.get("prompt") in questions[:1]):
                kept.pop(copy, None)
        return kept

    def _form(
        self, document: Document, forms: Sequence[Form], usual: str, notes: Keys = ()
    ) -> tuple[Form, dict[str, Any]]:
        """The form whose keys the document has, and what is used of it. Keys that say nothing count only where no form
        is found without them."""
        said = {key for key in document if not says_nothing(document[key])}
        found = _fitting(said, forms) or _fitting(document.keys(), forms)
        if len(found) != 1:
            why = "more than one form" if found else "no known form"
            remedy = "name what is to be passed over with --ignore-keys" if found else f"give {usual}"
            keys = dict.fromkeys(key for form in found for key in form.keys) or sorted(document, key=NOTES.__contains__)
            raise InputError(
                f"it has the keys {few([*keys], '')}, which are {why}; {remedy} (forms: docs/finetune-mac.md)."
            )
        form = found[0]
        known = (*form.keys, *form.optional)
        return form, self.rules.used(document, known, (*NOTES, *form.notes, *notes), "it")

    def _before(self, used: Document) -> list[Turn]:
        """The system message beside the turns."""
        return [] if says_nothing(used.get("system")) else [Turn("system", _text(used, "system"))]

    def _rest(self, used: Document, turns: list[Turn]) -> list[Turn]:
        """The turns, with the earlier ones of ``history`` behind a system message of their own."""
        system = turns[:1] if turns and turns[0].role == "system" else []
        if system and not says_nothing(used.get("system")):
            raise InputError('it has "system" and a system message; keep one of them.')
        history = [] if says_nothing(used.get("history")) else read_history(used["history"], self.rules)
        return [*system, *history, *turns[len(system) :]]


def _fitting(keys: Any, forms: Sequence[Form]) -> list[Form]:
    """The forms of which all keys are there, less those that are part of another such."""
    found = [form for form in forms if set(form.keys) <= set(keys)]
    return [form for form in found if not any(set(form.keys) < set(other.keys) for other in found)]


def _answered(whole: list[Turn], prompt: list[Turn], answer: list[Turn], key: str) -> list[Turn]:
    """``whole``, the prompt with all that comes before it, and the answer, whose messages may repeat either."""
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
    """The texts of the keys that say something, one below the other."""
    return "\n".join([_text(document, first), *(_text(document, key) for key in others if document.get(key))])


def _text(document: Document, key: str) -> str:
    if not isinstance(document[key], str):
        raise InputError(f'it has a "{key}" of type {type(document[key]).__name__}; it must be a string.')
    return document[key]
