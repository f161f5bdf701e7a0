"""The command: its line, its health, its end."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from support.command_line import cli_command, cli_env, sentence


class Served:
    """`sfi-local serve` as a process of its own."""

    def __init__(self, folder, *args):
        self.process = subprocess.Popen(cli_command("serve", *args, "--port", "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env=cli_env(SFI_LOCAL_AUTO_DEPTH="0"), cwd=folder)
        self.line = self.process.stdout.readline().decode()
        self.url = re.match(r"http://\S+", self.line)[0]

    def get(self, path):
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def until_ready(self):
        until = time.monotonic() + 60
        while self.get("/health")[1]["status"] != "ready":
            assert time.monotonic() < until
            time.sleep(0.05)

    def stream(self, n):
        """A socket on which n tokens were asked for and the first has come."""
        host, port = self.url.removeprefix("http://").split(":")
        one = socket.create_connection((host, int(port)), timeout=30)
        body = json.dumps({"model": "tiny", "prompt": "abc", "max_tokens": n, "stream": True, "logit_bias": {"259": -100}}).encode()
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        read = b""
        while b"data:" not in read:
            read += one.recv(4096)
        return one

    def end(self, sign):
        self.process.send_signal(sign)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err.decode()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_tells_who_waits(tiny, tmp_path, sign):
    served = Served(tmp_path, tiny, "--ctx", 4096, "--threads", 1)
    served.until_ready()
    gone = served.stream(3000)
    gone.close()  # whose answer ends within a step
    until = time.monotonic() + 20
    while served.get("/slots")[1]["slots"] and any(slot["state"] != "idle" for slot in served.get("/slots")[1]["slots"]):
        assert time.monotonic() < until
    slow = served.stream(3)
    code, err = served.end(sign)
    assert code == 0 and "Traceback" not in err, err
    assert b"[DONE]" in slow.recv(1 << 20)
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
