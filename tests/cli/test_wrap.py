"""Words kept whole at the edge of a window, whatever pieces a text comes in."""

import random

import pytest

from sfi_local.cli.wrap import Wrapper, columns, harmless

PROSE = "The Loire is the longest river in France. It rises in the Massif Central and reaches the sea near Saint-Nazaire.\n\nThe end."
CODE = "Look:\n```python\nx = [i for i in range(100) if i % 2 == 0 and i % 3 == 0 and i % 5 == 0]\n```\nThat was a line of code, left alone.\n"


def wrapped(text, width, pieces=None):
    wrapper = Wrapper(lambda: width)
    return "".join(wrapper.push(piece) for piece in pieces or [text]) + wrapper.end()


@pytest.mark.parametrize("width", [10, 24, 40, 80, 200])
def test_no_line_reaches_the_edge_and_no_word_is_broken_or_lost(width):
    lines = wrapped(PROSE, width).split("\n")
    assert all(columns(line) < width or " " not in line for line in lines)
    assert " ".join(" ".join(lines).split()) == " ".join(PROSE.split())


@pytest.mark.parametrize("text", [PROSE, CODE, "長い文章は、どこでも折り返せる。「しかし」句点の前では折り返さない。" * 3])
def test_the_pieces_a_text_comes_in_change_nothing(text):
    rng = random.Random(7)
    for _ in range(20):
        cuts = sorted(rng.sample(range(1, len(text)), 12))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        assert wrapped(text, 30, pieces) == wrapped(text, 30)


def test_blocks_of_code_are_left_alone_and_what_follows_them_is_not():
    lines = wrapped(CODE, 30).split("\n")
    assert "x = [i for i in range(100) if i % 2 == 0 and i % 3 == 0 and i % 5 == 0]" in lines
    assert "That was a line of code, left" in lines and "alone." in lines


def test_a_fence_inside_a_line_opens_no_block():
    assert wrapped("```one``` is code in a line, and this goes on", 20).split("\n")[0] == "```one``` is code"


def test_wide_characters_take_two_columns_and_a_full_stop_stays_with_its_sentence():
    lines = wrapped("河" * 9 + "。" + "川" * 5, 20).split("\n")
    assert lines == ["河" * 8, "河。" + "川" * 5] and all(columns(line) < 20 for line in lines)


def test_indents_stay_and_blanks_at_a_break_go():
    assert wrapped("  - one two three four", 12) == "  - one two\nthree four"


def test_a_word_longer_than_the_window_is_not_lost():
    url = "https://example.org/" + "x" * 50
    assert wrapped(f"See {url} now", 30).replace("\n", " ").split() == ["See", url, "now"]


def test_a_resize_counts_from_the_next_word_on():
    widths = iter([80] * 4 + [12] * 100)
    wrapper = Wrapper(lambda: next(widths))
    out = "".join(wrapper.push(w) for w in ("one ", "two ", "three ", "four ", "five ", "six ")) + wrapper.end()
    assert out.split("\n")[0] in ("one two three four", "one two three") and "\n" in out


def test_styles_go_around_words_and_take_no_columns():
    wrapper = Wrapper(lambda: 12)
    out = "".join(wrapper.push(word, lambda t: f"\x1b[1m{t}\x1b[0m") for word in ("one ", "two ", "three ", "four ")) + wrapper.end()
    assert out == "\x1b[1mone\x1b[0m \x1b[1mtwo\x1b[0m\n\x1b[1mthree\x1b[0m \x1b[1mfour\x1b[0m"


def test_an_answer_cannot_command_the_terminal():
    assert harmless("a\x1b]0;title\x07b\r\n\tc\x9b") == "a\\x1b]0;title\\x07b\n\tc\\x9b"
    assert "\x1b" not in wrapped("\x1b[2J gone?", 40)
