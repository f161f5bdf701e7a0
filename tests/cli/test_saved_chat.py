"""A conversation in a file: back as it was, and nothing believed that the file says wrongly."""

import json
import stat

import pytest

from sfi_local.cli import saved_chat
from sfi_local.errors import InputError, SfiError
from sfi_local.runtime.template import Message

MESSAGES = [Message("system", ["Be brief."]), Message("user", ["Ä text\n", "\n\n", "and?"]), Message("assistant", [[72, 105]]),
            Message("user", ["So?"]), Message("assistant", [[33]])]


def spelled(tokens):
    return "".join(map(chr, tokens))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.json"
    saved_chat.save(str(path), "tiny", MESSAGES, spelled)
    return path


def changed(path, **fields):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **fields}))
    return str(path)


def test_back_as_it_was_and_private(path):
    assert saved_chat.load(str(path), "tiny", 256, spelled) == (MESSAGES, True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("model, n_vocab, spell", [("other", 256, spelled), ("tiny", 50, spelled), ("tiny", 256, lambda t: "no")])
def test_tokens_of_another_vocabulary_are_dropped_for_their_text(path, model, n_vocab, spell):
    messages, exact = saved_chat.load(str(path), model, n_vocab, spell)
    assert not exact and messages[2] == Message("assistant", ["Hi"]) and messages[1] == MESSAGES[1]


@pytest.mark.parametrize("fields", [
    {"format": "x"}, {"messages": []}, {"messages": {}}, {"messages": None}, {"messages": [1]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "root", "parts": []}]}, {"messages": [{"role": "user", "parts": ["x"]}]},
    {"messages": [{"role": "user", "parts": [{"text": 3}]}]}, {"messages": [{"role": "user", "parts": [{"text": "a\0b"}]}]},
    {"messages": [{"role": "user", "parts": [{"text": "\ud800"}]}]},
    *({"messages": [{"role": "user", "parts": [{"text": "a", "tokens": tokens}]}]} for tokens in ("a", [True], [-1], [1.5], [[1]], {})),
    {"messages": [{"role": "assistant", "parts": [{"text": "a"}]}]},
    {"messages": [{"role": "user", "parts": [{"text": "a"}]}] * 2},
    {"messages": [{"role": "user", "parts": []}, {"role": "system", "parts": []}]}])
def test_a_file_that_is_none_is_refused_with_a_sentence(path, fields):
    with pytest.raises(InputError, match="no conversation that /save wrote"):
        saved_chat.load(changed(path, **fields), "tiny", 256, spelled)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"3"])
def test_neither_is_what_is_no_json(path, data):
    path.write_bytes(data)
    with pytest.raises(InputError, match="no conversation that /save wrote"):
        saved_chat.load(str(path), "tiny", 256, spelled)


def test_huge_numbers_and_huge_files_are_refused(path, monkeypatch):
    tokens = [{"role": "user", "parts": [{"text": "a", "tokens": [10**400]}]}]
    assert saved_chat.load(changed(path, messages=tokens), "tiny", 256, spelled) == ([Message("user", ["a"])], False)
    monkeypatch.setattr(saved_chat, "LARGEST", 10)
    with pytest.raises(InputError, match="larger than"):
        saved_chat.load(str(path), "tiny", 256, spelled)


def test_another_format_and_no_file_are_named(path, tmp_path):
    with pytest.raises(InputError, match="another version"):
        saved_chat.load(changed(path, version=99), "tiny", 256, spelled)
    with pytest.raises(InputError, match="no file"):
        saved_chat.load(str(tmp_path / "none"), "tiny", 256, spelled)
    with pytest.raises(InputError, match="cannot be read"):
        saved_chat.load(str(tmp_path), "tiny", 256, spelled)


def test_a_saved_conversation_may_be_written_over_and_nothing_else(path, tmp_path):
    saved_chat.save(str(path), "tiny", MESSAGES[:3], spelled)
    assert saved_chat.load(str(path), "tiny", 256, spelled)[0] == MESSAGES[:3]
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(InputError, match="no saved conversation"):
        saved_chat.save(str(tmp_path / "letter.txt"), "tiny", MESSAGES, spelled)
    assert (tmp_path / "letter.txt").read_text() == "Dear"
    with pytest.raises(SfiError, match="cannot be written"):
        saved_chat.save(str(tmp_path / "none" / "a"), "tiny", MESSAGES, spelled)
