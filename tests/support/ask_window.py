"""sfi_local.examples.ask, telling on stdout as lines of JSON what its window shows: python ask_window.py MODEL [TEXT] [--ctx N]"""

import argparse
import json
import time
import tkinter as tk
from typing import Any

from sfi_local.examples import ask


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


class Told(ask.Window):
    """Says what it has shown, and how much processor time one tick of an answer has taken at most."""

    work_ms = 0.0

    def tick(self) -> None:
        began = time.thread_time()
        super().tick()
        if self.state == "answering":
            self.work_ms = max(self.work_ms, 1000 * (time.thread_time() - began))

    def opened(self, path: str, passages: list[str]) -> None:
        super().opened(path, passages)
        say("opened", parts=len(passages))

    def going_on(self, done: int, total: int) -> None:
        super().going_on(done, total)
        say("reading" if self.state == "reading" else "loading", done=done, total=total)

    def came(self, text: str, share: float, look: Any) -> None:
        super().came(text, share, look)
        say("token", text=text, share=share, lit=bool(look))

    def answered(self, n: int, n_new: int, end: str) -> None:
        super().answered(n, n_new, end)
        say("answered", tokens=n, new=n_new, end=end, work_ms=self.work_ms)

    def show(self, state: str, said: str, read: float = 0.0) -> None:
        super().show(state, said, read)
        if state in ("ready", "idle"):
            say("shown", state=state, said=said)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--ctx", type=int)
    asked = parser.parse_args()
    Told(tk.Tk(className="sfi-ask"), asked.model, asked.text, asked.ctx, ask.LIGHT).root.mainloop()
