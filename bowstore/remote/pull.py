"""A whole copy of what `bowstore push` put at a URL, on this machine.

It arrives in a hidden folder beside its final name, and gets that name once all its files are there. What arrives has
the manifest's digest in its name, so that whatever pulls the same again, on any machine, goes on there.
"""

import shutil
from pathlib import Path

import xxhash

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, MismatchError, MissingError, UsageError
from bowstore.files import exclusive_lock
from bowstore.remote.cache import lock_file, part_of
from bowstore.remote.folder import settle
from bowstore.remote.manifest import MANIFEST_FILE, PUSHING_FILE, Manifest
from bowstore.remote.push import manifest_at
from bowstore.remote.transfer import Remote, Wanted
from bowstore.remote.urls import is_remote, local_only, shown


def pull(url: Path, path: Path, *, storage: StorageConfig | None = None) -> tuple[Manifest, int]:
    """Make a copy on this machine of what was pushed to a URL; a pull that was interrupted goes on where it stopped.

    Args:
        url: where `bowstore push` put it.
        path: the folder to make.
        storage: how often and how long a server is tried; None for the defaults.

    Returns:
        The copy's manifest, and how many files were fetched.

    Raises:
        UsageError: no URL, or `path` is one.
        MissingError: nothing there that was pushed.
        MismatchError: a push that is not whole; or something else at `path`.
        CorruptError: a file that is not the one that was pushed.
        BusyError: another process pulls to `path`.
        TransferError: no access, no answer, or no end of broken transfers.
        BowstoreError: the disk is too small.
    """
    if not is_remote(url):
        raise UsageError(f"{url} is no URL; name that which `bowstore push` was given")
    local_only(path, "name a folder on this machine to pull into")
    if not path.name:
        raise UsageError(f"{path} has no name of its own; name the folder to make, such as {path / 'copy'}")
    far = Remote(url, storage or StorageConfig())
    manifest = _whole(far)
    with exclusive_lock(lock_file(path), str(path)):
        empty = path.is_dir() and not any(path.iterdir())
        if path.is_symlink() or (path.exists() and not empty):
            _check_copy(path, manifest)
            return manifest, 0
        part = part_of(path.with_name(f"{path.name}.{xxhash.xxh3_64_hexdigest(manifest.text())}"))
        part.mkdir(exist_ok=True)
        _check_room(far, part, manifest)
        files = {name: Wanted(entry.size_bytes, entry.digest) for name, entry in manifest.files.items()}
        brought = far.fetch_into(part, files, "pull: fetch")
        (part / MANIFEST_FILE).write_bytes(manifest.text())
        settle(part, path)
    return manifest, brought


def _whole(far: Remote) -> Manifest:
    """The manifest of a whole copy at a URL."""
    if manifest := manifest_at(far):
        return manifest
    url = shown(far.url)
    if manifest_at(far, PUSHING_FILE):
        raise MismatchError(f"{url} is not whole: a push is under way, or was cut off; give the same push again there")
    raise MissingError(
        f"{url} has no {MANIFEST_FILE}, so `bowstore push` did not put it there; check the URL, or open shards and "
        f"stores where they are, by --shards URL and --store URL"
    )


def _check_copy(path: Path, manifest: Manifest) -> None:
    """Refuse what lies in a copy's place, unless it is that copy."""
    problem: str | None = f"it has no {MANIFEST_FILE}"
    if (path / MANIFEST_FILE).is_file():
        found = Manifest.parse((path / MANIFEST_FILE).read_bytes(), str(path / MANIFEST_FILE))
        problem = manifest.difference(found)
        sizes = {name: (path / name).stat().st_size for name in manifest.files if (path / name).is_file()}
        changed = [name for name, entry in manifest.files.items() if sizes.get(name) != entry.size_bytes]
        if changed and not problem:
            problem = f"{changed[0]} is not as it was pulled"
    if problem:
        raise MismatchError(f"{path} is there already and is no copy of the URL ({problem}); name another PATH")


def _check_room(far: Remote, part: Path, manifest: Manifest) -> None:
    there = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    needed, free = manifest.size_bytes - there, shutil.disk_usage(part).free
    if needed > free:
        raise BowstoreError(
            f"{shown(far.url)} needs {needed / 1e6:,.1f} MB, and the disk of {part.parent} has {free / 1e6:,.1f} MB "
            f"free; free some, or name a PATH on another disk"
        )
