"""Needle tasks in long texts, with the wording of InfiniteBench: a pass key, a number, the value of a key."""

import re
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from weights_io.errors import InputError

Encode = Callable[[str], Sequence[int]]  # text -> token ids
TaskName = Literal["passkey", "number_string", "kv_retrieval"]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
SEPARATORS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))
HELD_OUT = 10  # one needle in 10 is used only for evaluation


@dataclass(frozen=True)
class Task:
    """A kind of needle. A text has ``size`` units: lines of noise, or pairs of key and value."""

    needle: Callable[[Random], str]
    text: Callable[[str, float, int, Random], str]  # needle, depth from 0 to 1, size, source of the other random values
    space: str  # between the prompt and the answer
    answer_tokens: int  # most tokens of a reply
    found: Callable[[str, str], bool]  # needle, reply -> whether it is right
    least: int = 0  # smallest size


@dataclass(frozen=True)
class Sample:
    """A text with a needle. The answer continues the raw ``prompt``. ``depth`` is the needle's position, 0 to 1."""

    task: TaskName
    prompt: str
    answer: str
    depth: float
    ids: Sequence[int]  # token ids of the prompt


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
    """Whether a needle is used for evaluation only. The others are for training, whatever the seeds."""
    return zlib.crc32(needle.encode()) % HELD_OUT == 0


def answer_tokens(task: TaskName, encode: Encode) -> int:
    """Most tokens of a reply: the benchmark's limit, or the length of a needle in tokens if that is more."""
    form = TASKS[task]
    needle = form.needle(Random(0))
    asked = form.text(needle, 0, form.least, Random(0))
    spelled = len(encode(asked + form.space + needle)) - len(encode(asked))
    return max(form.answer_tokens, spelled)


def make_sample(
    task: TaskName, encode: Encode, length: int, depth: float, seed: str, for_evaluation: bool = True
) -> Sample:
    """Make a sample with as much text as fits ``length`` tokens together with the reply.

    Arguments:
        task: the kind of needle.
        encode: the tokenizer's.
        length: most tokens of prompt and reply.
        depth: position of the needle, 0 to 1.
        seed: determines the sample.
        for_evaluation: use a held-out needle.

    Raises:
        InputError: ``length`` is too short for the needle and its question.
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
    """The benchmark's score: the first integer of the reply is the needle, or one of its words is the value."""
    return TASKS[sample.task].found(sample.answer, reply)
