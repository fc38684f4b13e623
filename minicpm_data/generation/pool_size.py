"""How many pages an engine has, and those that hold the text of a file from its start on."""

import bisect
from collections.abc import Callable

from minicpm_data.generation.pages import PagePool, Row
from minicpm_data.generation.prompt_cache import AGAIN, PromptCache
from weights_io.errors import InputError
from weights_io.memory import no_room

STEP = 256  # tokens; a context that does not fit memory is shortened to a multiple of this


class OutOfMemory(InputError):
    """The memory does not hold the key/value cache of one request.

    ``context``: the longest context that fits; None if none fits.
    """

    def __init__(self, sentence: str, context: int | None):
        super().__init__(sentence, others=["context", "cache_tokens"])
        self.context = context


def pool_of(
    page: int,
    bytes_of: Callable[[int], int],
    free: int | None,
    most: int,
    context: int,
    cache_tokens: int | None,
    pinned: int = 0,
) -> PagePool:
    """The pool of pages.

    Arguments:
        page: tokens of a page.
        bytes_of: pages -> bytes of their keys and values.
        free: bytes of free memory; None where unknown.
        most: tokens that are more than enough.
        context: tokens that a request may have.
        cache_tokens: tokens to hold; None: ``most``, or as many as there is room for.
        pinned: tokens of a file, for which there are pages beside the others.

    Raises:
        OutOfMemory: the memory does not hold one request, or ``cache_tokens``.
    """

    def pages_of(tokens: int) -> int:
        """With the page that is nobody's, and those of the file."""
        return -(-tokens // page) + 1 + -(-pinned // page)

    least, pages = pages_of(context), pages_of(max(context, most))
    if cache_tokens is not None:
        least = max(least, -(-cache_tokens // page) + 1)
    elif free is not None:
        pages = min(pages, free * pages // max(1, bytes_of(pages)))
    if free is None or bytes_of(least) <= free:
        return PagePool(least if cache_tokens else max(least, pages), page)
    sizes = range(STEP, context + 1, STEP)
    fits = STEP * bisect.bisect_right(sizes, free, key=lambda tokens: bytes_of(pages_of(tokens))) or None
    what = f"the keys and values of {cache_tokens or context:,} tokens"
    if cache_tokens and bytes_of(pages_of(context)) <= free:
        remedy = "lower {cache_tokens}, or leave it out"
    elif fits is None:
        remedy = "take a smaller model, or keep its weights in fewer bits"
    else:
        remedy = f"lower {{context}} (to {fits:,} tokens)"
    raise OutOfMemory(no_room(what, bytes_of(least), free, remedy), fits)


def check_prompt_cache(file: PromptCache, rotates: bool) -> None:
    """Raises `InputError` for a file that requests of an engine cannot share. ``rotates``: whether RoPE is scaled for
    its length."""
    if file.text is None:
        raise InputError(f"{file.path} is of mlx_lm and holds no ids, which an engine needs; {AGAIN}.")
    if file.max_size is not None:
        raise InputError(f"{file.path} holds a rotating cache, and an engine keeps all keys; {AGAIN}.")
    if rotates:
        raise InputError(
            f"holds {file.length:,} tokens, for which RoPE is scaled, so no other prompt has its keys; leave it out.",
            option="prompt_cache_file",
        )


def pinned(file: PromptCache, pool: PagePool, whole: bool) -> Row:
    """Pages for the text of a file, which its keys and values are to be written into. ``whole``: for its whole pages
    alone."""
    length = file.length // pool.page * pool.page if whole else file.length
    if not length:
        raise InputError(
            f"holds {file.length} tokens, less than a page of {pool.page}, so no request can share them; leave it out.",
            option="prompt_cache_file",
        )
    row = pool.take(file.ids[:length], share=False)
    assert row is not None  # `pool_of` has made room
    return row
