"""A server with the tiny model, shared by the tests of a file."""

import pytest
from support.serving import client_of, make_server


@pytest.fixture(scope="module")
def server(tiny):
    one = make_server(tiny, mode="sfi", n_ctx=2048)
    yield one
    one.stop()


@pytest.fixture
def client(server):
    return client_of(server)
