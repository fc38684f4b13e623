"""Tokens per second with and without speculative decoding, for text that repeats itself and for text that does not.

    python -m benchmarks.speculation --backend jax

The weights are random. Greedy text of such a model soon repeats itself ("copies itself"). Text sampled at temperature 1
does not ("free"). The draft model is the model with only its lowest layers. All ways must give the same tokens as plain
decoding; otherwise the command fails.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.models import random_model, wide
from benchmarks.timing import alternating
from minicpm_serve.backends import BackendName
from weights_io import command_line
from weights_io.errors import InputError

TEXTS: dict[str, dict[str, Any]] = {"copies itself": {}, "free": {"temperature": 1.0, "seed": 1}}


@dataclass(frozen=True)
class Options:
    backend: BackendName = "jax"
    """Backend to measure."""
    layers: int = 8
    """Layers of the model."""
    draft_layers: int = 2
    """Layers of the draft model."""
    words: int = 16384
    """Vocabulary size."""
    tokens: int = 96
    """Tokens of an answer."""
    num_draft_tokens: tuple[int, ...] = (3, 7)
    """Numbers of tokens that are guessed at a time."""
    rounds: int = 5
    """Timed runs. The median is reported."""


def main(options: Options) -> None:
    """Time plain decoding, prompt lookup and a draft model in turn."""
    backend, model = random_model(options.backend, wide(options.layers, options.words))
    draft = shallow(model, options.backend, options.draft_layers)
    ways: dict[str, dict[str, Any]] = {"plain": {}}
    for count in options.num_draft_tokens:
        ways[f"prompt lookup, {count} at once"] = {"prompt_lookup": True, "num_draft_tokens": count}
        ways[f"draft model, {count} at once"] = {"draft_model": draft, "num_draft_tokens": count}
    print("| text | way | guessed | tokens/s | gain |\n|---|---|---|---|---|")
    for text, sampling in TEXTS.items():
        made: dict[str, list[Any]] = {}

        def answer(name: str, given: dict[str, Any], made: dict[str, list[Any]]) -> None:
            made[name] = list(backend.generator.stream_generate(model, None, [1, 5, 9], options.tokens, **given))

        calls = {name: functools.partial(answer, name, sampling | way, made) for name, way in ways.items()}
        seconds = alternating(calls, options.rounds)
        for name in ways:
            if [r.token for r in made[name]] != [r.token for r in made["plain"]]:
                raise InputError(f"{name} gives other tokens than plain decoding on the text that {text}.")
            share = sum(r.from_draft for r in made[name]) / options.tokens
            speed, gain = options.tokens / seconds[name], seconds["plain"] / seconds[name]
            print(f"| {text} | {name} | {share:.0%} | {speed:.1f} | {gain:.2f} |", flush=True)


def shallow(model: Any, name: BackendName, layers: int) -> Any:
    """A model of the lowest layers, with the same embedding and head."""
    kept = list(model.model.layers)[:layers]
    config = replace(model.config, num_hidden_layers=layers)
    if name == "jax":
        import jax

        from minicpm_jax.cpu.form import Layers

        draft = jax.tree.map(lambda x: x, model)
        draft.model.layers = Layers(kept)
    else:
        draft = type(model)(config)
        draft.model.embed_tokens, draft.model.norm, draft.model.layers = (
            model.model.embed_tokens,
            model.model.norm,
            kept,
        )
    draft.config = config
    return draft


if __name__ == "__main__":
    command_line.run(main, Options, "python -m benchmarks.speculation")
