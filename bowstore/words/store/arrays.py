"""Zarr groups and arrays, made safe: durable writes, digests, errors of one line that name the place.

The one place that turns a path into a Zarr store. Zarr's own local writes are atomic but not durable; it reads
a missing chunk as fill values; its errors name no chunk.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import xxhash
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from bowstore.errors import BowstoreError, CorruptError, is_machine_error
from bowstore.files import atomic_file, check_plain_file, make_folder, sweep_temporary, temporary_stem
from bowstore.words.store.schema import ArraySpec, Writer

_ZSTD_LEVEL = 1  # word ids hardly compress; the checksum is what the codec is for
# Whatever Zarr, its codecs and NumPy raise for damaged bytes or metadata (seen by damaging each of them).
READ_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError, OSError, EOFError, BadZipFile)
_OBJECT = re.compile(r"(?:.+/)?zarr\.json|(?:.+/)?c(?:/[0-9]+)*")  # of Zarr, by its name in a group

_Kind = TypeVar("_Kind", zarr.Group, zarr.Array[Any])
_WRITE_ALL: Any = {"write_empty_chunks": True}  # so that a chunk that is gone is never taken for one that is all fill


class SafeStore(LocalStore):
    """Zarr's local store whose objects are whole or absent, even after a power cut.

    It opens plain files alone: on a pipe under an object's name it would wait for ever.
    """

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read one object; here and now, which takes less than to hand it to another thread."""
        return self.get_sync(key, prototype=prototype, byte_range=byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read one object."""
        path = self.root / key
        if not path.is_dir():  # which Zarr takes for a missing object
            check_plain_file(path)
        return super().get_sync(key, prototype=prototype, byte_range=byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        """Write one object."""
        self.set_sync(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write one object unless it is there."""
        if not (self.root / key).exists():
            self.set_sync(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write one object, fsync it and every folder that gained an entry."""
        self._check_writable()
        path = self.root / key
        make_folder(path.parent)
        with atomic_file(path) as file:
            file.write(value.as_buffer_like())


def stored_bytes(path: Path) -> int:
    """Bytes of all objects below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def sweep_leftovers(path: Path) -> None:
    """Remove what killed writers left below `path`; under the lock of its store."""
    for folder in [path, *(found for found in path.rglob("*") if found.is_dir())]:
        sweep_temporary(folder)


def foreign_file(path: Path) -> Path | None:
    """What lies at or below a path and is none of Zarr's folders, metadata and chunks; None if nothing does."""
    for found in (path, *path.rglob("*")):
        ours = found.is_dir() or _OBJECT.fullmatch(found.relative_to(path).as_posix()) or temporary_stem(found)
        if found.is_symlink() or (found.exists() and not ours):
            return found
    return None


def remove(path: Path) -> None:
    """Remove what lies at a path, file or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def member(group: zarr.Group, name: str, kind: type[_Kind]) -> _Kind:
    """What is below a group, refused if it is not of this kind."""
    item = group.get(name)
    if not isinstance(item, kind):
        raise ValueError(f"{kind.__name__.lower()} {name} is missing")
    return item


@dataclass(eq=False)
class Arrays:
    """What has arrays: a word store, or one of its layers.

    Attributes:
        path: of the store.
        root: its group.
        prefix: of the arrays' names in it.
        attributes: plain values.
        arrays: the table's, by name.
        sizes: what the table's letters are.
    """

    path: Path
    root: zarr.Group
    prefix: str
    attributes: dict[str, Any]
    arrays: Mapping[str, ArraySpec]
    sizes: Mapping[str, int]

    def array(self, name: str) -> zarr.Array[Any]:
        """One of its arrays, to write or to read without a check; refused if it is not as the table has it."""
        name, spec, sizes = self.prefix + name, self.arrays[name], self.sizes
        item = member(self.root, name, zarr.Array)
        if item.shape != spec.shape(sizes):
            raise ValueError(f"{name} has shape {item.shape}, not {spec.shape(sizes)}")
        if item.dtype != spec.dtype or not np.array_equal(item.fill_value, spec.fill, equal_nan=True):
            raise ValueError(f"{name} is {item.dtype} filled with {item.fill_value}, not {spec.dtype} with {spec.fill}")
        return item.with_config(_WRITE_ALL)  # Zarr does not keep this setting with the array

    def read_array(self, name: str) -> NDArray[Any]:
        """An array that is written whole, checked against its recorded digest.

        Raises:
            CorruptError: missing, undecodable, or other than what was recorded; says whether it can be made good.
        """
        digest, lost = self.attributes.get(f"{name}_digest"), self.arrays[name].writer is Writer.CREATION
        what = f"array {self.prefix}{name} of word store {self.path}"
        with reading(what, "restore it from a copy, or encode into a new store" if lost else repair_of(self.path)):
            values = np.asarray(self.array(name)[:])
            if hex_digest(values) != digest:
                raise CorruptError(f"{what} differs from its recorded digest {digest}")
        return values

    def create(self, given: Mapping[str, NDArray[Any]]) -> None:
        """Create all arrays, with the values that are given; chunks carry a checksum, and all of them are written."""
        for name, spec in self.arrays.items():
            made = self.root.create_array(
                self.prefix + name,
                shape=spec.shape(self.sizes),
                chunks=spec.chunk_shape(self.sizes),
                dtype=np.dtype(spec.dtype),
                fill_value=spec.fill,
                compressors=[ZstdCodec(level=_ZSTD_LEVEL, checksum=True)],
                config=_WRITE_ALL,
            )
            if name in given:
                made[:] = given[name]


def as_stored(array: NDArray[Any]) -> memoryview:
    """An array's little-endian C-order bytes, of which digests are."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data


def array_digest(array: NDArray[Any]) -> int:
    """xxh3-64 of an array's bytes; never 0, which means "none"."""
    return xxhash.xxh3_64_intdigest(as_stored(array)) or 1


def hex_digest(array: NDArray[Any]) -> str:
    """`array_digest` as 16 hex digits, for attributes (JSON has no 64-bit integers)."""
    return f"{array_digest(array):016x}"


def repair_of(path: Path) -> str:
    """What to do about damage that can be made good, for messages."""
    return f"run `bowstore verify --repair {path}`, which says how to go on"


@contextmanager
def reading(what: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever is raised for damage into one line that names the place, and says what to do about it."""
    then = f"; {remedy}" if remedy else ""
    try:
        yield
    except CorruptError as error:
        raise CorruptError(f"{error}{then}") from error
    except BowstoreError:
        raise
    except READ_ERRORS as error:
        if is_machine_error(error):  # a chunk that could not be read now is not damaged: a repair would discard it
            raise
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise CorruptError(f"{what} cannot be read ({first}){then}") from error
