"""Token ids that a caller hands to a model."""

from typing import Any

import numpy as np

from weights_io.errors import InputError


def checked_ids(ids: Any, vocab_size: int, device_array: Any) -> Any:
    """``ids``, as a numpy array unless they are a ``device_array`` already: only the shape of such is checked, as to
    look at the values is to wait for the device.

    Raises `InputError` where they are not [B, T] whole numbers from 0 to ``vocab_size`` - 1. (On a device, an id beyond
    the table reads some row or none, without a word.)
    """
    if isinstance(ids, device_array):
        if ids.ndim != 2:
            raise InputError(f"input_ids has the shape {list(ids.shape)}; it must be [batch, tokens].")
        return ids
    try:
        array = np.asarray(ids)
    except ValueError:
        raise InputError("input_ids has rows of unequal length; pad them and give an attention_mask.") from None
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise InputError(f"input_ids is {array.dtype} {list(array.shape)}; it must be whole numbers [batch, tokens].")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < vocab_size:
        wrong = int(array.min()) if array.min() < 0 else int(array.max())
        raise InputError(f"token id {wrong} is outside the vocabulary of {vocab_size}.")
    return array.astype(np.int32)
