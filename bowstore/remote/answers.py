"""What a server sends, a block at a time: a range of a file, or all of it where it knows no ranges or no length."""

from typing import Any


class Problem(Exception):
    """A transfer that ended without an error and without the right bytes."""

    def __init__(self, what: str, detail: str, *, final: bool = False) -> None:
        super().__init__(f"{what}: {detail}")
        self.what, self.final = what, final


class Body:
    """The body of an answer over HTTP, a piece at a time; what is not read yet waits on the other side."""

    def __init__(self, loop: Any, file: Any) -> None:
        self._loop, self._file = loop, file

    def read(self, count: int) -> bytes:
        """So many bytes, or those that are left."""
        from fsspec.asyn import sync  # as everywhere in this room, for those alone that go to a URL

        return bytes(sync(self._loop, self._read, count))

    async def _read(self, count: int) -> bytearray:
        data = bytearray()
        while len(data) < count and (part := await self._file.r.content.read(count - len(data))):
            data += part
        return data

    def close(self) -> None:
        """End the answer, read or not."""
        self._file.close()


class Answer:
    """What a server sends: a range of a file, or all of it.

    Attributes:
        goes_on: whether more than one block can be read.
    """

    def __init__(self, file: Any, *, at: int, first: int, last: int | None) -> None:
        self._file, self._at, self._first, self._last = file, at, first, last
        self.goes_on = last is None

    def read(self, count: int) -> bytes:
        """So many bytes from the first that is wanted on, or those that are left."""
        while self._at < self._first:  # a server that knows no ranges sends what is here already
            skipped = self._file.read(min(count, self._first - self._at))
            if not skipped:
                break
            self._at += len(skipped)
        data = bytes(self._file.read(count))
        self._at += len(data)
        self._first = self._at
        return data

    def block(self, wanted: int, size_bytes: int | None) -> tuple[bytes, Exception | None]:
        """The next bytes of a file, and what was wrong with them.

        Args:
            wanted: how many of them.
            size_bytes: length of the file, where it is known.
        """
        done = self._first
        if size_bytes is None:
            return self.read(wanted), None
        block = self.read(wanted + (self._last is not None or done + wanted == size_bytes))  # one more must not come
        if len(block) > wanted:
            return b"", Problem("bytes that were not asked for", f"more than {wanted} at byte {done}")
        if len(block) < wanted:
            return block, Problem("too few bytes", f"{len(block)} of {wanted} at byte {done} of {size_bytes}")
        return block, None

    def close(self) -> None:
        """End it, read or not."""
        self._file.close()
