"""What is in a tar: names, offsets and sizes from its headers, with the checks that `tarfile` does not make.

Nothing is ever extracted. `tarfile` ends quietly at a cut or a zeroed block; here the end of the archive must be
two zero blocks after the last member.
"""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from bowstore.errors import CorruptError, DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BLOCK_BYTES = 512
_KEY = re.compile(r"[!-\-/-~]+")  # printable ASCII without space and without dots


class Member(NamedTuple):
    """A regular file in a tar: its name, first byte and length."""

    name: str
    offset: int
    size: int


def split_key(name: str) -> tuple[str, str]:
    """Key and extension of a member: the extension is all behind the first dot of the last path component."""
    folder, slash, leaf = name.rpartition("/")
    stem, _, extension = leaf.partition(".")
    return folder + slash + stem, extension.lower()


def image_extension(name: str) -> bool:
    """Whether a member is an image by its extension."""
    return split_key(name)[1] in IMAGE_EXTENSIONS


def read_members(file: IO[bytes], path: Path) -> Iterator[Member]:
    """Yield the regular files of a tar, in order, from its headers.

    Raises:
        CorruptError: the archive is cut, or a zeroed block hides its rest; the message gives the byte.
        DataError: a member that is a link, a device, or has a name that the key contract forbids.
    """
    size_bytes = path.stat().st_size
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                end = info.offset_data + -(-info.size // BLOCK_BYTES) * BLOCK_BYTES if info.isreg() else archive.offset
                if info.isdir():
                    continue
                if end > size_bytes:
                    raise CorruptError(f"{path} is cut: member {info.name!r} ends at byte {end} of {size_bytes}")
                _check_member(info, path)
                yield Member(info.name, info.offset_data, info.size)
    except tarfile.TarError as error:
        raise CorruptError(f"{path} is not a whole tar: {error} (after byte {end} of {size_bytes})") from error
    _check_end(path, end, size_bytes)


def _check_end(path: Path, end: int, size_bytes: int) -> None:
    with open(path, "rb") as file:
        file.seek(end)
        rest = file.read(2 * BLOCK_BYTES)
        if len(rest) < 2 * BLOCK_BYTES or rest.strip(b"\0"):
            raise CorruptError(f"{path} is cut: no end-of-archive mark at byte {end} of {size_bytes}")
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise CorruptError(f"{path} has a zeroed block at byte {end}: data follows the end-of-archive mark")


def _check_member(info: tarfile.TarInfo, path: Path) -> None:
    name = info.name
    if not info.isreg():
        raise DataError(f"{path}: member {name!r} is a link or a device, not a file")
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{path}: member {name!r} climbs out of the archive")
    key, extension = split_key(name)
    if not _KEY.fullmatch(key) or not extension:
        raise DataError(f"{path}: member {name!r} is not <key>.<extension> in ASCII without white space and other dots")
