"""What a request may ask for. Unknown parameters are ignored, as OpenAI does; known ones are checked here. Pure."""

from __future__ import annotations

from typing import Any, Literal, Sequence

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from sfi_local.fields import kinds
from sfi_local.runtime.sampling import MAX_SEED, Sampling, grammar_of_schema
from sfi_local.runtime.template import Message
from sfi_local.serve.problems import Problem

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOOLS = 128
MAX_TOP = 20             # of logprobs
MAX_BIASES = 1024
MAX_SCHEMA = 64 << 10    # characters of a JSON schema
MOST_REPEATED = 2000     # what a schema's minItems and the like may ask for
IMAGE = "(Here was a picture, a sound or a file. This model reads text only.)"

Count = Field(default=None, ge=1, le=2**31 - 1)
# our name of a sampler: that of others
_ALIASES = {"repeat_penalty": "repetition_penalty"}
_REPEATS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


class Part(BaseModel):
    """A part of a content."""

    type: str = "text"
    text: str | None = None
    refusal: str | None = None


class FunctionCall(BaseModel):
    name: str = Field(max_length=256)
    arguments: str | dict[str, Any] = ""


class ToolCall(BaseModel):
    id: str = Field(default="", max_length=256)
    type: str = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = Field(default=None, max_length=256)


class Function(BaseModel):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    name: str


class ToolChoice(BaseModel):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class Ours(BaseModel):
    """The field ``sfi`` of a request. progress: say how far the prompt was read; look: where the answer looks"""

    progress: bool = False
    look: bool = False


class Request(BaseModel):
    """What the routes that generate have in common."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Count
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-2**63, le=2**64)
    temperature: FiniteFloat | None = Field(default=None, ge=0, le=100)
    top_p: FiniteFloat | None = Field(default=None, ge=0, le=1)
    logit_bias: dict[int, FiniteFloat] | None = None
    response_format: ResponseFormat | None = None
    timeout: FiniteFloat | None = Field(default=None, gt=0)
    sfi: Ours = Ours()

    @property
    def max_new(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or any(len(text) > 1024 for text in stops):
            raise Problem(f"stop has more than {MAX_STOPS} texts, or one of more than 1024 characters.", param="stop")
        return tuple(text for text in stops if text)

    def sampling(self, choice: int = 0, schema: dict[str, Any] | None = None) -> Sampling:
        """Of the choice of this number. schema: that the answer obeys. Raises Problem, ArgumentError."""
        given: dict[str, Any] = {}
        for name in kinds(Sampling, without=("temp", "seed", "top_p")):
            value = self._extra(name)
            if value is not None:
                given[name] = _number(name, value)
        for name, value in (("temp", self.temperature), ("top_p", self.top_p)):
            if value is not None:
                given[name] = value
        if self.seed is not None:
            given["seed"] = (self.seed + choice) % (MAX_SEED + 1)
        if self.logit_bias:
            if len(self.logit_bias) > MAX_BIASES:
                raise Problem(f"logit_bias has more than {MAX_BIASES} tokens.", param="logit_bias")
            given["logit_bias"] = dict(self.logit_bias)
        schema = schema or self._schema()
        if schema is not None:
            given["json_schema"] = check_schema(schema)
        return Sampling(**given).validate()

    def _extra(self, name: str) -> Any:
        """A field that pydantic does not know, by our name or another."""
        extra = self.__pydantic_extra__ or {}
        return extra.get(name, extra.get(_ALIASES.get(name, name)))

    def _schema(self) -> dict[str, Any] | None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        schema = wanted.json_schema.schema_ if wanted.json_schema else None
        if wanted.type == "json_schema" and schema is None:
            raise Problem("response_format of type json_schema needs json_schema.schema.", param="response_format")
        return schema if wanted.type == "json_schema" else {"type": "object"}


class ChatRequest(Request):
    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Count
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def max_new(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def n_top(self) -> int | None:
        """Of logprobs; None: none are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def used_tools(self) -> list[dict[str, Any]]:
        """The tools that may be called, as a template takes them."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or []]

    @property
    def forced(self) -> tuple[bool, str | None]:
        """Whether a function must be called, and which."""
        choice = self.tool_choice
        if isinstance(choice, ToolChoice):
            if choice.function.name not in [tool.function.name for tool in self.tools or []]:
                raise Problem(f"tool_choice names {choice.function.name!r}, which is not among the tools.", param="tool_choice")
            return True, choice.function.name
        return choice == "required" and bool(self.tools), None

    @property
    def think(self) -> bool | None:
        """What reasoning_effort says; None: as the model does."""
        return None if self.reasoning_effort is None else self.reasoning_effort not in ("none", "minimal")


class CompletionRequest(Request):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
    echo: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each of them by itself."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            return list(prompt)  # type: ignore[arg-type]
        return [prompt]  # type: ignore[list-item]


def parsed(kind: type[BaseModel], value: dict[str, Any]) -> Any:
    """A request of a kind. Raises Problem, which names the field."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = min(error.errors(include_url=False, include_context=False, include_input=False), key=lambda one: len(one["loc"]))
        where = ".".join(str(part) for part in first["loc"][:6])
        raise Problem(f"{where or 'The request'}: {first['msg']}.", param=where or None) from None
    except (OverflowError, RecursionError, ValueError) as error:
        raise Problem(f"The request cannot be read: {error}.") from None


def messages_of(request: ChatRequest) -> list[Message]:
    """As a chat template takes them."""
    return [_message(m) for m in request.messages]


def _message(m: ChatMessage) -> Message:
    extra: dict[str, Any] = {}
    if m.tool_calls:
        extra["tool_calls"] = [{"id": call.id, "type": "function",
                                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)}} for call in m.tool_calls]
    for name in ("tool_call_id", "name"):
        if getattr(m, name):
            extra[name] = getattr(m, name)
    role = {"developer": "system", "function": "tool"}.get(m.role, m.role)
    text = content_text(m.content)
    return Message(role, [text] if text else [], m.reasoning_content or "", extra)


def content_text(content: str | Sequence[Part] | None) -> str:
    """The text of a content; for what is no text, a sentence that says so."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text if part.text is not None else part.refusal if part.refusal is not None else IMAGE for part in content)


def _arguments(arguments: str | dict[str, Any]) -> Any:
    """Templates take an object; what is none stays text."""
    import json

    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments


def _number(name: str, value: Any) -> Any:
    kind = kinds(Sampling)[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Problem(f"{name} is no number.", param=name)
    if abs(value) > 1e18:
        raise Problem(f"{name} is out of range.", param=name)
    return int(value) if kind is int and value == int(value) else value


def check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse a schema whose grammar would be endless, or that has none. Raises Problem, ArgumentError."""
    import json

    if len(json.dumps(schema)) > MAX_SCHEMA:
        raise Problem(f"The JSON schema has more than {MAX_SCHEMA} characters.", param="response_format")
    _check_repeats(schema)
    grammar_of_schema(schema)
    return schema


def _check_repeats(value: Any) -> None:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_repeats(inner)
    if isinstance(value, dict):
        for name in _REPEATS:
            if isinstance(value.get(name), (int, float)) and value[name] > MOST_REPEATED:
                raise Problem(f"The JSON schema has {name} {value[name]}: at most {MOST_REPEATED} is possible.", param="response_format")
        pattern = value.get("pattern")
        if isinstance(pattern, str) and len(pattern) > 512:
            raise Problem("The JSON schema has a pattern of more than 512 characters.", param="response_format")
