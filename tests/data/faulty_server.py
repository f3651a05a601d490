"""A web server that fails as web servers do: stalls, drops, truncates, corrupts, refuses, drips."""

import contextlib
import http.server
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACE = 0.02


class Faults:
    """What goes wrong with which file: `faults["a.tar"] = ["stall", "500"]` for its first two GETs, then it is well.

    A last "..." repeats the one before for ever. asked: every request, as "GET a.tar" or "GET a.tar bytes=5-".
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.plan: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def __setitem__(self, name: str, faults: list[str]) -> None:
        self.plan[name] = faults

    def take(self, name: str) -> str:
        """The fault of this request, "" = none."""
        with self._lock:
            faults = self.plan.get(name) or [""]
            return faults[0] if faults[1:2] == ["..."] else faults.pop(0)

    def gets(self, ending: str = ".tar") -> Counter[str]:
        """How often each file was asked for."""
        names = [words[1] for words in map(str.split, self.asked) if words[0] == "GET"]
        return Counter(name for name in names if name.endswith(ending))


class _Handler(http.server.BaseHTTPRequestHandler):
    folder: Path
    faults: Faults

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):
            self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        name = self.path.strip("/").partition("?")[0]
        given = self.headers.get("Range", "")
        self.faults.asked.append(f"{self.command} {name} {given}".strip())
        fault = self.faults.take(name) if body else ""
        path = self.folder / name
        if fault.isdigit() or not path.exists():
            self.send_error(int(fault or 404))
            return
        if fault == "silent":
            self.faults.ended.wait(60)
            return
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-", given)
        begin = int(match[1]) if match and fault != "no-range" else 0
        self._headers(data, begin, fault)
        if body:
            self._body(data[begin:], fault)

    def _headers(self, data: bytes, begin: int, fault: str) -> None:
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        length = len(data) - begin
        self.send_header("Content-Length", str(length // 2 if fault == "short" else length))
        if fault != "plain":
            self.send_header("ETag", '"changed"' if fault == "changed" else f'"{hash(data)}"')
        self.end_headers()

    def _body(self, data: bytes, fault: str) -> None:
        half = len(data) // 2
        if fault == "corrupt":
            data = data[:half] + bytes(255 - byte for byte in data[half : half + 400]) + data[half + 400 :]
        if fault in ("drop", "short", "stall", "plain"):
            data = data[:half]
        if fault != "drip":
            self.wfile.write(data)
        for position in range(len(data) if fault == "drip" else 0):
            if self.faults.ended.wait(PACE):
                return
            self.wfile.write(data[position : position + 1])
        if fault == "stall":
            self.faults.ended.wait(60)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Faults]:
    """Serve a folder."""
    handler = type("Handler", (_Handler,), {"folder": folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        faults = handler.faults = Faults(f"http://127.0.0.1:{server.server_port}")
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield faults
        finally:
            faults.ended.set()
            server.shutdown()
