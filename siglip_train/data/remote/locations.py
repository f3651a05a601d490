"""Expands what a user writes for `shards` into the names of all shards: paths, folders, brace lists, globs, URLs."""

import getpass
import glob
import hashlib
import os
import stat
import tempfile
from pathlib import Path

import braceexpand
import fsspec

from siglip_train.errors import UserError, said
from siglip_train.redact import redacted

_TAR_ENDINGS = ("*.tar", "*.tar.gz", "*.tgz")
# they ask for bytes and nothing else; others of fsspec's open files by templates, or unpickle what a server sends
_PLAIN_PROTOCOLS = {"file", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"}
# the folder of the cache where copies of shards lie
COPIES = "copies"


def default_cache() -> Path:
    """Where downloads, unpacked tars and indexes go unless the user says otherwise."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # a container without an entry for this user id
        user = str(os.getuid())
    return Path(tempfile.gettempdir()) / f"siglip-train-{user}"


def cache_folder(named: str | Path | None) -> Path:
    """The folder of the cache that a user names, made where it is missing; None = the usual one, this user's alone.

    Raises `UserError`.
    """
    folder = Path(named).expanduser() if named else default_cache()
    try:
        # what a user names may be meant for a team
        folder.mkdir(parents=True, exist_ok=True, mode=0o777 if named else 0o700)
        owner = "" if named else _other_owner(folder)
    except OSError as error:
        # found later, it would look like a fault of every shard
        raise UserError(
            f"{folder} cannot be the cache's folder: {error.strerror}; name another one (data.cache_dir, --cache-dir)"
        ) from error
    if owner:
        raise UserError(
            f"{folder} cannot be the cache's folder: {owner}, who could put other samples in place of yours; "
            "remove it, or name another one (data.cache_dir, --cache-dir)"
        )
    return folder


def _other_owner(folder: Path) -> str:
    """Who beside this user has a say in a folder of a name that all can guess, "" = nobody; then none can read it."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "it is a link that somebody made"
    if found.st_uid != os.geteuid():
        return f"it belongs to another user (id {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it"
    if stat.S_IMODE(found.st_mode) != stat.S_IRWXU:
        # of an earlier version
        folder.chmod(stat.S_IRWXU)
    return ""


def expand(shards: str | list[str]) -> list[str]:
    """Paths, folders, brace lists, globs, `::`-joined lists and URLs to single shards, in the order given.

    Raises `UserError` that names the pattern nothing matches.
    """
    found = [shard for pattern in _patterns(shards) for shard in _expand_one(pattern)]
    if not found:
        raise UserError("the list of shards is empty; give a path, brace list, glob or URL")
    return found


def check_local(shards: str | list[str]) -> None:
    """Raise `UserError` that names a local path or pattern nothing matches; URLs and commands are not asked."""
    for pattern in _patterns(shards):
        if not is_remote(pattern):
            _expand_one(pattern)


def _patterns(shards: str | list[str]) -> list[str]:
    patterns = [shards] if isinstance(shards, str) else list(shards)
    return [part.strip() for pattern in patterns for part in str(pattern).split("::")]


def _expand_one(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return _expand_local(os.path.expanduser(pattern))
    expanded = _braces(pattern) if "{" in pattern else [pattern]
    if is_pipe(pattern) or is_http(pattern):
        return expanded
    try:
        # names the package to install, or the unknown protocol, before anything is asked for
        fsspec.get_filesystem_class(pattern.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot read {pattern}: {error}") from error
    return [shard for url in expanded for shard in _expand_remote(url)]


def is_remote(shard: str) -> bool:
    """Is it a URL or a command, not a path?"""
    return is_pipe(shard) or "://" in shard


def is_pipe(shard: str) -> bool:
    """Is it the output of a command?"""
    return shard.startswith("pipe:")


def is_http(shard: str) -> bool:
    """Is it on a web server?"""
    return shard.startswith(("http://", "https://"))


def runs_a_program(pattern: str) -> bool:
    """Could what stands for `shards` do more than ask for bytes: by a command, or a protocol that is not plain?"""
    for part in _patterns(pattern):
        protocol, mark, _ = part.partition("://")
        if is_pipe(part) or (mark and protocol.lower() not in _PLAIN_PROTOCOLS):
            return True
    return False


def short_name(shard: str) -> str:
    """The file name of a shard without secrets, as it stands in messages."""
    shown = redacted(unsigned(shard))
    return shown.rstrip("/").rsplit("/", 1)[-1] or shown


def unsigned(shard: str) -> str:
    """The URL of a shard without its query, which may hold a signature that changes; paths and commands as they are."""
    return shard.partition("?")[0] if is_remote(shard) and not is_pipe(shard) else shard


def lasting_name(shard: str) -> str:
    """What a shard is called where it is written down for later runs: without secrets, the same when they change."""
    if is_pipe(shard):
        # what is a secret in a command is a guess, and two commands may differ in that alone
        return f"pipe:{hashlib.sha256(shard.encode()).hexdigest()[:24]}"
    return redacted(unsigned(shard))


def beside(shard: str, name: str) -> str | None:
    """The URL of another file in the folder of a remote shard, None = a command, which has no folder."""
    if is_pipe(shard):
        return None
    path, mark, query = shard.partition("?")
    return path.rpartition("/")[0] + "/" + name + mark + query


def _expand_remote(url: str) -> list[str]:
    # to ask for every URL whether it is a folder would take long
    is_folder = url.endswith("/")
    if not is_folder and not glob.has_magic(url):
        return [url]
    filesystem, path = filesystem_of(url)
    try:
        patterns = [f"{path.rstrip('/')}/{ending}" for ending in _TAR_ENDINGS] if is_folder else [path]
        matches = sorted({match for pattern in patterns for match in filesystem.glob(pattern)})
    except Exception as error:  # whatever the filesystem behind the URL raises
        raise UserError(f"cannot list {url}: {said(error)}") from error
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
        # a file may be called what would be a command
        found += [f"./{match}" if is_pipe(match) else match for match in matches]
    return found


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"cannot expand the braces of {pattern}: {error}") from error


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's filesystem of a URL and the path in it. Raises `UserError`."""
    if "::" in url:
        # written out it separates shards; what braces or a listing bring would be a chain of filesystems
        raise UserError(f"cannot read {url}: a name of a shard holds no ::")
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        # names the package to install, or the unknown protocol
        raise UserError(f"cannot read {url}: {error}") from error
