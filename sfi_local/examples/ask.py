"""Ask a document: a window of tkinter around sfi_local. The model works on a thread of its own, and the window never waits for it.

    python -m sfi_local.examples.ask MODEL [TEXT] [--dark]
"""

from __future__ import annotations

import argparse
import queue
import time
import tkinter as tk
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from os.path import commonprefix
from pathlib import Path
from tkinter import filedialog, font
from typing import Any, Callable

import sfi_local
from sfi_local.errors import AbortedError, SfiError
from sfi_local.runtime.look import STRONGEST, texts

SYSTEM = "You answer questions about a text. Answer briefly, from the text alone."
ROLES = ("page", "field", "text", "dim", "line", "bar", "accent", "glow", "stop")
LIGHT = dict(zip(ROLES, ("#fafafa", "#ffffff", "#26262a", "#76767c", "#d4d4d9", "#e6e6ea", "#2a76d2", "#2a76d2", "#6e6e76")))
DARK = dict(zip(ROLES, ("#242427", "#303034", "#f4f4f6", "#9c9ca4", "#46464d", "#37373c", "#3584e4", "#82b6f6", "#6e6e76")))


class Window:
    """state: idle, ready, reading or answering"""

    def __init__(self, root: tk.Tk, model: str, text: str | None, n_ctx: int | None, colors: dict[str, str]):
        self.root, self.colors, self.state, self.heat, self.passages = root, colors, "idle", [0.0], [""]
        self.events = queue.Queue[Callable[[], None]]()  # to be called on the window's thread
        self.worker, self.stopping, self.model = ThreadPoolExecutor(1), False, None  # type: ThreadPoolExecutor, bool, Any
        family = next((f for f in ("Cantarell", "Segoe UI", "Inter", "Noto Sans", "DejaVu Sans") if f in font.families()), "TkDefaultFont")
        big, body, small = (family, 13, "bold"), (family, 12), (family, 10)
        for what, color in (("background", "page"), ("foreground", "text"), ("highlightBackground", "line"), ("highlightColor", "accent"),
                            ("insertBackground", "text"), ("selectBackground", "accent"), ("activeBackground", "line"),
                            ("Label.borderWidth", ""), ("Label.padX", ""), ("Text.padX", ""), ("Text.borderWidth", "")):
            root.option_add(f"*{what}", colors.get(color, 0))
        root.title("Ask a document")
        root.geometry("900x720")
        page = tk.Frame(root, padx=30, pady=22)
        head, panel = tk.Frame(page), tk.Frame(page)
        row = tk.Frame(panel)
        flat: dict[str, Any] = {"relief": "flat", "borderwidth": 0, "highlightthickness": 0, "padx": 16, "pady": 8, "font": small}
        self.title = tk.Label(head, text="Ask a document", font=big)
        self.talk = tk.Text(page, wrap="word", font=body, relief="flat", highlightthickness=0, spacing2=4, spacing3=4)
        self.talk.tag_configure("question", font=big, spacing1=14, spacing3=8)
        self.talk.tag_configure("note", font=small, spacing1=6, foreground=colors["dim"])
        self.talk.bind("<Key>", lambda event: None if event.char == "\x03" else "break")  # to read, and to copy from by Ctrl+C
        self.said, self.passage = tk.Label(panel, font=small, anchor="w"), tk.Label(panel, font=small, anchor="w", fg=colors["dim"])
        self.strip = tk.Canvas(panel, height=34, highlightthickness=0, bg=colors["bar"])
        self.entry = tk.Entry(row, font=body, relief="flat", borderwidth=8, highlightthickness=1, bg=colors["field"])
        self.button = tk.Button(row, width=6, fg="white", command=lambda: self.stop() if self.state.endswith("ing") else self.ask(), **flat)
        tk.Button(head, text="Open a text …", bg=colors["bar"], command=self.choose, **flat).pack(side="right")
        self.title.pack(side="left")
        self.entry.pack(side="left", fill="both", expand=True)
        self.button.pack(side="left", fill="y", padx=(10, 0))
        for child, gap in ((self.said, 6), (self.strip, 6), (self.passage, 12), (row, 0)):
            child.pack(fill="x", pady=(0, gap))
        page.pack(fill="both", expand=True)
        head.pack(fill="x")
        panel.pack(side="bottom", fill="x")
        self.talk.pack(fill="both", expand=True, pady=(12, 16))
        for keys, act in (("<Return>", self.ask), ("<Escape>", self.stop), ("<Control-o>", self.choose), ("<Control-q>", self.close)):
            root.bind(keys, lambda _, act=act: act())  # type: ignore[misc]
        root.protocol("WM_DELETE_WINDOW", self.close)
        self.entry.focus()
        self.show("idle", f"Loading {model} …")
        self.running = self.worker.submit(self.work, self.load, model, n_ctx, text)
        self.tick()

    def work(self, job: Callable, *arguments: Any) -> None:
        """On the worker's thread, as all that it calls."""
        self.stopping = False
        try:
            job(*arguments)
        except AbortedError:  # a question reads on where reading was stopped
            self.then(self.show, "ready" if self.model else "idle", "Stopped.")
        except (SfiError, OSError, UnicodeError) as error:
            text = "This is not plain text in UTF-8: open another file." if isinstance(error, UnicodeError) else str(error)
            self.then(self.show, "ready" if job == self.answer else "idle", text)

    def then(self, act: Callable, *arguments: Any) -> None:
        self.events.put(lambda: act(*arguments))

    def progress(self, done: float, total: float) -> None:
        if self.stopping:  # said before there was anything to cancel
            raise AbortedError("Stopped.")
        self.then(self.going_on, done, total)

    def load(self, model: str, n_ctx: int | None, text: str | None) -> None:
        self.model = sfi_local.load(model, n_ctx=n_ctx, progress=self.progress)
        self.then(self.show, "idle", f"{self.model.name}: open a text (Ctrl+O).")
        if text:
            self.read(text)

    def read(self, path: str) -> None:
        self.text, self.chat = Path(path).read_text("utf-8"), self.model.chat(SYSTEM, n=400, sampling=sfi_local.Sampling(temp=0, repeat_penalty=1.1))
        messages = [*self.chat.messages, sfi_local.Message("user", [self.text])]
        asked = [*self.chat.messages, sfi_local.Message("user", [f"{self.text}\n\n?"])]  # what both begin with is there to stay
        tokens = commonprefix([self.model.prompt_tokens(messages), self.model.prompt_tokens(asked)])
        self.look = sfi_local.Look(len(tokens))
        self.then(self.opened, path, texts(self.model.vocabulary.spelled, tokens))
        self.model.read(messages, progress=self.progress)
        self.then(self.show, "ready", f"{len(tokens):,} tokens are read: ask about them.")

    def answer(self, question: str) -> None:
        text, n, end = f"{self.text}\n\n{question}" if len(self.chat.messages) == 1 else question, 0, "stopped"
        with suppress(AbortedError):
            for step in self.chat.ask(text, progress=self.progress):
                n, end = n + 1, step.finish or end
                self.then(self.came, step.text, step.n_cells / max(1, step.depth), self.look(self.model.slot, step))
        self.then(self.answered, n, self.model.stats().n_prefilled, end)

    def choose(self) -> None:
        if self.model and (path := filedialog.askopenfilename(title="Open a text")):
            self.stop()
            self.running = self.worker.submit(self.work, self.read, path)

    def ask(self) -> None:
        if self.state == "ready" and (question := self.entry.get().strip()):
            self.entry.delete(0, "end")
            self.talk.insert("end", question + "\n", "question")
            self.show("answering", "Reading the question …")
            self.began, self.shares = 0.0, []  # type: float, list[float]
            self.running = self.worker.submit(self.work, self.answer, question)

    def stop(self) -> None:
        self.stopping = True
        self.running.cancel()  # where it has not begun
        if self.model:
            self.model.cancel()

    def close(self) -> None:
        """The window goes at once; then what is running ends."""
        self.root.destroy()
        while not self.running.done():
            self.stop()
            wait([self.running], 0.02)
        self.worker.shutdown()
        if self.model:
            self.model.close()

    def tick(self) -> None:
        until = time.monotonic() + 0.006  # the rest of a frame is for what is typed, and for painting
        while not self.events.empty() and time.monotonic() < until:
            self.events.get()()
        self.root.after(16, self.tick)

    def opened(self, path: str, passages: list[str]) -> None:
        self.passages, self.heat, self.began = passages, [0.0] * len(passages), time.monotonic()
        self.title.configure(text=f"{Path(path).name}   ·   {self.model.name}")
        self.talk.delete("1.0", "end")
        self.show("reading", "Reading …")

    def going_on(self, done: int, total: int) -> None:
        if self.state == "reading":
            left = (time.monotonic() - self.began) * (total - done) / max(1, done)
            self.show("reading", f"Reading  {done:,} of {total:,} tokens" + (f", {left:.0f} s left" if done else ""), done / total)

    def came(self, text: str, share: float, look: dict[str, list[int]] | None) -> None:
        self.began = self.began or time.monotonic()
        self.shares.append(share)
        self.talk.insert("end", text)
        if look:
            self.heat = [max(new / STRONGEST, 0.75 * old) for old, new in zip(self.heat, look["parts"])]
            self.passage.configure(text=f"“{' '.join(self.passages[self.heat.index(max(self.heat))].split())[:110]}”")
        rate, read = (len(self.shares) - 1) / max(0.01, time.monotonic() - self.began), sum(self.shares) / len(self.shares)
        self.show("answering", f"{rate:.1f} tokens/s     {read:.0%} of the text read for each")

    def answered(self, n: int, n_new: int, end: str) -> None:
        self.talk.insert("end", f"\n{'Stopped. ' * (end == 'stopped')}{n} tokens, {n_new} new ones read\n", "note")
        self.show("ready", self.said.cget("text"))

    def show(self, state: str, said: str, read: float = 0.0) -> None:
        """The state in words, and the strip: filled as far as the text is read, or lit where the answer reads."""
        self.state, busy, width, n = state, state in ("reading", "answering"), self.strip.winfo_width(), len(self.heat)
        self.said.configure(text=said)
        self.talk.see("end")
        self.button.configure(text="Stop" if busy else "Ask", bg=self.colors["stop" if busy else "accent"])
        dark, bright = (self.root.winfo_rgb(self.colors[name]) for name in ("bar", "glow"))
        self.strip.delete("all")
        self.strip.create_rectangle(0, 0, read * width, 40, fill=self.colors["accent"], width=0)
        for i, heat in enumerate([] if read else self.heat):
            color = "#" + "".join(f"{round(a + (b - a) * heat**1.5) // 257:02x}" for a, b in zip(dark, bright))
            self.strip.create_rectangle(width * i // n, 0, width * (i + 1) // n, 40, fill=color, width=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A window that answers questions about a long text.")
    parser.add_argument("model", help="name, path or hf:USER/REPO:QUANT")
    parser.add_argument("text", nargs="?", help="file in UTF-8")
    parser.add_argument("--ctx", type=int, help="tokens that the model may hold at most")
    parser.add_argument("--dark", action="store_true")
    asked = parser.parse_args()
    Window(tk.Tk(className="sfi-ask"), asked.model, asked.text, asked.ctx, DARK if asked.dark else LIGHT).root.mainloop()
