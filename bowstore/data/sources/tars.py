"""What lies in a tar that somebody else wrote: samples with their images and labels.

Nothing is extracted, and no member is decoded but JSON: pickles and arrays in a tar stay bytes that nobody reads.
"""

import json
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bowstore.data.sources.base import NO_LABEL_FIELD
from bowstore.data.sources.labels import usual_label
from bowstore.data.sources.names import SIGNATURE_BYTES, is_image, is_system_member
from bowstore.data.tar import Member, TarReader, open_tar_file, split_key
from bowstore.errors import DataError

_MAX_LABEL_BYTES = 1 << 20
_MAX_TEXT_LABEL_BYTES = 100


class TarImage(NamedTuple):
    """An image in a tar.

    Attributes:
        tar: the tar.
        stamp: when it last changed, nanoseconds.
        member: its name, first byte and length.
        sample: key of its sample.
        component: what tells it from the sample's other images; empty where it is alone.
        label: as it was written; empty where there is none.
        text: what the sample's .txt holds, a label or a caption; empty where there is none.
    """

    tar: Path
    stamp: int
    member: Member
    sample: str
    component: str
    label: str
    text: str


class _Sample(NamedTuple):
    """The members of a sample by extension, and which of them are images."""

    members: dict[str, Member]
    images: list[str]


class TarContent(NamedTuple):
    """What was found in tars: images in order, samples without one, and how many members are of systems."""

    images: list[TarImage]
    empty: list[str]
    system: int


def read_tar(path: Path, label_field: str | None, report: Callable[[int], None]) -> TarContent:
    """Read what a tar holds: the names in it, and what tells images and labels.

    A sample is what shares a name up to the first dot of the last path component, wherever in the tar it lies.

    Args:
        path: an uncompressed tar.
        label_field: extension or JSON key of the label; None for .cls and `LABEL_FIELDS`.
        report: hears the number of further bytes read.

    Raises:
        CorruptError: the archive is cut or damaged.
        DataError: a link, a device, a name that comes twice, a label that cannot be read.
    """
    samples: dict[str, _Sample] = {}
    images: list[TarImage] = []
    empty: list[str] = []
    system = 0
    with open_tar_file(path) as file:
        tar, stamp = TarReader(file, path, report), os.fstat(file.fileno()).st_mtime_ns
        while member := tar.next_member():
            if is_system_member(name := posixpath.normpath(member.name)):
                system += 1
            else:
                _add(samples, tar, member._replace(name=name), path)
        for key, sample in samples.items():
            if not sample.images:
                empty.append(f"{path.name}/{key}")
            labels = _Labels(tar, path, key, sample.members, label_field)
            for extension in sample.images:
                component = _component(extension)
                images.append(
                    TarImage(
                        path,
                        stamp,
                        sample.members[extension],
                        key,
                        component if len(sample.images) > 1 else "",
                        labels.label(component),
                        labels.text(),
                    )
                )
    return TarContent(images, empty, system)


def _add(samples: dict[str, _Sample], tar: TarReader, member: Member, path: Path) -> None:
    """Put a member with its sample."""
    key, extension = split_key(member.name)
    sample = samples.setdefault(key, _Sample({}, []))
    if extension in sample.members:
        raise DataError(
            f"{path}: {member.name!r} is there twice (at bytes {sample.members[extension].offset} and "
            f"{member.offset}); names in a tar must differ, in more than case: write it anew"
        )
    sample.members[extension] = member
    if is_image(member.name, lambda: tar.beginning(member, SIGNATURE_BYTES)):
        sample.images.append(extension)


def _component(extension: str) -> str:
    """What an image is called in its sample: "left" of left.jpg; the extension itself where that is all."""
    head, dot, tail = extension.rpartition(".")
    return head if dot else tail


class _Labels:
    """The labels of one sample: its own members, and the keys of its JSON."""

    def __init__(self, tar: TarReader, path: Path, key: str, members: Mapping[str, Member], field: str | None) -> None:
        self._tar, self._path, self._key, self._members, self._field = tar, path, key, members, field
        self._json: dict[str, Any] | None = None

    def label(self, component: str) -> str:
        """Label of an image, a .cls of its own component before that of the sample; empty where there is none."""
        if self._field == NO_LABEL_FIELD:
            return ""
        extension = self._field.lower() if self._field else "cls"
        for name in (f"{component}.{extension}", extension):
            if name in self._members:
                return self._read(self._members[name]).strip()
        values = self._json_values()
        if self._field:
            return self._scalar(values.get(self._field))
        return usual_label(values)

    def text(self) -> str:
        """The .txt, if it is short enough to be a label."""
        member = self._members.get("txt")
        return self._read(member).strip() if member and member.size <= _MAX_TEXT_LABEL_BYTES else ""

    def _json_values(self) -> dict[str, Any]:
        if self._json is None:
            self._json = {}
            if member := self._members.get("json"):
                try:
                    value = json.loads(self._read(member))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{self._path}: {member.name!r} is not JSON ({error}); write it anew") from error
                self._json = value if isinstance(value, dict) else {}
        return self._json

    def _scalar(self, value: object) -> str:
        if value is None:
            return ""
        if type(value) not in (str, int):
            raise DataError(
                f"{self._path}: {self._field!r} of sample {self._key!r} is {str(value)[:40]!r}, neither a name nor a "
                f"whole number; name another field, or --label-field {NO_LABEL_FIELD}"
            )
        return str(value).strip()

    def _read(self, member: Member) -> str:
        if member.size > _MAX_LABEL_BYTES:
            raise DataError(
                f"{self._path}: {member.name!r} has {member.size} bytes, more than the {_MAX_LABEL_BYTES} that a label "
                f"or its JSON may have; name another field, or --label-field {NO_LABEL_FIELD}"
            )
        try:
            return self._tar.read(member).decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path}: byte {error.start} of {member.name!r} is not UTF-8; write it anew, or name another "
                f"field, or --label-field {NO_LABEL_FIELD}"
            ) from error


def total_bytes(paths: Iterable[Path]) -> int:
    """Length of tars together."""
    return sum(path.stat().st_size for path in paths)
