"""A remote folder and its local copy, file by file."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bowstore.config import StorageConfig
from bowstore.errors import DataError, MissingError
from bowstore.files import fsync_path, waiting_lock
from bowstore.remote import cache
from bowstore.remote.transfer import Remote, Wanted
from bowstore.remote.urls import below, folder_name, is_plain, shown


class RemoteFolder(Remote):
    """Files of a folder on another machine, fetched into the cache when they are wanted.

    Safe for threads and for many processes: one of them fetches a file, the others wait for it.

    Attributes:
        folder: its local copy.
    """

    def __init__(self, url: Path | str, storage: StorageConfig | None = None) -> None:
        super().__init__(url, storage or StorageConfig())
        self.folder = cache.cache_root(self.storage) / "remote" / folder_name(self.url)
        self._turns: dict[Path, threading.Lock] = {}

    def exists(self, name: str) -> bool:
        """Whether the remote folder has such a file.

        Raises:
            TransferError: nobody answers.
        """
        try:
            self.describe(name)
        except MissingError:
            return False
        return True

    def fetch(self, name: str, wanted: Wanted | None = None, *, reserved: bool = False) -> Path:
        """The local copy of a file, brought here if it is not there yet.

        With length and digest a copy is trusted for as long as nobody touches it. Without, the server is asked every
        time whether the file changed.

        Args:
            name: of the file, without folders.
            wanted: its recorded length and digest.
            reserved: whether the cache has room for it already.

        Raises:
            MissingError: no such file there.
            MismatchError: it has another length.
            CorruptError: it has another digest.
            TransferError: no access, no answer, or no end of broken transfers.
            UsageError: the cache can never hold it.
        """
        path = self._path(name)
        if wanted:
            about: dict[str, Any] = {"digest": wanted.digest}
        else:
            size_bytes, version = self.describe(name)
            wanted, about = Wanted(size_bytes), {"version": version}
        if not cache.is_as_recorded(path, **about):
            # One thread here, and one process of this machine, brings it; that one shows how far it is.
            with self._turns.setdefault(path, threading.Lock()), waiting_lock(cache.lock_file(path), "", shown=False):
                if not cache.is_as_recorded(path, **about):
                    self._bring(path, wanted, about, reserved=reserved)
        cache.mark_used(path)
        return path

    def fetch_all(self, files: Mapping[str, Wanted], what: str, *, display: bool = True) -> None:
        """Fetch many files at once, ahead of need.

        Args:
            files: with their lengths and digests, by name.
            what: whose files, for messages.
            display: whether to show progress.

        Raises:
            UsageError: together they exceed the cache's bound.
            BowstoreError: as `fetch`.
        """
        sizes = {name: wanted.size_bytes or 0 for name, wanted in files.items()}
        cache.check_fits(sum(sizes.values()), what, self.storage)
        for name in files:
            path = self._path(name)
            if cache.is_as_recorded(path, digest=files[name].digest):
                cache.mark_used(path)  # before others make room
                del sizes[name]
        if not sizes:
            return
        cache.reserve(sum(sizes.values()), what, self.storage)
        self.side_by_side("fetch", sizes, lambda name: self.fetch(name, files[name], reserved=True), display=display)

    def _path(self, name: str) -> Path:
        """Where a file's copy lies."""
        if not is_plain(name):
            raise DataError(f"{shown(self.url)} names a file {name!r}, which is no plain file name; index it again")
        return self.folder / name

    def _bring(self, path: Path, wanted: Wanted, about: Mapping[str, Any], *, reserved: bool) -> None:
        """Bring a file, and record what it is: first, as the record of an old copy does not speak for the new one."""
        if path.exists() and not cache.read_record(path):
            raise DataError(
                f"{path} lies where the copy of a remote file goes, and bowstore did not write it; move it away, or "
                f"name another folder in storage.cache"
            )
        part = cache.part_of(path)
        if not reserved:
            cache.reserve(wanted.size_bytes or 0, shown(below(self.url, path.name)), self.storage, arrived=part)
        self.download(path.name, part, wanted)
        cache.write_record(path, of=part, **about)
        part.replace(path)
        fsync_path(path.parent)


def settle(part: Path, path: Path) -> None:
    """Give a folder whose files have all arrived its name, once all of it is on the disk."""
    for path_below in (part, *part.rglob("*")):
        fsync_path(path_below)
    part.rename(path)
    fsync_path(path.parent)
