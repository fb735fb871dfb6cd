"""What is in a tar: names, offsets and sizes from its headers, with the checks that `tarfile` does not make.

Nothing is ever extracted. `tarfile` ends quietly at a cut, a damaged header or a zeroed block, and so do readers
built on it; here each is an error that names the byte, and the end of the archive must be two zero blocks with
nothing behind them.
"""

import io
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import xxhash

from bowstore.beginnings import foreign_kind
from bowstore.errors import CorruptError, DataError
from bowstore.files import check_plain_file

TARS = "[!.]*.tar"  # of a folder, as `Path.glob` takes it; ._NAME.tar is macOS's, beside each NAME.tar
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp")
BLOCK_BYTES = 512
_ZEROS = bytes(BLOCK_BYTES)
_READ_BYTES = 1 << 22
_NAME_BYTES = 100  # of a USTAR header; longer names are split over the prefix field, or lie in a header of their own
_PREFIX = slice(345, 500)
_SIZE = slice(124, 136)
_CHECKSUM = slice(148, 156)
_BASE_256 = 0x80  # first byte of a size that GNU tar writes in binary
_REGULAR = (b"0", b"\0", b"7")
_FOLDER = b"5"
_EXTENDED = (b"x", b"X", b"g", b"L", b"K")
_MAX_EXTENDED_BYTES = 1 << 20  # of a PAX header or a GNU long name
_OCTAL_LIMIT = 8**11  # from here on, sizes do not fit the header's field and PAX tells them
_KEY = re.compile(r"[!-\-/-~]+")  # printable ASCII without space and without dots
_EXTENSION = re.compile(r"[!-~]+")
_PASSED_OVER = (b"V", b"D")  # GNU tar's volume label, and its listing of a folder, which may have data
_REFUSED_KINDS = {
    b"1": "a hard link, not a plain file; pack the files anew with `tar --hard-dereference`",
    b"2": "a symbolic link, not a plain file; pack the files anew with `tar --dereference`",
    b"3": "a device, not a plain file",
    b"4": "a device, not a plain file",
    b"6": "a FIFO, not a plain file",
    b"S": "a sparse file, not a plain file; pack the files anew without --sparse",
    b"M": "the rest of a file that begins in another volume; pack the files anew without --multi-volume",
}
_MAX_SIZE_DIGITS = 19  # of 2^63; int() refuses thousands of them
_MAX_LENGTH_DIGITS = 7  # of a PAX record, which lies in a header of `_MAX_EXTENDED_BYTES`


class Member(NamedTuple):
    """A regular file in a tar: its name, first byte and length."""

    name: str
    offset: int
    size: int


class _Placed:
    """Where in the tar an error lies."""

    byte: int = 0
    member: str | None = None

    def at(self, byte: int, member: str | None = None) -> Self:
        """Set the place and return the error."""
        self.byte, self.member = byte, member
        return self


class BrokenTar(_Placed, CorruptError):
    """A tar that is cut, or whose headers are damaged."""


class RefusedMember(_Placed, DataError):
    """A member that no shard may hold: a link, a device, a size that lies."""


def split_key(name: str) -> tuple[str, str]:
    """Key and extension of a member: the extension is all behind the first dot of the last path component.

    A leading `./`, as GNU tar writes it, belongs to neither.
    """
    folder, slash, leaf = name.removeprefix("./").rpartition("/")
    stem, _, extension = leaf.partition(".")
    return folder + slash + stem, extension.lower()


def image_extension(extension: str) -> bool:
    """Whether a member's extension (`jpg`, `0.jpg`, `seg.png`) is that of an image."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def keeps_contract(key: str, extension: str) -> bool:
    """Whether a name is <key>.<extension> in ASCII without white space and without other dots in the key."""
    return _KEY.fullmatch(key) is not None and _EXTENSION.fullmatch(extension) is not None


def header_names(header: bytes, name: bytes) -> bool:
    """Whether a tar header is that of a member whose name begins with `name` (a key with its dot, or all of it).

    A GNU or PAX long name leaves only its first 100 bytes in the plain header.
    """
    found = plain_name(header)
    bare = found.removeprefix(b"./")
    return bare.startswith(name) or (len(found) >= _NAME_BYTES and name.startswith(bare))


def plain_name(header: bytes) -> bytes:
    """Name in a tar header, as it stands there: a long one may be cut."""
    name = header[:_NAME_BYTES].rstrip(b"\0")
    prefix = header[_PREFIX].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def open_tar_file(path: Path) -> io.FileIO:
    """Open a tar for a `TarReader`.

    Raises:
        CorruptError: it is no file.
        OSError: it cannot be opened.
    """
    check_plain_file(path)
    return open(path, "rb", buffering=0)


class TarReader:
    """One tar, or one that is a member of another, read once from front to back.

    Attributes:
        name: for messages: the file, and the member in it.
        start: its first byte in the file; all other places are counted from here.
        size_bytes: length of the tar.
        position: byte of the next header.
    """

    def __init__(
        self,
        file: io.FileIO,
        name: Path | str,
        report: Callable[[int], None],
        *,
        start: int = 0,
        size_bytes: int | None = None,
        digested: bool = False,
    ) -> None:
        """Start at the first byte.

        Args:
            file: of `open_tar_file`.
            name: as above.
            report: hears the number of further bytes that lie behind.
            start: as above.
            size_bytes: as above; None for the whole file.
            digested: whether all bytes are read, for `digest`; otherwise headers and what is asked for.
        """
        self.name, self.start, self.position = str(name), start, 0
        self.size_bytes = os.fstat(file.fileno()).st_size if size_bytes is None else size_bytes
        self._file, self._report, self._passed = file, report, 0
        self._digest = xxhash.xxh3_128() if digested else None

    def inside(self, member: Member) -> "TarReader":
        """A member that is a tar itself."""
        start, name = self.start + member.offset, f"{self.name}: {member.name}"
        return TarReader(self._file, name, lambda _: None, start=start, size_bytes=member.size)

    def next_member(self) -> Member | None:
        """The next regular file; None behind the last.

        Raises:
            BrokenTar: the archive is cut, a header is damaged, or a zeroed block hides the rest; with the byte.
            RefusedMember: a link, a device, a sparse file, sizes that contradict each other.
        """
        long_name: str | None = None
        long_size: int | None = None
        while True:
            start = self.position
            self._pass(start)
            header = self.part(start, start + BLOCK_BYTES)
            if header == _ZEROS or len(header) < BLOCK_BYTES:
                if not start:
                    self._refuse_foreign(header)
                self._check_end()
                return None
            self._check_sum(header)
            name, size, kind = self._plain_name(header), self._plain_size(header), header[156:157]
            if kind in _REGULAR or kind == _FOLDER:
                if long_name is not None:
                    name = self._agreed_name(name, long_name)
                if long_size is not None:
                    size = self._agreed_size(name, size, long_size)
                if kind in _REGULAR and not (kind == b"\0" and name.endswith("/")):
                    return self._regular(name, size)
                self.position = start + BLOCK_BYTES
                long_name = long_size = None
            elif kind in _PASSED_OVER:
                self._regular(name, size)
                long_name = long_size = None
            elif kind in _EXTENDED:
                data = self._extended(name, size)
                if kind == b"L":
                    long_name = _text(data.partition(b"\0")[0])
                elif kind != b"K":
                    records = self._pax_records(start, data, shared=kind == b"g")
                    long_name = _text(records["path"]) if "path" in records else long_name
                    long_size = int(records["size"]) if "size" in records else long_size
            else:
                what = _REFUSED_KINDS.get(kind, f"of the unknown type {kind!r}, not a plain file")
                raise self._refused(name, f"is {what}")

    def read(self, member: Member) -> bytes:
        """Bytes of a member.

        Raises:
            BrokenTar: the file got shorter while it was read.
        """
        data = self.part(member.offset, member.offset + member.size)
        if len(data) != member.size:
            raise BrokenTar(f"{self.name} got shorter while it was read; run again once it is at rest").at(
                member.offset, member.name
            )
        return data

    def beginning(self, member: Member, count: int) -> bytes:
        """The first bytes of a member."""
        return self.part(member.offset, member.offset + min(count, member.size))

    def part(self, start: int, stop: int) -> bytes:
        """Bytes from `start` to `stop`, or to the end."""
        count = max(0, min(stop, self.size_bytes) - start)
        return os.pread(self._file.fileno(), count, self.start + start)

    def digest(self) -> str:
        """xxh3-128 of the whole tar, hex."""
        assert self._digest, "asked for at the start"
        self._pass(self.size_bytes)
        return self._digest.hexdigest()

    def _pass(self, byte: int) -> None:
        """Report what lies before a byte, and digest it: read again where it was read just now, and so is in memory."""
        while self._passed < byte:
            stop = min(byte, self._passed + _READ_BYTES)
            if self._digest:
                data = self.part(self._passed, stop)
                stop = self._passed + len(data)
                if not data:
                    return
                self._digest.update(data)
            self._report(stop - self._passed)
            self._passed = stop

    def _regular(self, name: str, size: int) -> Member:
        offset = self.position + BLOCK_BYTES
        end = offset + size + -size % BLOCK_BYTES
        if end > self.size_bytes:
            raise BrokenTar(
                f"{self.name} is cut, or the size of member {name!r} is wrong: its header at byte "
                f"{self.position} says that it ends at byte {end} of {self.size_bytes}"
            ).at(self.position, name)
        self.position = end
        return Member(name, offset, size)

    def _refused(self, name: str, what: str) -> RefusedMember:
        return RefusedMember(f"{self.name}: member {name!r} at byte {self.position} {what}").at(self.position, name)

    def _broken(self, what: str) -> BrokenTar:
        return BrokenTar(
            f"{self.name} is not a whole tar: the header at byte {self.position} of {self.size_bytes} {what}"
        ).at(self.position)

    def _check_end(self) -> None:
        start = position = self.position
        while block := self.part(position, min(position + _READ_BYTES, self.size_bytes)):
            if rest := block.lstrip(b"\0"):
                raise self._not_the_end(start, position + len(block) - len(rest))
            position += len(block)
        if not self.size_bytes:
            raise BrokenTar(f"{self.name} is empty (0 bytes): its download or copy did not happen").at(start)
        if self.size_bytes - start < 2 * BLOCK_BYTES:
            message = f"{self.name} is cut: no end-of-archive mark at byte {start} of {self.size_bytes}"
            raise BrokenTar(message).at(start)

    def _not_the_end(self, start: int, first: int) -> BrokenTar:
        """The error for zeros at byte `start` that are followed by something, first at byte `first`."""
        if first % BLOCK_BYTES == start % BLOCK_BYTES and _sum_is_right(self.part(first, first + BLOCK_BYTES)):
            message = (
                f"{self.name} has zeros from byte {start} on, and a member behind them at byte {first}: archives that "
                "were joined, of which most readers see the first alone (`tar --concatenate` joins them well, or keep "
                "them as files of their own), or a damaged one"
            )
        else:
            message = (
                f"{self.name} has a zeroed block at byte {start}: data follows the end-of-archive mark, first at byte "
                f"{first}"
            )
        return BrokenTar(message).at(start)

    def _refuse_foreign(self, start: bytes) -> None:
        """Name what a file is that cannot be a tar by its first bytes."""
        if kind := foreign_kind(start):
            raise BrokenTar(f"{self.name} is no tar but {kind}").at(0)
        if len(start) < BLOCK_BYTES and start.strip(b"\0"):
            raise BrokenTar(f"{self.name} is no tar: it has {len(start)} bytes, and a header has {BLOCK_BYTES}").at(0)

    def _check_sum(self, header: bytes) -> None:
        if _sum_is_right(header):
            return
        if not self.position:
            self._refuse_foreign(header)
        raise self._broken("is damaged (its checksum is wrong)" if self.position else "is none of a tar")

    def _plain_name(self, header: bytes) -> str:
        name = plain_name(header)
        if b"\0" in name:
            raise self._refused(_text(name), "hides a part of its name behind a NUL")
        return _text(name)

    def _plain_size(self, header: bytes) -> int:
        field = header[_SIZE]
        size = int.from_bytes(field[1:], "big") if field[0] == _BASE_256 else _octal(field)
        if size is None:
            raise self._broken(f"is damaged (its size is {field!r})")
        return size

    def _extended(self, name: str, size: int) -> bytes:
        """Data of a PAX header or a GNU long name."""
        if size > _MAX_EXTENDED_BYTES:
            raise self._refused(name, f"is an extended header of {size} bytes, more than {_MAX_EXTENDED_BYTES}")
        return self.read(self._regular(name, size))

    def _pax_records(self, start: int, data: bytes, *, shared: bool) -> dict[str, bytes]:
        """What a PAX header tells of name and size of the member behind it (`shared`: of all members)."""
        records: dict[str, bytes] = {}
        while data:
            digits = data.partition(b" ")[0]
            length = int(digits) if digits.isdigit() and len(digits) <= _MAX_LENGTH_DIGITS else 0
            field, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
            is_size = value.isdigit() and len(value) <= _MAX_SIZE_DIGITS
            if not equals or data[length - 1 : length] != b"\n" or (field == b"size" and not is_size):
                self.position = start
                raise self._broken(f"is damaged (its PAX records hold {data[:20]!r})")
            records[field.decode("ascii", "replace")] = value
            data = data[length:]
        if any(field.startswith("GNU.sparse") for field in records):
            raise RefusedMember(f"{self.name}: the member behind byte {start} is a sparse file").at(start)
        if shared and not records.keys().isdisjoint(("path", "size")):
            message = f"{self.name}: the PAX header at byte {start} renames or resizes all members"
            raise RefusedMember(message).at(start)
        return records

    def _agreed_name(self, plain: str, long: str) -> str:
        """A name from a header of its own; readers of images compare with the plain header."""
        if long.isascii() and plain != long and not (len(plain) >= _NAME_BYTES and long.startswith(plain)):
            raise self._refused(long, f"has another name, {plain!r}, in its plain header")
        return long

    def _agreed_size(self, name: str, plain: int, long: int) -> int:
        """A size from PAX, which says the same as the plain header, or more than fits there."""
        if long != plain and (plain or long < _OCTAL_LIMIT):
            raise self._refused(name, f"has {plain} bytes by its header, {long} by PAX")
        return long


def _sum_is_right(header: bytes) -> bool:
    """Whether a block is a tar header by its checksum."""
    if len(header) < BLOCK_BYTES:
        return False
    field = header[_CHECKSUM]
    # The low half of Adler-32 is 1 + the sum of all bytes modulo 65521: a tenth of the time of summing in Python.
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + len(field) * ord(" ")
    recorded = _octal(field)
    return recorded is not None and not (recorded - total) % 65521


def _octal(field: bytes) -> int | None:
    """Number in a header's field, 0 in an empty one; None if there is something else."""
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits.isdigit() else 0 if not digits else None
    except ValueError:  # 8 or 9
        return None


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
