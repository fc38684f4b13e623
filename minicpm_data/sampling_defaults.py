"""The temperature and top-p of a chat where nobody gives them: those that the model's own files or card state.

The numbers of a family are those of its model card or guide. MiniCPM-2B's are in the ``chat()`` of its modeling file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weights_io.errors import InputError, short
from weights_io.files.json_text import read_optional_json
from weights_io.files.near_keys import refuse_near_keys

Pair = tuple[float, float]  # temperature, top-p
CHAT = "MiniCPM-2B's chat()"
# Family -> the pair with thinking (or of a model that never thinks), the pair without thinking, where both stand.
CARDS: dict[str, tuple[Pair, Pair | None, str]] = {
    "minicpm": ((0.3, 0.8), None, CHAT),
    "minicpm3": ((0.8, 0.8), None, "generation_config.json as released"),
    "minicpm4": ((0.8, 0.8), None, "generation_config.json as released"),
    "minicpm4.1": ((0.6, 0.95), (0.7, 0.8), "model card"),
    "minicpm5": ((0.9, 0.95), (0.7, 0.95), "model card"),
    "minicpm-v-1": ((0.6, 0.8), None, "MiniCPM-V's chat()"),
    "minicpm-v-2": ((0.7, 0.8), None, "MiniCPM-V 2.0's chat()"),
    "omnilmm": ((0.6, 0.9), None, "OmniLMM-12B's chat()"),
}
# The files of MiniCPM3 and MiniCPM4 state this pair. In the file of another model of the family it does not replace the
# pair of the 2B's `chat()`, which ignores the file, nor those of a card.
OF_FILES: Pair = (0.8, 0.8)
USED, OTHERS = ("temperature", "top_p", "do_sample"), frozenset({"top_k", "top_h"})  # keys of generation_config.json
VOCABULARY_4 = 73_448  # tokens of MiniCPM3, MiniCPM4 and BitCPM4


@dataclass(frozen=True)
class SamplingDefaults:
    """The defaults of a chat in one thinking mode. ``source``: where they are stated."""

    temperature: float
    top_p: float
    source: str


OF_CHAT = SamplingDefaults(*CARDS["minicpm"][0], CHAT)


@dataclass(frozen=True)
class ChatSampling:
    """The sampling defaults of a model.

    Arguments:
        family: a key of `CARDS`; None for a model of another family.
        stated: temperature and top-p of generation_config.json; None where it states neither.
    """

    family: str | None = None
    stated: Pair | None = None

    @property
    def by_mode(self) -> bool:
        """Whether thinking has other defaults than no thinking."""
        return self.family is not None and CARDS[self.family][1] is not None

    def of(self, enable_thinking: bool | None = None) -> SamplingDefaults:
        """The defaults of a chat. A file states one pair, which for a model that thinks is the pair for thinking."""
        thought, plain, source = CARDS.get(self.family or "", (None, None, ""))
        card = plain if enable_thinking is False and plain is not None else thought
        yields = card is not None and (self.stated == OF_FILES or card is plain)
        if self.stated is not None and not yields:
            return SamplingDefaults(*self.stated, "generation_config.json")
        if card is None:
            return replace(OF_CHAT, source=f"{CHAT}, as this model states none")
        return SamplingDefaults(*card, source)

    def line(self) -> str:
        """The defaults as a line of text, for `inspect`."""
        modes = {" with thinking": self.of(True), " without": self.of(False)} if self.by_mode else {"": self.of()}
        sources = {found.source for found in modes.values()}
        said = [
            f"temperature {found.temperature:g}, top-p {found.top_p:g}{mode}"
            + (f" ({found.source})" if len(sources) > 1 else "")
            for mode, found in modes.items()
        ]
        return "; ".join(said) + (f" ({sources.pop()})" if len(sources) == 1 else "")


def chat_sampling(config: Mapping[str, Any], template: str, folder: Path | None) -> ChatSampling:
    """The sampling defaults of a checkpoint.

    Arguments:
        config: the fields of its `ModelConfig`.
        template: its chat template.
        folder: its folder, whose generation_config.json is read; None for a GGUF file.

    Raises:
        InputError: generation_config.json states a temperature or top-p that is out of range.
    """
    return ChatSampling(
        family_of(config, template), None if folder is None else _stated(folder / "generation_config.json")
    )


def family_of(config: Mapping[str, Any], template: str) -> str | None:
    """The key of `CARDS` that architecture and template point to; None for a model of another family."""
    if config.get("vision") is not None:
        return config["vision"]["variant"]
    if '<function name="' in template and "enable_thinking" in template:
        return "minicpm5"
    if config["model_type"] == "minicpm3":
        return "minicpm3"
    if config["model_type"] == "minicpm" and "<|im_start|>" in template:
        if "enable_thinking" in template:
            return "minicpm4.1"
        longrope = (config["rope_scaling"] or {}).get("type") == "longrope"
        return "minicpm4" if longrope or config["vocab_size"] == VOCABULARY_4 else "minicpm"  # MiniCPM-2B-128k
    return "minicpm" if config["model_type"] == "minicpm" or "<用户>" in template else None


def family_named(name: str) -> str:
    """The key of `CARDS` for a short name of the catalogue."""
    if name == "minicpm-v":
        return "minicpm-v-1"
    found = [family for family in CARDS if name.removeprefix("bitcpm4").startswith(family)]
    return max(found, key=len, default="minicpm4")


def _stated(path: Path) -> Pair | None:
    """Temperature and top-p of a generation_config.json. transformers' value stands for one that is not stated, and
    greedy decoding is temperature 0."""
    settings = read_optional_json(path)
    refuse_near_keys(settings, USED, OTHERS, path)
    sampled = settings.get("do_sample")
    if not isinstance(sampled, bool | None):
        raise InputError(f"{path}: do_sample is {short(sampled)}; it must be true or false.")
    if sampled is False:
        return 0.0, 1.0
    temperature, top_p = (_number(settings, name, path) for name in ("temperature", "top_p"))
    if temperature is None and top_p is None:
        return None
    return 1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p


def _number(settings: Mapping[str, Any], name: str, path: Path) -> float | None:
    value = settings.get(name)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 <= value < math.inf if name == "temperature" else 0 < value <= 1):
        wanted = "a number from 0 on" if name == "temperature" else "a number above 0 and at most 1"
        raise InputError(f"{path}: {name} is {short(value)}; it must be {wanted}.")
    return float(value)
