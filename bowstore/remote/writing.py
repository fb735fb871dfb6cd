"""Word stores that a URL gets: written in a working copy in the cache, which is uploaded once it is complete.

<cache>/writing/<URL's name and hash>/NAME        the working copy, and beside it what encoding keeps beside a store
                                     /.uploaded   which files the URL holds, as far as this machine knows
               /.<URL's name and hash>.lock       held while the copy is made, uploaded or put away
                                      .use        shared by the processes that are at work in the copy
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, CorruptError, MismatchError, MissingError, TransferError, UsageError
from bowstore.files import TEMPORARY_MARK, exclusive_lock, file_digest, fsync_path, stagings, waiting_lock
from bowstore.progress import say
from bowstore.remote import cache
from bowstore.remote.folder import RemoteFolder
from bowstore.remote.push import check_unchanged, metadata_of, plan_of, push, remote_metadata
from bowstore.remote.record import Record
from bowstore.remote.store import METADATA, attributes_of, check_settled, copy_place, layer_names, whole_copy
from bowstore.remote.urls import WEB, folder_name, is_remote, protocol, shown, url_of
from bowstore.torchrun import ranks

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_OPEN: dict[Path, "_WorkingCopy"] = {}  # of this process


@contextmanager
def writable_store(path: Path, storage: StorageConfig | None = None) -> Iterator[Path]:
    """Where on this machine to write a word store; a URL gets the store when the block ends without an error.

    A path that is no URL comes back as it is. For a URL it is a working copy in the cache, which the processes of this
    machine share, and which stays when the block is interrupted. Where there is none, but a store at the URL, the work
    goes on from that.

    Args:
        path: the store.
        storage: the cache and its bound; None for the defaults.

    Raises:
        UsageError: a URL that cannot be written, or a store that the cache can never hold.
        MissingError: no such bucket.
        MismatchError: something else at the URL, or a store that others changed since it was fetched.
        TransferError: no access, no answer, or no end of broken transfers; the same call goes on.
        BowstoreError: the disk is full.
    """
    if not is_remote(path):
        yield path
        return
    copy = _WorkingCopy(url_of(path), storage or StorageConfig())
    with copy.used():
        try:
            yield copy.store
        except (MismatchError, UsageError, MissingError) as error:
            error.args = (str(error).replace(str(copy.store), copy.url),)
            raise
        copy.upload()


def reserve_room(store: Path, needed: int) -> None:
    """See to it that a working copy may grow by so many bytes; nothing for other stores.

    Raises:
        UsageError: the cache can never hold it.
        BowstoreError: the rest of the cache is in use, or the disk is full.
    """
    if copy := _OPEN.get(store):
        cache.reserve(needed, f"word store {copy.url}", copy.folder.storage)


class _WorkingCopy:
    """The working copy of a store.

    Attributes:
        folder: the store's URL.
        url: the same, for messages.
        place: the folder of the working copy and of what lies beside it.
        store: the working copy.
    """

    def __init__(self, url: str, storage: StorageConfig) -> None:
        self.url = shown(url)
        if protocol(url) in WEB:
            raise UsageError(
                f"{self.url} cannot be written; give --store an s3:// or gs:// URL, or encode into a local --store and "
                f"copy it there"
            )
        self.folder = RemoteFolder(url, storage)
        self.place = cache.writing_folder(storage) / folder_name(url)
        self.store = self.place / PurePosixPath(self.url).name

    @contextmanager
    def used(self) -> Iterator[None]:
        """Have the working copy for the length of a block; whoever leaves last puts it away if all is uploaded."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        lock = self.place.with_name(f".{self.place.name}.use")
        descriptor, done = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666), False
        try:
            with self._locked(), _full_disk(self.place):
                self._prepare(alone=_is_alone(descriptor))
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            _OPEN[self.store] = self
            yield
            done = True
        finally:
            _OPEN.pop(self.store, None)
            # What goes wrong here the next call meets again, and tells.
            with suppress(BowstoreError, OSError), self._locked(wait=done):
                if _is_alone(descriptor):
                    self._put_away()
            os.close(descriptor)

    def upload(self) -> None:
        """Send what the URL lacks; one process at a time.

        Raises:
            MismatchError: somebody else changed the store at the URL, or the working copy changes meanwhile.
            TransferError: no access, no answer, or no end of broken transfers.
        """
        with self._locked(), _full_disk(self.place):
            try:
                push(plan_of(self.store, metadata_of(self.store)[0]), self.folder, self._record())
            except (TransferError, MissingError):
                say(f"the words for {self.url} are complete, in {self.store}; the same command goes on uploading them")
                raise

    def _locked(self, *, wait: bool = True) -> AbstractContextManager[None]:
        lock, what = cache.lock_file(self.place), f"word store {self.url}"
        return waiting_lock(lock, what, shown=ranks().first) if wait else exclusive_lock(lock, what)

    def _record(self) -> Record:
        return Record(self.place / ".uploaded")

    def _prepare(self, *, alone: bool) -> None:
        """See to it that the working copy can be worked on: that of earlier runs, or what the URL holds now."""
        self.folder.remote.check_writable(self.folder.url)
        there = remote_metadata(self.folder)
        if alone:
            with suppress(CorruptError):  # encoding tells what is wrong with it
                self._put_away()
        if alone and not self._is_begun():
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir()
            if there is not None:
                self._fetch(there)
        else:
            check_unchanged(self.folder, there, self._record(), self.place)
        if ranks().first:
            say(f"word store {self.url} is written in {self.store}, and uploaded when it is complete")

    def _is_begun(self) -> bool:
        """Whether there is anything to go on with; a store that is appended to has another name for a moment."""
        name = self.store.name
        return any((self.place / other).exists() for other in (name, f".{name}.old")) or bool(stagings(self.store))

    def _fetch(self, there: dict[str, bytes]) -> None:
        """Make the working copy of the store at the URL."""
        check_settled(there, self.url)
        for layer in layer_names(there[METADATA], self.url):
            attributes = attributes_of(there[f"{layer}/{METADATA}"], f"{self.url}/{layer}")
            if not attributes.get("complete"):
                raise MismatchError(
                    f"layer {layer!r} of word store {self.url} is not complete; finish it where it was made and copy "
                    f"it there again, or name another --store"
                )
        arriving = self.store.with_name(f".{self.store.name}{TEMPORARY_MARK}fetched")
        with whole_copy(self.folder, there, display=ranks().first) as copy:
            files = [path.relative_to(copy) for path in sorted(copy.rglob("*")) if path.is_file()]
            for name in files:
                _link(copy / name, arriving / name)
        self._record().replace({name.as_posix(): file_digest(arriving / name) for name in files})
        arriving.rename(self.store)
        fsync_path(self.place)

    def _put_away(self) -> None:
        """Make a working copy of which all is uploaded one of the cache's copies; only while nobody uses it."""
        if not self._is_begun():
            shutil.rmtree(self.place, ignore_errors=True)
            return
        record = self._record()
        if record.begun or not self.store.exists() or stagings(self.store):
            return
        metadata, left_out = metadata_of(self.store)
        if left_out or plan_of(self.store, metadata).digests != record.files:
            return
        copy = copy_place(self.folder, metadata)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(cache.lock_file(copy), "", shown=False):
            if not copy.exists():
                cache.write_store_record(copy, cache.names_below(self.store))
                self.store.rename(copy)
                fsync_path(copy.parent)
            cache.mark_used(copy / METADATA)
        shutil.rmtree(self.place)


def _is_alone(descriptor: int) -> bool:
    """Whether no other process has a lock on the file behind a descriptor; then this one has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _link(source: Path, target: Path) -> None:
    """The same file under another name, as writers replace files and never change them; a copy where links fail."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)


@contextmanager
def _full_disk(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, BowstoreError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BowstoreError(
            f"no space left on the disk of {place}; free some and run the same command again: nothing is lost"
        ) from error
