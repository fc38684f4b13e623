"""What the two backends' generators share: the options, the prompt's ids, the ids that end an answer, the public calls.

A backend hands over two functions, ``stream_tokens`` and ``stream_speculated``; `Generator` makes its
``stream_generate``, ``generate``, ``batch_generate`` and ``chat`` of them, so that both have the same names, signatures
and behaviour.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

from minicpm_data.generation.options import (
    ANSWER_TOKENS,
    CHAT_TEMPERATURE,
    CHAT_TOKENS,
    CHAT_TOP_P,
    MOST,
    CacheOptions,
    Sampling,
)
from minicpm_data.generation.responses import Response, stop_strings, stream_text
from minicpm_data.generation.speculation import Speculation
from weights_io.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = dict[str, str]


class Generator:
    """The public generation functions of a backend, given its ``stream_tokens(model, prompts, max_tokens, sampling,
    end_ids, memory)``: token ids [B], step after step; and its ``stream_speculated(model, prompt, max_tokens, sampling,
    end_ids, memory, speculation)``: a token id, and whether it was guessed."""

    def __init__(
        self,
        stream_tokens: "Callable[..., Iterator[np.ndarray]]",
        stream_speculated: Callable[..., Iterator[tuple[int, bool]]],
    ):
        self._stream_tokens, self._stream_speculated = stream_tokens, stream_speculated

    def stream_generate(
        self,
        model: Any,
        tokenizer: "Tokenizer | None",
        prompt: Prompt,
        max_tokens: int = ANSWER_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        draft_model: Any = None,
        num_draft_tokens: int = 3,
        prompt_lookup: bool = False,
        **memory: Any,
    ) -> Iterator[Response]:
        """Yield a `Response` (``text``, ``token``, ``finish_reason``, ``from_draft``) for each new token.

        ``prompt``: a text (BOS is added once, no template) or token ids. The sampling options are those of `Sampling`.
        An answer ends at an EOS id of config, generation config or tokenizer, at a string of ``stop`` (not part of the
        text), or after ``max_tokens``. ``draft_model``, ``num_draft_tokens``, ``prompt_lookup``: of `Speculation`; the
        same tokens, sooner. ``memory``: what is kept of the tokens so far, under the names of `CacheOptions`. Raises
        `InputError` for what is out of range.
        """
        sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
        ends, kept = end_ids(model, tokenizer), CacheOptions(**memory)
        speculation = Speculation(draft_model, prompt_lookup, num_draft_tokens)
        ids = self._prompts(model, tokenizer, [prompt], max_tokens)
        if not speculation.active:
            steps = self._stream_tokens(model, ids, max_tokens, sampling, ends, kept)
            return stream_text((int(tokens[0]) for tokens in steps), tokenizer, ends, stop, max_tokens)
        speculation.check(model, kept)
        found = self._stream_speculated(model, ids[0], max_tokens, sampling, ends, kept, speculation)
        return _marked(found, lambda tokens: stream_text(tokens, tokenizer, ends, stop, max_tokens))

    def generate(self, model: Any, tokenizer: "Tokenizer | None", prompt: Prompt, **options: Any) -> str:
        """The whole answer; ``options`` as in `stream_generate`."""
        return "".join(r.text for r in self.stream_generate(model, tokenizer, prompt, **options))

    def batch_generate(
        self,
        model: Any,
        tokenizer: "Tokenizer | None",
        prompts: Sequence[Prompt],
        max_tokens: int = ANSWER_TOKENS,
        stop: str | Sequence[str] = (),
        **options: Any,
    ) -> list[list[Response]]:
        """The `Response` lists of several prompts of any lengths, computed together; each equal to a single run
        (sampled rows draw from streams of their own). ``options`` as in `stream_generate`, but for guessing."""
        if not prompts:
            return []
        ends = end_ids(model, tokenizer)
        memory = CacheOptions(**{f.name: options.pop(f.name) for f in fields(CacheOptions) if f.name in options})
        sampling, ids = Sampling(**options), self._prompts(model, tokenizer, prompts, max_tokens)
        steps = list(self._stream_tokens(model, ids, max_tokens, sampling, ends, memory))
        rows = zip(*steps, strict=True)
        return [list(stream_text(map(int, row), tokenizer, ends, stop, max_tokens)) for row in rows]

    def chat(
        self,
        model: Any,
        tokenizer: "Tokenizer",
        query: str,
        history: Sequence[Message] | None = None,
        max_tokens: int = CHAT_TOKENS,
        temperature: float = CHAT_TEMPERATURE,
        top_p: float = CHAT_TOP_P,
        **options: Any,
    ) -> tuple[str, list[Message]]:
        """The reply to ``query`` after ``history`` (messages of role and content), and the history with both added.

        The defaults of temperature and top_p are the original's, and so is that the reply ends where the model writes
        ``<用户>`` or ``<AI>``, if the chat template has them; ``options`` as in `stream_generate`.
        """
        if tokenizer is None:
            raise InputError("a chat needs a tokenizer, and this checkpoint has none.")
        messages = [*(history or ()), {"role": "user", "content": query}]
        prompt = tokenizer.apply_chat(messages)
        options |= {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        options["stop"] = (*stop_strings(options.get("stop", ())), *tokenizer.turn_markers)
        reply = self.generate(model, tokenizer, prompt, **options).strip()
        return reply, [*messages, {"role": "assistant", "content": reply}]

    def _prompts(
        self, model: Any, tokenizer: "Tokenizer | None", prompts: Sequence[Prompt], max_tokens: int
    ) -> list[list[int]]:
        """Their ids; what cannot work is refused before the first token."""
        if not 1 <= max_tokens <= MOST:
            raise InputError(f"max_tokens is {max_tokens}; it must be from 1 to {MOST}.")
        return [prompt_ids(tokenizer, prompt, model.config.vocab_size) for prompt in prompts]


def _marked(
    found: Iterator[tuple[int, bool]], texts: Callable[[Iterator[int]], Iterator[Response]]
) -> Iterator[Response]:
    """The responses to tokens, of which each comes as it is asked for; those that were guessed are marked."""
    from_draft = False

    def tokens() -> Iterator[int]:
        nonlocal from_draft
        for token, guessed in found:
            from_draft = guessed
            yield token

    return (replace(response, from_draft=from_draft) for response in texts(tokens()))


class Device(Protocol):
    """What a backend's ``device.py`` says of where its programs run."""

    preferred_dtype: Callable[..., str]

    def description(self) -> str: ...
    def is_first(self) -> bool: ...
    def note_mesh(self, model: Any, rows: int) -> None: ...
    def peak_memory(self) -> int: ...
    def compile_seconds(self) -> float: ...


@dataclass(frozen=True)
class Backend:
    """What a backend hands over to the command lines."""

    load: Callable[..., tuple[Any, "Tokenizer | None"]]
    generator: Generator
    device: Device
    for_decoding: Callable[[Any], Any]
    """The model in the form that decodes fastest; the one that was given is used up."""
    activation_sparsity: "Callable[[Any, Sequence[int]], np.ndarray]"


class PromptIds(list[int]):
    """What `prompt_ids` returns. Several answers to one prompt share it: it is neither checked nor copied again."""

    def __init__(self, ids: Sequence[int], vocab_size: int):
        super().__init__(ids)
        self.vocab_size = vocab_size


def prompt_ids(tokenizer: "Tokenizer | None", prompt: Prompt, vocab_size: int) -> PromptIds:
    """The ids of a prompt: a text gets BOS once and no template; ids are taken as they are."""
    if isinstance(prompt, PromptIds) and prompt.vocab_size == vocab_size:
        return prompt
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("a text prompt needs a tokenizer, and this checkpoint has none; give a list of token ids.")
        ids = tokenizer.encode(prompt)
    else:
        ids = [int(i) for i in prompt]
    if not ids:
        raise InputError("the prompt is empty; give at least one token.")
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise InputError(f"token id {wrong[0]} of the prompt is outside the vocabulary of {vocab_size}.")
    return PromptIds(ids, vocab_size)


def end_ids(model: Any, tokenizer: "Tokenizer | None") -> frozenset[int]:
    """The ids that end an answer: the union of config.json, generation_config.json and the tokenizer."""
    return frozenset([*model.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())])
