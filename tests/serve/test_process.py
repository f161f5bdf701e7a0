"""The command: its line, its health, its end."""

import asyncio
import errno
import os
import signal
import socket
import sys
import time

import pytest
from support.command_line import sentence
from support.serving import Served, client_of, make_server

from sfi_local.serve import http
from sfi_local.store import prefix_files, prefixes


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_tells_who_waits(tiny, tmp_path, sign):
    served = Served(tmp_path, tiny, "--ctx", 4096, "--threads", 1)
    served.until_ready()
    gone, _ = served.stream(3000)
    gone.close()  # whose answer ends within a step
    until = time.monotonic() + 20
    while served.get("/slots")[1]["slots"] and any(slot["state"] != "idle" for slot in served.get("/slots")[1]["slots"]):
        assert time.monotonic() < until
    slow, read = served.stream(3)
    code, err = served.end(sign)
    assert code == 0 and "Traceback" not in err, err
    assert b"[DONE]" in read + slow.recv(1 << 20)
    assert "/v1/completions 200" in err and "abc" not in err


def test_a_port_in_use_is_a_sentence(tiny, cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Port {port} of 127.0.0.1 is in use" in sentence(cli("serve", tiny, "--port", port))


def test_another_address_needs_a_key(tiny, cli):
    assert "--api-key" in sentence(cli("serve", tiny, "--host", "0.0.0.0", "--port", 0), code=2)


def test_a_model_that_cannot_be_loaded_is_a_sentence(tmp_path, cli):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + os.urandom(100))
    done = cli("serve", broken, "--port", 0)
    assert done.returncode == 1 and b"Traceback" not in done.stderr and b"broken.gguf" in done.stderr


def test_a_head_that_does_not_come_is_not_waited_for(tiny, tmp_path):
    """Neither that of the first request nor that of the next one; a request that is answered is left alone."""
    (tmp_path / "fast.py").write_text("import sys\nfrom sfi_local.serve import connections\nconnections.HEAD_SECONDS = 0.3\n"
                                      "from sfi_local.cli.main import main\nsys.argv[0] = 'sfi-local'\nsys.exit(main())\n")
    served = Served(tmp_path, tiny, "--ctx", 1024, "--threads", 1, program=[sys.executable, str(tmp_path / "fast.py")])
    served.until_ready()
    for sent in (b"", b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: ", b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\nGET /heal"):
        with served.connect() as one:
            one.sendall(sent)
            while one.recv(4096):  # until it is closed
                pass
    answered, read = served.stream(900)
    while b"[DONE]" not in read:
        part = answered.recv(4096)
        assert part
        read += part
    assert served.end(signal.SIGTERM)[0] == 0


def test_a_client_that_reads_a_byte_at_a_time_harms_nobody(tiny, tmp_path):
    served = Served(tmp_path, tiny, "--ctx", 4096, "--threads", 1)
    served.until_ready()
    slow, _ = served.stream(3000)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    for _ in range(3):
        assert slow.recv(1)
        began = time.monotonic()
        quick, read = served.stream(3)
        while b"[DONE]" not in read:
            read += quick.recv(4096)
        assert time.monotonic() - began < 20
        time.sleep(0.2)
    code, err = served.end(signal.SIGTERM)
    assert code == 0 and "Traceback" not in err, err


def test_a_client_that_takes_nothing_is_left():
    async def asked():
        gone = []

        async def events():
            while True:
                yield b"data: {}\n\n"

        async def send(message):
            if message.get("body"):
                await asyncio.Event().wait()  # a buffer that stays full

        async def receive():
            await asyncio.Event().wait()
        await http.Events(events(), lambda: gone.append(1))({}, receive, send)
        return gone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "SEND_SECONDS", 0.2)
        assert asyncio.run(asyncio.wait_for(asked(), 10)) == [1]


def test_a_disk_that_is_full_costs_no_answer(tiny, tmp_path, monkeypatch):
    def write(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path))
    monkeypatch.setenv("SFI_LOCAL_PREFIX_BUDGET", "1e9")
    monkeypatch.setattr(prefix_files, "_write_all", write)
    server = make_server(tiny, mode="sfi", n_ctx=2048)
    client = client_of(server)
    for i in range(3):
        body = {"model": "tiny", "prompt": [65 + i] * 700, "max_tokens": 3, "logit_bias": {"259": -100, "257": -100}}
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 3
    notes = server.worker.model.unread_notes()
    server.stop()
    assert sum("is full" in note for note in notes) == 1
    assert not list((tmp_path / "prefixes").rglob("*.part"))


def test_two_servers_share_a_store_and_one_takes_over_when_the_other_is_drained(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SFI_LOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SFI_LOCAL_PREFIX_BUDGET", "1e9")
    first, second = (Served(tmp_path, tiny, "--ctx", 4096, "--threads", 1) for _ in range(2))
    for one in (first, second):
        one.until_ready()
    prompt = [65 + (i * i) % 50 for i in range(1500)]
    assert first.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 2})["sfi"]["cached_from"] is None
    until = time.monotonic() + 30
    while not prefixes._entry_files(tmp_path / "cache" / "prefixes"):  # the thread that writes steps back behind who computes
        assert time.monotonic() < until
        time.sleep(0.02)
    running, read = first.stream(500)
    first.process.send_signal(signal.SIGTERM)
    with pytest.raises(OSError):  # urllib's errors are some
        while True:
            first.get("/v1/models")
            time.sleep(0.05)
    answer = second.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 2})
    assert answer["sfi"]["cached_from"] == "disk" and answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 1000
    while b"[DONE]" not in read:
        part = running.recv(4096)
        assert part
        read += part
    assert first.process.wait(60) == 0 and second.end(signal.SIGTERM)[0] == 0
