"""What is read ahead is not read again, and an app sees where in it an answer reads."""

import threading

import pytest

from sfi_local import Look, Sampling, SfiParams, load
from sfi_local.errors import AbortedError, BusyError, DetachedError, InputError
from sfi_local.runtime.look import N_PARTS, STRONGEST

pytestmark = pytest.mark.usefixtures("native")

GREEDY = Sampling(temp=0)
SMALL = SfiParams.of("sketch", n_sink=4, n_recent=32, n_selected=64, tolerance=0, auto_depth=1)
TEXT = "The quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture
def model(tiny):
    with load(tiny, mode="sfi", n_threads=1, params=SMALL) as model:
        yield model


def text_of(steps):
    return "".join(step.text for step in steps)


def test_an_answer_about_what_was_read_computes_only_what_is_new(model):
    assert model.read(TEXT) == len(model.prompt_tokens(TEXT)) == model.slot.n_prefilled
    text_of(model.generate(TEXT + "What?", n=8, sampling=GREEDY))
    assert model.slot.n_prefilled <= 6
    assert model.read(TEXT + "What?") and model.slot.n_prefilled == 1  # whose logits are needed


def test_it_is_the_same_answer(tiny):
    answers = []
    for ahead in (TEXT, "", TEXT + "What?"):
        with load(tiny, mode="dense", n_threads=1) as model:
            assert not ahead or model.read(ahead)
            answers.append(text_of(model.generate(TEXT + "What?", n=8, sampling=GREEDY)))
    assert answers[0] == answers[1] == answers[2] != ""


def test_messages_that_are_read_are_the_beginning_of_a_conversation(model):
    model.read([{"role": "user", "content": TEXT}])
    text_of(model.chat(n=4, sampling=GREEDY).ask(TEXT + "What?"))
    assert model.slot.n_prefilled < 60 < len(model.slot.tokens)


def test_reading_is_cancelled_from_another_thread_and_goes_on_from_there(model):
    seen = []

    def stop_it(done, total):
        seen.append((done, total))
        if done >= 512:
            other = threading.Thread(target=model.cancel)
            other.start()
            other.join()

    with pytest.raises(AbortedError):
        model.read(TEXT, progress=stop_it)
    total = len(model.prompt_tokens(TEXT))
    assert seen[0] == (0, total) and 512 <= len(model.slot.tokens) < total
    done = len(model.slot.tokens)
    assert model.read(TEXT) == total and model.slot.n_prefilled == total - done


def test_reading_refuses_what_an_answer_refuses(model):
    with pytest.raises(InputError, match="empty"):
        model.read("")
    with pytest.raises(InputError, match="tokens"):
        model.read("x" * 9000)
    steps = model.generate("fox", n=4)
    next(steps)
    found = []
    other = threading.Thread(target=lambda: found.append(caught(lambda: model.read(TEXT))))
    other.start()
    other.join()
    assert isinstance(found[0], BusyError)
    steps.close()
    model.close()
    with pytest.raises(DetachedError):
        model.read(TEXT)


def caught(call):
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return error


def test_a_look_lights_the_parts_that_fast_steps_selected(model):
    look = Look(model.read(TEXT))
    seen = [(step.kind, look(model.slot, step)) for step in model.generate(TEXT + "What?", n=12, sampling=GREEDY)]
    looks = [found["parts"] for kind, found in seen if found]
    assert looks and all(found is None for kind, found in seen if kind != "fast")
    assert all(len(parts) <= N_PARTS and max(parts) == STRONGEST and min(parts) >= 0 for parts in looks)
