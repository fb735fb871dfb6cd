"""The JSON that lies beside shards and in their index: what each file holds, and its names.

Anybody may have edited them: whatever is not what it should be ends in one line that says where.
"""

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, cast

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError

from bowstore.errors import CorruptError, MissingError
from bowstore.files import check_plain_file, read_json

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = "bowstore-shards"
PARTS_FOLDER = ".parts"
PLAN_FILE = "plan.json"
QUARANTINE_FILE = "quarantine.jsonl"
_DIGEST = re.compile("[0-9a-f]{16}")
T = TypeVar("T")


def _tar_name(name: str) -> str:
    """Refuse a name that may lead out of the folder."""
    if not name.endswith(".tar") or "/" in name or "\0" in name:
        raise ValueError(f"shard name {name!r} is not that of a *.tar in the folder")
    return name


Count = Annotated[int, Field(ge=0, lt=2**63)]
TarName = Annotated[str, AfterValidator(_tar_name)]


class ShardEntry(NamedTuple):
    """One tar: file name, number of samples, size in bytes, xxh3-128 digest as hex."""

    name: TarName
    samples: Count
    size_bytes: Count
    digest: str


class IndexMeta(BaseModel):
    """What the header of an index says of its columns."""

    version: int
    fingerprint: str
    classes: list[str]
    image_ext: list[str]
    label_field: str | None
    shards: list[ShardEntry]
    columns: str


class _Source(BaseModel):
    images: Count
    size_bytes: Count
    listing: str
    kind: str = ""
    labels: str = ""


class Identity(BaseModel):
    """What a split is made of and how, as plan and manifest record it."""

    format: str
    version: int
    split: str
    source: _Source
    settings: dict[str, int]
    classes: list[str]


class _Counts(BaseModel):
    found: Count
    written: Count
    changed: dict[str, Count]
    quarantined: Count


class _Shard(BaseModel):
    name: TarName
    samples: Count
    size_bytes: Count
    digest: str


class _ManifestFile(Identity):
    counts: _Counts
    shards: list[_Shard]


def _left_out(line: dict[str, str]) -> dict[str, str]:
    """Refuse a line of the quarantine list that is not as bowstore writes it."""
    if not {"path", "reason"} <= line.keys() <= {"path", "reason", "digest"}:
        raise ValueError(f"a line with {sorted(line)}")
    if not _DIGEST.fullmatch(line.get("digest", "0" * 16)):
        raise ValueError(f"a digest {line['digest']!r}")
    return line


LeftOut = Annotated[dict[str, str], AfterValidator(_left_out)]


class Manifest(NamedTuple):
    """What `bowstore shards` recorded of a folder when it was complete.

    Attributes:
        shards: the tars.
        classes: class names in label order.
        written: images in all tars.
        values: all of it.
    """

    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...]
    written: int
    values: dict[str, Any]


def checked(kind: type[T], text: str | bytes) -> T:
    """JSON as a value of a type, keys that the type does not have left out; nothing is converted.

    Raises:
        ValueError: what is wrong, and where, on one line.
    """
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_json(text, strict=True))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise ValueError(f"{where}: {message}" if where else message) from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_checked(kind: type[T], path: Path) -> T:
    """A JSON file as a value of a type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, or holds something else.
    """
    check_plain_file(path)
    return checked(kind, path.read_bytes())


def read_identity(path: Path, version: int) -> dict[str, Any] | None:
    """What a plan or manifest says that its split is made of; {} or whatever it holds if bowstore did not write it.

    Args:
        path: the file.
        version: of the format that is read; the rest of others is not looked at.

    Returns:
        All of the file; None where there is none.

    Raises:
        CorruptError: it is not what `bowstore shards` writes, or no JSON.
    """
    try:
        recorded = read_json(path)
        if not isinstance(recorded, dict):
            return {}
        if (recorded.get("format"), recorded.get("version")) == (MANIFEST_FORMAT, version):
            read_checked(Identity, path)
        return recorded
    except MissingError:
        return None
    except ValueError as error:  # CorruptError, too
        root = path.parent if path.name == MANIFEST_FILE else path.parent.parent
        raise CorruptError(f"{path} is damaged ({error}); move it away, or remove {root} to make it anew") from error


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a folder that `bowstore shards` wrote; None where there is none.

    Raises:
        CorruptError: a manifest that cannot be read.
    """
    path = root / MANIFEST_FILE
    try:
        values = read_json(path)
        if not isinstance(values, dict) or values.get("format") != MANIFEST_FORMAT:
            return None
        found = read_checked(_ManifestFile, path)
    except MissingError:
        return None
    except ValueError as error:  # CorruptError, too
        raise CorruptError(f"{path} is damaged ({error}); `bowstore verify {root} --repair` sets it aside") from error
    shards = tuple(ShardEntry(shard.name, shard.samples, shard.size_bytes, shard.digest) for shard in found.shards)
    return Manifest(shards, tuple(found.classes), found.counts.written, values)


def known_classes(root: Path) -> tuple[str, ...]:
    """Class names of a folder that bowstore wrote (its manifest), or none."""
    manifest = read_manifest(root)
    return manifest.classes if manifest else ()


def written_here(root: Path) -> bool:
    """Whether `bowstore shards` wrote the tars of a folder (or is just writing them)."""
    return (root / PARTS_FOLDER / PLAN_FILE).exists() or read_manifest(root) is not None


def known_undecodable(root: Path) -> dict[str, dict[str, tuple[int, str]]]:
    """Images that a deep check left out of shards that others made: tar, member, (digest of its bytes, reason).

    Raises:
        CorruptError: the list cannot be read.
    """
    path = root / QUARANTINE_FILE
    found: dict[str, dict[str, tuple[int, str]]] = {}
    try:
        check_plain_file(path)
        for line in path.read_text().splitlines():
            values = _left_out(checked(dict[str, str], line))
            if "digest" in values:
                tar, _, member = values["path"].partition("/")
                found.setdefault(tar, {})[member] = int(values["digest"], 16), values["reason"]
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CorruptError(
            f"{path} is no list of bowstore's, or a damaged one ({error}); move it away and run `bowstore index {root}`"
        ) from error
    return found
