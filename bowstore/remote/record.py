"""What a URL holds of a word store, as far as this machine knows: a line a file, so that one more costs nothing."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from bowstore.files import atomic_file

_BEGUN = "?"
_LINE = re.compile(r"(\??)([0-9a-f]{32}) (.+)")


class Record:
    """The record in a file; what a killed writer left of its last line is passed over.

    Attributes:
        files: xxh3-128 as hex of each file that the URL holds.
        begun: of each file that was about to be sent what it may hold besides.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.files: dict[str, str] = {}
        self.begun: dict[str, set[str]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            if match := _LINE.fullmatch(line):
                mark, digest, name = match.groups()
                if mark:
                    self.begun.setdefault(name, set()).add(digest)
                else:
                    self.files[name] = digest

    def may_be(self, name: str, digest: str) -> bool:
        """Whether this machine may have put such a file there."""
        return self.files.get(name) == digest or digest in self.begun.get(name, ())

    def add(self, name: str, digest: str) -> None:
        """Record a file that has been sent; from any thread, since a line is written in one piece."""
        self.files[name] = digest
        with open(self._path, "a") as file:
            file.write(f"{digest} {name}\n")

    def begin(self, files: Iterable[tuple[str, str]]) -> None:
        """Record what is about to be sent, before any of it is, so that it is known again whatever happens then."""
        for name, digest in files:
            self.begun.setdefault(name, set()).add(digest)
        lines = [f"{digest} {name}\n" for name, digest in self.files.items()]
        lines += [f"{_BEGUN}{digest} {name}\n" for name, digests in self.begun.items() for digest in sorted(digests)]
        self._write(lines)

    def replace(self, files: Mapping[str, str]) -> None:
        """Record that the URL holds these files, and nothing else that matters."""
        self.files, self.begun = dict(files), {}
        self._write([f"{digest} {name}\n" for name, digest in files.items()])

    def _write(self, lines: list[str]) -> None:
        with atomic_file(self._path) as file:
            file.write("".join(lines).encode())
