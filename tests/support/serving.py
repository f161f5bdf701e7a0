"""A server in this process, and a client that asks it without a network."""

from starlette.testclient import TestClient


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
