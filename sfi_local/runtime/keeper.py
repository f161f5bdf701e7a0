"""Keeps what a slot has read in the prefix store, and finds it there: files are written by a thread of their own, while the rows are taken
out of the context block by block."""

from __future__ import annotations

import threading
from queue import Full, Queue
from typing import Any, Callable, Iterator, Sequence

from sfi_local.machine import step_back
from sfi_local.runtime.recent import Recent
from sfi_local.store.prefixes import AddRows, Found, Prefixes, is_off

MIN_KEEP = 512    # tokens of a text that is worth keeping
MIN_GAIN = 64     # tokens that must be in the store beyond those in the context, to fetch them
MAX_WAITING = 16  # blocks that wait to be written; one where memory is short
WAIT_S = 0.3      # before reading a text, for the fingerprint of its model

Note = Callable[[str], None]


class Keeper:
    """Of one model; its slots share it.

    fingerprint: gives the name of all that K and V depend on; may take seconds, once; raises OSError
    model:   its name, for lists; text_of: what tokens spell, for lists
    note:    takes a sentence where something is wrong with the store
    checksum: see Prefixes
    settings: what K and V depend on beside the model, for people
    in_memory: keep texts there too
    recent:  texts that are in memory
    """

    def __init__(self, fingerprint: Callable[[], str], checksum: Callable[[Any], int], model: str, text_of: Callable[[Sequence[int]], str], note: Note,
                 settings: str = "", in_memory: bool = True):
        self._fingerprint, self._checksum, self._model, self._text_of, self._note = fingerprint, checksum, model, text_of, note
        self._settings, self.recent = settings, Recent(in_memory)
        self._max_waiting = MAX_WAITING if in_memory else 1
        self._store: Prefixes | None = None
        self._finding: threading.Thread | None = None

    def begin(self) -> None:
        """Look for the fingerprint, which takes a while for a model that was never seen."""
        if self._finding is None:
            self._finding = threading.Thread(target=self._find_store, name="fingerprint")
            self._finding.start()

    def store(self, wait_s: float | None = None) -> Prefixes | None:
        """The store; None where nothing is kept, or it takes longer than wait_s to know the model."""
        if is_off():
            return None
        self.begin()
        if self._finding:
            self._finding.join(wait_s)
        return self._store

    def find(self, tokens: Sequence[int]) -> Found | None:
        """The kept text that shares most with this one. Of a model that was never seen there is hardly any."""
        store = self.store(WAIT_S) if len(tokens) >= MIN_GAIN else None
        return store.find(tokens, MIN_GAIN) if store else None

    def why_differs(self, found: Found, tokens: Sequence[int]) -> str:
        """From which token on a kept text is another than this one, which it shares found.n tokens with."""
        kept, given = (self._text_of(text[found.n:found.n + 1]) for text in (found.tokens, tokens))
        return f"what is kept differs from token {found.n} on ({kept!r} there, {given!r} here)"

    def why_not(self, tokens: Sequence[int]) -> str:
        """Why nothing that is kept serves this text, if it is known: a text like it was read by another model, or with other settings."""
        store = self._store if len(tokens) >= MIN_KEEP else None
        head = store.find_elsewhere(tokens, MIN_KEEP) if store else None
        if head is None:
            return ""
        if head.model != self._model:
            return f"it was read by another model, {head.model}"
        return f"it was read with {head.settings}, and this is {self._settings}" if head.settings != self._settings else (
            f"it was read by another file of {head.model}, or another build of llama.cpp")

    def fetch(self, found: Found, add_rows: AddRows, row_size: int) -> tuple[int, bytearray]:
        """See Prefixes.fetch."""
        return self._store.fetch(found, add_rows, row_size) if self._store else (0, bytearray())

    def save(self, tokens: Sequence[int], blocks: Sequence[str], rows: Iterator[Any], state: bytes | bytearray, n_bytes: int) -> "Saving | None":
        """Keep a text; returns when its rows were taken, and they are written after that. Arguments: see Prefixes.save."""
        store = self.store()
        if store is None:
            return None
        saving = Saving(store, list(tokens), blocks, state, (self._model, self._text_of(tokens[:100]), n_bytes, self._settings),
                        self._max_waiting)
        saving.take(rows)
        return saving

    def _find_store(self) -> None:
        try:
            self._store = Prefixes(self._fingerprint(), self._checksum, self._note)
        except OSError as error:
            self._note(f"Nothing that is read is kept: {error.filename or 'a file'} cannot be read ({error.strerror}).")


class Saving:
    """A text that is being written."""

    def __init__(self, store: Prefixes, tokens: list[int], blocks: Sequence[str], state: bytes | bytearray, told: tuple[str, str, int, str],
                 max_waiting: int = MAX_WAITING):
        self._queue: Queue[Any] = Queue(max_waiting)
        self._names: list[str] | None = None
        self._thread = threading.Thread(target=self._write, args=(store, tokens, blocks, state, told), name="prefixes")
        self._thread.start()

    def take(self, rows: Iterator[Any]) -> None:
        """Hand over the rows; what raises ends the saving."""
        try:
            for block in rows:
                if not self._put(block):
                    return
        except BaseException:
            self._put(None)
            raise
        self._put(None)

    def names(self) -> list[str] | None:
        """Wait until all is written; the names of the blocks, None if it was not."""
        self._thread.join()
        return self._names

    def _put(self, block: Any) -> bool:
        while self._thread.is_alive():
            try:
                self._queue.put(block, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def _write(self, store: Prefixes, tokens: list[int], blocks: Sequence[str], state: bytes | bytearray, told: tuple[str, str, int, str]) -> None:
        step_back()
        try:
            self._names = store.save(tokens, blocks, iter(self._queue.get, None), state, *told)
        except StopIteration:  # what takes the rows was stopped
            pass
