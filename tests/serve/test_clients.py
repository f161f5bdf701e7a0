"""The official clients, where they are installed."""

import pytest

openai = pytest.importorskip("openai", reason="the official client is not installed: pip install openai")
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {
    "type": "object", "properties": {"day": {"type": "integer"}}, "required": ["day"], "additionalProperties": False}}}


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="k")


def ask(client, **fields):
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=40, seed=1, **fields)


def test_chats_streams_and_calls(client):
    answer = ask(client)
    assert answer.usage.completion_tokens > 0 and answer.choices[0].finish_reason in ("stop", "length")
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    call = ask(client, tools=[TOOL], tool_choice="required", logit_bias={"125": 6}).choices[0].message.tool_calls[0]
    assert call.function.name == "look_up"
    assert client.models.list().data[0].id == "tiny"


def test_responses(client):
    response = client.responses.create(model="tiny", input="Hello", max_output_tokens=10)
    assert response.output_text and response.usage.output_tokens > 0
    events = list(client.responses.create(model="tiny", input="Hello", max_output_tokens=10, stream=True))
    assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete")


def test_errors_are_the_client_s_own(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 9000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="tiny", input="x")


def test_anthropic_s_client(served):
    anthropic = pytest.importorskip("anthropic", reason="Anthropic's client is not installed: pip install anthropic")
    messages = anthropic.Anthropic(base_url=served.url, api_key="k", max_retries=0).messages
    ask = {"model": "tiny", "max_tokens": 40, "messages": [{"role": "user", "content": "Hello"}]}
    assert messages.create(**ask).usage.output_tokens > 0 and messages.count_tokens(model="tiny", messages=ask["messages"]).input_tokens > 5
    with messages.stream(**ask, extra_body={"seed": 1}) as stream:
        text = "".join(stream.text_stream)
    assert stream.get_final_message().content[0].text == text
    tool = {"name": "look_up", "input_schema": TOOL["function"]["parameters"]}
    called = messages.create(**{**ask, "max_tokens": 200}, tools=[tool], tool_choice={"type": "any"}, extra_body={"logit_bias": {"125": 6}})
    assert called.stop_reason == "tool_use" and isinstance(called.content[-1].input["day"], int)
    with pytest.raises(anthropic.NotFoundError, match="gpt-9"):
        messages.create(**{**ask, "model": "gpt-9"})
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=served.url, api_key="wrong").messages.create(**ask)
