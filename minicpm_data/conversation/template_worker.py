"""The process that renders chat templates, with limits of time and memory. `template_process` starts it.

A template is a program that a stranger wrote. A single expression can take unlimited time and memory
(``'x' * 10**10``, a list of lists that is printed). A check from outside would not be enough, and no limit can
be set in the caller's process.
"""

import json
import signal
import sys
from datetime import datetime
from functools import cache, lru_cache
from multiprocessing.connection import Connection
from typing import Any

from minicpm_data.conversation.disguised_text import disguised

SECONDS = 1.0  # of CPU time for one prompt; a conversation of 1,000 turns takes 0.01
MEMORY = 256 << 20  # bytes of address space; the process itself needs 30 million
# Limits of a prompt's characters. A template writes text of its own, and may write its input several times (tools).
OWN_TEXT, TIMES = 500_000, 8
OUT_OF_MEMORY = 3  # exit status


def main() -> None:
    """Answer requests on the connection whose file descriptor is the first argument, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the caller, who closes the connection
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, even within a single long operation
    connection = Connection(int(sys.argv[1]))
    compiled("")  # imports Jinja
    _limit_memory()
    connection.send_bytes(b"ready")
    while True:
        try:
            request = connection.recv_bytes().decode("utf-8", "surrogatepass")
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answer: dict[str, Any]
        try:
            question = json.loads(request)
            if "variables" in question:
                answer = {"text": _rendered(longest=OWN_TEXT + TIMES * len(request), **question)}
            else:
                answer = {"names": sorted(_names(question["template"]))}
        except MemoryError:
            sys.exit(OUT_OF_MEMORY)
        except Exception as error:  # a template can fail as any program can
            answer = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
        connection.send_bytes(json.dumps(answer).encode())
        signal.setitimer(signal.ITIMER_PROF, 0)


def _rendered(template: str, variables: dict[str, Any], longest: int, hidden: dict[str, str]) -> str:
    """The rendered text. Raises `ValueError` where it is longer than ``longest`` characters.

    ``hidden`` are the characters of the variables that stand for others in the tests of the template.
    """
    parts: list[str] = []
    length = 0
    if hidden:
        variables = disguised(variables, {ord(char): shown for char, shown in hidden.items()})
    for part in compiled(template).generate(variables):
        parts.append(part)
        length += len(part)
        if length > longest:
            raise ValueError(f"it makes a prompt of more than {longest:,} characters")
    return "".join(parts)


def _names(template: str) -> set[str]:
    """The variables that ``template`` reads and does not set."""
    from jinja2.meta import find_undeclared_variables

    return find_undeclared_variables(environment().parse(template))


def _limit_memory() -> None:
    """Limit this process's address space to `MEMORY`, and write no core dumps."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # not available on every system; the caller also checks the memory
        pass


@lru_cache(maxsize=16)
def compiled(template: str):
    """``template``, compiled in `environment`."""
    return environment().from_string(template)


@cache
def environment():
    """Jinja in a sandbox. A template cannot access an attribute that leads outside its values, nor change a value."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}`` marks an assistant turn for training. Its content is rendered."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return env
