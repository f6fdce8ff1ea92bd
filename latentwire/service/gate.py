"""What stands before every route of the service: the token, the longest body, and the counts."""

import base64
import binascii
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from latentwire.service.settings import secret

if TYPE_CHECKING:
    from latentwire.service.app import Service

OPEN = "/health"  # asked without a token
_ROUTES = {OPEN, "/metrics", "/v1/models", "/v1/encode", "/v1/answer"}  # counted by name


class Gate:
    """Middleware, as ASGI has it."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: "Service"):
        self.app, self.service = app, service
        self.token = secret().encode()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """One request."""
        if scope["type"] == "websocket":  # there is none here
            return await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, begun, path = 500, time.perf_counter(), scope["path"]

        async def noted(message: dict) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._guarded(scope, receive, noted)
        finally:
            route = path if path in _ROUTES else "other"
            self.service.requests.labels(route, status).inc()
            self.service.seconds.labels(route).observe(time.perf_counter() - begun)

    async def _guarded(self, scope: dict, receive: Callable, send: Callable) -> None:
        headers, most, seen = dict(scope["headers"]), self.service.config.body_bytes, 0
        too_long = HTTPException(413, f"the body is longer than {most:,} bytes, the longest that is read; split it")
        if self.token and scope["path"] != OPEN and not self._knows(headers.get(b"authorization", b"")):
            said = {"error": "token missing or wrong: send the header Authorization: Bearer TOKEN"}
            ask = {"WWW-Authenticate": 'Basic realm="any name, the token as password"'}  # what browsers know
            await JSONResponse(said, 401, ask)(scope, receive, send)
            return
        if int(headers.get(b"content-length", b"0")) > most:
            await JSONResponse({"error": too_long.detail}, 413)(scope, receive, send)
            return

        async def limited() -> dict:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise too_long
            return message

        await self.app(scope, limited, send)

    def _knows(self, header: bytes) -> bool:
        """Whether a header holds the token: as bearer, or as the password that a browser asks for."""
        scheme, _, given = header.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given).partition(b":")[2]
            except binascii.Error:
                return False
        return hmac.compare_digest(given.strip(), self.token)
