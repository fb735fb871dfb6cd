"""Local copies of remote word stores.

HTTP has no listing, so the files of a store are worked out from its metadata (docs/store-format.md): a Zarr v3 group
whose arrays say how they are cut into chunks.
"""

import itertools
import json
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from bowstore.config import StorageConfig
from bowstore.errors import CorruptError, MismatchError, MissingError, TransferError
from bowstore.files import atomic_file, waiting_lock
from bowstore.progress import Progress
from bowstore.remote import cache
from bowstore.remote.folder import RemoteFolder, is_there, settle, tell_once
from bowstore.remote.urls import below, is_remote, shown

ROOT_ARRAYS = ("key_hash", "image_digest")
LAYER_ARRAYS = ("words", "vocabulary", "document_frequency", "nearest", "nearest_distance", "chunk_digest")
PROJECTION_ARRAYS = ("projection", "projection_offset")
METADATA = "zarr.json"
_UPLOADING = "uploading"  # attribute that versions before `bowstore push` left in a store that they half uploaded
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
        MismatchError: a Zarr group that is no word store, or one that changes while it is read, or is half uploaded.
        CorruptError: metadata that cannot be understood.
        TransferError: no access, no answer, or no end of broken transfers.
        UsageError: the cache can never hold it.
    """
    if not is_remote(path):
        return path
    folder = RemoteFolder(path, storage)
    have_copy = any(folder.folder.glob(f"*{cache.STORE_SUFFIX}"))
    try:
        metadata = _metadata(folder, retries=0 if have_copy else None)
    except TransferError as error:
        whole = sorted(folder.folder.glob(f"*{cache.STORE_SUFFIX}"), key=lambda p: (p / METADATA).stat().st_atime_ns)
        if not whole:
            raise
        tell_once(f"{str(error).split(';')[0]}: using the copy {whole[-1]}", about=folder.url)
        return _use(whole[-1])
    url = shown(folder.url)
    if machine := _attributes(metadata[METADATA], url).get(_UPLOADING):
        raise MismatchError(
            f"word store {url} was half uploaded by an earlier version; machine {machine} has it whole below writing/ "
            f"in its cache: `bowstore push` it to another URL from there"
        )
    copy = _copy_place(folder, metadata)
    with waiting_lock(cache.lock_file(copy), "", shown=False):
        if not copy.exists():
            _build(folder, copy, metadata, display=display)
        elif not cache.read_record(copy):  # a copy of before there were records
            cache.write_store_record(copy, (*metadata, *_chunk_files(metadata, url)))
        return _use(copy)


def _copy_place(folder: RemoteFolder, metadata: dict[str, bytes]) -> Path:
    """Where the copy of a store with this metadata lies, or would."""
    version = xxhash.xxh3_64_hexdigest(
        b"".join(f"{name} {len(text)};".encode() + text for name, text in sorted(metadata.items()))
    )
    return folder.folder / f"{version}{cache.STORE_SUFFIX}"


def _use(copy: Path) -> Path:
    """Record the use of a copy, and hold it until the process ends."""
    handle = copy / METADATA
    cache.mark_used(handle)
    if copy not in _HELD:
        _HELD[copy] = os.open(handle, os.O_RDONLY)
        cache.hold(_HELD[copy])
    return copy


def _metadata(folder: RemoteFolder, *, retries: int | None = None) -> dict[str, bytes]:
    """All metadata files of a remote store, by their names in it.

    Args:
        folder: the store.
        retries: further tries for the first file; None for as many as any transfer has.

    Raises:
        MissingError: no store there.
        MismatchError: a Zarr group that is no word store.
        CorruptError: metadata that cannot be understood.
        TransferError: no access, or no answer.
    """
    url = shown(folder.url)
    try:
        root = folder.remote.read(below(folder.url, METADATA), retries=retries)
    except MissingError as error:
        raise MissingError(f"no word store at {url} (it has no {METADATA}); check the URL") from error

    def read(names: list[str]) -> dict[str, bytes]:
        found: list[tuple[str, bytes]] = []
        folder.parallel([partial(_read, folder, name) for name in names], found.append)
        return dict(found)

    layers = _attributes(root, url).get("layers")
    if not isinstance(layers, list) or not all(_plain_name(name) for name in layers):
        raise MismatchError(f"{url} is a Zarr group but not a bowstore word store; name another URL")
    arrays = ROOT_ARRAYS[:1] if _attributes(root, url).get("format_version") == 2 else ROOT_ARRAYS
    found = {METADATA: root, **read([f"{name}/{METADATA}" for name in (*arrays, *layers)])}
    below_layers = [f"{layer}/{a}" for layer in layers for a in _arrays(found[f"{layer}/{METADATA}"], f"{url}/{layer}")]
    return {**found, **read([f"{name}/{METADATA}" for name in below_layers])}


def _attributes(text: bytes, what: str) -> dict[str, Any]:
    """The attributes in a metadata file.

    Raises:
        CorruptError: it cannot be understood.
    """
    attributes = _parsed(text, what).get("attributes", {})
    return attributes if isinstance(attributes, dict) else {}


def _arrays(layer: bytes, url: str) -> tuple[str, ...]:
    """Names of a layer's arrays, by its metadata; metadata that is damaged is refused where chunks are worked out."""
    try:
        projected = _attributes(layer, url).get("projection") is not None
    except CorruptError:
        projected = False
    return LAYER_ARRAYS + (PROJECTION_ARRAYS if projected else ())


def _read(folder: RemoteFolder, name: str) -> tuple[str, bytes]:
    return name, folder.remote.read(below(folder.url, name))


def _build(folder: RemoteFolder, copy: Path, metadata: dict[str, bytes], *, display: bool) -> None:
    """Bring all files of a store, going on from those that are here; the metadata is written last."""
    part, url = copy.with_name(f".{copy.name}.part"), shown(folder.url)
    names = list(_chunk_files(metadata, url))
    sizes: dict[str, int] = {}
    with Progress("word store: look", len(names), "files", shown=display) as progress:

        def measured(name: str, size_bytes: int) -> None:
            sizes[name] = size_bytes
            progress.advance()

        folder.parallel([partial(_measure, folder, name) for name in names], lambda found: measured(*found))
    missing = {name: size for name, size in sizes.items() if not is_there(part / name, size)}
    needed = sum(missing.values()) + sum(map(len, metadata.values()))
    cache.write_store_record(copy, (*metadata, *names))
    cache.reserve(needed, f"word store {url}", folder.storage, keep={part})
    with Progress("word store: fetch", len(names), "files", done=len(names) - len(missing), shown=display) as progress:
        jobs = [partial(folder.fetch_into, part, name, size) for name, size in missing.items()]
        folder.bring(jobs, needed, progress)
    if _metadata(folder) != metadata:
        raise MismatchError(f"word store {url} changed while it was read; run the command again")
    for name, text in metadata.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(part / name) as file:
            file.write(text)
    settle(part, copy)


def _measure(folder: RemoteFolder, name: str) -> tuple[str, int]:
    """A file's name and length."""
    found = folder.remote.describe(below(folder.url, name)).size_bytes
    if found is None:
        raise TransferError(f"{shown(below(folder.url, name))}: the server does not say its length; use another server")
    return name, found


def _chunk_files(metadata: dict[str, bytes], url: str) -> Iterator[str]:
    """Names of all chunks of the arrays that are whole: those of the group, and those of complete layers.

    Raises:
        CorruptError: metadata that cannot be understood.
    """
    values = {name: _parsed(text, f"{url}/{name}") for name, text in metadata.items()}
    files = 0
    for name, value in values.items():
        layer, slash, array = name.removesuffix(METADATA).rstrip("/").partition("/")
        if not layer or (not slash and layer not in ROOT_ARRAYS):
            continue  # a group
        if array and not values[f"{layer}/{METADATA}"].get("attributes", {}).get("complete"):
            continue
        try:
            counts, separator = _chunk_counts(value)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CorruptError(f"{url}/{name} is no metadata of a Zarr array ({error!r}); encode anew") from error
        files += math.prod(counts)
        if files > _MAX_FILES:
            raise CorruptError(f"{url} asks for more than {_MAX_FILES} files: its metadata is damaged; encode anew")
        for place in itertools.product(*map(range, counts)):
            yield f"{layer}{slash}{array}/{separator.join(('c', *map(str, place)))}"


def _chunk_counts(array: dict[str, Any]) -> tuple[list[int], str]:
    """Chunks along each axis of an array, and what separates the numbers in their keys."""
    shape, grid, encoding = array["shape"], array["chunk_grid"], array["chunk_key_encoding"]
    if grid["name"] != "regular" or encoding["name"] != "default":
        raise ValueError(f"chunk grid {grid['name']!r} with keys {encoding['name']!r}")
    sides = grid["configuration"]["chunk_shape"]
    separator = encoding.get("configuration", {}).get("separator", "/")
    if separator not in ("/", "."):
        raise ValueError(f"separator {separator!r}")
    return [math.ceil(length / side) for length, side in zip(shape, sides, strict=True)], separator


def _parsed(text: bytes, what: str) -> dict[str, Any]:
    """A metadata file's content.

    Raises:
        CorruptError: it is no JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CorruptError(f"{what} is not valid JSON ({error}); encode anew") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{what} holds a {type(value).__name__}, not metadata; encode anew")
    return value


def _plain_name(name: object) -> bool:
    return isinstance(name, str) and name != "" and not name.startswith(".") and "/" not in name and "\0" not in name
