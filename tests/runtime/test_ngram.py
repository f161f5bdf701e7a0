"""Drafts from the text itself: the longest match, the latest of two, on and on while it is right, and how far it is trusted."""

import random
import time

import pytest

from sfi_local.runtime.ngram import CANDIDATES, LEARN, LONG, LONGEST, NEAR, PATIENCE, Match, Ngrams


def naive(tokens):
    """Length of the longest match of the last tokens that a place before the end has, of at least 2."""
    lengths = [next((n for n in range(place + 1) if n == place or tokens[place - 1 - n] != tokens[-1 - n]), 0) for place in range(2, len(tokens))]
    return max((min(n, LONGEST) for n in lengths if n >= 2), default=0)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 4, 5]])
def test_where_nothing_comes_again_nothing_is_drafted(tokens):
    ngrams = Ngrams(tokens)
    assert ngrams.match is None and ngrams.draft(8) == [] and ngrams.odds(8) == []


def test_the_longest_match_drafts_what_followed_it():
    ngrams = Ngrams([1, 2, 3, 4, 5, 6, 9, 3, 4, 7, 8, 2, 3, 4])  # 2 3 4 once, 3 4 twice
    assert ngrams.match == Match(4, 3) and ngrams.draft(3) == [5, 6, 9]


def test_of_equally_long_ones_the_latest():
    assert Ngrams([1, 2, 3, 9, 1, 2, 4, 8, 1, 2]).draft(2) == [4, 8]


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_that_is_taken_at_once_is_matched_as_one_that_came_token_by_token(seed):
    rng = random.Random(seed)
    prompt = [rng.randrange(30) for _ in range(700)]
    prompt += [7] + prompt[100:100 + seed]
    at_once, one_by_one = Ngrams(), Ngrams()
    at_once.follow(prompt, 3)
    for token in [*prompt, 3]:
        one_by_one.push(token)
    assert at_once.tokens == one_by_one.tokens and at_once.match == one_by_one.match
    assert at_once.draft(8) == one_by_one.draft(8)
    assert any(right + wrong > 1 for right, wrong in at_once._seen.values())  # from the end of the prompt


def test_of_a_long_prompt_only_the_end_is_looked_at(monkeypatch):
    """Else the second token of an answer waits for it: 70 ms at 8k."""
    looks = []
    monkeypatch.setattr(Ngrams, "_look", lambda self: looks.append(len(self.tokens)))
    Ngrams().follow([i % 97 for i in range(8000)], 3)
    assert len(looks) <= LEARN + 2


@pytest.mark.parametrize("period", [1, 2, 5])
def test_what_goes_round_is_drafted_as_long_as_wanted(period):
    ngrams = Ngrams(list(range(period)) * 4)
    assert ngrams.draft(31) == [i % period for i in range(31)]


@pytest.mark.parametrize("seed", range(20))
def test_the_match_is_as_long_as_the_longest_there_is(seed):
    """Few tokens, so that there are many places; those that fit into the candidates are all compared."""
    rng = random.Random(seed)
    tokens, ngrams = [], Ngrams()
    for _ in range(60):
        token = rng.randrange(4)
        tokens.append(token), ngrams.push(token)
        pairs = sum(pair == tuple(tokens[-2:]) for pair in zip(tokens, tokens[1:]))
        match = ngrams.match
        if match and not match.near:
            assert ngrams._length(match.at) >= 2 and match.length <= len(tokens) and ngrams.draft(1) == [tokens[match.at]]
            if pairs <= CANDIDATES and match.length < LONG:
                assert match.length == naive(tokens)
    assert Ngrams(tokens).tokens == ngrams.tokens == tokens


def test_a_run_goes_on_however_long_and_is_trusted_more_and_more():
    text = [*range(1000), 5, 6]
    ngrams = Ngrams(text)
    odds = [ngrams.odds(1)[0]]
    for token in range(7, 600):
        assert ngrams.draft(1) == [token]
        ngrams.push(token)
        odds.append(ngrams.odds(1)[0])
    assert ngrams.match.length == 595 and odds[0] < 0.5 < 0.98 < odds[-1]
    assert ngrams.odds(31) == sorted(ngrams.odds(31)) and len(ngrams.odds(31)) == 31


def test_what_never_goes_on_as_before_is_not_trusted():
    rng, ngrams = random.Random(0), Ngrams()
    for _ in range(3000):
        ngrams.push(rng.randrange(30))
    assert ngrams.match is None or ngrams.odds(1)[0] < 0.15


@pytest.mark.parametrize("new", [[-1], [-1, -2], [-1, -2, -3], []])
def test_behind_a_change_in_a_long_run_it_goes_on_where_it_was(new):
    """Two tokens of the file stand elsewhere too, later: the end of the run counts for more. new: in place of token 100"""
    file = list(range(300))
    ngrams = Ngrams([*file, 102, 103, 7, 101, 102, 8, 0, 1])
    for token in [*range(2, 100), *new, 101]:
        ngrams.push(token)
    assert ngrams.match.near and ngrams.draft(3) == [102, 103, 104]
    for token in range(102, 102 + LONG):
        ngrams.push(token)
    assert not ngrams.match.near and ngrams.match.length >= LONG


def test_the_end_of_a_run_is_forgotten_after_a_while():
    ngrams = Ngrams([*range(300), 0, 1])
    for token in [*range(2, 100), *range(1000, 1000 + PATIENCE + 1)]:
        ngrams.push(token)
    assert ngrams.match is None and NEAR < PATIENCE + 1


def test_a_token_costs_the_same_at_any_depth():
    """Also where one pair is everywhere."""
    def seconds(n):
        ngrams = Ngrams([1, 1, 2] * (n // 3))
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            for i in range(300):
                ngrams.push(1 + (i % 3 == 2))
                ngrams.push(10 + i % 7)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(30_000) < 5 * seconds(1_000)
