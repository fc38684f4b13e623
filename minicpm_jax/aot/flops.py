"""Floating-point operations of a traced program, including loop iterations, over all devices together."""

import math
from typing import Any


def flops(jaxpr: Any) -> float:
    """Operations of a (closed) jaxpr: two per multiplication of matrix products, and the ``cost_estimate`` of Pallas
    kernels. The body of a loop with a data-dependent trip count counts once; of branches the costliest counts."""
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
            # A closed jaxpr has both `eqns` and `jaxpr`.
            total += sum(flops(value) for value in parameters.values() if hasattr(value, "eqns"))
    return total


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _parts(parameters: Any) -> int:
    """Number of devices on which a `shard_map` does different work: the axes that shard any of its inputs."""
    names: set[str] = set()
    for spec in parameters["in_specs"]:
        for entry in spec:
            names.update([entry] if isinstance(entry, str) else entry or ())
    return math.prod(parameters["mesh"].shape[name] for name in names)
