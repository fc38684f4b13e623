"""Run a command line. A dataclass defines the flags; an `InputError` prints one sentence and exits with status 2."""

import contextlib
import contextvars
import dataclasses
import errno
import importlib
import io
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from weights_io.cli import mlx_lm_flags
from weights_io.cli.help_page import description, in_groups, texts_of
from weights_io.cli.refusals import refusal, wrong_word
from weights_io.cli.switches import TRUTH, Switch, with_values
from weights_io.errors import InputError, flag

Options = TypeVar("Options")
NUMBERS, SEEDS = 2**31 - 1, 2**63 - 1  # upper bounds of integers and of seeds
# Upper bounds of options by name. Larger values would exhaust the memory or run for days.
MOST = {"lengths": 2**21, "num_samples": 10**6, "examples": 10**6, "documents": 10**7}
MOST |= dict.fromkeys(("max_seq_length", "max_model_len"), 2**24)
MOST |= dict.fromkeys(("batch_size", "rank", "num_experts", "max_num_seqs", "max_queued_requests"), 2**16)
# Commands whose work a package does that the command's own package must not import: those of weights_io need a
# tokenizer, those of a backend the server or an evaluation. These modules are imported by name, here and nowhere else.
ABOVE = {name: f"minicpm_data.cli.{name}" for name in ("convert", "fuse", "inspect", "upcycle")}
ABOVE |= {"server": "minicpm_serve.openai_api", "perplexity": "minicpm_serve.perplexity"}
# Console script -> the package whose commands it starts; also in pyproject.toml.
SCRIPTS = {
    "minicpm": "weights_io",
    "minicpm-data": "minicpm_data",
    "minicpm-jax": "minicpm_jax",
    "minicpm-mlx": "minicpm_mlx",
    "minicpm-serve": "minicpm_serve",
}
MANY_FILES = 10240  # open files to allow if the hard limit is infinite; macOS accepts no larger number
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
_STARTED_AS: contextvars.ContextVar[str | None] = contextvars.ContextVar("started_as", default=None)


def run(
    main: Callable[[Options], None],
    options: type[Options],
    prog: str,
    more_flags: Callable[[Options], list[str]] | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> None:
    """Parse ``sys.argv`` and call ``main`` with the options. Wrong flags exit with status 2; see also `exit_codes`.

    Arguments:
        main: the command; its docstring is the description in the help.
        options: a dataclass whose fields are the flags; the docstrings below the fields are the help.
        prog: the command as the user types it, e.g. ``"python -m weights_io.inspect"``; see also `started_as`.
        more_flags: returns the flags from the config file that the options name. Flags in ``sys.argv`` override them.
        fixed: option -> value of options that the command sets itself, and that are no flags of it.
    """
    import tyro

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show 中 shows ?

    asking = bool({"-h", "--help"} & set(sys.argv[1:]))
    prog, fixed = _STARTED_AS.get() or prog, fixed or {}
    shown = for_tyro(options, asking, fixed)

    def parsed(flags: list[str]) -> Options:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                found = tyro.cli(
                    shown,
                    prog=prog,
                    description=description(main, prog) if asking else None,
                    args=present_flags(options, flags),
                    config=(tyro.conf.FlagCreatePairsOff,),
                )
        except SystemExit as end:
            if not end.code:  # of --help
                raise
            raise refusal(options, flags, former_names(options), prog, said.getvalue()) from None
        return options(**{field.name: getattr(found, field.name) for field in dataclasses.fields(shown)})

    with exit_codes(flags_of(options, sys.argv[1:])):
        allow_open_files()
        words = with_values(options, mlx_lm_flags.accepted(sys.argv[1:], flags_in(options)))
        given = parsed(words)
        if more_flags is not None and (more := more_flags(given)):
            if wrong := wrong_word(options, more, former_names(options), prog):
                raise InputError(f"{getattr(given, 'config', 'its file')}: {wrong.spelled(str)}", "config")
            given = parsed(more + words)
        check_numbers(given)
        note_unneeded(given)
        main(given)


def flags_of(options: type, words: Iterable[str] = ()) -> Callable[[str], str]:
    """A function that spells an option in an `InputError` as its flag: ``top_p`` -> ``--top-p``.

    It accepts fields of ``options`` and their former names. It returns any other name unchanged.

    Arguments:
        options: the dataclass of the options.
        words: the command line. An option that it gives by a former name is spelled by that name.
    """
    former = former_names(options)
    fields = {field.name: field.name for field in dataclasses.fields(options)} | former
    names = (word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--"))
    typed = {former[name]: name for name in names if name in former}
    return lambda name: flag(typed.get(fields[name], fields[name])) if name in fields else name


@contextlib.contextmanager
def started_as(prog: str) -> Iterator[None]:
    """A context in which commands name themselves ``prog`` in their help: a launcher started them."""
    token = _STARTED_AS.set(prog)
    try:
        yield
    finally:
        _STARTED_AS.reset(token)


def flags_in(options: type) -> set[str]:
    """All flags of a dataclass: of its fields, and of their former names."""
    return {flag(name) for name in [*former_names(options), *(field.name for field in dataclasses.fields(options))]}


def for_tyro(options: type, asking: bool, fixed: Mapping[str, Any] | None = None) -> Any:
    """The same dataclass with annotations that make tyro's help easier to read.

    The help shows ``INT`` instead of ``{None}|INT``, and does not show a default that is None, False or empty. It has a
    box for each group of options (`weights_io.cli.help_page`).

    Arguments:
        options: the dataclass.
        asking: whether the user asks for the help. If so, fields marked `tyro.conf.Suppress` are left out.
            Otherwise the mark is removed, as tyro does not parse a suppressed flag.
        fixed: as in `run`.
    """
    import tyro

    hints, annotated = typing.get_type_hints(options, include_extras=True), []
    texts = texts_of(options) if asking else {}
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        if field.name in (fixed or {}):
            hint = Annotated[hint, tyro.conf.Fixed[Any].__metadata__[0], tyro.conf.Suppress]  # type: ignore[misc]
            annotated.append((field.name, hint, dataclasses.field(default=(fixed or {})[field.name])))
            continue
        marks = getattr(hint, "__metadata__", ())
        if tyro.conf.Suppress in marks and not asking:
            hint, marks = hint.__origin__, ()
        empty = field.default is False or field.default in (None, ())
        empty = empty and tyro.conf.UseAppendAction not in marks  # those keep "(repeatable)"
        named = any(getattr(mark, "metavar", None) for mark in marks)
        metavar = None if named else _metavar(hint.__origin__ if marks else hint)
        if any(isinstance(mark, Switch) for mark in marks):
            metavar = f"| {flag(f'no_{field.name}')}"
        hint_of_default = "" if empty else None
        shown = tyro.conf.arg(
            help_behavior_hint=hint_of_default, metavar=metavar, help=texts.get(field.name), prefix_name=False
        )
        default = dataclasses.field(default=field.default, default_factory=field.default_factory)  # type: ignore[call-overload]
        annotated.append((field.name, Annotated[hint, shown], default))
    if asking:
        return in_groups(options, annotated)
    frozen = options.__dataclass_params__.frozen  # type: ignore[attr-defined]  # as in the base class
    return dataclasses.make_dataclass(options.__name__, annotated, bases=(options,), frozen=frozen, kw_only=True)


def _metavar(kind: Any) -> str | None:
    """The placeholder, such as ``INT``, for the value of an option that may be None. None: keep tyro's own."""
    given = [one for one in typing.get_args(kind) if one is not type(None)]
    if typing.get_origin(kind) not in (types.UnionType, typing.Union) or len(given) != 1:
        return None
    if typing.get_origin(given[0]) is Literal:
        return f"{{{','.join(map(str, typing.get_args(given[0])))}}}"
    if typing.get_origin(given[0]) is tuple:
        return " ".join(getattr(one, "__name__", "TEXT").upper() for one in typing.get_args(given[0]))
    return given[0].__name__.upper() if given[0] in (str, int, float, Path) else None


class Former:
    """Former names of an option: ``batch_size: Annotated[int, Former("batch")] = 1``.

    They still work as flags and as keywords. The help does not show them.
    """

    def __init__(self, *names: str) -> None:
        self.names = names


class Unneeded:
    """Marks a flag that other tools need and that changes nothing here, with the reason:
    ``trust_remote_code: Annotated[bool, Unneeded("no code of a checkpoint is run")] = False``.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


def note_unneeded(options: Any) -> None:
    """Print a note for each flag marked `Unneeded` that was given."""
    for name, hint in typing.get_type_hints(type(options), include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Unneeded) and getattr(options, name):
                print(f"note: {flag(name)} changes nothing here: {mark.reason}", file=sys.stderr)


def former_names(options: type) -> dict[str, str]:
    """Former name -> current name, for the fields of a dataclass."""
    hints = typing.get_type_hints(options, include_extras=True)
    return {
        former: field.name
        for field in dataclasses.fields(options)
        for mark in getattr(hints[field.name], "__metadata__", ())
        if isinstance(mark, Former)
        for former in mark.names
    }


def present_names(options: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Replace former names of options by their current names.

    Arguments:
        options: the dataclass of the options.
        given: value by current or former name.

    Returns:
        Value by current name.

    Raises:
        InputError: an option is given under two names.
    """
    former = former_names(options)
    for name in given:
        if former.get(name) in given:
            raise InputError(f"is the former name of {{{former[name]}}}; give one of them.", name, [former[name]])
    return {former.get(name, name): value for name, value in given.items()}


def present_flags(options: type, flags: Iterable[str]) -> list[str]:
    """Replace former flags on a command line by the current ones: ``--batch=2`` -> ``--batch-size=2``.

    The value of a flag that is True or False may be spelled as in mlx_lm: ``--verbose F``.
    """
    former, switches = former_names(options), valued_switches(options)
    words: list[str] = []
    for word in flags:
        name, equals, value = word.partition("=")
        field = former.get(name[2:].replace("-", "_")) if name.startswith("--") else None
        if name in switches and equals:
            value = TRUTH.get(value.lower(), value)
        elif words and words[-1] in switches:
            name = TRUTH.get(name.lower(), name)
        words.append(f"{name if field is None else flag(field)}{equals}{value}")
    return words


def valued_switches(options: type) -> frozenset[str]:
    """The flags that take True or False as a value (`tyro.conf.FlagConversionOff`)."""
    import tyro

    hints = typing.get_type_hints(options, include_extras=True)
    marked = tyro.conf.FlagConversionOff
    return frozenset(flag(name) for name, hint in hints.items() if marked in getattr(hint, "__metadata__", ()))


def command_above(name: str) -> Callable[[Any], None]:
    """The ``main`` function of a command in `ABOVE`."""
    return importlib.import_module(ABOVE[name]).main


def run_above(name: str, prog: str, **fixed: Any) -> None:
    """`run` a command in `ABOVE` as the command of another package.

    Arguments:
        name: the command.
        prog: the command as the user types it.
        fixed: as in `run`: the options that are settled by where the command was started.
    """
    command = importlib.import_module(ABOVE[name])
    run(command.main, command.Options, prog, fixed=fixed)


def check_numbers(options: object) -> None:
    """Raises `InputError` where an option is NaN or out of bounds. Later code could not handle such a value."""
    for name, value in vars(options).items():
        most = SEEDS if name == "seed" else MOST.get(name, NUMBERS)
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int) and abs(number) > most:
                shown = str(number) if abs(number) < 10**40 else "a number of more than 40 digits"
                bound = f"at most {most:,}" if number > 0 else f"at least {-most:,}"
                raise InputError(f"is {shown}; it must be {bound}.", name)
            if isinstance(number, float) and number != number:
                raise InputError("is nan; give a number.", name)


def allow_open_files() -> int:
    """Raise this process's limit of open files as far as the system allows. Returns the new limit."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return 1 << 16
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MANY_FILES if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= most:
        return MANY_FILES if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (ValueError, OSError):  # the system allows fewer
        return soft
    return most


@contextlib.contextmanager
def exit_codes(typed: Callable[[str], str] = str) -> Iterator[None]:
    """A context that converts exceptions to exit statuses.

    - 2, with a sentence: an `InputError`, too little memory, or a file that cannot be read or written.
    - 130: Ctrl-C.
    - 0: the reader of a pipe has closed it (``| head``).

    Any other exception is a defect and keeps its traceback.

    Arguments:
        typed: spells the options that an `InputError` names; see `flags_of`.
    """
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error.spelled(typed)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except MemoryError:
        print("error: there is not enough memory; give less, such as fewer or shorter rows at once.", file=sys.stderr)
        sys.exit(2)
    except FileNotFoundError as error:
        what = error.filename or "a file, or the folder that this was started in,"  # the error may name no file
        print(f"error: {what} does not exist; check its name and its folder.", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            said = f"this process may have only {allow_open_files()} files open; allow more with ulimit -n 1024"
            print(f"error: {said}.", file=sys.stderr)
            sys.exit(2)
        if sys.stdout is not None:  # else flushing the rest at exit would fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        what = f"{error.filename} cannot be read or written" if error.filename else "the output cannot be written"
        print(f"error: {what} ({error.strerror or error}); check its permissions and its disk.", file=sys.stderr)
        sys.exit(2)


def commands_of(package: str) -> dict[str, str]:
    """Name -> the first paragraph of its docstring, for each module of a package that ``python -m`` can run."""
    import ast
    from importlib.util import find_spec

    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    found = {}
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("[!_]*.py")):
        source = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in source:
            said = ast.get_docstring(ast.parse(source)) or ""
            found[path.stem] = said.partition("\n\n")[0].replace("\n", " ")
    return found
