"""FIELD=VALUE: what a dataclass can be given, refused with a sentence where it cannot; and its docstring, which help texts are made of."""

from dataclasses import dataclass

import pytest

from sfi_local.errors import UsageError
from sfi_local.fields import Described, described, kinds, meant, parse
from sfi_local.params import SfiParams


@dataclass(frozen=True)
class Some:
    """A few fields.

    size:   how large
            it is; cells
    a, b:   two of a kind; on
    c ... e: a range
    named:  a name; other: with a colon
    """

    size: int = 1
    a: bool = False
    b: bool = False
    c: float = 1.0
    d: float = 1.0
    e: float = 1.0
    named: str = ""
    cannot: dict = None


def test_fields_are_parsed_by_their_types():
    assert parse("size=3, a=on,b=False ,c=1e-3,named=x", kinds(Some), "x") == {"size": 3, "a": True, "b": False, "c": 1e-3, "named": "x"}
    assert parse("", kinds(Some), "x") == parse(" , ", kinds(Some), "x") == {}
    assert "cannot" not in kinds(Some) and set(kinds(Some, without=("a",))) == {"size", "b", "c", "d", "e", "named"}


@pytest.mark.parametrize("text, words", [
    ("sise=3", "did you mean size?"), ("size", "a whole number, not ''"), ("size=", "a whole number"), ("size=2.5", "a whole number"),
    ("c=nan", "a number"), ("c=inf", "a number"), ("a=maybe", "on or off, not 'maybe'"), ("named=", "a name"), ("=3", "no field ''"),
    ("size=2147483648", "more than 32 bits"), ("size=-99999999999", "more than 32 bits"), ("cannot=3", "no field 'cannot'"),
])
def test_what_cannot_be_meant_is_a_sentence_with_its_source(text, words):
    with pytest.raises(UsageError, match=r"^--set: .*[.?]$") as refused:
        parse(text, kinds(Some), "--set")
    assert words in str(refused.value)


def test_the_nearest_name_or_none():
    assert meant("n_selekted", ["n_sink", "n_selected"]) == " did you mean n_selected?" and meant("q", ["abc"]) == ""


def test_what_a_docstring_says_of_each_field():
    found = described(Some)
    assert found["size"] == Described("how large it is", "cells")
    assert found["a"] is found["b"] and found["a"] == Described("two of a kind; on", "")
    assert found["c"] == found["d"] == found["e"] == Described("a range", "")
    assert found["named"].text == "a name; other: with a colon" and "cannot" not in found


def test_every_parameter_is_described():
    assert set(described(SfiParams)) == set(kinds(SfiParams)) and all(d.text for d in described(SfiParams).values())
    assert described(SfiParams)["n_selected"].unit == "cells"
