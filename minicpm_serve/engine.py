"""One engine for many threads: what a server hands its requests to.

    model, tokenizer = minicpm_jax.load("minicpm-2b", decoding=True)
    engine = Engine("jax", model, tokenizer, slots=16)
    for response in engine.stream_generate("Hello", max_tokens=64): ...

A thread of its own steps the backend's engine; the caller's thread gets its `Response`s as they come. Leaving the loop
early cancels the request. `submit` is for those who cannot wait in a thread.
"""

import atexit
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic

from minicpm_data.generation import engine
from minicpm_data.generation.api import Decoding
from minicpm_data.generation.engine import OutOfMemory
from minicpm_data.generation.options import (
    ANSWER_TOKENS,
    CHAT_TEMPERATURE,
    CHAT_TOKENS,
    PLAIN_CACHE,
    CacheOptions,
    Sampling,
)
from minicpm_data.generation.request import GenerationRequest, ModelT, Prompt, PromptIds, end_ids, prompt_ids
from minicpm_data.generation.responses import Response, stream_text
from minicpm_serve import backends
from minicpm_serve.backends import BackendName
from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.tokenizer.tokenizer import Tokenizer


SLOTS = 8  # where nobody says how many
WARM = 16  # tokens of a prompt, of the shortest kind

Answered = Response | Exception


class EngineClosed(InputError):
    """Of a request that came after the engine's end, or was not over by then."""


class Answer:
    """Where a request's `Response`s go, and how its tokens become them."""

    def __init__(self, deliver: Callable[[Answered], None], texts: Callable[[Iterator[int]], Iterator[Response]]):
        self.deliver = deliver
        self._tokens: deque[int] = deque()
        self._responses = texts(iter(self._tokens.popleft, None))

    def add(self, token: int) -> Response:
        self._tokens.append(token)
        return next(self._responses)  # which asks for one token


class ServingEngine(Generic[ModelT]):
    def __init__(
        self,
        backend: BackendName,
        model: ModelT,
        tokenizer: "Tokenizer | None",
        slots: int | None = None,
        context: int | None = None,
        cache_options: CacheOptions = PLAIN_CACHE,
    ):
        """``model``: as ``load(decoding=True)`` gives it; another form may be slower. ``slots`` and ``context``: None
        for both is up to 8 slots of as many tokens as the model was made for, as far as there is room: fewer slots,
        then less context. The rest as in `minicpm_data.generation.engine.BatchEngine`."""
        self.model, self.tokenizer = model, tokenizer
        decoding: Decoding[ModelT] = backends.get(backend).generator.decoding
        if slots is None and context is None:
            self._engine = _fitting(lambda slots, context: decoding.engine(model, slots, context, cache_options))
        else:
            self._engine = decoding.engine(model, SLOTS if slots is None else slots, context, cache_options)
        self._ends = end_ids(model, tokenizer)
        self.error: Exception | None = None  # that ended everything
        self._answers: dict[int, Answer] = {}  # of requests that are not over
        self._lock = threading.Lock()
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="minicpm-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a process that ends while the device computes would abort

    def warm_up(self) -> None:
        """Begin a short chat and a completion, so that in JAX their programs are compiled before anybody waits."""
        if self.tokenizer is not None:
            self.tokenizer.warm_up()
        ids = [0] * min(WARM, self.context - 1)  # a chat template may take no message of ours
        for most, temperature in ((CHAT_TOKENS, CHAT_TEMPERATURE), (ANSWER_TOKENS, 0.0)):
            answer = self.stream_generate(ids, min(most, self.context - len(ids)), temperature=temperature)
            for _ in zip(range(2), answer, strict=False):  # the first token is the prompt's; then it is cancelled
                pass

    def stream_generate(
        self, prompt: Prompt, max_tokens: int = ANSWER_TOKENS, stop: str | Sequence[str] = (), **sampling: Any
    ) -> Iterator[Response]:
        """As `minicpm_data.generation.api.Generator.stream_generate`; ``sampling`` under the names of `Sampling`.
        Raises `InputError` before the first token for what has no room or is out of range."""
        answer: queue.SimpleQueue[Answered] = queue.SimpleQueue()
        request = self.request(self.prompt_ids(prompt), max_tokens, Sampling(**sampling))
        number = self.submit(answer.put, request, stop)
        responses = self._responses(number, answer)
        next(responses)  # from here on it is cancelled when nobody holds it any more
        return responses

    def submit(
        self,
        deliver: Callable[[Answered], None],
        request: GenerationRequest,
        stop: str | Sequence[str] = (),
        group: int | None = None,
    ) -> int:
        """As `stream_generate`, of what `request` makes, but returns at once, with the number by which it is known.
        ``deliver`` is called on the engine's thread with each `Response` up to the one that has a ``finish_reason``, or
        with the error that ended the engine; it must neither wait nor raise. ``group``: a number of `group`, for
        requests that share a place in the queue."""
        state, ends, most = self._engine.admitted(request, group), request.end_ids, request.max_tokens
        answer = Answer(deliver, lambda tokens: stream_text(tokens, self.tokenizer, ends, stop, most))
        with self._lock:
            if self.error is not None:
                raise self.error
            self._answers[state.number] = answer
        self._asked.put(lambda: self._engine.queued.append(state))
        return state.number

    def prompt_ids(self, prompt: Prompt) -> PromptIds:
        return prompt_ids(self.tokenizer, prompt, self.model.config.vocab_size)

    def request(self, ids: PromptIds, max_tokens: int, sampling: Sampling) -> GenerationRequest:
        """For `submit`: with the ends and the cache of this engine. `PromptTooLong` for what is above its context."""
        self._engine.check_context(len(ids), max_tokens)
        return GenerationRequest((ids,), max_tokens, sampling, self._ends, self._engine.cache_options)

    def group(self) -> int:
        """A number for requests that belong together: they never have all slots, and take turns with others."""
        return self._engine.group()

    def cancel(self, number: int) -> None:
        """No more of a request; nothing if it is over."""
        self._asked.put(lambda: self._cancel(number))

    def close(self) -> None:
        """End the thread; requests that are not over end with an `EngineClosed`."""
        atexit.unregister(self.close)
        self._asked.put(None)
        self._thread.join()

    @property
    def open(self) -> int:
        """Requests that are not over."""
        return len(self._answers)

    @property
    def slots(self) -> int:
        return self._engine.slots

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self._engine.context

    def _responses(self, number: int, answer: "queue.SimpleQueue[Answered]") -> Iterator[Response]:
        """First one that is none, then those that come."""
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

    def _cancel(self, number: int) -> None:
        self._engine.cancel(number)
        self._answers.pop(number, None)

    def _work(self) -> None:
        error: Exception = EngineClosed("the engine was closed.")
        try:
            while True:
                # Wait only where there is nothing to compute.
                while self._engine.idle or not self._asked.empty():
                    asked = self._asked.get()
                    if asked is None:
                        return
                    asked()
                for made in self._engine.step():
                    if made.number not in self._answers:  # of one that a stop string ended a few tokens ago
                        continue
                    answer = self._answers[made.number]
                    response = answer.add(made.token)
                    if response.finish_reason is not None:
                        self._cancel(made.number)
                    answer.deliver(response)
        except Exception as failed:  # of the device: nobody's request can go on
            error = failed
        finally:
            with self._lock:
                self.error = error
            for answer in self._answers.values():
                answer.deliver(error)
            self._answers.clear()


def _fitting(make: Callable[[int, int | None], engine.BatchEngine[ModelT]]) -> engine.BatchEngine[ModelT]:
    """What ``make`` makes of the most slots, or else of the longest context, that there is room for."""
    for slots in range(SLOTS, 0, -1):
        try:
            return make(slots, None)
        except OutOfMemory as error:
            refused = error
    if refused.context is None:
        raise refused
    return make(1, refused.context)
