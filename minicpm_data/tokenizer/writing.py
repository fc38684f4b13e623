"""Write a tokenizer as files that `load_tokenizer` and transformers read back as the same tokenizer."""

import json
from typing import Any

from minicpm_data.tokenizer.from_checkpoint import tokenizer_of
from minicpm_data.tokenizer.tokenizer import Tokenizer
from weights_io.checkpoint import Checkpoint


def carried_files(checkpoint: Checkpoint) -> dict[str, str]:
    """The tokenizer of a GGUF file as files.

    Arguments:
        checkpoint: the open checkpoint.

    Returns:
        File name -> text. Empty for a folder, whose files are copied, and for a GGUF file without a tokenizer.

    Raises:
        InputError: the tokenizer cannot be loaded, so a folder with it could not be loaded either.
    """
    tokenizer = tokenizer_of(checkpoint)
    return {} if tokenizer is None or checkpoint.metadata is None else tokenizer_files(tokenizer)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """A tokenizer as files: ``tokenizer.json``, ``tokenizer_config.json`` and, for several EOS ids,
    ``generation_config.json``.

    Arguments:
        tokenizer: the tokenizer.

    Returns:
        File name -> text.
    """
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
    """The post-processor that adds the ids ``before`` and ``after`` a text; None where there are none."""
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
