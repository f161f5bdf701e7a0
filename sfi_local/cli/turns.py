"""Which turns of a conversation a context still holds. Pure."""

from __future__ import annotations

from typing import Callable, Sequence

from sfi_local.runtime.template import Message


def has_document(question: Message) -> bool:
    """Whether a text lies in it before the question itself."""
    return len(question.parts) > 1


def fit(messages: Sequence[Message], count: Callable[[Sequence[Message]], int], limit: int, aim: int) -> tuple[list[Message], int]:
    """(messages that count(messages) <= limit holds for, how many turns were left out).

    messages: a system message or none, turns of a question and its answer, and a last question
    aim:      where some must go, so many go that at most this is left, or the next question would drop one again
    The system message and the last question stay, and of a turn both halves go. Turns about a document go last. What
    does not fit without any turn is returned all the same, for its reader to refuse.
    """
    if count(messages) <= limit:
        return list(messages), 0
    head = [m for m in messages[:1] if m.role == "system"]
    body = list(messages[len(head):])
    turns = [body[i:i + 2] for i in range(0, len(body) - 1, 2)]
    left = list(range(len(turns)))
    kept = [*head, *body]
    for i in sorted(left, key=lambda i: (has_document(turns[i][0]), i)):
        left.remove(i)
        kept = [*head, *(message for j in left for message in turns[j]), body[-1]]
        if count(kept) <= aim:
            break
    return kept, len(turns) - len(left)
