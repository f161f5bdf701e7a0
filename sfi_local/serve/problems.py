"""What is refused over HTTP: an error object as OpenAI's, with a status."""

from __future__ import annotations

from typing import Any

from sfi_local.errors import AbortedError, ArgumentError, ContextFullError, DetachedError, InputError, OutOfMemoryError, SfiError
from sfi_local.serve.worker import DeadlineError, QueueFullError, ShutdownError

INVALID = "invalid_request_error"


class Problem(SfiError):
    """A request that is refused. status: of HTTP; kind, code, param: of OpenAI's error object"""

    def __init__(self, sentence: str, status: int = 400, code: str | None = None, param: str | None = None, kind: str = INVALID):
        super().__init__(sentence)
        self.status, self.code, self.param, self.kind = status, code, param, kind


class ContextTooSmall(Problem):
    """A prompt that is longer than the context."""

    def __init__(self, n_prompt: int, n_ctx: int):
        super().__init__(f"This model's maximum context length is {n_ctx} tokens, and the prompt has {n_prompt}: shorten it, or start "
                         f"the server with a larger --ctx.", 400, "context_length_exceeded", "messages")


# exception: (status, kind, code)
_KNOWN: tuple[tuple[type[BaseException], int, str, str | None], ...] = (
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (DeadlineError, 408, "timeout_error", "deadline"),
    (ShutdownError, 503, "server_error", "shutting_down"),
    (DetachedError, 503, "server_error", "shutting_down"),
    (AbortedError, 499, INVALID, "cancelled"),
    (ContextFullError, 400, INVALID, "context_length_exceeded"),
    (OutOfMemoryError, 503, "server_error", "out_of_memory"),
    (ArgumentError, 400, INVALID, None),
    (InputError, 400, INVALID, None),
)


def problem_of(error: BaseException) -> Problem:
    """How an exception is told. What we did not foresee says nothing of its inside."""
    if isinstance(error, Problem):
        return error
    for kind, status, name, code in _KNOWN:
        if isinstance(error, kind):
            return Problem(str(error), status, code, None, name)
    if isinstance(error, SfiError):
        return Problem(str(error), 500, None, None, "server_error")
    return Problem("The server failed here; its log says more.", 500, None, None, "server_error")


def as_object(problem: Problem) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": str(problem), "type": problem.kind, "param": problem.param, "code": problem.code}}


# status: the type of Anthropic's error object
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
          503: "overloaded_error"}


def as_error_event(problem: Problem) -> dict[str, Any]:
    """Anthropic's error object."""
    kind = _TYPES.get(problem.status, "invalid_request_error" if problem.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(problem)}}
