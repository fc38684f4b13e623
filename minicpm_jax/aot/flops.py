"""The multiplications of a traced program, loops multiplied out: what it has to compute on all devices together."""

import math
from typing import Any


def flops(jaxpr: Any) -> float:
    """Of a (closed) jaxpr: two for each multiplication of matrix products, and what Pallas kernels state. The body of a
    loop whose end is data counts once; of branches the costliest counts."""
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        parameters = equation.params
        name = equation.primitive.name
        if name == "dot_general":
            total += _product(equation)
        elif name == "pallas_call":
            total += getattr(parameters.get("cost_estimate"), "flops", 0) or 0
        elif name == "cond":
            total += max(flops(branch) for branch in parameters["branches"])
        elif name == "scan":
            total += parameters["length"] * flops(parameters["jaxpr"])
        elif name == "while":
            total += flops(parameters["body_jaxpr"])
        elif name == "shard_map":
            total += _parts(parameters) * flops(parameters["jaxpr"])
        else:
            total += sum(flops(value) for value in parameters.values() if hasattr(value, "eqns"))
            total += sum(flops(value) for value in parameters.values() if hasattr(value, "jaxpr"))
    return total


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _parts(parameters: Any) -> int:
    """On how many devices a `shard_map` does different work: the axes that split any of what goes in."""
    names: set[str] = set()
    for spec in parameters["in_specs"]:
        for entry in spec:
            names.update([entry] if isinstance(entry, str) else entry or ())
    return math.prod(parameters["mesh"].shape[name] for name in names)
