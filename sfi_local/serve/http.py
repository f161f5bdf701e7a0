"""Answers on the wire: JSON, and events as they come, which end when the client goes away."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, AsyncIterator, Awaitable, Callable

from starlette.responses import Response

from sfi_local.serve.problems import Problem, as_error_event, as_object, problem_of

SEND_SECONDS = 120.0  # for one event to leave; a client that reads more slowly is dropped

log = logging.getLogger(__name__)


def dumps(value: Any) -> bytes:
    """JSON in UTF-8; half a surrogate pair, which is no text, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", errors="replace")


class JsonResponse(Response):
    """media_type: application/json"""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def refusal(error: BaseException, path: str = "") -> JsonResponse:
    """The response of an error, in the shape of a path's API; the log has what the client is not told."""
    problem = problem_of(error)
    if not isinstance(error, Problem) and problem.status >= 500:
        log.error("a request failed", exc_info=error)
    headers = {"retry-after": "2"} if problem.status in (429, 503) else {}
    return JsonResponse((as_error_event if path.startswith("/v1/messages") else as_object)(problem), problem.status, headers)


class Events(Response):
    """Server-sent events from an iterator of them, each as bytes. gone: called when the client goes away"""

    def __init__(self, events: AsyncIterator[bytes], gone: Callable[[], None]):
        self.status_code, self._events, self._gone = 200, events, gone
        self.background = None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        watch, send = asyncio.ensure_future(until_gone(receive, self._gone)), Patient(send, SEND_SECONDS)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except OSError:
            self._gone()  # it does not read, or not any more
        finally:
            watch.cancel()
            send.close()
            await self._events.aclose()  # type: ignore[attr-defined]  # a generator


class Patient:
    """ASGI's send, with an end to its patience: TimeoutError where one message takes longer than so many seconds, a quarter more at most.

    One timer for all of the messages: asyncio.wait_for() makes a task of each, which costs more than to send it.
    """

    def __init__(self, send: Callable[[Any], Awaitable[None]], seconds: float):
        self._send, self._seconds, self._loop, self._task = send, seconds, asyncio.get_running_loop(), asyncio.current_task()
        self._since: float | None = None
        self._timer = self._loop.call_later(seconds / 4, self._look)
        self._is_late = False

    async def __call__(self, message: Any) -> None:
        self._since = self._loop.time()
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if self._is_late:
                raise TimeoutError from None
            raise
        finally:
            self._since = None

    def _look(self) -> None:
        self._timer = self._loop.call_later(self._seconds / 4, self._look)
        if self._since is not None and self._loop.time() - self._since > self._seconds and self._task:
            self._is_late = True
            self._task.cancel()

    def close(self) -> None:
        self._timer.cancel()


async def until_gone(receive: Any, gone: Callable[[], None]) -> None:
    """Call gone() when the client closes its side."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()


async def unless_gone(receive: Any, work: Awaitable[Any], gone: Callable[[], None]) -> Any:
    """What work gives; meanwhile gone() is called if the client goes away."""
    watch = asyncio.ensure_future(until_gone(receive, gone))
    try:
        return await work
    finally:
        watch.cancel()


def event(value: Any, name: str = "") -> bytes:
    """One server-sent event."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + dumps(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def told(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events, and if they fail one that says why, as OpenAI's clients expect it."""
    try:
        async for one in events:
            yield one
    except Exception as error:
        problem = problem_of(error)
        if problem.status >= 500:
            log.error("a stream failed", exc_info=error)
        yield event(as_object(problem))
