"""From what a user writes for `shards` to plain tar files on this machine: patterns, URLs, gzip, download cache."""

import contextlib
import fcntl
import getpass
import glob
import hashlib
import itertools
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import braceexpand
import fsspec

from siglip_train.errors import UserError

_TAR_ENDINGS = ("*.tar", "*.tar.gz", "*.tgz")
_CHUNK = 1 << 20
# of a gzip stream at a time, which unpacks to a thousand times as much at most
_PACKED_CHUNK = 1 << 14
# zlib's code for "a gzip header and the largest window"
_GZIP = 31
_ATTEMPTS = 3
# of silence on a connection, not of the whole transfer
_TIMEOUT_SECONDS = 60


def default_cache() -> Path:
    """Where downloads, unpacked tars and indexes go unless the user says otherwise."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # a container without an entry for this user id
        user = str(os.getuid())
    return Path(tempfile.gettempdir()) / f"siglip-train-{user}"


def expand(shards: str | list[str]) -> list[str]:
    """Paths, folders, brace lists, globs, `::`-joined lists and URLs to single shards, in the order given.

    Raises `UserError` that names the pattern nothing matches.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    found = [
        shard
        for pattern in patterns
        for part in str(pattern).split("::")
        for shard in _expand_one(part.strip())
    ]
    if not found:
        raise UserError("the list of shards is empty; give a path, brace list, glob or URL")
    return found


def _expand_one(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return _expand_local(os.path.expanduser(pattern))
    expanded = list(braceexpand.braceexpand(pattern)) if "{" in pattern else [pattern]
    if pattern.startswith(("pipe:", "http://", "https://")):
        return expanded
    return [shard for url in expanded for shard in (_glob_remote(url) if glob.has_magic(url) else [url])]


def is_remote(shard: str) -> bool:
    """Is it a URL or a command, not a path?"""
    return shard.startswith("pipe:") or "://" in shard


def _glob_remote(url: str) -> list[str]:
    filesystem, path = _filesystem(url)
    matches = sorted(filesystem.glob(path))
    if not matches:
        raise UserError(f"no shard matches {url}")
    return [filesystem.unstrip_protocol(match) for match in matches]


def _expand_local(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        inside = sorted(str(path) for ending in _TAR_ENDINGS for path in Path(pattern).glob(ending))
        if not inside:
            raise UserError(f"no shard in folder {pattern}; it holds neither {' nor '.join(_TAR_ENDINGS)}")
        return inside
    if os.path.exists(pattern):
        return [pattern]
    found = []
    for path in _braces(pattern):
        matches = sorted(glob.glob(path)) if glob.has_magic(path) else [path] * os.path.exists(path)
        if not matches:
            raise UserError(f"no shard matches {path}" + (f" (from {pattern})" if path != pattern else ""))
        found += matches
    return found


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"cannot expand the braces of {pattern}: {error}") from error


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        # names the package to install, or the unknown protocol
        raise UserError(f"cannot read {url}: {error}") from error


class _Remote(NamedTuple):
    """An open stream of bytes; `version` changes when the content does, `length` is -1 where unknown."""

    stream: IO[bytes]
    version: str
    length: int = -1


def local_tar(shard: str, cache: Path) -> Path:
    """A plain tar on this machine with the content of a shard.

    A local plain tar is used where it is. Everything else is copied into `cache` once: the copy is made under a
    lock and renamed when complete, so any number of workers and ranks may ask at the same time. A gzip stream that
    breaks off is kept as far as it goes; `was_damaged` tells. Raises `UserError`.
    """
    try:
        if not is_remote(shard):
            return _plain(Path(shard), cache)
        return _retried(lambda: _fetched(shard, cache))
    except UserError:
        raise
    except Exception as error:  # whatever the filesystem behind the URL raises
        raise UserError(f"cannot read shard {shard}: {type(error).__name__}: {error}") from error


def was_damaged(path: Path) -> bool:
    """Did `local_tar` keep what could be unpacked of a broken gzip stream?"""
    return path.name.endswith(".damaged.tar")


def _plain(path: Path, cache: Path) -> Path:
    with path.open("rb") as stream:
        if stream.read(2) != b"\x1f\x8b":
            return path
        stream.seek(0)
        stat = path.stat()
        return _copied(_Remote(stream, f"{stat.st_size} {stat.st_mtime_ns}"), str(path.absolute()), cache)


def _retried(fetch: Callable[[], Path]) -> Path:
    for attempt in range(1, _ATTEMPTS):
        try:
            return fetch()
        except (UserError, FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise
            # networks fail for a moment; the last attempt may raise
            time.sleep(0.5 * 2**attempt)
    return fetch()


def _fetched(shard: str, cache: Path) -> Path:
    if shard.startswith("pipe:"):
        # a command has no version; do not start it where its output is known
        known = _existing(_cached_name(shard, "", cache))
        if known is not None:
            return known
    with _opened(shard) as remote:
        return _copied(remote, shard, cache)


@contextlib.contextmanager
def _opened(shard: str) -> Iterator[_Remote]:
    if shard.startswith("pipe:"):
        with subprocess.Popen(shard[len("pipe:") :], shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield _Remote(_Checked(process), "")  # type: ignore[arg-type]
    elif shard.startswith(("http://", "https://")):
        with urllib.request.urlopen(shard, timeout=_TIMEOUT_SECONDS) as response:
            marks = [response.headers.get(name, "") for name in ("ETag", "Last-Modified", "Content-Length")]
            yield _Remote(response, " ".join(marks), int(marks[-1] or -1))
    else:
        filesystem, path = _filesystem(shard)
        with filesystem.open(path, "rb") as stream:
            yield _Remote(stream, filesystem.ukey(path))


class _Checked:
    """The output of a command; its end is an error where the command failed."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if not data and self._process.wait() != 0:
            raise OSError(f"the command ended with status {self._process.returncode}")
        return data


def _cached_name(shard: str, version: str, cache: Path) -> Path:
    digest = hashlib.sha256(f"{shard}\0{version}".encode()).hexdigest()[:32]
    return cache / "shards" / f"{digest}.tar"


def _existing(target: Path) -> Path | None:
    return next((path for path in (target, target.with_suffix(".damaged.tar")) if path.exists()), None)


def _copied(remote: _Remote, shard: str, cache: Path) -> Path:
    target = _cached_name(shard, remote.version, cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        existing = _existing(target)
        if existing is not None:
            return existing
        temporary = target.with_suffix(".part")
        with temporary.open("wb") as out:
            intact = _unpack(_chunks(remote), out)
        final = target if intact else target.with_suffix(".damaged.tar")
        os.replace(temporary, final)
        return final


def _chunks(remote: _Remote) -> Iterator[bytes]:
    total = 0
    while data := remote.stream.read(_CHUNK):
        total += len(data)
        yield data
    if remote.length not in (-1, total):
        raise OSError(f"connection lost after {total} of {remote.length} bytes")


def _unpack(chunks: Iterator[bytes], out: IO[bytes]) -> bool:
    """Write a stream, gunzipped if it is gzip; False where the gzip stream is damaged."""
    first = next(chunks, b"")
    chunks = itertools.chain([first], chunks)
    if first[:2] == b"\x1f\x8b":
        return _gunzip(chunks, out)
    out.writelines(chunks)
    return True


def _gunzip(chunks: Iterator[bytes], out: IO[bytes]) -> bool:
    unpacker = zlib.decompressobj(wbits=_GZIP)
    for piece in (
        chunk[at : at + _PACKED_CHUNK] for chunk in chunks for at in range(0, len(chunk), _PACKED_CHUNK)
    ):
        data = piece
        while data:
            if unpacker.eof:
                # gzip files may be several streams in a row
                unpacker = zlib.decompressobj(wbits=_GZIP)
            before = unpacker.copy()
            try:
                out.write(unpacker.decompress(data))
            except zlib.error:
                _salvage(before, data, out)
                return False
            # what follows the end of a stream; zeros are padding
            data = unpacker.unused_data.lstrip(b"\0")
    return unpacker.eof


def _salvage(unpacker: Any, data: bytes, out: IO[bytes]) -> None:
    """Byte by byte up to the damage, because zlib gives nothing of the call in which it meets one."""
    with contextlib.suppress(zlib.error):
        for position in range(len(data)):
            out.write(unpacker.decompress(data[position : position + 1]))
