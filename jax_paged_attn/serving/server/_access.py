"""Who may call, and how much they may send."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from jax_paged_attn.serving.server._errors import ApiError, shown

_BODY_SECONDS = 60


class RequireKey:
    """Lets requests through whose bearer token is the key, and those to open paths.

    Args:
      app: what is behind it.
      key: what clients have to know.
      open_paths: for which nobody needs it.
    """

    def __init__(self, app: ASGIApp, key: str, open_paths: frozenset[str]):
        self._app = app
        self._expected = key.encode()
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers with status 401."""
        if scope["type"] != "http" or scope["path"] in self._open_paths or self._knows(scope):
            await self._app(scope, receive, send)
            return
        message = "expected the server's key as a bearer token in the header Authorization"
        headers = {"WWW-Authenticate": "Bearer"}
        await ApiError(401, message, code="invalid_api_key", headers=headers).response()(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._expected)


async def json_body(request: Request, most: int) -> dict[str, Any]:
    """The JSON object of a request.

    A page of another site can make a browser send text, but not JSON without asking: so the type has to be JSON's.

    Args:
      request: whose body was not read.
      most: bytes that it may have.

    Raises:
      ApiError: it is something else, is too long, or takes too long to come.
      ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"expected the Content-Type application/json, got {shown(kind)}")
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            data = await _body(request, most)
    except TimeoutError:
        raise ApiError(408, f"expected the body within {_BODY_SECONDS} s") from None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"expected JSON, got: {' '.join(str(error).split())}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"expected a JSON object, got {shown(body)}", code="invalid_json")
    return body


async def _body(request: Request, most: int) -> bytes:
    said = request.headers.get("content-length", "0")
    data = bytearray()
    if not (said.isdecimal() and int(said[:20]) > most):
        async for part in request.stream():
            data += part
            if len(data) > most:
                break
        else:
            return bytes(data)
    raise ApiError(413, f"expected a body of at most {most} bytes", code="body_too_large")
