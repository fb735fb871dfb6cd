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


class _Counts(BaseModel):
    found: Count
    written: Count
    changed: dict[str, Count]
    quarantined: Count


class Manifest(BaseModel):
    """What `bowstore shards` recorded of a folder when it was complete, as far as it is read again.

    Attributes:
        settings: seed and images a shard.
        classes: class names in label order.
        counts: images by what became of them.
        shards: the tars.
    """

    settings: dict[str, int]
    classes: list[str]
    counts: _Counts
    shards: list[ShardEntry]


def _left_out(line: dict[str, str]) -> dict[str, str]:
    """Refuse a line of the quarantine list that is not as bowstore writes it."""
    if not {"path", "reason"} <= line.keys() <= {"path", "reason", "digest"}:
        raise ValueError(f"a line with {sorted(line)}")
    if not _DIGEST.fullmatch(line.get("digest", "0" * 16)):
        raise ValueError(f"a digest {line['digest']!r}")
    return line


LeftOut = Annotated[dict[str, str], AfterValidator(_left_out)]


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


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a folder that `bowstore shards` wrote; None where there is none.

    Raises:
        CorruptError: a manifest that cannot be read.
    """
    path = root / MANIFEST_FILE
    try:
        values = read_json(path)
        ours = isinstance(values, dict) and values.get("format") == MANIFEST_FORMAT
        return read_checked(Manifest, path) if ours else None
    except MissingError:
        return None
    except ValueError as error:  # CorruptError, too
        raise CorruptError(f"{path} is damaged ({error}); `bowstore verify {root} --repair` sets it aside") from error


def known_classes(root: Path) -> tuple[str, ...]:
    """Class names of a folder that bowstore wrote (its manifest), or none."""
    manifest = read_manifest(root)
    return tuple(manifest.classes) if manifest else ()


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
