"""Calls found in what models write, however it is cut. Pure."""

import json
import random

import pytest

from sfi_local.runtime.template import Message
from sfi_local.serve.tools import Call, Calls, NoCalls, Text, schema_of_call, told

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("add", "look_up")]
NAMES = ["add", "look_up"]


def found(text, sizes, source="<tool_call>", bound=False):
    """(answer, [(name, arguments)]) of a text that comes in pieces of these sizes."""
    stream, answer, calls, at = Calls(NAMES, source, bound), "", [], 0
    items = []
    while at < len(text):
        n = next(sizes)
        items += stream.push(text[at:at + n])
        at += n
    for item in [*items, *stream.finish()]:
        if isinstance(item, Text):
            answer += item.text
        else:
            assert isinstance(item, Call)
            if item.name:
                calls.append([item.name, ""])
            calls[item.index][1] += item.arguments
    return answer, [tuple(call) for call in calls]


def cuts(seed):
    rng = random.Random(seed)
    while True:
        yield rng.randint(1, 9)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("text, answer, calls, source", [
    ("Hello, {world}.", "Hello, {world}.", [], "<tool_call>"),
    ('{"a": 1} is JSON', '{"a": 1} is JSON', [], "<tool_call>"),
    ('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "}\\""}}\n</tool_call>', "", [("add", '{"a": 1, "b": "}\\""}')], "<tool_call>"),
    ('I look.\n<tool_call>{"name": "look_up", "arguments": {}}</tool_call>\n<tool_call>{"name": "add", "arguments": {"a": [1, {}]}}</tool_call>',
     "I look.", [("look_up", "{}"), ("add", '{"a": [1, {}]}')], "<tool_call>"),
    ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", '{"a": 1}')], "<tool_call>"),
    ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', '<tool_call>{"name": "other", "arguments": {}}', [], "<tool_call>"),
    ("a < b and <tool_", "a < b and <tool_", [], "<tool_call>"),
    ('{"name": "add", "parameters": {"a": 2}}', "", [("add", '{"a": 2}')], ""),
    ('[TOOL_CALLS][{"name": "add", "arguments": {"a": 2}}, {"name": "look_up", "arguments": {}}]', "",
     [("add", '{"a": 2}'), ("look_up", "{}")], "[TOOL_CALLS]"),
    ('<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')], "<tool_call>"),
    ('```json\n{\n  "name": "add",\n  "arguments": {"a": 1}\n}\n```', "", [("add", '{"a": 1}')], "<tool_call>"),
    ('```\n{"name": "add", "arguments": {"a": 1}}\n```\n```json\n{"name": "look_up", "arguments": {}}', "",
     [("add", '{"a": 1}'), ("look_up", "{}")], "<tool_call>"),
    ('```json\n{"name": "add", "arguments": {}}``', "", [("add", "{}")], ""),
    ('```json\n{"name": "add", "arguments": {}}\n```\nThat is it.', "\nThat is it.", [("add", "{}")], ""),
    ('```json\n{"name": "other", "arguments": {}}\n```', '```json\n{"name": "other", "arguments": {}}\n```', [], ""),
    ('```json\n{"a": 1', '```json\n{"a": 1', [], ""),
    ("```python\n{}\n```", "```python\n{}\n```", [], "<tool_call>"),
    ("```", "```", [], "<tool_call>"),
    ("<tool_call>no JSON", "<tool_call>no JSON", [], "<tool_call>")])
def test_calls_are_told_from_the_answer(text, answer, calls, source, seed):
    assert found(text, cuts(seed), source) == (answer, calls)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_bound_is_a_call_alone(seed):
    assert found('{ "name": "add", "arguments": {"a": 1} }', cuts(seed), bound=True) == ("", [("add", '{"a": 1}')])


def test_an_object_without_end_is_let_go():
    stream = Calls(NAMES)
    out = [item for _ in range(3000) for item in stream.push('{"a": "bcd')]
    assert sum(len(item.text) for item in out) > 20_000


def test_without_tools_all_text_is_the_answer():
    assert list(NoCalls().push("<tool_call>")) == [Text("<tool_call>")] and list(NoCalls().finish()) == []


def test_a_template_without_tools_is_told_in_words():
    messages = told([Message("user", ["?"]), Message("assistant", [], extra={"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}),
                     Message("tool", ["3"], extra={"tool_call_id": "x"})], TOOLS)
    assert [m.role for m in messages] == ["system", "user", "assistant", "user"] and all(not m.extra for m in messages)
    assert '"look_up"' in messages[0].parts[0] and '<tool_call>\n{"name": "add"' in messages[2].parts[0]
    assert told([Message("system", ["Be brief."]), Message("user", ["?"])], TOOLS)[0].parts[0] == "Be brief."


def test_the_schema_of_a_call_is_that_of_its_function():
    both, one = schema_of_call(TOOLS, None), schema_of_call(TOOLS, "add")
    assert len(both["anyOf"]) == 2 and one["anyOf"][0]["properties"]["name"] == {"const": "add"}
    json.dumps(both)
