"""What an evaluation asks a model, and how many of the built-in model's held-out questions it answers rightly."""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from minicpm_data.datasets.formats import Reader
from minicpm_data.datasets.options import DataOptions
from minicpm_data.datasets.turns import messages_of
from minicpm_data.generation.api import Backend
from minicpm_data.generation.options import PLAIN_CACHE, CacheOptions
from minicpm_data.generation.request import GenerationRequest, ModelT
from minicpm_data.keys import KeyRules, few
from minicpm_data.model_options import ModelOptions, load_model
from minicpm_data.option_checks import check_range
from weights_io import command_line
from weights_io.errors import InputError, listed

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer

SHOWN = 5  # wrong answers


@dataclass(frozen=True)
class EvaluateOptions(DataOptions, ModelOptions):
    data: Path | None = None
    """Ask what is in this file (conversations in any form that lora takes), and count the replies that are, to the
    letter but for special tokens, its answers; by default the questions of pico."""
    limit: int | None = None
    """Only so many questions, spread over all kinds; by default all."""
    batch_size: int = 50
    """Questions answered together."""
    max_tokens: int = 48
    """Most tokens of an answer."""
    seed: int = 0
    """Draws the questions; 0 draws those that pico's corpus keeps out of its training text."""
    require: tuple[str, ...] = ()
    """Exit with 1 where fewer of the questions of a kind are right than this percentage: sum=95 fact=50. Those of
    --data are all of the kind exact."""
    require_sums: Annotated[float | None, tyro.conf.Suppress] = None
    """The former name of --require sum=95."""


def replies(
    backend: Backend[ModelT],
    model: ModelT,
    tokenizer: "Tokenizer",
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_tokens: int,
    stop: Sequence[str] = (),
    cache: CacheOptions = PLAIN_CACHE,
) -> Iterator[str]:
    """The text with which the model continues each prompt (token ids), up to a text of ``stop``; greedy, ``batch_size``
    together, under a progress bar."""
    from tqdm import tqdm

    with tqdm(total=len(prompts), desc="asking", disable=None, delay=1) as bar:  # None: only on a terminal
        for start in range(0, len(prompts), batch_size):
            group = prompts[start : start + batch_size]
            request = GenerationRequest.of(model, tokenizer, group, max_tokens, cache=cache)
            for answer in backend.generator.batch(model, tokenizer, request, stop):
                yield "".join(response.text for response in answer)
            bar.update(len(group))


@dataclass(frozen=True)
class Answered:
    """A question with its "prompt", "answer" and "kind", and what a model said."""

    question: dict[str, Any]
    reply: str
    right: bool


def ask_questions(
    backend: Backend[ModelT],
    model: ModelT,
    tokenizer: "Tokenizer",
    limit: int | None = None,
    batch_size: int = 50,
    max_tokens: int = 48,
    seed: int = 0,
    data: Path | None = None,
    ignore_keys: Collection[str] = (),
    trusted: bool = True,
) -> list[Answered]:
    """The model's answers to ``limit`` of the held-out questions of pico, or of those in a file, evenly spread (None:
    all of them). ``ignore_keys`` and ``trusted`` as in `load_split`."""
    from minicpm_data.corpus import questions

    everything = list(questions(seed)) if data is None else questions_of(data, ignore_keys)
    count = min(limit or len(everything), len(everything))
    asked = [everything[i * len(everything) // count] for i in range(count)]
    if trusted:
        asked = [{**q, "answer": _without_tokens(q["answer"], tokenizer)} for q in asked]
    messages = [q.get("messages", [{"role": "user", "content": q["prompt"]}]) for q in asked]
    prompts = [tokenizer.apply_chat(turns, trusted=trusted) for turns in messages]
    said = replies(backend, model, tokenizer, prompts, batch_size, max_tokens, stop=tokenizer.turn_markers)
    return [Answered(q, reply, is_right(q, reply)) for q, reply in zip(asked, said, strict=True)]


def _without_tokens(answer: str, tokenizer: "Tokenizer") -> str:
    """The answer as a reply would show it, of which special tokens are no text."""
    ids = tokenizer.encode(answer, add_bos=False)
    return tokenizer.decode(ids) if tokenizer.added_tokens.keys() & set(ids) else answer


def questions_of(path: Path, ignore_keys: Collection[str] = ()) -> list[dict[str, Any]]:
    """The last question of each conversation in a file, with those before it as "messages"."""
    from minicpm_data.datasets.jsonl import read_items

    rules = KeyRules(ignore_keys)

    def question(document: dict[str, Any]) -> dict[str, Any]:
        turns = Reader(rules).conversation(document)
        if isinstance(turns, str) or turns[-1].role != "assistant":
            raise InputError("it ends with no answer, to which a reply could be compared.")
        if turns[-1].weight is False:
            raise InputError("its last answer is not to be trained, so no reply is compared to it; delete the answer.")
        *before, answer = messages_of(turns)
        last = before[-1]["content"] if before else ""
        return {"prompt": last, "answer": answer["content"], "kind": "exact", "messages": before}

    found = read_items(path, question)
    if rules.unused:
        print(f"{path}: not read: {few(rules.unused, '')}")
    return found


def is_right(question: dict[str, Any], reply: str) -> bool:
    """To the letter for what a file asks, as `corpus.is_right` has it for pico's questions."""
    from minicpm_data import corpus

    if question["kind"] == "exact":
        return reply.strip() == question["answer"].strip()
    return corpus.is_right(question, reply)


def require_positive(options: Any, *names: str) -> None:
    """`InputError` where one of the options of these names is below 1; None is none."""
    check_range(options, *names, least=1)


def requirements(options: EvaluateOptions) -> dict[str, float]:
    """The least percentage of right answers by kind of question. `InputError` where it is none."""
    given = options.require if options.require_sums is None else (*options.require, f"sum={options.require_sums}")
    found = {}
    for text in given:
        kind, _, percentage = text.partition("=")
        try:
            found[kind] = float(percentage)
        except ValueError:
            found[kind] = math.nan
        if not 0 <= found[kind] <= 100:
            raise InputError(
                f"is {text}; give a kind of question and a percentage from 0 to 100: sum=95.", option="require"
            )
    return found


def missed(required: Mapping[str, float], scores: Mapping[str, Sequence[bool]]) -> str | None:
    """The sentence on the first of the `requirements` that is not met; None where all are. `InputError` for a kind
    that was not asked."""
    for kind, percentage in required.items():
        if kind not in scores:
            asked = listed(scores)
            raise InputError(f"names the kind {kind}, and the questions are of the kinds {asked}.", option="require")
        if (share := 100 * sum(scores[kind]) / len(scores[kind])) < percentage:
            return f"{share:.1f} % of the questions of the kind {kind} are right; --require asks for {percentage:g} %."
    return None


def run_evaluate(
    backend: Callable[[], Backend[ModelT]], prog: str, options: type[EvaluateOptions] = EvaluateOptions
) -> None:
    """``python -m PACKAGE.evaluate``; ``backend`` is called, and so imported, once the flags are right."""

    def main(options: EvaluateOptions) -> None:
        """Ask the held-out questions of pico's corpus (sums, facts, translations, counting, reversing), or a file's,
        and count the right answers."""
        require_positive(options, "batch_size", "max_tokens", "limit")
        required = requirements(options)
        running = backend()
        model, tokenizer = load_model(running, options, decoding=True)
        running.device.note_mesh(model, options.batch_size)
        numbers = options.limit, options.batch_size, options.max_tokens, options.seed, options.data
        reading = options.ignore_keys, not options.special_tokens_as_text
        answers = ask_questions(running, model, tokenizer, *numbers, *reading)
        scores: dict[str, list[bool]] = defaultdict(list)
        for answer in answers:
            scores[answer.question["kind"]].append(answer.right)
        for kind, right in scores.items():
            print(f"{kind:12} {sum(right):>4} of {len(right):>4} right, {sum(right) / len(right):.1%}")
        for answer in [answer for answer in answers if not answer.right][:SHOWN]:
            question = answer.question
            print(f"wrong: {question['prompt']} -> {answer.reply} (right: {question['answer']})")
        if unmet := missed(required, scores):
            print(unmet, file=sys.stderr)
            sys.exit(1)

    command_line.run(main, options, prog)
