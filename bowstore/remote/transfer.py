"""Bytes from and to another machine through fsspec, tried again until they are whole.

The one place that knows fsspec's file systems, what its protocols raise, and which of that is worth another try.
"""

import functools
import inspect
import io
import os
import random
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, CorruptError, MismatchError, MissingError, TransferError, UsageError
from bowstore.files import file_digest, fsync_path, open_end
from bowstore.remote.answers import Answer, Body, Problem
from bowstore.remote.urls import WEB, protocol, shown

# What a broken connection loses, and what is held in memory; long enough that its round trip does not count.
BLOCK_BYTES = 8 << 20
_SMALL_BYTES = 64 << 20  # of a file that is read into memory: metadata of a store
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_NO_CONNECTION = {"ClientConnectorError", "EndpointConnectionError", "ConnectionRefusedError", "gaierror"}
_OTHER_BYTES = "other bytes"
# aiohttp's time-out for an answer runs while a part is sent, so parts are the smallest that S3 takes.
_PART_BYTES = 5 << 20
_SENT_IN_PARTS = {"s3fs": {"chunksize": _PART_BYTES, "max_concurrency": 1}, "gcsfs": {"chunksize": _PART_BYTES}}
# What S3 answers with status 400, by the status that it stands for.
_CODES = {"RequestTimeout": 408, "ExpiredToken": 401, "InvalidToken": 401, "TokenRefreshRequired": 401}
# Keys by which protocols say which version of a file this is, in small letters alone.
_VERSION_KEYS = ("etag", "lastmodified", "mtime", "modified", "created", "updated", "generation", "contentmd5")


@dataclass(frozen=True)
class RemoteFile:
    """What a server says of a file.

    Attributes:
        size_bytes: its length; None where the server does not say.
        version: whatever changes when the file does; equal dictionaries with an entry besides the size mean the
            same file.
    """

    size_bytes: int | None
    version: dict[str, str]

    @property
    def dated(self) -> bool:
        """Whether `version` can tell one file from another of the same size."""
        return set(self.version) > {"size"}


class Remote:
    """Reads and writes files of one protocol; safe to use from many threads.

    Attributes:
        stop: once set, transfers end at their next block.
    """

    def __init__(self, url: str, storage: StorageConfig) -> None:
        self._storage = storage
        self._parts: dict[str, Any] = _SENT_IN_PARTS.get(_PACKAGES.get(protocol(url), ""), {})
        self._fs = _file_system(protocol(url), storage.timeout_s, os.getpid())
        self.stop = threading.Event()

    def describe(self, url: str, *, retries: int | None = None) -> RemoteFile:
        """Ask for a file's length and version.

        Raises:
            MissingError: it is not there.
            TransferError: no access, or no answer.
        """
        tries = _Tries(url, self._storage, self.stop, retries)
        while True:
            try:
                info = self._fs.info(url)
            except Exception as error:  # noqa: BLE001 - every protocol has errors of its own
                tries.failed(error)
                continue
            if info.get("type") == "directory":
                raise MissingError(f"{shown(url)} is a folder, not a file; check the URL")
            version = {key: str(value) for key, value in info.items() if _plain(key) in _VERSION_KEYS and value}
            return RemoteFile(info.get("size"), {"size": str(info.get("size")), **version})

    def read(self, url: str, *, retries: int | None = None) -> bytes:
        """All bytes of a small file.

        Raises:
            MissingError: it is not there.
            TransferError: no access, or no answer.
        """
        tries = _Tries(url, self._storage, self.stop, retries)
        while True:
            try:
                data = self._read(url)
            except Exception as error:  # noqa: BLE001 - every protocol has errors of its own
                tries.failed(error)
                continue
            if len(data) > _SMALL_BYTES:
                raise TransferError(
                    f"{shown(url)}: the server sends more than {_SMALL_BYTES >> 20} MiB where a small file is "
                    f"expected; check the URL"
                )
            return data

    def _read(self, url: str) -> bytes:
        """A small file, or the start of a large one."""
        if protocol(url) not in WEB:
            return bytes(self._fs.cat_file(url))
        with closing(self._ask(url, 0, None)) as answer:
            return answer.read(_SMALL_BYTES + 1)

    def upload(self, url: str, data: bytes) -> None:
        """Write a file: whole, or not at all where the server is an object store.

        Raises:
            UsageError: a protocol that only reads.
            MissingError: no such bucket.
            TransferError: no access, no answer, or no end of broken transfers.
        """
        tries = _Tries(url, self._storage, self.stop, writing=True)
        while True:
            if self.stop.is_set():
                raise TransferError(f"{shown(url)}: stopped, because another transfer failed")
            try:
                self._fs.pipe_file(url, data, **self._parts)
                return
            except NotImplementedError as error:
                raise UsageError(f"{protocol(url)}:// cannot be written; s3:// and gs:// can") from error
            except Exception as error:  # noqa: BLE001 - every protocol has errors of its own
                tries.failed(error)

    def download(self, url: str, path: Path, *, size_bytes: int | None, digest: str | None = None) -> None:
        """Bring a file to `path`, going on from the bytes that lie there; fsynced, and checked.

        Args:
            url: the file.
            path: where it is wanted; no other process writes there.
            size_bytes: its length; None where nobody knows.
            digest: its xxh3-128 as hex, where it was recorded.

        Raises:
            MissingError: it is not there.
            MismatchError: it has another length.
            CorruptError: other bytes than recorded, however often they are read.
            TransferError: no access, no answer, or no end of broken transfers.
        """
        rounds, before = _Tries(url, self._storage, self.stop), None
        while True:
            with open_end(path) as file:
                for block in self._blocks(url, file.tell(), size_bytes):
                    file.write(block)
                    file.flush()  # what has arrived outlives this process
            found = file_digest(path) if digest else None
            if found == digest:
                fsync_path(path)
                return
            path.unlink()
            # The same wrong bytes twice: that is what the server holds.
            rounds.failed(Problem(_OTHER_BYTES, f"digest {found}, not {digest}", final=found == before))
            before = found

    def _blocks(self, url: str, done: int, size_bytes: int | None) -> Iterator[bytes]:
        """The bytes of a file from `done` on, at most a block at a time in memory."""
        tries = _Tries(url, self._storage, self.stop)
        answer: Answer | None = None  # of a server that sends all at once, or does not say how much that is
        try:
            while size_bytes is None or done < size_bytes:
                if self.stop.is_set():
                    raise TransferError(f"{shown(url)}: stopped at byte {done}, because another transfer failed")
                wanted = BLOCK_BYTES if size_bytes is None else min(BLOCK_BYTES, size_bytes - done)
                block, problem = b"", None
                try:
                    answer = answer or self._ask(url, done, None if size_bytes is None else done + wanted)
                    block, problem = answer.block(wanted, size_bytes)
                except Exception as error:  # noqa: BLE001 - every protocol has errors of its own
                    problem = error
                if answer and (problem or not answer.goes_on):
                    answer.close()
                    answer = None
                yield block
                done += len(block)
                if problem is None:
                    tries.succeeded()
                    if size_bytes is None and len(block) < wanted:
                        return
                else:
                    if isinstance(problem, Problem) or _status(problem) == 416:
                        self._check_length(url, size_bytes)
                    tries.failed(problem)
        finally:
            if answer:
                answer.close()

    def _ask(self, url: str, start: int, stop: int | None) -> Answer:
        """Ask for the bytes from `start` to `stop`, or for all from `start` on."""
        if protocol(url) not in WEB:
            if stop is None:
                return Answer(self._fs.open(url, "rb"), at=0, first=start, last=None)
            # By name: the places of these arguments differ between protocols.
            data = bytes(self._fs.cat_file(url, start=start, end=stop))
            whole = len(data) > stop - start  # of a protocol that knows no ranges
            return Answer(io.BytesIO(data), at=0 if whole else start, first=start, last=None if whole else stop)
        headers = dict(self._fs.kwargs.get("headers", {}))
        if stop is not None:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        # Without a size it would be asked for; with a block size the file would be read in pieces of that.
        file = self._fs.open(url, "rb", block_size=0, size=1, headers=headers)
        if file.r.status == 206:
            return Answer(Body(self._fs.loop, file), at=start, first=start, last=stop)
        return Answer(Body(self._fs.loop, file), at=0, first=start, last=None)

    def _check_length(self, url: str, size_bytes: int | None) -> None:
        """Refuse a file of another length, which no further try will mend."""
        found = self.describe(url).size_bytes
        if found is not None and found != size_bytes:
            raise MismatchError(
                f"{shown(url)} has {found} bytes, {size_bytes} were recorded: it changed, or was not copied whole; "
                f"copy the folder there again, index and all"
            )


class _Tries:
    """Counts failures in a row, waits longer after each, and says at the end what was wrong."""

    def __init__(
        self,
        url: str,
        storage: StorageConfig,
        stop: threading.Event,
        retries: int | None = None,
        *,
        writing: bool = False,
    ) -> None:
        self._url, self._stop, self._timeout_s, self._writing = url, stop, storage.timeout_s, writing
        self._retries = storage.retries if retries is None else retries
        self._failures = 0

    def succeeded(self) -> None:
        """Forget the failures: the transfer got on."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Wait, or raise what the user can meet."""
        if isinstance(error, MemoryError):  # no other try has more
            raise error
        self._failures += 1
        status = _status(error)
        hopeless = status is not None and 400 <= status < 500 and status not in (408, 429)
        if hopeless or self._failures > self._retries or (isinstance(error, Problem) and error.final):
            raise self._final(error, status) from error
        wait_s = min(_FIRST_WAIT_S * 2 ** (self._failures - 1), _LONGEST_WAIT_S)
        # Jitter: ranks that failed together do not come back together.
        if self._stop.wait(wait_s * random.uniform(0.5, 1.0)):
            raise self._final(error, status) from error

    def _final(self, error: Exception, status: int | None) -> BowstoreError:
        url, tries = shown(self._url), "1 try" if self._failures == 1 else f"{self._failures} tries"
        names = {type(cause).__name__ for cause in _causes(error)}
        first = list(_causes(error))[-1]  # fsspec's own messages may hold the URL with its secrets
        reason = " ".join(str(first).split()).replace(self._url, url)[:200] or type(first).__name__
        if status == 404 and self._writing:
            return MissingError(f"{url} cannot be written: there is no such bucket (404); make it, or check the URL")
        if status == 404:
            return MissingError(f"{url} is not there (404); check the URL, and that all files were copied there")
        if status in (401, 403):
            what = "written" if self._writing else "read"
            return TransferError(f"{url} may not be {what} ({status}, {tries}); check the credentials and the policy")
        if status is not None:
            return TransferError(f"{url}: the server answers {status} ({tries}); try again later")
        if isinstance(error, Problem) and error.what == _OTHER_BYTES:
            return CorruptError(f"{url} is not the file that was recorded ({reason}; {tries}); copy it there again")
        if isinstance(error, Problem):
            return TransferError(f"{url}: the server sends {reason} ({tries}); check the server, or try again later")
        if any("Timeout" in name for name in names):
            missing = "answer" if self._writing else "byte"
            return TransferError(
                f"{url}: no {missing} for {self._timeout_s:g} s ({tries}); try again later, or raise storage.timeout_s"
            )
        if names & _NO_CONNECTION:
            return TransferError(f"{url}: no connection ({reason}; {tries}); check the address and the network")
        return TransferError(
            f"{url}: the transfer broke off ({reason}; {tries}); run the command again to go on, or raise "
            f"storage.retries"
        )


def _plain(key: str) -> str:
    return "".join(c for c in key.lower() if c.isalnum())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: BaseException) -> int | None:
    """HTTP status of an error, found the way each protocol says it; 404 and 403 also of plain Python errors."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        response = response if isinstance(response, dict) else {}
        parts, code = response.get("ResponseMetadata", {}), response.get("Error", {}).get("Code")
        if code in _CODES:
            return _CODES[code]
        # aiohttp calls its own complaints about a broken answer `code` 400; of gcsfs that is the server's.
        code = getattr(cause, "code", None) if type(cause).__module__.startswith("gcsfs") else None
        for value in (getattr(cause, "status", None), code, parts.get("HTTPStatusCode")):
            if isinstance(value, int) and 400 <= value < 600:
                return value
    causes = list(_causes(error))
    if any("Credentials" in type(cause).__name__ for cause in causes):
        return 401
    if isinstance(error, PermissionError):
        return 403
    # fsspec's http says "not found" of everything that goes wrong; the cause tells more.
    return 404 if all(isinstance(cause, (FileNotFoundError, LookupError)) for cause in causes) else None


@functools.lru_cache
def _file_system(name: str, timeout_s: float, process: int) -> Any:
    """One instance a protocol and process (a forked child needs its own), with our time-outs and no own retries."""
    import fsspec  # and what it brings: a second, for those alone that go to a URL

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    configured = fsspec.config.conf.get(name, {})
    if name in ("http", "https"):
        import aiohttp

        patience = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        options["client_kwargs"] = {"timeout": patience, "trust_env": True, **configured.get("client_kwargs", {})}
        options["headers"] = {"Accept-Encoding": "identity", **configured.get("headers", {})}
    elif _PACKAGES.get(name) == "s3fs":
        patient = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = {**patient, **configured.get("config_kwargs", {})}
    elif name in ("file", "local"):
        options["auto_mkdir"] = True
    try:
        made = inspect.signature(fsspec.get_filesystem_class(name).__init__).parameters.values()
        required = (p.name for p in made if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if wanted := [name for name in required if name not in {"self", *options, *configured}]:
            raise ValueError(f"it wants {', '.join(wanted)} beside the URL")
        system = fsspec.filesystem(name, **options)
    except ImportError as error:
        package = _PACKAGES.get(name)
        remedy = f"{package}; pip install 'bowstore[remote]'" if package else f"another package: {error}"
        raise UsageError(f"{name} needs {remedy}") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{name}:// cannot be used ({reason}); copy the folder to an http, https, s3 or gs URL, or to a local disk"
        ) from error
    if hasattr(system, "retries"):
        system.retries = 1  # s3fs: how often and how long to try is counted here
    return system
