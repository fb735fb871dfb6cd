"""One table over all shards of a data set: where each sample's bytes lie, its size, its label.

Built from one pass over the tars. Kept as one safetensors file whose columns are opened memory-mapped, so that all
ranks of a machine share the pages. Holds each tar's size and digest, each image's digest, and a digest of itself;
what does not match is refused by name.

Legend: N samples.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bowstore.config import SomePaths, StorageConfig, places
from bowstore.data.index_build import write_index
from bowstore.data.records import IndexMeta, ShardEntry, checked
from bowstore.data.scan import ScanSettings
from bowstore.data.sources.base import NO_LABEL
from bowstore.data.table import (
    COLUMNS,
    INDEX_FILE,
    INDEX_VERSION,
    digest_columns,
    joint_fingerprint,
    map_columns,
    read_header,
)
from bowstore.errors import CorruptError, MismatchError, MissingError
from bowstore.remote import RemoteFolder, Wanted, is_remote

_EXAMPLES = 5


class Folder(NamedTuple):
    """A folder of tars.

    Attributes:
        root: its path; of a remote folder, that of the local copies.
        shards: the tars, in order.
        remote: where tars come from that are not here yet; None for a local folder.
    """

    root: Path
    shards: tuple[ShardEntry, ...]
    remote: Any = None


@dataclass(frozen=True)
class Index:
    """The opened table; columns are read-only, and those of one folder memory-mapped.

    Attributes:
        folders: where the tars lie; rows of one folder follow those of another.
        classes: class names; a label is a place in it. Empty when nobody recorded the names.
        fingerprint: 32 hex digits over keys, order and tar digests: equal means the same samples in the same order.
        settings: how image and label of a sample were chosen; of several folders, in the first.
        columns_digest: xxh3-128 over all columns, hex, as recorded (see `check_columns`); of several, over theirs.
        shard: int32 (N,), which tar of `shards`.
        offset: int64 (N,), first byte of the image in the tar.
        size: int32 (N,), bytes of the image.
        height: int32 (N,), pixels, from the image's header.
        width: int32 (N,), pixels.
        label: int32 (N,), -1 where there is none.
        key_hash: uint64 (N,), xxh3-64 of the ASCII key.
        digest: uint64 (N,), xxh3-64 of the image's bytes.
        key_start: int64 (N + 1,), first byte of each key in `key_bytes`.
        key_bytes: uint8, all keys in a row.
        storage: how bytes are read.
    """

    folders: tuple[Folder, ...]
    classes: tuple[str, ...]
    fingerprint: str
    settings: ScanSettings
    columns_digest: str
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    label: NDArray[np.int32]
    key_hash: NDArray[np.uint64]
    digest: NDArray[np.uint64]
    key_start: NDArray[np.int64]
    key_bytes: NDArray[np.uint8]
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def shards(self) -> tuple[ShardEntry, ...]:
        """The tars of all folders, in order."""
        return tuple(entry for folder in self.folders for entry in folder.shards)

    @property
    def root(self) -> Path:
        """The folder, of an index of one."""
        (folder,) = self.folders
        return folder.root

    @property
    def place(self) -> str:
        """The folders, for messages."""
        return ", ".join(str(folder.root) for folder in self.folders)

    def folder(self, shard: int) -> Folder:
        """The folder of a tar."""
        ends = accumulate(len(folder.shards) for folder in self.folders)
        return next(folder for folder, end in zip(self.folders, ends, strict=True) if shard < end)

    def key(self, row: int) -> str:
        """Key of a row: the member's path in the tar without the extension."""
        return self.key_bytes[self.key_start[row] : self.key_start[row + 1]].tobytes().decode("ascii")

    def keys(self) -> Iterator[str]:
        """All keys in row order."""
        return (self.key(row) for row in range(len(self)))

    def tar_path(self, shard: int) -> Path:
        """Local path of a tar, which is fetched first where it lies elsewhere."""
        entry, folder = self.shards[shard], self.folder(shard)
        if folder.remote is None:
            return folder.root / entry.name
        path: Path = folder.remote.fetch(entry.name, Wanted(entry.size_bytes, entry.digest))
        return path


def build_index(
    root: Path,
    *,
    classes: tuple[str, ...] = (),
    settings: ScanSettings | None = None,
    workers: int | None = None,
) -> Index:
    """Read all tars of `root` once and write the index.

    Images without a readable header in shards that others made are left out, and listed in `quarantine.jsonl`.

    Args:
        root: folder with `*.tar`.
        classes: class names in label order, recorded in the index.
        settings: which member is the image and which the label; None for the usual ones.
        workers: processes; None for up to one a core, where there is enough to do; 1 for none beside this one.

    Raises:
        MissingError: no folder, or no tar in it.
        CorruptError: a tar that is cut or damaged; named with the byte.
        DataError: keys that break the contract (duplicates, dots, white space), samples with several images, members
            that no shard may hold, no usable image; an image without a readable header in shards of bowstore's own.
        MismatchError: tars that are not those of bowstore's own manifest.
    """
    write_index(root, classes, settings or ScanSettings(), workers)
    return open_index(root)


def open_index(folders: SomePaths, storage: StorageConfig | None = None) -> Index:
    """Open the index of a folder of shards, or those of several as one (`joined`).

    Columns are checked, and that every tar is there with its recorded size. A flipped bit of a label, a place or a key
    must not become a result: all columns are read once and compared with their digest, at the speed of memory (0.1 s
    for ImageNet).

    Args:
        folders: local or remote ones; of a remote one only the index is fetched, and each tar checked when it comes.
        storage: how bytes are read and where local copies lie; None for the defaults.

    Raises:
        MissingError: no index, or a tar is gone.
        CorruptError: an index that cannot be read, or that is not the one that was written.
        MismatchError: an index of another version, or a tar's size is not the one that was indexed; or folders that
            do not go together.
    """
    return joined([_open_folder(folder, storage or StorageConfig()) for folder in places(folders)])


def _open_folder(root: Path, storage: StorageConfig) -> Index:
    if is_remote(root):
        remote = RemoteFolder(root, storage)
        remote.fetch(INDEX_FILE)
        return check_columns(read_index(remote.folder, remote, storage))
    index = check_columns(read_index(root, None, storage))
    check_sizes(index)
    return index


def joined(parts: Sequence[Index]) -> Index:
    """Indexes of several folders as one, each after the other.

    Labels are places in the classes of all, by their names. Unlike those of one, columns are private memory of each
    process, 75 bytes a row and more.

    Raises:
        MismatchError: a key in two of them, or labels in one of which nobody recorded what they mean in the other.
    """
    if len(parts) == 1:
        return parts[0]
    index = concatenated(parts)
    order_N = np.argsort(index.key_hash, kind="stable")
    ordered_N = index.key_hash[order_N]
    twice = np.sort(order_N[1:][ordered_N[1:] == ordered_N[:-1]])
    if len(twice):
        raise MismatchError(
            f"{len(twice)} of {len(index)} keys are in more than one of {index.place}, for example "
            f"{', '.join(map(index.key, twice[:_EXAMPLES].tolist()))}; keys are paths in shards: name each folder "
            "once, and of sets that use the same paths make one anew, from the folder above it"
        )
    return index


def concatenated(parts: Sequence[Index]) -> Index:
    """As `joined`, of parts that may hold the same keys."""
    shards, key_bytes = ([len(getattr(part, name)) for part in parts] for name in ("shards", "key_bytes"))
    before = zip(parts, accumulate(shards, initial=0), accumulate(key_bytes, initial=0), strict=False)
    shard, starts = zip(*((part.shard + tars, part.key_start[:-1] + byte) for part, tars, byte in before), strict=True)
    classes, label_N = _joint_labels(parts)
    plain = (name for name in COLUMNS if name not in ("shard", "label", "key_start"))
    columns: dict[str, Any] = {name: _row([getattr(part, name) for part in parts]) for name in plain}
    return replace(
        parts[0],
        folders=tuple(folder for part in parts for folder in part.folders),
        classes=classes,
        fingerprint=joint_fingerprint([part.fingerprint for part in parts]),
        columns_digest=joint_fingerprint([part.columns_digest for part in parts]),
        shard=_row(shard),
        label=label_N,
        key_start=_row([*starts, np.array([sum(key_bytes)])]),
        **columns,
    )


def _row(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    row = np.concatenate([np.asarray(array) for array in arrays])  # memory maps would make another one, of no file
    row.setflags(write=False)
    return row


def _joint_labels(parts: Sequence[Index]) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """The classes of all parts, and their labels as places in these.

    What has the same classes everywhere keeps their order; others are sorted, as those of a folder are.
    """
    named = {part.classes for part in parts if part.classes}
    classes = next(iter(named)) if len(named) == 1 else tuple(sorted({name for names in named for name in names}))
    place, found = {name: number for number, name in enumerate(classes)}, []
    for part in parts:
        if not named or part.classes == classes:
            found.append(part.label)
            continue
        if int(part.label.max()) >= len(part.classes) or len(set(part.classes)) < len(part.classes):
            raise MismatchError(
                f"the labels of {part.place} cannot be told from others of {', '.join(p.place for p in parts)}: their "
                "classes have no names of their own; write both with `bowstore shards`, or leave one out"
            )
        label_C = np.array([*(place[name] for name in part.classes), NO_LABEL], np.int32)  # -1 takes the last one
        found.append(label_C[part.label])
    return classes, _row(found)


def read_index(root: Path, remote: Any = None, storage: StorageConfig | None = None) -> Index:
    """Open the index that lies in a local folder, without a look at the tars.

    Raises:
        MissingError: no index.
        CorruptError: an index that cannot be read.
        MismatchError: an index of another version.
    """
    path = root / INDEX_FILE
    try:
        header = read_header(path)
        version = header.meta.get("version")
        if version != INDEX_VERSION:
            raise MismatchError(
                f"{path} has format {version}, this bowstore reads {INDEX_VERSION}; run `bowstore index {root}`"
            )
        meta = checked(IndexMeta, json.dumps(header.meta))
        return Index(
            folders=(Folder(root, tuple(meta.shards), remote),),
            classes=tuple(meta.classes),
            fingerprint=meta.fingerprint,
            settings=ScanSettings(tuple(meta.image_ext), meta.label_field),
            columns_digest=meta.columns,
            **map_columns(path, header),
            storage=storage or StorageConfig(),
        )
    except FileNotFoundError as error:
        if not root.is_dir():
            raise MissingError(f"no folder {root}; name the one that holds the shards") from error
        inside = sorted(p.parent.name for p in root.glob(f"[!.]*/{INDEX_FILE}"))
        hint = f"; did you mean {root / inside[0]}?" if inside else f"; run `bowstore index {root}` first"
        raise MissingError(f"no index in {root}{hint}") from error
    except (MismatchError, CorruptError):
        raise
    except ValueError as error:
        raise CorruptError(f"{path} is damaged ({error}); run `bowstore index {root}` again") from error


def check_sizes(index: Index) -> None:
    """Refuse tars that are gone or whose size differs from the index (fast: one stat each)."""
    for entry in index.shards:
        path = index.root / entry.name
        try:
            size_bytes = path.stat().st_size
        except FileNotFoundError as error:
            raise MissingError(
                f"shard {path} is in the index but not on disk; restore it, or run `bowstore index {index.root}`"
            ) from error
        if size_bytes != entry.size_bytes:
            raise MismatchError(
                f"shard {path} has {size_bytes} bytes, the index says {entry.size_bytes}: it changed after indexing; "
                f"`bowstore verify {index.root}` says where"
            )


def check_columns(index: Index) -> Index:
    """The same index, once all its columns are compared with their recorded digest.

    Raises:
        CorruptError: they differ.
    """
    if digest_columns(lambda name: getattr(index, name)) != index.columns_digest:
        raise CorruptError(
            f"{index.root / INDEX_FILE} is damaged (its columns differ from their digest); "
            f"run `bowstore index {index.root}` again"
        )
    return index
