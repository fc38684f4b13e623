"""The command ``python -m weights_io.inspect``. It builds the tokenizer as a loader does."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpm_data.sampling_defaults import ChatSampling, chat_sampling, family_named
from minicpm_data.tokenizer.from_checkpoint import tokenizer_in
from weights_io import catalog
from weights_io.errors import InputError
from weights_io.inspect import Options, Report, describe, lines, without_tokenizer

CHAT_TEMPLATE = "chat_template.jinja"


def main(options: Options) -> None:
    report = look_up(options)
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines(report)))
    if report.problems:
        raise InputError("; ".join(problem.removesuffix(".") for problem in report.problems) + ".")


def look_up(options: Options) -> Report:
    """The report on a model.

    For a model on a hub, only the config and the tokenizer are downloaded, and weights are counted if they are cached.
    If the hub cannot be reached, the report comes from the catalogue. Raises `InputError` if the model is not found.
    """
    from weights_io.hub import resolve

    try:
        path = resolve(options.model, revision=options.revision, hub=options.hub, weights=False)
    except InputError as error:
        entry = catalog.find(options.model)
        if entry is None or entry.config is None:
            raise
        report = describe(f"{entry.repo}, as the catalogue has it", entry.config, {})
        report.sampling = ChatSampling(family_named(entry.name)).line()
        report.unusual = [f"the repository itself could not be asked: {error}"]
        return report
    return inspect(path, downloaded=path.suffix != ".gguf" and not Path(options.model).expanduser().exists())


def inspect(path: Path, downloaded: bool = False) -> Report:
    """The report on a model folder or GGUF file. ``downloaded``: the folder is a hub's cache, which may lack weights.

    Raises `InputError` if config.json (or the GGUF header) cannot be used. Other faults are listed in the report.
    """
    report, metadata = without_tokenizer(path, downloaded)
    _describe_tokenizer(report, path, metadata)
    return report


def _describe_tokenizer(report: Report, path: Path, metadata: Mapping[str, Any] | None) -> None:
    """Set the report's fields on the tokenizer: its kind, its number of ids, where its chat template is, and the
    sampling defaults of a chat. An error of the loader becomes a problem of the report."""
    kind = _tokenizer_kind(path, metadata)
    try:
        tokenizer, note = tokenizer_in(path, metadata, report.config["vocab_size"])
    except InputError as error:
        report.tokenizer = kind
        report.problems.append(str(error))
        return
    if tokenizer is None:
        return
    report.tokenizer, report.tokenizer_ids = kind, tokenizer.vocab_size
    report.unusual += [note] if note else []
    rows = report.config["vocab_size"]
    if tokenizer.vocab_size < rows:
        spare = rows - tokenizer.vocab_size
        report.unusual.append(
            f"the embedding has {spare} more rows than the tokenizer has ids ({tokenizer.vocab_size})"
        )
    try:
        folder = path if metadata is None else None
        report.sampling = chat_sampling(report.config, tokenizer.chat_template, folder).line()
    except InputError as error:
        report.problems += [str(error)] * (str(error) not in report.problems)
    if tokenizer.chat_template_given:
        where = "the GGUF file" if metadata is not None else "tokenizer_config.json"
        report.chat_template = f"its own, in {'chat_template.jinja' if (path / CHAT_TEMPLATE).is_file() else where}"


def _tokenizer_kind(path: Path, metadata: Mapping[str, Any] | None) -> str:
    if metadata is not None:
        return f"GGUF ({metadata.get('tokenizer.ggml.model')})"
    return "tokenizer.json (BPE)" if (path / "tokenizer.json").is_file() else "tokenizer.model (SentencePiece)"
