"""The manifest of a copy: its files with lengths and digests, what it is, and under which licence.

`bowstore push` writes it last, beside the files, and `bowstore pull` asks for it first: where it lies, the copy is
whole.
"""

import json
import stat
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import bowstore
from bowstore.errors import CorruptError, DataError, MismatchError, UsageError
from bowstore.files import file_digest
from bowstore.limits import text_problem
from bowstore.progress import Progress
from bowstore.remote.urls import is_plain

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
        for name in files:
            if name in _OWN or not all(map(is_plain, name.split("/"))):
                raise ValueError(f"{name!r} is no name of a file in a copy")
        return files

    @classmethod
    def of(cls, folder: Path, kind: Kind, licence: str, states: dict[str, tuple[int, int]]) -> Self:
        """Read all files of a folder, of which `states_below` was just asked."""
        files = {}
        with Progress("push: read", sum(size for size, _ in states.values()), "bytes") as progress:
            for name, (size_bytes, _) in states.items():
                files[name] = FileEntry(size_bytes=size_bytes, digest=file_digest(folder / name))
                progress.advance(size_bytes)
        return cls(kind=kind, licence=licence, files=files)

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


def states_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Files to copy, in order, and what changes when somebody writes into one: its length, and its time in ns.

    Those whose names begin with a dot stay behind: locks, and what is being written.

    Raises:
        UsageError: something that cannot be copied, or whose name cannot be.
        DataError: something that is no file.
    """
    found = dict[str, tuple[int, int]]()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name in _OWN or any(part.startswith(".") for part in name.split("/")):
            continue
        if path.is_symlink() and path.is_dir():
            raise UsageError(f"{path} is a link to a folder, which is not copied; put the folder itself there")
        if not path.is_dir():
            state = path.stat()  # of a link, that of the file behind it
            if problem := text_problem(name):
                raise UsageError(f"{folder} cannot be copied: the name {name!r} {problem}")
            if not stat.S_ISREG(state.st_mode):
                raise DataError(f"{path} is no plain file, and cannot be copied; move it away")
            found[name] = state.st_size, state.st_mtime_ns
    return dict(sorted(found.items()))


def check_unchanged(folder: Path, states: dict[str, tuple[int, int]]) -> None:
    """Refuse a folder that is written to.

    Raises:
        MismatchError: it is not as it was.
    """
    now = states_below(folder)
    if changed := [name for name in states | now if states.get(name) != now.get(name)]:
        raise MismatchError(
            f"{folder / min(changed)} changed while it was pushed; wait until nothing writes there, then run the same "
            f"command again"
        )
