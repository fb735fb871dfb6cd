"""Features in the cache: an .npy file a tap, `features/<key>-<n>.npy`, memory-mapped.

Its record holds the key and a digest of the file: a damaged file, or another one under its name, is never used. One
process writes the files of a key, others wait for them.

Legend: N images, d feature width.
"""

import hashlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.lib import format as npy

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError
from bowstore.evaluate.config import FeatureType
from bowstore.evaluate.features import Arrays, Feature, variation
from bowstore.files import check_plain_file, file_digest, leftovers, make_folder, open_new, temporary_path, waiting_lock
from bowstore.progress import say
from bowstore.remote.cache import (
    cache_root,
    hold,
    is_as_recorded,
    lock_file,
    mark_used,
    read_record,
    reserve,
    write_record,
)

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class FeatureSet:
    """Features of one split.

    Attributes:
        taps: (N, d) by tap, float32 or float16.
        variation: how much each varies between images.
    """

    taps: Arrays
    variation: Mapping[str, float]


def read_features(key: str, taps: Sequence[str], storage: StorageConfig) -> FeatureSet | None:
    """The features that are kept under a key, every byte checked; None where one is missing.

    What is damaged is named, and counts as missing; so does what the machine cannot read.
    """
    arrays: dict[str, Feature] = {}
    shares: dict[str, float] = {}
    for tap, path in zip(taps, _paths(key, len(taps), storage), strict=True):
        try:
            check_plain_file(path)
            opened = _opened(path, {"key": key, "tap": tap})
        except FileNotFoundError:
            return None
        except (OSError, BowstoreError) as error:
            say(f"warning: kept features are not used: {error}")
            return None
        if opened is None:
            say(f"{path} is damaged, or not the file that was recorded: its features are taken again")
            return None
        arrays[tap], shares[tap] = opened
    return FeatureSet(arrays, shares)


def size_bytes(shapes: Shapes, dtype: FeatureType) -> int:
    """Of the features of all taps."""
    return sum(np.dtype(dtype).itemsize * images * width for images, width in shapes.values())


def write_features(
    key: str, shapes: Shapes, storage: StorageConfig, fill: Callable[..., object], *, what: str, dtype: FeatureType
) -> FeatureSet | None:
    """Keep features under a key, or wait for the process that does; None, and a line, where the cache has no room.

    Args:
        key: theirs.
        shapes: (N, d) by tap.
        storage: says where the cache lies and how large it may be.
        fill: fills the arrays `into`, which lie on the disk.
        what: name of the features for messages.
        dtype: of the arrays.
    """
    with ExitStack() as stack:
        try:
            paths = dict(zip(shapes, _paths(key, len(shapes), storage), strict=True))
            first = next(iter(paths.values()))
            make_folder(first.parent)
            stack.enter_context(waiting_lock(lock_file(first), f"{what} ({first})"))
            if found := read_features(key, list(shapes), storage):
                return found
            for path in paths.values():
                for old in (path, *leftovers(path, own=True)):
                    old.unlink(missing_ok=True)
            reserve(size_bytes(shapes, dtype), what, storage)
            temporaries = {tap: temporary_path(path) for tap, path in paths.items()}
            for temporary in temporaries.values():
                stack.callback(temporary.unlink, missing_ok=True)
            arrays = {tap: _new_array(temporaries[tap], shape, dtype) for tap, shape in shapes.items()}
        except (OSError, BowstoreError) as error:
            say(f"warning: {what} are held in memory and not kept: {error}")
            return None
        fill(into=arrays)
        for tap, path in paths.items():
            share = variation(arrays[tap])
            arrays.pop(tap).flush()
            digest = file_digest(temporaries[tap])
            write_record(path, of=temporaries[tap], key=key, tap=tap, digest=digest, variation=share)
            os.replace(temporaries[tap], path)
        return read_features(key, list(shapes), storage)


def _paths(key: str, count: int, storage: StorageConfig) -> list[Path]:
    return [cache_root(storage) / "features" / f"{key}-{n}.npy" for n in range(count)]


def _new_array(path: Path, shape: tuple[int, int], dtype: FeatureType) -> "np.memmap[Any, Any]":
    """A new file, mapped; all of its blocks are the file's now, as a map of a full disk ends the process."""
    with open_new(path) as file:
        descr = np.dtype(dtype).newbyteorder("<").str
        npy.write_array_header_2_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        file.flush()
        os.posix_fallocate(file.fileno(), file.tell(), size_bytes({"": shape}, dtype))
    return npy.open_memmap(path, mode="r+")


def _opened(path: Path, known: Mapping[str, str]) -> tuple[Feature, float] | None:
    """A tap's array and how much it varies; None if the file or its record is another one."""
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        hold(file.fileno())
        record = read_record(path)
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        if not record.items() >= {**known, "digest": digest}.items():
            return None
        if not is_as_recorded(path):  # copied with its record
            with suppress(OSError):
                write_record(path, **{name: record[name] for name in (*known, "digest", "variation")})
        mark_used(path)
        stack.pop_all()
        return _mapped(file), float(record["variation"])


def _mapped(file: IO[bytes]) -> Feature:
    """The array of an open file, which stays open, and is held, for as long as the array lives.

    Mapped copy-on-write: torch wants arrays that can be written, and nobody writes into the file.
    """
    file.seek(0)
    npy.read_magic(file)
    shape, _, dtype = npy.read_array_header_2_0(file)
    array = np.memmap(file, dtype, "c", file.tell(), shape)
    weakref.finalize(array, file.close)
    return array
