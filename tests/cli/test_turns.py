"""A full context: which turns go."""

from sfi_local.cli.turns import fit
from sfi_local.runtime.template import Message


def user(text, document=""):
    return Message("user", [document, "\n\n", text] if document else [text])


def answer(n):
    return Message("assistant", [list(range(n))])


def count(messages):
    """One per character of text, one per token."""
    return sum(len(part) for m in messages for part in m.parts)


SYSTEM = Message("system", ["s" * 10])
TURNS = [user("a" * 10), answer(90), user("b" * 10), answer(90), user("c" * 10), answer(90)]
LAST = user("d" * 10)


def test_what_fits_stays_as_it_is():
    messages = [SYSTEM, *TURNS, LAST]
    assert fit(messages, count, 320, 200) == (messages, 0)


def test_whole_turns_go_the_oldest_first_until_the_aim_and_the_system_message_stays():
    assert fit([SYSTEM, *TURNS, LAST], count, 319, 319) == ([SYSTEM, *TURNS[2:], LAST], 1)
    assert fit([SYSTEM, *TURNS, LAST], count, 319, 150) == ([SYSTEM, *TURNS[4:], LAST], 2)
    assert fit([*TURNS, LAST], count, 200, 0) == ([LAST], 3)


def test_a_turn_about_a_document_goes_last():
    about = [user("what?", "t" * 50), answer(10)]
    messages = [SYSTEM, *about, *TURNS, LAST]
    assert fit(messages, count, 280, 280) == ([SYSTEM, *about, *TURNS[4:], LAST], 2)
    assert fit(messages, count, 60, 60) == ([SYSTEM, LAST], 4)


def test_a_question_too_long_for_any_context_is_left_for_its_reader_to_refuse():
    assert fit([SYSTEM, *TURNS, user("x" * 500)], count, 300, 200) == ([SYSTEM, user("x" * 500)], 3)
