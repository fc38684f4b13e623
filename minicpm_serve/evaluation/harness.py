"""Models of lm-eval (EleutherAI's language model evaluation harness): ``minicpm_jax`` and ``minicpm_mlx``.

    import lm_eval
    import minicpm_serve.evaluation.harness  # registers the two

    lm_eval.simple_evaluate("minicpm_mlx", model_args="pretrained=minicpm-2b", tasks=["hellaswag"])

This module imports ``lm_eval``, which takes seconds.
"""

import queue
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any, cast

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minicpm_data.generation.options import MOST, Sampling
from minicpm_data.model_options import load_model
from minicpm_serve import backends
from minicpm_serve.delivery import Answered
from minicpm_serve.engine import ServingEngine
from weights_io.errors import InputError, listed, short
from weights_io.progress import progress_bar

ANSWER = 256  # tokens of an answer for which a task states no maximum, as in lm-eval's own models
STEP = 64  # widths of batches are multiples of this, so that JAX compiles few programs
UNUSED = {"do_sample", "num_beams", "use_cache"}  # what they ask for is done in any case
Pair = tuple[Any, list[int], list[int]]  # of texts; the ids of the context; those of the continuation


class MiniCPM(TemplateLM):
    """A model of one of the backends. Equal inputs are run once: the choices of one token after one context, too."""

    backend_name: backends.BackendName

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        loaded: tuple[Any, Any] | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **loading: Any,
    ):
        """
        Arguments:
            pretrained: a model, as ``--model`` takes it; None: pico.
            batch_size: texts in a batch, and answers that are generated at a time.
            max_length: most tokens of a text; None: the model's context.
            loaded: model and tokenizer, in place of ``pretrained``.
            max_batch_size, device: of lm-eval's own models, and not used.
            loading: further options of ``--model``: ``dtype``, ``adapter_path``, ``quantize``, ``revision``, ..

        Raises:
            InputError: the model cannot be loaded, or an argument is unknown.
        """
        super().__init__()
        known = {field.name for field in fields(backends.BackendOptions)} - {"model", "backend"}
        if unknown := loading.keys() - known:
            raise InputError(
                f"{listed(sorted(unknown))} is no argument of the model; it knows {', '.join(sorted(known))}."
            )
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            raise InputError(f"is {short(batch_size)}; give a whole number.", "batch_size") from None
        options = backends.BackendOptions(model=pretrained, backend=self.backend_name, **loading)
        self._name = pretrained or "pico"
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = loaded or load_model(backends.get(self.backend_name), options)
        self.max_length = max_length or self.model.config.max_position_embeddings
        self._scores = backends.module(self.backend_name, "generation.scoring").scores

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.tokenizer.encode(string, add_bos=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.render_chat(chat_history, **how)

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """The log likelihood of each continuation, and whether greedy decoding would generate it.

        A text that is longer than the context loses its beginning.
        """
        texts = []
        for pair, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"the continuation {short(repr(pair and pair[1]))} has {len(continuation)} tokens; it must have "
                    f"1 to {self.max_length}."
                )
            texts.append(([*context, *continuation][-self.max_length - 1 :], len(continuation)))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
        rows = _shared([ids[:-1] for ids, _ in texts])
        rows.sort(key=lambda row: -len(row[0]))
        with progress_bar("log likelihoods", len(texts), unit="continuation") as bar:
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                for number, likely, best in self._scored(batch, texts):
                    found[number] = float(likely.sum(dtype=np.float64)), bool(best.all())
                    bar.update(1)
        return found

    def _scored(
        self, batch: Sequence[tuple[list[int], list[int]]], texts: Sequence[tuple[list[int], int]]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The scores of the continuations whose texts are in the rows of a batch."""
        width = min(-(-len(batch[0][0]) // STEP) * STEP, max(self.max_length, len(batch[0][0])))
        ids, lengths = np.zeros((self.batch_size, width), np.int32), np.ones(self.batch_size, np.int32)
        numbers, places, targets = [], [], []
        for row, (text, sharing) in enumerate(batch):
            ids[row, : len(text)], lengths[row] = text, len(text)
            for number in sharing:
                whole, count = texts[number]
                numbers.append((number, count))
                places += [(row, at) for at in range(len(whole) - 1 - count, len(whole) - 1)]
                targets += whole[-count:]
        rows, at = np.array(places, np.int32).T
        likely, best = self._scores(self.model, ids, lengths, rows, at, np.array(targets, np.int32))
        ends = np.cumsum([count for _, count in numbers])
        for (number, count), end in zip(numbers, ends, strict=True):
            yield number, likely[end - count : end], best[end - count : end]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of each text. Each token is predicted once, from as much before it as a window holds."""
        windows: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pieces = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            before = len(windows)
            windows += [(None, *make_disjoint_window(piece)) for piece in pieces]
            counts.append(len(windows) - before)
        likely = iter(self._loglikelihood_tokens(windows))
        sums = [sum(next(likely)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    @cached_property
    def _engine(self) -> ServingEngine:
        return ServingEngine(self.backend_name, self.model, self.tokenizer, self.batch_size, self.max_length)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers, greedy where a task does not ask for samples. All are open at once; the engine batches them."""
        answers: list[list[int]] = [[] for _ in requests]
        texts = [""] * len(requests)
        made: queue.SimpleQueue[tuple[int, Answered]] = queue.SimpleQueue()
        stops = []
        with progress_bar("answers", len(requests), unit="answer") as bar:
            for number, request in enumerate(requests):
                stops.append(self._submit(number, request.args[0], request.args[1], made))
            left = len(requests)
            while left:
                number, response = made.get()
                if isinstance(response, Exception):
                    raise response
                if response.token is not None:
                    answers[number].append(response.token)
                if response.finish_reason is not None:
                    text = self.tokenizer.decode(answers[number])
                    texts[number] = postprocess_generated_text(text, stops[number], None)
                    self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                    left -= 1
                    bar.update(1)
        return texts

    def _submit(self, number: int, context: str, asked: dict[str, Any], made: queue.SimpleQueue) -> list[str]:
        """Submit a request, and return its stop strings. The beginning of a context that is too long is left out."""
        given = cast(dict[str, Any], normalize_gen_kwargs(asked, ANSWER))
        stop = [text for text in handle_stop_sequences(given.pop("until"), None) if text]
        most = given.pop("max_gen_toks")
        sampling = {key: value for key, value in given.items() if key not in UNUSED}
        known = {field.name for field in fields(Sampling)}
        if unknown := sampling.keys() - known:
            raise InputError(f"{listed(sorted(unknown))} of generation_kwargs is not supported; leave it out.")
        if not given.get("do_sample"):
            sampling = {"temperature": 0.0}
        room = self._engine.context - most
        if not 0 < room < MOST:
            raise InputError(f"a task asks for {most} tokens, and the context has {self._engine.context}; lower it.")
        ids = self._engine.prompt_ids(self.tok_encode(context)[-room:])
        request = self._engine.request(ids, most, Sampling(**sampling))
        self._engine.submit(lambda response: made.put((number, response)), request, stop)
        return stop

    def close(self) -> None:
        """End the engine, if one was needed."""
        if "_engine" in self.__dict__:
            self._engine.close()


class MiniCPMJax(MiniCPM):
    backend_name = "jax"


class MiniCPMMlx(MiniCPM):
    backend_name = "mlx"


MODELS: dict[str, type[MiniCPM]] = {"jax": MiniCPMJax, "mlx": MiniCPMMlx}
for _backend, _model in MODELS.items():
    register_model(f"minicpm_{_backend}")(_model)


def _shared(texts: Sequence[list[int]]) -> list[tuple[list[int], list[int]]]:
    """The texts that no other one begins with, each with the numbers of those that it begins with.

    In order, a text stands right before those that begin with it.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for number in sorted(range(len(texts)), key=lambda number: texts[number], reverse=True):
        text = texts[number]
        if rows and rows[-1][0][: len(text)] == text:
            rows[-1][1].append(number)
        else:
            rows.append((text, [number]))
    return rows
