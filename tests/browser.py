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

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


class Browser:
    """with Browser() as page: page.open(file or address); page.run("document.title"); page.move(x, y); page.picture(png)
    requests: every address that the page asked for; errors: uncaught exceptions and refused loads."""

    def __init__(self, width=1280, height=900):
        self.size, self.count, self.rest = (width, height), 0, b""
        self.requests, self.errors, self.loaded = [], [], False

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        its_in, self.out = os.pipe()
        self.inp, its_out = os.pipe()
        flags = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--user-data-dir={self.profile.name}",
            "--remote-debugging-pipe",
            "about:blank",
        )
        its_ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (its_in, its_out)]

        def as_3_and_4():  # where Chromium expects its pipe
            for end, number in zip(its_ends, (3, 4)):
                os.dup2(end, number)

        self.process = subprocess.Popen(
            [CHROMIUM, *flags],
            preexec_fn=as_3_and_4,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (its_in, its_out, *its_ends):
            os.close(end)
        self.session = None
        (target,) = (
            t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"
        )
        self.session = self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(*self.size)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.inp)
        self.profile.cleanup()

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        os.write(
            self.out,
            json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode()
            + b"\0",
        )
        while (answer := self._read()).get("id") != self.count:
            self._event(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self):
        while b"\0" not in self.rest:
            data = os.read(self.inp, 1 << 20)
            assert data, "the browser has ended"
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def _event(self, event):
        kind, params = event.get("method"), event.get("params", {})
        self.loaded |= kind == "Page.loadEventFired"
        if kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif (
            kind == "Runtime.exceptionThrown"
            or kind == "Log.entryAdded"
            and params["entry"]["level"] == "error"
        ):
            self.errors.append(params)

    def resize(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def open(self, file):
        """A Path, or an address as text."""
        self.loaded = False
        self.call("Page.navigate", url=file if isinstance(file, str) else file.resolve().as_uri())
        while not self.loaded:
            self._event(self._read())

    def run(self, script):
        """The value of a JavaScript expression."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def move(self, x, y, kind="mouseMoved"):
        self.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button="none" if kind == "mouseMoved" else "left",
            clickCount=0 if kind == "mouseMoved" else 1,
        )

    def click(self, x, y):
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.move(x, y, kind)

    def place(self, selector, n=0):
        """The middle of the n-th element that a selector finds, scrolled into view."""
        return self.run(f"""(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{n}];
            e.scrollIntoView({{block: "center"}}); const b = e.getBoundingClientRect();
            return [b.x + b.width / 2, b.y + b.height / 2] }})()""")

    def picture(self, path, whole=False):
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)[
            "data"
        ]
        path.write_bytes(base64.b64decode(data))


if __name__ == "__main__":
    with Browser() as shown:
        shown.open(Path(sys.argv[1]))
        shown.run("; ".join(sys.argv[3:]))
        shown.picture(Path(sys.argv[2]))
