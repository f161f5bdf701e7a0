"""/v1/chat/completions and /v1/completions: the pieces of answers in OpenAI's shapes."""

from __future__ import annotations

import secrets
import time
from typing import Any, AsyncIterator, Callable, Sequence

from sfi_local.runtime.step import Step
from sfi_local.serve.asking import Answering, Piece
from sfi_local.serve.http import DONE, event
from sfi_local.serve.worker import Usage

Ended = Callable[[Answering, str], None]  # (an answer, its text), when it is whole


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def usage_of(answers: Sequence[Answering]) -> dict[str, Any]:
    """OpenAI's usage, the prompt counted once."""
    first, drawn = answers[0].usage, sum(a.usage.n_drawn for a in answers)
    return {"prompt_tokens": first.n_prompt, "completion_tokens": drawn, "total_tokens": first.n_prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": first.n_cached},
            "completion_tokens_details": {"reasoning_tokens": sum(a.n_thought for a in answers)}}


def ours(usage: Usage) -> dict[str, Any]:
    """What only sfi-local knows; seconds, and shares of 1."""
    decoding = usage.seconds - usage.waited - usage.ttft
    steps = sum(usage.kinds.values())
    return {"mode": usage.mode, "cached_from": usage.cached_from, "steps": {kind: usage.kinds[kind] for kind in ("slow", "fast", "dense", "stock")},
            "kv_read_share": round(usage.kv_read_share, 4), "ttft": round(usage.ttft, 4), "waited": round(usage.waited, 4),
            "seconds": round(usage.seconds, 4), "tokens_per_second": round(steps / decoding, 2) if decoding > 0 and steps else None}


class Shape:
    """Chat completions. vocabulary: of the model, for logprobs; fields: of every object: id, created, model"""

    prefix, kind, kind_of_chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, vocabulary: Any, model: str, fingerprint: str):
        self._vocabulary = vocabulary
        self.fields = {"id": new_id(self.prefix), "object": self.kind, "created": int(time.time()), "model": model,
                       "system_fingerprint": fingerprint}

    # ---- whole ----

    async def whole(self, answers: Sequence[Answering], ended: Ended) -> dict[str, Any]:
        """The object of all answers, one after the other."""
        choices = [await self._choice(i, answer, ended) for i, answer in enumerate(answers)]
        return {**self.fields, "choices": choices, "usage": usage_of(answers), "sfi": ours(answers[-1].usage)}

    async def _choice(self, i: int, answer: Answering, ended: Ended) -> dict[str, Any]:
        text, thought, calls = "", "", _Calls()
        logprobs: list[dict[str, Any]] = []
        async for piece in answer:
            text, thought = text + piece.text, thought + piece.thought
            calls.add(piece)
            logprobs += self._logprobs(piece)
        ended(answer, text)
        message = {"role": "assistant", "content": text or (None if calls.whole else ""), "refusal": None, "annotations": [],
                   **({"reasoning_content": thought.strip()} if thought.strip() else {}), **({"tool_calls": calls.whole} if calls.whole else {})}
        return {"index": i, "message": message, "finish_reason": answer.finish,
                "logprobs": None if answer.asked.n_top is None else {"content": logprobs, "refusal": None}}

    # ---- a stream ----

    async def stream(self, answers: Sequence[Answering], ended: Ended, with_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events."""
        self.fields["object"] = self.kind_of_chunk
        for i, answer in enumerate(answers):
            text, calls = "", _Calls()
            yield self._chunk(i, self._opening(), None)
            async for piece in answer:
                text += piece.text
                extra = self._extra(piece, answer)
                if extra:
                    yield event({**self.fields, "choices": [], "sfi": extra})
                for delta in self._deltas(piece, calls):
                    yield self._chunk(i, delta, None, self._logprobs_of(answer, piece))
            ended(answer, text)
            yield self._chunk(i, {}, answer.finish, ours=ours(answer.usage))
        if with_usage:
            yield event({**self.fields, "choices": [], "usage": usage_of(answers), "sfi": ours(answers[-1].usage)})
        yield DONE

    def _opening(self) -> dict[str, Any]:
        return {"role": "assistant", "content": ""}

    def _deltas(self, piece: Piece, calls: "_Calls") -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = [{"reasoning_content": piece.thought}] if piece.thought else []
        out += [{"content": piece.text}] if piece.text else []
        out += [{"tool_calls": [delta]} for delta in calls.add(piece)]
        return out

    def _chunk(self, i: int, delta: dict[str, Any], finish: str | None, logprobs: Any = None, ours: Any = None) -> bytes:
        choice = {"index": i, "delta": delta, **({"logprobs": logprobs} if logprobs else {}), "finish_reason": finish}
        return event({**self.fields, "choices": [choice], **({"sfi": ours} if ours else {})})

    @staticmethod
    def _extra(piece: Piece, answer: Answering) -> dict[str, Any]:
        """What goes to our page alone."""
        out: dict[str, Any] = {}
        if piece.reading:
            out["reading"] = {"done": piece.reading[0], "total": piece.reading[1]}
        if piece.look:
            out["look"] = piece.look
        if piece.map:
            out["map"] = piece.map
        if piece.step and answer.asked.progress:
            out["step"] = {"kind": piece.step.kind, "n_cells": piece.step.n_cells, "depth": piece.step.depth}
        return out

    # ---- logprobs ----

    def _logprobs_of(self, answer: Answering, piece: Piece) -> dict[str, Any] | None:
        return None if answer.asked.n_top is None else {"content": self._logprobs(piece), "refusal": None}

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        step = piece.step
        if step is None or step.logprob is None:
            return []
        return [{**self._one(step.token, step.logprob), "top_logprobs": [self._one(*pair) for pair in step.top]}]

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._vocabulary.spelled(token)[0]
        return {"token": data.decode("utf-8", errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


class TextShape(Shape):
    """Text completions."""

    prefix, kind, kind_of_chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(self, vocabulary: Any, model: str, fingerprint: str, echo: Callable[[Answering], str]):
        super().__init__(vocabulary, model, fingerprint)
        self._echo = echo

    async def _choice(self, i: int, answer: Answering, ended: Ended) -> dict[str, Any]:
        text, steps = self._echo(answer), []
        async for piece in answer:
            text += piece.thought + piece.text
            steps += [piece.step] if piece.step else []
        return {"index": i, "text": text, "finish_reason": answer.finish, "logprobs": self._legacy(answer, steps)}

    async def stream(self, answers: Sequence[Answering], ended: Ended, with_usage: bool) -> AsyncIterator[bytes]:
        for i, answer in enumerate(answers):
            if head := self._echo(answer):
                yield self._text(i, head, None)
            async for piece in answer:
                if extra := self._extra(piece, answer):
                    yield event({**self.fields, "choices": [], "sfi": extra})
                if piece.text or (piece.step and answer.asked.n_top is not None):
                    yield self._text(i, piece.text, None, self._legacy(answer, [piece.step] if piece.step else []))
            yield self._text(i, "", answer.finish, ours=ours(answer.usage))
        if with_usage:
            yield event({**self.fields, "choices": [], "usage": usage_of(answers), "sfi": ours(answers[-1].usage)})
        yield DONE

    def _text(self, i: int, text: str, finish: str | None, logprobs: Any = None, ours: Any = None) -> bytes:
        choice = {"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return event({**self.fields, "choices": [choice], **({"sfi": ours} if ours else {})})

    def _legacy(self, answer: Answering, steps: Sequence[Step]) -> dict[str, Any] | None:
        if answer.asked.n_top is None:
            return None
        tokens = [self._one(step.token, step.logprob or 0.0) for step in steps]
        offsets = [sum(len(token["token"]) for token in tokens[:i]) for i in range(len(tokens))]
        return {"tokens": [token["token"] for token in tokens], "token_logprobs": [token["logprob"] for token in tokens],
                "top_logprobs": [{one["token"]: one["logprob"] for one in (self._one(*pair) for pair in step.top)} for step in steps],
                "text_offset": offsets}


class _Calls:
    """Calls put together from their pieces. whole: as a message has them"""

    def __init__(self) -> None:
        self.whole: list[dict[str, Any]] = []

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """The same pieces as a stream has them."""
        out = []
        for call in piece.calls:
            if call.index == len(self.whole):
                self.whole.append({"id": new_id("call_"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}})
                out.append({"index": call.index, **self.whole[-1], "function": dict(self.whole[-1]["function"])})
            else:
                self.whole[call.index]["function"]["arguments"] += call.arguments
                out.append({"index": call.index, "function": {"arguments": call.arguments}})
        return out
