"""Text from a prompt.

    python -m minicpm_jax.generate --model openbmb/MiniCPM-2B-sft-bf16 --prompt "What is the capital of China?"

``--model`` left out is the built-in model. The prompt is put into the checkpoint's chat template once.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from minicpm_data import generation
from minicpm_data.streaming import Response, stream_text

if TYPE_CHECKING:
    from minicpm_data.tokenizer import Tokenizer
    from minicpm_jax.model import Model


def stream_generate(
    model: "Model",
    tokenizer: "Tokenizer | None",
    prompt: str | Sequence[int],
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> Iterator[Response]:
    """Yield a `Response` (``text``, ``token``, ``finish_reason``) for each new token.

    ``prompt``: a text (BOS is added once, no template) or token ids. The sampling options are those of
    `minicpm_data.generation.Sampling`. An answer ends at an EOS id of config, generation config or tokenizer, at a
    string of ``stop`` (not part of the text), or after ``max_tokens``. Raises `InputError` for options out of range.
    """
    sampling = generation.Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    ids = generation.prompt_ids(tokenizer, prompt, model.config.vocab_size)
    ends = generation.end_ids(model, tokenizer)
    from minicpm_jax.decoding import stream_tokens

    steps = stream_tokens(model, [ids], generation.check_max_tokens(max_tokens), sampling, ends)
    return stream_text((int(tokens[0]) for tokens in steps), tokenizer, ends, stop, max_tokens)


def generate(
    model: "Model",
    tokenizer: "Tokenizer | None",
    prompt: str | Sequence[int],
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> str:
    """The whole answer of `stream_generate`."""
    options = (max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop)
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, *options))


def batch_generate(
    model: "Model",
    tokenizer: "Tokenizer | None",
    prompts: Sequence[str | Sequence[int]],
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> list[list[Response]]:
    """The `Response` lists of several prompts of any lengths, computed together; each equal to a single run (sampled
    rows draw from streams of their own)."""
    sampling = generation.Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    ids = [generation.prompt_ids(tokenizer, prompt, model.config.vocab_size) for prompt in prompts]
    ends = generation.end_ids(model, tokenizer)
    if not ids:
        return []
    from minicpm_jax.decoding import stream_tokens

    steps = list(stream_tokens(model, ids, generation.check_max_tokens(max_tokens), sampling, ends))
    rows = zip(*steps, strict=True)
    return [list(stream_text(map(int, row), tokenizer, ends, stop, max_tokens)) for row in rows]


if __name__ == "__main__":
    from minicpm_data import commands

    commands.run_generate("minicpm_jax")
