"""Whole copies of a folder at a URL: files first, then the manifest, which says that they are all there.

What a URL holds of a copy is told by two names: `bowstore.json.part`, put there before any file and only where nobody
else has, is the manifest of the push under way; `bowstore.json` is that of a whole copy, and never changes again.
"""

from functools import partial
from pathlib import Path

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, MismatchError, MissingError, TransferError, UsageError
from bowstore.progress import Progress
from bowstore.remote.folder import RemoteFolder
from bowstore.remote.manifest import MANIFEST_FILE, PUSHING_FILE, Kind, Manifest, Original
from bowstore.remote.urls import WEB, below, is_remote, protocol, shown, url_of

_LOOKS = 3  # at what is there: before we put our name there, after, and once more where somebody ended between


def push(
    folder: Path, url: Path, *, kind: Kind, licence: str, storage: StorageConfig | None = None
) -> tuple[Manifest, int]:
    """Make a URL hold a copy of a folder; a push that was interrupted goes on where it stopped.

    Args:
        folder: of this machine; nothing may write there.
        url: where the copy goes, of its own.
        kind: what the folder is.
        licence: under which others may use it.
        storage: how often and how long a server is tried; None for the defaults.

    Returns:
        The copy's manifest, and how many files were sent.

    Raises:
        UsageError: no URL, one that only reads, or something in the folder that cannot be copied.
        MismatchError: the URL holds something else, or the folder changes.
        MissingError: no such bucket.
        TransferError: no access, no answer, or no end of broken transfers.
    """
    if not is_remote(url):
        raise UsageError(f"{url} is no URL; name one, such as s3://bucket/{folder.name}")
    if protocol(url_of(url)) in WEB:
        raise UsageError(f"{shown(url_of(url))} cannot be written; push to an s3://, gs:// or hf:// URL")
    far = RemoteFolder(url, storage)
    original = Original.read(folder, kind, licence)
    if not _take(far, original.manifest):
        return original.manifest, 0
    missing = _missing(far, original.manifest)
    _send_all(far, original, missing)
    original.check_unchanged()
    if lost := _missing(far, original.manifest):
        raise TransferError(f"{shown(below(far.url, lost[0]))} was sent and is not there; run the same command again")
    _take(far, original.manifest)
    far.remote.upload(below(far.url, MANIFEST_FILE), original.manifest.text())
    far.remote.remove(below(far.url, PUSHING_FILE))
    return original.manifest, len(missing)


def manifest_at(far: RemoteFolder, name: str = MANIFEST_FILE) -> Manifest | None:
    """The manifest at a URL; None without one.

    Raises:
        CorruptError: it cannot be understood.
        TransferError: no access, or no answer.
    """
    url = below(far.url, name)
    try:
        return Manifest.parse(far.remote.read(url, anew=True), shown(url))
    except MissingError:
        return None


def _take(far: RemoteFolder, manifest: Manifest) -> bool:
    """Make a URL the place of a copy; whether it is not whole there yet.

    Raises:
        MismatchError: it is the place of something else.
    """
    for _ in range(_LOOKS):
        # In this order: who ends between the two looks is seen by the second.
        begun, whole = manifest_at(far, PUSHING_FILE), manifest_at(far)
        if whole:
            _check_same(manifest, whole, f"{shown(far.url)} holds another copy", "name another URL")
            if begun:  # by whoever ended before it could tidy up
                far.remote.remove(below(far.url, PUSHING_FILE))
            return False
        if begun:
            what = f"{shown(far.url)} holds the beginning of another push"
            _check_same(manifest, begun, what, "end that one, or name another URL")
            return True
        if others := sorted(far.remote.sizes(far.url).keys() & manifest.files):
            raise MismatchError(
                f"{shown(below(far.url, others[0]))} is there already, and `bowstore push` did not put it there; it is "
                f"left as it is: name another URL"
            )
        far.remote.upload(below(far.url, PUSHING_FILE), manifest.text(), new=True)
    raise TransferError(f"{shown(below(far.url, PUSHING_FILE))} was written and is not there; try again later")


def _check_same(mine: Manifest, its: Manifest, what: str, remedy: str) -> None:
    if difference := mine.difference(its):
        raise MismatchError(f"{what} ({difference}), which is left as it is: {remedy}")


def _missing(far: RemoteFolder, manifest: Manifest) -> list[str]:
    """Files that are not there, or not as a whole; what has the length of a file of this push is that file."""
    there = far.remote.sizes(far.url)
    return [name for name, entry in manifest.files.items() if there.get(name) != entry.size_bytes]


def _send_all(far: RemoteFolder, original: Original, names: list[str]) -> None:
    files, sent = original.manifest.files, 0
    total = sum(files[name].size_bytes for name in names)
    with Progress("push: send", len(files), "files", done=len(files) - len(names)) as progress:

        def arrived(batch: list[str]) -> None:
            nonlocal sent
            sent += sum(files[name].size_bytes for name in batch)
            progress.advance(len(batch), note=f"{sent / 1e6:.1f} of {total / 1e6:.1f} MB")

        step = far.remote.at_once
        batches = [names[at : at + step] for at in range(0, len(names), step)]
        far.parallel([partial(_send, far, original, batch) for batch in batches], arrived)


def _send(far: RemoteFolder, original: Original, names: list[str]) -> list[str]:
    """Send some files; what changes while it is sent is found by its state, and by whoever pulls by the digest."""
    try:
        far.remote.send({below(far.url, name): original.folder / name for name in names})
    except BowstoreError:
        original.check_unchanged(names)  # then that is why
        raise
    original.check_unchanged(names)
    return names
