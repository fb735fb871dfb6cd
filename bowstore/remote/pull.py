"""A whole copy of what `bowstore push` put at a URL, on this machine.

It arrives in `.NAME.part` beside its final name, manifest first, and gets that name once all its files are there.
"""

import shutil
from functools import partial
from pathlib import Path

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, MismatchError, MissingError, UsageError
from bowstore.files import atomic_file, exclusive_lock, make_folder, temporary_stem
from bowstore.progress import Progress
from bowstore.remote.cache import lock_file
from bowstore.remote.folder import RemoteFolder, is_there, settle
from bowstore.remote.manifest import MANIFEST_FILE, PUSHING_FILE, Manifest
from bowstore.remote.push import manifest_at
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
    far = RemoteFolder(url, storage)
    manifest = _whole(far)
    make_folder(path.parent)
    with exclusive_lock(lock_file(path), str(path)):
        if path.is_symlink() or (path.exists() and not _is_empty(path)):
            _check_copy(path, manifest)
            return manifest, 0
        part = path.with_name(f".{path.name}.part")
        _begin(part, manifest)
        missing = _missing(part, manifest)
        _fetch_all(far, part, manifest, missing)
        settle(part, path)
    return manifest, len(missing)


def _whole(far: RemoteFolder) -> Manifest:
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


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _missing(folder: Path, manifest: Manifest) -> list[str]:
    return [name for name, entry in manifest.files.items() if not is_there(folder / name, entry.size_bytes)]


def _check_copy(path: Path, manifest: Manifest) -> None:
    """Refuse what lies in a copy's place, unless it is that copy."""
    problem: str | None = f"it has no {MANIFEST_FILE}"
    if (path / MANIFEST_FILE).is_file():
        problem = manifest.difference(_read(path))
        if not problem and (changed := _missing(path, manifest)):
            problem = f"{changed[0]} is not as it was pulled"
    if problem:
        raise MismatchError(f"{path} is there already and is no copy of the URL ({problem}); name another PATH")


def _read(folder: Path) -> Manifest:
    return Manifest.parse((folder / MANIFEST_FILE).read_bytes(), str(folder / MANIFEST_FILE))


def _begin(part: Path, manifest: Manifest) -> None:
    """Make the folder in which the copy arrives, or go on with that of an interrupted pull of the same."""
    part.mkdir(exist_ok=True)
    if all(temporary_stem(path) for path in part.iterdir()):
        with atomic_file(part / MANIFEST_FILE) as file:
            file.write(manifest.text())
    there = _read(part) if (part / MANIFEST_FILE).is_file() else None
    problem = manifest.difference(there) if there else f"it has no {MANIFEST_FILE}"
    if problem:
        raise MismatchError(f"{part} holds something else ({problem}); move it away, or name another PATH")


def _fetch_all(far: RemoteFolder, part: Path, manifest: Manifest, names: list[str]) -> None:
    files = manifest.files
    needed, free = sum(files[name].size_bytes for name in names), shutil.disk_usage(part).free
    if needed > free:
        raise BowstoreError(
            f"{shown(far.url)} needs {needed / 1e6:,.1f} MB, and the disk of {part.parent} has {free / 1e6:,.1f} MB "
            f"free; free some, or name a PATH on another disk"
        )
    with Progress("pull: fetch", len(files), "files", done=len(files) - len(names)) as progress:
        jobs = [partial(far.fetch_into, part, n, files[n].size_bytes, digest=files[n].digest) for n in names]
        far.bring(jobs, needed, progress)
