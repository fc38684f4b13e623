"""Readers of text: tokenizers of every form, chat templates, training data, options."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import binary, parts, raw, templates, texts, trees
from fuzzing.mutant import FREE, REFUSED, Mutator, Reader, always

TEXTS = [
    "",
    " ",
    "Hello world, the fox.",
    "  two  spaces\n\n\tand 12345",
    "你好，世界 👍🏽",
    "a</s>b<s>",
    "<td>\n<reserved_1>",
    "é\u0301\u202e\0x",
]
CHAT = [
    {"role": "user", "content": "</s> Hello <用户>"},
    {"role": "assistant", "content": " I am "},
    {"role": "user", "content": "go on"},
]
CONFIG = "tokenizer_config.json"


def said(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer makes of tricky texts."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    return {
        "ids": ids,
        "decoded": [tokenizer.decode(found) for found in ids],
        "chat": tokenizer.apply_chat(CHAT),
        "special": [tokenizer.bos_token_id, list(tokenizer.eos_token_ids), tokenizer.vocab_size],
    }


def tokenizer(folder: Path) -> dict[str, Any]:
    from minicpm_data import load_tokenizer

    return said(load_tokenizer(folder))


def gguf_llama() -> dict[str, Any]:
    import tiny_tokenizer

    model = tiny_tokenizer.sentencepiece_model()
    n = model.get_piece_size()
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in range(n)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(n)],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(n)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def gguf_gpt2() -> dict[str, Any]:
    import tiny_tokenizer

    from minicpm_data.tokenizer.detokenizer import BYTE_OF_CHAR

    merges = ["1 2", "12 3", "Ġ w", "o r", "Ġw or", "ä ½", "ä½ ł"]
    tokens = ["<|im_start|>", "<|im_end|>", *BYTE_OF_CHAR, *(merge.replace(" ", "") for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": tiny_tokenizer.CHATML,
    }


def fast(folder: Path) -> None:
    """A ``tokenizer.json`` with every part that files of the family have."""
    import tiny_tokenizer

    folder.mkdir(exist_ok=True)
    spec = tiny_tokenizer.as_json()
    at = max(spec["model"]["vocab"].values()) + 1
    spec["added_tokens"].append({"id": at, **FLAGS, "content": "<|im_end|>", "special": True})
    spec["added_tokens"].append({"id": at + 1, **FLAGS, "content": "<think>", "special": False})
    digits = {"type": "Split", "pattern": {"Regex": r"\d{1,3}"}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits]}
    config = {**tiny_tokenizer.CONFIG, "eos_token": "<|im_end|>", "chat_template": tiny_tokenizer.CHATML}
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def slow(folder: Path) -> None:
    """A ``tokenizer.model`` with all the files that may stand beside it."""
    import tiny_tokenizer

    added = {"content": "<|im_end|>", **FLAGS, "special": True}
    size = tiny_tokenizer.sentencepiece_model().get_piece_size()
    files: dict[str, Any] = {
        "special_tokens_map.json": {"eos_token": "</s>", "unk_token": {"content": "<unk>", **FLAGS}},
        "added_tokens.json": {"<|extra|>": size + 1},
        "chat_template.jinja": tiny_tokenizer.CHATML,
    }
    tiny_tokenizer.write(folder, files, added_tokens_decoder={str(size): added})


def tokenizer_files(folder: str = "") -> list[tuple[int, Mutator]]:
    """Mutators of a ``tokenizer.model`` and its config."""
    model, config = f"{folder}tokenizer.model", f"{folder}{CONFIG}"
    return [
        (2, raw.bytes_of([model], always(FREE))),
        (2, binary.protobuf_of(model)),
        (4, trees.json_of(config, trees.json_judge(passed_over=True))),
        (1, raw.special([model, config])),
    ]


def contents(path: str) -> bool:
    """Whether what stands there in a tokenizer.json is the vocabulary itself."""
    return path.startswith(("model/vocab/", "model/merges/"))


def companions() -> list[tuple[int, Mutator]]:
    names = [CONFIG, "special_tokens_map.json", "added_tokens.json"]

    def judge(name: str) -> Any:
        return trees.json_judge(free=lambda path: name == "added_tokens.json" and path != "", passed_over=True)

    found: list[tuple[int, Mutator]] = [(6 - i, trees.json_of(name, judge(name))) for i, name in enumerate(names)]
    found += [(1, raw.bytes_of([name], judge(name))) for name in names]
    return [*found, (1, raw.special([*names, "tokenizer.model"]))]


def templated(folder: Path) -> None:
    """Rendering alone: no template can tell what it was. The answer may be long, and is not kept."""
    from minicpm_data import load_tokenizer

    found = load_tokenizer(folder)
    found.apply_chat(CHAT)
    found.chat_example(CHAT[:2])


LINES: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + 1 = ?"},
            {"role": "assistant", "content": "2"},
        ]
    },
    {"conversations": [{"from": "human", "value": "fox?"}, {"from": "gpt", "value": "dog"}]},
    {
        "conversations": [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "dog"}],
        "system": "Be kind.",
    },
    {"prompt": "the sea", "completion": "is blue"},
    {"content": "类型#裤", "summary": "好看的裤"},
    {"input": "类型#裤", "prompt": "/n请生成", "output": "好看"},
    {"sentence1": "天气很好", "sentence2": "下雨", "label": "contradiction"},
    {"text": "The quick brown fox jumps over the lazy dog."},
]
PAIRS: list[dict[str, Any]] = [
    {"prompt": "the sea", "chosen": "is blue", "rejected": "is red"},
    {
        "conversations": [{"from": "human", "value": "fox?"}],
        "chosen": {"from": "gpt", "value": "dog"},
        "rejected": {"from": "gpt", "value": "cat"},
    },
    {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"},
]
ADDED = trees.json_judge(added=REFUSED)


def data(lines: list[dict[str, Any]], array: bool = False) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import tiny_tokenizer

        tiny_tokenizer.write(folder / "tokenizer")
        texts_of = [json.dumps(line, ensure_ascii=False) for line in lines]
        name, text = (
            ("train.json", f"[{', '.join(texts_of)}]") if array else ("train.jsonl", "\n".join(texts_of) + "\n")
        )
        (folder / name).write_text(text, encoding="utf-8")

    return make


def examples(folder: Path, pairs: bool = False) -> list[Any]:
    from minicpm_data import load_split, load_tokenizer

    found = load_split(folder, "train", load_tokenizer(folder / "tokenizer"), 2048, pairs=pairs)
    return [[(part.ids, part.trained) for part in item.parts] for item in found.examples]


def preferences(folder: Path) -> list[Any]:
    return examples(folder, pairs=True)


def lines(name: str) -> list[tuple[int, Mutator]]:
    judge = trees.lines_judge(ADDED)
    found: list[tuple[int, Mutator]] = [(8, trees.lines_of(name, ADDED)), (3, raw.bytes_of([name], judge))]
    return [*found, (1, raw.spliced([name], always(FREE))), (1, raw.special([name]))]


OPTIONS = """data: data
seed: 3
num_layers: 2
batch_size: 2
iters: 30
learning_rate: 1e-5
steps_per_eval: 20
resume_adapter_file: null
mask_prompt: false
grad_checkpoint: true
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule: {name: cosine_decay, warmup: 10, warmup_init: 1e-7, arguments: [2e-5, 30, 1e-7]}
"""


def options(folder: Path) -> str:
    """The options that a command would train with."""
    from minicpm_data.training.options import LoraOptions, check
    from minicpm_data.training.yaml_config import flags_of_file
    from weights_io import command_line

    found: list[str] = []

    def main(options: LoraOptions) -> None:
        check(options)
        found.append(repr(options))

    sys.argv = ["lora", "--config", "options.yaml"]
    command_line.run(main, LoraOptions, "lora", lambda given: flags_of_file(given.config or Path(), LoraOptions))
    return found[0]


def configured(folder: Path) -> None:
    (folder / "options.yaml").write_text(OPTIONS, encoding="utf-8")
    data(LINES)(folder / "data")


JSON = "tokenizer.json"
JSON_JUDGE = trees.json_judge(free=contents)
TEMPLATE: list[tuple[int, Mutator]] = [
    (12, templates.template_of()),
    (2, raw.bytes_of([templates.NAME], always(FREE))),
    (1, raw.special([templates.NAME])),
]
YAML: list[tuple[int, Mutator]] = [
    (10, texts.yaml_of("options.yaml")),
    (2, raw.bytes_of(["options.yaml"], always(FREE))),
    (1, raw.special(["options.yaml"])),
]
ARRAY: list[tuple[int, Mutator]] = [
    (5, trees.json_of("train.json", ADDED)),
    (2, raw.bytes_of(["train.json"], always(FREE))),
    (1, raw.special(["train.json"])),
]
READERS = [
    Reader(
        "tokenizer-json",
        20,
        fast,
        tokenizer,
        [
            (8, parts.parts_of(JSON)),
            (7, trees.json_of(JSON, JSON_JUDGE)),
            (2, raw.bytes_of([JSON], JSON_JUDGE)),
            (3, trees.json_of(CONFIG, trees.json_judge(passed_over=True))),
            (1, raw.spliced([JSON], JSON_JUDGE)),
            (1, raw.special([JSON, CONFIG])),
        ],
        needs=(),
    ),
    Reader("tokenizer-model", 8, slow, tokenizer, tokenizer_files(), needs=()),
    Reader("tokenizer-config", 12, slow, tokenizer, companions(), needs=()),
    Reader("template", 16, slow, templated, TEMPLATE, needs=()),
    Reader("data", 12, data(LINES), examples, lines("train.jsonl"), needs=()),
    Reader("data-array", 3, data(LINES, array=True), examples, ARRAY, needs=()),
    Reader("data-pairs", 3, data(PAIRS), preferences, lines("train.jsonl"), needs=()),
    Reader("options", 8, configured, options, YAML, needs=()),
]
