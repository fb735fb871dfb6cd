"""Tars inside of tars, read in place: only headers are read to list them, and nothing is extracted.

`tarfile` reads the headers. It ends quietly at a cut, a damaged header or a zeroed block, so what it leaves is looked
at here: the end of an archive must be two zero blocks with nothing behind them.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bowstore.beginnings import foreign_kind
from bowstore.data.tar import BLOCK_BYTES, Member
from bowstore.errors import BowstoreError, CorruptError, DataError
from bowstore.files import check_plain_file

_BUFFER_BYTES = 2 * BLOCK_BYTES  # a header, and the byte before it, which tells whether the member before is whole
_ZEROS_AT_ONCE = 1 << 20


class _Part(io.RawIOBase):
    """Some bytes of an open file, as a file of their own."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size, self._position = descriptor, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(min(len(buffer), self._size - self._position), 0)
        data = os.pread(self._descriptor, count, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class NestedTar:
    """A tar that is a file, or a member of one.

    Attributes:
        name: for messages: the file, and the member in it.
        start: its first byte in the file.
        size: its length.
    """

    def __init__(self, descriptor: int, name: str, start: int, size: int) -> None:
        self.name, self.start, self.size = name, start, size
        self._descriptor = descriptor

    def inside(self, member: Member) -> "NestedTar":
        """A member of it that is a tar itself."""
        return NestedTar(self._descriptor, f"{self.name}: {member.name}", member.offset, member.size)

    def first_bytes(self, member: Member, count: int) -> bytes:
        """The beginning of a member."""
        return os.pread(self._descriptor, min(count, member.size), member.offset)

    def members(self) -> Iterator[Member]:
        """Its regular files, with their places in the file that holds all; none of them is read.

        Raises:
            CorruptError: it is cut or damaged; with the byte.
            DataError: a member that is neither a file nor a folder.
        """
        part = io.BufferedReader(_Part(self._descriptor, self.start, self.size), _BUFFER_BYTES)
        end = 0
        try:
            with tarfile.open(fileobj=part, mode="r:") as tar:
                while info := tar.next():
                    if info.size < 0 or tar.offset <= end:  # a header that leads back would be read for ever
                        raise self._broken(end, "the size of a member is damaged")
                    end = tar.offset
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if info.isreg() and not info.issparse():
                        yield Member(info.name.removeprefix("./"), self.start + info.offset_data, info.size)
                    elif not info.isdir():
                        raise DataError(f"{self.name}: member {info.name!r} is no plain file; fetch the archive anew")
                end = tar.offset
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise self._broken(end, " ".join(str(error).split())) from error
        self._check_end(end)

    def _check_end(self, end: int) -> None:
        if self.size - end < 2 * BLOCK_BYTES:
            raise self._broken(end, "no end-of-archive mark")
        position = end
        while position < self.size:
            block = os.pread(self._descriptor, min(_ZEROS_AT_ONCE, self.size - position), self.start + position)
            if not block or block.strip(b"\0"):
                raise self._broken(end, "a damaged header, or data behind the end-of-archive mark")
            position += len(block)

    def _broken(self, byte: int, reason: str) -> CorruptError:
        if not byte and (kind := foreign_kind(os.pread(self._descriptor, min(BLOCK_BYTES, self.size), self.start))):
            return CorruptError(f"{self.name} is no tar but {kind}")
        byte = min(byte, self.size)  # a member that is cut would end behind it
        return CorruptError(f"{self.name} is cut or damaged at byte {byte} of {self.size} ({reason}); fetch it anew")


@contextmanager
def open_tar(path: Path) -> Iterator[NestedTar]:
    """A tar on disk; closed behind the block.

    Raises:
        CorruptError: it is no file.
        DataError: it cannot be read.
    """
    check_plain_file(path)
    try:
        with open(path, "rb") as file:
            yield NestedTar(file.fileno(), str(path), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        if isinstance(error, BowstoreError):
            raise
        raise DataError(f"cannot read {path}: {error.strerror}; make it readable, or take it away") from error
