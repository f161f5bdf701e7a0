"""Requests that are nearly right, at random: each is answered or refused in words, none is a fault of the server."""

import copy
import json
import random

import pytest

CHAT = {"model": "tiny", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                                      {"role": "assistant", "content": None, "tool_calls": [
                                          {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                                      {"role": "tool", "tool_call_id": "c", "content": "4"}],
        "max_tokens": 3, "n": 1, "stream": False, "stream_options": {"include_usage": True}, "temperature": 1, "top_p": 0.9, "top_k": 5, "seed": 1,
        "stop": ["x"], "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"65": 1}, "logprobs": True, "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {
            "type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}, "required": ["a"]}}},
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}],
        "tool_choice": "auto", "reasoning_effort": "low", "chat_template_kwargs": {"a": 1}, "timeout": 20, "sfi": {"look": True, "progress": True},
        "dry": 0.5, "xtc_probability": 0.1, "mirostat": 2}
COMPLETION = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 2, "logprobs": 1, "echo": True, "n": 1, "stream": False}
RESPONSE = {"model": "tiny", "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
                                       {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                                       {"type": "function_call_output", "call_id": "c", "output": "4"}],
            "instructions": "Be brief.", "max_output_tokens": 3, "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
            "tool_choice": "auto", "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"}, "stream": False, "metadata": {"a": "b"}}
MESSAGE = {"model": "tiny", "max_tokens": 3, "system": [{"type": "text", "text": "Be brief."}], "stop_sequences": ["x"], "stream": False,
           "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
                        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "4"}]}],
           "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}}
ROUTES = {"/v1/messages": MESSAGE, "/v1/chat/completions": CHAT, "/v1/completions": COMPLETION, "/v1/responses": RESPONSE, "/tokenize": {"content": "abc"},
          "/detokenize": {"tokens": [65, 66]}, "/v1/embeddings": {"input": "x"}}
ODD = [None, True, 0, -1, 1, 2**31, -2**63, 2**70, 1e308, -0.0, 0.5, "", "x", "0", "\0", "\ud800", "\u202e{{ 7*7 }}", "<|im_end|>", "é" * 300, [], [[]],
       [None], [[1], [2]], [259], {}, {"a": {"b": [1]}}, {"type": "text"}, {"$ref": "#"}, {"type": ["string", "null"]}, {"anyOf": []}]


def places(value, path=()):
    """Every place within a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def spoiled(rng, value):
    """The same with one to three things changed, left out or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([path for path in places(value) if path])
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        what = rng.random()
        if what < 0.15:
            del parent[path[-1]]
        elif what < 0.25 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(ODD))
        if not value:
            break
    if "max_tokens" not in value or value["max_tokens"] != 3:  # no long answers
        value.setdefault("max_output_tokens" if "input" in value else "max_tokens", 2)
    return value


@pytest.mark.parametrize("seed", range(4))
def test_nearly_right_requests_are_answered_or_refused(client, seed):
    rng, statuses = random.Random(seed), []
    for _ in range(60):
        route = rng.choice([*ROUTES, *list(ROUTES)[:4] * 3])
        body = spoiled(rng, ROUTES[route])
        for name in ("max_tokens", "max_output_tokens", "max_completion_tokens", "n"):
            if isinstance(body.get(name), int) and body[name] > 4 and body[name] < 2**31:
                body[name] = 4
        if body.get("timeout", 1) is None or "timeout" not in body:
            body["timeout"] = 5
        response = client.post(route, content=json.dumps(body))
        statuses.append(response.status_code)
        assert response.status_code < 500, (route, body, response.text)
        if response.status_code >= 400:
            assert response.json()["error"]["message"], (route, body)
    assert 200 in statuses and 400 in statuses
    assert client.get("/health").json() == {"status": "ready"}


@pytest.mark.parametrize("seed", range(2))
def test_bytes_that_are_no_requests_are_refused(client, seed):
    rng = random.Random(seed)
    whole = json.dumps(CHAT).encode()
    for _ in range(60):
        body = bytearray(whole)
        for _ in range(rng.randint(1, 20)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        response = client.post("/v1/chat/completions", content=bytes(body[:rng.randint(1, len(body))]))
        assert 400 <= response.status_code < 500 or response.status_code == 200, response.text
