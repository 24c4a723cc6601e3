"""Errors as clients see them: a status, and OpenAI's object with a message, a type, a parameter and a code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


class ApiError(Exception):
    """What a client is told in place of an answer.

    Args:
      status: HTTP's.
      message: what was expected and what came.
      param: the field that is wrong, if it is one.
      code: a name for programs.
      kind: the `type` of OpenAI's errors.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = headers
        self._error = {"message": message, "type": kind, "param": param, "code": code}

    @property
    def content(self) -> bytes:
        """The JSON of the error."""
        return json.dumps({"error": self._error}).encode()

    def response(self) -> Response:
        """The error as a whole response."""
        return Response(self.content, self.status, self.headers, "application/json")


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    """A field that cannot be served: status 400, and a message that names the field."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def queue_full() -> ApiError:
    """Too many requests wait: status 429."""
    message = "too many requests wait; try again later"
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers={"Retry-After": "1"})


def shutting_down() -> ApiError:
    """The server ends: status 503."""
    message = "the server is shutting down"
    return ApiError(503, message, kind="server_error", code="shutting_down", headers={"Retry-After": "5"})


def failed() -> ApiError:
    """A fault of the server's, whose details are in its log: status 500."""
    return ApiError(500, "the server failed to serve this request", kind="server_error", code="internal_error")


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
