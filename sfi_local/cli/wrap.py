"""Words kept whole at the edge of a terminal's window while an answer streams; blocks of code are left alone."""

from __future__ import annotations

import re
import unicodedata
from typing import Callable

# scripts that are broken between any two characters, but not before what closes and not after what opens
_IDEOGRAPH = "\u2e80-\u303e\u3041-\u33ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6\U00020000-\U0003fffd"
_CLOSING, _OPENING = "、。，．！？；：）」』】〉》｝］ー々", "（「『【〈《｛［"
_RUN = re.compile(f"\n|[ \t]+|[{_IDEOGRAPH}]|[^\\s{_IDEOGRAPH}]+|\\s")
_FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")
_TAB = 8

Paint = Callable[[str], str]


def columns(text: str) -> int:
    """How many columns a text takes."""
    from wcwidth import wcswidth  # large tables, for terminals alone

    return max(0, wcswidth(text))


def harmless(text: str) -> str:
    """The text with control characters spelled, so that an answer cannot command the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text.replace("\r", ""))


class Wrapper:
    """Holds a word until it is whole, then puts it on this line or on the next.

    width: asked for the columns of the window at each word, so that a resize counts; the last one stays free, where
    some terminals go to the next line at once
    """

    def __init__(self, width: Callable[[], int]):
        self._width = width
        self._column, self._gap, self._word, self._painted = 0, "", "", ""
        self._line_begins, self._fence = True, ""

    def push(self, text: str, paint: Paint = str) -> str:
        """What may be written now. paint: puts a style around a piece of the text"""
        out = []
        for run in _RUN.findall(harmless(text)):
            if run == "\n":
                out.append(self.end() + "\n")
                self._column, self._gap, self._line_begins = 0, "", True
            elif run.isspace():
                out.append(self.end())
                self._gap += run
            else:
                if self._may_break_before(run):
                    out.append(self.end())
                self._word += run
                self._painted += paint(run)
        return "".join(out)

    def end(self) -> str:
        """The word that is held; the next text may go on with it."""
        if not self._word:
            return ""
        if self._line_begins:
            self._note_fence()
        width, after = self._width(), self._after(self._column, self._gap)
        stays = self._fence or not self._column or after + columns(self._word) < width
        self._column = ((after if stays else 0) + columns(self._word)) % width
        out = (self._gap if stays else "\n") + self._painted
        self._gap, self._word, self._painted, self._line_begins = "", "", "", False
        return out

    def _may_break_before(self, run: str) -> bool:
        if not self._word:
            return False
        ideographs = re.match(f"[{_IDEOGRAPH}]", run) or re.match(f"[{_IDEOGRAPH}]", self._word[-1])
        return bool(ideographs) and run[0] not in _CLOSING and self._word[-1] not in _OPENING

    def _note_fence(self) -> None:
        """A fence opens a block of code, and one of the same character closes it."""
        if match := _FENCE.match(self._word):
            character = match[0][0]
            self._fence = "" if self._fence == character else self._fence or character

    @staticmethod
    def _after(column: int, gap: str) -> int:
        for character in gap:
            column += _TAB - column % _TAB if character == "\t" else 1
        return column
