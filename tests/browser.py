"""A headless Chromium, driven over its own debugging pipe: no driver, no package, no network.

python tests/browser.py PAGE.html PICTURE.png ["a JavaScript expression to run first"]
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
ITS_INPUT, ITS_OUTPUT = 3, 4  # the file descriptors that Chromium's debugging pipe uses
FIRST_FREE = 10  # a file descriptor that is above these two


def find_chromium() -> str | None:
    """Returns the path of an installed browser, or None."""
    for name in NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


CHROMIUM = find_chromium()


class Browser:
    """A page in a browser.

        with Browser() as page:
            page.open(file or address)
            page.run("document.title")

    requests  every address that the page asked for
    errors    uncaught exceptions, and what could not be loaded
    """

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self.width = width
        self.height = height
        self.requests: list[str] = []
        self.errors: list[dict] = []
        self.is_loaded = False
        self.session: str | None = None  # of the page; None: messages go to the browser itself
        self.last_id = 0  # of a message
        self.unread = b""  # of what the browser wrote

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        its_input, self.output = os.pipe()
        self.input, its_output = os.pipe()
        self._start(its_input, its_output)
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(self.width, self.height)
        return self

    def _start(self, its_input: int, its_output: int) -> None:
        # copies with high numbers, because the pipe's ends may be 3 and 4 themselves
        high_input = fcntl.fcntl(its_input, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)
        high_output = fcntl.fcntl(its_output, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)

        def put_them_where_chromium_looks() -> None:
            os.dup2(high_input, ITS_INPUT)
            os.dup2(high_output, ITS_OUTPUT)

        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"],
            preexec_fn=put_them_where_chromium_looks,
            pass_fds=(ITS_INPUT, ITS_OUTPUT),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (its_input, its_output, high_input, high_output):
            os.close(end)

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.output)
        os.close(self.input)
        self.profile.cleanup()

    # ------------------------------------------------------------ messages

    def call(self, method: str, **params: Any) -> dict:
        """Calls a method of the debugging protocol. Returns its result."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.output, json.dumps(message).encode() + b"\0")
        answer = self._read()
        while answer.get("id") != self.last_id:
            self._note(answer)
            answer = self._read()
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self) -> dict:
        """Returns the next message of the browser."""
        while b"\0" not in self.unread:
            data = os.read(self.input, 2**20)
            assert data, "the browser has ended"
            self.unread += data
        line, _, self.unread = self.unread.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict) -> None:
        kind = event.get("method")
        params = event.get("params", {})
        if kind == "Page.loadEventFired":
            self.is_loaded = True
        elif kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif kind == "Runtime.exceptionThrown" or is_logged_error(event):
            self.errors.append(params)

    # ------------------------------------------------------------ what a person does

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def open(self, page: Path | str) -> None:
        """Loads a file, or an address that is given as text."""
        url = page if isinstance(page, str) else page.resolve().as_uri()
        self.is_loaded = False
        self.call("Page.navigate", url=url)
        while not self.is_loaded:
            self._note(self._read())

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """Returns the text of an element."""
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def is_hidden(self, selector: str) -> bool:
        return self.run(f"document.querySelector({json.dumps(selector)}).hidden")

    def move(self, x: float, y: float) -> None:
        self._mouse("mouseMoved", x, y)

    def press(self, x: float, y: float) -> None:
        self._mouse("mousePressed", x, y)

    def release(self, x: float, y: float) -> None:
        self._mouse("mouseReleased", x, y)

    def click(self, x: float, y: float) -> None:
        self.move(x, y)
        self.press(x, y)
        self.release(x, y)

    def _mouse(self, kind: str, x: float, y: float) -> None:
        moves = kind == "mouseMoved"
        self.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button="none" if moves else "left",
            clickCount=0 if moves else 1,
        )

    def place(self, selector: str, n: int = 0) -> list[float]:
        """Returns the middle of the n-th element that a selector finds, scrolled into view."""
        element = f"document.querySelectorAll({json.dumps(selector)})[{n}]"
        return self.run(f"""(() => {{
            const element = {element};
            element.scrollIntoView({{block: "center"}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")

    def picture(self, file: Path, whole: bool = False) -> None:
        """Writes what is shown as PNG, or the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))


def is_logged_error(event: dict) -> bool:
    return event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"


if __name__ == "__main__":
    with Browser() as shown:
        shown.open(Path(sys.argv[1]))
        shown.run("; ".join(sys.argv[3:]))
        shown.picture(Path(sys.argv[2]))
