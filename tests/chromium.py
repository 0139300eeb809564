"""A headless Chromium, spoken to in its own protocol over a pipe: no driver, no port, nothing but the browser."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any


def find_chromium() -> str | None:
    """$CHROMIUM, or the first Chromium or Chrome on the path."""
    given = os.environ.get("CHROMIUM")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return given or next((path for name in names if (path := shutil.which(name))), None)


class Page:
    """One page of one browser, with a profile in `folder`, where downloads land too.

    Every call raises AssertionError where the browser, or the page's own script, reports an error.
    """

    def __init__(self, browser: str, folder: Path, timeout: float = 120.0) -> None:
        self.timeout, self.downloads = timeout, folder / "downloads"
        self.console: list[str] = []
        self._number, self._unread = 0, b""
        ours, theirs = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "--window-size=900,1500"]
        options += ["--disable-background-networking", "--disable-component-update", "--disable-extensions"]
        # Chromium reads commands from descriptor 3 and answers on 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}', browser, *options, "about:blank"],
            pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(folder)},
        )
        self._to, self._from = ours[1], theirs[0]
        for end in (ours[0], theirs[1]):
            os.close(end)
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for end in (self._to, self._from):
            os.close(end)

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._from], [], [], left)[0], "Chromium does not answer"
            block = os.read(self._from, 1 << 20)
            assert block, "Chromium ended"
            self._unread += block
        message, self._unread = self._unread.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.timeout
        while (answer := self._read(deadline)).get("id") != self._number:
            if answer.get("method") == "Runtime.consoleAPICalled":
                self.console += [str(a.get("value", a.get("description"))) for a in answer["params"]["args"]]
            elif answer.get("method") == "Runtime.exceptionThrown":
                self.console.append(str(answer["params"]["exceptionDetails"]))
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def evaluate(self, script: str) -> Any:
        """The JSON value of a JavaScript expression, awaited where it is a promise."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + self.timeout
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, (condition, self.console, self.evaluate("document.body.innerText"))
            time.sleep(0.05)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def text(self, element: str) -> str:
        return str(self.evaluate(f"document.getElementById({element!r}).textContent"))

    def choose_file(self, element: str, path: Path) -> None:
        """What a user does with a file input."""
        found = self.call("Runtime.evaluate", expression=f"document.getElementById({element!r})")["result"]["objectId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=found)

    def download(self, element: str, name: str) -> bytes:
        """Clicks a link and waits for the file `name`."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self.evaluate(f"document.getElementById({element!r}).click()")
        deadline = time.monotonic() + self.timeout
        while not (self.downloads / name).is_file():
            assert time.monotonic() < deadline, (name, self.console)
            time.sleep(0.05)
        return (self.downloads / name).read_bytes()

    def screenshot(self, path: Path) -> None:
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))
