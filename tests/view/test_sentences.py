"""Which sentences were read most: cut where a person would, ranked by what the fast steps chose."""

from types import SimpleNamespace

import numpy as np

from sfi_local.view.sentences import LONGEST, read_most, sentences, shares


def cut(*pieces):
    return ["".join(pieces[a:b]).strip() for a, b in sentences(pieces, len(pieces))]


def test_sentences_end_where_a_person_would_end_them():
    assert cut("The", " fox", " ran", " away", ".", " It", " came", " back", "!\n", "A", " line", " without", " end", "\n", "and", " 3.", "5", " more") == [
        "The fox ran away.", "It came back!", "A line without end\nand 3.5 more"]
    assert cut("One", " of", " two", " lines", "\n", "is", " one", ".") == ["One of two lines\nis one."]
    assert cut("A", " head", " of", " it", "\n", "\n", "-", " one", " thing", "\n", "-", " and", " two", " more", "\n\n", "And", " so", " it", " ends") == [
        "A head of it", "- one thing", "- and two more", "And so it ends"]
    assert cut("The", " fox", " ran", ".", " It", " came", " back", "!") == ["The fox ran.", "It came back!"]
    assert cut("河", "は", "長い", "。", "海", "は", "広い", "。") == ["河は長い。", "海は広い。"]


def test_marks_of_the_template_are_no_part_of_a_sentence_and_scraps_are_none():
    assert cut("<|im_start|>", "user", "\n", "The", " fox", " ran", " away", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n") == ["The fox ran away"]


def test_what_never_ends_is_cut():
    assert all(b - a <= LONGEST for a, b in sentences(["x "] * 1000, 1000)) and sentences([], 0) == []


def collector():
    """Two heads; the first choice was in force for three fast steps, the second for one and a slow one."""
    sets = [[np.array([0, 1]), np.array([1, 2])], [np.array([8, 9, 99]), np.array([], dtype=int)]]
    kinds = ["fast", "fast", "fast", "slow", "fast"]
    return SimpleNamespace(choices=sets, chosen=[0, 0, 0, 1, 1], steps=[SimpleNamespace(kind=k) for k in kinds], heads=[(0, 0), (0, 1)])


def test_shares_are_means_over_heads_and_fast_steps():
    assert shares(collector(), 10).tolist() == [3 / 8, 6 / 8, 3 / 8, 0, 0, 0, 0, 0, 1 / 8, 1 / 8]
    none = SimpleNamespace(choices=[], chosen=[-1], steps=[SimpleNamespace(kind="dense")], heads=[])
    assert shares(none, 4).tolist() == [0] * 4


def test_the_most_read_come_first_and_the_unread_never():
    share = np.array([.5] * 4 + [.9] * 2 + [0] * 20 + [.4] * 20)
    ranges = [(0, 4), (4, 6), (6, 26), (26, 46)]
    assert read_most(share, ranges) == [(3, .4), (0, .5), (1, .9)]  # one word of a scrap does not make it the first
    assert read_most(share, ranges, 1) == [(3, .4)]
