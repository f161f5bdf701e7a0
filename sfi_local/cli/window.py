"""The size of the window that a stream is shown in."""

from __future__ import annotations

import os
import shutil
from typing import Any

LEAST_WIDTH, LEAST_HEIGHT = 10, 4


def width_of(stream: Any) -> int:
    """Columns of the terminal behind a stream; where there is none what COLUMNS says, or 80."""
    return max(LEAST_WIDTH, _size(stream).columns or shutil.get_terminal_size().columns)


def height_of(stream: Any) -> int:
    """Rows; where there is no terminal what LINES says, or 24."""
    return max(LEAST_HEIGHT, _size(stream).lines or shutil.get_terminal_size().lines)


def can_redraw(stream: Any) -> bool:
    """Whether a stream is a terminal that obeys escape sequences."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _size(stream: Any) -> os.terminal_size:
    try:
        return os.get_terminal_size(stream.fileno())
    except (OSError, ValueError, AttributeError):  # no terminal, closed, no file
        return os.terminal_size((0, 0))
