"""Refuse requests before any of their content is read: token, origin, and size."""

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from framepack_jax.server.errors import ApiError
from framepack_jax.server.limits import is_loopback
from framepack_jax.server.login import COOKIE, LOGIN, login_page

# Paths that need no token.
OPEN = ("/health", LOGIN)


class Guard:
    """ASGI middleware that checks every request and counts the bytes of its body.

    With a token, requests need it. Without one, which is for this machine alone, pages of other
    sites that a browser shows are kept out by the headers Host and Origin.
    """

    def __init__(self, app: ASGIApp, token: str | None, max_bytes: int) -> None:
        self.app, self.token, self.max_bytes = app, token, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            if scope["path"] not in OPEN:
                self._check_caller(headers)
            self._check_length(headers.get("content-length", "0"))
        except ApiError as error:
            response: Response = JSONResponse(error.body(), error.status)
            if error.status == 401 and "text/html" in headers.get("accept", ""):
                response = login_page()
            return await response(scope, receive, send)
        return await self.app(scope, self._counted(receive), send)

    def _check_caller(self, headers: Headers) -> None:
        if self.token is None:
            origin = headers.get("origin")
            names = [_name(f"//{headers.get('host', '')}"), *([_name(origin)] if origin else [])]
            if not all(is_loopback(name) for name in names):
                raise ApiError(403, "without a token, only this machine is served")
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        if not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise ApiError(
                401,
                "the token is missing or wrong: send the header Authorization: Bearer TOKEN",
                code="invalid_api_key",
            )

    def _check_length(self, text: str) -> None:
        if not text.isascii() or not text.isdigit():
            raise ApiError(400, "the header Content-Length is no number")
        if len(text) > 15 or int(text) > self.max_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self.max_bytes} bytes, which is the limit",
            code="request_too_large",
        )

    def _counted(self, receive: Receive) -> Receive:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                raise self._too_large()
            return message

        return counted


def _name(address: str) -> str:
    """Return the host of an address, empty if it has none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
