"""The OpenAI API as a client sees it: shapes, streams, usage, samplers, and refusals that are error objects."""

import json
import threading

import pytest

MESSAGES = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog."}]
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {
    "type": "object", "properties": {"day": {"type": "integer"}}, "required": ["day"], "additionalProperties": False}}}


def chat(client, **fields):
    response = client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": 3, **fields})
    assert response.status_code == 200, response.text
    return response


def chunks(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def problem(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith((".", "?"))
    return error


def test_a_chat_has_the_shape_and_the_usage_of_openai(client):
    answer = chat(client).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-") and answer["model"] == "tiny"
    choice, usage = answer["choices"][0], answer["usage"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
    assert usage["completion_tokens"] == 8 and usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert sum(answer["sfi"]["steps"].values()) == 7 and answer["sfi"]["mode"] == "sfi"


def test_a_stream_gives_the_same_text_and_ends_with_usage(client):
    whole = chat(client).json()
    found = chunks(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in found if c["choices"]) == whole["choices"][0]["message"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in found if c["choices"]][-1] == "length"
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 8
    assert all("usage" not in c for c in chunks(chat(client, stream=True)))


def test_the_second_request_reads_only_what_is_new(client):
    text = "One two three four five. " * 20
    first = chat(client, messages=[{"role": "user", "content": text}], max_tokens=30).json()
    history = [{"role": "user", "content": text}, {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
               {"role": "user", "content": "And?"}]
    second = chat(client, messages=history).json()["usage"]
    # the answer's own tokens were kept, though its text, with U+FFFD in it, has others
    assert second["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["total_tokens"] - 1
    others = chat(client, messages=[{"role": "user", "content": text + "!"}, *history[1:]]).json()["usage"]
    assert others["prompt_tokens_details"]["cached_tokens"] < first["usage"]["prompt_tokens"]  # no answer passes to another conversation


def test_choices_stop_seed_and_logprobs(client):
    answer = chat(client, n=2, logprobs=True, top_logprobs=3).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    first = answer["choices"][0]["logprobs"]["content"]
    assert len(first) == 8 and all(len(one["top_logprobs"]) == 3 and one["logprob"] <= 0 for one in first)
    assert chat(client).json()["choices"][0]["message"] == answer["choices"][0]["message"]
    assert answer["usage"]["completion_tokens"] == 16
    text = client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 20, "temperature": 0}).json()["choices"][0]["text"]
    stopped = client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 20, "temperature": 0, "stop": text[5]}).json()["choices"][0]
    assert stopped["text"] == text[:text.index(text[5])] and stopped["finish_reason"] == "stop"


def test_logit_bias_and_our_samplers_reach_the_sampler(client):
    def text(**fields):
        return client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0, **fields}).json()["choices"][0]["text"]
    assert text(logit_bias={"81": 100}) == "QQQQ"
    assert text(repeat_penalty=50, logit_bias={"81": 20}) != "QQQQ"
    assert text(top_k=1) == text()


@pytest.mark.parametrize("format, parse", [
    ({"type": "json_object"}, dict),
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"enum": ["yes", "no"]}},
                                                                     "required": ["a"], "additionalProperties": False}}}, None)])
def test_an_answer_obeys_a_format(client, format, parse):
    choice = chat(client, response_format=format, max_tokens=400, logit_bias={"125": 8, "34": 2}).json()["choices"][0]
    if choice["finish_reason"] == "length":  # a random model may write an object without end
        assert parse is dict and choice["message"]["content"].lstrip().startswith("{")
        return
    value = json.loads(choice["message"]["content"])
    assert isinstance(value, dict) and (parse is dict or value["a"] in ("yes", "no"))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_call_that_must_come_comes_whole_and_in_pieces(client, choice):
    fields = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 200, "logit_bias": {"125": 6}}
    whole = chat(client, **fields).json()["choices"][0]
    call = whole["message"]["tool_calls"][0]
    assert whole["finish_reason"] == "tool_calls" and call["function"]["name"] == "look_up" and call["id"]
    assert isinstance(json.loads(call["function"]["arguments"])["day"], int)
    deltas = [c["choices"][0]["delta"].get("tool_calls") for c in chunks(chat(client, stream=True, **fields))]
    pieces = [delta[0] for delta in deltas if delta]
    assert pieces[0]["function"]["name"] == "look_up" and len(pieces) > 3
    assert isinstance(json.loads("".join(piece["function"]["arguments"] for piece in pieces))["day"], int)


def test_tools_that_may_come_and_their_results_reach_the_prompt(client):
    plain = chat(client).json()["usage"]["prompt_tokens"]
    told = chat(client, tools=[TOOL]).json()["usage"]["prompt_tokens"]
    history = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"day": 3}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Wednesday"}]
    after = chat(client, messages=history, tools=[TOOL]).json()["usage"]["prompt_tokens"]
    assert plain + 100 < told < after and chat(client, tools=[TOOL], tool_choice="none").json()["usage"]["prompt_tokens"] == plain


def test_a_prompt_that_is_too_long_names_both_numbers(client):
    error = problem(client.post("/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "x" * 5000}]}), 400)
    assert error["code"] == "context_length_exceeded" and "2048" in error["message"] and "50" in error["message"]


def test_an_unknown_model_is_404_and_an_unknown_parameter_nothing(client):
    assert problem(client.post("/v1/chat/completions", json={"model": "gpt-9", "messages": MESSAGES}), 404)["code"] == "model_not_found"
    assert problem(client.get("/v1/models/gpt-9"), 404)["param"] == "model"
    assert problem(client.post("/v1/chat/completions", json={"messages": MESSAGES}), 400)["param"] == "model"
    chat(client, wibble={"a": 1}, store=True, user="x", service_tier="auto", metadata={})
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny" == client.get("/v1/models/tiny").json()["id"]


@pytest.mark.parametrize("fields, param", [
    ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"n": 10**9}, "n"), ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "king", "content": ""}]}, "messages.0.role"), ({"stop": ["x"] * 99}, "stop"),
    ({"top_logprobs": 99}, "top_logprobs"), ({"response_format": {"type": "yaml"}}, "response_format.type"), ({"top_k": "many"}, "top_k"),
    ({"response_format": {"type": "json_schema"}}, "response_format"), ({"stop": "\ud800"}, "stop"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice")])
def test_a_wrong_parameter_is_named(client, fields, param):
    content = json.dumps({"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **fields})  # \ud800 as an escape
    assert problem(client.post("/v1/chat/completions", content=content), 400)["param"] == param


@pytest.mark.parametrize("schema", [{"type": "string", "minLength": 10**9}, {"$ref": "file:///etc/passwd"}, {"type": "object", "x": "y" * 100_000},
                                    {"$ref": "https://127.0.0.1:1/x.json"}, {"type": "no such type"}, {"pattern": "(" * 400, "type": "string"}])
def test_a_schema_that_cannot_be_obeyed_is_refused(client, schema):
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    problem(client.post("/v1/chat/completions", json=body), 400)


@pytest.mark.parametrize("body, status", [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"\xff\xfe{}", 400), (b'{"messages":' + b"[" * 100_000, 400), (b'{"temperature": NaN}', 400),
    (b'{"x":' * 100 + b"1" + b"}" * 100, 400), (b'{"n": 1e999, "messages": []}', 400), (b'{"n": ' + b"9" * 5000 + b"}", 400),
    (b'{"x": [' + b"[],"*600_000 + b"[]]}", 413)])
def test_what_is_no_sane_json_is_refused(client, body, status):
    problem(client.post("/v1/chat/completions", content=body), status)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(client):
    problem(client.post("/v1/chat/completions", content=b"{}", headers={"content-length": str(1 << 40)}), 413)


def test_text_that_is_no_unicode_is_refused(client):
    problem(client.post("/v1/chat/completions", content=b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'), 400)


def test_a_route_or_a_method_that_there_is_not_is_an_error_object(client):
    problem(client.get("/v1/nothing"), 404)
    problem(client.get("/v1/chat/completions"), 405)


def test_tokens_and_embeddings(client):
    tokens = client.post("/tokenize", json={"content": "fox"}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json()["content"] == "fox"
    problem(client.post("/detokenize", json={"tokens": [10**9]}), 400)
    assert "embedding" in problem(client.post("/v1/embeddings", json={"input": "x"}), 400)["message"]


def test_metrics_slots_and_health(client):
    chat(client)
    text = client.get("/metrics").text
    assert 'sfi_requests_total{route="/v1/chat/completions",status="200"}' in text and "sfi_ttft_seconds_bucket" in text
    assert 'sfi_steps_total{kind="fast"}' in text and 'sfi_prompt_tokens_total{source="cached"}' in text
    slots = client.get("/slots").json()["slots"]
    assert len(slots) == 2 and all(slot["state"] == "idle" for slot in slots) and sum(slot["n_tokens"] for slot in slots) > 0
    assert client.get("/health").json() == {"status": "ready"}


def test_several_at_once_get_what_they_get_alone(server, client):
    def text(i):
        return chat(client, messages=[{"role": "user", "content": f"Number {i}. " * (5 + i)}], temperature=0, max_tokens=24).json()["choices"]
    alone, found = [text(i) for i in range(6)], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: text(i)})) for i in range(6)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert [len(found[i][0]["message"]["content"]) > 0 for i in range(6)] == [True] * 6
    assert sum(found[i] == alone[i] for i in range(6)) >= 4  # a prompt that was read in other pieces may be rounded otherwise
