"""The one error style: what the user gave cannot be used, said in one sentence that names the thing and the remedy."""


class InputError(ValueError):
    """A file, flag, request or data line of the user's that cannot be used.

    The message is one sentence. Command lines print it after ``error:`` and exit with status 2, without a traceback;
    library callers catch it as a ``ValueError``, and a notebook shows the sentence alone.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in place of a traceback."""
        return [f"error: {self}"]
