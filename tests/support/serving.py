"""A server in this process, and a client that asks it without a network; and the command as a process of its own."""

import contextlib
import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request

from starlette.testclient import TestClient

from support.command_line import cli_command, cli_env


def make_server(path, n_slots=2, key=None, **options):
    from sfi_local import load
    from sfi_local.serve.app import Server, Settings
    from sfi_local.serve.worker import Worker

    def load_worker(metrics):
        return Worker(load(path, n_threads=1, **options), n_slots, metrics.pause.observe, metrics.done)

    server = Server(Settings("tiny", key, grace=2.0), load_worker)
    server.start()
    assert server.loaded.wait(60) and server.failure is None, server.failure
    return server


def client_of(server):
    return TestClient(server.app, base_url="http://127.0.0.1:8080", raise_server_exceptions=False)


@contextlib.contextmanager
def serving(folder, *args):
    """A Served that is ready, ended afterwards."""
    one = Served(folder, *args)
    one.until_ready()
    yield one
    one.process.terminate()
    one.process.communicate(timeout=60)


class Served:
    """`sfi-local serve` as a process of its own."""

    def __init__(self, folder, *args, program=None):
        command = cli_command("serve", *args, "--port", "0") if program is None else [*program, "serve", *map(str, args), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env=cli_env(SFI_LOCAL_AUTO_DEPTH="0"), cwd=folder)
        self.line = self.process.stdout.readline().decode()
        self.url = re.match(r"http://\S+", self.line)[0]

    def get(self, path):
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def until_ready(self):
        until = time.monotonic() + 60
        while self.get("/health")[1]["status"] != "ready":
            assert time.monotonic() < until
            time.sleep(0.05)

    def connect(self):
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=30)

    def stream(self, n):
        """(a socket on which n tokens were asked for, what has come of them): the first at least."""
        one = self.connect()
        body = json.dumps({"model": "tiny", "prompt": "abc", "max_tokens": n, "stream": True, "logit_bias": {"259": -100}}).encode()
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        read = b""
        while b"data:" not in read:
            read += one.recv(4096)
        return one, read

    def end(self, sign):
        self.process.send_signal(sign)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err.decode()


def named_events(response):
    """The events of a stream whose events are named as their data's type."""
    out = []
    for block in filter(None, response.text.split("\n\n")):
        name, data = block.split("\n")
        out.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {out[-1]['type']}"
    return out
