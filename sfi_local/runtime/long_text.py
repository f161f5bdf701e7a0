"""Tokenise texts whose unbroken runs are long.

Many vocabularies split text by std::regex, which calls itself once per character of a run and so overflows the stack of
an ordinary thread, ending the process. A text is therefore split on a stack made for its length; runs longer than
MAX_RUN are cut, at the price of a token that may differ at each cut.
"""

from __future__ import annotations

import re
import threading
from typing import Callable, Iterable, Iterator, TypeVar

from sfi_local.errors import OutOfMemoryError

T = TypeVar("T")

SHORT = 256              # characters that any stack has room for
STACK_PER_CHARACTER = 1024  # bytes; std::regex was seen to take up to 420 for ASCII and 650 for other letters
STACK_BESIDE = 1 << 20   # bytes for everything else
MAX_RUN = 200_000        # characters of a run that are tokenised as one
MAX_DIGITS = 300         # digits that are tokenised as one where the splitter takes the square of their number of steps

# whole runs, so that each character is looked at once; letters that single spaces part are one for one of the splitters (exaone-moe)
_RUNS = tuple(map(re.compile, (r"\S+", r"\s+", r"(?:\S )+")))
_DIGITS = re.compile(r"\d+")
_starting = threading.Lock()


def cut(text: str, slow_digits: bool = False) -> list[str]:
    """The text in pieces without runs longer than MAX_RUN, cut within such runs alone.

    slow_digits: also without runs of more than MAX_DIGITS digits, in threes from the right, as numbers are split
    """
    cuts = [0]
    if len(text) > MAX_RUN:
        for run in _long(_RUNS, text, MAX_RUN):
            cuts += range(run.start() + MAX_RUN // 2, run.end(), MAX_RUN // 2)
    if slow_digits and len(text) > MAX_DIGITS:
        for run in _long((_DIGITS,), text, MAX_DIGITS):
            cuts += range(run.end() - MAX_DIGITS, run.start(), -MAX_DIGITS)
    cuts = sorted(set(cuts))
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)])]


def _long(kinds: Iterable[re.Pattern], text: str, most: int) -> Iterator[re.Match]:
    """The runs of more than so many characters."""
    return (run for kind in kinds for run in kind.finditer(text) if run.end() - run.start() > most)


def with_stack_for(n: int, call: Callable[[], T]) -> T:
    """call(), on a stack for a text of n characters. Raises OutOfMemoryError where there is no memory for the stack."""
    if n <= SHORT:
        return call()
    result: list[T] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as caught:  # raised again where it can be seen
            error.append(caught)

    thread = _start(run, STACK_BESIDE + STACK_PER_CHARACTER * min(n, MAX_RUN))
    try:
        thread.join()
    except BaseException:  # Ctrl-C: what the thread reads must outlive it
        thread.join()
        raise
    if error:
        raise error[0]
    return result[0]


def _start(run: Callable[[], None], n_bytes: int) -> threading.Thread:
    thread = threading.Thread(target=run, name="sfi-tokenize", daemon=True)
    with _starting:
        before = threading.stack_size(-(-n_bytes // 65536) * 65536)
        try:
            thread.start()
        except RuntimeError:
            raise OutOfMemoryError(f"There is no memory for a stack of {n_bytes >> 20} MB, which a text with long unbroken runs "
                                   f"needs: give a shorter text.") from None
        finally:
            threading.stack_size(before)
    return thread
