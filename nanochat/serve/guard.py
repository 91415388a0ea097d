"""Checks of every request before it reaches the server's endpoints."""

import asyncio
import hmac
import time
from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.serve.service import ApiError, Service


class PromptConnection(H11Protocol):
    """A connection that is closed if no complete request head arrives in time.

    uvicorn itself waits without limit for a connection's first bytes and for the rest of a head.
    """

    head_seconds = 30.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        """Start the clock at a head's first byte; further bytes do not start it again."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.head_seconds, self._too_late)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
            self.transport.close()


class Guard:
    """Checks every request's host, key, size and content type, and sets headers of every response.

    The host is checked because of DNS rebinding: a page of another site can make a browser call a
    local server by pointing its own name at 127.0.0.1.
    """

    HEADERS = (
        (
            b"content-security-policy",
            b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            b"img-src 'self' data:; font-src 'self'; base-uri 'none'; form-action 'none'; "
            b"frame-ancestors 'none'",
        ),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    )

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        endpoints: Collection[str],
        api_key: str | None,
        hosts: tuple[str, ...] | None,
    ):
        """Wrap app. endpoints: paths that are counted by name; all others are counted together."""
        self.app, self.service, self.endpoints = app, service, endpoints
        self.api_key, self.hosts = api_key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.HEADERS]
                known = path if path in self.endpoints else "other"
                status = str(message["status"])
                self.service.count("nanochat_http_requests_total", path=known, status=status)
            await send(message)

        headers = dict(scope["headers"])
        try:
            self._check(scope["method"], path, headers)
        except ApiError as error:
            await error.response()(scope, receive, answer)
            return
        if scope["method"] == "HEAD":  # the server leaves out the body
            scope = {**scope, "method": "GET"}
        await self.app(scope, self._bounded(receive), answer)

    def _check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host[: host.rfind("]") + 1] or host.partition(":")[0]
            if name.lower() not in self.hosts:
                raise ApiError(
                    400, f"unknown host {name!r}; start the server with --allow-host {name}"
                )
        if self.api_key is not None and (path.startswith("/v1/") or path == "/metrics"):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), self.api_key.encode())
            if scheme.lower() != b"bearer" or not right:  # a scheme's name has no case (RFC 9110)
                raise ApiError(
                    401,
                    "wrong or missing API key; send it as Authorization: Bearer KEY",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.service.limits.max_body_bytes:
            raise self._too_large()
        # With any other type, a page of another site could send a request without a CORS preflight.
        kind = headers.get(b"content-type", b"").decode("latin-1")
        if method == "POST" and kind.partition(";")[0].strip().lower() != "application/json":
            raise ApiError(
                415, f"the content type is {kind!r}; send JSON as Content-Type: application/json"
            )

    def _too_large(self) -> ApiError:
        limit = self.service.limits.max_body_bytes
        return ApiError(413, f"the request has more than {limit} bytes", "request_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        """Wrap receive; raises an error if the request's body is too large or too slow."""
        size = 0
        deadline = time.monotonic() + self.service.limits.body_seconds
        whole = False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:  # the next message is the end of the connection
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise HTTPException(408, "the request's body took too long to arrive") from None
            size += len(message.get("body", b""))
            if size > self.service.limits.max_body_bytes:
                raise HTTPException(413, str(self._too_large()))
            whole = not message.get("more_body", False)
            return message

        return bounded
