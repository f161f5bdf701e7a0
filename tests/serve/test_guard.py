"""Who may ask: keys, hosts, origins; and what is logged."""

import logging

import pytest
from support.serving import client_of, make_server

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "A secret word."}], "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(tiny):
    server = make_server(tiny, mode="dense", n_ctx=512, key="s3cret")
    yield client_of(server)
    server.stop()


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3crett", "Basic s3cret", "s3cret", "Bearer s\xe9cret"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/slots", "/v1/chat/completions", "/tokenize"])
def test_without_the_key_nothing_is_told(locked, path, authorization):
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    response = locked.get(path, headers=headers)
    assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"


def test_a_key_may_come_as_anthropic_s_clients_send_it(locked):
    assert locked.get("/v1/models", headers={"x-api-key": "s3cret"}).status_code == 200
    assert locked.get("/v1/models", headers={"x-api-key": "s3cre"}).status_code == 401
    assert locked.get("/v1/models", headers={"x-api-key": "s3cret", "authorization": "Bearer wrong"}).status_code == 401
    error = locked.post("/v1/messages", headers={"x-api-key": "wrong"}).json()
    assert error["type"] == "error" and error["error"]["type"] == "authentication_error"


def test_with_the_key_any_host_is_answered(locked):
    headers = {"authorization": "bearer s3cret", "host": "box.example:8080"}
    assert locked.get("/v1/models", headers=headers).status_code == 200
    assert locked.get("/health", headers={"host": "box.example"}).status_code == 200
    assert locked.get("/", headers={"host": "box.example"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "", "[::1", "192.168.0.7:8080"])
def test_without_a_key_another_name_of_this_machine_is_refused(client, host):
    assert client.get("/v1/models", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1", "[::1]:8080", "LOCALHOST:1"])
def test_names_of_this_machine_are_answered(client, host):
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1:8080.evil.example"])
def test_other_pages_are_refused_and_nobody_is_told_that_they_may(client, origin):
    response = client.post("/v1/chat/completions", json=ASK, headers={"origin": origin})
    assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
    assert client.options("/v1/chat/completions", headers={"origin": origin}).status_code in (403, 405)


def test_our_own_page_may_ask(client):
    response = client.post("/v1/chat/completions", json=ASK, headers={"origin": "http://127.0.0.1:8080"})
    assert response.status_code == 200 and "access-control-allow-origin" not in response.headers


def test_the_log_has_no_prompt_and_no_key(client, caplog):
    with caplog.at_level(logging.DEBUG):
        client.post("/v1/chat/completions?word=hidden", json=ASK)
        client.get("/nothing/hidden")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("sfi_local")]
    assert any("/v1/chat/completions 200" in line for line in ours)
    assert not any("secret" in line or "hidden" in line for line in ours)


def test_an_address_that_is_too_long_is_refused(client):
    assert client.get("/" + "x" * 5000).status_code == 414


def test_headers_of_two_minds_are_refused(client):
    assert client.get("/v1/models", headers=[("host", "127.0.0.1"), ("host", "localhost")]).status_code == 400
