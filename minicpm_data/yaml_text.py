"""Read YAML text strictly and in bounded time and memory, as `weights_io.files.json_text` reads JSON."""

from typing import Any

import yaml

from weights_io.errors import InputError, short

MAX_BYTES = 2**16  # a training run's options have about 2,000; parsing 2**16 takes a second
MAX_PARTS = 2000  # values; an alias counts as all the values that it refers to
MAX_DEPTH = 10  # levels of nested lists and mappings; options have 2


def load(data: bytes, what: str) -> Any:
    """The value of a YAML text.

    Arguments:
        data: the text in UTF-8.
        what: its name in messages.

    Raises:
        InputError: it is not YAML, is too large, is nested too deeply, or has a key twice.
    """
    try:
        text = data.decode("utf-8-sig")
        _check_size(text, what)
        return yaml.load(text, Loader=_Loader)
    except InputError:
        raise
    # Besides YAMLError: the exceptions of Python's own parsers of numbers, dates and so on.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"{what} is not YAML ({reason:.200}); mend it.") from None


def _check_size(text: str, what: str) -> None:
    """Raises `InputError` where there are too many values or levels.

    The check reads the parser's events, which needs no recursion. An alias of aliases can stand for any number of
    values.
    """
    sizes: dict[str, int] = {}
    within: list[tuple[str | None, int]] = []  # per open list or mapping: its anchor, and the parts before it
    parts = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            within.append((event.anchor, parts))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = within.pop()
            if anchor is not None:
                sizes[anchor] = parts + 1 - before
        elif isinstance(event, yaml.AliasEvent) and any(event.anchor == anchor for anchor, _ in within):
            raise InputError(f"{what} has a list or mapping, *{short(event.anchor)}, within itself; write it out.")
        elif isinstance(event, yaml.AliasEvent):
            parts += sizes.get(event.anchor, 1)
        parts += 1
        if parts > MAX_PARTS or len(within) > MAX_DEPTH:
            raise InputError(
                f"{what} has more than {MAX_PARTS} values, or {MAX_DEPTH} lists and mappings in each other; give fewer."
            )


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a mapping with the same key twice."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key {short(twice)} stands there twice")
        return node
