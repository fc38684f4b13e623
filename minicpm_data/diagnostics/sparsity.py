"""Activation sparsity in both backends: the models for which it is counted, and the line that reports it."""

from typing import TYPE_CHECKING

from weights_io.config import ModelConfig
from weights_io.errors import InputError

if TYPE_CHECKING:
    import numpy as np


def checked_threshold(config: ModelConfig) -> float:
    """Check that activation sparsity can be counted for a model.

    Arguments:
        config: the model's config.

    Returns:
        The activation's threshold.

    Raises:
        InputError: the model's activation is never 0, or the model has experts.
    """
    if config.activation_threshold is None:
        raise InputError(
            f"{config.hidden_act} is never exactly 0, so there is no activation sparsity to report; take a model with "
            "relu or fatrelu, such as minicpm-s-1b."
        )
    if config.num_experts:
        raise InputError("activation sparsity is counted in dense models alone; take one without experts.")
    return config.activation_threshold


def line(shares: "np.ndarray") -> str:
    """The line that reports the sparsity.

    Arguments:
        shares: [L] the fraction of each layer's neurons that were 0.

    Returns:
        The line for the user.
    """
    low, high = int(shares.argmin()), int(shares.argmax())
    return (
        f"Activation sparsity: {shares.mean():.1%} of the MLP's neurons were 0; "
        f"lowest in layer {low} ({shares[low]:.1%}), highest in layer {high} ({shares[high]:.1%})"
    )
