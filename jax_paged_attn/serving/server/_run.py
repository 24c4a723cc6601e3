"""The application under uvicorn, from the first socket to a clean end."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn

from jax_paged_attn.serving._engine import Engine
from jax_paged_attn.serving._text import Tokenizer
from jax_paged_attn.serving.server._app import Service, create_app

_LAST_WORDS_SECONDS = 5.0  # for errors that end answers, beyond the grace period


class Server(uvicorn.Server):
    """uvicorn's server, which at its end first refuses, then waits, then ends what is left.

    Args:
      config: of the application of `create_app`.
      service: that application's.
      grace: seconds that requests may take to end.

    Attributes:
      service: see above.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace: float):
        super().__init__(config)
        self.service = service
        self._grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server within the grace period and a few seconds."""
        self.service.drain()
        ending = asyncio.get_running_loop().call_later(self._grace, self.service.end_all)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()


def make_server(
    engine: Engine, tokenizer: Tokenizer, *, host: str, port: int, grace: float, log_level: str, **options: Any
) -> Server:
    """The server that `serve` runs."""
    app = create_app(engine, tokenizer, **options)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan="on",
        access_log=False,
        log_level=log_level,
        server_header=False,
        timeout_graceful_shutdown=int(grace + _LAST_WORDS_SECONDS),
    )
    return Server(config, app.state.service, grace)


def serve(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace: float = 30.0,
    log_level: str = "info",
    **options: Any,
) -> None:
    """Serves until SIGINT or SIGTERM. Then it takes no new requests, and waits for those that are under way.

    Args:
      engine: see `create_app`.
      tokenizer: see `create_app`.
      model_name: what clients call the model.
      host: the address to listen at. The default can be reached from this machine only.
      port: 0 for any that is free.
      grace: seconds that requests may take to end; those that are left get an error.
      log_level: uvicorn's.
      options: further ones of `create_app`.

    Raises:
      ValueError: see `create_app`.

    Example:
      >>> import inspect
      >>> from jax_paged_attn.serving.server import serve
      >>> inspect.signature(serve).parameters["host"].default
      '127.0.0.1'
    """
    make_server(
        engine,
        tokenizer,
        model_name=model_name,
        host=host,
        port=port,
        grace=grace,
        log_level=log_level,
        **options,
    ).run()
