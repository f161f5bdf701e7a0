"""Read the text of a prompt from a file, an argument or stdin; what is not text is refused with its byte offset."""

from __future__ import annotations

import os
import sys

from sfi_local.errors import InputError


def from_file(path: str) -> str:
    """The text of a file; ``-`` is stdin."""
    if path == "-":
        return from_stdin()
    try:
        with open(path, "rb") as file:
            return decode(file.read(), path)
    except FileNotFoundError:
        raise InputError(f"There is no file {path}: check the path after -f.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory: give a text file after -f.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a readable text file after -f.") from None


def from_stdin() -> str:
    return decode(sys.stdin.buffer.read(), "stdin")


def from_argument(text: str, name: str) -> str:
    """The text of a command line argument, whose bytes may not be what the locale promises."""
    return decode(os.fsencode(text), name)


def decode(data: bytes, source: str) -> str:
    """UTF-8 text without NUL bytes; a byte order mark at the start is dropped. Raises InputError."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise InputError(f"{source} is not UTF-8 text: byte {offset} is 0x{data[offset]:02x}. Convert it, e.g. with "
                         f"`iconv -f LATIN1 -t UTF-8`.") from None
    if "\0" in text:
        raise InputError(f"{source} has a NUL byte at offset {data.index(0)}: give a text file, not a binary one.")
    return text
