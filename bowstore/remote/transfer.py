"""Bytes from and to another machine through fsspec, tried again until they are whole.

The one place that knows fsspec's file systems; what their errors mean is said in `tries`.
"""

import functools
import inspect
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bowstore.config import StorageConfig
from bowstore.errors import MismatchError, MissingError, TransferError, UsageError
from bowstore.files import file_digest, fsync_path, open_end
from bowstore.remote.answers import Answer, Body, Problem
from bowstore.remote.hub import COMMIT_FILES, commit
from bowstore.remote.tries import OTHER_BYTES, Tries, status_of
from bowstore.remote.urls import WEB, protocol, shown

# What a broken connection loses, and what is held in memory; long enough that its round trip does not count.
BLOCK_BYTES = 8 << 20
_SMALL_BYTES = 64 << 20  # of a file that is read into memory: metadata of a store
_HUB = "huggingface_hub"
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": _HUB}
# aiohttp's time-out for an answer runs while a part is sent, so parts are the smallest that S3 takes.
_PART_BYTES = 5 << 20
_SENT_IN_PARTS = {"s3fs": {"chunksize": _PART_BYTES, "max_concurrency": 1}, "gcsfs": {"chunksize": _PART_BYTES}}
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
        at_once: files that `send` takes.
    """

    def __init__(self, url: str, storage: StorageConfig) -> None:
        package = _PACKAGES.get(protocol(url), "")
        self._storage = storage
        self._parts: dict[str, Any] = _SENT_IN_PARTS.get(package, {})
        self.at_once = COMMIT_FILES if package == _HUB else 1
        self._commits = threading.Lock()  # of two commits to a branch at the same time the hub refuses one
        self._fs = _file_system(protocol(url), storage.timeout_s, os.getpid())
        self.stop = threading.Event()

    def describe(self, url: str, *, retries: int | None = None) -> RemoteFile:
        """Ask for a file's length and version.

        Raises:
            MissingError: it is not there.
            TransferError: no access, or no answer.
        """
        tries = Tries(url, self._storage, self.stop, retries)
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

    def read(self, url: str, *, retries: int | None = None, anew: bool = False) -> bytes:
        """All bytes of a small file.

        Args:
            url: the file.
            retries: further tries; None for as many as any transfer has.
            anew: whether others may have changed it since this process last looked.

        Raises:
            MissingError: it is not there.
            TransferError: no access, or no answer.
        """
        tries = Tries(url, self._storage, self.stop, retries)
        while True:
            try:
                if anew:
                    self._fs.invalidate_cache()
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

    def upload(self, url: str, data: bytes, *, new: bool = False) -> None:
        """Write a small file: whole, or not at all where the server is an object store.

        Args:
            url: the file.
            data: its content.
            new: leave a file as it is that is there already; object stores see to it that only one writer is first.

        Raises:
            UsageError: a protocol that only reads.
            MissingError: no such bucket.
            TransferError: no access, no answer, or no end of broken transfers.
        """

        def put() -> None:
            with suppress(*[FileExistsError] if new else []):
                self._fs.pipe_file(url, data, **self._parts, **{"mode": "create"} if new else {})

        self._write(url, put)

    def send(self, files: Mapping[str, Path]) -> None:
        """Write files of this machine, `at_once` at most, each as `upload` does.

        Args:
            files: by the URLs that they get.

        Raises:
            BowstoreError: as `upload`.
        """
        url, path = next(iter(files.items()))
        if self.at_once == 1:
            self._write(url, lambda: self._fs.put_file(str(path), url, **self._parts))
            return
        with self._commits:
            self._write(url, lambda: commit(self._fs, files))

    def _write(self, url: str, put: Callable[[], object]) -> None:
        tries = Tries(url, self._storage, self.stop, writing=True)
        while True:
            if self.stop.is_set():
                raise TransferError(f"{shown(url)}: stopped, because another transfer failed")
            try:
                put()
                return
            except NotImplementedError as error:
                raise UsageError(f"{protocol(url)}:// cannot be written; s3://, gs:// and hf:// can") from error
            except Exception as error:  # noqa: BLE001 - every protocol has errors of its own
                tries.failed(error)

    def remove(self, url: str) -> None:
        """Remove a file that nobody needs; who may write need not be allowed to, and then it stays."""
        with suppress(Exception):
            self._fs.rm_file(url)

    def sizes(self, folder_url: str) -> dict[str, int]:
        """Lengths of all files below a folder, by their names in it; of none where it is not there.

        Raises:
            TransferError: no access, or no answer.
        """
        tries = Tries(folder_url, self._storage, self.stop)
        start = len(self._fs._strip_protocol(folder_url).rstrip("/")) + 1
        while True:
            try:
                self._fs.invalidate_cache()
                found = self._fs.find(folder_url, detail=True)
                return {name[start:]: int(info["size"]) for name, info in found.items()}
            except FileNotFoundError:  # whoever writes there says what is missing
                return {}
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
        rounds, before = Tries(url, self._storage, self.stop), None
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
            rounds.failed(Problem(OTHER_BYTES, f"digest {found}, not {digest}", final=found == before))
            before = found

    def _blocks(self, url: str, done: int, size_bytes: int | None) -> Iterator[bytes]:
        """The bytes of a file from `done` on, at most a block at a time in memory."""
        tries = Tries(url, self._storage, self.stop)
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
                    if isinstance(problem, Problem) or status_of(problem) == 416:
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


def _plain(key: str) -> str:
    return "".join(c for c in key.lower() if c.isalnum())


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
