"""Files at URLs, such as s3://bucket/folder and https://host/file, by ``fsspec``: listed, and read in retried blocks.

Credentials come from the environment or from fsspec's own configuration, and enter no message.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

import fsspec

from train.data.sources.problems import BadText
from train.util.extra_packages import require_extra
from train.util.redact import redact

BLOCK = 8 << 20
"""Bytes of a file that are asked for at once."""
PAUSES_S = (0.2, 1.0, 4.0, 10.0)
"""Seconds between attempts at a request that fails."""
_TIMEOUT_S = 30
"""Seconds that a server may be silent before a request is made again."""
_NEEDS = {"s3": "s3fs", "s3a": "s3fs", "http": "aiohttp", "https": "aiohttp"}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, ImportError)
"""Errors that another attempt does not mend."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL: its name below what was asked for, its size in bytes (0: not told), and a number for its
    version.
    """

    url: str
    name: str
    size: int
    version: int


def is_url(path: str) -> bool:
    """Whether an entry of data.paths is a URL, not a path."""
    return _URL.match(path) is not None


def find_files(url: str) -> list[RemoteFile]:
    """The file of that URL, those below a folder, or those that a pattern matches, by name. Raises BadText."""
    files, root = _connect(url)

    def find() -> dict[str, Any]:
        files.invalidate_cache()
        if any(sign in root for sign in "*?["):
            found: dict[str, Any] = files.glob(root, detail=True)
            return {path: entry for path, entry in found.items() if entry["type"] == "file"}
        found = files.find(root, detail=True)
        if found or _protocol(url) in ("http", "https"):
            return found or {root: files.info(root)}
        files.ls(root)  # it raises what find keeps silent about: no such bucket, no access
        return found

    base = root.rstrip("/")
    if any(sign in root for sign in "*?["):
        base = root[: min(root.find(sign) for sign in "*?[" if sign in root)].rpartition("/")[0]
    found = _try_repeatedly(url, find)
    return [_remote_file(files, path, found[path], base) for path in sorted(found) if not path.endswith("/")]


def _remote_file(files: Any, path: str, entry: dict[str, Any], base: str) -> RemoteFile:
    name = path.removeprefix(base).lstrip("/") or base.rpartition("/")[2]
    version = [str(entry.get(key)) for key in ("ETag", "etag", "LastModified", "mtime", "last_modified", "size")]
    number = int.from_bytes(sha256("\0".join(version).encode()).digest()[:7], "big")
    return RemoteFile(files.unstrip_protocol(path), name, int(entry.get("size") or 0), number)


def read_blocks(url: str) -> Iterator[bytes]:
    """The bytes of a file in blocks; a block that fails, or comes cut short, is asked for again. Raises BadText."""
    files, path = _connect(url)
    about = _try_repeatedly(url, lambda: files.info(path))
    size, in_parts = about.get("size"), about.get("partial", _protocol(url) not in ("http", "https"))
    stream: Any = None
    done = 0

    def read_next() -> bytes:
        nonlocal stream
        wanted = BLOCK if size is None else min(BLOCK, size - done)
        try:
            if stream is None:
                stream = files.open(path, mode="rb", block_size=BLOCK if in_parts else 0, cache_type="none")
                _skip(stream, done)
            block = _read(stream, wanted)
            if size is not None and len(block) < wanted:
                raise OSError(f"the server sent {len(block):,} of {wanted:,} bytes")
        except Exception:
            stream = None  # the next attempt opens it anew
            raise
        return block

    while size is None or done < size:
        block = _try_repeatedly(url, read_next)
        if not block:
            return
        yield block
        done += len(block)


def _read(stream: Any, wanted: int) -> bytes:
    """So many bytes, or all that are left: a stream gives what has just arrived."""
    parts = list[bytes]()
    while wanted and (part := stream.read(wanted)):
        parts.append(part)
        wanted -= len(part)
    return b"".join(parts)


def _skip(stream: Any, count: int) -> None:
    """Go to a position; a server that gives no parts of a file sends it anew."""
    if not count:
        return
    if stream.seekable():
        stream.seek(count)
        return
    while count:
        count -= len(_read(stream, min(BLOCK, count))) or count


def _protocol(url: str) -> str:
    return url.partition("://")[0]


def _connect(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. Raises BadText."""
    protocol = _protocol(url)
    if package := _NEEDS.get(protocol):
        require_extra(package, f"{url}: text at {protocol}://")
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a") and "config_kwargs" not in fsspec.config.conf.get("s3", {}):
        timeouts = {"connect_timeout": _TIMEOUT_S, "read_timeout": _TIMEOUT_S}
        options["config_kwargs"] = {**timeouts, "retries": {"max_attempts": 1}}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except Exception as error:  # each file system has errors of its own
        raise BadText(url, f"cannot be opened: {_in_words(error)}") from None


def _try_repeatedly(url: str, operation: Callable[[], Result]) -> Result:
    """The result of an operation that may fail for a while. Raises BadText, with the last error."""
    for pause in (*PAUSES_S, None):
        try:
            return operation()
        except Exception as error:  # each file system has errors of its own
            if pause is None or isinstance(error, _FINAL):
                raise BadText(url, f"cannot be read: {_in_words(error)}") from None
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _in_words(error: Exception) -> str:
    words = {
        "NoCredentialsError": "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    }.get(type(error).__name__)
    return words or redact(" ".join(str(error).split()))[:300] or type(error).__name__
