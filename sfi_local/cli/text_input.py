"""Read the text of a prompt from a file, an argument or stdin, no more of it than is asked for; what is not text is
refused with its byte offset."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import BinaryIO

from sfi_local.errors import InputError

BLOCK = 1 << 16    # bytes that are read at least
ALL = sys.maxsize  # characters of any text

# byte order mark: encoding; the longer of two marks that begin alike comes first
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
          codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
# (data, errors, whether it is all) -> (text, bytes that it took)
_DECODE = {"utf-8": codecs.utf_8_decode, "utf-16-le": codecs.utf_16_le_decode, "utf-16-be": codecs.utf_16_be_decode,
           "utf-32-le": codecs.utf_32_le_decode, "utf-32-be": codecs.utf_32_be_decode}


class Source:
    """A text whose beginning can be had without reading the rest.

    file: bytes of UTF-8, of UTF-16 or UTF-32 by their byte order mark, or of UTF-16 whose NULs show that it is
    name: of the source, for refusals
    whole: whether all of it has been read
    """

    def __init__(self, file: BinaryIO, name: str):
        self._file, self._name, self.whole = file, name, False
        self._text, self._rest, self._at = "", b"", 0  # decoded; not decoded yet; place of the latter in the file
        self._encoding = ""

    def head(self, n: int = ALL) -> str:
        """The first n characters and maybe some more; all, if there are no more. Raises InputError."""
        found, n_found = [self._text], len(self._text)
        while n_found < n and not self.whole:
            found.append(self._read(max(BLOCK, min(n - n_found, 1 << 26))))
            n_found += len(found[-1])
        self._text = "".join(found)
        return self._text

    def is_blank(self) -> bool:
        """Whether there is nothing but blanks in it."""
        n = BLOCK
        while not self.head(n).strip() and not self.whole:
            n *= 4
        return not self._text.strip()

    def _read(self, n: int) -> str:
        """The text of the next n bytes."""
        try:
            data = self._file.read(n)
        except OSError as error:
            raise InputError(f"{self._name} cannot be read ({error.strerror}): give a readable text file.") from None
        self.whole = len(data) < n
        self._rest += data
        if not self._encoding:
            self._choose_encoding()
        text, taken = self._decoded()
        if "\0" in text:
            offset = self._at + len(text[:text.index("\0")].encode(self._encoding))
            raise InputError(f"{self._name} has a NUL byte at offset {offset}: give a text file, not a binary one. If it is UTF-16 without a "
                             f"byte order mark, convert it, e.g. with `iconv -f UTF-16LE -t UTF-8`.")
        self._rest, self._at = self._rest[taken:], self._at + taken
        return text

    def _choose_encoding(self) -> None:
        mark, self._encoding = next(((mark, name) for mark, name in _MARKS.items() if self._rest.startswith(mark)),
                                    (b"", _unmarked(self._rest)))
        self._rest, self._at = self._rest[len(mark):], len(mark)

    def _decoded(self) -> tuple[str, int]:
        try:
            return _DECODE[self._encoding](self._rest, "strict", self.whole)
        except UnicodeDecodeError as error:
            name = "UTF-8" if self._encoding == "utf-8" else self._encoding[:-3].upper()
            raise InputError(f"{self._name} is not {name} text: byte {self._at + error.start} is 0x{self._rest[error.start]:02x}. "
                             f"Convert it, e.g. with `iconv -f LATIN1 -t UTF-8`, or -f UTF-16LE.") from None


def _unmarked(data: bytes) -> str:
    """UTF-16 where nearly every other byte is NUL, as in text with Latin letters; else UTF-8."""
    even, odd = data[0::2].count(0), data[1::2].count(0)
    if even > 0.7 * len(data) / 2 and odd < 0.05 * even:
        return "utf-16-be"
    return "utf-16-le" if odd > 0.7 * len(data) / 2 and even < 0.05 * odd else "utf-8"


def open_text(path: str) -> Source:
    """A file as a Source; ``-`` is stdin. Raises InputError."""
    if path == "-":
        return _stdin()
    try:
        return Source(open(path, "rb"), path)
    except FileNotFoundError:
        raise InputError(f"There is no file {path}: check the path after -f.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory: give a text file after -f.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', error)}): give a readable text file after -f.") from None


def from_file(path: str) -> str:
    """The whole text of a file; ``-`` is stdin. Raises InputError."""
    return open_text(path).head()


def from_stdin() -> str:
    return _stdin().head()


def from_argument(text: str, name: str) -> str:
    """The text of a command line argument, whose bytes may not be what the locale promises."""
    try:
        return decode(os.fsencode(text), name)
    except UnicodeEncodeError as error:  # half of a surrogate pair that stands for no byte
        raise InputError(f"{name} is no text: character {error.start} is half of a surrogate pair. Type it again.") from None


def decode(data: bytes, source: str) -> str:
    """The text of bytes, see Source; a byte order mark at the start is dropped. Raises InputError."""
    return Source(io.BytesIO(data), source).head()


def _stdin() -> Source:
    if sys.stdin is None:
        raise InputError("stdin is closed: give text with -p or a file with -f.")
    return Source(sys.stdin.buffer, "stdin")
