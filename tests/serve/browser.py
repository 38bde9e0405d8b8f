"""A headless Chromium that a test drives through the DevTools protocol, as a person would: with a mouse and keys."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
"""The browser of this machine, if it has one."""

_MODIFIERS = {"Control": 2}
_KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with one empty page; it ends with the block."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ]
    command += ["--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file, end = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            assert process.poll() is None, "the browser did not start"
            assert time.monotonic() < end, "the browser did not start in time"
            time.sleep(0.05)
        port, path = port_file.read_text().split("\n")[:2]
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        process.wait(20)


class Page:
    """A page, and all that its console said.

    Attributes:
        complaints: Errors and warnings of the console, and exceptions that nothing caught.
        asked: The URL of every request that the page made.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._last, self._session = connection, 0, None
        self.complaints: list[str] = []
        self.asked: list[str] = []
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result; events that come meanwhile are noted."""
        self._last += 1
        command = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            command["sessionId"] = self._session
        self._connection.send(json.dumps(command))
        while True:
            said = json.loads(self._connection.recv(timeout=60))
            if said.get("id") == self._last:
                assert "error" not in said, said["error"]
                return said["result"]
            self._note(said.get("method"), said.get("params", {}))

    def _note(self, method: str | None, told: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(part.get("value")) for part in told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])

    def run(self, script: str) -> Any:
        """The value of an expression."""
        result = self.tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 20) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"never true: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.03)

    def open(self, url: str) -> None:
        self.tell("Page.navigate", url=url)
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def text(self, selector: str) -> str:
        """What can be read in an element."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of what can be seen of an element."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.until(f"{found} && !{found}.disabled")
        box = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2, b.width * b.height]; }})({found})"
        )
        assert box[2] > 0, f"{selector} cannot be seen"
        place = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        self.tell("Input.dispatchMouseEvent", type="mousePressed", **place)
        self.tell("Input.dispatchMouseEvent", type="mouseReleased", **place)

    def write(self, selector: str, text: str) -> None:
        """Put a text in the place of what a field holds."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        if text:
            self.tell("Input.insertText", text=text)
        else:
            self.tell("Input.dispatchKeyEvent", type="keyDown", key="Delete", windowsVirtualKeyCode=46)
            self.tell("Input.dispatchKeyEvent", type="keyUp", key="Delete", windowsVirtualKeyCode=46)

    def press(self, *keys: str) -> None:
        """Press a key, with the ones before it held down: `press("Control", "Enter")`."""
        code, text = _KEYS[keys[-1]]
        held = sum(_MODIFIERS[key] for key in keys[:-1])
        key = {"key": keys[-1], "code": keys[-1], "windowsVirtualKeyCode": code, "modifiers": held}
        self.tell("Input.dispatchKeyEvent", type="keyDown", **key, **({"text": text} if text else {}))
        self.tell("Input.dispatchKeyEvent", type="keyUp", **key)

    def size(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """The size of the window, and whether its owner likes it dark."""
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path, *, whole: bool = True) -> Path:
        """The page as PNG, or what the window shows of it."""
        data = self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path
