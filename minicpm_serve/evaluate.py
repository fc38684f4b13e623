"""Run tasks of lm-eval (EleutherAI's evaluation harness) on a model of either backend.

python -m minicpm_serve.evaluate --backend mlx --model minicpm-2b --tasks hellaswag --mode both --limit 100
"""

import difflib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minicpm_data.model_options import load_model, open_early
from minicpm_data.option_checks import check_new_file, check_range
from minicpm_serve import backends
from weights_io.errors import InputError, listed, short
from weights_io.files.partial import write_whole
from weights_io.progress import waiting

if TYPE_CHECKING:
    from minicpm_serve.evaluation.harness import MiniCPM

Mode = Literal["ppl", "gen"]


@dataclass(frozen=True, kw_only=True)
class Options(backends.BackendOptions):
    tasks: tuple[str, ...]
    """Names of tasks or groups of lm-eval or of --include-path: hellaswag gsm8k, or hellaswag,gsm8k."""
    mode: Literal["ppl", "gen", "both"] = "ppl"
    """How tasks with choices are scored. ppl: by the likelihood of each choice. gen: by the letter that the model
    answers. both: in the two ways, as in MiniCPM's README, and the better one is reported. Other tasks have one way."""
    limit: float | None = None
    """Number of questions of each task; below 1, the fraction of them. By default all are asked."""
    num_fewshot: int | None = None
    """Number of examples before each question. By default as many as the task says."""
    include_path: Path | None = None
    """Folder with further tasks as .yaml files, whose data may be files on this disk."""
    output_path: Path | None = None
    """JSON file for the results, with each question and answer. By default no file is written."""
    batch_size: int = 8
    """Texts in a batch, and answers that are generated at a time."""
    max_length: int | None = None
    """Maximum number of tokens of a text. By default the model's context length."""
    apply_chat_template: bool = False
    """Ask in the model's chat template. By default it continues the raw text."""
    system_instruction: str | None = None
    """System message of --apply-chat-template, or the beginning of the raw text."""
    confirm_run_unsafe_code: bool = False
    """Run the code that the model writes, as humaneval and mbpp need. It is not isolated from this machine."""
    seed: int = 1234
    """Random seed of the choice of examples."""


def main(options: Options) -> None:
    """Run tasks of lm-eval, with choices scored by likelihood, by answers, or both."""
    options.check_placement()
    check_range(options, "limit", above=0)
    check_range(options, "num_fewshot", "seed", least=0)
    check_range(options, "batch_size", "max_length", least=1)
    if options.include_path is not None and not options.include_path.is_dir():
        raise InputError(
            f"is {options.include_path}, which is no folder here; give one with .yaml files.", "include_path"
        )
    if options.output_path is not None:
        check_new_file(options.output_path, "output_path", ".json")
    if find_spec("lm_eval") is None:
        raise InputError("evaluate runs the tasks of lm-eval: pip install 'minicpm-jax-mlx[eval]'.")
    here = open_early(options)
    if options.confirm_run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # of the metric that runs the code
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # lm_eval asks for its version; no PyTorch is needed here
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    modes: tuple[Mode, ...] = ("ppl", "gen") if options.mode == "both" else (options.mode,)
    with waiting("starting lm_eval"):
        from minicpm_serve.evaluation.choices import Tasks
        from minicpm_serve.evaluation.harness import MODELS

        folder = None if options.include_path is None else str(options.include_path)
        managers = {mode: Tasks(mode == "gen", folder) for mode in modes}
        names = checked_tasks(options.tasks, managers[modes[0]].all_tasks)
    backend = backends.get(options.backend)
    loaded = load_model(backend, options, source=here)
    backend.device.warn_idle_axes(loaded[0], options.batch_size)
    model = MODELS[options.backend](options.model, options.batch_size, options.max_length, loaded)
    try:
        results = {mode: evaluated(options, model, names, managers[mode]) for mode in modes}
    finally:
        model.close()
    print("\n".join(table(results)))
    if not managers[modes[-1]].converted and options.mode != "ppl":
        print("note: no task has choices after one question, so that --mode gen changes nothing")
    if options.output_path is not None:
        write_whole(options.output_path, json.dumps(results, indent=1, ensure_ascii=False, default=str) + "\n")


def checked_tasks(given: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names of tasks. Raises `InputError` for one that is unknown."""
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("is empty; give the name of a task, such as hellaswag.", "tasks")
    for name in set(names) - set(known):
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {listed(near)}?" if near else "`lm_eval ls tasks` lists them."
        raise InputError(
            f"names {short(name)!r}, which is no task of lm-eval or {{include_path}}; {hint}", "tasks", ["include_path"]
        )
    return list(dict.fromkeys(names))


def evaluated(options: Options, model: "MiniCPM", names: list[str], manager: Any) -> dict[str, Any]:
    """The results of lm-eval. Raises `InputError` where a task cannot be run."""
    from lm_eval import simple_evaluate

    limit = options.limit
    try:
        results = simple_evaluate(
            model=model,
            tasks=names,
            num_fewshot=options.num_fewshot,
            limit=int(limit) if limit is not None and limit >= 1 else limit,
            task_manager=manager,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template,
            system_instruction=options.system_instruction,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:  # no network, no data, a package of one task
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"the tasks cannot be run: {short(reason)}.") from None
    assert results is not None
    return dict(results)


def table(results: dict[Mode, dict[str, Any]]) -> list[str]:
    """The scores as lines, in percent where they are shares. Of two modes, the better one is named."""
    found: dict[tuple[str, str], dict[Mode, float]] = {}
    for mode, result in results.items():
        for task, scores in {**result["results"], **result.get("groups", {})}.items():
            for name, value in scores.items():
                metric, _, _ = name.partition(",")
                if isinstance(value, int | float) and "," in name and not metric.endswith("_stderr"):
                    found.setdefault((task, name.removesuffix(",none")), {})[mode] = float(value)
    width = max([len(task) for task, _ in found] + [4])
    lines = [f"{'task':<{width}}  {'metric':<28}" + "".join(f"{mode:>9}" for mode in results)]
    for (task, metric), values in found.items():
        cells = "".join(f"{values[mode]:9.4f}" if mode in values else f"{'':9}" for mode in results)
        line = f"{task:<{width}}  {metric:<28}{cells}"
        if len(values) > 1 and values["ppl"] != values["gen"]:
            line += f"  better: {max(values, key=lambda mode: values[mode])}"
        lines.append(line.rstrip())
    return lines


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_serve.evaluate")
