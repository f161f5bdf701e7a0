"""/v1/responses: items, events in their order, calls, and what needs a store."""

import json

import pytest
from support.serving import named_events

FIELDS = {"id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id", "instructions", "output",
          "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p", "presence_penalty", "frequency_penalty",
          "top_logprobs", "temperature", "reasoning", "usage", "max_output_tokens", "max_tool_calls", "store", "background", "service_tier",
          "metadata", "safety_identifier", "prompt_cache_key"}
TOOL = {"type": "function", "name": "look_up", "parameters": {"type": "object", "properties": {"day": {"type": "integer"}}, "required": ["day"],
                                                              "additionalProperties": False}}


def respond(client, status=200, **fields):
    response = client.post("/v1/responses", json={"model": "tiny", "input": "The quick brown fox.", "max_output_tokens": 12, "seed": 1, **fields})
    assert response.status_code == status, response.text
    return response


def events(response):
    out = named_events(response)
    assert [one["sequence_number"] for one in out] == list(range(len(out)))
    return out


def test_a_response_has_all_fields_and_an_item(client):
    found = respond(client, metadata={"a": "b"}).json()
    assert set(found) >= FIELDS and found["metadata"] == {"a": "b"} and found["store"] is False
    assert found["status"] == "incomplete" and found["incomplete_details"] == {"reason": "max_output_tokens"}
    item = found["output"][0]
    assert item["type"] == "message" and item["role"] == "assistant" and item["content"][0]["type"] == "output_text"
    assert found["usage"]["output_tokens"] == 12 and "cached_tokens" in found["usage"]["input_tokens_details"]


def test_events_come_in_order_and_make_the_response(client):
    found = events(respond(client, stream=True))
    names = [one["type"] for one in found]
    assert names[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert names[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"]
    text = "".join(one["delta"] for one in found if one["type"] == "response.output_text.delta")
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == text == respond(client).json()["output"][0]["content"][0]["text"]


def test_calls_and_their_results(client):
    fields = {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 200, "logit_bias": {"125": 6}}
    call = respond(client, **fields).json()["output"][0]
    assert call["type"] == "function_call" and call["name"] == "look_up" and isinstance(json.loads(call["arguments"])["day"], int)
    found = events(respond(client, stream=True, **fields))
    done = next(one for one in found if one["type"] == "response.function_call_arguments.done")
    assert done["arguments"] == "".join(one["delta"] for one in found if one["type"] == "response.function_call_arguments.delta")
    history = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Which day?"}]}, call,
               {"type": "function_call_output", "call_id": call["call_id"], "output": "Monday"}]
    assert respond(client, input=history, tools=[TOOL]).json()["usage"]["input_tokens"] > 100


def test_the_next_request_goes_on_from_the_answer(client):
    text = "Count the days of the week. " * 10
    first = respond(client, input=text, max_output_tokens=30).json()
    history = [{"role": "user", "content": text}, first["output"][0], {"role": "user", "content": "And?"}]
    second = respond(client, input=history).json()["usage"]
    assert second["input_tokens_details"]["cached_tokens"] >= first["usage"]["total_tokens"] - 1


@pytest.mark.parametrize("fields", [{"previous_response_id": "resp_1"}, {"conversation": "c"}, {"input": []}, {"tools": [{"type": "web_search"}]},
                                    {"input": [{"type": "item_reference", "id": "x"}]}, {"max_output_tokens": 0}, {"temperature": "hot"}])
def test_what_cannot_be_had_is_refused(client, fields):
    assert respond(client, 400, **fields).json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_without_a_grammar_is_refused_before_anything_is_read(client, stream):
    """Found by requests made at random: the stream began, and failed with a code that OpenAI does not have."""
    form = {"type": "json_schema", "name": "x", "schema": {"no such word": 5}}
    assert "JSON schema cannot be used" in respond(client, 400, stream=stream, text={"format": form}).json()["error"]["message"]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": stream}
    refused = client.post("/v1/chat/completions", json={**chat, "response_format": {"type": "json_schema", "json_schema": form}})
    assert refused.status_code == 400


def test_a_stream_that_fails_says_so(client, server, monkeypatch):
    from sfi_local.errors import DecodeError

    monkeypatch.setattr(server.worker.model, "generate", lambda *_, **__: (_ for _ in ()).throw(DecodeError("It failed.")))
    last = events(respond(client, stream=True))[-1]
    assert last["type"] == "response.failed" and last["response"]["error"] == {"code": "server_error", "message": "It failed."}
    assert client.post("/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "x"}]}).status_code == 500
