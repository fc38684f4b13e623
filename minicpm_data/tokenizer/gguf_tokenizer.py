"""Load the tokenizer from the metadata of a GGUF file (llama.cpp's ``tokenizer.*`` keys)."""

from minicpm_data.tokenizer.fast_tokenizer import FastTokenizer
from minicpm_data.tokenizer.gguf_pre_tokenizers import BYTES, PRE_TOKENIZERS
from minicpm_data.tokenizer.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SpmModel,
    added_token,
    fast_spec,
    unique_ids,
)
from minicpm_data.tokenizer.tokenizer import Tokenizer
from weights_io.errors import InputError, short
from weights_io.files.near_keys import refuse_near_keys

IDS = ("bos", "eos", "eot", "unknown", "padding")
TURN_END = "<|im_end|>"  # of MiniCPM3, 4 and 5
OF_TOKENS = ("model", "pre", "tokens", "token_type", "scores", "merges")
FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")
USED = (
    *(f"tokenizer.ggml.{name}" for name in (*OF_TOKENS, *FLAGS, *(f"{name}_token_id" for name in IDS))),
    "tokenizer.chat_template",
)
# Keys of llama.cpp that resemble one of `USED` and change no id of a text.
NEARLY_USED = (
    *(f"tokenizer.ggml.{name}_token_id" for name in ("eom", "eog", "eod", "seperator", "cls", "mask", "prefix")),
    *("tokenizer.ggml.add_sep_token", "tokenizer.ggml.token_type_count", "tokenizer.chat_templates"),
)


def tokenizer_from_gguf(metadata: dict) -> Tokenizer:
    """Load the tokenizer of a GGUF file.

    Arguments:
        metadata: the file's key-value pairs as Python values: lists, str, int, float, bool.

    Returns:
        The tokenizer.

    Raises:
        InputError: the metadata describe no tokenizer, or a kind that is not supported; the error names the kind.
    """
    keys = [key for key in metadata if not key.startswith("tokenizer.chat_template.")]  # they have names of their own
    refuse_near_keys(keys, USED, NEARLY_USED, "the GGUF file")
    model = metadata.get("tokenizer.ggml.model")
    tokens = _list(metadata, "tokens", str)
    kinds = _list(metadata, "token_type", int, default=[NORMAL] * len(tokens))
    ids = {name: _id(metadata, name, len(tokens)) for name in IDS}
    # As llama.cpp: a token that ends an answer is no text, even if the file types it as normal.
    ends = {ids["eos"], ids["eot"], *(i for i, token in enumerate(tokens) if token == TURN_END)}
    kinds = [CONTROL if kind == NORMAL and i in ends else kind for i, kind in enumerate(kinds)]
    if model == "llama":
        spec = _spm_spec(metadata, tokens, kinds, ids["unknown"])
        add_bos = True
    elif model == "gpt2":
        pre = metadata.get("tokenizer.ggml.pre", "default")
        if not isinstance(pre, str):
            raise InputError("tokenizer.ggml.pre of the GGUF file must be a string.")
        if pre not in PRE_TOKENIZERS:
            raise InputError(
                f"the GGUF file has the pre-tokenizer {short(pre)!r}, which is none of the {len(PRE_TOKENIZERS)} "
                "supported; take the model's folder with its tokenizer.json."
            )
        spec = _byte_level_spec(metadata, tokens, kinds, pre)
        add_bos = PRE_TOKENIZERS[pre].add_bos
    else:
        raise InputError(f"the GGUF file has a tokenizer of the kind {short(model)!r}; llama and gpt2 are supported.")
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise InputError("tokenizer.chat_template of the GGUF file must be a string.")
    return Tokenizer(
        FastTokenizer(spec, "the tokenizer of the GGUF file"),
        bos_token_id=ids["bos"],
        eos_token_ids=[i for i in (ids["eos"], ids["eot"]) if i is not None],
        pad_token_id=ids["padding"],
        unk_token_id=ids["unknown"],
        add_bos=_flag(metadata, "add_bos_token", add_bos),
        add_eos=_flag(metadata, "add_eos_token", False),
        chat_template=template,
    )


def _spm_spec(metadata: dict, tokens: list[str], kinds: list[int], unk_id: int | None) -> dict:
    """The contents of a ``tokenizer.json`` for a SentencePiece vocabulary."""
    scores = [float(score) for score in _list(metadata, "scores", (int, float), length=len(tokens))]
    unk_id = tokens.index("<unk>") if unk_id is None and "<unk>" in tokens else unk_id
    model = SpmModel(tokens, scores, kinds, unk_id=unk_id, bos_id=None)
    return fast_spec(model, space_prefix=_flag(metadata, "add_space_prefix", True))


def _byte_level_spec(metadata: dict, tokens: list[str], kinds: list[int], pre: str) -> dict:
    """The contents of a ``tokenizer.json`` for a byte-level vocabulary."""
    vocab = unique_ids(tokens)
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges", str)]
    wrong = next((pair for pair in merges if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys()), None)
    if wrong:
        raise InputError(f"the GGUF file has a merge, {short(' '.join(wrong))!r}, of tokens that it does not list.")
    added = [
        added_token(i, token, special=kind != USER_DEFINED)
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre].spec(),
        "post_processor": None,
        "decoder": BYTES,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "ignore_merges": PRE_TOKENIZERS[pre].ignore_merges,
        },
    }


def _list(
    metadata: dict, name: str, kind: type | tuple, length: int | None = None, default: list | None = None
) -> list:
    """``tokenizer.ggml.<name>``, checked to be a list of ``kind``, and as long as ``length`` or ``default`` says."""
    values = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(values, list):
        raise InputError(f"the GGUF file has no list tokenizer.ggml.{name}; it carries no tokenizer that can be used.")
    if not all(isinstance(value, kind) for value in values):
        raise InputError(f"tokenizer.ggml.{name} of the GGUF file holds values of the wrong type.")
    length = len(default) if default is not None else length
    if length is not None and len(values) != length:
        raise InputError(f"tokenizer.ggml.{name} of the GGUF file has {len(values)} entries for {length} tokens.")
    return values


def _flag(metadata: dict, name: str, default: bool) -> bool:
    """``tokenizer.ggml.<name>``, checked to be true or false."""
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise InputError(f"tokenizer.ggml.{name} of the GGUF file is {short(value)!r}; it must be true or false.")
    return value


def _id(metadata: dict, name: str, size: int) -> int | None:
    """``tokenizer.ggml.<name>_token_id``, checked to be below ``size``; None where it is missing."""
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is not None and type(value) is not int:
        raise InputError(f"tokenizer.ggml.{name}_token_id of the GGUF file is {value!r}; it must be a whole number.")
    if value is not None and not 0 <= value < size:
        raise InputError(f"tokenizer.ggml.{name}_token_id of the GGUF file is {value}, outside its {size} tokens.")
    return value
