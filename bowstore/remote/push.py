"""Whole copies of a folder at a URL: files first, then the manifest, which says that they are all there.

What a URL holds of a copy is told by two names: `bowstore.json.part`, put there before any file and only where nobody
else has, is the manifest of the push under way; `bowstore.json` is that of a whole copy, and never changes again.
"""

from functools import partial
from pathlib import Path

from bowstore.config import StorageConfig
from bowstore.errors import MismatchError, MissingError, TransferError, UsageError
from bowstore.remote.manifest import MANIFEST_FILE, PUSHING_FILE, Kind, Manifest, check_unchanged, states_below
from bowstore.remote.transfer import Remote
from bowstore.remote.urls import WEB, below, is_remote, protocol, shown, url_of


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
    far = Remote(url, storage or StorageConfig())
    states = states_below(folder)
    manifest = Manifest.of(folder, kind, licence, states)
    check_unchanged(folder, states)
    if not _take(far, manifest):
        return manifest, 0
    missing = _missing(far, manifest)
    sizes = {name: manifest.files[name].size_bytes for name in missing}
    try:
        far.side_by_side("push: send", sizes, partial(far.send, folder), batch=far.at_once)
    finally:
        check_unchanged(folder, states)  # where sending failed, too: then that is why
    if lost := _missing(far, manifest):
        raise TransferError(f"{shown(below(far.url, lost[0]))} was sent and is not there; run the same command again")
    _take(far, manifest)
    far.upload(MANIFEST_FILE, manifest.text())
    far.remove(PUSHING_FILE)
    return manifest, len(missing)


def manifest_at(far: Remote, name: str = MANIFEST_FILE) -> Manifest | None:
    """The manifest at a URL; None without one.

    Raises:
        CorruptError: it cannot be understood.
        TransferError: no access, or no answer.
    """
    try:
        return Manifest.parse(far.read(name), shown(below(far.url, name)))
    except MissingError:
        return None


def _take(far: Remote, manifest: Manifest, tries: int = 3) -> bool:
    """Make a URL the place of a copy, to which others may come at the same time; whether it is not whole there yet."""
    # In this order: who ends between the two looks is seen by the second.
    begun, whole = manifest_at(far, PUSHING_FILE), manifest_at(far)
    if whole:
        _check_same(manifest, whole, f"{shown(far.url)} holds another copy", "name another URL")
        if begun:  # by whoever ended before it could tidy up
            far.remove(PUSHING_FILE)
    elif begun:
        what = f"{shown(far.url)} holds the beginning of another push"
        _check_same(manifest, begun, what, "end that one, or name another URL")
    elif others := sorted(far.sizes().keys() & manifest.files):
        raise MismatchError(
            f"{shown(below(far.url, others[0]))} is there already, and `bowstore push` did not put it there; it is "
            f"left as it is: name another URL"
        )
    elif not tries:
        raise TransferError(f"{shown(below(far.url, PUSHING_FILE))} was written and is not there; try again later")
    else:
        far.upload(PUSHING_FILE, manifest.text())
        return _take(far, manifest, tries - 1)
    return not whole


def _check_same(mine: Manifest, its: Manifest, what: str, remedy: str) -> None:
    if difference := mine.difference(its):
        raise MismatchError(f"{what} ({difference}), which is left as it is: {remedy}")


def _missing(far: Remote, manifest: Manifest) -> list[str]:
    """Files that are not there, or not as a whole; what has the length of a file of this push is that file."""
    there = far.sizes()
    return [name for name, entry in manifest.files.items() if there.get(name) != entry.size_bytes]
