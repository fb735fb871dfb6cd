"""`bowstore push` and `bowstore pull`: whole word stores, folders of shards and runs, to a URL and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bowstore.config import StorageConfig
from bowstore.data.table import INDEX_FILE
from bowstore.data.verify import is_shards_folder
from bowstore.errors import MismatchError, MissingError
from bowstore.remote.manifest import Kind, Manifest
from bowstore.remote.pull import pull
from bowstore.remote.push import push
from bowstore.remote.urls import shown, url_of
from bowstore.runs import is_run


@dataclass(frozen=True)
class CopyReport:
    """A copy, and what was done for it.

    Attributes:
        place: the folder, or the URL.
        manifest: of the copy.
        moved: files that were sent or fetched; those of earlier, interrupted calls do not count.
    """

    place: str
    manifest: Manifest
    moved: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        made = self.manifest
        return {
            "place": self.place,
            "kind": made.kind,
            "licence": made.licence,
            "files": len(made.files),
            "size_bytes": made.size_bytes,
            "moved": self.moved,
        }

    def text(self) -> str:
        """A line for people."""
        made = self.manifest
        what = f"{made.kind}, {len(made.files)} files, {made.size_bytes / 1e6:,.1f} MB, licence {made.licence}"
        return f"{self.place}: {what}; {f'{self.moved} files copied now' if self.moved else 'all there already'}"


def push_path(path: Path, url: Path, *, licence: str, storage: StorageConfig | None = None) -> CopyReport:
    """Copy a word store, a folder of shards (or one of such folders), or a run to a URL of its own.

    Args:
        path: what is copied.
        url: where to.
        licence: under which others may use it.
        storage: how often and how long a server is tried.

    Raises:
        MissingError: nothing there of these kinds.
        MismatchError: a store that is not complete; and as `bowstore.remote.push.push`.
    """
    manifest, sent = push(path, url, kind=kind_of(path), licence=licence, storage=storage)
    return CopyReport(shown(url_of(url)), manifest, sent)


def pull_path(url: Path, path: Path, *, storage: StorageConfig | None = None) -> CopyReport:
    """Copy what was pushed to a URL, as `bowstore.remote.pull.pull`."""
    manifest, fetched = pull(url, path, storage=storage)
    return CopyReport(str(path), manifest, fetched)


def kind_of(path: Path) -> Kind:
    """What a folder is that others may want.

    Raises:
        MissingError: nothing of these kinds, or shards without their index.
        MismatchError: a store that is not complete.
    """
    if (path / "zarr.json").exists():
        _check_complete(path)
        return "store"
    below = sorted(path.glob("*/")) if path.is_dir() else []
    if shards := [folder for folder in (path, *below) if is_shards_folder(folder)]:
        if unindexed := next((folder for folder in shards if not (folder / INDEX_FILE).exists()), None):
            raise MissingError(f"{unindexed} has no {INDEX_FILE}; run `bowstore index {unindexed}` first")
        return "shards"
    if is_run(path):
        return "run"
    raise MissingError(f"{path} is neither a word store nor a folder of shards, nor a run; name one that is")


def _check_complete(path: Path) -> None:
    from bowstore.words.store.store import Store  # Zarr, for a store alone

    layers = Store(path).every_layer.values()
    if unfinished := next((layer.name for layer in layers if not layer.complete), None):
        raise MismatchError(
            f"layer {unfinished!r} of word store {path} is not complete; run its `bowstore encode` again first"
        )
    if not layers:
        raise MismatchError(f"word store {path} has no layer yet; run its `bowstore encode` first")
