"""The verdict of doctor: ready, or what is wrong and what to do about it."""

import json

import pytest

from sfi_local.cli import doctor
from sfi_local.cli.doctor import as_text, verdict

GOOD = {"library": {"usable": True}, "devices": {"CPU": "AMD EPYC; policies: frozen native, sketch native; tested", "Vulkan0": "x; frozen portable"},
        "machine": {"available_memory_bytes": 8 << 30}, "models": {"cache": "/c", "free_disk_bytes": 8 << 30, "fetched": ["smollm2-135m"]}}


def judged(**changes):
    return verdict({**GOOD, **{name: {**GOOD[name], **values} for name, values in changes.items()}})


def test_ready_names_the_devices():
    assert verdict(GOOD) == (True, "Ready: fast steps on CPU.")
    assert judged(devices={"CUDA0": "policies: sketch native"}) == (True, "Ready: fast steps on CPU and CUDA0.")


@pytest.mark.parametrize("changes, said", [
    ({"models": {"fetched": []}}, "no model is here yet: run `sfi-local pull smollm2-135m`"),
    ({"models": {"free_disk_bytes": 5 << 20}}, "only 5.2 MB are free on the disk of /c: make room"),
    ({"machine": {"available_memory_bytes": 100 << 20}}, "only 104.9 MB are free of memory: close other programs")])
def test_what_can_be_lived_with_is_said_with_its_remedy(changes, said):
    ready, sentence = judged(**changes)
    assert ready and sentence.startswith("Ready: fast steps on CPU, but ") and said in sentence


@pytest.mark.parametrize("facts, said", [
    ({"library": {"usable": False, "why": "It is gone: build it."}}, "Not ready: It is gone: build it."),
    ({"library": {"error": "OSError: x"}}, "Not ready: OSError: x"),
    ({"devices": {"error": "KeyError: 1"}}, "cannot be asked"), ({"devices": {"CPU": "refused"}}, "no device here has sfi's operations (CPU)"),
    ({"devices": {}}, "there is none")])
def test_what_must_be_put_right_first(facts, said):
    ready, sentence = verdict({**GOOD, **facts})
    assert not ready and said in sentence


def test_a_probe_that_failed_is_no_verdict_by_itself():
    assert verdict({**GOOD, "models": {"error": "x"}, "machine": {"error": "y"}})[0]


def test_no_line_is_wider_than_the_window():
    facts = {"devices": {"CPU": "word " * 60}}
    assert all(len(line) <= width for width in (40, 80) for line in as_text(facts, width).split("\n"))
    assert as_text(facts) == "devices\n" + f"  {'CPU':18} {'word ' * 60}"


def test_the_exit_code_follows(cli, monkeypatch):
    done = cli("doctor")
    ready = json.loads(cli("doctor", "--json").stdout)
    assert done.returncode == 0 and done.stdout.decode().rstrip().splitlines()[-1] == ready["verdict"] and ready["ready"]
    assert "ggml-cpu" in ready["library"]["cpu_library"]
    monkeypatch.setattr(doctor, "collect", lambda: {**GOOD, "library": {"usable": False, "why": "It is gone: build it."}})
    with pytest.raises(SystemExit) as left:
        doctor.command.callback(as_json=False)
    assert left.value.code == 1
