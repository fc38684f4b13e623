"""A tokenizer going out: the files that `load_tokenizer` and transformers read back as the same one."""

import json
from typing import Any

from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from minicpm_data.tokenizer.tokenizer import Tokenizer
from weights_io.checkpoint import Checkpoint


def carried_files(checkpoint: Checkpoint) -> dict[str, str]:
    """The tokenizer that a GGUF file carries, as a folder's files; none for a folder, whose own are copied.

    Raises `InputError` for the tokenizers with which a written folder could not be loaded.
    """
    tokenizer = tokenizer_of(checkpoint)
    return {} if tokenizer is None or checkpoint.metadata is None else tokenizer_files(tokenizer)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """File name -> contents: ``tokenizer.json`` and ``tokenizer_config.json``, and where there are several EOS ids the
    ``generation_config.json`` that lists them."""
    ids = {
        "bos_token": tokenizer.bos_token_id,
        "eos_token": tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else None,
        "pad_token": tokenizer.pad_token_id,
        "unk_token": tokenizer.unk_token_id,
    }
    spec = tokenizer._fast.spec()
    spec["post_processor"] = _around_text(tokenizer, tokenizer._before, tokenizer._after)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: None if i is None else tokenizer._fast.id_to_token(i) for name, i in ids.items()},
        "add_bos_token": bool(tokenizer._before),
        "add_eos_token": bool(tokenizer._after),
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
    }
    files = {"tokenizer.json": spec, "tokenizer_config.json": config}
    if len(tokenizer.eos_token_ids) > 1:
        files["generation_config.json"] = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": list(tokenizer.eos_token_ids),
        }
    return {name: json.dumps(content, ensure_ascii=False, indent=1) + "\n" for name, content in files.items()}


def _around_text(tokenizer: Tokenizer, before: list[int], after: list[int]) -> dict[str, Any] | None:
    """The post-processor that writes the ids ``before`` and ``after`` a text."""
    if not before and not after:
        return None
    names = {i: tokenizer._fast.id_to_token(i) for i in (*before, *after)}

    def special(ids: list[int]) -> list[dict]:
        return [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in ids]

    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": [*special(before), *text, *special(after)],
        "pair": [*special(before), *text, *special(after), {"Sequence": {"id": "B", "type_id": 1}}, *special(after)],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()},
    }
