"""What a request to the engine gets: responses, or the error that ended it."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from minicpm_data.generation.responses import Response
from weights_io.errors import InputError

Answered = Response | Exception


def known(names: Sequence[str]) -> str:
    """ "are 'a', 'b', 'c' and 2 more": at most three names and a count."""
    if not names:
        return "are none"
    more = len(names) - 3
    return (
        f"{'is' if len(names) == 1 else 'are'} "
        + ", ".join(map(repr, names[:3]))
        + (f" and {more} more" if more > 0 else "")
    )


class EngineClosed(InputError):
    """The engine was closed before a request was finished, or before it was submitted."""


class Answer:
    """Turns the tokens of a request into `Response`s. ``deliver`` is called with each."""

    def __init__(self, deliver: Callable[[Answered], None], texts: Callable[[Iterator[int]], Iterator[Response]]):
        self.deliver = deliver
        self._tokens: deque[int] = deque()
        self._responses = texts(iter(self._tokens.popleft, None))

    def add(self, token: int) -> Response:
        self._tokens.append(token)
        return next(self._responses)  # pulls exactly one token
