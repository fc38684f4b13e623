"""Facts, word pairs and greetings of the corpus. Each fact has one form of question that training never uses."""

from dataclasses import dataclass
from functools import cache
from random import Random

from minicpm_data.pico_corpus import world
from minicpm_data.pico_corpus.skills import Turn, bucket


@dataclass(frozen=True)
class Fact:
    """A fact and the questions about it.

    Attributes:
        statement: the sentence that answers every question. It ends with ``answer``.
        questions: all forms in which the fact may be asked.
        answer: the short answer.
    """

    statement: str
    questions: tuple[str, ...]
    answer: str

    @property
    def held_out(self) -> int:
        """Index of the form of question that the training text uses for other facts, but never for this one."""
        return bucket(self.statement, of=len(self.questions))

    def turn(self, random: Random) -> Turn:
        asked = [q for i, q in enumerate(self.questions) if i != self.held_out]
        return random.choice(asked), self.statement


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _family(statement: str, questions: list[str], rows: list[dict]) -> list[Fact]:
    return [
        Fact(
            _sentence(statement.format(**row)),
            tuple(_sentence(q.format(**row)) for q in questions),
            row["answer"] if "answer" in row else row["y"],
        )
        for row in rows
    ]


def _rows(pairs) -> list[dict]:
    return [{"x": x.replace("_", " "), "ax": _a(x), "y": y, "ay": _a(y)} for x, y in pairs]


def _after(names: list[str], step: int) -> list[dict]:
    return _rows((name, names[(i + step) % len(names)]) for i, name in enumerate(names))


def _sizes(names: list[str], article: bool) -> list[dict]:
    rows = []
    for i, small in enumerate(names):
        for big in names[i + 1 :]:
            first, second = (small, big) if bucket(small, big, of=2) else (big, small)
            first, second = (_a(first), _a(second)) if article else (first, second)
            answer = f"{_a(big)} is bigger than {_a(small)}" if article else f"{big}比{small}大"
            rows.append({"x": first, "y": second, "answer": answer})
    return rows


@cache
def families() -> tuple[tuple[Fact, ...], ...]:
    """All facts, grouped by topic."""
    countries = world.COUNTRIES
    capital = ["What is the capital of {x}?", "Which city is the capital of {x}?", "Name the capital of {x}."]
    capital += ["Tell me the capital of {x}.", "Do you know the capital of {x}?"]
    legs = ["How many legs does {ax} have?", "Tell me how many legs {ax} has.", "{ax} has how many legs?"]
    listed = [
        _family("the capital of {x} is {y}.", capital, _rows((c[0], c[1]) for c in countries)),
        _family(
            "{x}的首都是{y}。",
            ["{x}的首都是哪里？", "{x}的首都是什么？", "哪座城市是{x}的首都？", "请告诉我{x}的首都。"],
            _rows((c[3], c[4]) for c in countries),
        ),
        _family(
            "{x} is in {y}.",
            ["Where is {x}?", "Which continent is {x} in?", "On which continent is {x}?"],
            _rows((c[0], c[2]) for c in countries),
        ),
        _family(
            "{x}在{y}。",
            ["{x}在哪里？", "{x}在哪个洲？", "{x}位于哪个大洲？"],
            _rows((c[3], c[5]) for c in countries),
        ),
        _family(
            "the opposite of {x} is {y}.",
            ["What is the opposite of {x}?", "Give me the opposite of {x}.", "Which word is the opposite of {x}?"],
            _rows([*world.OPPOSITES, *((b, a) for a, b in world.OPPOSITES)]),
        ),
        _family(
            "{x}的反义词是{y}。",
            ["{x}的反义词是什么？", "请说出{x}的反义词。", "什么是{x}的反义词？"],
            _rows([*world.OPPOSITES_ZH, *((b, a) for a, b in world.OPPOSITES_ZH)]),
        ),
        _family(
            "the colour of {x} is {y}.",
            ["What colour is {x}?", "What is the colour of {x}?", "Tell me the colour of {x}."],
            _rows(world.COLOURS),
        ),
        _family("{x}是{y}。", ["{x}是什么颜色？", "{x}的颜色是什么？", "{x}是什么颜色的？"], _rows(world.COLOURS_ZH)),
        _family(
            "{ax} says {y}.",
            ["What does {ax} say?", "What sound does {ax} make?", "Which sound comes from {ax}?"],
            _rows(world.SOUNDS),
        ),
        _family("{x}的叫声是{y}。", ["{x}怎么叫？", "{x}的叫声是什么？", "{x}是怎么叫的？"], _rows(world.SOUNDS_ZH)),
        _family(
            "a baby {x} is called {ay}.",
            ["What is a baby {x} called?", "What do we call a baby {x}?", "What is the name of a baby {x}?"],
            _rows(world.BABIES),
        ),
        _family(
            "the home of {ax} is {home}.",
            ["Where does {ax} live?", "What is the home of {ax}?", "In what does {ax} live?"],
            [{**r, "home": r["y"] if r["y"] == "water" else r["ay"]} for r in _rows(world.HOMES)],
        ),
        _family("{ax} has {answer}.", legs, [{**r, "answer": f"{r['y']} legs"} for r in _rows(world.LEGS)]),
        _family(
            "{x}有{answer}。",
            ["{x}有几条腿？", "{x}有多少条腿？", "{x}的腿有几条？"],
            [{**r, "answer": f"{r['y']}条腿"} for r in _rows(world.LEGS_ZH)],
        ),
        _family(
            "{answer}.",
            ["Which is bigger, {x} or {y}?", "Is {x} or {y} bigger?", "What is bigger: {x} or {y}?"],
            _sizes(world.SIZES, True),
        ),
        _family(
            "{answer}。",
            ["{x}和{y}哪个更大？", "哪个更大，{x}还是{y}？", "{x}大还是{y}大？"],
            _sizes(world.SIZES_ZH, False),
        ),
    ]
    days, months = (world.DAYS, world.DAYS_ZH, "day", "天"), (world.MONTHS, world.MONTHS_ZH, "month", "个月")
    for names, names_zh, unit, unit_zh in (days, months):
        for step, word, word_zh in ((1, "after", "后"), (-1, "before", "前")):
            questions = [f"What {unit} comes {word} {{x}}?", f"Which {unit} is {word} {{x}}?"]
            questions += [f"What is the {unit} {word} {{x}}?"]
            listed.append(_family(f"the {unit} {word} {{x}} is {{y}}.", questions, _after(names, step)))
            questions = [f"{{x}}的{word_zh}一{unit_zh}是什么？", f"{{x}}{word_zh}面是什么？"]
            questions += [f"{{x}}的{word_zh}一{unit_zh}是哪个？"]
            listed.append(_family(f"{{x}}的{word_zh}一{unit_zh}是{{y}}。", questions, _after(names_zh, step)))
    return tuple(map(tuple, listed))


@cache
def translations() -> tuple[Fact, ...]:
    """All word pairs, in both directions. The answer is the bare word."""
    to_chinese = ['How do you say "{x}" in Chinese?', 'What is "{x}" in Chinese?', "Translate to Chinese: {x}"]
    to_chinese += ["{x}用中文怎么说？"]
    to_english = ["“{x}”用英语怎么说？", "翻译成英语：{x}", "Translate to English: {x}", "{x}的英文是什么？"]
    facts = []
    for english, chinese in world.WORDS:
        facts.append(Fact(chinese, tuple(q.format(x=english) for q in to_chinese), chinese))
        facts.append(Fact(english, tuple(q.format(x=chinese) for q in to_english), english))
    return tuple(facts)


def fact_turn(random: Random) -> Turn:
    return random.choice(random.choice(families())).turn(random)


def fact_document(random: Random) -> str:
    """Statements of one family or of several. A quarter of the documents also have the questions."""
    count = random.randint(4, 8)
    if random.random() < 0.5:
        family = random.choice(families())
        facts = random.sample(family, min(count, len(family)))
    else:
        facts = [random.choice(random.choice(families())) for _ in range(count)]
    if random.random() < 0.25:
        return "\n".join(" ".join(fact.turn(random)) for fact in facts)
    return "\n".join(fact.statement for fact in facts)


def translation_turn(random: Random) -> Turn:
    return random.choice(translations()).turn(random)


def translation_document(random: Random) -> str:
    pairs = random.sample(world.WORDS, random.randint(8, 16))
    if random.random() < 0.5:
        pairs = [pair[::-1] for pair in pairs]
    return "\n".join(f"{a} = {b}" for a, b in pairs)


GREETINGS: list[tuple[list[str], list[str]]] = [
    (
        ["Hello!", "Hello", "Hi!", "Hi there!", "Good morning!", "Hello, pico!"],
        ["Hello! How can I help you?", "Hi! What can I do for you?"],
    ),
    (["你好！", "你好", "您好！", "早上好！"], ["你好！我能帮你什么？", "你好！很高兴见到你。"]),
    (["Who are you?", "What is your name?", "Tell me who you are.", "What are you?"], ["I am pico, a small MiniCPM."]),
    (["你是谁？", "你叫什么名字？", "请介绍一下你自己。"], ["我是pico，一个小小的MiniCPM。"]),
    (
        ["What can you do?", "How can you help me?"],
        ["I can add and subtract, count, translate words and tell short stories."],
    ),
    (["你会做什么？", "你能做什么？"], ["我会做加法和减法，会数数，会翻译单词，还会讲小故事。"]),
    (["Thank you!", "Thanks!", "Thank you very much."], ["You are welcome!"]),
    (["谢谢！", "谢谢你！", "多谢。"], ["不客气！"]),
    (["Goodbye!", "Bye!", "See you tomorrow."], ["Goodbye! See you soon."]),
    (["再见！", "拜拜！", "明天见。"], ["再见！下次见。"]),
    (["How are you?", "How are you today?"], ["I am well, thank you."]),
    (["你好吗？", "你今天怎么样？"], ["我很好，谢谢。"]),
]


def greeting_turn(random: Random) -> Turn:
    asked, answers = random.choice(GREETINGS)
    return random.choice(asked), random.choice(answers)
