"""Headless Chromium over a pipe, by its own protocol: what a page does, says on its console, and looks like. No driver, no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
TIMEOUT_S = 120.0


class Browser:
    """One page in a browser of its own; a context manager."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self.said: list[str] = []
        """Errors and warnings: of the console, uncaught, and what the page's policy or the network refused."""
        self.asked: list[str] = []
        """Every address that was asked for."""
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.number, self.buffer, self.session = 0, b"", None
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()
        command = [
            "bash", "-c", 'exec "$@" 3<&"$IN" 4>&"$OUT"', "chromium", CHROMIUM or "chromium", "--headless", "--no-sandbox",
            "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars",
            f"--user-data-dir={self.profile.name}", f"--window-size={width},{height}", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            pass_fds=(theirs_in, theirs_out),
            env={**os.environ, "IN": str(theirs_in), "OUT": str(theirs_out)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def __enter__(self) -> Browser:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)
        self.profile.cleanup()

    def open(self, file: Path) -> None:
        """Opens a local page and waits until its script says that it is ready."""
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.until("document.documentElement?.dataset.ready === 'yes'")

    def until(self, condition: str) -> None:
        """Waits for an expression to become true. AssertionError with what the page said where it does not."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.value(condition):
            assert time.monotonic() < deadline, f"never true: {condition}; the page said {self.said}"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What an expression is in the page, as plain data."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, file: Path) -> None:
        """A screenshot of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.back], [], [], TIMEOUT_S)
            assert ready, "the browser says nothing"
            piece = os.read(self.back, 1 << 20)
            assert piece, f"the browser ended with {self.process.wait()}"
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        self._listen(message.get("method", ""), message.get("params", {}))
        return message

    def _listen(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.said.append(str(params["exceptionDetails"].get("exception", {}).get("description", params)))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.said.append(str([a.get("value", a.get("description")) for a in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.said.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
