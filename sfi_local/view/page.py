"""The page of `sfi-local view`: view_page.html with the data in it, one file that loads nothing. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).with_name("view_page.html")
_PLACE = "__DATA__"
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def page(data: dict[str, Any]) -> str:
    """The HTML of page_data. Whatever is in the data stays data: the page shows it as text and never as markup."""
    head, tail = _TEMPLATE.read_text(encoding="utf-8").split(_PLACE)
    return head + _as_json(data) + tail


def _as_json(data: dict[str, Any]) -> str:
    """JSON that can stand in a script element: no character of it means anything to HTML."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)
