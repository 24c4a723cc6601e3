"""A headless Chromium that tests drive by the DevTools protocol over pipes, which needs no further package."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
_SECONDS = 120  # after which a browser is ended


def find_chromium() -> str | None:
    """The path of a browser, if there is one."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """A tab.

    Attributes:
      complaints: what its console and its errors said, in the order in which it came.
    """

    def __init__(self, to_browser: BinaryIO, from_browser: BinaryIO):
        self.complaints: list[str] = []
        self._to, self._from = to_browser, from_browser
        self._numbers = itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and waits for its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, a promise's included."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 30) -> None:
        """Waits until a JavaScript expression is true."""
        until = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > until:
                raise TimeoutError(f"{condition}; {self.complaints}")
            time.sleep(0.05)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = self._from.read(1 << 16)
            if not data:
                raise EOFError("the browser has ended")
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(parameters["args"]))


@contextmanager
def open_page(chromium: str) -> Iterator[Page]:
    """A tab of a browser with a profile of its own; both end with the context."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        pipes = [f"{folder}/to", f"{folder}/from"]
        for pipe in pipes:
            os.mkfifo(pipe)
        # Chromium has its pipes at the file descriptors 3 and 4, where a shell can put them without a fork of ours.
        command = ["sh", "-c", 'to="$1" from="$2"; shift 2; exec "$@" 3<"$to" 4>"$from"', "sh", *pipes]
        command += [chromium, *_FLAGS, f"--user-data-dir={folder}/profile"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        watchdog = threading.Timer(_SECONDS, browser.kill)  # a pipe has no timeout, but its end
        watchdog.start()
        try:
            with open(pipes[0], "wb", buffering=0) as to_browser, open(pipes[1], "rb", buffering=0) as from_browser:
                yield Page(to_browser, from_browser)
        finally:
            watchdog.cancel()
            browser.terminate()
            browser.wait()
