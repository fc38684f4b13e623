"""One engine for many threads: what a server hands its requests to.

    engine = Engine("jax", model, tokenizer, slots=16)
    for response in engine.stream_generate("Hello", max_tokens=64): ...

A thread of its own steps the backend's engine; the caller's thread gets its `Response`s as they come. Leaving the loop
early cancels the request.
"""

import atexit
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from minicpm_data.engine import Made
from minicpm_data.generation import CacheOptions, Prompt, Sampling, end_ids, prompt_ids
from minicpm_data.streaming import Response, stream_text
from minicpm_serve import backends
from minicpm_serve.backends import BackendName
from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.tokenizer import Tokenizer


class Engine:
    def __init__(
        self,
        backend: BackendName,
        model: Any,
        tokenizer: "Tokenizer | None",
        slots: int = 8,
        context: int | None = None,
        memory: CacheOptions | None = None,
    ):
        """``model``: used up by `Backend.device.for_decoding`. The rest as in `minicpm_data.engine.Engine`."""
        model = backends.get(backend).device.for_decoding(model)
        self.model, self.tokenizer = model, tokenizer
        self._engine = backends.module(backend, "engine").Engine(model, slots, context, memory)
        self._ends = end_ids(model, tokenizer)
        self._answers: dict[int, queue.SimpleQueue] = {}  # of `Made`, or the error that ended everything
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="minicpm-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a process that ends while the device computes would abort

    def stream_generate(
        self, prompt: Prompt, max_tokens: int = 256, stop: str | Sequence[str] = (), **sampling: Any
    ) -> Iterator[Response]:
        """As `minicpm_data.generation.Generator.stream_generate`; ``sampling`` under the names of `Sampling`. Raises
        `InputError` before the first token for what has no room or is out of range."""
        ids, chosen = prompt_ids(self.tokenizer, prompt, self.model.config.vocab_size), Sampling(**sampling)
        number, answer = self._call(lambda: self._add(ids, max_tokens, chosen))
        tokens = self._tokens(number, answer)
        next(tokens)  # from here on it is cancelled when nobody holds it any more
        return stream_text(tokens, self.tokenizer, self._ends, stop, max_tokens)

    def close(self) -> None:
        """End the thread; requests that are not over end with an `InputError`."""
        atexit.unregister(self.close)
        self._asked.put(None)
        self._thread.join()

    def _add(self, ids: list[int], max_tokens: int, sampling: Sampling) -> tuple[int, queue.SimpleQueue]:
        number = self._engine.add(ids, max_tokens, sampling, self._ends)
        self._answers[number] = queue.SimpleQueue()
        return number, self._answers[number]

    def _cancel(self, number: int) -> None:
        self._engine.cancel(number)
        self._answers.pop(number, None)

    def _tokens(self, number: int, answer: queue.SimpleQueue) -> Iterator[int]:
        """First -1, which is no token, then the tokens."""
        last = False
        try:
            yield -1
            while not last:
                made: Made | Exception = answer.get()
                if isinstance(made, Exception):
                    raise made
                last = made.last
                yield made.token
        finally:
            if not last:
                self._asked.put(lambda: self._cancel(number))

    def _call(self, function: Callable[[], Any]) -> Any:
        """What a function returns or raises on the engine's thread."""
        reply: queue.SimpleQueue = queue.SimpleQueue()

        def run() -> None:
            try:
                reply.put((function(), None))
            except Exception as error:
                reply.put((None, error))

        self._asked.put(run)
        while True:
            try:
                result, error = reply.get(timeout=0.1 if self._thread.is_alive() else 0)
                break
            except queue.Empty:
                if not self._thread.is_alive():
                    raise InputError("this engine is closed.") from None
        if error is not None:
            raise error
        return result

    def _work(self) -> None:
        error: Exception = InputError("this engine was closed before the answer was whole.")
        try:
            while True:
                # Wait only where there is nothing to compute.
                while self._engine.idle or not self._asked.empty():
                    asked = self._asked.get()
                    if asked is None:
                        return
                    asked()
                for made in self._engine.step():
                    answer = self._answers.pop(made.number) if made.last else self._answers[made.number]
                    answer.put(made)
        except Exception as failed:  # of the device: nobody's request can go on
            error = failed
        finally:
            for answer in self._answers.values():
                answer.put(error)
