"""Which parts of a rendered conversation are its answers: these are what training trains."""

import re
from collections.abc import Iterator, Sequence

from minicpm_data.conversation.messages import Message
from weights_io.errors import InputError

THINK, THOUGHT = "<think>", "</think>"  # around the reasoning at the start of an answer


def cut_at_answers(prompt: str, outside: Sequence[str], answers: Sequence[Message]) -> list[str]:
    """Split a rendered prompt at its answers.

    The template may have stripped the answers, changed the spaces around ``<think>`` and ``</think>``, and dropped the
    reasoning of all answers but the last. It writes tool calls and thoughts in its own form.

    Arguments:
        prompt: the rendered conversation.
        outside: the texts that the template writes around plain answers.
        answers: the messages of the assistant.

    Returns:
        The text before the first answer, the first answer, the text up to the second answer, and so on.

    Raises:
        InputError: the template changed the answers in another way.
    """
    pieces: list[str] = []
    at, last = 0, len(answers) - 1

    def befores(k: int) -> list[str]:
        """The texts that may precede answer k. Reasoning replaces an empty reasoning block of the template."""
        whole = outside[k]
        opened = whole.rfind(THINK) if k <= last and _has_thought(answers[k]) else -1
        return [whole] if opened < 0 else [whole, whole[:opened]]

    def ends(k: int, start: int) -> Iterator[int]:
        if _is_plain(answers[k]):
            return _ends(prompt, start, answers[k]["content"], k == last)
        return _wholes(prompt, start, answers[k], befores(k + 1), k == last)

    for k in range(len(answers) if len(outside) == last + 2 else 0):
        starts = [at + len(before) for before in befores(k) if prompt.startswith(before, at)]
        spans = ((start, end) for start in starts for end in ends(k, start))
        fitting = ((s, e) for s, e in spans if any(prompt.startswith(after, e) for after in befores(k + 1)))
        start, end = next(fitting, (-1, -1))
        if start < 0:
            break
        pieces += [prompt[at:start], prompt[start:end]]
        at = end
    if len(pieces) != 2 * len(answers) or prompt[at:] != outside[-1]:
        raise InputError(
            "the chat template leaves out, reorders or rewrites assistant turns, so that they cannot be told apart "
            "from the rest; train conversations with one such turn, or give the model a plainer template."
        )
    return [*pieces, prompt[at:]]


def _is_plain(answer: Message) -> bool:
    """Whether an answer is a content alone."""
    return not answer.get("tool_calls") and _thought_of(answer) is None


def _thought_of(answer: Message) -> str | None:
    """The thought that an answer has beside its content, under the key that the template expects."""
    return answer.get("reasoning_content", answer.get("thought"))


def _has_thought(answer: Message) -> bool:
    return bool(_thought_of(answer)) or _spells_thought(answer["content"])


def _spells_thought(content: str) -> bool:
    return THINK in content or THOUGHT in content


def _wholes(prompt: str, start: int, answer: Message, afters: Sequence[str], last: bool) -> Iterator[int]:
    """Yields the possible ends of an answer with calls or a thought, the first place first: where one of ``afters``
    begins, and the answer holds all of its parts. The last thought has to be there; a template may leave out an earlier
    one."""
    content, thought = answer["content"], _thought_of(answer)
    parts = [call["function"]["name"] for call in answer.get("tool_calls", ())]
    if thought is None and _spells_thought(content):
        spelled, _, content = content.rpartition(THOUGHT)
        thought = spelled.rpartition(THINK)[2]
    parts += [content.strip(), thought.strip() if thought and last else ""]
    if any(prompt.find(part, start) < 0 for part in parts):
        return
    least = max(prompt.find(part, start) + len(part) for part in parts)
    if last:
        yield from (end for after in afters if (end := len(prompt) - len(after)) >= least)
        return
    while found := [at for after in afters if (at := prompt.find(after, least)) >= 0]:
        least = min(found)
        yield least
        least += 1


def _ends(prompt: str, start: int, content: str, last: bool) -> Iterator[int]:
    """Yields the possible ends of an answer that starts at ``start``. The longest form of the answer comes first."""
    for form in (content, content.lstrip("\n"), content.lstrip(), content.rstrip(), content.strip()):
        if prompt.startswith(form, start):
            yield start + len(form)
    if not _spells_thought(content):
        return
    parts = [part.strip() for part in re.split(f"({THINK}|{THOUGHT})", content)]
    forms = [parts if THINK in content else [THINK, *parts]]
    thought, _, answer = content.partition(THOUGHT)
    thought = thought.strip().removeprefix(THINK)
    if THOUGHT not in answer and THINK not in thought and (not last or not thought.strip()):
        forms.append([answer.strip()])
    spaces = content[len(content.rstrip()) :]
    for wanted in forms:
        end = start
        for part in filter(None, wanted):
            while prompt[end : end + 1].isspace():
                end += 1
            if not prompt.startswith(part, end):
                break
            end += len(part)
        else:
            if prompt.startswith(spaces, end):
                yield end + len(spaces)
            yield end
            yield len(prompt) - len(prompt[end:].lstrip())  # reasoning without an answer after it
