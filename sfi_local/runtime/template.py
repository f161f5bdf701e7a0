"""From messages to tokens: the model's own chat template around contents that are never read as special tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Callable, Sequence

from sfi_local.errors import InputError

# (text, add_bos, special) -> token ids
Tokenize = Callable[[str, bool, bool], list[int]]

_MARK = re.compile("\ue000(\\d+)\ue001")  # private use: in no template, in no vocabulary


@dataclass
class Message:
    """One message of a conversation.

    role:  "system", "user" or "assistant"
    parts: its content in pieces; text, or token ids where the exact tokens matter (an answer that is in the cache)
    """

    role: str
    parts: list[str | list[int]] = field(default_factory=list)


class ChatTemplate:
    """The chat template in a model's metadata; without one, contents are joined as they are (base models).

    source: the Jinja text, or None; bos, eos: text of these tokens
    """

    def __init__(self, source: str | None, bos: str, eos: str, add_bos: bool, tokenize: Tokenize):
        self.source, self.bos, self.eos, self.add_bos, self._tokenize = source, bos, eos, add_bos, tokenize

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that ends where the assistant's answer begins.

        Raises InputError if the template refuses the messages.
        """
        rendered = self._render([{"role": m.role, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)])
        pieces = _MARK.split(rendered)  # text, number, text, number, ..., text
        if [int(n) for n in pieces[1::2]] != list(range(len(messages))):
            return self._tokens_of_whole(messages)
        out = self._template_tokens(pieces[0], first=True)
        for number, text in zip(pieces[1::2], pieces[2::2]):
            out += self._content_tokens(messages[int(number)]) + self._template_tokens(text)
        return out

    def _content_tokens(self, message: Message) -> list[int]:
        out: list[int] = []
        for part in message.parts:
            out += self._tokenize(part, False, False) if isinstance(part, str) else part
        return out

    def _template_tokens(self, text: str, first: bool = False) -> list[int]:
        bos = first and self.add_bos and not (self.bos and text.startswith(self.bos))
        return self._tokenize(text, bos, True) if text or bos else []

    def _tokens_of_whole(self, messages: Sequence[Message]) -> list[int]:
        """For templates that drop, repeat or move contents: contents must be text then."""
        if any(not isinstance(part, str) for m in messages for part in m.parts):
            raise InputError("This model's chat template rearranges messages, so a prompt cannot be cut to fit and a "
                             "chat cannot go on: use --raw, or ask one question at a time.")
        text = self._render([{"role": m.role, "content": "".join(m.parts)} for m in messages])
        return self._template_tokens(text, first=True)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if self.source is None:
            return "\n\n".join(m["content"] for m in messages)
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            return Jinja2ChatFormatter(self.source, eos_token=self.eos, bos_token=self.bos)(messages=messages).prompt
        except Exception as error:  # templates raise what they like
            raise InputError(f"The model's chat template refuses these messages ({error}): leave out --system, or use "
                             f"--raw.") from None


def fit_tokens(document: list[int], n_rest: int, limit: int, whole: bool, n_ctx: int) -> list[int]:
    """The head of a document that leaves a prompt of at most limit tokens.

    n_rest: tokens of the prompt without the document; whole: refuse to cut; n_ctx: of the context, for the message
    Raises InputError with the numbers and the remedy.
    """
    n = n_rest + len(document)
    if n <= limit:
        return document
    if whole or limit <= n_rest:
        raise too_long(n, n_ctx)
    return document[:limit - n_rest]


def too_long(n: int, n_ctx: int) -> InputError:
    """The refusal of a prompt of n tokens in a context of n_ctx."""
    return InputError(f"The prompt has {n} tokens and the context {n_ctx}: take the head of the file with --truncate or "
                      f"--max-prompt-tokens N, shorten it, or use a model with a longer context.")
