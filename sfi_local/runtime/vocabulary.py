"""Tokens and the bytes they stand for, by llama.cpp."""

from __future__ import annotations

import ctypes
import re
from contextlib import nullcontext
from functools import cached_property
from typing import Any, ContextManager, Sequence

from sfi_local.binding.library import open_library
from sfi_local.errors import InputError
from sfi_local.runtime import long_text

_UNKNOWN, _CONTROL, _USER_DEFINED = 1 << 0, 1 << 3, 1 << 4  # attributes of a token in llama.h
_SPECIAL = _UNKNOWN | _CONTROL | _USER_DEFINED
_UNREAD = _UNKNOWN | _CONTROL  # read as tokens where special tokens are read, and else as text
_SHORT_CONTENT = 20_000        # characters that are sooner tokenised twice than all names of special tokens collected
_NO_LETTER = "\x01"            # merges with nothing


class Vocabulary:
    """Tokens and text of a model. Pure reading, safe from any thread.

    weights: llama_cpp._internals.LlamaModel; access: the way in, see Access; None: they are not freed before this
    """

    def __init__(self, weights: Any, access: ContextManager | None = None):
        self.weights, self._llama, self.access = weights, open_library().llama_cpp, access or nullcontext()
        self._check_open = getattr(access, "check_open", None)
        self._pieces: dict[int, bytes] = {}
        self.n_vocab = weights.n_vocab()  # how many tokens there are; ids are smaller
        self._bos = weights.token_bos()
        self._slow_digits = self._splitter() == b"superbpe"
        self.add_bos = bool(weights.add_bos_token())
        self.bos_text, self.eos_text = self._text(weights.token_bos()), self._text(weights.token_eos())

    def tokenize(self, text: str, add_bos: bool = False, special: bool = False) -> list[int]:
        """Token ids; with ``special`` the text of a special token becomes that token.

        Any text on any thread's stack, see long_text.py. Raises InputError for what is no text, OutOfMemoryError.
        """
        self._check_text(text)
        return ([self._bos] if add_bos and self.bos_text else []) + self._tokens(text, special, False)

    def tokenize_bytes(self, data: bytes, add_special: bool, special: bool) -> list[int]:
        """Token ids of bytes that may be no text, as llama_tokenize gives them; add_special: what the vocabulary puts around a text."""
        return self._tokens(data.decode("utf-8", errors="surrogateescape"), special, add_special)

    def _tokens(self, text: str, special: bool, add_special: bool) -> list[int]:
        if len(long_text.cut(text, self._slow_digits)) == 1:
            return self._tokenize(text, special, add_special)
        out: list[int] = []
        for part in self._apart(text) if special else [text]:
            for piece in long_text.cut(part, self._slow_digits):
                out += self._continued(piece, out[-1], special) if out else self._tokenize(piece, special, add_special)
        return out

    def continued(self, text: str, last: int, special: bool = False) -> list[int]:
        """Token ids of a text that goes on after a token.

        SentencePiece vocabularies begin a text, and what follows a special token, with a space of their own; this is no beginning.
        """
        self._check_text(text)
        return self._continued(text, last, special)

    def _continued(self, text: str, last: int, special: bool) -> list[int]:
        if not self._begins_with_space or self._attributes(last) & _SPECIAL:
            return self._tokens(text, special, False)
        before, tokens = self._tokens(_NO_LETTER, False, False), self._tokens(_NO_LETTER + text, special, False)
        return tokens[len(before):] if tokens[:len(before)] == before else self._tokens(text, special, False)

    def structure(self, source: str, contents: Sequence[str]) -> re.Pattern:
        """Matches the texts in contents of a chat that would be read as special tokens.

        source: the chat template; what it uses of the tokens that are read as such in any text is no part of a content either
        """
        used = (t for t in set(self.tokenize(source, False, True)) if self._attributes(t) & _SPECIAL)
        names = {name for t in used if re.search(r"\w", name := self._text(t))}
        if any(len(text) > _SHORT_CONTENT or self.tokenize(text, False, True) != self.tokenize(text) for text in contents):
            names |= self._control_names
        return _any_of(names)

    def spelled(self, token: int) -> tuple[bytes, bool]:
        """(bytes, whether they are the name of a token that has no text) of a token."""
        piece = self.piece(token)
        return (piece, False) if piece else (self._text(token).encode(), True)

    def piece(self, token: int) -> bytes:
        """The bytes of a token; b"" for a special one. A text has each of its tokens many times."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._read_piece(token)
        elif self._check_open:
            self._check_open()
        return known

    def _read_piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            with self.access:
                n = self._llama.llama_token_to_piece(self.weights.vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def control_tokens(self, texts: Sequence[str]) -> set[int]:
        """The tokens that texts name which no text is ever made of, such as ``<|im_start|>``."""
        found = [self.tokenize(text, special=True) for text in texts if text]
        return {tokens[0] for tokens in found if len(tokens) == 1 and not self.piece(tokens[0])}

    def name(self, token: int) -> str:
        """How the vocabulary spells a token, e.g. ``<|im_end|>`` for a special one."""
        return self._text(token)

    def is_end(self, token: int) -> bool:
        """Whether a token ends the answer."""
        with self.access:
            return bool(self._llama.llama_vocab_is_eog(self.weights.vocab, token))

    def _tokenize(self, text: str, special: bool, add_special: bool) -> list[int]:
        """Of a text without long runs, on a stack for it. No token has less than a byte, but some may stand around the text."""
        data = text.encode("utf-8", errors="surrogateescape")
        room = len(data) + 4

        def call() -> list[int]:
            array = (self._llama.llama_token * room)()
            with self.access:
                n_tokens = self._llama.llama_tokenize(self.weights.vocab, data, len(data), array, room, add_special, special)
            if n_tokens < 0:
                raise InputError(f"The text of {len(data)} bytes cannot be tokenised: give a shorter one.")
            return array[:n_tokens]

        return long_text.with_stack_for(len(text), call)

    @staticmethod
    def _check_text(text: str) -> None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"The text is no Unicode: character {error.start} is half of a surrogate pair (U+{ord(text[error.start]):04X}). "
                             f"Give text that was decoded from UTF-8.") from None

    def _splitter(self) -> bytes:
        """The name of its pre-tokenizer; b"" for none."""
        name = ctypes.create_string_buffer(32)
        with self.access:
            self._llama.llama_model_meta_val_str(self.weights.model, b"tokenizer.ggml.pre", name, len(name))
        return name.value

    def _apart(self, text: str) -> list[str]:
        """The text in pieces, each name of a special token by itself."""
        return [piece for piece in re.split(f"({_any_of(self._names(_SPECIAL)).pattern})", text) if piece]

    def _names(self, attributes: int) -> set[str]:
        native = open_library()
        found = native.ffi.new("llama_token[]", max(1, self.n_vocab))
        with self.access:
            n = native.lib.sfi_tokens_with(native.ffi.cast("struct llama_vocab *", self.weights.vocab), attributes, found)
        return {name for t in found[0:n] if (name := self._text(t))}

    @cached_property
    def _control_names(self) -> set[str]:
        return self._names(_UNREAD)

    @cached_property
    def _begins_with_space(self) -> bool:
        return b"".join(map(self.piece, self.tokenize("x"))).startswith(b" ")

    def _attributes(self, token: int) -> int:
        with self.access:
            return self._llama.llama_vocab_get_attr(self.weights.vocab, token)

    def _text(self, token: int) -> str:
        with self.access:
            return self.weights.token_get_text(token) if token >= 0 else ""


def _any_of(names: set[str]) -> re.Pattern:
    """Matches any of the names, of two at one place the longer; nothing, if there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
