"""A remote folder and its local copy, file by file."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bowstore.config import StorageConfig
from bowstore.errors import DataError, MissingError, TransferError
from bowstore.files import file_digest, fsync_path, leftovers, temporary_path, temporary_stem, waiting_lock
from bowstore.progress import Progress, say
from bowstore.remote import cache
from bowstore.remote.transfer import Remote
from bowstore.remote.urls import below, folder_name, shown, url_of

PARALLEL = 8  # transfers at once
_MOVING_TRIES = 3  # for a file that changes while it is read
_TOLD: set[str] = set()  # what was said once and need not be said again
T = TypeVar("T")


class Recorded(Protocol):
    """A file whose length and digest are known beforehand."""

    @property
    def name(self) -> str:
        """File name."""
        ...

    @property
    def size_bytes(self) -> int:
        """Length."""
        ...

    @property
    def digest(self) -> str:
        """xxh3-128 as 32 hex digits."""
        ...


class RemoteFolder:
    """Files of a folder on another machine, fetched into the cache when they are wanted.

    Safe for threads and for many processes: one of them fetches a file, the others wait for it.

    Attributes:
        url: of the folder.
        folder: its local copy.
        storage: settings of cache and transfers.
        remote: what reads the URLs.
    """

    def __init__(self, url: Path | str, storage: StorageConfig | None = None) -> None:
        self.url, self.storage = url_of(url), storage or StorageConfig()
        self.folder = cache.copies_folder(self.storage) / folder_name(self.url)
        self.remote = Remote(self.url, self.storage)
        self._turns: dict[Path, threading.Lock] = {}

    def exists(self, name: str) -> bool:
        """Whether the remote folder has such a file.

        Raises:
            TransferError: nobody answers.
        """
        try:
            self.remote.describe(below(self.url, name))
        except MissingError:
            return False
        return True

    def fetch(self, name: str, *, size_bytes: int | None = None, digest: str | None = None) -> Path:
        """The local copy of a file, brought here if it is not there yet.

        With length and digest a copy is trusted for as long as nobody touches it. Without, the server is asked every
        time whether the file changed; if it cannot be reached, the copy that is there is used.

        Args:
            name: of the file, without folders.
            size_bytes: its recorded length.
            digest: its recorded xxh3-128 as hex.

        Raises:
            MissingError: no such file there.
            MismatchError: it has another length.
            CorruptError: it has another digest.
            TransferError: no access, no answer, or no end of broken transfers.
            UsageError: the cache can never hold it.
        """
        path = self._path(name)
        if digest and _is_copy(path, digest=digest):
            cache.mark_used(path)
            return path
        if digest:
            self._fetch_recorded(path, size_bytes, digest, room=True)
        else:
            with self._turn(path):
                self._refresh(path)
        cache.mark_used(path)
        return path

    def fetch_all(self, files: Sequence[Recorded], what: str, *, display: bool = True) -> None:
        """Fetch many files at once, ahead of need.

        Args:
            files: with their lengths and digests.
            what: whose files, for messages.
            display: whether to show progress.

        Raises:
            UsageError: together they exceed the cache's bound.
            BowstoreError: as `fetch`.
        """
        cache.check_fits(sum(file.size_bytes for file in files), what, self.storage)
        paths, missing = {self._path(file.name) for file in files}, []
        for file in files:
            if _is_copy(self._path(file.name), digest=file.digest):
                cache.mark_used(self._path(file.name))
            else:
                missing.append(file)
        if not missing:
            return
        needed = sum(file.size_bytes for file in missing)
        cache.reserve(needed, what, self.storage, keep=paths)
        with Progress("fetch", len(missing), "files", shown=display) as progress:
            self.bring([partial(self._fetch_one, file) for file in missing], needed, progress)

    def bring(self, jobs: Iterable[Callable[[], int]], needed: int, progress: Progress) -> None:
        """Run transfers side by side, each of which returns the bytes of its file, of `needed` in all."""
        arrived = 0

        def count(size_bytes: int) -> None:
            nonlocal arrived
            arrived += size_bytes
            progress.advance(note=f"{arrived / 1e6:.0f} of {needed / 1e6:.0f} MB")

        self.parallel(jobs, count)

    def fetch_into(self, place: Path, name: str, size_bytes: int, *, digest: str | None = None) -> int:
        """Bring a file to below a folder of this machine; its length, for `bring`.

        It has a temporary name until it is whole; no other process writes there.

        Args:
            place: the folder.
            name: of the file, as a/b/c.
            size_bytes: its length.
            digest: its xxh3-128 as hex, where it was recorded.
        """
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        under_way = arriving(path, go_on=True)
        self.remote.download(below(self.url, name), under_way, size_bytes=size_bytes, digest=digest)
        under_way.replace(path)
        return size_bytes

    def parallel(self, jobs: Iterable[Callable[[], T]], done: Callable[[T], None]) -> None:
        """Run transfers side by side and hand on each result; the first error ends them all."""
        pool, errors = ThreadPoolExecutor(PARALLEL, "fetch"), list[BaseException]()

        def guarded(job: Callable[[], T]) -> T:
            try:
                return job()
            except BaseException as error:
                errors.append(error)
                self.remote.stop.set()  # here, before this thread takes its next job
                raise

        try:
            for future in as_completed([pool.submit(guarded, job) for job in jobs]):
                done(future.result())
        except BaseException:
            self.remote.stop.set()
            if errors:
                raise errors[0] from None  # the cause; those behind it were only stopped
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self.remote.stop.clear()

    def _path(self, name: str) -> Path:
        """Where a file's copy lies; names come from the other side, and must not lead elsewhere."""
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise DataError(f"{shown(self.url)} names a file {name!r}, which is no plain file name; index it again")
        return self.folder / name

    @contextmanager
    def _turn(self, path: Path) -> Iterator[None]:
        """Be the only one who brings a file: of the threads here, and of the processes of this machine."""
        # Silent: the process that brings it shows how far it is.
        with self._turns.setdefault(path, threading.Lock()), waiting_lock(cache.lock_file(path), "", shown=False):
            yield

    def _fetch_one(self, file: Recorded) -> int:
        self._fetch_recorded(self._path(file.name), file.size_bytes, file.digest, room=False)
        return file.size_bytes

    def _fetch_recorded(self, path: Path, size_bytes: int | None, digest: str, *, room: bool) -> None:
        with self._turn(path):
            if _is_copy(path, digest=digest):
                return
            if path.exists() and file_digest(path) == digest:  # whole, but its record is not
                cache.write_record(path, digest=digest, version=None)
                return
            part = arriving(path, go_on=True)
            if room:
                have = part.stat().st_size if part.exists() else 0
                cache.reserve(max(0, (size_bytes or 0) - have), self._url(path), self.storage)
            self.remote.download(below(self.url, path.name), part, size_bytes=size_bytes, digest=digest)
            _arrive(part, path, digest=digest)

    def _refresh(self, path: Path) -> None:
        """Bring a file whose content nobody recorded, unless the copy is still that file."""
        url = below(self.url, path.name)
        known: dict[str, str] | None = _recorded(path).get("version")
        try:
            there = self.remote.describe(url, retries=None if known is None else 0)
        except TransferError as error:
            if known is None:
                raise
            tell_once(f"{str(error).split(';')[0]}: using the copies in {self.folder}", about=self.url)
            return
        for _ in range(_MOVING_TRIES):
            if there.dated and known == there.version:
                return
            part = arriving(path, go_on=False)
            cache.reserve(there.size_bytes or 0, self._url(path), self.storage)
            self.remote.download(url, part, size_bytes=there.size_bytes)
            before, there = there, self.remote.describe(url)
            if before.version == there.version:
                _arrive(part, path, version=there.version)
                return
        raise TransferError(f"{self._url(path)} changed again and again while it was read; try again later")

    def _url(self, path: Path) -> str:
        return shown(below(self.url, path.name))


def is_there(path: Path, size_bytes: int) -> bool:
    """Whether a file has arrived, by its length: what `fetch_into` gives its name is whole."""
    return path.is_file() and path.stat().st_size == size_bytes


def settle(part: Path, path: Path) -> None:
    """Give a folder whose files have all arrived its name; the files are on the disk, and now their names are."""
    for parent, _, names in os.walk(part):
        for left in (Path(parent, name) for name in names):
            if temporary_stem(left):  # of a process of another machine, from which this one could not go on
                left.unlink()
        fsync_path(Path(parent))
    part.rename(path)
    fsync_path(path.parent)


def tell_once(message: str, *, about: str) -> None:
    """Say something about a URL, the first time."""
    if about not in _TOLD:
        _TOLD.add(about)
        say(message)


def arriving(path: Path, *, go_on: bool) -> Path:
    """Where a file arrives: under a temporary name, with what a dead process left of it; for the holder of its lock."""
    left, part = sorted(leftovers(path, own=True), key=lambda p: p.stat().st_size), temporary_path(path)
    if go_on and left:
        left.pop().rename(part)
    for old in left:
        old.unlink(missing_ok=True)
    return part


def _arrive(part: Path, path: Path, *, digest: str | None = None, version: dict[str, str] | None = None) -> None:
    """Give a file that has arrived its name, and its record first: that of the old one does not speak for it.

    Raises:
        DataError: what has that name is nothing that bowstore wrote.
    """
    if path.exists() and not cache.read_record(path):
        raise DataError(
            f"{path} lies where the copy of a remote file goes, and bowstore did not write it; move it away, or name "
            f"another folder in storage.cache"
        )
    cache.write_record(path, of=part, digest=digest, version=version)
    part.replace(path)
    fsync_path(path.parent)


def _recorded(path: Path) -> dict[str, Any]:
    """What was recorded of a copy that is still as it arrived; nothing otherwise."""
    return cache.read_record(path) if cache.is_as_recorded(path) else {}


def _is_copy(path: Path, *, digest: str) -> bool:
    return _recorded(path).get("digest") == digest
