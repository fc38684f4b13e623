"""How many of the built-in model's held-out questions a model answers rightly."""

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from minicpm_data.commands import ModelOptions, load_model
from minicpm_data.generation import Backend
from weights_io import command_line
from weights_io.errors import InputError

SHOWN = 5  # wrong answers


@dataclass(frozen=True)
class EvaluateOptions(ModelOptions):
    limit: int | None = None
    """Only so many questions, spread over all kinds; by default all 900."""
    batch_size: int = 50
    """Questions answered together."""
    max_tokens: int = 48
    """Most tokens of an answer."""
    seed: int = 0
    """Draws the questions; 0 draws those that pico's corpus keeps out of its training text."""
    require_sums: float | None = None
    """Exit with 1 where fewer than this percentage of the sums are right."""


def run_evaluate(backend: Callable[[], Backend], prog: str) -> None:
    """``python -m PACKAGE.evaluate``; ``backend`` is called, and so imported, once the flags are right."""

    def main(options: EvaluateOptions) -> None:
        """Ask the held-out questions of pico's corpus (sums, facts, translations, counting, reversing) and count."""
        from minicpm_data.corpus import is_right, questions

        for name in ("batch_size", "max_tokens", "limit"):
            if (value := getattr(options, name)) is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
        required = options.require_sums
        if required is not None and not 0 <= required <= 100:
            raise InputError(f"--require-sums is {required}; it must be a percentage from 0 to 100.")
        running = backend()
        model, tokenizer = load_model(running, options)
        scores: dict[str, list[bool]] = defaultdict(list)
        wrong = []
        everything = list(questions(options.seed))
        count = min(options.limit or len(everything), len(everything))
        asked = [everything[i * len(everything) // count] for i in range(count)]
        for start in range(0, len(asked), options.batch_size):
            group = asked[start : start + options.batch_size]
            prompts = [tokenizer.apply_chat([{"role": "user", "content": q["prompt"]}]) for q in group]
            answers = running.generator.batch_generate(
                model, tokenizer, prompts, options.max_tokens, stop=tokenizer.turn_markers
            )
            for question, answer in zip(group, answers, strict=True):
                reply = "".join(r.text for r in answer)
                scores[question["kind"]].append(is_right(question, reply))
                if not scores[question["kind"]][-1]:
                    wrong.append(f"{question['prompt']} -> {reply} (right: {question['answer']})")
        for kind, right in scores.items():
            print(f"{kind:12} {sum(right):>4} of {len(right):>4} right, {sum(right) / len(right):.1%}")
        for line in wrong[:SHOWN]:
            print(f"wrong: {line}")
        share = 100 * sum(scores["sum"]) / len(scores["sum"])
        if required is not None and share < required:
            print(f"{share:.1f} % of the sums are right; --require-sums asks for {required:g} %.", file=sys.stderr)
            sys.exit(1)

    command_line.run(main, EvaluateOptions, prog)
