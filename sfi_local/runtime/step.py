"""One item of the generated stream, the text that leaves it, and the tally of a whole run. Pure."""

from __future__ import annotations

import codecs
from collections import Counter
from dataclasses import dataclass, field

KINDS = ("slow", "fast", "dense", "stock")


@dataclass(frozen=True)
class Step:
    """One generated token and the step whose logits it was sampled from.

    token:   id of the token
    text:    text that became final with this token; "" while bytes of a character or a possible stop string are held
    kind:    ``prefill`` for the first token, then ``slow``, ``fast``, ``dense`` or ``stock``
    reason:  why the step was slow or dense (``first``, ``boundary``, ``max_span`` ...); "" for a fast or stock step
    t_ms:    time of that step in milliseconds, logits included; of the whole prefill for the first token
    pos:     position of the token in the text
    depth:   cells that the step could attend to
    n_cells: cells that each KV head of a sparse layer did attend to
    finish:  "" or why this is the last item: ``stop`` (stop string), ``end`` (end of answer), ``length`` (n reached),
             ``context`` (context full)
    tie:     mode exact: but for noise another token would have been drawn, so that dense steps might have taken it
    n_drafted, n_accepted: mode exact: tokens that were drafted for the span which ends here, and those of them that
             verification kept; drafted_by: ``ngram`` or ``fast``; n_again: tokens before them that the pass computed again
    logprob: natural logarithm of the token's probability by the model alone, before any sampler; None: not asked for
    top:     as many (token, logprob) as were asked for, the most likely first
    """

    token: int
    text: str
    kind: str
    reason: str
    t_ms: float
    pos: int
    depth: int
    n_cells: int
    finish: str = ""
    tie: bool = False
    n_drafted: int = 0
    n_accepted: int = 0
    drafted_by: str = ""
    n_again: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TextStream:
    """Turns the bytes of tokens into text that is safe to show.

    Bytes of an incomplete character are held until it is complete; text that may be the start of a stop string is
    held until it is not. Text after a stop string is dropped.
    """

    def __init__(self, stop: tuple[str, ...] = ()):
        self.stop = tuple(s for s in stop if s)
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, piece: bytes, last: bool = False) -> str:
        """The text that became final with these bytes; with ``last`` everything held is let go."""
        self._held += self._decoder.decode(piece, final=last)
        found = [i for i in (self._held.find(s) for s in self.stop) if i >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) if last else self._safe_length())

    def _safe_length(self) -> int:
        """Length of the held text before the longest tail that starts a stop string."""
        longest = max((len(s) for s in self.stop), default=0)
        for i in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(s.startswith(self._held[i:]) for s in self.stop):
                return i
        return len(self._held)

    def _release(self, n: int) -> str:
        out, self._held = self._held[:n], self._held[n:]
        return out


@dataclass(frozen=True)
class Span:
    """end: index of its last token; the others as of Step"""

    end: int
    n_drafted: int
    n_accepted: int
    drafted_by: str
    n_again: int = 0


@dataclass
class Tally:
    """Sums over the items of one generation. Times in milliseconds; rates in tokens per second.

    spans: mode exact, of each pass
    thoughts, answers: the text, told apart; in_thought: whether it ends in a thought
    cached_from, why_read: see Slot
    s_first: seconds from the start of the process to the first token
    """

    n_prompt: int = 0
    n_prefilled: int = 0
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    steps: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    ms_prefill: float = 0.0
    ms_steps: float = 0.0
    finish: str = ""
    spans: list[Span] = field(default_factory=list)
    ties: list[bool] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    in_thought: bool = False
    s_first: float = 0.0
    cached_from: str | None = None
    why_read: str = ""

    def add(self, step: Step) -> None:
        """Count one item."""
        self.tokens.append(step.token)
        self.texts.append(step.text)
        self.finish = step.finish
        if step.drafted_by:
            self.spans.append(Span(len(self.tokens) - 1, step.n_drafted, step.n_accepted, step.drafted_by, step.n_again))
        self.ties.append(step.tie)
        if step.kind == "prefill":
            self.ms_prefill += step.t_ms
            return
        self.steps[step.kind] += 1
        self.ms_steps += step.t_ms
        if step.reason:
            self.reasons[step.reason] += 1

    @property
    def n_drafted(self) -> int:
        return sum(span.n_drafted for span in self.spans)

    @property
    def n_accepted(self) -> int:
        return sum(span.n_accepted for span in self.spans)

    def drafted(self, by: str) -> tuple[int, int]:
        """(tokens drafted, kept) by fast steps (``fast``) or the text itself (``ngram``)."""
        spans = [span for span in self.spans if span.drafted_by == by]
        return sum(span.n_drafted for span in spans), sum(span.n_accepted for span in spans)

    @property
    def n_ties(self) -> int:
        return sum(self.ties)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def prefill_tps(self) -> float:
        """Tokens of prefill per second; tokens that were already in the cache are not counted."""
        return _rate(self.n_prefilled, self.ms_prefill)

    @property
    def decode_tps(self) -> float:
        """Decode steps per second of step time; sampling and printing are not counted."""
        return _rate(sum(self.steps.values()), self.ms_steps)


def _rate(n: int, ms: float) -> float:
    return 1000.0 * n / ms if ms > 0 else 0.0
