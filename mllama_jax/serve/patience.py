"""A connection that is cut where a request does not come whole in time, however slowly its bytes drip."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 60.0  # from a connection, or the first byte of a further request, to the last one; a route may be stricter


class PatientProtocol(H11Protocol):
    """uvicorn's connection with a deadline: its own only cuts those that say nothing between requests."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()

    def _watch(self) -> None:
        """Let the time run while some of a request is missing."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            if self._deadline is None:
                self._deadline = self.loop.call_later(SECONDS, self.transport.close)
        elif self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
