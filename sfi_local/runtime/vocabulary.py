"""Tokens and the bytes they stand for, by llama.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from sfi_local.binding.library import open_library


class Vocabulary:
    """Tokens and text of a model. Pure reading, safe from any thread."""

    def __init__(self, weights: Any):
        self._weights, self._llama = weights, open_library().llama_cpp
        self.add_bos = bool(weights.add_bos_token())
        self.bos_text, self.eos_text = self._text(weights.token_bos()), self._text(weights.token_eos())

    @property
    def n_vocab(self) -> int:
        """How many tokens there are; ids are smaller."""
        return self._weights.n_vocab()

    def tokenize(self, text: str, add_bos: bool = False, special: bool = False) -> list[int]:
        return self._weights.tokenize(text.encode("utf-8"), add_bos, special)

    def piece(self, token: int) -> bytes:
        """The bytes of a token; b"" for a special one."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._llama.llama_token_to_piece(self._weights.vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def name(self, token: int) -> str:
        """How the vocabulary spells a token, e.g. ``<|im_end|>`` for a special one."""
        return self._text(token)

    def is_end(self, token: int) -> bool:
        """Whether a token ends the answer."""
        return bool(self._llama.llama_vocab_is_eog(self._weights.vocab, token))

    def _text(self, token: int) -> str:
        return self._weights.token_get_text(token) if token >= 0 else ""
