"""Turns, queue, cancellation, deadlines, and an answer that fails alone."""

import threading
import time

import pytest

from sfi_local import Sampling, load
from sfi_local.errors import AbortedError, DecodeError
from sfi_local.serve import worker as module
from sfi_local.serve.worker import DeadlineError, Job, ShutdownError, Worker

pytestmark = pytest.mark.usefixtures("native")


ENDLESS = Sampling(temp=0, logit_bias={257: -1000.0, 259: -1000.0})


class Heard:
    """What one answer gave, in order."""

    def __init__(self, worker, prompt, n=20, **options):
        self.given, self.ended = [], threading.Event()
        self.job = Job(prompt, self._start, self._give, n=n, **options)
        self._worker, self._n = worker, n
        self.at = []

    def _start(self, slot):
        return self._worker.model.generate(self.job.prompt, n=self._n, sampling=ENDLESS, slot=slot,
                                           progress=lambda *_: self._worker.between(self.job))

    def _give(self, kind, value):
        self.given.append((kind, value))
        self.at.append(time.monotonic())
        if kind in ("end", "error"):
            self.ended.set()

    def wait(self):
        assert self.ended.wait(60), "the worker hangs"
        return self.given[-1]

    @property
    def tokens(self):
        return [value.token for kind, value in self.given if kind == "step"]


@pytest.fixture(params=[1, 2], ids=["one lane", "two lanes"])
def worker(tiny, request):
    pauses = []
    with load(tiny, mode="sfi", n_ctx=2048, n_threads=request.param, cache=False) as model:
        one = Worker(model, 2, pauses.append)
        one.pauses = pauses
        one.start()
        yield one
        one.stop()


def ask(worker, prompt, **options):
    heard = Heard(worker, prompt, **options)
    worker.add(heard.job)
    return heard


def test_streams_take_turns_token_by_token(worker):
    ask(worker, [65] * 40).wait()
    both = [ask(worker, [65 + i] * 60, n=400) for i in range(2)]
    assert [one.wait()[0] for one in both] == ["end", "end"]
    order = sorted((at, i) for i, one in enumerate(both) for at, (kind, _) in zip(one.at, one.given) if kind == "step")
    switches = sum(a[1] != b[1] for a, b in zip(order, order[1:]))
    assert switches > 400  # of 799; one begins a little earlier


def test_a_prompt_is_read_in_pieces_while_another_streams(worker, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.0)  # pieces as short as can be
    stream = ask(worker, [65] * 60, n=300)
    while len(stream.tokens) < 3:
        time.sleep(0.001)
    reader = ask(worker, [66] * 400, n=2)
    reader.wait()
    readings = [value for kind, value in reader.given if kind == "reading"]
    assert len(readings) > 20 and readings[-1][0] <= 400 and max(b[0] - a[0] for a, b in zip(readings, readings[1:])) <= module.LEAST_PIECE
    between = [at for at, (kind, _) in zip(stream.at, stream.given) if kind == "step" and reader.at[0] < at < reader.at[-1]]
    assert len(between) > 20
    stream.wait()


def test_pieces_are_as_one_prefill(worker, tiny):
    prompt = [65 + (i * i) % 50 for i in range(700)]
    with load(tiny, mode="sfi", n_ctx=2048, n_threads=1) as model:
        alone = [step.token for step in model.generate(prompt, n=30, sampling=Sampling(temp=0))]
    slot = worker.model.new_slot()
    slot.grow(2048)
    for i in range(0, 690, 23):
        slot.prefill(prompt[i:i + 23], more=True)
    steps = list(worker.model.generate(prompt, n=30, sampling=Sampling(temp=0), slot=slot))
    slot.close()
    assert [step.token for step in steps] == alone and {step.kind for step in steps} == {"prefill", "fast"}


def test_the_slot_with_the_longest_common_beginning_answers(worker):
    ask(worker, [65] * 200).wait()
    ask(worker, [66] * 200).wait()
    for letter in (66, 65, 65, 66):
        heard = ask(worker, [letter] * 200 + [70], n=2)
        assert heard.wait()[1].n_cached == 200


def test_more_than_there_are_slots_wait_their_turn(worker):
    all_of_them = [ask(worker, [65 + i] * 30, n=10) for i in range(9)]
    assert [one.wait()[0] for one in all_of_them] == ["end"] * 9
    assert max(one.wait()[1].waited for one in all_of_them) > 0 and not worker.is_busy


@pytest.mark.parametrize("when", ["waiting", "reading", "answering"])
def test_what_is_cancelled_ends_at_once_and_the_slot_is_good(worker, when):
    others = [ask(worker, [80 + i] * 20, n=1500) for i in range(2)] if when == "waiting" else []
    heard = ask(worker, [65 + i % 7 for i in range(1500)], n=400)
    while when == "answering" and len(heard.tokens) < 3:
        time.sleep(0.001)
    began = time.monotonic()
    worker.end(heard.job)
    kind, error = heard.wait()
    assert kind == "error" and isinstance(error, AbortedError) and time.monotonic() - began < 2
    for other in others:
        worker.end(other.job)
        other.wait()
    assert ask(worker, [65] * 50, n=5).wait()[0] == "end"


def test_a_deadline_ends_an_answer(worker):
    kind, error = ask(worker, [65] * 30, n=2000, deadline=0.1).wait()
    assert kind == "error" and isinstance(error, DeadlineError)


def test_an_answer_that_fails_fails_alone(worker, monkeypatch):
    good = ask(worker, [65] * 40, n=400)
    while len(good.tokens) < 2:
        time.sleep(0.001)
    for wrong in (DecodeError("no"), ZeroDivisionError("fault")):
        bad = Heard(worker, [66] * 40)
        bad.job.start = lambda slot, wrong=wrong: (_ for _ in ()).throw(wrong)
        worker.add(bad.job)
        assert bad.wait() == ("error", wrong)
    assert good.wait()[0] == "end" and ask(worker, [66] * 40).wait()[0] == "end"


def test_stopping_tells_those_who_still_wait(worker):
    heard = [ask(worker, [65 + i] * 30, n=100_000) for i in range(4)]
    worker.stop(grace=0.1)
    assert [type(one.wait()[1]) for one in heard] == [ShutdownError] * 4
    with pytest.raises(ShutdownError):
        ask(worker, [65])
