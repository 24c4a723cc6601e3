"""A client that costs little: plain sockets, and no JSON read. It runs in a process of its own, beside the server's.

Each line of the standard input is a JSON list of bodies. They are sent at once, each over a connection of its own, and
answered by a line with the seconds from the first byte sent to the first and to the last byte of each answer.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

_END = b"0\r\n\r\n"  # the last chunk
_HEAD = b"\r\n\r\n"


class Stream(asyncio.Protocol):
    """One answer in events.

    Attributes:
      first, last: when its first and its last byte came.
      ended: done when the answer is whole.
    """

    def __init__(self):
        self.first = self.last = 0.0
        self.ended = asyncio.get_running_loop().create_future()
        self._tail = b""  # the head until it is whole, later the last bytes

    def data_received(self, data: bytes) -> None:
        now, self._tail = time.perf_counter(), self._tail + data
        if not self.first:
            head, end, self._tail = self._tail.partition(_HEAD)
            if end and not head.startswith(b"HTTP/1.1 200 "):
                self.ended.set_exception(RuntimeError(f"{head.decode()}: {self._tail.decode()}"))
            if not end or not self._tail:
                self._tail = head + end
                return
            self.first = now
        self._tail = self._tail[-len(_END) :]
        if self._tail == _END and not self.ended.done():
            self.last = now
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(exc or RuntimeError("the connection ended in the middle of an answer"))


async def seconds(host: str, port: int, bodies: list[dict[str, object]]) -> list[tuple[float, float]]:
    """Times of the first and of the last byte of the answers in events."""
    loop = asyncio.get_running_loop()
    connections = [await loop.create_connection(Stream, host, port) for _ in bodies]
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    data = [json.dumps(body).encode() for body in bodies]
    began = time.perf_counter()
    for (transport, _), body in zip(connections, data, strict=True):
        transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    for _, stream in connections:
        await stream.ended
    for transport, _ in connections:
        transport.close()
    return [(stream.first - began, stream.last - began) for _, stream in connections]


async def main() -> None:
    """Serves the lines of the standard input."""
    host, port = sys.argv[1], int(sys.argv[2])
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await seconds(host, port, json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
