"""/v1/responses: the same answers in the shape of OpenAI's newer API. Nothing is stored: each request brings its whole conversation."""

from __future__ import annotations

import time
from typing import Any, AsyncIterator, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from sfi_local.serve.asking import Answering, Piece
from sfi_local.serve.chat import Ended, new_id, ours
from sfi_local.serve.http import event
from sfi_local.serve.problems import Problem, problem_of
from sfi_local.serve.requests import MAX_TOOLS, MAX_TOP, Count, Ours, Part

# field of a request: that of a chat request that means the same
_SAME = {"model": "model", "temperature": "temperature", "top_p": "top_p", "max_output_tokens": "max_completion_tokens", "seed": "seed",
         "top_logprobs": "top_logprobs", "timeout": "timeout", "stream": "stream"}
# fields that a response repeats, and what they are where nothing was said
_REPEATED = {"instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {}, "parallel_tool_calls": True,
             "presence_penalty": 0.0, "frequency_penalty": 0.0, "prompt_cache_key": "", "safety_identifier": "", "service_tier": "default",
             "temperature": 1.0, "top_p": 1.0, "top_logprobs": 0, "truncation": "disabled"}


class Item(BaseModel):
    """A message, a call of a function, or what it gave."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: str = Field(default="", max_length=256)
    name: str = Field(default="", max_length=256)
    arguments: str = ""
    output: str | list[Part] | None = None


class FlatTool(BaseModel):
    type: str
    name: str = Field(default="", max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class NamedTool(BaseModel):
    type: Literal["function"]
    name: str


class Reasoning(BaseModel):
    effort: str | None = None
    summary: str | None = None


class TextFormat(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(BaseModel):
    format: TextFormat | None = None


class ResponsesRequest(BaseModel):
    """A request for a response."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    input: str | list[Item] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Count
    temperature: FiniteFloat | None = Field(default=None, ge=0, le=100)
    top_p: FiniteFloat | None = Field(default=None, ge=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
    tools: list[FlatTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    sfi: Ours = Ours()

    def as_chat(self) -> dict[str, Any]:
        """The chat request that means the same. Raises Problem for what needs a store."""
        if self.previous_response_id is not None or self.conversation is not None:
            raise Problem("This server keeps no responses: send the whole conversation as input.", param="previous_response_id")
        extra = {name: value for name, value in (self.__pydantic_extra__ or {}).items() if name not in ("messages", "n", "logprobs", "stop")}
        same = {there: getattr(self, here) for here, there in _SAME.items() if getattr(self, here, None) is not None}
        out: dict[str, Any] = {**extra, **same, "messages": self._messages(), "sfi": self.sfi.model_dump()}
        if self.tools:
            out["tools"] = [self._tool(tool) for tool in self.tools]
        if self.tool_choice is not None:
            out["tool_choice"] = self.tool_choice if isinstance(self.tool_choice, str) else {
                "type": "function", "function": {"name": self.tool_choice.name}}
        if self.reasoning and self.reasoning.effort:
            out["reasoning_effort"] = self.reasoning.effort
        if self.text and self.text.format:
            f = self.text.format
            out["response_format"] = {"type": f.type, **({"json_schema": {"schema": f.schema_}} if f.type == "json_schema" else {})}
        return out

    @staticmethod
    def _tool(tool: FlatTool) -> dict[str, Any]:
        if tool.type != "function":
            raise Problem(f"A tool of type {tool.type[:100]!r} cannot be had here: functions alone can.", param="tools")
        return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}

    def _messages(self) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        for item in [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input:
            out += self._of_item(item, out)
        return out

    @staticmethod
    def _of_item(item: Item, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages of an item; calls that follow each other are those of one message."""
        content = item.content if item.content is None or isinstance(item.content, str) else [part.model_dump() for part in item.content]
        if item.type == "message":
            return [{"role": item.role or "user", "content": content}]
        if item.type == "function_call":
            call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
            if before and before[-1].get("tool_calls"):
                before[-1]["tool_calls"].append(call)
                return []
            return [{"role": "assistant", "content": None, "tool_calls": [call]}]
        if item.type == "function_call_output":
            output = item.output if item.output is None or isinstance(item.output, str) else [part.model_dump() for part in item.output]
            return [{"role": "tool", "tool_call_id": item.call_id, "content": output}]
        if item.type == "reasoning":
            return []
        raise Problem(f"An input item of type {item.type[:100]!r} cannot be read here.", param="input")


def _usage(answer: Answering) -> dict[str, Any]:
    usage = answer.usage
    return {"input_tokens": usage.n_prompt, "output_tokens": usage.n_drawn, "total_tokens": usage.n_prompt + usage.n_drawn,
            "input_tokens_details": {"cached_tokens": usage.n_cached}, "output_tokens_details": {"reasoning_tokens": answer.n_thought}}


class ResponseShape:
    """One response, whole or as events. asked: the request; given: its JSON"""

    def __init__(self, asked: ResponsesRequest, given: dict[str, Any], model: str):
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._n_events = 0
        repeated = {name: default if given.get(name) is None else given[name] for name, default in _REPEATED.items()}
        tools = [{"description": None, "parameters": None, "strict": None, **tool} for tool in given.get("tools") or []]
        reasoning = {"effort": None, "summary": None, **(given.get("reasoning") or {})}
        self._fields = {"id": new_id("resp_"), "object": "response", "created_at": int(time.time()), "completed_at": None, "model": model,
                        "previous_response_id": None, "error": None, "incomplete_details": None, "usage": None, "background": False,
                        "store": False, "text": given.get("text") or {"format": {"type": "text"}}, "reasoning": reasoning, "tools": tools,
                        "tool_choice": given.get("tool_choice") or "auto", **repeated}
        if asked.text and asked.text.format is None:
            self._fields["text"] = {"format": {"type": "text"}}

    async def whole(self, answer: Answering, ended: Ended) -> dict[str, Any]:
        """The response, when it is whole."""
        async for _ in self._events(answer, ended):
            pass
        return self._final(answer)

    async def stream(self, answer: Answering, ended: Ended) -> AsyncIterator[bytes]:
        """Server-sent events; the last one is that of its end."""
        self._fields["usage"] = _usage(answer)  # so far
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._response("in_progress"))
        try:
            async for one in self._events(answer, ended):
                yield one
            final = self._final(answer)
            yield self._event(f"response.{final['status']}", response=final)
        except Exception as error:
            problem = problem_of(error)
            failed = {**self._response("failed"), "error": {"code": _failed_code(problem), "message": str(problem)}}
            yield self._event("response.failed", response=failed)

    def _response(self, status: str) -> dict[str, Any]:
        return {**self._fields, "status": status, "output": list(self._items)}

    def _final(self, answer: Answering) -> dict[str, Any]:
        cut = answer.finish == "length"
        return {**self._response("incomplete" if cut else "completed"), "completed_at": int(time.time()),
                "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "sfi": ours(answer.usage), "usage": _usage(answer)}

    async def _events(self, answer: Answering, ended: Ended) -> AsyncIterator[bytes]:
        text = ""
        async for piece in answer:
            text += piece.text
            for one in self._of_piece(piece):
                yield one
        ended(answer, text)
        if not self._items and self._open is None:
            for one in self._message_item():
                yield one
        for one in self._close("incomplete" if answer.finish == "length" else "completed"):
            yield one

    def _of_piece(self, piece: Piece) -> list[bytes]:
        out: list[bytes] = []
        if piece.thought:
            out += self._thought(piece.thought)
        if piece.text:
            out += self._text(piece.text)
        for call in piece.calls:
            if call.name:
                out += self._new({"type": "function_call", "id": new_id("fc_"), "call_id": new_id("call_"), "name": call.name, "arguments": "",
                                  "status": "in_progress"})
            if call.arguments:
                self._item["arguments"] += call.arguments
                out.append(self._at("response.function_call_arguments.delta", delta=call.arguments))
        return out

    def _thought(self, text: str) -> list[bytes]:
        out: list[bytes] = []
        if self._open is None or self._item["type"] != "reasoning":
            out += self._new({"type": "reasoning", "id": new_id("rs_"), "summary": [], "content": None, "encrypted_content": None})
            self._item["summary"].append({"type": "summary_text", "text": ""})
            out.append(self._at("response.reasoning_summary_part.added", summary_index=0, part={"type": "summary_text", "text": ""}))
        self._item["summary"][0]["text"] += text
        return [*out, self._at("response.reasoning_summary_text.delta", summary_index=0, delta=text)]

    def _text(self, text: str) -> list[bytes]:
        out = self._message_item() if self._open is None or self._item["type"] != "message" else []
        self._item["content"][0]["text"] += text
        return [*out, self._at("response.output_text.delta", content_index=0, delta=text, logprobs=[])]

    def _message_item(self) -> list[bytes]:
        out = self._new({"type": "message", "id": new_id("msg_"), "status": "in_progress", "role": "assistant", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        out.append(self._at("response.content_part.added", content_index=0, part=dict(part)))
        self._item["content"].append(part)
        return out

    @property
    def _item(self) -> dict[str, Any]:
        assert self._open is not None
        return self._open

    def _new(self, item: dict[str, Any]) -> list[bytes]:
        out = self._close("completed")
        self._open = item
        return [*out, self._event("response.output_item.added", output_index=len(self._items), item=dict(item))]

    def _close(self, status: str) -> list[bytes]:
        """End the item that is open."""
        item, out = self._open, []
        if item is None:
            return []
        if item["type"] == "reasoning":
            part = item["summary"][0]
            out = [self._at("response.reasoning_summary_text.done", summary_index=0, text=part["text"]),
                   self._at("response.reasoning_summary_part.done", summary_index=0, part=part)]
        elif item["type"] == "message":
            part = item["content"][0]
            out = [self._at("response.output_text.done", content_index=0, text=part["text"], logprobs=[]),
                   self._at("response.content_part.done", content_index=0, part=part)]
        else:
            out = [self._at("response.function_call_arguments.done", arguments=item["arguments"])]
        if "status" in item:
            item["status"] = status
        out.append(self._event("response.output_item.done", output_index=len(self._items), item=item))
        self._items.append(item)
        self._open = None
        return out

    def _at(self, name: str, **fields: Any) -> bytes:
        return self._event(name, item_id=self._item["id"], output_index=len(self._items), **fields)

    def _event(self, name: str, **fields: Any) -> bytes:
        self._n_events += 1
        return event({"type": name, "sequence_number": self._n_events - 1, **fields}, name)


def _failed_code(problem: Problem) -> str:
    """Of the codes that OpenAI has for a response which failed."""
    return "rate_limit_exceeded" if problem.status == 429 else "server_error" if problem.status >= 500 else "invalid_prompt"
