"""The options of every command that reads training data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataOptions:
    ignore_keys: tuple[str, ...] = ()
    """Keys of the data's lines and messages to pass over; another key that is not understood is refused."""
    special_tokens_as_text: bool = False
    """Keep tokens of the vocabulary that the data spells out ("<|sql|>", "</s>") plain text, as the server does with
    what it is sent; by default they become the tokens."""
