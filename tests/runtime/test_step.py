"""The stream: text is whole characters, stop strings never leak, and the tally counts decode steps only."""

import pytest

from sfi_local.runtime.step import Step, Tally, TextStream

TEXT = "naïve – 日本語 🚀 done"


def step(kind, reason="", t_ms=10.0, token=1, text="x", finish=""):
    return Step(token, text, kind, reason, t_ms, 0, 0, 0, finish)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_bytes_split_anywhere_give_the_same_text(size):
    data, stream = TEXT.encode(), TextStream()
    parts = [stream.push(data[i:i + size]) for i in range(0, len(data), size)]
    assert "".join(parts) == TEXT
    assert "\ufffd" not in "".join(parts)


def test_an_unfinished_character_is_let_go_at_the_end():
    stream = TextStream()
    assert stream.push("é".encode()[:1]) == ""
    assert stream.push(b"", last=True) == "\ufffd"


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_text_ends_before_a_stop_string_however_it_is_split(size):
    text, stream, out = "one two STOP three", TextStream(("STOP", "three")), ""
    for i in range(0, len(text), size):
        out += stream.push(text[i:i + size].encode())
        if stream.stopped:
            break
    assert (out, stream.stopped) == ("one two ", True)


def test_what_only_began_like_a_stop_string_is_shown():
    stream = TextStream(("STOP",))
    assert stream.push(b"a ST") == "a "
    assert stream.push(b"AR") == "STAR"


def test_tally_counts_steps_and_leaves_prefill_out_of_decode():
    tally = Tally(n_prefilled=100)
    for item in (step("prefill", t_ms=500), step("fast"), step("fast"), step("slow", "boundary", 20, finish="end")):
        tally.add(item)
    assert dict(tally.steps) == {"fast": 2, "slow": 1}
    assert dict(tally.reasons) == {"boundary": 1}
    assert (tally.prefill_tps, tally.decode_tps) == (200.0, 75.0)
    assert (tally.text, len(tally.tokens), tally.finish) == ("xxxx", 4, "end")


def test_a_tally_of_nothing_has_no_rate():
    assert Tally().decode_tps == Tally().prefill_tps == 0.0
