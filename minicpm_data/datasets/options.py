"""The options of all commands that read training data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataOptions:
    ignore_keys: tuple[str, ...] = ()
    """Keys to ignore in the lines and messages of the data. Any other unknown key is an error."""
    special_tokens_as_text: bool = False
    """Treat the names of special tokens in the data ("<|sql|>", "</s>") as plain text, as the server does with its
    requests. By default they become the tokens."""
