"""Tasks of lm-eval with choices, asked as a question whose answer is generated.

The README of MiniCPM scores such a task in two ways: by the perplexity of each choice, as lm-eval does, and by what the
model answers. Where the choices are not letters, they are listed under letters after the question.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

ANSWER = {"until": ["\n\n"], "max_gen_toks": 32, "do_sample": False}
# The letter at the beginning; after "answer is", also in Chinese; the first that stands alone and is no article.
PATTERNS = (
    r"^\W*({0})(?![A-Za-z]|\s+[a-z])",
    r"(?i:answer(?: is)?:?|答案(?:是|为)?[:：]?)\W*({0})(?![A-Za-z])",
    r"(?<![A-Za-z])({0})(?![A-Za-z]|\s+[a-z])",
)


class Tasks(TaskManager):
    """The tasks of lm-eval and of a folder, of which those with choices may be asked (`ask`)."""

    def __init__(self, asked: bool, include_path: str | None):
        super().__init__(include_path=include_path)
        self.asked = asked
        self.converted: set[str] = set()  # names of tasks that are asked

    def load(self, task_list: Any) -> Any:
        found = super().load(task_list)
        for name, task in found["tasks"].items():
            if self.asked and convertible(task):
                ask(task)
                self.converted.add(name)
        return found


def convertible(task: Any) -> bool:
    """Whether a task has one right choice after one question."""
    return (
        task.OUTPUT_TYPE == "multiple_choice"
        and not getattr(task, "multiple_input", 0)
        and not getattr(task, "multiple_target", 0)
        and not callable(task.config.process_results)
    )


def ask(task: Any) -> None:
    """Change a task with choices: its questions are asked, and the letter of the answer is compared."""
    text_of, texts_of, right_of = task.doc_to_text, task.doc_to_choice, task.doc_to_target

    def doc_to_choice(doc: Any, *given: Any) -> list[str]:
        return _letters(texts_of(doc, *given))

    def doc_to_text(doc: Any, *given: Any) -> Any:
        text, texts = text_of(doc, *given), texts_of(doc)
        letters = _letters(texts)
        if letters == [text.strip() for text in texts]:
            return text
        listed = "\n".join(f"{letter}. {choice.strip()}" for letter, choice in zip(letters, texts, strict=True))
        return f"{text}\n{listed}\nAnswer:"

    def doc_to_target(doc: Any, *given: Any) -> Any:
        right, texts = right_of(doc, *given), texts_of(doc)
        if isinstance(right, str) and right in texts:
            right = texts.index(right)
        return _letters(texts)[right] if isinstance(right, int) and 0 <= right < len(texts) else right

    def construct_requests(doc: Any, ctx: str, **kwargs: Any) -> Instance:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("apply_chat_template", "chat_template")}
        return Instance(request_type="generate_until", doc=doc, arguments=(ctx, dict(ANSWER)), idx=0, **kwargs)

    def process_results(doc: Any, results: Sequence[Any]) -> dict[str, float]:
        return {"acc": float(chosen(results[0], doc_to_choice(doc)) == doc_to_target(doc))}

    task.doc_to_choice, task.doc_to_text, task.doc_to_target = doc_to_choice, doc_to_text, doc_to_target
    task.construct_requests, task.process_results = construct_requests, process_results
    task.OUTPUT_TYPE = "generate_until"


def chosen(reply: str, letters: Sequence[str]) -> str | None:
    """The letter that a reply chooses; None where it names none."""
    for pattern in PATTERNS:
        if found := re.search(pattern.format("|".join(map(re.escape, letters))), reply):
            return found[1]
    return None


def _letters(texts: Sequence[str]) -> list[str]:
    """The choices themselves if they are single letters, else A, B, .."""
    plain = [text.strip() for text in texts]
    return plain if all(len(t) == 1 and t.isupper() for t in plain) else list(ascii_uppercase[: len(texts)])
