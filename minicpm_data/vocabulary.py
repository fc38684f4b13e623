"""Train a vocabulary of MiniCPM's kind on a corpus: SentencePiece BPE with single digits and byte fallback.

python -m minicpm_data.vocabulary --data data/pico --save-path pico
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from minicpm_data.datasets.formats import Reader
from minicpm_data.datasets.jsonl import read_documents
from minicpm_data.option_checks import check_range
from minicpm_data.tokenizer.chat_template import MINICPM_TEMPLATE
from weights_io.command_line import Former
from weights_io.errors import InputError
from weights_io.files.partial import partial
from weights_io.progress import waiting
from weights_io.write import check_output

CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
    "legacy": True,
    "clean_up_tokenization_spaces": False,
    "sp_model_kwargs": {},
}


def parts_of(document: dict[str, Any], where: str = "the document") -> list[str]:
    """Split a document into texts to train on: a text into its lines, a chat into markers and turns.

    A chat gives ``<用户>``, question, ``<AI>``, answer (MiniCPM's own form). The markers are separate texts, so that no
    piece spans a marker and the text beside it. The first text begins with a space, as the fast tokenizer begins every
    text with one.

    Arguments:
        document: a text or a chat.
        where: its name in messages.

    Raises:
        InputError: the document has no known form.
    """
    try:
        found = Reader().conversation(document)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if isinstance(found, str):
        return (" " + found).split("\n")
    if found.tools or any(turn.more for turn in found.turns):
        raise InputError(f"{where} has tools or thoughts, which are no texts of pico; leave it out.")
    markers = {"user": ["<用户>"], "assistant": ["<AI>"], "system": []}
    parts = [part for turn in found.turns for part in (*markers[turn.role], turn.content)]
    return [" " + parts[0], *parts[1:]]


def texts(data: Path, limit: int) -> Iterator[str]:
    """The texts (`parts_of`) of the first ``limit`` training documents of each stage."""
    for stage in ("stable", "decay"):
        path = data / stage / "train.jsonl"
        if not path.is_file():
            raise InputError(f"{path} does not exist; run python -m minicpm_data.corpus --save-path {data} first.")
        for number, document in islice(read_documents(path), limit):
            parts = parts_of(document, f"{path}, line {number}")
            try:
                "".join(parts).encode()
            except UnicodeEncodeError:
                raise InputError(f"{path}, line {number} has a lone surrogate; correct or delete the line.") from None
            yield from parts


def train(lines: Iterable[str], size: int) -> bytes:
    """Train a SentencePiece model in which every character of the texts is a piece.

    Arguments:
        lines: the texts.
        size: the size of the vocabulary in pieces.

    Returns:
        The serialized model.

    Raises:
        InputError: there is no text, or the size does not fit it.
    """
    import io

    import sentencepiece

    lines = list(lines)
    if not any(line.strip() for line in lines):
        raise InputError("the corpus holds no text; give the folder of one that does as --data.")
    characters = {character for line in lines for character in line if character != " "}
    least = 4 + 256 + len(characters) + 1  # special tokens and newline, bytes, characters, the space
    if size < least:
        raise InputError(f"{size} has no room for the corpus's characters; give {least} or more.", option="vocab_size")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        if "Vocabulary size too high" not in str(error):
            raise InputError(f"SentencePiece cannot train on this corpus ({error}); give other text.") from None
        raise InputError(
            f"{size} is more pieces than the corpus has; give fewer or more text.", option="vocab_size"
        ) from None
    return model.getvalue()


def _write(path: Path, content: bytes) -> None:
    with partial(path) as unfinished:
        unfinished.write_bytes(content)


@dataclass
class Options:
    data: Path
    """Folder written by minicpm_data.corpus."""
    save_path: Annotated[Path, Former("out")]
    """Folder to write tokenizer files to."""
    vocab_size: Annotated[int, Former("size")] = 2048
    """Size of the vocabulary in pieces."""
    documents: int = 20_000
    """Training documents to read from each stage."""
    model_max_length: Annotated[int, Former("max_length")] = 1024
    """model_max_length of tokenizer_config.json."""


def main(options: Options) -> None:
    """Train a SentencePiece vocabulary on a corpus: tokenizer.model, tokenizer.json and tokenizer_config.json."""
    from minicpm_data.tokenizer.sentencepiece import fast_spec, read_spm

    check_range(options, "documents", "model_max_length", least=1)
    check_output(options.save_path)  # a tokenizer there must stay: trained models may depend on it
    with waiting(f"training {options.vocab_size:,} pieces on {options.data}"):
        model = train(texts(options.data, options.documents), options.vocab_size)
    try:
        options.save_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{options.save_path} cannot be made ({error.strerror}); name another folder.", option="save_path"
        ) from None
    _write(options.save_path / "tokenizer.model", model)
    config = {**CONFIG, "model_max_length": options.model_max_length, "chat_template": MINICPM_TEMPLATE}
    _write(options.save_path / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False).encode())
    fast = fast_spec(read_spm(options.save_path / "tokenizer.model"), space_prefix=True, added={})
    _write(options.save_path / "tokenizer.json", json.dumps(fast, ensure_ascii=False).encode())
    print(f"{options.save_path}: a tokenizer of {options.vocab_size:,} pieces")


if __name__ == "__main__":
    from weights_io.command_line import run

    run(main, Options, "python -m minicpm_data.vocabulary")
