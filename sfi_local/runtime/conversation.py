"""Messages and their tokens in a model's slot: a question computes only what is new."""

from __future__ import annotations

from contextlib import closing
from typing import Any, Iterator, Sequence

from sfi_local.errors import ArgumentError, InputError
from sfi_local.runtime.step import Step
from sfi_local.runtime.template import Message


class Conversation:
    """Questions and answers with one model.

    model:    a Model
    messages: what was said, Message objects; an answer is kept as the tokens that were drawn
    system:   a first message for the model; tools: descriptions of functions, for its chat template
    options:  of Model.generate, for every answer
    Conversations of one model share its slot: one that follows another is read again.
    """

    def __init__(self, model: Any, system: str | None = None, tools: Sequence[dict] | None = None, **options: Any):
        self.model, self.tools, self._options = model, tools, options
        self.messages: list[Message] = [] if system is None else [Message("system", [system])]

    def ask(self, text: str, **options: Any) -> Iterator[Step]:
        """The answer to a question, as it is generated; both are part of the conversation from its first token on.

        The arguments are checked now, as by Model.generate, which has the options too. An answer that ends early, by cancel() or because
        its iterator is closed, stays as far as it came; one that fails before its first token leaves the conversation as it was.
        """
        if not isinstance(text, str) or not text.strip():
            raise InputError("The question is empty: give some text.")
        messages = [*self.messages, Message("user", [text])]
        steps = self.model.generate(messages, **{"tools": self.tools, **self._options, **options})
        return self._answer(messages, steps)

    def cancel(self) -> None:
        """End the answer that is being generated, from any thread; what it has said stays."""
        self.model.cancel()

    def save(self) -> list[dict[str, Any]]:
        """What was said, as JSON knows it; see Model.chat."""
        return [{"role": m.role, "parts": list(m.parts), "thought": m.thought} for m in self.messages]

    def restore(self, saved: Sequence[dict[str, Any]]) -> None:
        """Go on from what save() gave, with the same model. Raises ArgumentError for what it did not give."""
        self.messages = [_message(one, self.model.vocabulary.n_vocab) for one in saved]

    def _answer(self, messages: list[Message], steps: Iterator[Step]) -> Iterator[Step]:
        tokens: list[int] = []
        with closing(steps):  # type: ignore[type-var]  # a generator
            for step in steps:
                if step.finish not in ("end", "stop"):
                    tokens.append(step.token)
                self.messages = [*messages, Message("assistant", [list(tokens)])]
                yield step


def _message(saved: Any, n_vocab: int) -> Message:
    parts = saved.get("parts") if isinstance(saved, dict) else None
    if not (parts is not None and saved.get("role") in ("system", "user", "assistant") and all(_is_part(part, n_vocab) for part in parts)):
        raise ArgumentError("This is no saved conversation: give what save() returned.")
    return Message(saved["role"], list(parts), str(saved.get("thought", "")))


def _is_part(part: Any, n_vocab: int) -> bool:
    return isinstance(part, str) or (isinstance(part, list) and all(isinstance(t, int) and 0 <= t < n_vocab for t in part))
