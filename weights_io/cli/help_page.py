"""The text of ``--help``: a description with examples, and the options in groups."""

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

# Group -> its options, in the order of the help. Options that are not listed are a command's own and come first. A
# class of options can move an option to another group: `help_groups`, name -> group.
GROUPS = {
    "model": "model revision hub dtype adapter_path quantize rope_scaling backend",
    "data": "data tokenizer ignore_keys special_tokens_as_text",
    "prompt": "prompt system_prompt ignore_chat_template prefill_response chat_template_config "
    "prompt_cache_file eos_token",
    "sampling": "temp top_p top_k min_p min_tokens_to_keep xtc_probability xtc_threshold repetition_penalty seed stop "
    "extra_eos_token max_tokens",
    "thinking": "enable_thinking thinking_budget show_thinking",
    "memory": "kv_bits kv_group_size quantized_kv_start max_kv_size prefill_step_size grad_checkpoint",
    "speculation": "draft_model num_draft_tokens prompt_lookup",
    "training": "train test iters epochs grad_accumulation_steps pack train_on_prompt mask_prompt loss beta optimizer "
    "weight_decay beta1 beta2 clip",
    "schedule": "learning_rate lr_schedule warmup_steps decay_steps decay half_life from_step",
    "adapter": "fine_tune_type rank alpha dropout targets num_layers resume_adapter_file",
    "device": "mesh distributed coordinator_address num_processes process_id join_timeout",
    "output": "save_path save_dtype to json plot verbose report_sparsity resume save_every steps_per_report "
    "steps_per_eval val_batches test_batches report_to project_name",
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}


def in_groups(options: type, fields: Iterable[tuple[str, Any, Any]]) -> type:
    """A dataclass that holds the fields of each group in a dataclass of its own, of which tyro makes a box of the help.

    Arguments:
        options: the dataclass of the options; its ``help_groups`` overrides `GROUPS`.
        fields: name, annotation and default of each field.
    """
    where = GROUP_OF | getattr(options, "help_groups", {})
    boxes: dict[str | None, list[tuple[str, Any, Any]]] = {group: [] for group in (None, *GROUPS)}
    for field in fields:
        boxes[where.get(field[0])].append(field)
    outer: list[Any] = boxes.pop(None)
    for group, inner in boxes.items():
        if inner:
            box = dataclasses.make_dataclass(str(group), inner, kw_only=True)
            box.__doc__ = ""
            outer.append((group, box))
    page = dataclasses.make_dataclass(options.__name__, outer, kw_only=True)
    page.__doc__ = ""
    return page


def texts_of(options: type) -> dict[str, str]:
    """Field -> the string below it in the source, on one line; a subclass's string replaces its base's."""
    texts: dict[str, str] = {}
    for base in reversed(options.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError):  # a class without a source file
            continue
        for field, below in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match below:
                    case ast.Expr(value=ast.Constant(value=str() as text)):
                        texts[field.target.id] = " ".join(text.split())
    return texts


def description(main: Any, prog: str) -> str:
    """What stands above the options: the docstring of ``main``, and the examples in the docstring of its module."""
    width, commands = shutil.get_terminal_size().columns, examples(prog)
    # tyro joins lines that begin with a letter.
    lines = textwrap.wrap(" ".join((main.__doc__ or "").split()), max(width, 20), subsequent_indent="  ")
    if commands:
        lines += ["", f"Example{'s' * (len(commands) > 1)}:"]
        lines += [f"  {part}" for command in commands for part in folded(command, width - 2)]
    return "\n".join(lines)


def examples(prog: str) -> list[str]:
    """The commands in the docstring of a command's module; the module is read, not imported.

    Arguments:
        prog: the command as the user types it: ``python -m minicpm_jax.generate``.
    """
    module = prog.rpartition(" ")[2]
    try:
        spec = find_spec(module)
        source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    except (ImportError, ValueError, OSError):  # no module of this name
        return []
    lines = (ast.get_docstring(ast.parse(source)) or "").splitlines()
    found: list[str] = []
    for line in map(str.strip, lines):
        if found and found[-1].endswith("\\"):
            found[-1] = found[-1][:-1] + line
        elif line.startswith("python -m "):
            found.append(line)
    return found


def folded(command: str, width: int) -> list[str]:
    """A command as lines of at most ``width`` characters where its options allow it, to be pasted into a shell."""
    lines = [""]
    for part in command.replace(" --", "\n--").split("\n"):
        if lines[-1] and len(lines[-1]) + 1 + len(part) + 2 > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
    return lines
