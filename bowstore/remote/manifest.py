"""The manifest of a copy: its files with lengths and digests, what it is, and under which licence.

`bowstore push` writes it last, beside the files, and `bowstore pull` asks for it first: where it lies, the copy is
whole.
"""

import json
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import bowstore
from bowstore.errors import CorruptError, DataError, MismatchError, UsageError
from bowstore.files import file_digest
from bowstore.limits import text_problem
from bowstore.progress import Progress

MANIFEST_FILE = "bowstore.json"
PUSHING_FILE = "bowstore.json.part"  # the same, of a push under way
_OWN = (MANIFEST_FILE, PUSHING_FILE)  # never of what is copied
Kind = Literal["store", "shards", "run"]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class FileEntry(BaseModel):
    """A file of a copy: its length, and its xxh3-128 as hex."""

    model_config = ConfigDict(frozen=True)

    size_bytes: int = Field(ge=0)
    digest: _Digest


class Manifest(BaseModel):
    """What a copy consists of.

    Attributes:
        bowstore_version: of the writer.
        kind: what it is a copy of.
        licence: under which others may use it.
        files: by their names in the folder, as a/b/c.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["bowstore copy"] = "bowstore copy"
    format_version: Literal[1] = 1
    bowstore_version: str = bowstore.__version__
    kind: Kind
    licence: str
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _stay_below(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:  # they come from the other side, and must not lead elsewhere
            if text_problem(name) or name in _OWN or any(part[:1] in ("", ".") for part in name.split("/")):
                raise ValueError(f"{name!r} is no name of a file in a copy")
        return files

    @classmethod
    def parse(cls, text: bytes, what: str) -> Self:
        """The manifest in a file.

        Raises:
            CorruptError: it cannot be understood, or has another version.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise CorruptError(
                f"{what} is no manifest that bowstore {bowstore.__version__} can read ({where}: {first['msg']}); push "
                f"the copy anew, to another URL, or install the bowstore that wrote it"
            ) from error

    @cached_property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(entry.size_bytes for entry in self.files.values())

    def text(self) -> bytes:
        """The content of its file."""
        return (json.dumps(self.model_dump(), indent=1) + "\n").encode()

    def difference(self, other: Self) -> str | None:
        """In what another copy is not this one, for messages; None if they are the same, whoever wrote them."""
        for what in ("kind", "licence"):
            mine, its = getattr(self, what), getattr(other, what)
            if mine != its:
                return f"its {what} is {its!r}, not {mine!r}"
        names = sorted(n for n in self.files | other.files if self.files.get(n) != other.files.get(n))
        return f"{len(names)} files differ, for example {names[0]}" if names else None


@dataclass(frozen=True)
class Original:
    """A folder that is copied, as it was when its files were read.

    Attributes:
        folder: the folder.
        manifest: of its files.
        states: length and time of the last change of each, in bytes and ns.
    """

    folder: Path
    manifest: Manifest
    states: dict[str, tuple[int, int]]

    @classmethod
    def read(cls, folder: Path, kind: Kind, licence: str, *, display: bool = True) -> Self:
        """Read all files of a folder but those whose names begin with a dot: locks, and what is being written.

        Raises:
            UsageError: something that cannot be copied, or whose name cannot be.
            MismatchError: a file changes meanwhile.
        """
        names = _names_below(folder)
        states = {name: _state(folder / name) for name in names}
        files = {}
        with Progress("push: read", sum(size for size, _ in states.values()), "bytes", shown=display) as progress:
            for name, (size_bytes, _) in states.items():
                files[name] = FileEntry(size_bytes=size_bytes, digest=file_digest(folder / name))
                progress.advance(size_bytes)
        original = cls(folder, Manifest(kind=kind, licence=licence, files=files), states)
        original.check_unchanged(names)
        return original

    def check_unchanged(self, names: list[str] | None = None) -> None:
        """Refuse a folder that is written to.

        Args:
            names: of the files to look at; None for all, and whether there are others now.

        Raises:
            MismatchError: a file changed since it was read.
        """
        now = _names_below(self.folder) if names is None else names
        changed = set(now) ^ self.states.keys() if names is None else set()
        changed |= {name for name in now if name not in changed and _state(self.folder / name) != self.states[name]}
        if changed:
            raise MismatchError(
                f"{self.folder / min(changed)} changed while it was pushed; wait until nothing writes there, then run "
                f"the same command again"
            )


def _names_below(folder: Path) -> list[str]:
    """Names of the files to copy, in order."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = (Path(parent, name) for name in folders)
        if link := next((path for path in links if path.is_symlink()), None):
            raise UsageError(f"{link} is a link to a folder, which is not copied; put the folder itself there")
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    copied = sorted(path.relative_to(folder).as_posix() for path in found)
    if problem := next((f"{name!r} {text_problem(name)}" for name in copied if text_problem(name)), None):
        raise UsageError(f"{folder} cannot be copied: the name {problem}")
    return [name for name in copied if name not in _OWN]


def _state(path: Path) -> tuple[int, int]:
    """What changes when somebody writes into a file; of a link, that of the file behind it; of none, nothing's."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return -1, 0
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is no plain file, and cannot be copied; move it away")
    return found.st_size, found.st_mtime_ns
