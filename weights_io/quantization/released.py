"""The forms in which released files hold the matrices of the layers, for estimates without a file."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from weights_io.catalog import CATALOG
from weights_io.errors import InputError, listed

Format = Literal["gptq-int4", "gptq-int8", "awq-int4", "bitsandbytes-int8", "mlx-int4", "mlx-int8"]


@dataclass(frozen=True)
class ReleasedForm:
    """One form of all matrices of the layers."""

    bits: int  # per code: 4 or 8
    group: int | None  # inputs with one scale; None: a whole row
    parts: frozenset[str] = frozenset()  # which of zeros, biases and order there are beside codes and scales


# With the tool's default settings, which OpenBMB's scripts for GPTQ and AWQ take too. GPTQ is symmetric: a zero point
# in the middle of the codes' range is not kept.
FORMS = {
    "gptq-int4": ReleasedForm(4, 128, frozenset({"order"})),
    "gptq-int8": ReleasedForm(8, 128, frozenset({"order"})),
    "awq-int4": ReleasedForm(4, 128, frozenset({"zeros"})),
    "bitsandbytes-int8": ReleasedForm(8, None),
    "mlx-int4": ReleasedForm(4, 64, frozenset({"biases"})),
    "mlx-int8": ReleasedForm(8, 64, frozenset({"biases"})),
}


def released_form(name: str, model: str) -> ReleasedForm:
    """The form that a file of ``model`` has in a format.

    Arguments:
        name: a `Format`.
        model: a short name of the catalog, or anything else.

    Returns:
        The form, with the settings of the released file where the catalog states them, and otherwise the tool's.

    Raises:
        InputError: there is no such format.
    """
    if name not in FORMS:
        raise InputError(f"is {name!r}; it must be 4, 8 or one of {listed(get_args(Format))}.", option="quantize")
    method, _, bits = name.partition("-int")
    for entry in CATALOG:
        stated = entry.quantization or {}
        of_model = entry.name.startswith(f"{model.lower()}-")
        if of_model and (stated.get("quant_method"), stated.get("bits")) == (method, int(bits)):
            parts = FORMS[name].parts | ({"zeros"} if stated.get("sym") is False else set())
            return dataclasses.replace(FORMS[name], group=stated["group_size"], parts=parts)
    return FORMS[name]
