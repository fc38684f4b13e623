"""The public generation functions, shared by the backends, and the interface that a backend implements for them.

`Generator` builds ``stream_generate``, ``generate``, ``batch_generate`` and ``chat`` on a backend's `Decoding`, so that
both backends have the same names, signatures and behavior.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from minicpm_data.conversation.messages import with_images
from minicpm_data.generation.image_prompt import chat_prompt
from minicpm_data.generation.options import (
    ANSWER_TOKENS,
    CHAT_TOKENS,
    PLAIN_CACHE,
    CacheOptions,
    Sampling,
    cache_and_others,
)
from minicpm_data.generation.request import GenerationRequest, ModelT, Prompt
from minicpm_data.generation.responses import Response, stop_strings, stream_text
from minicpm_data.generation.speculation import Speculation
from minicpm_data.generation.thinking import parser_of
from weights_io.errors import InputError, short

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.generation.engine import BatchEngine
    from minicpm_data.generation.prompt_cache import CachedPrompt, PromptCache
    from minicpm_data.tokenizer.tokenizer import Tokenizer

Message = dict[str, Any]


def answer_message(text: str, thought: str) -> Message:
    """An answer as a message of the history."""
    return {"role": "assistant", "content": text, **({"reasoning_content": thought} if thought else {})}


class Warming(Generic[ModelT]):
    """Prepares the next answers of a chat. A backend without programs to compile has nothing to prepare."""

    def claim(self, request: GenerationRequest) -> None:
        """Called before a request runs."""

    def follow(self, request: GenerationRequest, answer: int) -> None:
        """Prepare, in the background, the request that follows this one and its answer of so many tokens."""

    def close(self) -> None:
        """End the preparations."""


class Decoding(Protocol[ModelT]):
    """The generation functions of a backend."""

    def check(self, model: ModelT, request: GenerationRequest) -> None:
        """Raises `InputError` where the backend lacks the kind of cache, or the memory does not hold it."""

    def stream_tokens(self, model: ModelT, request: GenerationRequest) -> "Iterator[np.ndarray]":
        """Yield the next token id of every batch row, [B], step by step.

        It ends after ``max_tokens`` steps, or when every row has met an id of ``end_ids``. A finished row goes on with
        meaningless tokens. The request must have passed `check`.
        """

    def stream_speculated(
        self, model: ModelT, request: GenerationRequest, speculation: Speculation[ModelT]
    ) -> Iterator[tuple[int, bool]]:
        """Yield the tokens of `stream_tokens` for one prompt, each with whether it was a draft token."""

    def cached_prompt(self, model: ModelT, request: GenerationRequest) -> "CachedPrompt":
        """Prefill the one prompt of a request, and return its keys and values. The request must have passed `check`."""

    def warming(self, model: ModelT) -> Warming[ModelT]:
        """The preparations of a chat with this model."""

    def engine(
        self,
        model: ModelT,
        slots: int = 8,
        context: int | None = None,
        cache_options: CacheOptions = PLAIN_CACHE,
        cache_tokens: int | None = None,
        speculation: Speculation[ModelT] | None = None,
        prompt_cache: "PromptCache | None" = None,
    ) -> "BatchEngine[ModelT]":
        """The engine for concurrent requests; arguments as for `minicpm_data.generation.engine.BatchEngine`."""


class Generator(Generic[ModelT]):
    """The public generation functions of a backend."""

    def __init__(self, decoding: Decoding[ModelT]):
        self.decoding = decoding

    def stream_generate(
        self,
        model: ModelT,
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
        draft_model: ModelT | None = None,
        num_draft_tokens: int = 3,
        prompt_lookup: bool = False,
        thinking_budget: int | None = None,
        **options: Any,
    ) -> Iterator[Response]:
        """Generate from one prompt, and yield a `Response` for each new token.

        The answer ends at an EOS id of config, generation config or tokenizer, at a stop string, or after
        ``max_tokens``.

        Arguments:
            model, tokenizer: as ``load`` returns them; without a tokenizer the texts are empty.
            prompt: a text (BOS is added once, no template is applied) or token ids.
            max_tokens: most tokens to generate.
            temperature, top_p, top_k, min_p, repetition_penalty, seed: see `Sampling`.
            stop: strings that end the answer; they are not part of the text.
            draft_model, num_draft_tokens, prompt_lookup: speculative decoding, see `Speculation`; the tokens are the
                same.
            thinking_budget: most tokens of a thought, which is then closed so that the answer begins; None: any number.
                For models whose chat template has a thinking mode.
            options: the other fields of `Sampling` (``xtc_probability``, ``xtc_threshold``, ``xtc_special_tokens``,
                ``min_tokens_to_keep``), and those of `CacheOptions`.

        Returns:
            An iterator over `Response` (``text``, ``token``, ``finish_reason``, ``from_draft``, ``reasoning``). For
            models whose chat template has thoughts, the thought is in ``reasoning`` and not in ``text``.

        Raises:
            InputError: an argument is out of range or of another type, or the memory does not hold the cache.
            TypeError: an argument is unknown; the message names the nearest one.
        """
        kept, options = cache_and_others(
            options,
            ("prompt", "max_tokens", "stop", "draft_model", "num_draft_tokens", "prompt_lookup", "thinking_budget"),
        )
        sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed, **options)
        speculation = Speculation(draft_model, prompt_lookup, num_draft_tokens)
        request = GenerationRequest.of(model, tokenizer, [prompt], max_tokens, sampling, kept, thinking_budget)
        return self.stream(model, tokenizer, request, stop, speculation)

    def stream(
        self,
        model: ModelT,
        tokenizer: "Tokenizer | None",
        request: GenerationRequest,
        stop: str | Sequence[str] = (),
        speculation: Speculation[ModelT] | None = None,
    ) -> Iterator[Response]:
        """`stream_generate` for a `GenerationRequest` with one prompt."""

        def texts(tokens: Iterator[int]) -> Iterator[Response]:
            parser = parser_of(tokenizer, request.prompt)
            return stream_text(tokens, tokenizer, request.end_ids, stop, request.max_tokens, parser)

        if speculation is None or not speculation.active:
            self.decoding.check(model, request)
            return texts(int(token) for (token,) in self.decoding.stream_tokens(model, request))
        speculation.check(model, request)
        self.decoding.check(model, request)
        return _marked(self.decoding.stream_speculated(model, request, speculation), texts)

    def generate(self, model: ModelT, tokenizer: "Tokenizer | None", prompt: Prompt, **options: Any) -> str:
        """The whole answer as text, without the thought before it; arguments as for `stream_generate`."""
        return "".join(r.text for r in self.stream_generate(model, tokenizer, prompt, **options))

    def batch_generate(
        self,
        model: ModelT,
        tokenizer: "Tokenizer | None",
        prompts: Sequence[Prompt],
        max_tokens: int = ANSWER_TOKENS,
        stop: str | Sequence[str] = (),
        thinking_budget: int | None = None,
        **options: Any,
    ) -> list[list[Response]]:
        """Generate from several prompts of any lengths in one batch.

        Arguments:
            prompts: the batch rows.
            options: as in `stream_generate`, without speculative decoding.

        Returns:
            One list of `Response` per prompt. Each is what the prompt alone would give; sampled rows use separate
            random streams.

        Raises:
            InputError: as `stream_generate`.
        """
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
            raise InputError(f"is {short(repr(prompts))}; it must be a list of prompts.", option="prompts")
        if not len(prompts):
            return []
        kept, options = cache_and_others(options, ("prompts", "max_tokens", "stop", "thinking_budget"))
        sampling = Sampling(**options)
        request = GenerationRequest.of(model, tokenizer, prompts, max_tokens, sampling, kept, thinking_budget)
        return self.batch(model, tokenizer, request, stop)

    def batch(
        self,
        model: ModelT,
        tokenizer: "Tokenizer | None",
        request: GenerationRequest,
        stop: str | Sequence[str] = (),
        on_finished: Callable[[], object] = lambda: None,
    ) -> list[list[Response]]:
        """`batch_generate` for a `GenerationRequest`. ``on_finished`` is called once for each row, when it ends."""
        self.decoding.check(model, request)
        rows = zip(*_watched(self.decoding.stream_tokens(model, request), request, on_finished), strict=True)
        ends, most = request.end_ids, request.max_tokens
        return [
            list(stream_text(map(int, row), tokenizer, ends, stop, most, parser_of(tokenizer, prompt)))
            for prompt, row in zip(request.prompts, rows, strict=True)
        ]

    def chat(
        self,
        model: ModelT,
        tokenizer: "Tokenizer",
        query: str,
        history: Sequence[Message] | None = None,
        images: Sequence[Any] | None = None,
        max_tokens: int = CHAT_TOKENS,
        temperature: float | None = None,
        top_p: float | None = None,
        enable_thinking: bool | None = None,
        **options: Any,
    ) -> tuple[str, list[Message]]:
        """Answer a chat message.

        As in the original, the reply also ends where the model writes ``<用户>`` or ``<AI>``, if the chat template has
        them.

        Arguments:
            query: the user's message.
            history: the earlier messages, as ``Tokenizer.apply_chat`` takes them.
            images: that belong to the message, for a model that sees: paths, bytes, PIL images or ``data:`` URLs.
            temperature, top_p: None takes the model's own defaults for the thinking mode (``tokenizer.sampling``);
                those of MiniCPM-2B are 0.3 and 0.8.
            enable_thinking: whether the model thinks before it answers; None leaves it to the chat template.
            options: as in `stream_generate`.

        Returns:
            The reply without the thought, and the history with query and reply appended. There the reply has its
            thought as ``reasoning_content``; the template decides what later prompts keep of it.

        Raises:
            InputError: the checkpoint has no tokenizer, its chat template has no thinking mode that is asked for, or as
                `stream_generate`.
        """
        if tokenizer is None:
            raise InputError("a chat needs a tokenizer, and this checkpoint has none.")
        if not isinstance(history, list | tuple | None):
            raise InputError(f"is {short(repr(history))}; it must be a list of messages.", option="history")
        if isinstance(images, str | bytes) or not isinstance(images, Sequence | None):
            raise InputError(f"is {short(repr(images))}; it must be a list of images.", option="images")
        messages = [*(history or ()), {"role": "user", "content": with_images(query, images or ())}]
        prompt = chat_prompt(tokenizer, model.config, messages, enable_thinking=enable_thinking)
        usual = tokenizer.sampling.of(enable_thinking)
        options["temperature"] = usual.temperature if temperature is None else temperature
        options["top_p"] = usual.top_p if top_p is None else top_p
        options["stop"] = (*stop_strings(options.get("stop", ())), *tokenizer.turn_markers)
        made = [*self.stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, **options)]
        reply = "".join(response.text for response in made).strip()
        thought = "".join(response.reasoning for response in made)
        return reply, [*messages, answer_message(reply, thought)]


def _watched(
    steps: "Iterator[np.ndarray]", request: GenerationRequest, on_finished: Callable[[], object]
) -> "Iterator[np.ndarray]":
    """The same steps, [B] tokens each; ``on_finished`` is called for each row at its first end id, or at the end."""
    going = set(range(len(request.prompts)))
    for step in steps:
        for row in [row for row in going if int(step[row]) in request.end_ids]:
            going.remove(row)
            on_finished()
        yield step
    for _ in going:
        on_finished()


def _marked(
    found: Iterator[tuple[int, bool]], texts: Callable[[Iterator[int]], Iterator[Response]]
) -> Iterator[Response]:
    """The responses to a stream of tokens, with ``from_draft`` set for draft tokens. Tokens are pulled one by one."""
    from_draft = False

    def tokens() -> Iterator[int]:
        nonlocal from_draft
        for token, guessed in found:
            from_draft = guessed
            yield token

    return (replace(response, from_draft=from_draft) for response in texts(tokens()))


Model_contra = TypeVar("Model_contra", contravariant=True)


class Device(Protocol[Model_contra]):
    """A backend's ``device.py``: the devices that its programs run on."""

    preferred_dtype: Callable[..., str]

    def description(self) -> str: ...
    def is_first(self) -> bool: ...
    def warn_idle_axes(self, model: Model_contra, rows: int) -> None: ...
    def peak_memory(self) -> int: ...
    def compile_seconds(self) -> float: ...


@dataclass(frozen=True)
class Backend(Generic[ModelT]):
    """What the command lines need of a backend."""

    load: "Callable[..., tuple[ModelT, Tokenizer | None]]"
    generator: Generator[ModelT]
    device: Device[ModelT]
    for_decoding: Callable[[ModelT], ModelT]
    """Converts a model to the form that decodes fastest. The argument must not be used afterwards."""
    activation_sparsity: "Callable[[ModelT, Sequence[int]], np.ndarray]"
