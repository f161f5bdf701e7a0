"""Drafts from the text itself: what followed the last few tokens where they stood before. Pure.

    places   where each pair of tokens was last seen, and from there the place before: of the latest CANDIDATES that one is taken
             which has most of the last tokens before it
    run      a place whose tokens go on to be right is kept, however long that lasts
    rejoin   behind a long run that a token broke (a name that was changed, say) the places near its end are looked at first

Each token that comes shows whether the place was right, whether it was drafted from or not: so how far a match of a length can be
trusted is known without a single pass.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Iterable, Sequence

CANDIDATES = 16   # places that are compared, at most
LONGEST = 32      # tokens that are compared at each
LONG = 8          # tokens of a run from which on no other place is looked for, and whose end is remembered
NEAR = 24         # tokens from there in which it may go on
PATIENCE = 32     # tokens after which that is given up
TRUST = 4.0       # how many tokens what is thought before any was seen weighs
UNLIKELY = 0.1    # probability that all drafts up to one are right below which no more are given
FORGET = 0.96     # weight of what was seen, at each new token of its kind
LEARN = 512       # tokens at the end of a prompt from which trust is learnt; of those before it would be forgotten


@dataclass(frozen=True)
class Match:
    """at: place whose token should come next; length: tokens before it that are the last ones; near: found by the end of a long run"""

    at: int
    length: int
    near: bool = False

    def on(self) -> Match:
        """One token further, which was right."""
        return Match(self.at + 1, self.length + 1, self.near and self.length + 1 < LONG)


class Ngrams:
    """The tokens of a sequence, of which more and more are given; what they cost is the same for each."""

    def __init__(self, tokens: Iterable[int] = ()):
        self.tokens: list[int] = []
        self.match: Match | None = None
        self._latest: dict[int, int] = {}   # pair of tokens -> place after it
        self._before = array("q")           # [place - 1]: the place before it after the same pair, -1 for none
        self._lost: tuple[int, int] | None = None  # place at which a long run went on wrong, and the number of tokens then
        self._seen: dict[tuple[bool, int], tuple[float, float]] = {}  # kind of match -> how often right and wrong
        self._note(tokens)
        self._look()

    def follow(self, tokens: Sequence[int], token: int) -> None:
        """These are the tokens in the cache, all of them sure, and the one that comes next. Only more of them since the last call."""
        more = tokens[len(self.tokens):]
        if len(more) > LEARN:
            self._note(more[:-LEARN])
            more, self.match, self._lost = more[-LEARN:], None, None
        for one in more:
            self.push(one)
        self.push(token)

    def push(self, token: int) -> None:
        """One token more, which is sure."""
        match, right = self.match, False
        if match:
            right = self.tokens[match.at] == token
            self._learn(match, right)
            if not right and match.length >= LONG:
                self._lost = match.at, len(self.tokens)
        self._note((token,))
        self.match = match.on() if match and right else None
        if not self.match or self.match.length < LONG:
            self._look()

    def draft(self, n: int) -> list[int]:
        """The n tokens that should come next; none where nothing matches."""
        if not self.match:
            return []
        drafts: list[int] = []
        for at in range(self.match.at, self.match.at + n):
            drafts.append(self.tokens[at] if at < len(self.tokens) else drafts[at - len(self.tokens)])
        return drafts

    def odds(self, n: int) -> list[float]:
        """Of each of these, the probability that it is right if those before it are; not of those that will hardly be reached."""
        match, odds, right = self.match, list[float](), 1.0
        while match and len(odds) < n and right > UNLIKELY:
            odds.append(self._trust(match))
            right *= odds[-1]
            match = match.on()
        return odds

    def _note(self, tokens: Iterable[int]) -> None:
        """Take tokens in, without a look at what they match: a long prompt is waited for."""
        latest, before = self._latest, self._before
        last, place = self.tokens[-1] if self.tokens else -1, len(self.tokens)
        for token in tokens:
            pair, place = last << 32 | token, place + 1
            before.append(latest.get(pair, -1))
            latest[pair] = place
            last = token
            self.tokens.append(token)

    def _look(self) -> None:
        """Take the place with the longest match: near the end of a lost run, then that of now, then the latest."""
        best = self._near() or self.match
        at = self._before[-1] if self.tokens else -1
        for _ in range(CANDIDATES):
            if at < 0 or best and best.length >= LONGEST:
                break
            length = self._length(at)
            if not best or length > best.length + best.near:
                best = Match(at, length)
            at = self._before[at - 1]
        self.match = best

    def _near(self) -> Match | None:
        if not self._lost:
            return None
        at, then = self._lost
        n = len(self.tokens) - then  # tokens since, 1 at least
        if n > PATIENCE or self.match and self.match.length >= LONG:
            self._lost = None
            return None
        if self.match and self.match.near:
            return self.match
        places = range(at + 1, min(at + n + NEAR, then))
        best = max(places, key=lambda place: (self._length(place), -place), default=None)
        if best is None:
            return None
        length = self._length(best)
        return Match(best if length else min(at + n, then - 1), length, near=True)

    def _length(self, place: int) -> int:
        """How many of the last tokens stand before a place."""
        tokens, end, n = self.tokens, len(self.tokens), 0
        while n < LONGEST and n < place and tokens[place - 1 - n] == tokens[end - 1 - n]:
            n += 1
        return n

    def _learn(self, match: Match, right: bool) -> None:
        kind = _kind(match)
        n_right, n_wrong = self._seen.get(kind, (0.0, 0.0))
        self._seen[kind] = FORGET * n_right + right, FORGET * n_wrong + (not right)

    def _trust(self, match: Match) -> float:
        right, wrong = self._seen.get(_kind(match), (0.0, 0.0))
        thought = (match.length + 1) / (match.length + 5)
        return (right + TRUST * thought) / (right + wrong + TRUST)


def _kind(match: Match) -> tuple[bool, int]:
    """Matches that are trusted alike: lengths up to 4, then twice as long ones together."""
    return match.near, match.length if match.length <= 4 else 2 + min(match.length, 64).bit_length()
