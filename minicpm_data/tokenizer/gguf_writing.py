"""Write a tokenizer as the metadata of a GGUF file, of which `gguf_tokenizer` is the reader.

GGUF has no place for the steps of a ``tokenizer.json``: it names a kind of vocabulary and, for byte-level ones, a
pre-tokenizer of llama.cpp. So the metadata are read back, and the two tokenizers must agree on `PROBES`.
"""

from collections.abc import Mapping
from typing import Any

from minicpm_data.tokenizer.gguf_pre_tokenizers import GPT2, PRE_TOKENIZERS
from minicpm_data.tokenizer.gguf_tokenizer import tokenizer_from_gguf
from minicpm_data.tokenizer.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from minicpm_data.tokenizer.tokenizer import Tokenizer
from weights_io.errors import InputError, short

BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
PROBES = (
    "Hello world! It's 12,345.67 and don't\n\n\tstop  here   .",
    " 你好，世界！今天是2024年10月31日。　全角空格",
    "def f(x):\n    return x ** 2  # 平方 🙂👍🏽\r\n",
    "Größe naïve coöperate résumé ¿qué? Привет мир नमस्ते مرحبا 日本語テスト 한국어",
    "a  b   c    d\u00a0e\u200bf x=1;y=[1,2];z={'k':3}<html>&amp;</html> 1234567890 ½ ²",
)


def metadata_of(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The ``tokenizer.*`` keys of a GGUF file.

    Arguments:
        tokenizer: the tokenizer.
        rows: of the embedding; ids without a token become unused tokens.

    Returns:
        Key -> value.

    Raises:
        InputError: GGUF has no place for a part of the tokenizer.
    """
    spec = tokenizer._fast.spec()
    added = {token["id"]: token for token in spec["added_tokens"]}
    names = {i: name for name, i in spec["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    tokens = [names.get(i, f"[UNUSED_{i}]") for i in range(max(rows, *(i + 1 for i in names)))]
    spm = bool(spec["model"].get("byte_fallback"))
    kinds = [_kind(i, names, added, spec["model"].get("unk_token"), spm) for i in range(len(tokens))]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if spm else "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": bool(tokenizer._before),
        "tokenizer.ggml.add_eos_token": bool(tokenizer._after),
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"]]
    if spm:
        metadata["tokenizer.ggml.pre"] = "default"
        metadata["tokenizer.ggml.scores"] = _scores(tokens, merges)
        metadata["tokenizer.ggml.add_space_prefix"] = _space_prefix(spec)
    else:
        metadata["tokenizer.ggml.pre"] = _pre_tokenizer(spec)
        metadata["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    ends = [*tokenizer.eos_token_ids[:2], None, None][:2]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": ends[0],
        "eot": ends[1],
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    metadata |= {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    _check(tokenizer, metadata)
    return metadata


def _kind(i: int, names: Mapping[int, str], added: Mapping[int, Any], unknown: str | None, spm: bool) -> int:
    if i not in names:
        return UNUSED
    if spm and names[i] == unknown:
        return UNKNOWN
    if i in added:
        return CONTROL if added[i]["special"] else USER_DEFINED
    return BYTE if spm and names[i] in BYTE_TOKENS else NORMAL


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """A score for each token, with which the merges come in the order of the file."""
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _space_prefix(spec: Mapping[str, Any]) -> bool:
    """Whether a text begins with "▁". Raises `InputError` for steps that GGUF cannot name."""
    normalizer, before = spec["normalizer"], spec["pre_tokenizer"]
    steps = (
        normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else [normalizer] * bool(normalizer)
    )
    if before is None and steps in ([PREPEND, SPACES], [SPACES]):
        return steps[0] == PREPEND
    if not steps and before and before.get("type") == "Metaspace" and not before.get("split", True):
        return before.get("prepend_scheme") != "never"
    raise InputError("GGUF has no place for the normalizer of this tokenizer; the file cannot hold it.")


def _pre_tokenizer(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises `InputError` where it has none."""
    if spec["normalizer"] is not None:
        raise InputError(f"GGUF has no place for the normalizer {spec['normalizer']['type']} of this tokenizer.")
    before = spec["pre_tokenizer"] or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    patterns = []
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                patterns += [GPT2] * step["use_regex"]
            case _:
                raise InputError(f"llama.cpp has no pre-tokenizer with the step {short(str(step.get('type')))!r}.")
    ignore = bool(spec["model"].get("ignore_merges"))
    for name, kind in PRE_TOKENIZERS.items():
        if list(kind.patterns) == patterns and kind.ignore_merges == ignore:
            return name
    raise InputError(f"llama.cpp has no pre-tokenizer with the pattern {short(' | '.join(patterns))!r}.")


def _check(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Raises `InputError` where the tokenizer that is read back differs."""
    back = tokenizer_from_gguf(metadata)
    for text in PROBES:
        if back.encode(text) != tokenizer.encode(text):
            raise InputError(
                f"as a GGUF file the tokenizer would give other ids, such as for {short(text)!r}; its steps have no "
                "place there."
            )
