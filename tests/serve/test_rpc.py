"""Layers in another process, by ggml's RPC backend: the same answers, and a sentence where it is not there or gets lost."""

import contextlib
import signal
import socket
import subprocess
import threading
import time

import pytest
from support.command_line import cli_command, cli_env, sentence
from support.serving import Served

from sfi_local.binding.rpc import Address, parse
from sfi_local.errors import ArgumentError

TEXT = "The quick brown fox jumps over the lazy dog. " * 24
ASKED = {"model": "tiny", "prompt": TEXT, "max_tokens": 24, "temperature": 0, "logprobs": 0, "logit_bias": {"259": -100}}


class Lender:
    """`sfi-local rpc-server` as a process."""

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as one:
            self.port = one.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.process = subprocess.Popen(cli_command("rpc-server", "--port", self.port, "--threads", 1), stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, env=cli_env())
        self.process.stdout.readline().decode()
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)

    def end(self):
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=30)
        return out.decode() + err.decode()


@pytest.fixture
def lender():
    one = Lender()
    yield one
    one.process.kill()
    one.process.communicate()


def serve(folder, model, *more):
    one = Served(folder, model, "--ctx", 2048, "--threads", 1, "--mode", "sfi", "--set", "n_selected=64,n_recent=64", "--name", "tiny", "--quiet",
                 "--no-cache", *more)
    one.until_ready()
    return one


def test_answers_are_those_of_one_process_to_rounding(tiny, tmp_path, lender):
    said = []
    for more in ((), ("--rpc", lender.address)):
        one = serve(tmp_path, tiny, *more)
        answer = one.post("/v1/completions", ASKED)
        code, err = one.end(signal.SIGTERM)
        assert code == 0, err
        assert (f"layers on {lender.address}" in err) == bool(more)
        said.append((answer["choices"][0]["logprobs"]["token_logprobs"], answer["sfi"]["steps"]))
    (alone, steps), (beside, steps_too) = said
    assert steps["fast"] > 0 and steps == steps_too  # the sketch is here, and our operations
    assert max(abs(x - y) for x, y in zip(alone[:8], beside[:8])) < 0.05
    assert "Accepted client connection" in lender.end()


def test_a_machine_that_is_lost_ends_the_server_with_a_sentence(tiny, tmp_path, lender):
    one = serve(tmp_path, tiny, "--rpc", lender.address)
    threading.Timer(0.5, lender.process.kill).start()
    with pytest.raises(OSError):  # the connection ends with the process
        while True:
            one.post("/v1/completions", {**ASKED, "max_tokens": 200, "cache_prompt": False})
    _, err = one.process.communicate(timeout=30)
    assert one.process.returncode == 1 and b"A machine of --rpc was lost" in err and b"ggml_abort" not in err


def test_one_that_is_in_use_is_told(tiny, cli, lender):
    with socket.create_connection(("127.0.0.1", lender.port)):
        time.sleep(0.3)
        assert "is it in use?" in sentence(cli("serve", tiny, "--port", 0, "--rpc", lender.address))


def test_one_that_is_not_there_or_speaks_something_else_is_told(tiny, cli):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def answer():
            with contextlib.suppress(OSError):
                one, _ = other.accept()
                one.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                one.close()
        threading.Thread(target=answer, daemon=True).start()
        assert "something else" in sentence(cli("serve", tiny, "--port", 0, "--rpc", f"127.0.0.1:{port}"))
    assert "cannot be reached" in sentence(cli("serve", tiny, "--port", 0, "--rpc", f"127.0.0.1:{port}"))


def test_addresses_are_checked(tiny, cli):
    assert parse("pi.local:50052, 10.0.0.2:1") == (Address("pi.local", 50052), Address("10.0.0.2", 1))
    for text in ("", "pi", "pi:", ":1", "pi:0", "pi:65536", "pi:1x", "a:1,,b:2", "::1:5", ",".join(["a:1"] * 17), "pi:" + "1" * 5000):
        with pytest.raises(ArgumentError):
            parse(text)
    assert "HOST:PORT" in sentence(cli("serve", tiny, "--rpc", "pi"), code=2)


def test_a_port_that_is_taken_is_told(cli, lender):
    assert "in use" in sentence(cli("rpc-server", "--port", lender.port))
