"""The tokenizer files of a checkpoint folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpm_data.tokenizer.fast_tokenizer import FastTokenizer, check_growth
from minicpm_data.tokenizer.sentencepiece import added_token, fast_spec, read_spm
from minicpm_data.tokenizer.special_tokens import without_prefix
from minicpm_data.tokenizer.tokenizer import Tokenizer
from weights_io.errors import InputError, not_utf8, short
from weights_io.files.json_text import MAX_BYTES, MAX_CONFIG, read_json, read_optional_json
from weights_io.files.near_keys import refuse_near_keys
from weights_io.files.regular import read_regular

# MiniCPM-V's tokenizer classes are slow: they use SentencePiece itself, which adds no "▁" before a text.
SLOW_CLASSES = ("LlamaTokenizerWrapper", "MiniCPMVTokenizer")
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy")
# Keys that would change ids if they were used -> the values with which they change none. Other keys (lengths, padding
# sides, class names, ...) change no id in transformers either.
UNSUPPORTED_UNLESS = {
    "split_special_tokens": (None, False),
    "do_lower_case": (None, False),
    "sp_model_kwargs": (None, {}),
}
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in the order in which transformers adds the missing ones
USED = (
    *FLAGS,
    *UNSUPPORTED_UNLESS,
    *("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens", "extra_special_tokens"),
    *("added_tokens_decoder", "chat_template", "tokenizer_class"),
)
# Keys that resemble one of `USED` and are not mistakes: transformers and models' own classes have them.
NEARLY_USED = (
    *("sep_token", "cls_token", "mask_token", "bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"),
    *("bod_token", "boi_token", "bot_token", "eod_token", "eoi_token", "eom_token", "eop_token", "eot_token"),
)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether ``folder`` holds a ``tokenizer.json`` or a ``tokenizer.model``."""
    return any(os.path.lexists(Path(folder) / name) for name in ("tokenizer.json", "tokenizer.model"))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder.

    A ``tokenizer.json`` is read unchanged. A ``tokenizer.model`` without one is converted as transformers 4 did for its
    fast Llama tokenizer, with the options ``legacy`` and ``add_prefix_space``. MiniCPM-V's own classes, which are slow,
    always use the ``tokenizer.model``.

    BOS, EOS and the chat templates come from ``tokenizer_config.json``, ``special_tokens_map.json`` and
    ``chat_template.jinja``. Special tokens that these files name and the vocabulary lacks get the ids after its last.

    Arguments:
        folder: the checkpoint folder.

    Returns:
        The tokenizer.

    Raises:
        InputError: there are no tokenizer files, or a file cannot be used.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise InputError(f"{folder} holds neither a tokenizer.json nor a tokenizer.model.")
    config = _config(folder)
    added = _added_tokens(config, folder)
    fast_file, spm_file = folder / "tokenizer.json", folder / "tokenizer.model"
    named = {"bos": "<s>", "eos": "</s>", "pad": None, "unk": "<unk>"}
    if os.path.lexists(spm_file) and (config.get("tokenizer_class") in SLOW_CLASSES or not os.path.lexists(fast_file)):
        source, spec, named = spm_file, *_of_sentencepiece(spm_file, config, added)
        config = {"add_bos_token": True, "add_eos_token": False, **config}
    else:
        source, spec = fast_file, _of_json(fast_file, config, added)
    listed = {token["content"]: token.get("id") for token in spec["added_tokens"]}
    listed |= {token["content"]: i for i, token in added.items()}
    fast = FastTokenizer(_with_special_tokens(spec, config, source), source)
    for token, i in listed.items():
        if (found := fast.token_to_id(token)) != i:
            raise InputError(
                f"{folder} gives the token {short(token)!r} the id {i}, but in the vocabulary of {source.name} it is "
                f"at {found}; the tokenizer files are not of one checkpoint."
            )

    def special(name: str) -> int | None:
        text = _content(config.get(f"{name}_token"))
        if f"{name}_token" in config and text is None:
            return None
        i = fast.token_to_id(text or named[name] or "")
        if text is not None and i is None:
            raise InputError(f"{folder} names {short(text)!r} as its {name}_token, which {source.name} does not have.")
        return i

    eos = special("eos")
    template, tool_template = _chat_templates(config, folder)
    return Tokenizer(
        fast,
        bos_token_id=special("bos"),
        eos_token_ids=() if eos is None else (eos,),
        pad_token_id=special("pad"),
        unk_token_id=special("unk"),
        add_bos=config.get("add_bos_token"),
        add_eos=config.get("add_eos_token"),
        chat_template=template,
        tool_template=tool_template,
    )


def _config(folder: Path) -> dict[str, Any]:
    """The checked keys of ``special_tokens_map.json`` and ``tokenizer_config.json``; the latter takes precedence.
    ``special`` holds all special tokens that they name, by their texts."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found = read_optional_json(folder / name)
        refuse_near_keys(found, USED, NEARLY_USED, folder / name)
        config |= found
    for name in FLAGS:
        if not isinstance(config.get(name), bool | None):
            raise InputError(f"{folder} has the {name} {short(config[name])!r}; it must be true or false.")
    for name, without in UNSUPPORTED_UNLESS.items():
        if config.get(name) not in without:
            raise InputError(
                f"{folder} has the {name} {short(config[name])!r} in tokenizer_config.json, which is not supported; "
                "get a tokenizer without it."
            )
    for name in NAMED:
        token = config.get(f"{name}_token")
        if token is not None and not isinstance(_content(token), str):
            raise InputError(f"the {name}_token of {folder} is {short(token)!r}; it must be the text of a token.")
    more = config.get("additional_special_tokens") or []
    extra = config.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(more, list) or not isinstance(extra, list):
        raise InputError(f"{folder} has a list of special tokens that cannot be read; download it again.")
    tokens = [config.get(f"{name}_token") for name in NAMED] + more + extra
    for token in more + extra:
        if not isinstance(_content(token), str):
            raise InputError(f"{folder} has the special token {short(token)!r}; it must be the text of a token.")
    return {**config, "special": {_content(token): token for token in tokens if _content(token)}}


def _of_sentencepiece(
    path: Path, config: Mapping[str, Any], added: dict[int, dict]
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """A ``tokenizer.model`` converted to the contents of a ``tokenizer.json``, and the special tokens that it names."""
    model = read_spm(path)
    ids = {"bos": model.bos_id, "eos": model.eos_id, "pad": model.pad_id, "unk": model.unk_id}
    names = {name: None if i is None else model.pieces[i] for name, i in ids.items()}
    slow = config.get("tokenizer_class") in SLOW_CLASSES
    spec = fast_spec(
        model,
        space_prefix=not slow or model.add_dummy_prefix,
        added=added,
        legacy=slow or config.get("legacy") is not False,
        add_prefix_space=slow or config.get("add_prefix_space") is not False,
    )
    return spec, names


def _of_json(path: Path, config: Mapping[str, Any], added: Mapping[int, dict]) -> dict[str, Any]:
    """The contents of a ``tokenizer.json``, with the added tokens that only other files list."""
    spec = read_json(path, MAX_BYTES)
    listed = spec.get("added_tokens") or []
    if not isinstance(listed, list) or not all(
        isinstance(t, dict) and isinstance(t.get("content"), str) for t in listed
    ):
        raise InputError(f"{path} has a list of added tokens that cannot be read; download it again.")
    model = spec.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise InputError(f"{path} does not describe a tokenizer; download it again.")
    if model.get("dropout"):
        raise InputError(f"{path} has a dropout, which cuts a text by chance; remove it or set it to null.")
    known = {token["content"] for token in listed}
    missing = [{**token, "id": i} for i, token in sorted(added.items()) if token["content"] not in known]
    check_growth(spec, path)
    return _prefixed({**spec, "added_tokens": [*listed, *missing]}, config)


def _prefixed(spec: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """``spec`` with the leading space of a text that ``add_prefix_space`` asks for.

    As in transformers, the option has an effect in two cases: with a byte-level vocabulary, and if it is false with a
    Llama tokenizer, which transformers rebuilds without the space.
    """
    wanted, step = config.get("add_prefix_space"), spec.get("pre_tokenizer")
    if wanted is not None and step is not None and step["type"] == "ByteLevel":
        return {**spec, "pre_tokenizer": {**step, "add_prefix_space": wanted}}
    if wanted is False and config.get("tokenizer_class") in LLAMA_CLASSES:
        bare = without_prefix({"normalizer": None, "pre_tokenizer": None, **spec})
        decoder = spec.get("decoder")
        if decoder is not None and decoder["type"] == "Sequence":
            kept = [step for step in decoder["decoders"] if step["type"] != "Strip"]
            bare["decoder"] = {**decoder, "decoders": kept}
        return bare
    return spec


def _with_special_tokens(spec: dict[str, Any], config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """``spec`` with all special tokens of the config among its added tokens, as in transformers. A BOS or EOS that the
    vocabulary lacks is not added."""
    vocab = spec["model"]["vocab"]
    listed = [*(spec.get("added_tokens") or [])]
    known = {token["content"] for token in listed}
    ends = {_content(config.get(f"{name}_token")) for name in ("bos", "eos")}
    following = 1 + max([_highest(vocab), *(_number(token.get("id")) for token in listed)])
    for text, token in config["special"].items():
        if text in known or not isinstance(vocab, dict):
            continue
        if text not in vocab:
            if text in ends:
                continue
            following, i = following + 1, following
        else:
            i = vocab[text]
        flags = {key: value for key, value in token.items() if key != "id"} if isinstance(token, dict) else {}
        listed.append(added_token(**{**flags, "id": i, "content": text, "special": True}))
        known.add(text)
    return {**spec, "added_tokens": listed}


def _highest(vocab: Any) -> int:
    """The highest id of a vocabulary; -1 where it is empty."""
    return max(map(_number, vocab.values()), default=-1) if isinstance(vocab, dict) else len(vocab) - 1


def _number(value: Any) -> int:
    """An id; -1 for a value that is not a whole number, which the library will refuse."""
    return value if type(value) is int else -1


def _content(token: Any) -> Any:
    """The text of a token that a config gives as a string, or as an object with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(config: Mapping[str, Any], folder: Path) -> dict[int, dict]:
    """Added tokens by id, from ``tokenizer_config.json`` and the older ``added_tokens.json`` (content -> id)."""
    listed = read_optional_json(folder / "added_tokens.json")
    try:
        older = {_id(i): {"content": token, "special": token in config["special"]} for token, i in listed.items()}
        newer = {_id(int(i)): dict(token) for i, token in (config.get("added_tokens_decoder") or {}).items()}
        added = {**older, **newer}
        if not all(isinstance(token["content"], str) for token in added.values()):
            raise TypeError
        return {i: added_token(**{"special": False, **token, "id": i}) for i, token in added.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{folder} has a list of added tokens that cannot be read; download it again.") from error


def _id(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no id")
    return value


def _chat_templates(config: Mapping[str, Any], folder: Path) -> tuple[str | None, str | None]:
    """The chat template, and the separate template for tools, if any.

    They come from ``chat_template.jinja`` and the folder ``additional_chat_templates``. Without that file they come
    from the config, as a string or a list of named templates.
    """
    file = folder / "chat_template.jinja"
    tools = folder / "additional_chat_templates" / "tool_use.jinja"
    if os.path.lexists(file):
        return _template_text(file), _template_text(tools) if os.path.lexists(tools) else None
    template = config.get("chat_template")
    if not isinstance(template, list):
        if not isinstance(template, str | None):
            raise InputError(f"the chat_template of {folder} must be a string.")
        return template, None
    named: dict[str, str] = {}
    for entry in template:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise InputError(f"{folder} has a list of chat templates in which one lacks its name or its text.")
        if name in named:
            raise InputError(f"{folder} has two chat templates of the name {short(name)!r}; remove one of them.")
        named[name] = text
    if "default" not in named and len(named) != 1:
        raise InputError(f"{folder} has several chat templates and none is named default.")
    return named.get("default", next(iter(named.values()))), named.get("tool_use")


def _template_text(file: Path) -> str:
    try:
        return read_regular(file, MAX_CONFIG).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise not_utf8(file, error, "download it again") from error
