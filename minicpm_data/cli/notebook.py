"""Helpers for the notebooks of both backends: checks of the runtime, memory and disks, commands that run in the
notebook's process, Colab's secrets, and Google Drive."""

import os
import runpy
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_data.training.run_folder import holds_run
from weights_io.errors import InputError
from weights_io.memory import ITEM, SMALLER, size
from weights_io.memory import check_room as refuse_without_room

if TYPE_CHECKING:
    from weights_io.hub import Download
    from weights_io.inspect import Report

# Environment variable that allows a notebook to run on the CPU. This is slow, and meant for tests, which give JAX
# virtual devices (XLA_FLAGS=--xla_force_host_platform_device_count=8).
ON_CPU = "MINICPM_NOTEBOOK_CPU"
TOKEN = "HF_TOKEN"  # name in the environment, and in the secrets of Colab and Kaggle
DRIVE_FOLDER = "minicpm-jax-mlx"  # default folder in Google Drive
OF_DRIVE = frozenset(("MyDrive", "My Drive", "Shareddrives"))  # top folders of a mounted Google Drive
CONVERSATION = 4096  # tokens of the cache whose size is printed
# Bytes per second, assumed for the estimate of the time to the first answer.
DOWNLOAD_RATE, READ_RATE = 100e6, 1e9


def accept_cpu(wanted: str, remedy: str) -> str:
    """The line to print where the runtime is only a CPU. Raises `InputError` unless the environment allows a CPU.

    Arguments:
        wanted: the accelerator that the notebook is for.
        remedy: how to get it.
    """
    if os.environ.get(ON_CPU, "0") in ("", "0"):
        raise InputError(f"this notebook wants {wanted}, and there is only a CPU; {remedy} (or set {ON_CPU}=1, slow).")
    return f"on the CPU, because {ON_CPU} is set: nothing here says how fast {wanted} is"


def run(command: str) -> None:
    """Run a command (``python -m minicpm_jax.lora --data ...``) in this process.

    Only one process can use a TPU. The command may have several lines. Raises `InputError` if the command fails, after
    the command has printed its error.
    """
    python, flag, module, *arguments = shlex.split(command)
    if (python, flag) != ("python", "-m"):
        raise InputError(f"{command} does not begin with python -m; give a command of a module.")
    before, sys.argv = sys.argv, [module, *arguments]
    handler = signal.signal(signal.SIGINT, _interrupt)  # a command must not end the notebook
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # the module may already have run
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise InputError(f"python -m {module} ended with {end.code}; what it printed says why.") from None
    finally:
        sys.argv = before
        signal.signal(signal.SIGINT, handler)


def take_token(model: str) -> None:
    """Copy HF_TOKEN from the secrets of Colab or Kaggle to the environment, if ``model`` is on a hub.

    Prints one line with the result. The user is not asked, because public models need no token.
    """
    from weights_io.hub import locate

    if os.environ.get(TOKEN) or isinstance(locate(model), Path):
        return
    found = _secrets()
    if found is None:
        return
    where, get = found
    try:
        token = (get(TOKEN) or "").strip()
    except Exception as error:  # classes of the platform: no such secret, no access, no answer
        print(f"no {TOKEN} from the secrets of {where} ({type(error).__name__}); public models need none")
        return
    if token:
        os.environ[TOKEN] = token
        print(f"{TOKEN} is that of the secrets of {where}")


def _secrets() -> tuple[str, Callable[[str], str | None]] | None:
    """The name of the platform, and the function that reads a secret; None outside of Kaggle and Colab."""
    try:
        from kaggle_secrets import UserSecretsClient

        return "Kaggle", lambda name: UserSecretsClient().get_secret(name)
    except ImportError:
        pass
    try:
        from google.colab import userdata

        return "Colab", userdata.get
    except ImportError:
        return None


def check_room(
    model: str,
    copies: Sequence[str | None] = (),
    computed: Callable[[str], str] = str,
    memory: int | None = None,
    compiling: float = 0,
    device: str = "TPU",
) -> None:
    """Print a model's download size, disk and memory use, and an estimate of the time to the first answer.

    Only the config and the tokenizer are downloaded for this.

    Arguments:
        model: as `weights_io.hub.resolve` takes it.
        copies: dtypes of the copies that the notebook writes beside itself; None is the model's own.
        computed: the model's dtype -> the dtype of the computation; by default the same.
        memory: bytes that are free for the weights; None: unknown.
        compiling: seconds until the programs of the first answer are compiled.
        device: the device's name in the note that the estimate is not measured.

    Raises:
        InputError: a disk or the memory is too small.
    """
    from minicpm_data.cli.inspect import look_up
    from weights_io.hub import to_download
    from weights_io.inspect import Options

    report, download = look_up(Options(model)), to_download(model)
    own = report.dtype if report.dtype in ITEM else "bfloat16"
    dtype = computed(own)
    written = sum(_copy_bytes(report, copy or own) for copy in copies)
    weights = report.parameters * ITEM[dtype]
    tokens = min(CONVERSATION, report.context_length)
    cache = report.cache["bfloat16"] * tokens // 1000 * ITEM[dtype] // ITEM["bfloat16"]
    coming = download.missing_bytes if download else 0
    print(f"{'download':14} {_of_the_hub(download)}")
    print(f"{'disk':14} {_disks(model, download, written)}")
    free = "" if memory is None else f"; {size(memory)} are free"
    print(f"{'memory':14} {size(weights)} of weights in {dtype}, {size(cache)} of keys and values for ", end="")
    print(f"{tokens:,} tokens{free}")
    refuse_without_room(f"the weights of {model} in {dtype}", weights, memory, SMALLER)
    if coming is not None:
        print(f"{'first answer':14} {_first_answer(coming, report.memory['stored'] or weights, compiling, device)}")


def _copy_bytes(report: "Report", dtype: str) -> int:
    """Most bytes of a copy in a dtype (or int4). The Llama format stores a tied embedding again as the head."""
    if dtype not in ITEM:
        return report.memory[dtype] or 0
    table = report.parameters - report.parameters_without_embedding
    tied = report.config["tie_word_embeddings"]
    return (report.parameters + table * tied) * ITEM[dtype]


def _of_the_hub(download: "Download | None") -> str:
    if download is None:
        return "nothing: the model is on this disk"
    if not download.missing:
        return f"nothing: {download.repo} is in the cache, {download.cache}"
    count = len(download.missing)
    return f"{size(download.missing_bytes)} in {count} file{'s' * (count > 1)} of {download.repo}"


def _disks(model: str, download: "Download | None", written: int) -> str:
    """The bytes to write and the free bytes of each disk, in words. Raises `InputError` where a disk is too small."""
    wanted = [] if download is None else [(download.cache, download.missing_bytes or 0, f"in {download.cache}")]
    wanted.append((Path.cwd(), written, "at most for the copies that this notebook writes"))
    disks: dict[int, list[tuple[Path, int, str]]] = {}  # by device
    for folder, count, what in wanted:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if count:
            disks.setdefault(there.stat().st_dev, []).append((there, count, f"{size(count)} {what}"))
    remedy = "make room, take a smaller model, or set HF_HOME to a folder on another disk"
    said = []
    for parts in disks.values():
        there, free = parts[0][0], shutil.disk_usage(parts[0][0]).free
        refuse_without_room(f"{model} on the disk of {there}", sum(count for _, count, _ in parts), free, remedy)
        said.append(f"{' and '.join(what for *_, what in parts)}; {size(free)} are free")
    return "; ".join(said) or "nothing"


def _first_answer(coming: int, stored: int, compiling: float, device: str) -> str:
    """The estimate of the time to the first answer, in words: ``about 66 s from here (...)``."""
    parts = {
        f"download at {DOWNLOAD_RATE / 1e6:.0f} MB/s": coming / DOWNLOAD_RATE,
        f"read at {READ_RATE / 1e9:.0f} GB/s": stored / READ_RATE,
        "compile": compiling,
    }
    steps = ", ".join(f"{_duration(seconds)} to {what}" for what, seconds in parts.items() if seconds >= 1)
    whole = f"about {_duration(sum(parts.values()))} from here ({steps})" if steps else "in seconds"
    return f"{whole}; an estimate, not timed on a {device}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def run_folder(name: str, model: str, drive: bool | str = False) -> str:
    """The folder of a training run of ``model``, for a command line.

    Arguments:
        name: a folder beside the notebook, for a new run; an earlier one is removed, as by `fresh`.
        model: the model to train.
        drive: True, or a folder's name, keeps the run in Google Drive, which is mounted. Nothing is removed there;
            `resume` continues the run.

    Raises:
        InputError: there is no Google Drive, or the model is in that folder.
    """
    if not drive:
        fresh(name, keep=model)
        return name
    folder = _drive() / (DRIVE_FOLDER if drive is True else drive) / f"{name}-{Path(model).name}"
    print(f"{folder}: {'holds a run, which goes on' if resume(str(folder)) else 'a new run'}")
    return str(folder)


def resume(folder: str) -> str:
    """``--resume`` where the folder holds a run, else an empty text: the end of a training command."""
    return "--resume" if holds_run(Path(folder)) else ""


def fresh(*names: str, keep: str = "") -> None:
    """Remove folders beside the notebook that an earlier run of a cell wrote.

    Raises `InputError`, before anything is removed, where the model ``keep`` is in one of them or one of them is in
    Google Drive.
    """
    kept = Path(keep).expanduser().resolve()
    for name in names:
        if Path(name).name != name or keep and kept.is_relative_to(Path(name).resolve()):
            raise InputError(f"{name} would be written anew, and {keep or 'it'} is not to be lost; rename it first.")
        if Path(name).exists() and OF_DRIVE.intersection(Path(name).resolve().parts):
            raise InputError(
                f"{Path(name).resolve()} is in Google Drive, where nothing is removed; rename or delete it yourself, "
                "or begin in another folder (%cd /content)."
            )
    for name in names:
        shutil.rmtree(name, ignore_errors=True)


def of_a_clone(path: str) -> Path | None:
    """The path of a project file that is not installed, in a clone of the repository; None without a clone.

    The clone is the one that this package runs from, the notebook's folder or its parent, or one beside the notebook.
    """
    clones = Path(__file__).parents[2], Path(), Path(".."), Path("minicpm-jax-mlx")
    return next(((clone / path).resolve() for clone in clones if (clone / path).exists()), None)


def _drive() -> Path:
    """Mount Google Drive where Colab does, and return the user's folder. Raises `InputError`."""
    try:
        from google.colab import drive
    except ImportError:
        raise InputError(
            "DRIVE is for Google Drive, which only Colab mounts; set DRIVE = False to keep the run beside the notebook."
        ) from None
    mounted = (Path("/content") if Path("/content").is_dir() else Path.cwd()) / "drive"
    try:
        drive.mount(str(mounted))
    except Exception as error:  # Colab's own classes
        detail = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(
            f"Google Drive was not mounted ({detail}); allow it when Colab asks, or set DRIVE = False."
        ) from None
    return mounted / "MyDrive"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
