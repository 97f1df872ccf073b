"""A headless Chromium that a test drives over the DevTools protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from conftest import PATIENCE_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --disable-sync"
    " --disable-background-networking --disable-component-update --remote-debugging-port=0"
)


class Browser:
    """One page. `async with Browser() as page: await page.open(address)`."""

    async def __aenter__(self) -> "Browser":
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS.split(), f"--user-data-dir={self._folder.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = Path(self._folder.name) / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE_S
        while not (port_file.exists() and len(port_file.read_text().split()) == 2):
            assert time.monotonic() < deadline, "chromium did not start"
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as response:
            target = next(t for t in await response.json() if t["type"] == "page")
        self._socket = await self._session.ws_connect(
            target["webSocketDebuggerUrl"], max_msg_size=1 << 26
        )
        self._n = 0
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        self._process.terminate()
        self._process.wait(10)
        self._folder.cleanup()

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the result of one call; note what the console says meanwhile."""
        self._n += 1
        await self._socket.send_json({"id": self._n, "method": method, "params": params})
        while True:
            message = json.loads((await self._socket.receive(30)).data)
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(message["params"])[:400])
            if message.get("id") == self._n:
                assert "error" not in message, message
                return message["result"]

    async def open(self, address: str, width=1000, height=760, *, dark=False) -> None:
        """Open a page in a window of a size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])
        await self.send("Page.navigate", url=address)
        await self.until("document.readyState === 'complete' && typeof model === 'string' && model")

    async def run(self, script: str) -> Any:
        """Return the value of an expression."""
        done = await self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    async def until(self, script: str, seconds: float = PATIENCE_S) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while True:
            done = await self.send(
                "Runtime.evaluate", expression=f"Boolean({script})", returnByValue=True
            )
            if done["result"].get("value") is True:
                return
            assert time.monotonic() < deadline, f"not true in time: {script}"
            await asyncio.sleep(0.03)

    async def type(self, text: str) -> None:
        """Type into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key: Enter, Escape, ArrowUp; modifiers: 1 Alt, 8 Shift."""
        codes = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "n": 78}
        event = {
            "key": key,
            "modifiers": modifiers,
            "windowsVirtualKeyCode": codes[key],
            **({"text": "\r"} if key == "Enter" else {}),
        }
        await self.send("Input.dispatchKeyEvent", type="keyDown", **event)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    async def click(self, selector: str, text: str = "") -> None:
        """Click with the mouse on the last visible element with this text."""
        where = await self.run(
            f"(() => {{ const found = [...document.querySelectorAll({selector!r})].filter("
            f"e => e.offsetParent && e.textContent.includes({text!r}));"
            " const box = found[found.length - 1].getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send(
                "Input.dispatchMouseEvent",
                type=kind,
                x=where[0],
                y=where[1],
                button="left",
                clickCount=1,
            )

    async def screenshot(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        shot = await self.send("Page.captureScreenshot", format="png", optimizeForSpeed=False)
        path.write_bytes(base64.b64decode(shot["data"]))
