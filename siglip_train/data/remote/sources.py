"""Reads the bytes of a remote shard: from a web server, a filesystem of fsspec or a command."""

import base64
import contextlib
import os
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from multiprocessing.util import Finalize
from typing import NamedTuple

from fsspec import AbstractFileSystem

from siglip_train.data.remote.locations import filesystem_of, is_http, is_pipe
from siglip_train.errors import UserError

_CHUNK = 1 << 20
# nothing of a block is seen before it is whole; those of S3 would be 50 MiB, too long a silence on a slow line
_BLOCK = 4 << 20
# how stores call what changes with the content alone: S3, the hub, GCS, Azure, files, and what writes them in memory
_MARKS = ("ETag", "blob_id", "generation", "etag", "mtime", "created")


class Start(NamedTuple):
    """What a source says first.

    version: changes with the content. position: of the first byte that follows. length: of the whole, -1 = unknown.
    resumable: may a later attempt go on in the middle?
    """

    version: str
    position: int = 0
    length: int = -1
    resumable: bool = False


Items = Iterator[Start | bytes]


def source(shard: str, position: int, known: Start, timeout: float) -> tuple[Items, Callable[[], None]]:
    """The start and then the bytes of a shard, from `position` on where that can be done.

    Beside them a function that frees a thread which is stuck in them, as far as that is possible.
    """
    if is_pipe(shard):
        command = shard[len("pipe:") :]
        # a session of its own, so that its children can be killed with it
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
        # also at the end of this process, which waits for no thread
        kill = Finalize(None, _kill, args=(process,), exitpriority=1)
        return _from_command(process, kill), kill
    if is_http(shard):
        # who waits gives up first, and says why; the connection ends later, and the thread with it
        return _from_http(shard, position, 2 * timeout), lambda: None
    return _from_filesystem(shard, position, known.version), lambda: None


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _from_command(process: subprocess.Popen, kill: Finalize) -> Items:
    yield Start("")
    assert process.stdout is not None
    with process.stdout as stream:
        while data := stream.read1(_CHUNK):  # type: ignore[attr-defined]
            yield data
    status = process.wait()
    kill.cancel()
    if status != 0:
        raise OSError(f"the command ended with status {status}")


def _from_http(shard: str, position: int, timeout: float) -> Items:
    request = _request(shard)
    if position:
        request.add_header("Range", f"bytes={position}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if not position or error.code != 416:
            raise
        # it has become shorter
        response = urllib.request.urlopen(_request(shard), timeout=timeout)
    with response:
        yield _http_start(response)
        # read1 gives what there is; read would wait for a whole chunk
        while data := response.read1(_CHUNK):
            yield data


def _request(url: str, method: str = "GET") -> urllib.request.Request:
    """A request, with the user and password of `https://user:password@host/…` in its header, as servers expect them."""
    parts = urllib.parse.urlsplit(url)
    user_info, mark, host = parts.netloc.rpartition("@")
    if not mark:
        return urllib.request.Request(url, method=method)
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), method=method)
    given = base64.b64encode(urllib.parse.unquote(user_info).encode()).decode()
    # not for whomever the server sends this request on to
    request.add_unredirected_header("Authorization", f"Basic {given}")
    return request


def _http_start(response: HTTPResponse) -> Start:
    marks = [response.headers.get(name, "") for name in ("ETag", "Last-Modified")]
    position, length = 0, response.headers.get("Content-Length", "")
    if response.status == 206:
        # bytes 100-999/1000
        place, _, length = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        position = int(place.partition("-")[0])
    total = int(length) if length.isdigit() else -1
    return Start(" ".join([*marks, length]), position, total, resumable=any(marks))


def _from_filesystem(shard: str, position: int, known: str) -> Items:
    filesystem, path = filesystem_of(shard)
    version = _version(filesystem, path)
    try:
        with filesystem.open(path, "rb", block_size=_BLOCK) as stream:
            begin = position if version == known else 0
            if begin:
                stream.seek(begin)
            yield Start(version, begin, getattr(stream, "size", None) or -1, resumable=True)
            while data := stream.read(_CHUNK):
                yield data
    finally:
        # a listing is kept for good: what it says of this object may be true no more
        filesystem.invalidate_cache(path)
    # some stores go on in another object without a word, and its bytes would pass for those of this one
    if _version(filesystem, path) != version:
        raise ConnectionError("it changed while it was fetched")


def _version(filesystem: AbstractFileSystem, path: str) -> str:
    """The mark of an object's content: its other facts differ between a listing and a question for it alone."""
    facts = filesystem.info(path)
    if facts.get("type") == "directory":
        raise UserError(
            f"{filesystem.unstrip_protocol(path)} is a folder: end it with a slash, or name its shards"
        )
    marks = [f"{facts[name]} {facts['size']}" for name in _MARKS if facts.get(name)]
    return marks[0] if marks else str(filesystem.ukey(path))


def heading(shard: str, timeout: float) -> Items:
    """The start alone, by a small request, of a shard that is no command."""
    if not is_http(shard):
        filesystem, path = filesystem_of(shard)
        yield Start(_version(filesystem, path))
        return
    try:
        response = urllib.request.urlopen(_request(shard, "HEAD"), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code >= 500 and error.code != 501:
            raise
        # an address signed for reading alone, or a server that knows no more
        response = urllib.request.urlopen(_request(shard), timeout=timeout)
    with response:
        yield _http_start(response)
