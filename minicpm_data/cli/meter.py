"""The speed of an answer: of its prompt, of its generation, and of compiling."""

import time
from collections.abc import Iterable, Iterator

from minicpm_data.generation.api import Device
from minicpm_data.generation.responses import Response


class Meter:
    """Measures the time of the prompt (up to the first token), of the generation, and of compiling."""

    def __init__(self, device: Device):
        self.device = device
        self.tokens: list[int] = []
        self.from_draft = 0
        self.reason: str | None = None
        self.clock = [time.perf_counter()]  # times: at the start, at the first token, at the end
        self.compiled = [device.compile_seconds()]

    def watch(self, answer: Iterable[Response]) -> Iterator[Response]:
        try:
            for response in answer:
                self.tokens += [] if response.token is None else [response.token]
                self.from_draft += response.from_draft
                self.reason = response.finish_reason or self.reason
                if len(self.clock) == 1:
                    self._mark()
                yield response
        finally:  # also if Ctrl-C ended the answer
            self._mark()

    def _mark(self) -> None:
        self.clock.append(time.perf_counter())
        self.compiled.append(self.device.compile_seconds())

    def report(self, prompt_tokens: int) -> str:
        spans = [b - a for a, b in zip(self.clock, self.clock[1:], strict=False)]
        compiling = [b - a for a, b in zip(self.compiled, self.compiled[1:], strict=False)]
        prompt, answer = (max(s - c, 1e-9) for s, c in zip(spans, compiling, strict=True))
        lines = [
            "=" * 10,
            f"Prompt: {prompt_tokens} tokens, {prompt_tokens / prompt:.1f} tokens-per-sec",
            f"Generation: {len(self.tokens)} tokens, {max(len(self.tokens) - 1, 0) / answer:.1f} tokens-per-sec",
            f"Peak memory: {self.device.peak_memory() / 1e9:.3f} GB on {self.device.description()}",
        ]
        if self.from_draft:
            lines.append(f"Guessed: {self.from_draft} of {len(self.tokens)} tokens")
        if sum(compiling) > 0:
            lines.append(f"Compiling: {sum(compiling):.1f} s")
        if self.reason == "length":
            lines.append("The answer was cut at --max-tokens.")
        return "\n".join(lines)
