"""The command evaluate of both backends: ask a model questions, and count the right answers."""

import json
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
from minicpm_data.generation.image_prompt import chat_prompt
from minicpm_data.generation.options import PLAIN_CACHE, CacheOptions
from minicpm_data.generation.request import GenerationRequest, ModelT, Prompt
from minicpm_data.keys import KeyRules, few
from minicpm_data.model_options import ModelOptions, load_model, open_early
from minicpm_data.option_checks import check_new_file, check_range
from weights_io import command_line
from weights_io.errors import InputError, listed
from weights_io.files.json_text import read_json
from weights_io.files.partial import write_whole
from weights_io.progress import progress_bar

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer
    from weights_io.vision.config import VisionConfig

SHOWN = 5  # wrong answers that are printed


@dataclass(frozen=True)
class EvaluateOptions(DataOptions, ModelOptions):
    data: Path | None = None
    """File of conversations, in any format that lora reads. A reply counts as right if it equals the file's answer,
    apart from special tokens. By default the questions of pico are asked."""
    limit: int | None = None
    """Number of questions to ask, spread over all kinds. By default all are asked."""
    batch_size: int = 50
    """Questions in a batch."""
    max_tokens: int = 48
    """Maximum number of tokens of an answer."""
    seed: int = 0
    """Seed that selects the questions. Seed 0 selects those that pico's corpus keeps out of its training text."""
    require: tuple[str, ...] = ()
    """Exit with code 1 if a lower percentage of a kind of question is answered rightly: sum=95 fact=50. The questions
    of --data have the kind exact."""
    save_path: Path | None = None
    """JSON file for the scores, the questions and the replies. By default no file is written."""
    before: Path | None = None
    """File of --save-path from an earlier run, such as one without the adapter, to compare with."""
    plot: Path | None = None
    """PNG file for a bar of each kind of question, and with --before for two. By default none is drawn."""
    require_sums: Annotated[float | None, tyro.conf.Suppress] = None
    """The former name of --require sum=95."""


def replies(
    backend: Backend[ModelT],
    model: ModelT,
    tokenizer: "Tokenizer",
    prompts: Sequence[Prompt],
    batch_size: int,
    max_tokens: int,
    stop: Sequence[str] = (),
    cache: CacheOptions = PLAIN_CACHE,
) -> Iterator[str]:
    """Answer prompts greedily, in batches, with a progress bar that each finished answer moves.

    Arguments:
        backend, model, tokenizer: as for generation.
        prompts: the token ids of each prompt.
        batch_size: prompts per batch.
        max_tokens: maximum number of tokens of an answer.
        stop: strings that end an answer.
        cache: the options of the key/value cache.

    Returns:
        An iterator over the texts, in the order of the prompts.
    """
    with progress_bar("asking", len(prompts), unit="question") as bar:
        for start in range(0, len(prompts), batch_size):
            group = prompts[start : start + batch_size]
            request = GenerationRequest.of(model, tokenizer, group, max_tokens, cache=cache)
            for answer in backend.generator.batch(model, tokenizer, request, stop, bar.update):
                yield "".join(response.text for response in answer)


@dataclass(frozen=True)
class Answered:
    """A question with its "prompt", "answer" and "kind", and the reply of a model."""

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
    required: Collection[str] = (),
) -> list[Answered]:
    """Ask a model the held-out questions of pico's corpus, or the questions of a file.

    Arguments:
        backend, model, tokenizer: as for generation.
        limit: ask only this many questions, evenly spread; None asks all.
        batch_size, max_tokens: as in `replies`.
        seed: selects pico's questions.
        data: a file of conversations; None asks pico's questions.
        ignore_keys, trusted: as in `load_split`.
        required: kinds of which there must be a question.

    Returns:
        The questions with the replies.

    Raises:
        InputError: the file cannot be used, or no question is of a required kind.
    """
    from minicpm_data.corpus import questions

    vision = model.config.vision
    everything = list(questions(seed)) if data is None else questions_of(data, ignore_keys, vision)
    count = min(limit or len(everything), len(everything))
    asked = [everything[i * len(everything) // count] for i in range(count)]
    kinds = dict.fromkeys(q["kind"] for q in asked)
    for kind in required:
        if kind not in kinds:
            raise InputError(
                f"names the kind {kind}, and the questions are of the kinds {listed(kinds)}.", option="require"
            )
    if trusted:
        asked = [{**q, "answer": _without_tokens(q["answer"], tokenizer)} for q in asked]
    messages = [q.get("messages", [{"role": "user", "content": q["prompt"]}]) for q in asked]
    tools = [q.get("tools") for q in asked]
    more = {"trusted": trusted} if vision is None else {}
    prompts = [
        chat_prompt(tokenizer, model.config, asked, tools=known, **more)
        for asked, known in zip(messages, tools, strict=True)
    ]
    said = replies(backend, model, tokenizer, prompts, batch_size, max_tokens, stop=tokenizer.turn_markers)
    return [Answered(q, reply, is_right(q, reply)) for q, reply in zip(asked, said, strict=True)]


def _without_tokens(answer: str, tokenizer: "Tokenizer") -> str:
    """The answer without special tokens, which a reply does not show either."""
    ids = tokenizer.encode(answer, add_bos=False)
    return tokenizer.decode(ids) if tokenizer.added_tokens.keys() & set(ids) else answer


def questions_of(
    path: Path, ignore_keys: Collection[str] = (), vision: "VisionConfig | None" = None
) -> list[dict[str, Any]]:
    """The last question of each conversation in a file, with all messages up to it.

    Arguments:
        path: the file.
        ignore_keys: keys of the data to ignore.
        vision: of a model that sees; None refuses images.

    Raises:
        InputError: the file cannot be used.
    """
    from minicpm_data.datasets.images import ImageData
    from minicpm_data.datasets.jsonl import read_items

    rules = KeyRules(ignore_keys)
    reader = Reader(rules, None if vision is None else ImageData(vision, path.parent))

    def question(document: dict[str, Any]) -> dict[str, Any]:
        found = reader.conversation(document)
        turns = [] if isinstance(found, str) else found.turns
        if isinstance(found, str) or turns[-1].role != "assistant":
            raise InputError("it does not end with an answer, with which a reply could be compared.")
        if turns[-1].more.get("tool_calls"):
            raise InputError("its last answer has tool_calls, and a reply is compared as text; end with a text.")
        if turns[-1].weight is False:
            raise InputError("its last answer is not to be trained, so no reply is compared to it; delete the answer.")
        whole = messages_of(turns)
        if reader.images is not None:
            whole, _ = reader.images.messages(turns, found.images)
        *before, answer = whole
        last = before[-1]["content"] if before else ""
        return {"prompt": last, "answer": answer["content"], "kind": "exact", "messages": before, "tools": found.tools}

    found = read_items(path, question)
    if rules.unused:
        print(f"{path}: not read: {few(rules.unused, '')}")
    return found


def is_right(question: dict[str, Any], reply: str) -> bool:
    """Whether a reply is right: equal to the answer for questions of a file, by `corpus.is_right` for pico's."""
    from minicpm_data import corpus

    if question["kind"] == "exact":
        return reply.strip() == question["answer"].strip()
    return corpus.is_right(question, reply)


def requirements(options: EvaluateOptions) -> dict[str, float]:
    """Kind of question -> the required percentage of right answers. Raises `InputError`."""
    sums = options.require_sums
    given = [("require", text) for text in options.require] + [("require_sums", f"sum={sums}")] * (sums is not None)
    found = {}
    for option, text in given:
        kind, _, percentage = text.partition("=")
        try:
            found[kind] = float(percentage)
        except ValueError:
            found[kind] = math.nan
        if not 0 <= found[kind] <= 100:
            if option == "require_sums":
                raise InputError(f"is {sums:g}; give a percentage from 0 to 100.", option)
            raise InputError(f"is {text}; give a kind of question and a percentage from 0 to 100: sum=95.", option)
    return found


def missed(required: Mapping[str, float], scores: Mapping[str, Sequence[bool]]) -> str | None:
    """The first requirement that is not met, as a sentence; None where all are met."""
    for kind, percentage in required.items():
        if (share := 100 * sum(scores[kind]) / len(scores[kind])) < percentage:
            return f"{share:.1f} % of the questions of the kind {kind} are right; --require asks for {percentage:g} %."
    return None


def report(options: EvaluateOptions, shares: Mapping[str, float], answers: Sequence[Answered]) -> dict[str, Any]:
    """The file of --save-path: what was asked of which model, the share of right answers, and each reply."""
    asked = [
        {name: answer.question[name] for name in ("kind", "prompt", "answer")}
        | {"reply": answer.reply, "right": answer.right}
        for answer in answers
    ]
    chosen = {name: getattr(options, name) for name in ("model", "revision", "adapter_path", "limit", "seed")}
    return {**chosen, "scores": dict(shares), "questions": asked}


def read_scores(path: Path) -> dict[str, float]:
    """Kind of question -> share of right answers, of a file that `report` made. Raises `InputError`."""
    scores = read_json(path).get("scores")
    if not isinstance(scores, dict) or not all(type(x) in (int, float) and 0 <= x <= 1 for x in scores.values()):
        raise InputError(f"{path} holds no scores; give a file that evaluate wrote with --save-path.", "before")
    return scores


def draw(path: Path, shares: Mapping[str, float], earlier: Mapping[str, float] | None) -> None:
    """Draw the percentage of right answers, a bar for each kind of question; two where there are earlier scores."""
    from minicpm_data.plots import grouped_bars

    runs = {"right": shares} if earlier is None else {"before": earlier, "after": shares}
    kinds = dict.fromkeys(kind for run in runs.values() for kind in run)
    bars = {kind: {name: 100 * run[kind] for name, run in runs.items() if kind in run} for kind in kinds}
    grouped_bars(path, bars, "right answers (%)", most=100, form="{:.0f}")


def run_evaluate(
    backend: Callable[[], Backend[ModelT]], prog: str, options: type[EvaluateOptions] = EvaluateOptions
) -> None:
    """``python -m PACKAGE.evaluate``. ``backend`` is imported only when the flags are valid."""

    def main(options: EvaluateOptions) -> None:
        """Ask the held-out questions of pico's corpus (sums, facts, translations, counting, reversing) or those of a
        file, and count the right answers."""
        check_range(options, "batch_size", "max_tokens", "limit", least=1)
        required = requirements(options)
        if options.data is not None and not options.data.is_file():
            raise InputError(f"is {options.data}, which is no file; give a file of conversations.", "data")
        earlier = None if options.before is None else read_scores(options.before)
        for name in ("plot", "save_path"):
            if (path := getattr(options, name)) is not None:
                check_new_file(path, name, ".png" if name == "plot" else ".json")
        here = open_early(options)
        running = backend()
        model, tokenizer = load_model(running, options, decoding=True, source=here)
        running.device.warn_idle_axes(model, options.batch_size)
        numbers = options.limit, options.batch_size, options.max_tokens, options.seed, options.data
        reading = options.ignore_keys, not options.special_tokens_as_text
        answers = ask_questions(running, model, tokenizer, *numbers, *reading, required)
        scores: dict[str, list[bool]] = defaultdict(list)
        for answer in answers:
            scores[answer.question["kind"]].append(answer.right)
        shares = {kind: sum(right) / len(right) for kind, right in scores.items()}
        for kind, right in scores.items():
            was = "" if earlier is None or kind not in earlier else f" (before: {earlier[kind]:.1%})"
            print(f"{kind:12} {sum(right):>4} of {len(right):>4} right, {shares[kind]:.1%}{was}")
        for answer in [answer for answer in answers if not answer.right][:SHOWN]:
            question = answer.question
            print(f"wrong: {question['prompt']} -> {answer.reply} (right: {question['answer']})")
        if options.save_path is not None:
            written = json.dumps(report(options, shares, answers), ensure_ascii=False, indent=1)
            write_whole(options.save_path, written + "\n")
        if options.plot is not None:
            draw(options.plot, shares, earlier)
        if unmet := missed(required, scores):
            print(unmet, file=sys.stderr)
            sys.exit(1)

    command_line.run(main, options, prog)
