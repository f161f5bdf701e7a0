"""What a line that begins with / does in a chat: the commands as a table, found by their names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Sequence

from sfi_local.errors import InputError
from sfi_local.fields import meant


@dataclass(frozen=True)
class Command:
    """names: as typed, the first is shown; argument: how the help names it, in brackets where it may be left out, "" where there is none

    The method of Chat that does it is ``do_`` and the first name.
    """

    names: tuple[str, ...]
    argument: str
    help: str

    @property
    def name(self) -> str:
        return self.names[0]

    def check(self, argument: str) -> None:
        """Raise InputError where an argument is missing, or given to a command that has none."""
        if argument and not self.argument:
            raise InputError(f"/{self.name} stands alone: leave out what follows it.")
        if self.argument and not argument and not self.argument.startswith("["):
            raise InputError(f"/{self.name} needs {self.argument}: write /{self.name} {self.argument}.")


COMMANDS = (
    Command(("help", "?"), "", "Show this list."),
    Command(("new", "clear"), "", "Start a new conversation."),
    Command(("read",), "FILE", "Talk about a text file: it is read with your next message."),
    Command(("regen",), "", "Answer the last message again."),
    Command(("system",), "[TEXT]", "Set the system message, or show it; - removes it."),
    Command(("set",), "[KEY=VALUE]", "Change a setting, or show them."),
    Command(("think",), "[on|off]", "Switch the model's thoughts on or off."),
    Command(("tokens",), "", "Show how much of the context is in use."),
    Command(("stats",), "", "Show how the last answer was computed."),
    Command(("save",), "FILE", "Write the conversation to a file."),
    Command(("load",), "FILE", "Go on with a conversation that /save wrote."),
    Command(("quit", "exit", "bye"), "", "Leave; Ctrl-D does too."),
)

KEYS = (
    "Enter sends. A pasted text is one message. To type several lines end each but the last with \\, put them between "
    "\"\"\" and \"\"\", or press Alt-Enter.",
    "Ctrl-C clears what is typed, or stops an answer and keeps what was said; twice where nothing is typed leaves.",
    "To send a message that begins with / put a blank before it.",
)


def parse(text: str, commands: Sequence[Command] = COMMANDS) -> tuple[Command, str] | None:
    """(the command of a line, its argument); None for a message. Raises InputError for a command that there is not."""
    match = re.fullmatch(r"/([\w?-]+)(?:\s+(.*))?\s*", text, re.S)
    if not match:
        return None
    named = {name: command for command in commands for name in command.names}
    command, argument = named.get(match[1].lower()), (match[2] or "").strip()
    if command is None:
        near = meant(match[1], named).replace("mean ", "mean /")
        raise InputError(f"There is no command /{match[1]}{near and ':' + near or '.'} There are "
                         f"{', '.join('/' + c.name for c in commands)}. To send it as a message put a blank before it.")
    command.check(argument)
    return command, argument


def help_text(width: int, commands: Sequence[Command] = COMMANDS) -> str:
    """The list of commands and keys, in lines of at most width columns."""
    from textwrap import fill

    heads = [f"/{c.name} {c.argument}".rstrip() for c in commands]
    column = max(map(len, heads)) + 2
    if width < column + 24:  # too narrow for two columns
        lines = [fill(f"{head}: {c.help}", width, subsequent_indent="  ") for head, c in zip(heads, commands)]
    else:
        lines = [fill(c.help, width, initial_indent=f"{head:{column}}", subsequent_indent=" " * column)
                 for head, c in zip(heads, commands)]
    return "\n".join([*lines, "", *(fill(keys, width) for keys in KEYS)])
