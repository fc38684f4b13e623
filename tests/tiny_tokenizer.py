"""A small vocabulary of MiniCPM's kind, trained in a second, and folders that hold it."""

import functools
import io
import json
from pathlib import Path

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Hello world, this is the story of a little fox that went to the sea.",
    "你好，世界。今天的天气很好，我们去看海吧。",
    "模型用中文和英文回答问题：你好，请问海在哪里？",
    "def answer(x):\n    return x + 1\n",
    "In 1998 there were 42 foxes and 7 dogs.",
]
CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def spm_bytes(model_type: str = "bpe") -> bytes:
    """A ``tokenizer.model`` with byte fallback, single digits, no dummy prefix and some user-defined pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        model_type=model_type,
        vocab_size=480,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        user_defined_symbols=["\n", "\t", "<td>", "<reserved_1>"],
        minloglevel=2,
    )
    return model.getvalue()


def sentencepiece_model():
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=spm_bytes())


def write(folder: Path, files: dict[str, bytes | str | dict] | None = None, **config) -> Path:
    """``folder`` with a ``tokenizer.model``, its config (``CONFIG`` and ``config``), and ``files`` as well."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"tokenizer.model": spm_bytes(), "tokenizer_config.json": {**CONFIG, **config}, **(files or {})}
    for name, content in contents.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def as_json(space_prefix: bool = True) -> dict:
    """The vocabulary as a ``tokenizer.json``."""
    import tempfile

    from minicpm_data.tokenizer.sentencepiece import fast_spec, read_spm

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(spm_bytes())
        return fast_spec(read_spm(path), space_prefix)


def special(content: str, **flags) -> dict:
    return {"content": content, "special": True, **flags}
