"""The one thread that decides what is computed: answers wait in a queue, and those that have a slot take turns, token by token.

Several streams are stepped side by side, in lanes, each with its share of the threads: a step by one thread on half of the cores costs less
than twice the time, for nobody waits for the other within it.

The life of an answer: 1 add() puts it into the queue; 2 the free slot that holds most of its beginning takes it; 3 what the slot does
not hold is read in pieces, short ones where others are being answered; 4 each round of turns draws one token; 5 the last one, a
cancellation, its deadline or an error ends it, and the slot is free again, with what it holds.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Sequence

from sfi_local.binding.context import N_BATCH
from sfi_local.errors import AbortedError, BusyError, SfiError
from sfi_local.runtime.slot import Slot
from sfi_local.runtime.step import Step

LONGEST_PAUSE = 0.2     # seconds that a stream waits for the others at most
AIM = 0.6               # of that time, what a round is made to take: the next piece may be slower than the last
LEAST_PIECE = 4         # tokens; what a piece costs whatever its length is as much as that
LAST_PIECE = 8          # tokens that are left for the end of a prompt, of which the schedule remembers so many
MOST_WAITING = 1024     # answers in the queue

log = logging.getLogger(__name__)


class QueueFullError(BusyError):
    """So many answers wait that one more would wait too long."""


class DeadlineError(AbortedError):
    """An answer took longer than it may."""


class ShutdownError(AbortedError):
    """The server ends."""


@dataclass
class Usage:
    """What an answer cost. times in seconds

    n_cached: tokens of the prompt that a slot held already, or the prefix store; cached_from: ``memory``, ``disk`` or None
    n_drawn: tokens that were generated, the last included
    ttft:     from add() to the first token; waited: in the queue
    kv_read_share: bytes of K and V that its steps read over those of dense ones
    """

    n_prompt: int = 0
    n_cached: int = 0
    n_drawn: int = 0
    ttft: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0
    kinds: Counter = field(default_factory=Counter)
    kv_read_share: float = 1.0
    mode: str = ""
    cached_from: str | None = None


class Job:
    """One answer.

    prompt:  token ids
    start:   (slot) -> iterator of Step: begins the answer in a slot that holds most of the prompt; the iterator is closed after it
    give:    called on the worker's thread with ("reading", (done, total)), ("step", Step), ("look", ...), and in the end with
             ("end", Usage) or ("error", exception); must return at once
    n:       tokens of the answer at most, for the room in the context; None: unknown
    deadline: seconds from now; None: none
    look:    called after each step with (slot, step); what it gives but None is passed on as ("look", ...)
    """

    def __init__(self, prompt: Sequence[int], start: Callable[[Slot], Iterator[Step]], give: Callable[[str, Any], None], *,
                 n: int | None = None, deadline: float | None = None, look: Callable[[Slot, Step], Any] | None = None):
        self.prompt, self.start, self.give, self.n, self.look = list(prompt), start, give, n, look
        self.usage = Usage(n_prompt=len(self.prompt))
        self.added = time.monotonic()
        self.deadline = None if deadline is None else self.added + deadline
        self.ending: SfiError | None = None   # why it is to end early
        self.slot: Slot | None = None
        self.steps: Iterator[Step] | None = None
        self.n_read = 0                       # tokens of the prompt that the slot holds
        self.rate: float | None = None        # seconds per token of the last piece
        self.last_turn = self.added           # when its last turn ended

    @property
    def streams(self) -> bool:
        """Whether its first token was drawn."""
        return self.usage.n_drawn > 0


class Worker:
    """The slots of a loaded model, and the thread in which they compute.

    model:    a Model; n_slots: answers at a time
    on_pause: called with the seconds that a stream waited for others; on_done: with each Job that ended, and the error or None
    """

    def __init__(self, model: Any, n_slots: int, on_pause: Callable[[float], None] = lambda seconds: None,
                 on_done: Callable[[Job, BaseException | None], None] = lambda job, error: None):
        self.model = model
        self.slots = [model.slot, *(model.new_slot() for _ in range(n_slots - 1))]
        self._on_pause, self._on_done = on_pause, on_done
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._used = {id(slot): 0 for slot in self.slots}  # when each slot was used last, in answers
        self._count = itertools.count(1)
        self._round_began = 0.0
        self._stopped = False
        self._lanes = self._n_lanes(model, n_slots)
        self._pool = ThreadPoolExecutor(self._lanes, "sfi-lane")
        self._thread = threading.Thread(target=self._run, name="sfi-worker", daemon=True)

    @staticmethod
    def _n_lanes(model: Any, n_slots: int) -> int:
        """Streams that are stepped at the same time: no two of them share a core. In mode exact the rounding decides, and a GPU is one."""
        return 1 if model.verifies or model.gpus else min(n_slots, model.n_threads)

    def start(self) -> None:
        self._thread.start()

    def add(self, job: Job) -> None:
        """Put an answer into the queue. Raises QueueFullError, ShutdownError."""
        with self._changed:
            if self._stopped:
                raise ShutdownError("The server is shutting down.")
            if len(self._waiting) >= MOST_WAITING:
                raise QueueFullError(f"{MOST_WAITING} requests wait already: try again later.")
            self._waiting.append(job)
            self._changed.notify()

    def end(self, job: Job, why: SfiError | None = None) -> None:
        """End an answer within one step, from any thread; nothing where it has ended."""
        job.ending = job.ending or why or AbortedError("The answer was cancelled.")
        with self._changed:
            if job.slot:
                job.slot.cancel()  # inside a computation; between two, ending is seen
            self._changed.notify()

    def stop(self, grace: float = 0.0) -> None:
        """Take no more, let what runs go on for so many seconds, end the rest, and wait for the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        until = time.monotonic() + grace
        while self.is_busy and time.monotonic() < until:
            time.sleep(0.02)
        with self._changed:
            for job in [*self._waiting, *self._active]:
                self.end(job, ShutdownError("The server is shutting down."))
        self._thread.join(30)

    @property
    def is_busy(self) -> bool:
        return bool(self._active or self._waiting)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def describe(self) -> list[dict[str, Any]]:
        """What each slot holds and does: counts, never text."""
        jobs = {id(job.slot): job for job in list(self._active)}
        return [self._describe(i, slot, jobs.get(id(slot))) for i, slot in enumerate(self.slots)]

    @staticmethod
    def _describe(i: int, slot: Slot, job: Job | None) -> dict[str, Any]:
        state = "idle" if job is None else "answering" if job.streams else "reading"
        return {"id": i, "state": state, "n_ctx": slot.n_ctx, "n_tokens": len(slot.tokens), "n_prompt": job.usage.n_prompt if job else 0,
                "n_read": job.n_read if job else 0, "n_drawn": job.usage.n_drawn if job else 0}

    # ---- the thread ----

    def _run(self) -> None:
        while self._wait():
            self._admit()
            self._round()
        self._pool.shutdown()

    def _wait(self) -> bool:
        """Until there is something to do; False at the end."""
        with self._changed:
            while not (self._active or self._waiting):
                if self._stopped:
                    return False
                self._changed.wait()
        return True

    def _admit(self) -> None:
        """Give waiting answers the free slots, first come first served."""
        while self._waiting:
            with self._changed:
                if self._waiting[0].ending is None and not self._due(self._waiting[0]):
                    slot = self._best_slot(self._waiting[0].prompt)
                    if slot is None:
                        break
                else:
                    slot = None
                job = self._waiting.popleft()
                job.slot = slot
                self._active.append(job)
            if slot is None:
                self._finish(job, job.ending)
                continue
            self._used[id(slot)] = next(self._count)
            job.usage.waited = time.monotonic() - job.added
            self._guarded(job, self._open)
        for job in [job for job in self._waiting if job.ending or self._due(job)]:
            with self._changed:
                self._waiting.remove(job)
            self._finish(job, job.ending)

    def _best_slot(self, prompt: list[int]) -> Slot | None:
        """The free slot that holds most of the prompt's beginning; of several the one that was not used for longest."""
        taken = {id(job.slot) for job in self._active}
        free = [slot for slot in self.slots if id(slot) not in taken]
        return max(free, key=lambda slot: (_common(slot.tokens, prompt), -self._used[id(slot)]), default=None)

    def _open(self, job: Job) -> None:
        """Make room, and keep what the slot has of the prompt."""
        slot = job.slot
        self.model.make_room(slot, len(job.prompt), job.n)
        job.n_read = job.usage.n_cached = slot.reuse(job.prompt)
        job.usage.cached_from = slot.cached_from
        job.usage.mode = self.model.mode if slot.engine else "stock"
        job.last_turn = time.monotonic()
        job.give("reading", (job.n_read, len(job.prompt)))

    def _round(self) -> None:
        """One turn of each: streams first, then one piece of one prompt."""
        self._steps()
        readers = [job for job in self._active if not job.streams]
        if readers:
            reader = min(readers, key=lambda job: job.last_turn)
            self._turn(reader, self._read)

    def _steps(self, but: Job | None = None) -> None:
        self._round_began = time.monotonic()
        jobs = [job for job in self._active if job.streams and job is not but]
        lanes = min(len(jobs), self._lanes)
        for job in jobs:
            job.slot.set_threads(self.model.n_threads // max(1, lanes))
        if lanes < 2:
            for job in jobs:
                self._stream(job)
        else:
            list(self._pool.map(self._stream, jobs))

    def _stream(self, job: Job) -> None:
        self._on_pause(time.monotonic() - job.last_turn)
        self._turn(job, self._step)

    def _turn(self, job: Job, do: Callable[[Job], None]) -> None:
        if job.ending or self._due(job):
            self._finish(job, job.ending)
            return
        self._guarded(job, do)
        job.last_turn = time.monotonic()

    def _guarded(self, job: Job, do: Callable[[Job], None]) -> None:
        """What goes wrong ends this answer alone."""
        try:
            do(job)
        except SfiError as error:
            self._finish(job, job.ending or error)  # what is ended in the middle of a step may fail in more than one way
        except Exception as error:  # a fault of ours: the others go on
            log.exception("an answer failed")
            self._finish(job, error)

    def _due(self, job: Job) -> bool:
        if job.deadline is None or time.monotonic() < job.deadline:
            return False
        job.ending = job.ending or DeadlineError(f"The answer took longer than {job.deadline - job.added:.0f} seconds.")
        return True

    def _read(self, job: Job) -> None:
        """The next piece of a prompt; the last one draws the first token."""
        left = len(job.prompt) - job.n_read
        piece = self._piece(job)
        job.slot.set_threads(self.model.n_threads)
        if left <= max(piece, LAST_PIECE):
            job.steps = job.start(job.slot)
            self._step(job)
            return
        began, n = time.monotonic(), min(piece, left - LAST_PIECE)
        job.slot.prefill(job.prompt[job.n_read:job.n_read + n], more=True)
        job.rate = (time.monotonic() - began) / n
        job.n_read += n
        job.give("reading", (job.n_read, len(job.prompt)))

    def _piece(self, job: Job) -> int:
        """Tokens that may be read before the streams go on; a whole batch where there are none."""
        streams = [other for other in self._active if other.streams]
        if not streams:
            return N_BATCH
        room = AIM * LONGEST_PAUSE - (time.monotonic() - min(other.last_turn for other in streams))
        return LEAST_PIECE if job.rate is None else max(LEAST_PIECE, min(N_BATCH, int(room / job.rate)))

    def between(self, job: Job) -> None:
        """Called while a prompt of a job is read or what its fast steps need is made: the streams of others go on in time."""
        if job.ending:
            raise job.ending
        if any(other.streams for other in self._active) and time.monotonic() - self._round_began > AIM * LONGEST_PAUSE / 2:
            self._steps(but=job)

    def _step(self, job: Job) -> None:
        step = next(job.steps, None)  # type: ignore[arg-type]
        if step is None:
            raise AbortedError("The answer ended early.")
        usage = job.usage
        if not usage.n_drawn:
            job.n_read, usage.ttft = usage.n_prompt, time.monotonic() - job.added
        else:
            usage.kinds[step.kind] += 1
        usage.n_drawn += 1
        job.give("step", step)
        if job.look and (seen := job.look(job.slot, step)) is not None:
            job.give("look", seen)
        if step.finish:
            self._finish(job, None)

    def _finish(self, job: Job, error: BaseException | None) -> None:
        with self._changed:
            if job in self._active:
                self._active.remove(job)
            slot, job.slot = job.slot, None
        usage = job.usage
        usage.seconds = time.monotonic() - job.added
        if slot is not None and slot.engine and usage.n_drawn:
            usage.kv_read_share = slot.engine.stats().kv_read_share
        if job.steps is not None:
            job.steps.close()  # type: ignore[attr-defined]  # a generator
        job.give(*(("end", usage) if error is None else ("error", error)))
        self._on_done(job, error)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
