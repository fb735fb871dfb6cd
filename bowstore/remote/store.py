"""Local copies of remote word stores.

HTTP has no listing, so the files of a store are those that its metadata asks for (docs/store-format.md).
"""

import os
import shutil
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import xxhash

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError
from bowstore.files import waiting_lock
from bowstore.remote import cache
from bowstore.remote.folder import RemoteFolder, settle
from bowstore.remote.transfer import Remote, Wanted
from bowstore.remote.urls import is_plain, is_remote, shown
from bowstore.words.store.schema import STORE_ARRAYS, layer_arrays

if TYPE_CHECKING:
    import zarr

METADATA = "zarr.json"
_HELD: dict[Path, int] = {}  # descriptors that keep this process's copies in the cache


def fetch_store(path: Path, storage: StorageConfig | None = None, *, display: bool = True) -> Path:
    """The local copy of a remote word store, whole; a path that is no URL comes back as it is.

    The copy belongs to the store's metadata: when any of it changes, another copy is made. It stays in the cache for
    as long as this process lives. Words and digests are checked where they are loaded, as those of any store.

    Args:
        path: the store.
        storage: the cache and its bound; None for the defaults.
        display: whether to show progress.

    Raises:
        MissingError: no store there, or one without all its files.
        MismatchError: a Zarr group that is no word store, or one of another version.
        CorruptError: metadata that cannot be understood.
        TransferError: no access, no answer, or no end of broken transfers.
        UsageError: the cache can never hold it.
    """
    if not is_remote(path):
        return path
    folder, identity = RemoteFolder(path, storage), xxhash.xxh3_64()
    with TemporaryDirectory() as temporary:
        metadata = Path(temporary, "words")  # the folder around it is open to this user alone
        try:
            arrays = _whole_arrays(folder, metadata)
        except BowstoreError as error:  # of the copy of the metadata
            raise type(error)(str(error).replace(str(metadata), shown(folder.url))) from error
        for name, text in sorted((str(f.relative_to(metadata)), f.read_bytes()) for f in metadata.rglob(METADATA)):
            identity.update(f"{name} {len(text)};".encode() + text)
        copy = folder.folder / f"{identity.hexdigest()}.zarr"
        with waiting_lock(cache.lock_file(copy), "", shown=False):
            if not copy.exists():
                _build(folder, copy, metadata, arrays, display=display)
            cache.mark_used(copy / METADATA)
            if copy not in _HELD:
                _HELD[copy] = os.open(copy / METADATA, os.O_RDONLY)
                cache.hold(_HELD[copy])
    return copy


def _whole_arrays(remote: Remote, place: Path) -> "list[zarr.Array[Any]]":
    """Bring the metadata of a store, all of it, to a folder; its arrays, but for those of layers without all words."""
    from bowstore.words.store.arrays import reading  # Zarr, for a store alone
    from bowstore.words.store.store import Root, Store

    def bring(names: Iterable[str]) -> None:
        remote.fetch_into(place, dict.fromkeys(names, Wanted()), "", display=False)

    bring([METADATA])
    with reading(f"word store {place}", "encode anew"):
        opened = Root(place)
        if not all(map(is_plain, opened.names)):
            raise ValueError(f"layers {list(opened.names)}")
        bring(f"{name}/{METADATA}" for name in (*STORE_ARRAYS, *opened.names))
        for layer in opened.names:
            projected = bool(opened.root[layer].attrs.get("projection"))
            bring(f"{layer}/{name}/{METADATA}" for name in layer_arrays(projected=projected))
        store = Store(place)
        whole = [store, *(store.every_layer[name] for name in store.layers)]
        return [each.array(name) for each in whole for name in each.arrays]


def _build(folder: RemoteFolder, copy: Path, metadata: Path, arrays: "list[zarr.Array[Any]]", *, display: bool) -> None:
    """Bring the chunks of a store, going on from those that are here."""
    part, what = cache.part_of(copy), f"word store {shown(folder.url)}"
    size_bytes = sum(array.nbytes for array in arrays)  # uncompressed: words shrink little
    cache.reserve(size_bytes, what, folder.storage, arrived=part)
    chunks = (
        f"{array.path}/{array.metadata.encode_chunk_key(chunk)}"
        for array in arrays
        for chunk in product(*map(range, array.cdata_shape))
    )
    folder.fetch_into(part, dict.fromkeys(chunks, Wanted()), "word store: fetch", display=display)
    shutil.copytree(metadata, part, dirs_exist_ok=True)
    cache.write_record(copy, of=part)
    settle(part, copy)
