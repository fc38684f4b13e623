"""RoPE scaling for long contexts: the keys ``rope_scaling`` and, of transformers 5, ``rope_parameters``."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from weights_io.config_keys import LARGEST, SMALLEST, Refuse, among
from weights_io.errors import listed, shown

LONGROPE_KEYS = ("short_factor", "long_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling for contexts longer than the trained one.

    - ``linear``: positions are divided by ``factor``.
    - ``dynamic`` (NTK): for a length above ``max_position_embeddings`` (max) the base becomes
      theta * (factor * length / max - (factor - 1)) ** (H / (H - 2)).
    """

    type: str
    factor: float

    def grows(self, context: int, length: int) -> bool:
        """Whether keys in a sequence of ``length`` tokens are rotated by other angles than in a short one."""
        return self.type == "dynamic" and length > context


@dataclass(frozen=True)
class LongRoPE:
    """LongRoPE (arXiv 2402.13753), as MiniCPM3 and MiniCPM4 compute it.

    Each frequency has its own divisor: of ``short_factor``, or of ``long_factor`` where the larger of
    ``max_position_embeddings`` and the length exceeds ``original_max_position_embeddings``. Cosines and sines are
    multiplied by `amplitude`.
    """

    short_factor: tuple[float, ...]  # [H/2]
    long_factor: tuple[float, ...]  # [H/2]
    original_max_position_embeddings: int
    type: str = "longrope"

    def amplitude(self, context: int) -> float:
        """The factor on cosines and sines. ``context``: max_position_embeddings."""
        return longrope_amplitude(context, self.original_max_position_embeddings)

    def always_long(self, context: int) -> bool:
        """Whether ``long_factor`` is used at every length. ``context``: max_position_embeddings."""
        return context > self.original_max_position_embeddings

    def grows(self, context: int, length: int) -> bool:
        """Whether keys in a sequence of ``length`` tokens are rotated by other angles than in a short one."""
        return not self.always_long(context) and length > self.original_max_position_embeddings


AnyScaling = RopeScaling | LongRoPE


def longrope_amplitude(context: int, original: int) -> float:
    """sqrt(1 + ln(max / original) / ln(original)): 1 if both are equal. ``context`` is max."""
    return math.sqrt(1 + math.log(context / original) / math.log(original))


def rope_parameters(raw: dict[str, Any], theta: Any, refuse: Refuse) -> dict[str, Any]:
    """The values of ``rope_theta`` and ``rope_scaling`` that ``rope_parameters`` states.

    transformers 5 writes ``rope_parameters: {rope_theta, rope_type, factor...}`` in place of two keys.

    Arguments:
        raw: the contents of config.json.
        theta: the base if ``rope_parameters`` states none.
        refuse: makes the error of a sentence.

    Raises:
        InputError: the object is not understood, or contradicts the keys that it replaces.
    """
    rope = raw["rope_parameters"]
    if rope is None:
        return {}
    if not isinstance(rope, dict):
        raise refuse(f"rope_parameters is {shown(rope)}; it must be an object.")
    rope = dict(rope)
    theta = rope.pop("rope_theta", theta)
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    partial = rope.get("partial_rotary_factor")
    if not among(partial, (1, 1.0, None)) or (
        not scaled and set(rope) - {"rope_type", "type", "partial_rotary_factor"}
    ):
        raise refuse(f"rope_parameters {shown(rope)} changes the default RoPE; use a model without it.")
    rope.pop("partial_rotary_factor", None)
    new = {"rope_theta": theta, "rope_scaling": rope if scaled else None}
    for key in [key for key in new if raw.get(key) is not None]:
        both = [rope_scaling(each[key], refuse) if key == "rope_scaling" else each[key] for each in (raw, new)]
        if both[0] != both[1]:
            raise refuse(f"{key} is {shown(raw[key])}, which rope_parameters contradicts; remove one.")
    return new


def rope_scaling(raw: Any, refuse: Refuse) -> AnyScaling | None:
    """The scaling that ``rope_scaling`` states; None without one.

    Arguments:
        raw: the value of the key.
        refuse: makes the error of a sentence.

    Raises:
        InputError: the type, a key or a value is not understood.
    """
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise refuse(f"rope_scaling is {shown(raw)}; it must be null or an object with type and factor.")
    fields = dict(raw)
    kinds = [fields.pop(key) for key in ("rope_type", "type") if key in fields]
    kind = kinds[0] if kinds else None
    if kinds[1:] and kinds[1] != kind:
        raise refuse(f"rope_scaling {shown(raw)} has two types; remove the wrong one.")
    if kind == "default" and not fields:
        return None
    if kind == "longrope":
        return _longrope(fields, refuse)
    factor = fields.pop("factor", None)
    if kind not in ("linear", "dynamic"):
        raise refuse(f"rope_scaling {shown(raw)} is not supported; the types are linear, dynamic and longrope.")
    if fields:
        raise refuse(f"rope_scaling has {_listed(fields)}, not understood in {kind}; remove a mere note.")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 < factor <= LARGEST:
        raise refuse(f"rope_scaling factor is {shown(factor)}; it must be a float32 number above 1.")
    return RopeScaling(kind, float(factor))


def _listed(names: Iterable[str]) -> str:
    return listed(sorted(names), last=" and ")


def _longrope(fields: dict[str, Any], refuse: Refuse) -> LongRoPE:
    # The original computes its amplitude from the two context lengths, and reads no "factor".
    if unknown := fields.keys() - {*LONGROPE_KEYS, "factor"}:
        raise refuse(f"rope_scaling has {_listed(unknown)}, not understood in longrope; remove a mere note.")
    factor = fields.get("factor", 1)
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0):
        raise refuse(f"rope_scaling factor is {shown(factor)}; longrope does not use it, so remove it.")
    if missing := [key for key in LONGROPE_KEYS if fields.get(key) is None]:
        raise refuse(f"rope_scaling of type longrope has no {_listed(missing)}; take the released file's.")
    factors = {}
    for key in LONGROPE_KEYS[:2]:
        values = fields[key]
        if not isinstance(values, (list, tuple)) or not values:
            raise refuse(f"rope_scaling {key} is {shown(values)}; it must be a list of numbers.")
        for i, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not SMALLEST <= value <= LARGEST:
                raise refuse(f"rope_scaling {key}[{i}] is {shown(value)}; it must be a positive number.")
        factors[key] = tuple(map(float, values))
    original = fields["original_max_position_embeddings"]
    if isinstance(original, bool) or not isinstance(original, int) or not 2 <= original < 2**31:
        raise refuse(
            f"rope_scaling original_max_position_embeddings is {shown(original)}; it must be a whole number from 2 to "
            "2147483647."
        )
    return LongRoPE(factors["short_factor"], factors["long_factor"], original)


def check_llama(raw: dict[str, Any], scaling: LongRoPE, context: int, refuse: Refuse) -> None:
    """Raise `InputError` where transformers computes LongRoPE of a Llama by another rule than MiniCPM's code.

    transformers takes the amplitude from ``factor`` and the factors from the length alone. Both rules are one where
    ``max_position_embeddings`` (``context``) is the original length and there is no other ``factor`` than 1.
    """
    stated = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if context != scaling.original_max_position_embeddings or stated.get("factor") not in (None, 1):
        raise refuse(
            "transformers computes longrope of a Llama otherwise than MiniCPM's code where max_position_embeddings is "
            "not original_max_position_embeddings or a factor is given; only the common case is supported."
        )


def check_scaling(scaling: AnyScaling, rope_dim: int, context: int, refuse: Refuse) -> None:
    """Raise `InputError` where a scaling does not fit the other numbers of a config.

    Arguments:
        scaling: the scaling.
        rope_dim: the numbers of a head that RoPE rotates.
        context: max_position_embeddings.
        refuse: makes the error of a sentence.
    """
    if isinstance(scaling, LongRoPE):
        for key in LONGROPE_KEYS[:2]:
            if len(getattr(scaling, key)) != rope_dim // 2:
                raise refuse(
                    f"rope_scaling {key} is a list of {len(getattr(scaling, key))}, where RoPE needs {rope_dim // 2} "
                    f"(half of the {rope_dim} rotated numbers of a head); correct the list."
                )
        if context < 2:
            raise refuse(f"max_position_embeddings is {context}; longrope takes its logarithm, so give at least 2.")
    elif rope_dim == 2 and scaling.type == "dynamic":
        raise refuse("head_dim 2 and dynamic rope_scaling (exponent H / (H - 2)) exclude each other; fix one.")
