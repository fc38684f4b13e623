"""A thread-safe engine for concurrent requests, used by the server.

    model, tokenizer = minicpm_jax.load("minicpm-2b", decoding=True)
    engine = ServingEngine("jax", model, tokenizer, slots=16)
    for response in engine.stream_generate("Hello", max_tokens=64): ...

One background thread steps the backend's engine and delivers each `Response` to its caller. Leaving the loop early
cancels the request. `submit` is for callers that must not block.
"""

import atexit
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic

from minicpm_data.conversation.answers import AnswerParser
from minicpm_data.generation.api import Decoding
from minicpm_data.generation.beginnings import Beginnings
from minicpm_data.generation.options import (
    ANSWER_TOKENS,
    CHAT_TOKENS,
    PLAIN_CACHE,
    CacheOptions,
    Sampling,
)
from minicpm_data.generation.pool_size import OutOfMemory
from minicpm_data.generation.prompt_cache import CachedPrompt, PromptCache
from minicpm_data.generation.request import (
    GenerationRequest,
    ModelT,
    Prompt,
    PromptIds,
    end_ids,
    prompt_ids,
    special_tokens_kept,
)
from minicpm_data.generation.responses import Response, stream_text
from minicpm_data.generation.speculation import Speculation
from minicpm_data.generation.thinking import ThinkingBudget
from minicpm_data.generation.token_scores import TokenScore
from minicpm_data.sampling_defaults import OF_CHAT
from minicpm_serve import backends
from minicpm_serve.backends import BackendName
from minicpm_serve.delivery import Answer, Answered, EngineClosed, known
from minicpm_serve.http.image_access import NO_FILES, ImageAccess
from weights_io.errors import InputError, short

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer


SLOTS = 8  # default number of concurrent requests
WARM = 16  # tokens of the warm-up prompt


class ServingEngine(Generic[ModelT]):
    """A `minicpm_data.generation.engine.BatchEngine` that may be used from several threads."""

    def __init__(
        self,
        backend: BackendName,
        model: ModelT,
        tokenizer: "Tokenizer | None",
        slots: int | None = None,
        context: int | None = None,
        cache_options: CacheOptions = PLAIN_CACHE,
        cache_tokens: int | None = None,
        speculation: Speculation[ModelT] | None = None,
        prompt_cache: PromptCache | None = None,
        images: ImageAccess = NO_FILES,
    ):
        """
        Arguments:
            backend: ``jax`` or ``mlx``.
            model: from ``load(decoding=True)``; other forms may be slower.
            tokenizer: None where the checkpoint has none.
            slots: concurrent requests; None: 8.
            context: most tokens of a prompt and its answer; None: the model's, or fewer where memory is short.
            cache_options: of every request's cache.
            cache_tokens: tokens that the cache holds; None: as the memory allows.
            speculation, prompt_cache: as for `BatchEngine`.
            images: which images a request may name, where the model sees.

        Raises:
            InputError: as `BatchEngine`.
        """
        self.model, self.tokenizer, self.images = model, tokenizer, images
        decoding: Decoding[ModelT] = backends.get(backend).generator.decoding
        slots = SLOTS if slots is None else slots
        try:
            self._engine = decoding.engine(
                model, slots, context, cache_options, cache_tokens, speculation, prompt_cache
            )
        except OutOfMemory as error:
            if context is not None or cache_tokens is not None or error.context is None:
                raise
            self._engine = decoding.engine(
                model, slots, error.context, cache_options, speculation=speculation, prompt_cache=prompt_cache
            )
        self._ends = end_ids(model, tokenizer)
        self.error: Exception | None = None  # the error that stopped the engine
        self._answers: dict[int, Answer] = {}  # of unfinished requests
        self._lock = threading.Lock()
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._scoring = backends.module(backend, "generation.scoring")
        self._scored: set[Future[list[TokenScore]]] = set()  # that are waited for
        self._engine.wake = lambda: self._asked.put(lambda: None)
        self._engine.failed = self._fail  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._work, name="minicpm-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a process that exits while the device computes aborts

    def warm_up(self, compiled: Callable[[str, float], None] | None = None) -> None:
        """Run a short chat and a completion, so that JAX compiles their programs before the first request. Then begin
        to compile the others in the background.

        Arguments:
            compiled: called on another thread with the name of each program that was compiled, and its seconds.
        """
        self._engine.compiled = compiled or self._engine.compiled
        if self.tokenizer is not None:
            self.tokenizer.warm_up()
        ids = [0] * min(WARM, self.context - 1)  # ids, because a chat template may refuse any message
        for most, temperature in ((CHAT_TOKENS, OF_CHAT.temperature), (ANSWER_TOKENS, 0.0)):
            answer = self.stream_generate(ids, min(most, self.context - len(ids)), temperature=temperature)
            for _ in zip(range(2), answer, strict=False):  # the first token is the prompt's; then it is cancelled
                pass
        self._asked.put(self._engine.warm)

    def stream_generate(
        self,
        prompt: Prompt,
        max_tokens: int = ANSWER_TOKENS,
        stop: str | Sequence[str] = (),
        thinking_budget: int | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Iterator[Response]:
        """Generate from one prompt; blocks until each token arrives.

        Arguments:
            prompt, max_tokens, stop, thinking_budget: as for
                `minicpm_data.generation.api.Generator.stream_generate`.
            adapter: name of one of the model's adapters; None: none.
            sampling: the fields of `Sampling`.

        Returns:
            An iterator over `Response`.

        Raises:
            InputError: at the call, where a value is out of range or the prompt is too long.
        """
        answer: queue.SimpleQueue[Answered] = queue.SimpleQueue()
        request = self.request(self.prompt_ids(prompt), max_tokens, Sampling(**sampling), thinking_budget)
        request = replace(request, adapter=self.adapter(adapter))
        number = self.submit(answer.put, request, stop)
        responses = self._responses(number, answer)
        next(responses)  # enters the generator, whose end cancels the request
        return responses

    def submit(
        self,
        deliver: Callable[[Answered], None],
        request: GenerationRequest,
        stop: str | Sequence[str] = (),
        group: int | None = None,
        parser: AnswerParser | None = None,
    ) -> int:
        """Submit a request without waiting.

        Arguments:
            deliver: called on the engine's thread with each `Response`, the last of which has a ``finish_reason``, or
                with the error that stopped the engine. It must neither block nor raise.
            request: from `request`.
            stop: strings that end the answer.
            group: from `group`, for requests that share a place in the queue.
            parser: separates thought and tool calls from the text of the answer.

        Returns:
            The number of the request.

        Raises:
            InputError: the request does not fit the engine, or the engine is closed.
        """
        state, ends, most = self._engine.admitted(request, group), request.end_ids, request.max_tokens
        answer = Answer(deliver, lambda tokens: stream_text(tokens, self.tokenizer, ends, stop, most, parser))
        with self._lock:
            if self.error is not None:
                raise self.error
            self._answers[state.number] = answer
        self._asked.put(lambda: self._engine.queued.append(state))
        return state.number

    def prompt_ids(self, prompt: Prompt) -> PromptIds:
        return prompt_ids(self.tokenizer, prompt, self.model.config.vocab_size)

    def request(
        self, ids: PromptIds, max_tokens: int, sampling: Sampling, thinking_budget: int | None = None
    ) -> GenerationRequest:
        """A request with this engine's EOS ids and cache options. Raises `PromptTooLong`."""
        self._engine.check_context(len(ids), max_tokens)
        sampling = special_tokens_kept(sampling, self.tokenizer, self._ends, self.model.config.vocab_size)
        thinking = None if thinking_budget is None else ThinkingBudget.of(self.tokenizer, thinking_budget, (ids,))
        return GenerationRequest(
            (ids,), max_tokens, sampling, self._ends, self._engine.cache_options, thinking=thinking
        )

    def prompt_scores(self, ids: PromptIds, count: int, adapter: int = 0) -> "Future[list[TokenScore]]":
        """How likely each token of a prompt but the first is. The prompt is run by itself, between two steps.

        Arguments:
            ids: the prompt.
            count: likeliest tokens that are described in each place.
            adapter: as in `GenerationRequest`.

        Returns:
            A future, whose exception is the one that stopped the engine, or that of the computation.
        """
        self._scoring.prepare_scores(self.model, ids, adapter)
        found: Future[list[TokenScore]] = Future()

        def compute() -> None:
            try:
                logprob, likeliest, logprobs = self._scoring.prompt_scores(self.model, ids, adapter)
                rows = zip(logprob, likeliest, logprobs, strict=True)
                found.set_result([TokenScore.of(*row, count=count) for row in rows])
            except Exception as error:  # for this request alone
                found.set_exception(error)
            self._scored.discard(found)

        with self._lock:
            if self.error is not None:
                raise self.error
            self._scored.add(found)
        self._asked.put(compute)
        return found

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters of which each request may choose one."""
        return self.model.adapters

    def adapter(self, name: str | None) -> int:
        """The ``adapter`` of a `GenerationRequest`. Raises `InputError` for an unknown name."""
        if name is None:
            return 0
        if name not in self.adapters:
            raise InputError(f"is {short(name)!r}; there {known(self.adapters)}.", option="adapter")
        return 1 + self.adapters.index(name)

    def group(self) -> int:
        """The id of a new group of requests, which never takes all slots and takes turns with other groups."""
        return self._engine.group()

    def cancel(self, number: int) -> None:
        """Drop a request. Nothing happens if it is finished."""
        self._asked.put(lambda: self._cancel(number))

    def count_beginnings(self) -> None:
        """Count what the prompts begin with, from now on."""
        self._engine.beginnings = Beginnings()

    def common_beginning(self) -> tuple[list[int], CachedPrompt] | None:
        """What most prompts began with, as ids and as keys and values; None where nothing is, or it is not in the cache
        any more. The engine must be closed."""
        ids = self._engine.beginnings.common() if self._engine.beginnings is not None else []
        found = self._engine.stored(ids) if ids and isinstance(self.error, EngineClosed) else None
        return None if found is None else (ids[: found.length], found)

    def close(self) -> None:
        """Stop the threads; a program that is being compiled is waited for. Unfinished requests get `EngineClosed`."""
        atexit.unregister(self.close)
        self._asked.put(None)
        self._thread.join()
        self._engine.close()

    @property
    def open(self) -> int:
        """Number of unfinished requests."""
        return len(self._answers)

    @property
    def running(self) -> int:
        """Number of requests that are prefilled or decoded."""
        return len(self._engine.running) + (self._engine.prefilling is not None)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot."""
        return max(0, self.open - self.running)

    def cache_usage(self) -> float:
        """The fraction of the cache's pages that requests hold."""
        pool = self._engine.pool
        return 1 - pool.available / (pool.pages - 1)

    @property
    def speculates(self) -> bool:
        """Whether tokens are guessed."""
        return self._engine.guessing is not None

    @property
    def drafted(self) -> int:
        """Tokens that speculation guessed so far."""
        return 0 if self._engine.guessing is None else self._engine.guessing.drafted

    @property
    def accepted(self) -> int:
        """Guessed tokens that were right."""
        return 0 if self._engine.guessing is None else self._engine.guessing.accepted

    @property
    def programs(self) -> dict[str, int]:
        """How many programs are ``ready``, ``compiling`` and ``waiting``; empty in MLX, which compiles none."""
        return self._engine.programs()

    @property
    def slots(self) -> int:
        return self._engine.slots

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self._engine.context

    def _responses(self, number: int, answer: "queue.SimpleQueue[Answered]") -> Iterator[Response]:
        """Yield an empty response first, then those that arrive."""
        response = Response("", None)
        try:
            yield response
            while response.finish_reason is None:
                made = answer.get()
                if isinstance(made, Exception):
                    raise made
                response = made
                yield response
        finally:
            if response.finish_reason is None:
                self.cancel(number)

    def _fail(self, number: int, error: Exception) -> None:
        if (answer := self._answers.pop(number, None)) is not None:
            answer.deliver(error)

    def _cancel(self, number: int) -> None:
        self._engine.cancel(number)
        self._answers.pop(number, None)

    def _work(self) -> None:
        error: Exception = EngineClosed("the engine was closed.")
        try:
            while True:
                # Wait only where there is nothing to compute, or no program to compute it with.
                while self._engine.idle or not self._asked.empty() or self._engine.blocked:
                    asked = self._asked.get()
                    if asked is None:
                        return
                    asked()
                for made in self._engine.step():
                    if made.number not in self._answers:  # a stop string ended it a few tokens ago
                        continue
                    answer = self._answers[made.number]
                    response = answer.add(made.token)
                    response = response if made.score is None else replace(response, score=made.score)
                    if response.finish_reason is not None:
                        self._cancel(made.number)
                    answer.deliver(response)
        except Exception as failed:  # a device error, which ends all requests
            error = failed
        finally:
            with self._lock:
                self.error = error
            for answer in self._answers.values():
                answer.deliver(error)
            self._answers.clear()
            while self._scored:
                self._scored.pop().set_exception(error)
