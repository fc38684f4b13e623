"""Long-context retrieval in the forms of InfiniteBench (arXiv 2402.13718; OpenBMB/InfiniteBench on GitHub).

A needle lies at some depth of a text of no interest, and the model is asked for it: a pass key of 5 digits
(``passkey``), a sequence of 10 digits half of which repeat their neighbour (``number_string``), or the value of one key
among many (``kv_retrieval``). Wording, lengths of answers and scoring are the benchmark's, so that scores can be
compared; the samples are ours, drawn by seed and made as long as the tokenizer counts.

    python -m minicpm_serve.retrieval --tokenizer pico --task passkey --lengths 160 256 --samples 100 --out train.jsonl

writes samples to train on, none of whose needles is ever asked for in an evaluation.
"""

import json
import re
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

from weights_io.errors import InputError
from weights_io.partial import partial

if TYPE_CHECKING:
    from minicpm_data.tokenizer import Tokenizer

Encode = Callable[[str], Sequence[int]]  # a text's token ids
TaskName = Literal["passkey", "number_string", "kv_retrieval"]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
SEPARATORS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))
HELD_OUT = 10  # one needle in so many is for evaluation alone


@dataclass(frozen=True)
class Task:
    """One form. A text has ``size`` units: lines of noise, or pairs of key and value."""

    needle: Callable[[Random], str]
    text: Callable[[str, float, int, Random], str]  # needle, depth from 0 to 1, size, for what else is drawn
    space: str  # between the prompt and the answer
    answer_tokens: int  # most that a reply may have
    found: Callable[[str, str], bool]  # needle, reply
    least: int = 0  # size


@dataclass(frozen=True)
class Sample:
    """``prompt`` is raw text that the answer continues; ``depth`` says where the needle lies, from 0 to 1."""

    task: TaskName
    prompt: str
    answer: str
    depth: float
    ids: Sequence[int]  # of the prompt


def _pass_key(random: Random) -> str:
    return "".join(random.choices("0123456789", k=5))


def _number_string(random: Random) -> str:
    digits = random.choices("0123456789", k=5)
    while len(digits) < 10:
        at = random.randrange(len(digits))
        digits.insert(at, digits[at])
    return "".join(digits)


def _identifier(random: Random) -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def _hidden(remember: str, needle: str, subject: str) -> Callable[[str, float, int, Random], str]:
    intro = f"There is an important info hidden inside a lot of irrelevant text. {remember} "
    intro += "I will quiz you about the important information there.\n\n"
    question = f"\n\nWhat is the {subject}?\n\nThe {subject} is"

    def text(key: str, depth: float, size: int, random: Random) -> str:
        before = round(depth * size)
        return intro + NOISE * before + needle.format(key) + NOISE * (size - before) + question

    return text


def _pairs(value: str, depth: float, size: int, random: Random) -> str:
    pairs = [(_identifier(random), _identifier(random)) for _ in range(size)]
    at = round(depth * (size - 1))
    key = pairs[at][0]
    pairs[at] = (key, value)
    data = ", ".join(f'"{name}": "{content}"' for name, content in pairs)
    intro = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
    return f'{intro}{{{data}}}\n\nKey: "{key}"\nThe value associated with the specified key is: '


def _first_integer(needle: str, reply: str) -> bool:
    found = re.search("[0-9]+", reply)
    return found is not None and found[0] == needle


def _among_words(needle: str, reply: str) -> bool:
    return needle in reply.translate(SEPARATORS).split()


TASKS: dict[TaskName, Task] = {
    "passkey": Task(
        _pass_key,
        _hidden("Find it and memorize them.", "The pass key is {0}. Remember it. {0} is the pass key.\n", "pass key"),
        " ",
        6,
        _first_integer,
    ),
    "number_string": Task(
        _number_string,
        _hidden(
            "Find it.",
            "The sequence of digits is {0}. Remember it. {0} is the sequence of digits.\n",
            "sequence of digits",
        ),
        " ",
        12,
        _first_integer,
    ),
    "kv_retrieval": Task(_identifier, _pairs, "", 50, _among_words, least=1),
}


def held_out(needle: str) -> bool:
    """Whether a needle is for evaluation; the others are for training, whatever the seeds."""
    return zlib.crc32(needle.encode()) % HELD_OUT == 0


def answer_tokens(task: TaskName, encode: Encode) -> int:
    """Most tokens of a reply: the benchmark's, or what the tokenizer needs to spell a needle if that is more."""
    form = TASKS[task]
    needle = form.needle(Random(0))
    asked = form.text(needle, 0, form.least, Random(0))
    spelled = len(encode(asked + form.space + needle)) - len(encode(asked))
    return max(form.answer_tokens, spelled)


def make_sample(
    task: TaskName, encode: Encode, length: int, depth: float, seed: str, for_evaluation: bool = True
) -> Sample:
    """The sample of a ``seed``: as much text as fits so that prompt and reply are at most ``length`` tokens.

    InputError where that is too short for the needle and its question.
    """
    form, random = TASKS[task], Random(f"{task} {seed} {'evaluation' if for_evaluation else 'training'}")
    needle = form.needle(random)
    while held_out(needle) != for_evaluation:
        needle = form.needle(random)
    noise = random.getrandbits(64)
    most = length - answer_tokens(task, encode)

    def prompt(size: int) -> str:
        return form.text(needle, depth, size, Random(noise))

    def tokens(size: int) -> int:
        return len(encode(prompt(size)))

    shortest = tokens(form.least)
    if shortest > most:
        raise InputError(
            f"{length} tokens are too few for {task}, whose shortest prompt and reply are "
            f"{shortest + length - most} of this tokenizer's; raise the length."
        )
    unit = (tokens(form.least + 16) - shortest) / 16
    size = form.least + int((most - shortest) / unit)
    while size > form.least and tokens(size) > most:
        size -= 1
    while tokens(size + 1) <= most:
        size += 1
    text = prompt(size)
    return Sample(task, text, needle, depth, encode(text))


def evaluation_samples(
    task: TaskName, encode: Encode, length: int, count: int, seed: int = 0, depths: Sequence[float] = ()
) -> list[Sample]:
    """``count`` samples of at most ``length`` tokens with the needles at ``depths`` in turn, or evenly spread."""
    even = [i / max(count - 1, 1) for i in range(count)]
    spread = [depths[i % len(depths)] for i in range(count)] if depths else even
    return [make_sample(task, encode, length, depth, f"{seed} {i}") for i, depth in enumerate(spread)]


def is_right(sample: Sample, reply: str) -> bool:
    """The benchmark's score: the reply's first integer is the needle, or the value is among its words."""
    return TASKS[sample.task].found(sample.answer, reply)


@dataclass(frozen=True)
class Options:
    out: Path
    """The .jsonl file to write: {"prompt": ..., "completion": ...} a line."""
    tokenizer: str | None = None
    """Folder, GGUF file, hub id or short name of the model whose tokens are counted; left out: the built-in model."""
    task: TaskName = "passkey"
    """A pass key of 5 digits, a sequence of 10, or a value of a JSON object."""
    lengths: tuple[int, int] = (512, 4096)
    """Least and most tokens of a prompt with its answer; each sample's is drawn between them."""
    samples: int = 2000
    """Lines to write."""
    seed: int = 0
    """Draws needles, depths and lengths."""


def main(options: Options) -> None:
    """Write retrieval samples to train on; their needles never come in an evaluation."""
    from tqdm import tqdm

    shortest, longest = options.lengths
    if options.samples < 1:
        raise InputError(f"--samples is {options.samples}; it must be at least 1.")
    if shortest > longest:
        raise InputError(f"--lengths {shortest} {longest} run backwards; give the least first.")
    encode = _tokenizer(options.tokenizer).encode
    space = TASKS[options.task].space
    make_sample(options.task, encode, shortest, 0.0, "shortest", False)  # refused before the file is begun
    options.out.parent.mkdir(parents=True, exist_ok=True)
    tokens = 0
    with partial(options.out) as path, path.open("w", encoding="utf-8") as file:
        for i in tqdm(range(options.samples), desc="writing", disable=None, delay=1):
            random = Random(f"{options.seed} {i}")
            length, depth = random.randint(shortest, longest), random.random()
            sample = make_sample(options.task, encode, length, depth, f"{options.seed} {i}", False)
            line = {"prompt": sample.prompt, "completion": f"{space}{sample.answer}{'.' if space else ''}"}
            file.write(json.dumps(line) + "\n")
            tokens += len(sample.ids)
    print(f"{options.out}: {options.samples} samples of {options.task}, {tokens:,} tokens of prompts")


def _tokenizer(path_or_repo: str | None) -> "Tokenizer":
    from minicpm_data.of_checkpoint import tokenizer_of
    from minicpm_data.tokenizer_folder import load_tokenizer
    from weights_io.checkpoint import open_checkpoint
    from weights_io.hub import resolve

    path = resolve(path_or_repo, weights=False)
    tokenizer = load_tokenizer(path) if path.is_dir() else tokenizer_of(open_checkpoint(path))
    if tokenizer is None:
        raise InputError(f"{path_or_repo} holds no tokenizer; give a model folder with one.")
    return tokenizer


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_serve.retrieval")
