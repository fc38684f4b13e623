"""Pre-tokenizers of byte-level vocabularies in GGUF files, by llama.cpp's names. They split a text before the merges.

The patterns are those of the models' own ``tokenizer.json``, in the order of llama.cpp's table (llama-vocab.cpp). Each
pattern splits the pieces of the pattern before it. A match is a piece, and so is the text between two matches.
"""

from dataclasses import dataclass
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LINES = r"\s*[\r\n]+"
_SPACES = r"\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


def _llama(digits: str, marks: str = _MARKS, lines: str = _LINES, spaces: str = _SPACES, short: str = _SHORT) -> str:
    """The pattern of Llama 3 and related models, which differ in the number of digits in a piece."""
    return f"{short}|{_WORD}|{digits}|{marks}|{lines}|{spaces}"


def _cased(digits: str, short: str = "") -> str:
    """The pattern of GPT-4o and Tekken: a word starts where an uppercase letter follows a lowercase one."""
    begin, end = r"[^\r\n\p{L}\p{N}]?", short and f"{short}?"
    words = f"{begin}{_UPPER}*{_LOWER}+{end}|{begin}{_UPPER}+{_LOWER}*{end}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}|{_SPACES}"


def _deepseek(marks_end: str) -> str:
    words = rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    return rf"{words}| ?[\p{{P}}\p{{S}}]+{marks_end}|{_SPACES}"


# Letters that have uppercase and lowercase forms, as the first DeepSeek models list them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True)
class PreTokenizer:
    """The patterns of a pre-tokenizer, in the order in which they are applied, and the options that go with them."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token becomes that token, whatever its merges give
    add_bos: bool = False  # the default of tokenizer.ggml.add_bos_token

    def spec(self) -> dict[str, Any]:
        """The ``pre_tokenizer`` of a ``tokenizer.json``."""
        steps: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        return {"type": "Sequence", "pretokenizers": [*steps, BYTES]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

_LLAMA3 = _llama(r"\p{N}{1,3}")
_QWEN2 = _llama(r"\p{N}")
_DIGITS_GPT2 = (r"\p{N}", GPT2)
_DEEPSEEK3 = (r"\p{N}{1,3}", _CJK, _deepseek(rf"[\r\n]*|{_LINES}"))
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

# The names of each kind, as in tokenizer.ggml.pre of GGUF files, and its pre-tokenizer.
_KINDS: tuple[tuple[str, PreTokenizer], ...] = (
    ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _llama(r"\p{N}+")), ignore_merges=True)),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("glm4", PreTokenizer((_LLAMA3,), ignore_merges=True)),
    (
        "jais-2",
        PreTokenizer(
            (
                _llama(
                    r"\p{N}{1,3}",
                    spaces="|".join([rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)])
                    + r"|\s{1,2}(?!\S)|\s{1}",
                ),
            )
        ),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                "[\r\n]",
                rf"\s?[{_CASED_LETTERS}]+",
                "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                r"\s+$",
                _DEEPSEEK_HAN,
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer(_DEEPSEEK3)),
    ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"))),
    (
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert",
        PreTokenizer((GPT2,)),
    ),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", PreTokenizer(_DIGITS_GPT2)),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        PreTokenizer((_QWEN2,)),
    ),
    (
        "qwen35",
        PreTokenizer(
            (
                rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
                rf"|{_LINES}|{_SPACES}",
            )
        ),
    ),
    ("bloom poro-chat gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    ("tekken", PreTokenizer((_cased(r"\p{N}"),), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_cased(r"\p{N}{1,3}", _SHORT),))),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer((_llama(r"\p{N}", lines=r"\s*[\r\n]", short="'(?i:[sdmt]|ll|ve|re)"),)),
    ),
    ("seed-coder", PreTokenizer((_llama(r"\p{N}", marks=r" ?[^\s\p{L}\p{N}\r\n]+"),))),
)
PRE_TOKENIZERS = {name: kind for names, kind in _KINDS for name in names.split()}
