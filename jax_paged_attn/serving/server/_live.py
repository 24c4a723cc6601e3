"""The page at `/`: a box to try a prompt, and the paged cache live. `live.html` beside this file is all of it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route


def live_routes(view: Callable[[], Awaitable[dict[str, Any]]]) -> list[Route]:
    """`GET /`, the page, and `GET /pool`, which it asks a few times per second.

    Args:
      view: gives `PoolView.as_dict` of the engine at this moment.
    """
    html = Path(__file__).with_name("live.html").read_text("utf-8")
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _content_security_policy(html),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    async def pool(request: Request) -> Response:
        return JSONResponse(await view(), headers={"Cache-Control": "no-store"})

    return [Route("/", page), Route("/pool", pool)]


def _content_security_policy(html: str) -> str:
    """Allows the page's own script and style by their hashes, requests to this server, and nothing else."""
    directives = {
        "default-src": "'none'",
        "script-src": _hash(html, "script"),
        "style-src": _hash(html, "style"),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {sources}" for name, sources in directives.items())


def _hash(html: str, element: str) -> str:
    """The source expression of the only element of this name."""
    (content,) = re.findall(f"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
