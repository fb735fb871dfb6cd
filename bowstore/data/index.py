"""One table over all shards of a data set: where each sample's bytes lie, its size, its label.

Built from tar headers and image headers only. Kept as one safetensors file whose columns are opened memory-mapped,
so that all ranks of a machine share the pages. Holds each tar's size and digest; a tar that does not match is
refused by name. DALI's own `v1.2` index files are written beside the tars.

Legend: N samples.
"""

import io
import json
import struct
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save

from bowstore.data.tar import Member, image_extension, read_members, split_key
from bowstore.environment import cores
from bowstore.errors import CorruptError, DataError, MismatchError, MissingError
from bowstore.files import atomic_file, file_digest, read_json
from bowstore.progress import Progress

INDEX_FILE = "index.safetensors"
INDEX_VERSION = 1
_COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int32,
    "height": np.int32,
    "width": np.int32,
    "label": np.int32,
    "key_hash": np.uint64,
    "key_start": np.int64,
    "key_bytes": np.uint8,
}


class ShardEntry(NamedTuple):
    """One tar: file name, number of samples, size in bytes, xxh3-128 digest as hex."""

    name: str
    samples: int
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class Index:
    """The opened table; columns are read-only and memory-mapped.

    Attributes:
        root: folder of the tars.
        shards: the tars, in order.
        classes: class names; a label is a place in it. Empty when nobody recorded the names.
        fingerprint: 32 hex digits over keys, order and tar digests: equal means the same samples in the same order.
        shard: int32 (N,), which tar.
        offset: int64 (N,), first byte of the image in the tar.
        size: int32 (N,), bytes of the image.
        height: int32 (N,), pixels, from the image's header.
        width: int32 (N,), pixels.
        label: int32 (N,), -1 where there is none.
        key_hash: uint64 (N,), xxh3-64 of the ASCII key.
    """

    root: Path
    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...]
    fingerprint: str
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    label: NDArray[np.int32]
    key_hash: NDArray[np.uint64]
    key_start: NDArray[np.int64]
    key_bytes: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, row: int) -> str:
        """Key of a row: the member's path in the tar without the extension."""
        return self.key_bytes[self.key_start[row] : self.key_start[row + 1]].tobytes().decode("ascii")

    def keys(self) -> Iterator[str]:
        """All keys in row order."""
        return (self.key(row) for row in range(len(self)))


def build_index(root: Path, *, classes: tuple[str, ...] = (), workers: int | None = None) -> Index:
    """Read the headers of all tars below `root` and write the index and DALI's index files.

    Args:
        root: folder with `*.tar`.
        classes: class names in label order, recorded in the index.
        workers: threads; None for one a core.

    Raises:
        MissingError: no folder, or no tar in it.
        CorruptError: a tar that ends early or is not a tar; named with the byte.
        DataError: keys that break the contract (duplicates, dots, white space), images without readable headers.
    """
    if not root.is_dir():
        raise MissingError(f"no folder {root}; `bowstore shards SRC OUT` makes shards")
    paths = sorted(root.glob("*.tar"))
    if not paths:
        raise MissingError(f"no *.tar file in {root}; name the folder that holds the shards themselves")
    parts = _scan(paths, workers)
    columns, entries = _merge(parts, paths)
    _refuse_duplicates(columns)
    fingerprint = xxhash.xxh3_128(columns["key_hash"].tobytes())
    for entry in entries:
        fingerprint.update(f"{entry.samples} {entry.size_bytes} {entry.digest};".encode())
    meta = {
        "version": INDEX_VERSION,
        "fingerprint": fingerprint.hexdigest(),
        "classes": list(classes),
        "shards": [list(entry) for entry in entries],
    }
    for path, part in zip(paths, parts, strict=True):
        _write_dali_index(path, part.samples)
    with atomic_file(root / INDEX_FILE) as file:
        file.write(save(columns, metadata={"bowstore": json.dumps(meta)}))
    return open_index(root)


def open_index(root: Path) -> Index:
    """Open the index of a folder of shards; checks that every tar is there with its recorded size.

    Raises:
        MissingError: no index, or a tar is gone.
        CorruptError: an index that cannot be read.
        MismatchError: a tar's size is not the one that was indexed.
    """
    path = root / INDEX_FILE
    try:
        meta, columns = _map_columns(path)
    except FileNotFoundError as error:
        inside = sorted(p.parent.name for p in root.glob(f"*/{INDEX_FILE}"))
        hint = f"; did you mean {root / inside[0]}?" if inside else f"; run `bowstore index {root}` first"
        raise MissingError(f"no index in {root}{hint}") from error
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise CorruptError(f"{path} is damaged ({error}); run `bowstore index {root}` again") from error
    if meta["version"] != INDEX_VERSION:
        raise MismatchError(
            f"{path} has format {meta['version']}, this bowstore reads {INDEX_VERSION}; run `bowstore index {root}`"
        )
    index = Index(
        root=root,
        shards=tuple(ShardEntry(*entry) for entry in meta["shards"]),
        classes=tuple(meta["classes"]),
        fingerprint=meta["fingerprint"],
        **columns,
    )
    check_sizes(index)
    return index


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
                f"restore it, or run `bowstore index {index.root}` and encode again"
            )


def check_digests(index: Index) -> list[str]:
    """Read every tar and compare digests; return one line for each that differs."""
    problems = []
    with Progress("digests", sum(entry.size_bytes for entry in index.shards), "bytes") as progress:
        for entry in index.shards:
            if file_digest(index.root / entry.name) != entry.digest:
                problems.append(f"shard {index.root / entry.name}: bytes changed after indexing (digest differs)")
            progress.advance(entry.size_bytes)
    return problems


def known_classes(root: Path) -> tuple[str, ...]:
    """Class names of a folder that bowstore wrote (its manifest), or none."""
    path = root / "manifest.json"
    return tuple(read_json(path).get("classes", ())) if path.exists() else ()


class _ShardTable(NamedTuple):
    samples: list["_Sample"]
    size_bytes: int
    digest: str


class _Sample(NamedTuple):
    key: str
    image: Member
    height: int
    width: int
    label: int
    members: list[Member]


def _scan(paths: Sequence[Path], workers: int | None) -> list["_ShardTable"]:
    """The tables of all tars, in order, read in threads."""
    parts: list[_ShardTable] = []
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers or cores()) as pool,
        Progress("index", len(paths), "shards") as progress,
    ):
        # Pillow warns of half of what it refuses; a header alone costs nothing.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for part in pool.map(_scan_shard, paths):
            parts.append(part)
            progress.advance()
    return parts


def _scan_shard(path: Path) -> _ShardTable:
    """Samples of one tar, from its headers and the headers of its images."""
    samples: list[_Sample] = []
    group: list[Member] = []
    seen: set[str] = set()
    with open(path, "rb") as file:
        for member in read_members(file, path):
            if group and split_key(member.name)[0] != split_key(group[0].name)[0]:
                samples.append(_sample(file, path, group))
                group = []
            group.append(member)
        if group:
            samples.append(_sample(file, path, group))
    for sample in samples:
        if sample.key in seen:
            raise DataError(f"{path}: key {sample.key!r} occurs twice; keys must be unique")
        seen.add(sample.key)
    return _ShardTable(samples, path.stat().st_size, file_digest(path))


def _sample(file: Any, path: Path, group: Sequence[Member]) -> _Sample:
    key = split_key(group[0].name)[0]
    images = [m for m in group if image_extension(m.name)]
    if len(images) != 1:
        names = ", ".join(m.name for m in group[:5])
        raise DataError(f"{path}: sample {key!r} has {len(images)} images, not one (members: {names})")
    file.seek(images[0].offset)
    try:
        data = io.BytesIO(file.read(images[0].size))
        with Image.open(data, formats=("JPEG", "PNG", "WEBP")) as image:  # reads the header, decodes nothing
            width, height = image.size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: image {images[0].name!r} has no readable header ({error}); `bowstore shards` would set it aside"
        ) from error
    label = -1
    for member in group:
        if split_key(member.name)[1] == "cls":
            file.seek(member.offset)
            text = file.read(member.size).strip()
            if not text.isdigit() or len(text) > 9:
                raise DataError(f"{path}: label {member.name!r} holds {text[:20]!r}, not a whole number from 0 on")
            label = int(text)
    return _Sample(key, images[0], height, width, label, list(group))


def _merge(
    parts: Sequence[_ShardTable], paths: Sequence[Path]
) -> tuple[dict[str, NDArray[Any]], tuple[ShardEntry, ...]]:
    samples = [(number, sample) for number, part in enumerate(parts) for sample in part.samples]
    if not samples:
        raise DataError(f"{paths[0].parent}: the shards hold no image")
    keys = [sample.key.encode("ascii") for _, sample in samples]
    starts = np.concatenate([[0], np.cumsum([len(key) for key in keys])])
    columns: dict[str, NDArray[Any]] = {
        "shard": np.array([number for number, _ in samples], np.int32),
        "offset": np.array([sample.image.offset for _, sample in samples], np.int64),
        "size": np.array([sample.image.size for _, sample in samples], np.int32),
        "height": np.array([sample.height for _, sample in samples], np.int32),
        "width": np.array([sample.width for _, sample in samples], np.int32),
        "label": np.array([sample.label for _, sample in samples], np.int32),
        "key_hash": np.array([xxhash.xxh3_64_intdigest(key) for key in keys], np.uint64),
        "key_start": starts.astype(np.int64),
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
    }
    entries = tuple(
        ShardEntry(path.name, len(part.samples), part.size_bytes, part.digest)
        for path, part in zip(paths, parts, strict=True)
    )
    return columns, entries


def _refuse_duplicates(columns: dict[str, NDArray[Any]]) -> None:
    hashes, counts = np.unique(columns["key_hash"], return_counts=True)
    if len(hashes) == len(columns["key_hash"]):
        return
    rows = np.flatnonzero(np.isin(columns["key_hash"], hashes[counts > 1]))[:5]
    starts = columns["key_start"]
    names = [columns["key_bytes"][starts[row] : starts[row + 1]].tobytes().decode() for row in rows]
    raise DataError(f"{int((counts > 1).sum())} keys occur more than once, for example {names}; keys must be unique")


def _write_dali_index(path: Path, samples: Sequence[_Sample]) -> None:
    """DALI's text index, v1.2: a line a sample, `extension offset size name` for each member."""
    lines = [f"v1.2 {len(samples)}"]
    for sample in samples:
        lines.append(" ".join(f"{split_key(m.name)[1]} {m.offset} {m.size} {m.name}" for m in sample.members))
    with atomic_file(path.with_suffix(".idx")) as file:
        file.write(("\n".join(lines) + "\n").encode())


def _map_columns(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Header and memory-mapped columns of a safetensors file.

    The library's own loader copies every tensor into private memory; the format (8 bytes of header length, JSON,
    flat little-endian tensors) is plain enough to map, which lets the ranks of one machine share the pages.
    """
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        if header_bytes > size_bytes:
            raise ValueError(f"header of {header_bytes} bytes in a file of {size_bytes}")
        header = json.loads(file.read(header_bytes))
    meta = json.loads(header.pop("__metadata__")["bowstore"])
    blob = np.memmap(path, dtype=np.uint8, mode="r")
    columns = {}
    for name, dtype in _COLUMNS.items():
        start, stop = header[name]["data_offsets"]
        if 8 + header_bytes + stop > size_bytes:
            raise ValueError(f"column {name} ends at byte {8 + header_bytes + stop} of {size_bytes}")
        columns[name] = blob[8 + header_bytes + start : 8 + header_bytes + stop].view(dtype)
    return meta, columns
