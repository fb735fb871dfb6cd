"""Local copies of remote word stores.

HTTP has no listing, so the files of a store are worked out from its metadata (docs/store-format.md): a Zarr v3 group
whose arrays say how they are cut into chunks.
"""

import itertools
import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bowstore.config import StorageConfig
from bowstore.errors import CorruptError, MismatchError, MissingError
from bowstore.files import atomic_file, waiting_lock
from bowstore.remote import cache
from bowstore.remote.folder import RemoteFolder, settle
from bowstore.remote.transfer import PARALLEL, Remote, Wanted
from bowstore.remote.urls import is_remote, shown
from bowstore.words.store.schema import FORMAT, FORMAT_VERSION, STORE_ARRAYS, layer_arrays

METADATA = "zarr.json"
_MAX_FILES = 10**6  # that metadata may ask for; ImageNet's conv4 words are a thousand
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
    folder = RemoteFolder(path, storage)
    metadata = _metadata(folder.remote)
    text = b"".join(f"{name} {len(text)};".encode() + text for name, text in sorted(metadata.items()))
    copy = folder.folder / f"{xxhash.xxh3_64_hexdigest(text)}.zarr"
    with waiting_lock(cache.lock_file(copy), "", shown=False):
        if not copy.exists():
            _build(folder, copy, metadata, display=display)
        handle = copy / METADATA
        cache.mark_used(handle)
        if copy not in _HELD:
            _HELD[copy] = os.open(handle, os.O_RDONLY)
            cache.hold(_HELD[copy])
    return copy


def _metadata(remote: Remote) -> dict[str, bytes]:
    """All metadata files of a remote store, by their names in it."""
    url = shown(remote.url)
    try:
        root = remote.read(METADATA)
    except MissingError as error:
        raise MissingError(f"no word store at {url} (it has no {METADATA}); check the URL") from error
    about = _parsed(root, url)["attributes"]
    layers = about.get("layers")
    if about.get("format") != FORMAT or not isinstance(layers, list) or not all(map(_is_plain, layers)):
        raise MismatchError(f"{url} is a Zarr group but not a bowstore word store; name another URL")
    if about.get("format_version") != FORMAT_VERSION:
        raise MismatchError(
            f"word store {url} has format version {about.get('format_version')!r}, this bowstore reads "
            f"{FORMAT_VERSION}; make its words anew: `bowstore encode --store` with another path"
        )

    def read(groups: Iterable[str]) -> dict[str, bytes]:
        names = [f"{group}/{METADATA}" for group in groups]
        with ThreadPoolExecutor(PARALLEL) as pool:
            return dict(zip(names, pool.map(remote.read, names), strict=True))

    found = {METADATA: root, **read([*STORE_ARRAYS, *layers])}
    about_layers = {layer: _parsed(found[f"{layer}/{METADATA}"], f"{url}/{layer}")["attributes"] for layer in layers}
    arrays = {layer: layer_arrays(projected=bool(its.get("projection"))) for layer, its in about_layers.items()}
    return found | read(f"{layer}/{array}" for layer in layers for array in arrays[layer])


def _build(folder: RemoteFolder, copy: Path, metadata: dict[str, bytes], *, display: bool) -> None:
    """Bring all files of a store, going on from those that are here; the metadata is written last."""
    part, url = cache.part_of(copy), shown(folder.url)
    names, size_bytes = _chunks(metadata, url)
    cache.reserve(size_bytes, f"word store {url}", folder.storage, arrived=part)
    folder.remote.fetch_into(part, dict.fromkeys(names, Wanted()), "word store: fetch", display=display)
    for name, text in metadata.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(part / name) as file:
            file.write(text)
    cache.write_record(copy, of=part)
    settle(part, copy)


def _chunks(metadata: dict[str, bytes], url: str) -> tuple[list[str], int]:
    """Names of all chunks of the arrays that are whole, and their bytes, uncompressed: words shrink little."""
    names, size_bytes = list[str](), 0
    parsed = {name.removesuffix(METADATA): _parsed(text, f"{url}/{name}") for name, text in metadata.items()}
    for place, array in parsed.items():
        layer = parsed[f"{place.partition('/')[0]}/"] if place.count("/") == 2 else None
        if array.get("node_type") == "group" or (layer and not layer["attributes"].get("complete")):
            continue
        try:
            grid, keys = array["chunk_grid"], array["chunk_key_encoding"]
            if (grid["name"], keys["name"]) != ("regular", "default"):
                raise ValueError(f"chunk grid {grid['name']!r} with keys {keys['name']!r}")
            separator = keys.get("configuration", {}).get("separator", "/")
            sides = zip(array["shape"], grid["configuration"]["chunk_shape"], strict=True)
            counts = [math.ceil(length / side) for length, side in sides]
            size_bytes += math.prod(array["shape"]) * np.dtype(array["data_type"]).itemsize
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CorruptError(
                f"{url}/{place}{METADATA} is no metadata of a Zarr array ({error!r}); encode anew"
            ) from error
        if len(names) + math.prod(counts) > _MAX_FILES:
            raise CorruptError(f"{url} asks for more than {_MAX_FILES} files: its metadata is damaged; encode anew")
        numbers = itertools.product(*map(range, counts))
        names += [f"{place}{separator.join(('c', *map(str, chunk)))}" for chunk in numbers]
    return names, size_bytes


def _parsed(text: bytes, what: str) -> dict[str, Any]:
    """A metadata file's content, attributes and all."""
    try:
        value = {"attributes": {}, **json.loads(text)}
        return {**value, "attributes": dict(value["attributes"])}
    except (ValueError, TypeError) as error:
        raise CorruptError(f"{what} is no metadata of Zarr ({error}); encode anew") from error


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name != "" and not name.startswith(".") and "/" not in name and "\0" not in name
