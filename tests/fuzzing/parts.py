"""Parts of a ``tokenizer.json`` in all forms that the library has, with numbers and texts that it does not check."""

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

from fuzzing.mutant import FREE, Expect, Mutator, changed

SIZES = [0, 1, 2, 3, 7, 255, 10**6, 2**31 - 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, -1, 1.5]
CHARS = ["", " ", "▁", "a", "##", "\0", "中", "👍🏽", "e\u0301", "</s>", "x" * 100_000]
REGEXES = [
    "",
    "a*",
    "(a+)+$",
    "(?:a|aa)+b",
    "[",
    "(",
    "\\p{L}+",
    "(?i:x)",
    ".*",
    "^",
    "\\b",
    "(?=a)",
    "(.)\\1",
    "x{99999}",
    "(" * 5000,
]
REGEXES += ["(x+x+)+y", "\\G", "[^\\s\\S]", "(?<!a)b", ".{0,9999}" * 9, "|" * 9999]


def size(random: Random) -> Any:
    return random.choice(SIZES)


def pattern(random: Random) -> dict[str, str]:
    return random.choice([{"Regex": random.choice(REGEXES)}, {"String": random.choice(CHARS)}])


def normalizer(random: Random, depth: int = 0) -> Any:
    plain = [{"type": kind} for kind in "NFC NFD NFKC NFKD Lowercase StripAccents Nmt".split()]
    forms: list[Any] = [
        random.choice(plain),
        {
            "type": "Precompiled",
            "precompiled_charsmap": random.choice(["AAAA", "", "/////w==", "AAAAAAAAAAAA", "A" * 4000, "?"]),
        },
        {"type": "Replace", "pattern": pattern(random), "content": random.choice(CHARS)},
        {"type": "Prepend", "prepend": random.choice(CHARS)},
        {"type": "Strip", "strip_left": random.random() < 0.5, "strip_right": True},
        {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        {"type": "ByteLevel"},
        None,
    ]
    return _in_sequence(random, forms, "normalizers", normalizer, depth)


def pre_tokenizer(random: Random, depth: int = 0) -> Any:
    behaviors = ["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
    split = {
        "type": "Split",
        "pattern": pattern(random),
        "behavior": random.choice(behaviors),
        "invert": random.random() < 0.5,
    }
    scheme = random.choice(["always", "never", "first"])
    forms: list[Any] = [
        split,
        split,
        {"type": "FixedLength", "length": size(random)},
        {"type": "ByteLevel", "add_prefix_space": random.random() < 0.5, "trim_offsets": True, "use_regex": True},
        {"type": "Metaspace", "replacement": random.choice(CHARS), "prepend_scheme": scheme, "split": True},
        {"type": "CharDelimiterSplit", "delimiter": random.choice(CHARS)},
        {"type": "Punctuation", "behavior": random.choice(behaviors)},
        {"type": "Digits", "individual_digits": True},
        random.choice(
            [{"type": kind} for kind in "BertPreTokenizer Whitespace WhitespaceSplit UnicodeScripts".split()]
        ),
        None,
    ]
    return _in_sequence(random, forms, "pretokenizers", pre_tokenizer, depth)


def post_processor(random: Random, depth: int = 0) -> Any:
    def piece() -> dict[str, Any]:
        name = random.choice(["<s>", "</s>", "<nothing>", "", "A"])
        kind = random.choice([0, 1, 2**32 - 1, 2**32, -1])
        sequence = {"Sequence": {"id": random.choice("ABC"), "type_id": kind}}
        return random.choice([{"SpecialToken": {"id": name, "type_id": kind}}, sequence])

    def tokens() -> dict[str, Any]:
        ids = random.choice([[1], [2], [], [10**6], [2**32 - 1], [1, 2, 3], [1] * 100_000])
        names = random.choice([["<s>"], [], ["<s>"] * len(ids), ["zq"]])
        return {name: {"id": name, "ids": ids, "tokens": names} for name in ("<s>", "</s>")}

    single, pair = ([piece() for _ in range(random.randrange(5))] for _ in range(2))
    forms: list[Any] = [
        {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": random.choice([tokens(), {}])},
        {"type": "BertProcessing", "sep": ["</s>", size(random)], "cls": ["<s>", size(random)]},
        {
            "type": "RobertaProcessing",
            "sep": ["</s>", 2],
            "cls": ["<s>", 1],
            "trim_offsets": True,
            "add_prefix_space": True,
        },
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
        None,
    ]
    return _in_sequence(random, forms, "processors", post_processor, depth)


def decoder(random: Random, depth: int = 0) -> Any:
    forms: list[Any] = [
        {"type": "Replace", "pattern": pattern(random), "content": random.choice(CHARS)},
        {"type": "Strip", "content": random.choice(CHARS), "start": size(random), "stop": size(random)},
        {"type": "Metaspace", "replacement": random.choice(CHARS), "prepend_scheme": "always", "split": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "WordPiece", "prefix": random.choice(CHARS), "cleanup": True},
        {"type": "BPEDecoder", "suffix": random.choice(CHARS)},
        {"type": "CTC", "pad_token": random.choice(CHARS), "word_delimiter_token": "|", "cleanup": True},
        random.choice([{"type": "ByteFallback"}, {"type": "Fuse"}, None]),
    ]
    return _in_sequence(random, forms, "decoders", decoder, depth)


def _in_sequence(random: Random, forms: list[Any], name: str, make: Callable[[Random, int], Any], depth: int) -> Any:
    """One of the forms, or some of them in a sequence."""
    if depth > 2 or random.random() < 0.6:
        return random.choice(forms)
    return {"type": "Sequence", name: [make(random, depth + 1) for _ in range(random.randrange(4))]}


PARTS = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder}


def part(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    """A normalizer, pre-tokenizer, post-processor or decoder in the place of what was there."""
    spec = json.loads(data)
    name = random.choice(sorted(PARTS))
    spec[name] = PARTS[name](random)
    if random.random() < 0.1:  # sequences within sequences
        inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
        for _ in range(random.choice([10, 100, 120])):
            spec[name] = {"type": "Sequence", inner.get(name, "decoders"): [spec[name]]}
    return f"{name} = {json.dumps(spec[name], ensure_ascii=False)[:100]}", _text(spec), FREE


def model(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    """A setting of the BPE model, its vocabulary or merges, or another model."""
    spec = json.loads(data)
    found = spec["model"]
    ids = random.choice([-1, 2**31, 2**32 - 1, 2**32, 10**7, 0, 1.5])
    token, other = random.sample(sorted(found["vocab"]), 2)
    settings: list[dict[str, Any]] = [
        {"continuing_subword_prefix": random.choice(CHARS)},
        {"end_of_word_suffix": random.choice(CHARS)},
        {"dropout": random.choice([0.0, 0.5, 1.0, 2.0, -1.0])},
        {"unk_token": random.choice([*CHARS, None])},
        {"byte_fallback": False, "fuse_unk": False},
        {"ignore_merges": True},
        {"cache_capacity": random.choice(SIZES)},
        {"vocab": {**found["vocab"], token: ids}},
        {"vocab": {**found["vocab"], "zq": ids}},
        {"vocab": {name: i for name, i in found["vocab"].items() if name != token}},
        {"vocab": {**found["vocab"], token: found["vocab"][other]}},
        {"vocab": {}},
        {
            "merges": [
                *found["merges"],
                random.choice([["zq", "zq"], [token], [], "a b c", "ab", ["", ""], [token, other]]),
            ]
        },
        {"merges": found["merges"][::-1]},
        {"merges": found["merges"] * 2},
        {"type": random.choice(["WordPiece", "WordLevel", "Unigram", "bpe", None])},
        {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1e308]], "unk_id": random.choice(SIZES)},
    ]
    chosen = random.choice(settings)
    spec["model"] = {**found, **chosen}
    return f"model with {json.dumps(chosen, ensure_ascii=False)[:100]}", _text(spec), FREE


def added(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    """One added token more or another, or settings of truncation and padding."""
    spec = json.loads(data)
    if random.random() < 0.2:
        strategy = random.choice([{"Fixed": size(random)}, "BatchLongest"])
        padding = {
            "strategy": strategy,
            "direction": "Right",
            "pad_to_multiple_of": size(random),
            "pad_id": 0,
            "pad_type_id": 0,
        }
        spec["padding"] = {**padding, "pad_token": "x"}
        spec["truncation"] = {
            "direction": "Right",
            "max_length": size(random),
            "strategy": "LongestFirst",
            "stride": size(random),
        }
        return "padding and truncation", _text(spec), FREE
    token = copy.deepcopy(random.choice(spec["added_tokens"]))
    token["id"] = random.choice([token["id"], 0, 5, 10**6, 2**31, 2**32 - 1, -1])
    token["content"] = random.choice([token["content"], *CHARS, "<|im_start|>"])
    for flag in ("special", "lstrip", "rstrip", "single_word", "normalized"):
        token[flag] = random.random() < 0.5
    spec["added_tokens"].insert(random.randrange(len(spec["added_tokens"]) + 1), token)
    if random.random() < 0.1:
        spec["added_tokens"] += [{**token, "id": i, "content": f"<zq{i}>"} for i in range(50_000)]
    return f"added token {str(token)[:100]}", _text(spec), FREE


def _text(spec: Any) -> bytes:
    return json.dumps(spec, ensure_ascii=False).encode()


def parts_of(name: str) -> Mutator:
    return changed(name, part, part, part, model, model, added)
