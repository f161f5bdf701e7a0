"""Connections on which nothing happens are closed: uvicorn waits forever for the rest of a request's head."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # for the head of a request to arrive; twice that at most


class Protocol(H11Protocol):
    """uvicorn's, with an end to waiting."""

    _idle: Any = None  # what it waited behind when it was looked at last

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._later()

    def _later(self) -> None:
        asyncio.get_running_loop().call_later(HEAD_SECONDS, self._look)

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        waits = self.cycle is None or self.cycle.response_complete
        behind = self.cycle or self  # the request before the one that is waited for
        if waits and self._idle is behind:
            self.transport.close()
            return
        self._idle = behind if waits else None
        self._later()
