"""/v1/messages: blocks, events in their order, calls and what they gave, and refusals in that API's shape."""

import json

import pytest
from support.serving import named_events

ASK = [{"role": "user", "content": "The quick brown fox."}]
TOOL = {"name": "look_up", "input_schema": {"type": "object", "properties": {"day": {"type": "integer"}}, "required": ["day"], "additionalProperties": False}}


def message(client, status=200, **fields):
    response = client.post("/v1/messages", json={"model": "tiny", "messages": ASK, "max_tokens": 12, "seed": 1, **fields})
    assert response.status_code == status, response.text
    return response


def test_a_message_has_blocks_a_reason_and_usage(client):
    found = message(client).json()
    assert found["type"] == "message" and found["role"] == "assistant" and found["id"].startswith("msg_") and found["model"] == "tiny"
    assert found["content"][0]["type"] == "text" and found["content"][0]["text"]
    assert found["stop_reason"] == "max_tokens" and found["stop_sequence"] is None and found["usage"]["output_tokens"] == 12
    again = message(client).json()["usage"]
    assert again["cache_read_input_tokens"] > 0 and again["input_tokens"] + again["cache_read_input_tokens"] == sum(
        found["usage"][name] for name in ("input_tokens", "cache_read_input_tokens"))


def test_events_come_in_order_and_make_the_message(client):
    found = named_events(message(client, stream=True))
    assert [one["type"] for one in found[:2]] == ["message_start", "content_block_start"]
    assert [one["type"] for one in found[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(one["delta"]["text"] for one in found if one["type"] == "content_block_delta")
    assert text == message(client).json()["content"][0]["text"] and found[0]["message"]["content"] == []
    assert found[-2]["delta"]["stop_reason"] == "max_tokens" and found[-2]["usage"]["output_tokens"] == 12


def test_a_stop_sequence_is_named(client):
    text = message(client, temperature=0).json()["content"][0]["text"]
    found = message(client, temperature=0, stop_sequences=["\x00\x00", text[3:5]]).json()
    assert found["stop_reason"] == "stop_sequence" and found["stop_sequence"] == text[3:5]
    assert found["content"][0]["text"] == text[:text.index(text[3:5])]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "look_up"}])
def test_a_call_comes_whole_and_in_pieces(client, choice):
    fields = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 200, "logit_bias": {"125": 6}}
    found = message(client, **fields).json()
    call = found["content"][-1]
    assert found["stop_reason"] == "tool_use" and call["type"] == "tool_use" and call["name"] == "look_up" and isinstance(call["input"]["day"], int)
    deltas = [one["delta"]["partial_json"] for one in named_events(message(client, stream=True, **fields)) if one["type"] == "content_block_delta"]
    assert len(deltas) > 2 and json.loads("".join(deltas)) == call["input"]


def test_blocks_reach_the_prompt(client):
    def count(messages, **fields):
        return client.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": messages, **fields}).json()["input_tokens"]
    history = [*ASK, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "I look."},
                                                       {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {"day": 3}}]},
               {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Wednesday"}]},
                                            {"type": "text", "text": "And?"}, {"type": "image", "source": {"type": "base64", "data": "AAAA"}}]}]
    plain = count(ASK)
    assert plain < count(ASK, system=[{"type": "text", "text": "Be brief."}]) < count(history)
    assert message(client, messages=history, tools=[TOOL]).json()["content"]
    usage = message(client).json()["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == plain


@pytest.mark.parametrize("fields, status, kind", [
    ({"max_tokens": None}, 400, "invalid_request_error"), ({"model": "other"}, 404, "not_found_error"), ({"messages": []}, 400, "invalid_request_error"),
    ({"messages": [{"role": "king", "content": ""}]}, 400, "invalid_request_error"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400, "invalid_request_error"),
    ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error"), ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "invalid_request_error")])
def test_a_refusal_has_the_shape_of_this_api(client, fields, status, kind):
    error = message(client, status, **fields).json()
    assert set(error) == {"type", "error"} and error["type"] == "error" and error["error"]["type"] == kind and error["error"]["message"]
