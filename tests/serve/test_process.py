"""The command: its line, its health, its end."""

import os
import signal
import socket
import sys
import time

import pytest
from support.command_line import sentence
from support.serving import Served


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
