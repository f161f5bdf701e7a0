"""Commands of a chat: known, misspelled, incomplete; and what is no command."""

import pytest

from sfi_local.cli.chat import Chat
from sfi_local.cli.chat_commands import COMMANDS, help_text, parse
from sfi_local.errors import InputError


@pytest.mark.parametrize("text, name, argument", [
    ("/help", "help", ""), ("/?", "help", ""), ("/clear", "new", ""), ("/NEW ", "new", ""), ("/exit", "quit", ""),
    ("/read a file.txt ", "read", "a file.txt"), ("/system Be brief.\nVery.", "system", "Be brief.\nVery."), ("/system", "system", ""),
    ("/set temp=0", "set", "temp=0")])
def test_commands_and_their_arguments(text, name, argument):
    command, given = parse(text)
    assert (command.name, given) == (name, argument)


@pytest.mark.parametrize("text", ["Hello", " /help", "/usr/bin/python is what?", "/* a comment */", "// another", "/", "a /help", "/a.b"])
def test_what_is_a_message(text):
    assert parse(text) is None


@pytest.mark.parametrize("text, near", [("/rea x", "/read"), ("/regenerate", "/regen"), ("/helpp", "/help"), ("/foo", "")])
def test_an_unknown_command_is_refused_with_the_list(text, near):
    with pytest.raises(InputError) as refused:
        parse(text)
    said = str(refused.value)
    assert all(f"/{c.name}" in said for c in COMMANDS) and (f"did you mean {near}?" in said if near else True)


@pytest.mark.parametrize("text, said", [("/read", "/read FILE"), ("/save", "needs FILE"), ("/new one", "stands alone")])
def test_arguments_are_checked(text, said):
    with pytest.raises(InputError, match=said):
        parse(text)


def test_every_command_is_done_by_a_method_and_its_name_is_its_own():
    assert all(callable(getattr(Chat, f"do_{c.name}")) for c in COMMANDS)
    names = [name for c in COMMANDS for name in c.names]
    assert len(names) == len(set(names))
    assert {f"do_{c.name}" for c in COMMANDS} == {name for name in vars(Chat) if name.startswith("do_")}


@pytest.mark.parametrize("width", [39, 79])
def test_the_help_fits_and_says_how_to_write_several_lines(width):
    text = help_text(width)
    assert all(len(line) <= width for line in text.split("\n")) and '"""' in text
    assert all(f"/{c.name}" in text for c in COMMANDS)
