"""Servers with the tiny model: one in this process for the tests of a file, and the command for programs that need an address."""

import pytest
from support.serving import client_of, make_server, serving


@pytest.fixture(scope="module")
def server(tiny):
    one = make_server(tiny, mode="sfi", n_ctx=2048)
    yield one
    one.stop()


@pytest.fixture
def client(server):
    return client_of(server)


@pytest.fixture(scope="session")
def served(tiny, tmp_path_factory):
    """`sfi-local serve`, with the key k."""
    with serving(tmp_path_factory.mktemp("served"), tiny, "--ctx", 4096, "--threads", 1, "--api-key", "k", "--name", "tiny", "--quiet") as one:
        yield one
