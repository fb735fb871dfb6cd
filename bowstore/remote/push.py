"""Uploads of word stores, so that whoever reads meanwhile, or after an upload was cut off, is not misled.

What the URL holds at any moment is no store, the old one, the new one, or one that says itself that it is half
uploaded. So files that no metadata there speaks of go first; if files change that the old store needs, its group first
gives up its layers and says so; the group's metadata comes last.
"""

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from bowstore.errors import CorruptError, MismatchError, MissingError
from bowstore.files import file_digest
from bowstore.progress import Progress
from bowstore.remote.folder import RemoteFolder
from bowstore.remote.record import Record
from bowstore.remote.store import (
    METADATA,
    UPLOADING,
    attributes_of,
    chunk_files,
    layer_names,
    metadata_below,
    parsed,
    store_metadata,
)
from bowstore.remote.urls import below, shown


@dataclass(frozen=True)
class Plan:
    """What the URL shall hold of a local store: the layers that are complete.

    Attributes:
        store: the local store.
        metadata: the metadata files, by their names in the store.
        digests: xxh3-128 of all files.
        sizes: their bytes.
    """

    store: Path
    metadata: dict[str, bytes]
    digests: dict[str, str]
    sizes: dict[str, int]


@dataclass(frozen=True)
class _Steps:
    """What is sent, in which order.

    Attributes:
        unseen: files that nobody reads yet.
        mark: metadata of the group while files of the old store change; None if none do.
        steps: all else; the files of a step may go side by side.
    """

    unseen: list[str]
    mark: bytes | None
    steps: list[list[str]]

    @property
    def names(self) -> list[str]:
        """All files."""
        return [*self.unseen, *(name for step in self.steps for name in step)]


def metadata_of(store: Path) -> tuple[dict[str, bytes], list[str]]:
    """The metadata that a URL shall have of a local store, and the names of layers that are left out as not complete.

    Raises:
        CorruptError: files are missing, or cannot be understood.
    """
    try:
        root = (store / METADATA).read_bytes()
        layers = layer_names(root, str(store))
        texts = {layer: (store / layer / METADATA).read_bytes() for layer in layers}
        complete = [name for name in layers if attributes_of(texts[name], f"{store}/{name}").get("complete")]
        if complete != layers:
            value = parsed(root, str(store))
            value["attributes"]["layers"] = complete
            root = json.dumps(value, indent=2).encode()
        metadata = metadata_below(root, lambda names: {n: (store / n).read_bytes() for n in names}, str(store))
    except FileNotFoundError as error:
        raise _damaged(store, error) from error
    return metadata, [name for name in layers if name not in complete]


def plan_of(store: Path, metadata: dict[str, bytes]) -> Plan:
    """What a URL shall hold of a local store, by `metadata_of` it.

    Raises:
        CorruptError: files are missing.
    """
    try:
        chunks = list(chunk_files(metadata, str(store)))
        sizes = {name: (store / name).stat().st_size for name in chunks}
        digests = {name: file_digest(store / name) for name in chunks}
    except FileNotFoundError as error:
        raise _damaged(store, error) from error
    sizes |= {name: len(text) for name, text in metadata.items()}
    digests |= {name: xxhash.xxh3_128_hexdigest(text) for name, text in metadata.items()}
    return Plan(store, metadata, digests, sizes)


def remote_metadata(folder: RemoteFolder) -> dict[str, bytes] | None:
    """The metadata of the store at a URL; None without one.

    Raises:
        MismatchError: a Zarr group that is no word store.
        CorruptError: metadata that cannot be understood.
        TransferError: no access, or no answer.
    """
    try:
        folder.remote.describe(below(folder.url, METADATA))
    except MissingError:
        return None
    return store_metadata(folder)


def check_unchanged(
    folder: RemoteFolder,
    there: dict[str, bytes] | None,
    record: Record,
    place: Path,
    planned: Mapping[str, str] | None = None,
) -> None:
    """Refuse a store at the URL that neither this machine put there nor its working copy was made of.

    Args:
        folder: the URL.
        there: its metadata.
        record: what it holds, as far as this machine knows.
        place: the folder of the working copy, for the message.
        planned: digests of files that are as well there already.

    Raises:
        MismatchError: somebody else changed it.
    """
    for name, text in (there or {}).items():
        digest = xxhash.xxh3_128_hexdigest(text)
        if not record.may_be(name, digest) and (planned or {}).get(name) != digest:
            raise MismatchError(
                f"word store {shown(folder.url)} was changed by somebody else ({name}) and is left as it is; to go on "
                f"from it remove {place}, which has this machine's words, or encode into another --store"
            )


def push(plan: Plan, folder: RemoteFolder, record: Record, *, display: bool = True) -> None:
    """Make the URL hold what is planned: files that it lacks or that are other ones are sent, side by side.

    Args:
        plan: of the local store.
        folder: the URL.
        record: what it holds, as far as this machine knows; kept up to date file by file.
        display: whether to show progress.

    Raises:
        MismatchError: somebody else changed the store at the URL, or the local one changes meanwhile.
        TransferError: no access, no answer, or no end of broken transfers.
    """
    there, sizes = remote_metadata(folder), folder.remote.sizes(folder.url)
    place = plan.store.parent
    check_unchanged(folder, there, record, place, plan.digests)
    if there == plan.metadata and plan.sizes.items() <= sizes.items() and not _changed(plan, record):
        record.replace(plan.digests)
        return
    steps = _steps(plan, folder, record, there or {}, sizes)
    begun = [(name, plan.digests[name]) for name in steps.names if name in plan.metadata]
    if steps.mark:
        begun.append((METADATA, xxhash.xxh3_128_hexdigest(steps.mark)))
    record.begin(begun)
    total, sent = sum(plan.sizes[name] for name in steps.names), 0
    done = len(plan.digests) - len(steps.names)
    with Progress("word store: upload", len(plan.digests), "files", done=done, shown=display) as progress:

        def arrived(name: str) -> None:
            nonlocal sent
            sent += plan.sizes[name]
            progress.advance(note=f"{sent / 1e6:.1f} of {total / 1e6:.1f} MB")

        folder.parallel([partial(_send, name, plan, folder, record) for name in steps.unseen], arrived)
        check_unchanged(folder, remote_metadata(folder), record, place, plan.digests)
        if steps.mark:
            folder.remote.upload(below(folder.url, METADATA), steps.mark)
        for step in steps.steps:
            folder.parallel([partial(_send, name, plan, folder, record) for name in step], arrived)
    record.replace(plan.digests)


def _changed(plan: Plan, record: Record) -> bool:
    """Whether the URL is known to hold other files than planned.

    What it knows nothing of is another machine's: where that found the same, metadata alike, the words are the same.
    """
    return any(record.files.get(name, digest) != digest for name, digest in plan.digests.items())


def _steps(plan: Plan, folder: RemoteFolder, record: Record, there: dict[str, bytes], sizes: dict[str, int]) -> _Steps:
    """Which files go, and when, by the metadata and the sizes of what is there."""
    url = shown(folder.url)
    todo = {
        name
        for name, digest in plan.digests.items()
        if record.files.get(name) != digest or sizes.get(name) != plan.sizes[name]
    }
    todo |= {name for name, text in there.items() if plan.metadata.get(name, text) != text}
    if there and UPLOADING in attributes_of(there[METADATA], url):
        there = {}  # nobody reads it
    layers = {f"{name}/{METADATA}" for name in layer_names(plan.metadata[METADATA], url)}
    if lost := {f"{name}/{METADATA}" for name in (layer_names(there[METADATA], url) if there else ())} - layers:
        raise MismatchError(
            f"{min(lost)} of {url} is a layer that {plan.store} has no more as a whole; encode it first"
        )
    needed = {*there, *chunk_files(there, url)} - {METADATA}
    chunks, arrays = plan.digests.keys() - plan.metadata.keys(), plan.metadata.keys() - layers - {METADATA}
    steps = [todo & chunks & needed, todo & arrays, todo & layers, todo & {METADATA}]
    mark = _half_uploaded(there[METADATA], url) if todo & needed else None
    if mark:
        steps[-1] = {METADATA}
    return _Steps(sorted(todo & chunks - needed), mark, [sorted(step) for step in steps])


def _half_uploaded(group: bytes, url: str) -> bytes:
    """Metadata of the group that lists no layers and says why."""
    value = parsed(group, url)
    value["attributes"] |= {"layers": [], UPLOADING: socket.gethostname()}
    return json.dumps(value, indent=2).encode()


def _send(name: str, plan: Plan, folder: RemoteFolder, record: Record) -> str:
    """Send a file, as it was planned; its name."""
    data = plan.metadata.get(name)
    if data is None:
        path = plan.store / name
        data = path.read_bytes() if path.exists() else b""
    if xxhash.xxh3_128_hexdigest(data) != plan.digests[name]:
        raise MismatchError(f"{plan.store / name} changed while it was uploaded; run the same command again")
    folder.remote.upload(below(folder.url, name), data)
    record.add(name, plan.digests[name])
    return name


def _damaged(store: Path, error: FileNotFoundError) -> CorruptError:
    return CorruptError(
        f"word store {store} lacks {error.filename}; run `bowstore verify --repair` on it, then the same command again"
    )
