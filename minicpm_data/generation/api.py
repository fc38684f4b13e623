"""What the two backends' generators share: the public calls, and what a backend hands over for them.

`Generator` makes ``stream_generate``, ``generate``, ``batch_generate`` and ``chat`` of a backend's `Decoding`, so that
both have the same names, signatures and behaviour.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from minicpm_data.generation.options import (
    ANSWER_TOKENS,
    CHAT_TEMPERATURE,
    CHAT_TOKENS,
    CHAT_TOP_P,
    PLAIN_CACHE,
    CacheOptions,
    Sampling,
)
from minicpm_data.generation.request import GenerationRequest, ModelT, Prompt
from minicpm_data.generation.responses import Response, stop_strings, stream_text
from minicpm_data.generation.speculation import Speculation
from weights_io.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from minicpm_data.generation.engine import Engine
    from minicpm_data.tokenizer.tokenizer import Tokenizer

Message = dict[str, str]


class Decoding(Protocol[ModelT]):
    """How a backend answers a request: the functions of its ``generation/``."""

    def check(self, model: ModelT, request: GenerationRequest) -> None:
        """`InputError` for a kind of cache that is not there, or one that there is known to be no room for."""

    def stream_tokens(self, model: ModelT, request: GenerationRequest) -> "Iterator[np.ndarray]":
        """Token ids [B], one step after the other, until every row has met an id of ``end_ids`` or ``max_tokens``
        steps. A row that has ended goes on with tokens of no meaning. ``request``: one that `check` has passed."""

    def stream_speculated(
        self, model: ModelT, request: GenerationRequest, speculation: Speculation[ModelT]
    ) -> Iterator[tuple[int, bool]]:
        """Token ids, and whether each was guessed: the tokens of `stream_tokens` for one prompt."""

    def engine(
        self,
        model: ModelT,
        slots: int = 8,
        context: int | None = None,
        cache_options: CacheOptions = PLAIN_CACHE,
    ) -> "Engine[ModelT]":
        """Many requests at once; as `minicpm_data.generation.engine.Engine`."""


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
        **cache_options: Any,
    ) -> Iterator[Response]:
        """Yield a `Response` (``text``, ``token``, ``finish_reason``, ``from_draft``) for each new token.

        ``prompt``: a text (BOS is added once, no template) or token ids. The sampling options are those of `Sampling`.
        An answer ends at an EOS id of config, generation config or tokenizer, at a string of ``stop`` (not part of the
        text), or after ``max_tokens``. ``draft_model``, ``num_draft_tokens``, ``prompt_lookup``: of `Speculation`; the
        same tokens, sooner. ``cache_options``: what is kept of the tokens so far, under the names of `CacheOptions`.
        Raises `InputError` for what is out of range.
        """
        sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
        kept, speculation = CacheOptions(**cache_options), Speculation(draft_model, prompt_lookup, num_draft_tokens)
        request = GenerationRequest.of(model, tokenizer, [prompt], max_tokens, sampling, kept)
        return self.stream(model, tokenizer, request, stop, speculation)

    def stream(
        self,
        model: ModelT,
        tokenizer: "Tokenizer | None",
        request: GenerationRequest,
        stop: str | Sequence[str] = (),
        speculation: Speculation[ModelT] | None = None,
    ) -> Iterator[Response]:
        """`stream_generate` of a request that is made already, of one prompt."""

        def texts(tokens: Iterator[int]) -> Iterator[Response]:
            return stream_text(tokens, tokenizer, request.end_ids, stop, request.max_tokens)

        if speculation is None or not speculation.active:
            self.decoding.check(model, request)
            return texts(int(token) for (token,) in self.decoding.stream_tokens(model, request))
        speculation.check(model, request)
        self.decoding.check(model, request)
        return _marked(self.decoding.stream_speculated(model, request, speculation), texts)

    def generate(self, model: ModelT, tokenizer: "Tokenizer | None", prompt: Prompt, **options: Any) -> str:
        """The whole answer; ``options`` as in `stream_generate`."""
        return "".join(r.text for r in self.stream_generate(model, tokenizer, prompt, **options))

    def batch_generate(
        self,
        model: ModelT,
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
        kept = CacheOptions(**{f.name: options.pop(f.name) for f in fields(CacheOptions) if f.name in options})
        request = GenerationRequest.of(model, tokenizer, prompts, max_tokens, Sampling(**options), kept)
        return self.batch(model, tokenizer, request, stop)

    def batch(
        self,
        model: ModelT,
        tokenizer: "Tokenizer | None",
        request: GenerationRequest,
        stop: str | Sequence[str] = (),
    ) -> list[list[Response]]:
        """`batch_generate` of a request that is made already."""
        self.decoding.check(model, request)
        rows = zip(*self.decoding.stream_tokens(model, request), strict=True)
        return [list(stream_text(map(int, row), tokenizer, request.end_ids, stop, request.max_tokens)) for row in rows]

    def chat(
        self,
        model: ModelT,
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


Model_contra = TypeVar("Model_contra", contravariant=True)


class Device(Protocol[Model_contra]):
    """What a backend's ``device.py`` says of where its programs run."""

    preferred_dtype: Callable[..., str]

    def description(self) -> str: ...
    def is_first(self) -> bool: ...
    def warn_idle_axes(self, model: Model_contra, rows: int) -> None: ...
    def peak_memory(self) -> int: ...
    def compile_seconds(self) -> float: ...


@dataclass(frozen=True)
class Backend(Generic[ModelT]):
    """What a backend hands over to the command lines."""

    load: "Callable[..., tuple[ModelT, Tokenizer | None]]"
    generator: Generator[ModelT]
    device: Device[ModelT]
    for_decoding: Callable[[ModelT], ModelT]
    """The model in the form that decodes fastest; the one that was given is used up."""
    activation_sparsity: "Callable[[ModelT, Sequence[int]], np.ndarray]"
