"""A message that a user types or pastes, of one line or of several."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path
from typing import Any, Iterator, Protocol

from sfi_local.cli.chat_commands import COMMANDS
from sfi_local.cli.text_input import decode, from_argument
from sfi_local.cli.window import can_redraw, height_of, width_of
from sfi_local.machine import cache_dir

PROMPT, MORE = "> ", ". "
BLOCK = '"""'
HISTORY = "chat_history"
NO_HISTORY = "SFI_LOCAL_NO_HISTORY"  # in the environment: anything but nothing or 0
LONGEST_REMEMBERED = 8192            # characters; a pasted text that is longer is not kept for another day
LARGEST_HISTORY = 1 << 20            # bytes, of which the older half is then dropped
FILE_COMMANDS = {f"/{c.name}" for c in COMMANDS if c.argument == "FILE"}
TOGETHER_S = 0.05                    # lines that come within this time were pasted


class Lines(Protocol):
    """Where messages come from."""

    def ask(self) -> str:
        """The next message, or "".

        Raises EOFError at the end, KeyboardInterrupt for Ctrl-C where nothing is typed, InputError for what is no text.
        """


def lines(remember: bool) -> Lines:
    """An editor where the terminal can have one, else plain lines. remember: keep a history for other days"""
    if not (sys.stdin.isatty() and can_redraw(sys.stdout)):
        return PlainLines()
    return EditedLines(history_file() if remember and os.environ.get(NO_HISTORY, "") in ("", "0") else None)


def is_open(text: str) -> bool:
    r"""Whether another line belongs to a message: it ends with ``\``, or a block in ``\"\"\"`` is not closed."""
    if text.lstrip().startswith(BLOCK):
        block = text.strip()
        return not (block.endswith(BLOCK) and len(block) >= 2 * len(BLOCK))
    return text.endswith("\\") and not text.endswith("\\\\")


def closed(text: str) -> str:
    """The message itself: without the marks of a block."""
    block = text.strip()
    if block.startswith(BLOCK) and block.endswith(BLOCK) and len(block) >= 2 * len(BLOCK):
        return block[len(BLOCK):-len(BLOCK)].strip("\n")
    return text


# ---- an editor -------------------------------------------------------------------------------------------------------

class EditedLines:
    """prompt_toolkit: editing, history, and a paste that is one message, bracketed or not."""

    def __init__(self, history: Path | None):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.formatted_text import FormattedText
        from prompt_toolkit.styles import Style

        plain = bool(os.environ.get("NO_COLOR"))
        style = Style.from_dict({} if plain else {"": "bold", "prompt": "ansicyan"})
        self._session: Any = PromptSession(
            FormattedText([("class:prompt", PROMPT)]), multiline=True, output=_output(), key_bindings=_keys(), style=style,
            history=_history(history), tempfile_suffix=".txt", completer=_completer(), complete_while_typing=False,
            prompt_continuation=lambda width, line, wraps: FormattedText([("class:prompt", " " * len(MORE) if wraps else MORE)]))

    def ask(self) -> str:
        return closed(from_argument(self._session.prompt(), "The message"))


def _output() -> Any:
    """Of the terminal, without asking it where its cursor is: the answer may come when nobody reads it any more."""
    from prompt_toolkit.output import create_output

    if sys.platform == "win32":
        return create_output(sys.stdout)
    from prompt_toolkit.data_structures import Size
    from prompt_toolkit.output.vt100 import Vt100_Output

    return Vt100_Output(sys.stdout, lambda: Size(height_of(sys.stdout), width_of(sys.stdout)), term=os.environ.get("TERM"),
                        enable_cpr=False)


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: Any) -> None:
        """A line that more keys have come with is part of a paste."""
        buffer = event.current_buffer
        if event.app.key_processor.input_queue:
            buffer.insert_text("\n")
        elif is_open(buffer.text) and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor(len(buffer.text) - len(buffer.text.removesuffix("\\")))
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def next_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def clear(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


def _completer() -> Any:
    """Tab: the commands of a chat, and the files that some of them take."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Commands(Completer):
        def get_completions(self, document: Any, event: Any) -> Iterator[Any]:
            typed = document.text_before_cursor
            name, blank, path = typed.partition(" ")
            if blank and name in FILE_COMMANDS:
                yield from PathCompleter(expanduser=True).get_completions(Document(path), event)
            elif not blank and typed.startswith("/"):
                yield from (Completion(f"/{c.name}", -len(typed)) for c in COMMANDS if f"/{c.name}".startswith(typed))

    return Commands()


def _history(path: Path | None) -> Any:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class ShortEntries(FileHistory):
        def store_string(self, text: str) -> None:
            if len(text) > LONGEST_REMEMBERED:
                return
            try:
                super().store_string(text)
            except OSError:
                pass  # a full disk must not end a conversation

    return ShortEntries(path) if path else InMemoryHistory()


def history_file() -> Path | None:
    """Where messages are kept for other days, for their writer's eyes only; None where nothing can be kept."""
    path = cache_dir() / HISTORY
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            if hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), 0o600)
            _drop_older_half(file)
    except OSError:
        return None
    return path


def _drop_older_half(file: Any) -> None:
    """... of a history that is too large. Entries begin with a line ``# DATE`` after an empty one."""
    data = file.read()
    if len(data) <= LARGEST_HISTORY:
        return
    start = data.find(b"\n# ", len(data) // 2)
    file.seek(0)
    file.write(data[start:] if start >= 0 else b"")
    file.truncate()


# ---- plain lines -----------------------------------------------------------------------------------------------------

class PlainLines:
    """Lines as the terminal gives them, without an editor; those that come together are one message."""

    def ask(self) -> str:
        text = self._line(PROMPT)
        while is_open(text):
            text = text.removesuffix("\\") + "\n" + self._line(MORE)
        return closed(text)

    def _line(self, prompt: str) -> str:
        """A line, or several that were pasted. Raises InputError for bytes that are no text."""
        stream = sys.stdout if sys.stdout.isatty() else sys.stderr
        stream.write(prompt)
        stream.flush()
        data = read_together(sys.stdin.fileno()) if sys.platform != "win32" else sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        return decode(data, "The message").rstrip("\n")


def read_together(fd: int) -> bytes:
    """What a terminal gives within TOGETHER_S of the first line, the last line of a paste even if no newline ended it."""
    data = os.read(fd, 1 << 16)
    while data and not data.endswith(b"\n"):  # Ctrl-D behind a half-typed line
        more = os.read(fd, 1 << 16)
        if not more:
            return data
        data += more
    n_lines = data.count(b"\n")
    while data and select.select([fd], [], [], TOGETHER_S)[0]:
        more = os.read(fd, 1 << 16)
        if not more:
            break
        data += more
    return data + _half_line(fd) if data.count(b"\n") > n_lines else data


def _half_line(fd: int) -> bytes:
    """What has come behind the last newline, which a terminal that edits lines itself keeps back."""
    import termios

    try:
        old = termios.tcgetattr(fd)
        raw = [*old[:3], old[3] & ~termios.ICANON, *old[4:]]
        termios.tcsetattr(fd, termios.TCSANOW, raw)
        try:
            return os.read(fd, 1 << 16) if select.select([fd], [], [], TOGETHER_S)[0] else b""
        finally:
            termios.tcsetattr(fd, termios.TCSANOW, old)
    except termios.error:
        return b""
