"""Install what a notebook's kernel lacks: its first cell installs only this package, and `install` a backend's needs.

Images such as Colab's have an older JAX, and many packages that depend on other packages. Therefore JAX is upgraded,
and the packages that the kernel has imported keep their versions. This module needs only Python and `packaging`, which
every kernel has.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement

from weights_io.errors import InputError

PROJECT = "minicpm-jax-mlx"
UPGRADED = frozenset(("jax", "jaxlib", "libtpu", "flax", "mlx", "mlx-lm"))  # even if the kernel has imported them
KEPT = frozenset(("numpy",))  # even if the kernel has not imported it: most of an image is compiled for it
# Without --quiet, which hides the packages that are in conflict.
PIP = (sys.executable, "-m", "pip", "install", "--progress-bar", "off", "--no-input", "--disable-pip-version-check")
RESTART = "restart the runtime (in Colab: Runtime > Restart session), then run this cell again"


def install(backend: str) -> None:
    """Install the packages that a backend needs and this environment lacks, and print the changes in one line.

    On a machine with a TPU, JAX is installed with its libtpu.

    Arguments:
        backend: ``jax`` or ``mlx``.

    Raises:
        InputError: pip fails, or a package that the kernel has imported now has another version.
    """
    extras = (backend, "tpu") if backend == "jax" and has_tpu() else (backend,)
    before = versions()
    lacking = not all(met(each, before) for each in needed(*extras))
    imported = imported_distributions() if lacking else set()
    if lacking:
        print(f"Installing what {PROJECT} needs ({', '.join(extras)}), a minute or two:", end=" ", flush=True)
        run_pip(needed(*extras), {name: before[name] for name in sorted((imported | KEPT) & before.keys() - UPGRADED)})
        print(", ".join(changes(before, versions())) + ".")
    after = versions()
    if stale := sorted({name for name in imported if after.get(name) != before.get(name)} | replaced(after)):
        raise InputError(f"what is imported here of {', '.join(stale)} was replaced since; {RESTART}.")


def has_tpu() -> bool:
    """Whether there is a TPU: a device file, a variable that its host sets, or libtpu, which an image for TPUs has."""
    files = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    told = any(map(os.environ.get, ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "COLAB_TPU_ADDR")))
    return bool(files) or told or util.find_spec("libtpu") is not None


def needed(*extras: str) -> list[Requirement]:
    """The requirements of this package with ``extras``, without this package itself."""
    asked = [Requirement(text) for text in metadata.requires(PROJECT) or ()]
    found = [each for each in asked if each.marker is None or any(each.marker.evaluate({"extra": e}) for e in extras)]
    if "tpu" in extras:
        found.append(Requirement("libtpu"))  # jax[tpu] pins its release
    return [each for each in found if plain(each.name) != PROJECT]


def met(requirement: Requirement, found: dict[str, str]) -> bool:
    """Whether the installed versions ``found`` meet a requirement."""
    version = found.get(plain(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def plain(name: str) -> str:
    """The name of a package in lower case, with single hyphens as separators."""
    return re.sub(r"[-_.]+", "-", name).lower()


def versions() -> dict[str, str]:
    """Installed versions by plain name. Of two packages with one name, the version of the one that is imported."""
    importlib.invalidate_caches()
    return {plain(each.name): each.version for each in reversed([*metadata.distributions()])}


def imported_distributions() -> set[str]:
    """Plain names of the packages from which this process has imported anything."""
    owners = metadata.packages_distributions()
    return {plain(owner) for module in owners.keys() & sys.modules.keys() for owner in owners[module]}


def replaced(found: dict[str, str]) -> set[str]:
    """The packages whose versions a backend cannot mix and that were replaced after their import, by any program."""
    stale = set()
    for name in ("jax", "jaxlib", "flax", "numpy"):
        pair = {str(getattr(sys.modules.get(name), "__version__", "")), found.get(name, "")}
        if len(pair) == 2 and all(re.fullmatch(r"\d+(\.\d+)+", version) for version in pair):  # releases
            stale.add(name)
    return stale


def run_pip(wanted: list[Requirement], kept: dict[str, str]) -> None:
    """Install packages with pip. The versions in ``kept`` stay, except those that pip reports as conflicts."""
    kept = dict(kept)
    for each in wanted:
        each.marker = None  # it was true, and pip knows no extra here
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "kept.txt")
        while True:
            constraints.write_text("".join(f"{name}=={version}\n" for name, version in kept.items()))
            command = [*PIP, "--constraint", str(constraints), *map(str, wanted)]
            ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            named = re.findall(r"\(constraint\) ([\w.-]+?)==", ran.stdout + ran.stderr)
            if not ran.returncode:
                return
            if not (stuck := kept.keys() & set(map(plain, named))):
                break
            for name in stuck:
                del kept[name]
    print(f"it failed.\n{ran.stderr}")
    raise InputError(f"pip could not install what {PROJECT} needs; what it printed says why.")


def changes(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    """Yields changes such as ``jax 0.7.2 -> 0.11.2``, and the number of new packages."""
    for name in sorted(after.keys() & before.keys(), key=lambda name: (name not in UPGRADED, name)):
        if after[name] != before[name]:
            yield f"{name} {before[name]} -> {after[name]}"
    new = sorted(after.keys() - before.keys())
    yield from (f"{name} {after[name]}" for name in new if name in UPGRADED)
    if count := sum(name not in UPGRADED for name in new):
        yield f"{count} new package" + "s" * (count > 1)
