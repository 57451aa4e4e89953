"""A page in the system's headless Chromium, driven by selenium: its console, its requests, values of its script."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
NO_BROWSER = (
    "" if CHROMIUM and DRIVER else "needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
)
"""The reason why this machine cannot open a page, for a skip; empty where it can."""
TIMEOUT_S = 120.0


class Browser:
    """One page in a browser of its own; a context manager."""

    def __init__(self) -> None:
        assert not NO_BROWSER, NO_BROWSER
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for argument in (
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--hide-scrollbars", f"--user-data-dir={self.profile.name}", "--window-size=1280,900"),
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        # The driver's path is given, so that selenium looks for no other one, on this machine or elsewhere.
        self.chrome = Chrome(options, Service(DRIVER, env={**os.environ, "HOME": self.profile.name}))
        self.chrome.set_script_timeout(TIMEOUT_S)
        self._messages: list[str] = []
        self._requests: list[str] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.chrome.quit()
        self.profile.cleanup()

    @property
    def messages(self) -> list[str]:
        """Errors and warnings so far: of the console, uncaught, and refusals by the page's policy or the network."""
        log = self.chrome.get_log("browser")
        self._messages += [entry["message"] for entry in log if entry["level"] in ("SEVERE", "WARNING")]
        return self._messages

    @property
    def requests(self) -> list[str]:
        """Every address that was asked for so far."""
        events = [json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance")]
        sent = [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]
        self._requests += [request["url"] for request in sent]
        return self._requests

    def open(self, file: Path) -> None:
        """Open a local page and wait until its script says that it is ready."""
        self.chrome.get("about:blank")
        self.chrome.get_log("performance")  # the requests of the page that a browser begins with
        self.chrome.get(file.resolve().as_uri())
        self.until("document.documentElement?.dataset.ready === 'yes'")

    def until(self, condition: str) -> None:
        """Wait for an expression to become true. TimeoutException with the page's messages where it does not."""
        WebDriverWait(self.chrome, TIMEOUT_S, 0.05).until(
            lambda _: self.value(condition), f"never true: {condition}; the page said {self.messages}"
        )

    def value(self, expression: str) -> Any:
        """The value of an expression in the page, as plain data."""
        return self.chrome.execute_script(f"return {expression}")
