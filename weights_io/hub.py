"""Find a model by path, short name or hub repository, and download it if needed."""

import errno
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from weights_io import catalog
from weights_io.built_in import built_in
from weights_io.config import shown
from weights_io.errors import InputError, short
from weights_io.files.folder import KINDS, SIDE_FILES, USUAL, read_weight_map
from weights_io.files.json_text import read_json

# The files that are downloaded besides the weights. Code (*.py) and the weights in other frameworks' formats are never
# downloaded. quantize_config.json is AutoGPTQ's description of the packing.
FETCHED = ("config.json", "quantize_config.json", *SIDE_FILES)
PART = r"[\w-][\w.-]*"
REPOSITORY = re.compile(f"{PART}/{PART}")
SUBFOLDER = re.compile(f"({PART}/{PART})/({PART}(?:/{PART})*)")  # owner/name/sub/folder


class Hub(Protocol):
    """One repository at one revision."""

    def sizes(self) -> dict[str, int | None] | None:
        """File name (``sub/file`` in a sub-folder) -> bytes, or None where the hub does not tell the size.

        Returns None where the hub cannot be reached.
        """
        ...

    def fetch(self, names: Collection[str]) -> Path:
        """Download the files that are not cached, and return the folder that holds all of ``names``."""
        ...

    def cached(self, names: Collection[str]) -> set[str]:
        """The ``names`` that are in the cache."""
        ...


def resolve(
    path_or_repo: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    hub: str = "huggingface",
    check: Callable[[dict[str, Any], str], object] | None = None,
    weights: bool = True,
) -> Path:
    """The folder or .gguf file of a model, downloaded first if it is on a hub.

    Arguments:
        path_or_repo: a folder, a .gguf file, a short name of the catalogue, ``owner/name``, or
            ``owner/name/sub/folder`` for a repository with several models; None: the built-in model.
        revision: branch, tag or commit of a repository; None is its default branch.
        hub: ``huggingface`` (uses ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_TOKEN``) or ``modelscope``.
        check: called with a repository's config.json and its name for messages before the weights are downloaded;
            raises `InputError` to refuse the model.
        weights: False downloads only the config and the tokenizer.

    Returns:
        The path on this disk.

    Raises:
        InputError: the model does not exist, access is denied, the network is down and the cache does not have it, the
            disk is full, or ``check`` refused it.
    """
    found = locate(path_or_repo, revision, hub, check)
    return found if isinstance(found, Path) else _download(*found, check, weights)


def to_download(path_or_repo: str | os.PathLike[str] | None = None, revision: str | None = None) -> "Download | None":
    """The files that `resolve` would download from Hugging Face.

    Only config.json and the index of the weights are downloaded for this. Returns None for a model on this disk.
    Raises `InputError` as `resolve` does.
    """
    from huggingface_hub import constants

    found = locate(path_or_repo, revision)
    if isinstance(found, Path):
        return None
    source, repo = found
    sizes = source.sizes()
    wanted = _wanted(source, sizes, repo, None, weights=True)
    files = {name: None if sizes is None else sizes[name] for name in wanted}
    present = set(wanted) if sizes is None else source.cached(wanted)  # offline, `_wanted` raises unless all are cached
    return Download(repo, Path(constants.HF_HUB_CACHE), files, {n: files[n] for n in wanted if n not in present})


@dataclass(frozen=True)
class Download:
    """The files of a repository that a model is loaded from. A size of None is unknown."""

    repo: str
    cache: Path  # the folder that downloads go to
    files: dict[str, int | None]  # name -> bytes
    missing: dict[str, int | None]  # the files that are not cached yet

    @property
    def missing_bytes(self) -> int | None:
        """Bytes still to download; None where a size is unknown."""
        sizes = self.missing.values()
        return None if None in sizes else sum(size or 0 for size in sizes)


def locate(
    path_or_repo: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    hub: str = "huggingface",
    check: Callable[[dict[str, Any], str], object] | None = None,
) -> "Path | tuple[Hub, str]":
    """The path on this disk, or the hub and the repository's name. No hub is contacted.

    Arguments and errors: as `resolve`.
    """
    if hub not in ("huggingface", "modelscope"):
        raise InputError(f"The hub {hub!r} is not known: choose huggingface or modelscope.")
    given = "pico" if path_or_repo is None else os.fspath(path_or_repo)
    entry = catalog.find(given)
    try:
        path = Path(given).expanduser()
        local = bool(path_or_repo) and path.exists()
    except (OSError, RuntimeError) as error:  # name too long, folder not accessible, no home folder for ~
        detail = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise InputError(f"{shown(given)} cannot be looked up ({detail}): give another path or a short name.") from None
    if local or (entry and entry.repo is None):
        if revision is not None:
            raise InputError(f"{given} comes from this disk and has no revision {revision!r}: leave the revision out.")
        return built_in(entry.name) if entry and not local else _local(path)
    if path.suffix == ".gguf":
        raise InputError(f"{given} does not exist: give the path of a .gguf file that is on this disk.")
    repo = entry.repo if entry else given
    if entry and hub == "modelscope" and given != entry.repo:
        if entry.modelscope is None:
            raise InputError(f"The catalogue knows no ModelScope repository of {entry.name}: give its owner/name.")
        repo = entry.modelscope
    within = SUBFOLDER.fullmatch(repo or "")
    whole, subfolder = within.groups() if within else (repo, None)
    if not whole or not REPOSITORY.fullmatch(whole):
        raise InputError(f"{given!r} is no folder, .gguf file, owner/name of a hub or short name{_suggestion(given)}")
    if subfolder and Path(whole).is_dir():
        raise InputError(f"The folder {whole} holds no {subfolder}: give the path of a model folder in it.")
    source: Hub = HuggingFace(whole, revision) if hub == "huggingface" else ModelScope(whole, revision)
    return Within(source, subfolder) if subfolder else source, repo or whole


def weight_files(names: Collection[str], fetch: Callable[[Collection[str]], Path]) -> list[str]:
    """The weight files among a repository's top-level files, in the one format that `open_folder` would read.

    Arguments:
        names: the repository's files.
        fetch: downloads files and returns their folder; called for the index only.

    Returns:
        The names, the index first; empty if there are none.

    Raises:
        InputError: the index is damaged.
    """
    for name in USUAL:
        if name in names and name.endswith(".json"):
            return sorted({name, *read_weight_map(fetch([name]) / name).values()})
        if name in names:
            return [name]
    others = [name for name in names if fnmatch(name, "*.safetensors") and not name.startswith("adapter")]
    return others if len(others) == 1 else []


def _local(path: Path) -> Path:
    if path.is_dir() or path.suffix == ".gguf":
        return path
    raise InputError(f"{path} is neither a model folder nor a .gguf file: give the folder that holds config.json.")


def _download(source: Hub, repo: str, check: Callable[[dict[str, Any], str], object] | None, weights: bool) -> Path:
    return source.fetch(_wanted(source, source.sizes(), repo, check, weights))


def _wanted(
    source: Hub,
    listed: Collection[str] | None,
    repo: str,
    check: Callable[[dict[str, Any], str], object] | None,
    weights: bool,
) -> list[str]:
    """The files, among those that the hub ``listed``, that the model needs. Downloads config.json and the index."""
    if listed is not None and "config.json" not in listed:
        remedy = "choose another"
        if any(name.endswith(".gguf") for name in listed):
            remedy = f"download the one you want with `hf download {_whole(repo)} FILE.gguf` and pass its path"
        if folders := sorted(name.removesuffix("/config.json") for name in listed if name.endswith("/config.json")):
            remedy = f"{' and '.join(folders[:3])}{' and more' * (len(folders) > 3)} do, so name {repo}/{folders[0]}"
        raise InputError(f"{repo} holds no config.json in its top folder at this revision: {remedy}.")
    folder = source.fetch(["config.json"])
    config = read_json(folder / "config.json")
    if check:
        check(config, f"config.json of {repo}")
    names = {path.name for path in folder.iterdir()} if listed is None else set(listed)
    wanted = [name for name in FETCHED if name in names]
    if weights:
        found = weight_files(names, source.fetch)
        if listed is None and (not found or not names.issuperset(found)):
            raise InputError(_unreachable(repo))
        if not found:
            raise InputError(f"{repo} holds none of {KINDS}: choose another repository.")
        if missing := sorted(set(found) - names):
            raise InputError(
                f"{repo} lacks {short(missing[0])}, which its index lists: choose another revision or repository."
            )
        wanted += found
    return wanted


class Within:
    """A sub-folder of a repository, with the interface of a repository."""

    def __init__(self, source: Hub, folder: str) -> None:
        self.source, self.folder = source, folder

    def sizes(self) -> dict[str, int | None] | None:
        listed, start = self.source.sizes(), f"{self.folder}/"
        if listed is None:
            return None
        return {name.removeprefix(start): size for name, size in listed.items() if name.startswith(start)}

    def fetch(self, names: Collection[str]) -> Path:
        return self.source.fetch([f"{self.folder}/{name}" for name in names]) / self.folder

    def cached(self, names: Collection[str]) -> set[str]:
        found = self.source.cached([f"{self.folder}/{name}" for name in names])
        return {name.removeprefix(f"{self.folder}/") for name in found}


def _suggestion(given: str) -> str:
    """The end of the sentence: similar short names, or where they are listed."""
    close = catalog.nearest(given)
    return (
        f"; did you mean {' or '.join(close)}?" if close else "; `python -m weights_io.catalog` lists the short names"
    )


def _whole(repo: str) -> str:
    """The ``owner/name`` part of a repository or of a sub-folder of one."""
    return "/".join(repo.split("/")[:2])


def _unreachable(repo: str) -> str:
    from huggingface_hub import constants

    state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{_endpoint()} cannot be reached"
    remedy = "unset it" if constants.HF_HUB_OFFLINE else "set HF_ENDPOINT to a mirror"
    return (
        f"there is no folder {repo} here, {state} and it is not (or not completely) in the cache "
        f"{constants.HF_HUB_CACHE}: {remedy}, or run "
        f"`hf download {_whole(repo)} --local-dir FOLDER` on a connected machine and pass that folder."
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


class HuggingFace:
    """A repository of the Hugging Face hub or a mirror, in the cache that all Hugging Face programs share."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self.repo, self.revision = repo, revision
        self.asked = revision  # as the user typed it; `revision` becomes the commit

    def sizes(self) -> dict[str, int | None] | None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

        try:
            # Not list_repo_files: without a network it retries for 30 seconds.
            info = HfApi(endpoint=_endpoint()).model_info(self.repo, revision=self.revision, files_metadata=True)
            return {file.rfilename: file.size for file in info.siblings or ()}
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise self._explained(error) from None
            return None
        except HFValidationError:  # too long, contains "--", ...
            raise InputError(f"{shown(self.repo)} is not a valid repository name: correct it.") from None
        except (HTTPError, OfflineModeIsEnabled):
            return None

    def fetch(self, names: Collection[str]) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HTTPError

        try:
            folder = snapshot_download(
                self.repo, revision=self.revision, allow_patterns=list(names), endpoint=_endpoint()
            )
        except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: an interrupted transfer of hf_xet
            raise self._explained(error) from None
        missing = [name for name in names if not (Path(folder) / name).is_file()]
        if missing:  # older clients return the cached files only
            raise InputError(_unreachable(self.repo))
        self.revision = Path(folder).name  # the commit, so that later files come from the same one
        return Path(folder)

    def cached(self, names: Collection[str]) -> set[str]:
        from huggingface_hub import try_to_load_from_cache

        found = {name: try_to_load_from_cache(self.repo, name, revision=self.revision) for name in names}
        return {name for name, path in found.items() if isinstance(path, str)}

    def _explained(self, error: Exception) -> InputError:
        from huggingface_hub import constants, errors

        repo, cache = self.repo, constants.HF_HUB_CACHE
        if isinstance(error, errors.GatedRepoError):
            return InputError(
                f"{repo} is gated: accept its terms at {_endpoint()}/{repo}, then run `hf auth login` or set HF_TOKEN."
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return InputError(
                f"There is no folder {repo} here and no repository {repo} at {_endpoint()} that you may read "
                f"(private ones need `hf auth login`){_suggestion(repo)}"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return InputError(
                f"{repo} has no revision {self.asked!r}: choose a branch, tag or commit listed at {_endpoint()}/{repo}."
            )
        if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            if isinstance(error.__cause__, errors.HfHubHTTPError):
                return self._explained(error.__cause__)
            return InputError(_unreachable(repo))
        if isinstance(error, errors.HfHubHTTPError):
            return InputError(
                f"{_endpoint()} answered {error.response.status_code} for {repo}: try again later or set HF_ENDPOINT."
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return InputError(f"The disk of {cache} is full: free space for {repo}, or set HF_HOME to another disk.")
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return InputError(f"The cache {cache} cannot be written: set HF_HOME to a folder that you may write.")
        detail = " ".join(str(error).split()) or type(error).__name__
        return InputError(f"The download of {repo} was interrupted ({detail}): run the same command again to resume.")


class ModelScope:
    """A repository of ModelScope, through its client and in the client's cache."""

    def __init__(self, repo: str, revision: str | None) -> None:
        if not find_spec("modelscope"):
            raise InputError("ModelScope's client is missing: run `pip install 'minicpm-jax-mlx[modelscope]'`.")
        self.repo, self.revision = repo, revision

    def sizes(self) -> dict[str, int | None] | None:
        from modelscope.hub.api import HubApi

        return {file["Path"]: file.get("Size") for file in self._ask(HubApi().get_model_files, recursive=True)}

    def fetch(self, names: Collection[str]) -> Path:
        from modelscope.hub.snapshot_download import snapshot_download

        return Path(self._ask(snapshot_download, allow_patterns=list(names)))

    def cached(self, names: Collection[str]) -> set[str]:
        return set()  # the client does not tell

    def _ask(self, request: Callable[..., Any], **options: Any) -> Any:
        from modelscope.hub.errors import HubError

        try:
            return request(self.repo, revision=self.revision, **options)
        except (HubError, OSError) as error:
            at = f" at revision {self.revision!r}" if self.revision else ""
            detail = " ".join(str(error).split())
            raise InputError(
                f"ModelScope did not give {self.repo}{at} ({detail}): check the name, the revision and the network."
            ) from None
