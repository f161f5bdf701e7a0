"""Texts are read as far as they are wanted, in the encodings that editors and shells write; what is no text is refused."""

import io

import pytest

from sfi_local.cli.text_input import BLOCK, Source, decode, from_argument
from sfi_local.errors import InputError

SAMPLE = "Grüße, 你好 🙂\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_marked_text_is_read_by_its_mark(encoding):
    assert decode(SAMPLE.encode(encoding), "notes.txt") == SAMPLE


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_seen_by_its_nuls(encoding):
    assert decode("Hello, what does it say?\r\n".encode(encoding), "notes.txt") == "Hello, what does it say?\r\n"


@pytest.mark.parametrize("data, words", [
    (b"abc\xff", "UTF-8 text: byte 3 is 0xff"), (b"\xef\xbb\xbfab\xc3(", "byte 5 is 0xc3"), (b"ab\0c", "NUL byte at offset 2"),
    (b"\xff\xfea\0b", "UTF-16 text: byte 4 is 0x62"), (b"\xff\xfea\0\0\xd8b\0", "UTF-16 text: byte 4 is 0x00"),
    ("ab\0c".encode("utf-16"), "NUL byte at offset 6"), ("Привет, мир\n".encode("utf-16-le"), "UTF-16LE"),
])
def test_what_is_no_text_is_refused_with_its_offset(data, words):
    with pytest.raises(InputError, match=words):
        decode(data, "notes.txt")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_characters_reach_over_blocks(encoding):
    text = ("é🙂你" * BLOCK)[:BLOCK + 7]
    source = Source(io.BytesIO(text.encode(encoding)), "notes.txt")
    assert source.head() == text


def test_an_offset_counts_from_the_start_of_the_file():
    with pytest.raises(InputError, match=f"byte {BLOCK + 5} is 0xff"):
        decode(b"a" * (BLOCK + 5) + b"\xff" + b"a" * BLOCK, "notes.txt")


class Endless(io.RawIOBase):
    """A file that goes on and counts what was read of it."""

    n_read = 0

    def read(self, n=-1):
        self.n_read += n
        return b"lorem ipsum " * (n // 12) + b"x" * (n % 12)


def test_no_more_is_read_than_is_wanted():
    file = Endless()
    source = Source(file, "big.txt")
    assert len(source.head(1000)) >= 1000 and not source.whole
    assert file.n_read <= BLOCK
    first = source.head(1000)
    assert source.head(500_000).startswith(first) and file.n_read < 600_000


def test_blank_means_all_of_it():
    assert Source(io.BytesIO(b" \n" * BLOCK), "a").is_blank()
    assert not Source(io.BytesIO(b" \n" * BLOCK + b"x"), "a").is_blank()
    assert not Source(Endless(), "a").is_blank()


@pytest.mark.parametrize("text", ["a\udcffb", "\ud800"])
def test_halves_of_surrogate_pairs_in_an_argument_are_refused(text):
    with pytest.raises(InputError, match="-p is n"):
        from_argument(text, "-p")
