"""A stand-in of Hugging Face's hub: the part of its API that its own client asks when it lists and reads data sets."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_API = re.compile(r"/api/datasets/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/([\w.-]+)(?:/(.*))?)?$")
_FILE = re.compile(r"/datasets/([\w.-]+/[\w.-]+)/resolve/[\w.-]+/(.*)$")
_HASH = "0123456789abcdef0123456789abcdef01234567"


class _Handler(http.server.BaseHTTPRequestHandler):
    folder: Path
    asked: list[str]
    # of GETs for files: how many are refused before one is answered
    refuse: list[int]

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path.startswith("/api/"):
            self._ask(path, [])
        else:
            self._file(body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        given = json.loads(body) if body.startswith("{") else urllib.parse.parse_qs(body)
        self._ask(urllib.parse.unquote(self.path), given.get("paths", []))

    def _ask(self, path: str, paths: list[str]) -> None:
        found = _API.match(path)
        root = self.folder / found[1] if found else None
        if found is None or root is None or not root.is_dir():
            return self._missing("RepoNotFound")
        if found[2] == "paths-info":
            return self._json([_entry(root, root / name) for name in paths if (root / name).exists()])
        if found[2] != "tree":
            return self._json({"id": found[1], "sha": _HASH, "siblings": [], "private": False})
        folder = root / (found[4] or "")
        if not folder.is_dir():
            return self._missing("EntryNotFound")
        is_deep = "recursive=true" in self.path.lower()
        inside = folder.rglob("*") if is_deep else folder.iterdir()
        return self._json([_entry(root, each) for each in sorted(inside)])

    def _file(self, *, body: bool) -> None:
        found = _FILE.match(urllib.parse.unquote(urllib.parse.urlsplit(self.path).path))
        path = self.folder / found[1] / found[2] if found else self.folder / "nowhere"
        if not path.is_file():
            return self._missing("EntryNotFound")
        given = self.headers.get("Range", "")
        if body:
            self.asked.append(f"{path.name} {given}".strip())
            if self.refuse and self.refuse[0] > 0:
                self.refuse[0] -= 1
                return self.send_error(403)
        data = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", given)
        first, last = (int(span[1]), min(int(span[2]), len(data) - 1)) if span else (0, len(data) - 1)
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", _HASH)
        self.send_header("Content-Length", str(last + 1 - first))
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            with contextlib.suppress(OSError):
                self.wfile.write(data[first : last + 1])

    def _json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _missing(self, why: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", why)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


def _entry(root: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(root))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": _HASH}
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}


class Hub:
    """A hub that is served. asked: the reads of files, as "NAME bytes=0-9"; refuse: so many reads fail first."""

    def __init__(self, url: str, asked: list[str], refuse: list[int]) -> None:
        self.url, self.asked, self._refuse = url, asked, refuse

    def refuse(self, reads: int) -> None:
        """Answer so many reads of files with an error."""
        self._refuse[:] = [reads]


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Serve OWNER/NAME/FILE below `folder` as data sets, one revision each."""
    handler = type("Handler", (_Handler,), {"folder": folder, "asked": [], "refuse": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield Hub(f"http://127.0.0.1:{server.server_port}", handler.asked, handler.refuse)
        finally:
            server.shutdown()
