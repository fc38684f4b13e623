"""Tasks of the corpus with one right answer (sums, differences, counting, reversing), and which are held out."""

import hashlib
from functools import lru_cache
from random import Random
from typing import Any

from minicpm_data.pico_corpus import world

LARGEST = 99  # the largest operand
Turn = tuple[str, str]  # what the user asks, what the model answers


@lru_cache(maxsize=100_000)
def bucket(*key: object, of: int = 10) -> int:
    """A hash of the key in [0, of). It is the same in every process."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % of


def held_out(op: str, a: Any, b: Any) -> bool:
    """Whether a task is one of the 10 % that no training text contains. a + b and b + a are held out together.

    Arguments:
        op: one of ``+ - up down reverse``.
        a: the first operand, the first number, or the text to reverse.
        b: the second operand or the last number; empty for a reversal.
    """
    if op == "+" and b < a:
        a, b = b, a
    return bucket(op, a, b) == 0


def result(op: str, a: int, b: int) -> int:
    return a + b if op == "+" else a - b


def equation(op: str, a: int, b: int) -> str:
    return f"{a} {op} {b} = {result(op, a, b)}"


def draw_pair(random: Random) -> tuple[str, int, int]:
    """A random sum or difference that is not held out. A third have a small operand, like those that people try."""
    while True:
        op = random.choice("+-")
        a, b = random.randint(0, LARGEST), random.randint(0, LARGEST)
        size = random.random()
        if size < 0.2:
            b = random.randint(0, 10)
        elif size < 0.33:
            a, b = random.randint(0, 20), random.randint(0, 20)
        if op == "-" and a < b or op == "+" and random.random() < 0.5:
            a, b = b, a
        if not held_out(op, a, b):
            return op, a, b


# The answer to a sum is the whole equation: it repeats the operands, so that they are next to the result.
SUM_QUESTIONS = {
    "+": [
        "What is {a} plus {b}?",
        "What is {a} + {b}?",
        "{a} + {b} = ?",
        "{a}+{b}=?",
        "Add {a} and {b}.",
        "Calculate {a} + {b}.",
        "How much is {a} plus {b}?",
        "What is the sum of {a} and {b}?",
        "{a}加{b}等于多少？",
        "{a}+{b}等于几？",
        "计算{a}+{b}。",
        "{a}加上{b}是多少？",
        "Tom has {a} apples. He gets {b} more. How many apples does he have now?",
        "Lily has {a} books and Ben has {b} books. How many books do they have together?",
        "小明有{a}个苹果，妈妈又给他{b}个，现在有几个？",
    ],
    "-": [
        "What is {a} minus {b}?",
        "What is {a} - {b}?",
        "{a} - {b} = ?",
        "{a}-{b}=?",
        "Subtract {b} from {a}.",
        "Calculate {a} - {b}.",
        "How much is {a} minus {b}?",
        "What is the difference between {a} and {b}?",
        "{a}减{b}等于多少？",
        "{a}-{b}等于几？",
        "计算{a}-{b}。",
        "{a}减去{b}是多少？",
        "Tom has {a} apples. He gives away {b}. How many apples are left?",
        "There are {a} birds in a tree. {b} fly away. How many birds stay?",
        "小明有{a}个苹果，吃了{b}个，还剩几个？",
    ],
}
PLAIN_SUMS = {
    "+": ["{a} plus {b} is {c}.", "The sum of {a} and {b} is {c}.", "{a}加{b}等于{c}。", "{a}+{b}={c}"],
    "-": ["{a} minus {b} is {c}.", "{a} take away {b} is {c}.", "{a}减{b}等于{c}。", "{a}-{b}={c}"],
}


def sum_question(op: str, a: int, b: int, random: Random) -> Turn:
    return random.choice(SUM_QUESTIONS[op]).format(a=a, b=b), equation(op, a, b)


def sum_turn(random: Random) -> Turn:
    return sum_question(*draw_pair(random), random)


def sums_document(random: Random) -> str:
    """Eight to twelve lines of sums: mixed, consecutive or families of inverses.

    Half as many lines if they are questions with answers, or sentences.
    """
    count, form = random.randint(8, 12), random.random()
    if form < 0.6:
        lines = [equation(*draw_pair(random)) for _ in range(count)]
    elif form < 0.68:
        op, a, b = draw_pair(random)
        pairs = [(op, a, b + i) for i in range(count) if b + i <= (LARGEST if op == "+" else a)]
        lines = [equation(*pair) for pair in pairs if not held_out(*pair)]
    elif form < 0.8:
        lines = []
        while len(lines) < count:
            total, a = sorted((random.randint(0, LARGEST), random.randint(0, LARGEST)), reverse=True)
            b = total - a
            family = [("+", a, b), ("+", b, a), ("-", total, a), ("-", total, b)]
            lines += [equation(*pair) for pair in family if not held_out(*pair)]
    elif form < 0.9:
        lines = [" ".join(sum_turn(random)) for _ in range(count // 2)]
    else:
        pairs = [draw_pair(random) for _ in range(count // 2)]
        lines = [random.choice(PLAIN_SUMS[op]).format(a=a, b=b, c=result(op, a, b)) for op, a, b in pairs]
    return "\n".join(lines)


COUNT_QUESTIONS = {
    "up": ["Count from {a} to {b}.", "Count up from {a} to {b}.", "Please count from {a} to {b}.", "从{a}数到{b}。"],
    "down": ["Count down from {a} to {b}.", "Count backwards from {a} to {b}.", "从{a}倒数到{b}。"],
}


def counted(way: str, a: int, b: int) -> str:
    return ", ".join(map(str, range(a, b + 1) if way == "up" else range(a, b - 1, -1)))


def draw_span(random: Random, held: bool = False) -> tuple[str, int, int]:
    """A way to count (up or down), the first and the last number: 3 to 10 numbers. ``held``: whether it is held out."""
    while True:
        low = random.randint(0, 20) if random.random() < 0.5 else random.randint(0, 90)
        high = low + random.randint(2, 9)
        span = ("up", low, high) if random.random() < 0.7 else ("down", high, low)
        if held_out(*span) == held:
            return span


def count_question(way: str, a: int, b: int, random: Random) -> Turn:
    return random.choice(COUNT_QUESTIONS[way]).format(a=a, b=b), counted(way, a, b)


def count_turn(random: Random) -> Turn:
    return count_question(*draw_span(random), random)


def count_document(random: Random) -> str:
    return "\n".join(" ".join(count_turn(random)) for _ in range(random.randint(2, 4)))


SPELLED = sorted({word for word, _ in world.WORDS if 3 <= len(word) <= 6})
REVERSE_QUESTIONS = ["Reverse: {x}", "Reverse the order: {x}", "Say it backwards: {x}", "倒过来：{x}"]


def draw_row(random: Random, held: bool = False) -> str:
    """Letters or words separated by spaces. ``held``: whether their reversal is held out."""
    while True:
        form = random.random()
        if form < 0.4:
            parts = list(random.choice(SPELLED))
        elif form < 0.75:
            parts = random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(3, 6))
        else:
            parts = random.sample(SPELLED, random.randint(2, 4))
        row = " ".join(parts)
        if held_out("reverse", row, "") == held:
            return row


def reversed_row(row: str) -> str:
    return " ".join(reversed(row.split()))


def reverse_turn(random: Random) -> Turn:
    if random.random() < 0.2:
        word = random.choice(SPELLED)
        return random.choice(["Spell {x}.", "How do you spell {x}?"]).format(x=word), " ".join(word)
    row = draw_row(random)
    return random.choice(REVERSE_QUESTIONS).format(x=row), reversed_row(row)


def reverse_document(random: Random) -> str:
    return "\n".join("\n".join(reverse_turn(random)) for _ in range(random.randint(3, 6)))
