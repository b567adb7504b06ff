"""Headless Chromium for the tests, driven through the DevTools protocol over a pipe."""

import base64
import contextlib
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome")
                 if (path := shutil.which(name))), None)
TIMEOUT = 120  # seconds, for a busy machine


class Browser:
    """One process with one page. `errors` collects what the page logs as an error or throws; `requests` the
    addresses that it asks for."""

    def __init__(self, *flags):
        self.folder = tempfile.mkdtemp()
        read_commands, self.commands = os.pipe()
        self.answers, write_answers = os.pipe()

        def set_up_pipes():  # the protocol uses the descriptors 3 and 4
            high = [os.dup(read_commands), os.dup(write_answers)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--remote-debugging-pipe", f"--user-data-dir={self.folder}", *flags, "about:blank"],
            preexec_fn=set_up_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read_commands)
        os.close(write_answers)
        self.replies = queue.Queue()
        self.errors = []
        self.requests = []
        self.number = 0
        self.session = None
        threading.Thread(target=self._listen, daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _listen(self):
        with os.fdopen(self.answers, "rb") as pipe:
            rest = b""
            while data := pipe.read1(1 << 20):
                *messages, rest = (rest + data).split(b"\0")
                for message in messages:
                    self._receive(json.loads(message))

    def _receive(self, message):
        values = message.get("params", {})
        if "id" in message:
            self.replies.put(message)
        elif message["method"] == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"]))
        elif message["method"] == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(values["entry"]["text"])
        elif message["method"] == "Runtime.consoleAPICalled":
            self.errors.append(json.dumps(values["args"]))
        elif message["method"] == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.replies.get(timeout=TIMEOUT)
            if reply["id"] == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def open(self, address):
        self.call("Page.navigate", url="about:blank")
        self.errors.clear()
        self.requests.clear()
        self.call("Page.navigate", url=address)

    def run(self, script):
        """The value of a JavaScript expression, a promise's too. Raises AssertionError if it throws."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition, seconds=TIMEOUT):
        """Wait until a JavaScript expression is true."""
        assert self.run(f"""new Promise(done => {{
            const end = Date.now() + {seconds * 1000};
            const look = () => {{
                let value = false;
                try {{ value = {condition}; }} catch {{}}
                value || Date.now() > end ? done(Boolean(value)) : setTimeout(look, 20);
            }};
            look();
        }})"""), f"never true: {condition}; errors: {self.errors}"

    def press(self, key):
        code = {"Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37, "Tab": 9}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, path, width, height, scale=1, mobile=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=mobile)
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        with contextlib.suppress(AssertionError, queue.Empty, OSError):
            os.write(self.commands, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.commands)
        shutil.rmtree(self.folder, ignore_errors=True)
