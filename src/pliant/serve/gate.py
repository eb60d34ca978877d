"""What every HTTP request passes first: API key, size limit, time limit; and is counted."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pliant.serve.api_error import CLIENT_CLOSED, ApiError
from pliant.serve.metrics import Metrics

OPEN = ("/health", "/", "/dashboard.css", "/dashboard.js")  # need no key
GRACE_SECONDS = 10.0  # beyond the time limit, for an answer to end with an error of its own


@dataclass(frozen=True)
class Limits:
    """body: bytes of a request. seconds: from its arrival to the end of its answer.

    keys: API keys, one of which a request must bring; none: everyone is welcome.
    """

    body: int = 4 << 20
    seconds: float = 600.0
    keys: tuple[str, ...] = ()


class Gate:
    """Middleware that lets through what `limits` allow."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_CLOSED

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            async with asyncio.timeout(self._limits.seconds + GRACE_SECONDS):
                self._check(scope)
                await self._app(scope, self._bounded(receive), watched)
        except ApiError as error:
            await _refuse(error, scope, receive, watched)
        except TimeoutError:
            if status == CLIENT_CLOSED:  # nothing was sent; else the connection just ends
                await _refuse(ApiError("the request took too long", 504), scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.responded(route, status)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._limits.keys and scope["path"] not in OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            sent = given.encode("latin-1")  # the bytes, as they came
            known = [hmac.compare_digest(sent, key.encode()) for key in self._limits.keys]
            if kind.lower() != "bearer" or not any(known):
                raise ApiError(
                    "no valid API key; send it as Authorization: Bearer KEY",
                    401,
                    code="invalid_api_key",
                )
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limits.body:
            raise ApiError(self._too_large, 413, code="request_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limits.body:
                raise HTTPException(413, self._too_large)
            return message

        return bounded

    @property
    def _too_large(self) -> str:
        return f"the request has more than {self._limits.body} bytes"


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.body(), error.status)(scope, receive, send)
