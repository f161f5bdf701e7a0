"""The latest texts of a process in memory: what a slot held before it turned to another text, whole, so that it can turn back."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any, Sequence

from sfi_local.machine import available_memory
from sfi_local.store.prefixes import common

SHARE = 0.1  # of the free memory


@dataclass(frozen=True)
class Text:
    """tokens; rows: K and V of all of them; state: of fast steps, or empty; blocks: the names in the store of its first ones, n_kept of
    its tokens being there"""

    tokens: list[int]
    rows: Any
    state: Any
    blocks: list[str]
    n_kept: int

    @property
    def n_bytes(self) -> int:
        return len(self.rows) + len(self.state)


class Recent:
    """Texts within a budget; the one that was not used for longest goes first. From any thread. any: False: none is kept"""

    def __init__(self, any: bool = True) -> None:
        self._any = any
        self._texts: list[Text] = []  # the latest last
        self._lock = threading.Lock()

    def room_for(self, n_bytes: int) -> bool:
        """Whether a text of so many bytes could be kept."""
        with self._lock:
            return n_bytes <= self._limit()

    def put(self, text: Text) -> None:
        """Keep a text, in the place of those that it begins with."""
        with self._lock:
            limit = self._limit() - text.n_bytes
            if limit < 0:
                return
            self._texts = [old for old in self._texts if common(old.tokens, text.tokens) < len(old.tokens)]
            while self._texts and sum(old.n_bytes for old in self._texts) > limit:
                del self._texts[0]
            self._texts.append(text)

    def find(self, tokens: Sequence[int]) -> tuple[int, Text | None]:
        """(how many tokens a text shares, the one that shares most), which counts as used."""
        with self._lock:
            n, best = max(((common(text.tokens, tokens), i) for i, text in enumerate(self._texts)), default=(0, -1))
            if not n:
                return 0, None
            text = self._texts.pop(best)
            self._texts.append(text)
            return n, text

    def _limit(self) -> int:
        """Bytes: SFI_LOCAL_PREFIX_MEMORY, or a share of what is free without these."""
        if not self._any:
            return -1
        try:
            return int(float(os.environ["SFI_LOCAL_PREFIX_MEMORY"]))
        except (KeyError, ValueError, OverflowError):
            pass
        free = available_memory()
        return int(SHARE * (free + sum(text.n_bytes for text in self._texts))) if free is not None else 0
