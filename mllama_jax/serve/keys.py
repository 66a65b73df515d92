"""Bearer keys."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.responses import JSONResponse

from mllama_jax.serve import protocol


class Keys:
    """Lets a request pass that bears one of the keys, or asks for what tells nothing: /health, /ready and the page."""

    def __init__(self, app: Any, keys: tuple[str, ...]):
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self.keys and scope["path"] not in ("/health", "/ready", "/"):
            given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
            equal = [hmac.compare_digest(given, key) for key in self.keys]  # all, so that none is told by time
            if not any(equal):
                fault = protocol.fault("a valid key is needed: Authorization: Bearer ...", "authentication_error")
                return await JSONResponse(fault, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        return await self.app(scope, receive, send)
