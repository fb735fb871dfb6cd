"""Tars inside of tars, read in place: only headers are read to list them, and nothing is extracted."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

from bowstore.data.tar import BrokenTar, Member, TarReader
from bowstore.errors import CorruptError


class NestedTar(TarReader):
    """A tar that is a file, or a member of one.

    Attributes:
        name: for messages: the file, and the member in it.
        start: its first byte in the file, from which members' places are counted.
    """

    def __init__(self, file: io.FileIO, name: Path | str, start: int = 0, size_bytes: int | None = None) -> None:
        super().__init__(file, name, lambda _: None, buffer_bytes=0)
        self.name, self.start = str(name), start
        if size_bytes is not None:
            self.size_bytes = size_bytes

    def inside(self, member: Member) -> "NestedTar":
        """A member of it that is a tar itself."""
        return NestedTar(self._file, f"{self.name}: {member.name}", self.start + member.offset, member.size)

    def members(self) -> Iterator[Member]:
        """Its regular files; none of them is read.

        Raises:
            CorruptError: it is cut or damaged; with the byte.
            DataError: a member that is neither a file nor a folder.
        """
        try:
            while member := self.next_member():
                yield member._replace(name=member.name.removeprefix("./"))
        except BrokenTar as error:
            remedy = "" if ";" in str(error) else "; fetch it anew"  # some have their own: unpack it first
            raise CorruptError(f"{error}{remedy}") from error

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes from `start` to `stop`, or to the end, by a read of their own."""
        count = max(0, min(stop, self.size_bytes) - start)
        return memoryview(os.pread(self._file.fileno(), count, self.start + start))
