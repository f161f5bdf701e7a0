"""A chain of llama.cpp's samplers."""

from __future__ import annotations

import ctypes
from typing import Any, Mapping, Sequence

from sfi_local.binding.library import open_library


class Samplers:
    """A chain, freed with this object. Arguments of add() are those of llama.h's llama_sampler_init_NAME()."""

    def __init__(self, sampler: Any = None):
        self._llama = open_library().llama_cpp
        self.sampler = sampler or self._llama.llama_sampler_chain_init(self._llama.llama_sampler_chain_default_params())

    def close(self) -> None:
        sampler, self.sampler = self.sampler, None
        if sampler:
            self._llama.llama_sampler_free(sampler)

    def __del__(self) -> None:
        if hasattr(self, "sampler"):
            self.close()

    def add(self, name: str, *arguments: Any) -> bool:
        """Append a sampler; False if llama.cpp makes none of these arguments."""
        sampler = getattr(self._llama, f"llama_sampler_init_{name}")(*arguments)
        if sampler:
            self._llama.llama_sampler_chain_add(self.sampler, sampler)
        return bool(sampler)

    def add_logit_bias(self, n_vocab: int, biases: Mapping[int, float]) -> None:
        array = (self._llama.llama_logit_bias * len(biases))(*biases.items())
        self.add("logit_bias", n_vocab, len(biases), array)

    def add_dry(self, vocab: Any, dry: float, base: float, allowed_length: int, last_n: int, breakers: Sequence[str]) -> None:
        names = (ctypes.c_char_p * len(breakers))(*(text.encode("utf-8") for text in breakers))
        self.add("dry", vocab, dry, base, allowed_length, last_n, names, len(breakers))

    def sample(self, context: Any, row: int = -1) -> int:
        """Draw from a row of the logits of a context, and remember the token."""
        return self._llama.llama_sampler_sample(self.sampler, context.ctx, row)

    def accept(self, token: int) -> None:
        self._llama.llama_sampler_accept(self.sampler, token)

    def clone(self) -> "Samplers":
        return Samplers(self._llama.llama_sampler_clone(self.sampler))
