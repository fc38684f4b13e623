"""A small task: the built-in model can do sums, and fine-tuning teaches it to end each with a sentence it never saw.

    python -m minicpm_data.exercise --save-path exercise

writes ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` of {"prompt", "completion"}. The sums of test and valid are
held out of the training text of pico's corpus, and none of them is in train.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

from minicpm_data.pico_corpus import skills
from weights_io import command_line
from weights_io.command_line import Former
from weights_io.errors import InputError
from weights_io.files.partial import partial
from weights_io.write import check_output, folder_to_fill


@dataclass(frozen=True)
class Options:
    save_path: Annotated[Path, Former("out")]
    """Folder to write."""
    examples: int = 2000
    """Training sums. The test set has a tenth of this number, the validation set a twentieth."""
    seed: int = 0
    """Seed of the choice of sums."""


def exercise(options: Options) -> None:
    """Write a small fine-tuning task: sums, answered in a whole sentence."""
    if not 20 <= options.examples <= 5000:
        raise InputError(f"is {options.examples}; it must be from 20 to 5000.", option="examples")
    out = check_output(options.save_path)
    random = Random(f"{options.seed} exercise")
    training, held = (list(_pairs(out)) for out in (False, True))
    random.shuffle(training)
    random.shuffle(held)
    test, valid = options.examples // 10, options.examples // 20
    splits = {"train": training[: options.examples], "test": held[:test], "valid": held[test : test + valid]}
    with folder_to_fill(out.parent), partial(out, folder=True) as folder:
        for name, pairs in splits.items():
            lines = [json.dumps(_example(*pair, random), ensure_ascii=False) + "\n" for pair in pairs]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{options.save_path / name}.jsonl: {len(lines)} sums")


def _pairs(held_out: bool) -> Iterator[tuple[str, int, int]]:
    numbers = range(skills.LARGEST + 1)
    for op in "+-":
        for a in numbers:
            for b in numbers:
                if (op == "+" or a >= b) and skills.held_out(op, a, b) == held_out:
                    yield op, a, b


def _example(op: str, a: int, b: int, random: Random) -> dict[str, str]:
    prompt, equation = skills.sum_question(op, a, b, random)
    return {"prompt": prompt, "completion": f"{equation}, so the answer is {skills.result(op, a, b)}."}


if __name__ == "__main__":
    command_line.run(exercise, Options, "python -m minicpm_data.exercise")
