"""Check the token ids that a caller passes to a model."""

from typing import Any

import numpy as np

from weights_io.errors import InputError


def checked_ids(ids: Any, vocab_size: int, device_array: Any) -> Any:
    """Check input ids. On a device, an id outside the vocabulary would silently read a wrong row or no row.

    Arguments:
        ids: [B, T] integers: nested lists, a numpy array or an array of the backend.
        vocab_size: every id must be below it.
        device_array: the backend's array type. Only the shape of such an array is checked, because reading its values
            would wait for the device.

    Returns:
        ``ids`` as an int32 numpy array; a device array unchanged.

    Raises:
        InputError: ``ids`` has another shape or dtype, or an id is out of range.
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
