"""The page at /: one file that loads nothing from anywhere, and a policy that holds it to that."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("page.html")


@cache
def page() -> str:
    return _FILE.read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)


CSP = (f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; img-src data:; "
       "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
