"""Who may ask: the key, the Host and the Origin of a request are looked at before anything else; and the access log, without prompts."""

from __future__ import annotations

import hmac
import logging
import time
from typing import Any, Callable
from urllib.parse import urlsplit

from sfi_local.serve.http import refusal
from sfi_local.serve.problems import Problem

OPEN = ("/", "/health", "/favicon.ico")  # without a key: they say nothing of what was asked
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_TARGET = 2048                        # characters of path and query
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cross-origin-resource-policy", b"same-origin"))

access = logging.getLogger("sfi_local.access")


class Guard:
    """An ASGI application around another one.

    key:   that every request but those for OPEN must bring; None: none, and then only requests to a name of this machine are answered,
           so that a page of the web that calls itself by another name cannot reach the server
    count: called with (route, status) of each request
    """

    def __init__(self, inner: Any, key: str | None, count: Callable[[str, int], None]):
        self._inner, self._key, self._count = inner, key, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._inner(scope, receive, send)
        began, status = time.monotonic(), 0

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        try:
            self._check(scope)
        except Problem as problem:
            await refusal(problem, scope["path"])(scope, receive, watched)
        else:
            await self._inner(scope, receive, watched)
        finally:
            route = scope.get("sfi.route", "other")
            self._count(route, status)
            access.info("%s %s %s %d %.3f s", (scope.get("client") or ("-",))[0], scope["method"], route, status, time.monotonic() - began)

    def _check(self, scope: Any) -> None:
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"host", b"origin", b"authorization", b"x-api-key") and headers.setdefault(name, value) != value:
                raise Problem(f"The request has two headers {name.decode()}.")
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"") > MAX_TARGET:
            raise Problem(f"The request's address has more than {MAX_TARGET} characters.", 414)
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._key is None and _name(host) not in LOOPBACK:
            raise Problem("This server answers requests to this machine alone: use http://127.0.0.1 or http://localhost, or give the server "
                          "a key.", 403, "host_not_allowed")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1").lower()).netloc != host:
            raise Problem("Requests of other web pages are not answered.", 403, "origin_not_allowed")
        if self._key is not None and scope["path"] not in OPEN and not self._has_key(headers):
            raise Problem("The request brings no right API key: send it as `Authorization: Bearer KEY`.", 401, "invalid_api_key")

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = key if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")  # as Anthropic's clients send it
        return hmac.compare_digest(given.strip(), (self._key or "").encode())


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
