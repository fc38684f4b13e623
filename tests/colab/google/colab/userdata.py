"""The one secret is HF_TOKEN: what COLAB_TOKEN says, or the name of the exception."""

import os


class NotebookAccessError(Exception):
    pass


class SecretNotFoundError(Exception):
    pass


class TimeoutException(Exception):
    pass


def get(key: str) -> str:
    said = os.environ.get("COLAB_TOKEN", "SecretNotFoundError") if key == "HF_TOKEN" else "SecretNotFoundError"
    for error in (NotebookAccessError, SecretNotFoundError, TimeoutException):
        if said == error.__name__:
            raise error(key)
    return said
