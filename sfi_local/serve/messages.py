"""/v1/messages: the same answers in the shape of Anthropic's API."""

from __future__ import annotations

import json
from typing import Any, AsyncIterator, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from sfi_local.serve.asking import Answering, Piece
from sfi_local.serve.chat import Ended, new_id, ours
from sfi_local.serve.http import event
from sfi_local.serve.problems import Problem, as_error_event, problem_of
from sfi_local.serve.requests import IMAGE, MAX_TOOLS, Ours

MAX_BLOCKS = 10_000
_SAME = ("model", "temperature", "top_p", "stream", "timeout", "max_tokens")  # fields of a request that a chat request has too
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class Block(BaseModel):
    """A part of a message, of any type; the fields that its type lacks are None."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str = Field(default="", max_length=256)
    name: str = Field(default="", max_length=256)
    input: dict[str, Any] | None = None
    tool_use_id: str = Field(default="", max_length=256)
    content: str | list["Block"] | None = None
    source: dict[str, Any] | None = None

    @property
    def as_text(self) -> str:
        """Its text; for what is none, a sentence that says so."""
        if self.text is not None:
            return self.text
        data = self.source.get("data") if self.source and self.source.get("type") == "text" else None
        return data if isinstance(data, str) else IMAGE


class Turn(BaseModel):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block] = Field(max_length=1 << 25)


class ToolUse(BaseModel):
    type: str | None = None
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class Choice(BaseModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class Thinking(BaseModel):
    type: str


class MessagesRequest(BaseModel):
    """A request for a message."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    max_tokens: int = Field(ge=1, le=2**31 - 1)
    messages: list[Turn] = Field(min_length=1, max_length=MAX_BLOCKS)
    system: str | list[Block] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: FiniteFloat | None = Field(default=None, ge=0, le=100)
    top_p: FiniteFloat | None = Field(default=None, ge=0, le=1)
    tools: list[ToolUse] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    timeout: FiniteFloat | None = Field(default=None, gt=0)
    sfi: Ours = Ours()

    def as_chat(self) -> dict[str, Any]:
        """The chat request that means the same. Raises Problem."""
        extra = {name: value for name, value in (self.__pydantic_extra__ or {}).items() if name not in ("n", "logprobs", "stop", "response_format")}
        same = {name: getattr(self, name) for name in _SAME if getattr(self, name) is not None}
        out: dict[str, Any] = {**extra, **same, "messages": self._messages(), "sfi": self.sfi.model_dump()}
        if self.stop_sequences:
            out["stop"] = self.stop_sequences
        if self.tools:
            out["tools"] = [self._tool(tool) for tool in self.tools]
        if self.tool_choice:
            out["tool_choice"] = self._choice(self.tool_choice)
        if self.thinking:
            out["reasoning_effort"] = "none" if self.thinking.type == "disabled" else "medium"
        return out

    @staticmethod
    def _tool(tool: ToolUse) -> dict[str, Any]:
        if tool.type not in (None, "custom"):
            raise Problem(f"A tool of type {tool.type[:100]!r} cannot be had here: those with an input_schema can.", param="tools")
        return {"type": "function", "function": {"name": tool.name, "parameters": tool.input_schema or {"type": "object"},
                                                 **({"description": tool.description} if tool.description else {})}}

    @staticmethod
    def _choice(choice: Choice) -> Any:
        if choice.type != "tool":
            return _CHOICES[choice.type]
        if not choice.name:
            raise Problem("tool_choice of type tool needs a name.", param="tool_choice")
        return {"type": "function", "function": {"name": choice.name}}

    def _messages(self) -> list[dict[str, Any]]:
        system = "\n".join(_texts(self.system)) if self.system else ""
        out: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for turn in self.messages:
            out += _of_turn(turn)
        return out


def _texts(content: str | list[Block] | None) -> list[str]:
    return [content or ""] if content is None or isinstance(content, str) else [block.as_text for block in content]


def _of_turn(turn: Turn) -> list[dict[str, Any]]:
    """What tools gave comes first, each a message of its own, then the text with thoughts and calls."""
    blocks = [Block(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
    out: list[dict[str, Any]] = [{"role": "tool", "tool_call_id": block.tool_use_id, "content": "\n".join(_texts(block.content))}
                                 for block in blocks if block.type == "tool_result"]
    thought = "".join(block.thinking or "" for block in blocks if block.type == "thinking")
    calls = [{"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input or {})}}
             for block in blocks if block.type == "tool_use"]
    text = "\n".join(block.as_text for block in blocks if block.type not in ("tool_result", "tool_use", "thinking", "redacted_thinking"))
    if text or calls or not out:
        out.append({"role": turn.role, "content": text, **({"tool_calls": calls} if calls else {}),
                    **({"reasoning_content": thought} if thought else {})})
    return out


class MessageShape:
    """One message, whole or as events."""

    def __init__(self, model: str):
        self._blocks: list[dict[str, Any]] = []
        self._arguments = ""  # of the last block, where it is a call
        self._fields = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model, "container": None, "stop_details": None}

    async def whole(self, answer: Answering, ended: Ended) -> dict[str, Any]:
        """The message, when it is whole."""
        async for _ in self._events(answer, ended):
            pass
        return self._message(self._blocks, _stop(answer), _usage(answer), sfi=ours(answer.usage))

    async def stream(self, answer: Answering, ended: Ended) -> AsyncIterator[bytes]:
        """Server-sent events; the last one is that of its end."""
        yield _event("message_start", message=self._message([], {"stop_reason": None, "stop_sequence": None}, _usage(answer)))
        try:
            async for one in self._events(answer, ended):
                yield one
            yield _event("message_delta", delta=_stop(answer), usage=_usage(answer), sfi=ours(answer.usage))
            yield _event("message_stop")
        except Exception as error:
            yield event(as_error_event(problem_of(error)), "error")

    def _message(self, content: list[dict[str, Any]], stop: dict[str, Any], usage: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {**self._fields, "content": content, **stop, "usage": usage, **more}

    async def _events(self, answer: Answering, ended: Ended) -> AsyncIterator[bytes]:
        text = ""
        async for piece in answer:
            text += piece.text
            for one in self._of_piece(piece):
                yield one
        ended(answer, text)
        if not self._blocks:
            for one in self._open("text", text="", citations=None):
                yield one
        for one in self._close():
            yield one

    def _of_piece(self, piece: Piece) -> list[bytes]:
        out: list[bytes] = []
        if piece.thought:
            out += self._grow("thinking", "thinking", "thinking_delta", piece.thought, signature="")
        if piece.text:
            out += self._grow("text", "text", "text_delta", piece.text, citations=None)
        for call in piece.calls:
            if call.name:
                out += self._open("tool_use", id=new_id("toolu_"), name=call.name, input={}, caller={"type": "direct"})
            if call.arguments:
                self._arguments += call.arguments
                out.append(self._delta("input_json_delta", partial_json=call.arguments))
        return out

    def _grow(self, kind: str, field: str, delta: str, text: str, **more: Any) -> list[bytes]:
        """More text for the last block, if it is of the kind, else for a new one."""
        out = [] if self._blocks and self._blocks[-1]["type"] == kind else self._open(kind, **{field: "", **more})
        self._blocks[-1][field] += text
        return [*out, self._delta(delta, **{field: text})]

    def _open(self, kind: str, **fields: Any) -> list[bytes]:
        out = self._close()
        self._blocks.append({"type": kind, **fields})
        return [*out, _event("content_block_start", index=len(self._blocks) - 1, content_block=dict(self._blocks[-1]))]

    def _close(self) -> list[bytes]:
        """End the last block."""
        if not self._blocks:
            return []
        if self._blocks[-1]["type"] == "tool_use":
            self._blocks[-1]["input"], self._arguments = _object(self._arguments), ""
        return [_event("content_block_stop", index=len(self._blocks) - 1)]

    def _delta(self, kind: str, **fields: Any) -> bytes:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta={"type": kind, **fields})


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)


def _object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; {} where they are cut off."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _stop(answer: Answering) -> dict[str, Any]:
    if answer.stopped_by is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stopped_by}
    return {"stop_reason": _REASONS.get(answer.finish, "end_turn"), "stop_sequence": None}


def _usage(answer: Answering) -> dict[str, Any]:
    """Tokens that were read are told apart from those that were held or kept; what there is none of here is None."""
    usage = answer.usage
    return {"input_tokens": usage.n_prompt - usage.n_cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": usage.n_cached,
            "output_tokens": usage.n_drawn, "output_tokens_details": {"thinking_tokens": answer.n_thought}, "cache_creation": None,
            "inference_geo": None, "server_tool_use": None, "service_tier": "standard"}
