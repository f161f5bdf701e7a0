#!/usr/bin/env python3
"""Is our build open to what is known against llama.cpp?

usage: security.py

patches/security.json lists what upstream has fixed, or has heard of: id, what it is, the file, and `fixed_by`, a text that only a
fixed file holds (null: nothing fixes it yet). `accepted` says why a hole that our build contains may stay for now. This command
looks at the pinned sources with our patches: is the file there, is the fix in it, do our libraries contain that file? It prints a
line for each, and exits with 1 if a hole is built and not accepted. A new pin is not done before it says so.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import patchset  # noqa: E402

TABLE = Path(__file__).resolve().parent / "security.json"
BUILT = ("include/", "src/", "ggml/include/", "ggml/src/")  # the rest is programs, tests and what serves them: switched off


@dataclass(frozen=True)
class Known:
    id: str
    what: str
    file: str
    fixed_by: str | None
    accepted: str = ""

    def state(self, tree: Path) -> str:
        """fixed, not built, accepted, or open"""
        path = tree / self.file
        if not path.exists():
            if self.built:
                raise patchset.PatchsetError(f"{self.id}: {self.file} is not in the pinned llama.cpp; say in {TABLE.name} where it went.")
            return "not built"
        if self.fixed_by and self.fixed_by in path.read_text(encoding="utf-8"):
            return "fixed"
        return "not built" if not self.built else "accepted" if self.accepted else "open"

    @property
    def built(self) -> bool:
        return self.file.startswith(BUILT)


def read_table(path: Path = TABLE) -> list[Known]:
    return [Known(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def report(tree: Path, table: list[Known]) -> bool:
    """Print the state of each; true if none is open."""
    states = [known.state(tree) for known in table]
    for known, state in zip(table, states):
        reason = f" ({known.accepted})" if state == "accepted" else ""
        print(f"{state:9}  {known.id:20}  {known.file}: {known.what}{reason}")
    return "open" not in states


def main() -> int:
    try:
        with tempfile.TemporaryDirectory(prefix="sfi-security-") as tmp:
            tree = Path(tmp) / "llama.cpp"
            patchset.apply(tree)
            return 0 if report(tree, read_table()) else 1
    except (patchset.PatchsetError, OSError, TypeError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
