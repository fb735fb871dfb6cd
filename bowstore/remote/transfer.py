"""Bytes from and to a folder on another machine through fsspec, tried again until they are whole.

The one place that knows fsspec's file systems; what their errors mean is said in `tries`.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import IO, Any, NamedTuple

from bowstore.config import StorageConfig
from bowstore.errors import CorruptError, MismatchError, TransferError, UsageError
from bowstore.files import file_digest, fsync_path, open_end
from bowstore.progress import Progress
from bowstore.remote.cache import part_of
from bowstore.remote.hub import COMMIT_FILES, commit
from bowstore.remote.tries import Tries, status_of
from bowstore.remote.urls import WEB, below, protocol, shown, url_of

PARALLEL = 8  # transfers at once
BLOCK_BYTES = 8 << 20  # held in memory of each; long enough that its round trip does not count
_HUB = "huggingface_hub"
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": _HUB}
# aiohttp's time-out for an answer runs while a part is sent, so parts are the smallest that S3 takes.
_PART_BYTES = 5 << 20
_SENT_IN_PARTS = {"s3fs": {"chunksize": _PART_BYTES, "max_concurrency": 1}, "gcsfs": {"chunksize": _PART_BYTES}}
# By which protocols say which version of a file this is.
_VERSION_KEYS = {"ETag", "etag", "Content-MD5", "generation", "blob_id", "created", "updated", "modified", "mtime"}
_VERSION_KEYS |= {"Last-Modified", "LastModified", "last_modified"}


class Wanted(NamedTuple):
    """What was recorded of a file that is wanted: its length, and its xxh3-128 as hex; None where nothing was."""

    size_bytes: int | None = None
    digest: str | None = None


class Remote:
    """Reads and writes files of a folder on another machine, by their names in it; safe to use from many threads.

    Attributes:
        url: of the folder.
        storage: settings of transfers, and of the cache.
        at_once: files that `send` takes.
    """

    def __init__(self, url: Path | str, storage: StorageConfig) -> None:
        self.url = url_of(url)
        self._protocol = protocol(self.url)
        package = _PACKAGES.get(self._protocol, "")
        self.storage, self._stop = storage, Event()
        self._parts: dict[str, Any] = _SENT_IN_PARTS.get(package, {})
        self.at_once = COMMIT_FILES if package == _HUB else 1
        self._commits = Lock()  # of two commits to a branch at the same time the hub refuses one
        self._fs = _file_system(self.url, storage.timeout_s)

    def describe(self, name: str) -> tuple[int | None, dict[str, str]]:
        """Ask for a file's length, None where the server does not say, and for whatever changes when the file does.

        Raises:
            MissingError: it is not there.
            TransferError: no access, or no answer.
        """
        url = below(self.url, name)
        info = self._tries(url).run(lambda: self._fs.info(url))
        version = {key: str(value) for key, value in info.items() if key in _VERSION_KEYS and value}
        version = version or {"asked_ns": str(time.time_ns())}  # of what says nothing no two answers are the same
        return info.get("size"), version

    def read(self, name: str) -> bytes:
        """All bytes of a small file, as it is now.

        Raises:
            MissingError: it is not there.
            TransferError: no access, or no answer.
        """
        url = below(self.url, name)

        def cat() -> bytes:
            self._fs.invalidate_cache()  # others may have changed it since this process last looked
            return bytes(self._fs.cat_file(url))

        return self._tries(url).run(cat)

    def upload(self, name: str, data: bytes) -> None:
        """Write a small file, unless one is there: on object stores whole or not at all, and by one writer alone.

        Raises:
            UsageError: a protocol that only reads.
            MissingError: no such bucket.
            TransferError: no access, no answer, or no end of broken transfers.
        """
        url = below(self.url, name)

        def put() -> None:
            with suppress(FileExistsError):
                self._fs.pipe_file(url, data, mode="create", **self._parts)

        self._tries(url, writing=True).run(put)

    def send(self, folder: Path, *names: str) -> None:
        """Write files of a folder of this machine, `at_once` at most, each as `upload` does.

        Raises:
            BowstoreError: as `upload`.
        """
        url = below(self.url, names[0])
        tries = self._tries(url, writing=True)
        if self.at_once == 1:
            tries.run(lambda: self._fs.put_file(str(folder / names[0]), url, **self._parts))
            return
        with self._commits:
            tries.run(lambda: commit(self._fs, {below(self.url, name): folder / name for name in names}))

    def remove(self, name: str) -> None:
        """Remove a file that nobody needs; who may write need not be allowed to, and then it stays."""
        with suppress(Exception):
            self._fs.rm_file(below(self.url, name))

    def sizes(self) -> dict[str, int]:
        """Lengths of all files of the folder, by their names in it; of none where it is not there.

        Raises:
            TransferError: no access, or no answer.
        """
        start = len(self._fs._strip_protocol(self.url).rstrip("/")) + 1

        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()
            with suppress(FileNotFoundError):  # whoever writes there says what is missing
                return dict(self._fs.find(self.url, detail=True))
            return {}

        return {name[start:]: int(info["size"]) for name, info in self._tries(self.url).run(find).items()}

    def download(self, name: str, path: Path, wanted: Wanted) -> None:
        """Bring a file to `path`, fsynced, and checked; with a digest, going on from the bytes that lie there.

        Args:
            name: of the file.
            path: where it is wanted; no other process writes there.
            wanted: what it has to be.

        Raises:
            MissingError: it is not there.
            MismatchError: it has another length.
            CorruptError: other bytes than recorded.
            TransferError: no access, no answer, or no end of broken transfers.
        """
        url = below(self.url, name)
        tries = self._tries(url)
        with open_end(path) as file:
            if wanted.digest is None:
                file.seek(file.truncate(0))  # nothing would tell whether what lies there is of this file
            for _ in range(2):  # what lay there may have been of another file, and bytes may change on the way
                tries.run(partial(self._go_on, url, file, wanted.size_bytes, tries))
                found_bytes, digest = file.tell(), wanted.digest and file_digest(path)
                if wanted.size_bytes in (None, found_bytes) and digest == wanted.digest:
                    fsync_path(path)
                    return
                file.seek(file.truncate(0))
        if wanted.size_bytes != found_bytes:
            raise MismatchError(
                f"{shown(url)} has {found_bytes} bytes, {wanted.size_bytes} were recorded: it changed, or was not "
                f"copied whole; copy the folder there again, index and all"
            )
        raise CorruptError(f"{shown(url)} is not the file that was recorded: other bytes, twice; copy it there again")

    def _go_on(self, url: str, file: IO[bytes], size_bytes: int | None, tries: Tries) -> None:
        """Write what is missing of a file, up to its end."""
        if size_bytes is not None and file.tell() >= size_bytes:
            return
        try:
            opened = self._open(url, file.tell())
        except Exception as error:
            if status_of(error) == 416:  # the file there is shorter than what has arrived, maybe of another
                file.seek(file.truncate(0))
            raise
        with closing(opened) as source:
            while block := source.read(BLOCK_BYTES):
                if self._stop.is_set():
                    raise TransferError(f"{shown(url)}: stopped, because another transfer failed")
                file.write(block)
                file.flush()  # what has arrived outlives this process
                tries.succeeded()

    def _open(self, url: str, start: int) -> Any:
        """A file from a byte on, to read block by block."""
        if self._protocol not in WEB:
            file = self._fs.open(url, "rb", block_size=BLOCK_BYTES, cache_type="none")
            file.seek(start)
            return file
        # One answer, read as it comes: fsspec's other way over HTTP fails where a server knows no ranges or lengths.
        headers = {**self._fs.kwargs.get("headers", {}), **({"Range": f"bytes={start}-"} if start else {})}
        file = self._fs.open(url, "rb", block_size=0, size=1, headers=headers)
        while start and file.r.status != 206:  # the server sends what is here already
            skipped = len(file.read(min(start, BLOCK_BYTES)))
            start = start - skipped if skipped else 0
        return file

    def fetch_into(self, folder: Path, files: Mapping[str, Wanted], title: str, *, display: bool = True) -> int:
        """Bring files to a folder of this machine, where nobody else writes; those that are there stay.

        A file has its name once it is whole and safe on the disk, so that a call that is cut off goes on.

        Args:
            folder: where they go.
            files: by their names, as a/b/c, none of which begins with a dot.
            title: of the progress that is shown.
            display: whether to show it.

        Returns:
            How many were brought.

        Raises:
            BowstoreError: as `download`.
        """

        def fetch(name: str) -> None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.download(name, part_of(path), files[name])
            part_of(path).rename(path)

        self._fs.invalidate_cache()  # others may have changed files since this process last looked
        missing = {name: wanted.size_bytes or 0 for name, wanted in files.items() if not (folder / name).exists()}
        self.side_by_side(title, missing, fetch, display=display)
        return len(missing)

    def side_by_side(
        self,
        title: str,
        sizes: Mapping[str, int],
        move: Callable[..., object],
        *,
        batch: int = 1,
        display: bool = True,
    ) -> None:
        """Move files side by side, and show how far that is; the first error ends all transfers.

        Args:
            title: of the progress.
            sizes: bytes by name.
            move: moves some of them.
            batch: how many at a time.
            display: whether to show progress.
        """
        names, moved_bytes, total_bytes = list(sizes), 0, sum(sizes.values())
        batches = [names[start : start + batch] for start in range(0, len(names), batch)]
        with Progress(title, len(names), "files", shown=display) as progress, ThreadPoolExecutor(PARALLEL) as pool:

            def moved(some: list[str]) -> list[str]:
                try:
                    if not self._stop.is_set():
                        move(*some)
                except BaseException:
                    if self._stop.is_set():
                        return []  # it was only stopped, by the error that is raised
                    self._stop.set()  # here, before this thread takes its next job
                    raise
                return some

            try:
                for job in as_completed([pool.submit(moved, some) for some in batches]):
                    some = job.result()
                    moved_bytes += sum(sizes[name] for name in some)
                    note = f"{moved_bytes / 1e6:.1f} of {total_bytes / 1e6:.1f} MB"
                    progress.advance(len(some), note if moved_bytes else "")
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                self._stop.clear()
                raise

    def _tries(self, url: str, *, writing: bool = False) -> Tries:
        return Tries(url, self.storage, self._stop, writing=writing)


def _file_system(url: str, timeout_s: float) -> Any:
    """A URL's file system with our time-outs and none of its own retries; fsspec keeps one for each process."""
    import fsspec  # and what it brings: a second, for those alone that go to a URL

    name = protocol(url)
    options: dict[str, Any] = {"use_listings_cache": False}
    configured = fsspec.config.conf.get(name, {})
    if name in WEB:
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
        system, _ = fsspec.url_to_fs(url, **options)
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
