"""From a request to the pieces of its answer: tokens and samplers before, thoughts, text and calls apart after."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cache
from typing import Any, AsyncIterator, Sequence

from sfi_local.errors import ArgumentError
from sfi_local.runtime.look import Look, texts
from sfi_local.runtime.sampling import Sampling
from sfi_local.runtime.step import Step
from sfi_local.runtime.template import ChatTemplate, Message
from sfi_local.runtime.thoughts import THOUGHT, TokenThoughts
from sfi_local.serve.problems import ContextTooSmall, Problem
from sfi_local.serve.relay import Relay
from sfi_local.serve.requests import ChatRequest, CompletionRequest, Request, messages_of
from sfi_local.serve.tools import MARKS, Call, Calls, NoCalls, schema_of_call, told
from sfi_local.serve.worker import Job, Usage, Worker

MAX_SECONDS = 3600.0  # of an answer, where the request has no timeout of its own

_relay = cache(Relay)  # of all answers


@dataclass
class Piece:
    """What became sure with a step of an answer.

    thought, text: of the answer; calls: pieces of calls; token: of the step; top: with logprobs, (token, logprob) of it and of the likeliest
    reading: (tokens read, of so many); look: see look.py; map: the text of each part of the prompt; notices, which need no step
    """

    thought: str = ""
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    step: Step | None = None
    reading: tuple[int, int] | None = None
    look: dict[str, Any] | None = None
    map: list[str] | None = None


@dataclass
class Asked:
    """One answer that is wanted.

    tokens:   the prompt; template: None: a text to go on with, in which no thoughts are told apart
    names:    of the functions that may be called; bound: nothing but a call may come
    """

    tokens: list[int]
    sampling: Sampling
    n: int | None
    stop: tuple[str, ...]
    n_top: int | None
    template: ChatTemplate | None = None
    names: list[str] = field(default_factory=list)
    bound: bool = False
    progress: bool = False
    look: bool = False
    seconds: float = MAX_SECONDS


def asked_of_chat(model: Any, request: ChatRequest, answers: "Answers") -> list[Asked]:
    """One per choice. Raises Problem, InputError, ArgumentError."""
    tools, (bound, name) = request.used_tools, request.forced
    messages = messages_of(request)
    template = model.template_with(None, request.chat_template_kwargs, request.think)
    if "tools" not in template.variables:
        messages = told(messages, tools)
    elif tools:
        template = model.template_with(tools, request.chat_template_kwargs, request.think)
    tokens = template.tokens(answers.with_tokens(messages))
    schema = schema_of_call(tools, name) if bound else None
    names = [tool["function"]["name"] for tool in tools]
    return [_asked(model, request, tokens, request.sampling(i, schema), request.n_top, template=template, names=names, bound=bound)
            for i in range(request.n or 1)]


def asked_of_completion(model: Any, request: CompletionRequest) -> list[Asked]:
    """One per prompt and choice. Raises Problem, InputError, ArgumentError."""
    out = []
    for prompt in request.prompts():
        tokens = model.prompt_tokens(prompt)
        out += [_asked(model, request, tokens, request.sampling(i), request.logprobs) for i in range(request.n or 1)]
    if len(out) > 128:
        raise Problem("More than 128 answers are asked for at once.", param="prompt")
    return out


def _asked(model: Any, request: Request, tokens: list[int], sampling: Sampling, n_top: int | None, **more: Any) -> Asked:
    n_vocab, n_ctx = model.vocabulary.n_vocab, model.n_ctx_limit
    if not tokens:
        raise Problem("The prompt is empty.", param="prompt")
    if not 0 <= min(tokens) <= max(tokens) < n_vocab:
        raise Problem(f"The prompt has a token that is none of this model's, 0 to {n_vocab - 1}.", param="prompt")
    if len(tokens) >= n_ctx:
        raise ContextTooSmall(len(tokens), n_ctx)
    if any(not 0 <= token < n_vocab for token in sampling.logit_bias):
        raise ArgumentError(f"logit_bias has a token that is none of this model's, 0 to {n_vocab - 1}.")
    check_stops(request.stops)
    return Asked(tokens, sampling, request.max_new, request.stops, n_top, progress=request.sfi.progress, look=request.sfi.look,
                 seconds=min(MAX_SECONDS, request.timeout or MAX_SECONDS), **more)


def check_stops(stops: Sequence[str]) -> None:
    """Half a surrogate pair is no text."""
    try:
        "".join(stops).encode("utf-8")
    except UnicodeEncodeError:
        raise Problem("stop has a text that is no Unicode.", param="stop") from None


class Answering:
    """One answer as it comes: iterate over it for its pieces; afterwards finish and usage are there.

    finish:  as OpenAI has it: stop, length or tool_calls
    tokens:  all that were drawn
    stopped_by: the text of the request's stop that ended it, if one did
    """

    def __init__(self, worker: Worker, asked: Asked):
        self.asked, self._worker = asked, worker
        self.finish, self.usage = "", Usage(n_prompt=len(asked.tokens))
        self.tokens: list[int] = []
        self.n_thought = 0
        self.stopped_by: str | None = None
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]]()
        vocabulary = worker.model.vocabulary
        self._vocabulary = vocabulary
        self._thoughts = TokenThoughts(asked.template.thoughts(asked.tokens), vocabulary) if asked.template else None
        source = (asked.template.source or "") if asked.template else ""
        self._calls = Calls(asked.names, source, asked.bound) if asked.names else NoCalls()
        self.job = Job(asked.tokens, self._start, self._give, n=asked.n, deadline=asked.seconds,
                       look=Look(len(asked.tokens)) if asked.look else None)

    def _start(self, slot: Any) -> Any:
        a = self.asked
        return self._worker.model.generate(a.tokens, n=a.n, sampling=a.sampling, stop=a.stop, logprobs=a.n_top, slot=slot,
                                           progress=lambda done, total: self._worker.between(self.job))

    def _give(self, kind: str, value: Any) -> None:
        """On the worker's thread."""
        _relay().call(self._loop, self._events.put_nowait, (kind, value))

    def cancel(self) -> None:
        """Within one step; from the loop's thread."""
        self._worker.end(self.job)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises SfiError. Leaving early, for whatever reason, cancels it."""
        self._worker.add(self.job)
        ended = False
        try:
            if self.asked.look:
                yield Piece(map=await asyncio.to_thread(texts, self._vocabulary.spelled, self.asked.tokens))
            while True:
                kind, value = await self._events.get()
                if kind in ("end", "error"):
                    ended = True
                    if kind == "error":
                        raise value
                    self.usage = value
                    return
                piece = self._piece(kind, value)
                if piece:
                    yield piece
        finally:
            if not ended:
                self.cancel()

    def _piece(self, kind: str, value: Any) -> Piece | None:
        if kind == "step":
            return self._of_step(value)
        if kind == "look":
            return Piece(look=value)
        return Piece(reading=value) if self.asked.progress else None

    def _of_step(self, step: Step) -> Piece:
        self.tokens.append(step.token)
        piece, last = Piece(step=step), bool(step.finish)
        for is_thought, text in self._told_apart(step, last):
            if is_thought:
                piece.thought += text
            else:
                self._take(piece, self._calls.push(text))
        if last:
            self._take(piece, self._calls.finish())
            self._end(step)
        self.n_thought += bool(piece.thought)
        return piece

    def _told_apart(self, step: Step, last: bool) -> list[tuple[bool, str]]:
        text = step.text
        if self.asked.names and not step.finish:
            name, is_name = self._vocabulary.spelled(step.token)
            if is_name and name.decode(errors="replace") in MARKS:
                text += name.decode()
        if self._thoughts is None:
            return [(False, text)]
        return [(kind == THOUGHT, part) for kind, part in self._thoughts.push(step.token, text, last)]

    def _take(self, piece: Piece, found: Any) -> None:
        for one in found:
            if isinstance(one, Call):
                piece.calls.append(one)
                self.finish = "tool_calls"
            else:
                piece.text += one.text

    def _end(self, step: Step) -> None:
        if self.finish != "tool_calls" or step.finish in ("length", "context"):
            self.finish = "length" if step.finish in ("length", "context") else "stop"
        if step.finish == "stop":
            text = self._worker.model.detokenize(self.tokens)
            self.stopped_by = max(self.asked.stop, key=text.rfind)


class Answers:
    """The tokens of answers that were given, so that a conversation goes on from what its slot holds, thoughts included.

    An answer is found again by all that was said before it and its text, so that nothing passes from one conversation into another.
    """

    MOST = 512

    def __init__(self) -> None:
        self._tokens: dict[str, list[int]] = {}

    def remember(self, messages: Sequence[Message], text: str, tokens: list[int]) -> None:
        """text: as the client got it, without thoughts."""
        key = _key(messages, text)
        self._tokens.pop(key, None)
        self._tokens[key] = tokens
        while len(self._tokens) > self.MOST:
            try:
                self._tokens.pop(next(iter(self._tokens)))
            except (KeyError, StopIteration, RuntimeError):
                return  # another thread was sooner

    def with_tokens(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, known answers as tokens."""
        out: list[Message] = []
        for i, m in enumerate(messages):
            tokens = None
            if m.role == "assistant" and not m.extra and m.is_text:
                tokens = self._tokens.get(_key(messages[:i], "".join(map(str, m.parts))))
            out.append(m if tokens is None else Message(m.role, [list(tokens)]))
        return out


def _key(messages: Sequence[Message], text: str) -> str:
    from hashlib import blake2b
    from json import dumps

    said = [[m.role, [part if isinstance(part, str) else "" for part in m.parts], m.extra] for m in messages]
    return blake2b(dumps([said, text.strip()], sort_keys=True).encode(), digest_size=16).hexdigest()

