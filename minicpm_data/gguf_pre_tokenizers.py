"""How a byte-level vocabulary of a GGUF file cuts text before its merges, by llama.cpp's names for it.

The patterns are those of the models' own ``tokenizer.json``, in the order of llama.cpp's table (llama-vocab.cpp). One is
applied to the pieces of the one before; what it matches and what lies between are pieces of their own.
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
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


def _llama(digits: str, marks: str = _MARKS, lines: str = _LINES, spaces: str = _SPACES, short: str = _SHORT) -> str:
    """The pattern of Llama 3 and its kin, which differ in how many digits are a piece."""
    return f"{short}|{_WORD}|{digits}|{marks}|{lines}|{spaces}"


def _cased(digits: str, short: str = "") -> str:
    """The pattern of GPT-4o and Tekken: a word begins where an upper case letter follows a lower case one."""
    begin, end = r"[^\r\n\p{L}\p{N}]?", short and f"{short}?"
    words = f"{begin}{_UPPER}*{_LOWER}+{end}|{begin}{_UPPER}+{_LOWER}*{end}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}|{_SPACES}"


def _deepseek(marks_end: str) -> str:
    words = rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    return rf"{words}| ?[\p{{P}}\p{{S}}]+{marks_end}|{_SPACES}"


# Letters that have a case, as the first DeepSeek models list them.
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄ"
    "ῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)


@dataclass(frozen=True)
class PreTokenizer:
    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is taken as it stands, whatever its merges give
    add_bos: bool = False  # where tokenizer.ggml.add_bos_token does not say

    def spec(self) -> dict[str, Any]:
        """As the ``pre_tokenizer`` of a ``tokenizer.json``."""
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

# The names of each kind, as GGUF files have them in tokenizer.ggml.pre.
_KINDS: tuple[tuple[str, PreTokenizer], ...] = (
    ("default", PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _llama(r"\p{N}+")), ignore_merges=True)),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer((_LLAMA3,))),
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
                r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
                r"\s+$",
                "[一-龥ࠀ-一가-퟿]+",
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"))),
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
        "tiny_aya cohere2moe",
        PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _cased(r"\p{N}{1,3}", _SHORT))),
    ),
    ("superbpe", PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer((_llama(r"\p{N}", lines=r"\s*[\r\n]", short="'(?i:[sdmt]|ll|ve|re)"),)),
    ),
    ("seed-coder", PreTokenizer((_llama(r"\p{N}", marks=r" ?[^\s\p{L}\p{N}\r\n]+"),))),
)
PRE_TOKENIZERS = {name: kind for names, kind in _KINDS for name in names.split()}
