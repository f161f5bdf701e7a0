"""How the next token is chosen; the work is llama.cpp's sampler chain."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from sfi_local.errors import ArgumentError


@dataclass(frozen=True)
class Sampling:
    """temp 0 takes the most likely token; otherwise top_k (0: all), top_p, min_p, temperature, then a draw with seed."""

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = field(default_factory=lambda: random.randrange(2**32 - 1))

    def validate(self) -> "Sampling":
        """Return self, or raise ArgumentError with a sentence."""
        if not self.temp >= 0:
            raise ArgumentError(f"temp is {self.temp}: give 0 (most likely token) or more.")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"{name} is {getattr(self, name)}, a probability: give a value from 0 to 1.")
        if self.top_k < 0:
            raise ArgumentError(f"top_k is {self.top_k}: give 0 (all tokens) or more.")
        if not 0 <= self.seed < 2**32:
            raise ArgumentError(f"seed is {self.seed}: give a number from 0 to {2**32 - 1}.")
        return self

    def chain(self) -> Any:
        """A new llama_cpp sampler chain; ``chain.sample(context)`` gives a token id."""
        from llama_cpp._internals import LlamaSampler

        chain = LlamaSampler()
        if self.temp == 0:
            chain.add_greedy()
            return chain
        if self.top_k:
            chain.add_top_k(self.top_k)
        chain.add_top_p(self.top_p)
        chain.add_min_p(self.min_p)
        chain.add_temp(self.temp)
        chain.add_dist(self.seed)
        return chain
