"""The corpus of `pico`, the small MiniCPM that ships with the package, and the questions that score it.

All text comes from the grammars and tables in `pico_corpus`. A document is a pure function of (stage, index, seed).

    python -m minicpm_data.corpus --save-path data/pico
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

from minicpm_data.pico_corpus import facts, skills, stories
from weights_io.command_line import Former
from weights_io.errors import InputError
from weights_io.files.partial import partial
from weights_io.progress import progress_bar
from weights_io.write import folder_to_fill

STAGES = ("stable", "decay")
SPLITS = ("train", "valid")
# Shares of the documents. Counted in tokens, sums are 40 % of the plain text and 35 % of the chats.
PLAIN: dict[Callable[[Random], str], float] = {
    skills.sums_document: 0.31,
    stories.story_document: 0.29,
    facts.fact_document: 0.17,
    facts.translation_document: 0.10,
    skills.count_document: 0.06,
    skills.reverse_document: 0.07,
}
CHAT: dict[Callable[[Random], skills.Turn], float] = {
    skills.sum_turn: 0.36,
    facts.fact_turn: 0.22,
    facts.translation_turn: 0.18,
    stories.story_turn: 0.08,
    skills.count_turn: 0.05,
    skills.reverse_turn: 0.06,
    facts.greeting_turn: 0.05,
}
CHAT_SHARE = 0.70  # of the decay stage's documents; half of its tokens, as chats are shorter
QUESTIONS = {"sum": 500, "fact": 100, "translation": 100, "count": 100, "reverse": 100}


def _pick(random: Random, choices: dict):
    return random.choices(list(choices), list(choices.values()))[0]


def document(index: int, seed: int = 0, stage: str = "stable", split: str = "train") -> dict:
    """Generate one document of the corpus.

    Arguments:
        index: its number in the split.
        seed: the seed of the corpus.
        stage: ``stable`` or ``decay``.
        split: ``train`` or ``valid``.

    Returns:
        ``{"text": ...}``; in the decay stage often ``{"messages": [...]}``.
    """
    random = Random(f"{seed} {stage} {split} {index}")
    if stage == "stable" or random.random() >= CHAT_SHARE:
        return {"text": _pick(random, PLAIN)(random)}
    turns = 1 if random.random() < 0.8 else random.randint(2, 3)
    messages = []
    for _ in range(turns):
        asked, answer = _pick(random, CHAT)(random)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def questions(seed: int = 0) -> Iterator[dict]:
    """The held-out questions: ``{"prompt", "answer", "kind"}`` each.

    Questions of the kinds ``sum``, ``count`` and ``reverse`` have operands, spans and rows that occur in no training
    text. ``fact`` and ``translation`` ask for facts of the training text, each in the one form of question that the
    training text never uses for it.
    """
    random = Random(f"{seed} questions")
    numbers = range(skills.LARGEST + 1)
    pairs = [(op, a, b) for op in "+-" for a in numbers for b in numbers if op == "+" or a >= b]
    for op, a, b in random.sample([pair for pair in pairs if skills.held_out(*pair)], QUESTIONS["sum"]):
        prompt, _ = skills.sum_question(op, a, b, random)
        yield {"prompt": prompt, "answer": str(skills.result(op, a, b)), "kind": "sum"}
    everything = [fact for family in facts.families() for fact in family]
    for kind, taught in (("fact", everything), ("translation", facts.translations())):
        for fact in random.sample(taught, QUESTIONS[kind]):
            yield {"prompt": fact.questions[fact.held_out], "answer": fact.answer, "kind": kind}
    spans: set[tuple[str, int, int]] = set()
    rows: set[str] = set()
    while len(spans) < QUESTIONS["count"]:
        span = skills.draw_span(random, held=True)
        if span not in spans:
            spans.add(span)
            prompt, answer = skills.count_question(*span, random)
            yield {"prompt": prompt, "answer": answer, "kind": "count"}
    while len(rows) < QUESTIONS["reverse"]:
        row = skills.draw_row(random, held=True)
        if row not in rows:
            rows.add(row)
            prompt = random.choice(skills.REVERSE_QUESTIONS).format(x=row)
            yield {"prompt": prompt, "answer": skills.reversed_row(row), "kind": "reverse"}


def is_right(question: dict, reply: str) -> bool:
    """Whether a reply answers a question.

    The last number of the reply must be the answer to a sum. For a fact, the reply must end with the answer as whole
    words. For all other kinds, it must equal the answer. Case, spacing and a full stop at the end do not matter.

    Arguments:
        question: one of `questions`.
        reply: the model's text.
    """
    answer = question["answer"]
    if question["kind"] == "sum":
        numbers = re.findall(r"-?\d+(?:[.,]\d+)*", reply)
        return bool(numbers) and numbers[-1] == answer
    reply, answer = (" ".join(text.lower().split()).rstrip(" .!。！") for text in (reply, answer))
    if question["kind"] == "fact":
        before = reply.removesuffix(answer)
        whole = not (before and answer[0].isascii() and before[-1].isascii() and before[-1].isalnum())
        return reply.endswith(answer) and whole
    return reply == answer


def _told(document: dict, bar: Any) -> dict:
    bar.update()
    return document


def _write(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass
class Options:
    save_path: Annotated[Path, Former("out")]
    """Folder to write, new or empty."""
    documents: int = 128_000
    """Training documents of the stable stage. The decay stage gets 0.64 times this number, validation 1 % of each."""
    seed: int = 0
    """Seed of the documents."""


def main(options: Options) -> None:
    """Write the corpus of pico: questions.jsonl, and train.jsonl and valid.jsonl in each of stable/ and decay/."""
    if options.documents < 1:
        raise InputError(f"{options.documents} is not a number of documents; give 1 or more.", option="documents")
    if options.save_path.is_file() or options.save_path.is_dir() and any(options.save_path.iterdir()):
        raise InputError(
            f"{options.save_path} exists and is not an empty folder; name a new one or remove it first.",
            option="save_path",
        )
    try:
        with (
            folder_to_fill(options.save_path.absolute().parent),
            partial(options.save_path.absolute(), folder=True) as folder,
        ):
            write(folder, options)
    except OSError as error:
        raise InputError(
            f"{options.save_path} cannot be written ({error.strerror}); name another folder.", option="save_path"
        ) from None


def write(folder: Path, options: Options) -> None:
    """Write all splits and the questions into ``folder``."""
    for stage, share in zip(STAGES, (1.0, 0.64), strict=True):
        train = max(1, int(options.documents * share))
        for split, count in zip(SPLITS, (train, max(1, train // 100)), strict=True):
            name = f"{stage}/{split}.jsonl"
            with progress_bar(name, count, unit="document") as bar:
                _write(folder / name, (_told(document(i, options.seed, stage, split), bar) for i in range(count)))
            print(f"{name}: {count} documents", file=sys.stderr)
    _write(folder / "questions.jsonl", questions(options.seed))


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_data.corpus")
