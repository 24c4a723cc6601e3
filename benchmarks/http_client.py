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


async def seconds(host: str, port: int, body: dict[str, object], ready: asyncio.Barrier) -> tuple[float, float]:
    """Times of the first and of the last byte of an answer in events."""
    reader, writer = await asyncio.open_connection(host, port)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    await ready.wait()
    began = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    answer = await reader.readuntil(_HEAD)
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(answer.decode(errors="replace"))
    end = await reader.read(2**16)
    first = time.perf_counter()
    while not end.endswith(_END):
        new = await reader.read(2**16)
        if not new:
            raise RuntimeError("the connection ended in the middle of an answer")
        end = (end + new)[-len(_END) :]
    last = time.perf_counter()
    writer.close()
    return first - began, last - began


async def main() -> None:
    """Serves the lines of the standard input."""
    host, port = sys.argv[1], int(sys.argv[2])
    while line := await asyncio.to_thread(sys.stdin.readline):
        bodies = json.loads(line)
        ready = asyncio.Barrier(len(bodies))
        times = await asyncio.gather(*(seconds(host, port, body, ready) for body in bodies))
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
