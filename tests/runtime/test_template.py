"""From messages to tokens: template around contents, contents never read as special tokens, documents cut at the end."""

import pytest

from sfi_local.cli.text_input import decode
from sfi_local.errors import InputError
from sfi_local.runtime.template import ChatTemplate, Message, fit_tokens
from support.tiny_model import CHATML


def tokenize(text, add_bos, special):
    """Characters as tokens, negative where special text is read."""
    return [0] * add_bos + [-ord(c) if special else ord(c) for c in text]


def untokenize(tokens):
    return "".join(chr(abs(t)) for t in tokens)


@pytest.fixture
def chatml(native):
    return ChatTemplate(CHATML, "<s>", "</s>", False, tokenize)


def test_contents_stand_in_the_template(chatml):
    tokens = chatml.tokens([Message("system", ["Be brief."]), Message("user", ["Hi", " there"])])
    assert untokenize(tokens) == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
                                  "<|im_start|>assistant\n")


def test_a_special_token_in_a_content_is_plain_text(chatml):
    tokens = chatml.tokens([Message("user", ["<|im_end|>"])])
    assert [ord(c) for c in "<|im_end|>"] == tokens[len("<|im_start|>user\n"):][:10]


def test_token_ids_in_a_content_are_kept(chatml):
    tokens = chatml.tokens([Message("user", ["a"]), Message("assistant", [[7, 8, 9]]), Message("user", ["b"])])
    assert any(tokens[i:i + 3] == [7, 8, 9] for i in range(len(tokens)))


def test_without_a_template_contents_are_joined():
    template = ChatTemplate(None, "", "", True, tokenize)
    assert untokenize(template.tokens([Message("user", ["one"])])) == "\0one"


def test_a_template_that_drops_messages_still_works(native):
    template = ChatTemplate("{{ messages[-1].content }}!", "", "", False, tokenize)
    assert untokenize(template.tokens([Message("system", ["a"]), Message("user", ["b"])])) == "b!"


def test_a_template_that_refuses_is_a_sentence(native):
    template = ChatTemplate("{{ raise_exception('no system role') }}", "", "", False, tokenize)
    with pytest.raises(InputError, match="no system role"):
        template.tokens([Message("user", ["a"])])


def test_a_document_is_cut_at_its_end_and_only_if_allowed():
    document = list(range(100))
    assert fit_tokens(document, 20, 200, whole=True, n_ctx=201) == document
    assert fit_tokens(document, 20, 50, whole=False, n_ctx=51) == document[:30]
    with pytest.raises(InputError, match="120 tokens and the context 51"):
        fit_tokens(document, 20, 50, whole=True, n_ctx=51)
    with pytest.raises(InputError, match="shorten"):
        fit_tokens(document, 60, 50, whole=False, n_ctx=51)


@pytest.mark.parametrize("data, word", [
    (b"abc\xff", "byte 3 is 0xff"), (b"\xef\xbb\xbfab\xc3(", "byte 5 is 0xc3"), (b"ab\0c", "NUL byte at offset 2"),
    ("héllo".encode("utf-16"), "byte 0 is 0xff"),
])
def test_what_is_not_text_is_refused_with_its_offset(data, word):
    with pytest.raises(InputError, match=word):
        decode(data, "notes.txt")


def test_a_byte_order_mark_is_dropped():
    assert decode("\ufeffhé".encode(), "notes.txt") == "hé"
