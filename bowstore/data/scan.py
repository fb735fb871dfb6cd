"""One tar's part of the index: its samples, from one pass over its bytes.

A sample is a run of neighbouring members with one key. Building the index and verifying shards both go through here.

Legend: n samples of one tar.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from bowstore.data.image_header import MAX_IMAGE_BYTES, ImageSize, UnusableImage, image_size
from bowstore.data.images import is_turned
from bowstore.data.sources.base import NO_LABEL, NO_LABEL_FIELD
from bowstore.data.sources.labels import usual_label, whole_number
from bowstore.data.table import image_digest
from bowstore.data.tar import (
    Member,
    RefusedMember,
    TarReader,
    image_extension,
    keeps_contract,
    open_tar_file,
    split_key,
)

_LABEL_MEMBERS = ("cls", "json", "txt")
_MAX_LABEL_BYTES = 1 << 20
_EXAMPLES = 5
_EXAMPLE_CHARACTERS = 40
_ARRAYS = {  # of a shard's part: type codes of `array`, and what they become
    "offset": ("q", np.int64),
    "size": ("i", np.int32),
    "height": ("i", np.int32),
    "width": ("i", np.int32),
    "label": ("i", np.int32),
    "text": ("i", np.int32),
    "key_hash": ("Q", np.uint64),
    "digest": ("Q", np.uint64),
    "key_length": ("i", np.int32),
}


Inspect = Callable[[bytes, ImageSize], str | None]


class ScanSettings(NamedTuple):
    """How samples are read.

    Attributes:
        image_ext: extensions that are the sample's image, the first that is there; empty: the one there is.
        label_field: field of the .json member that is the label; None for .cls, a usual field, or .txt where all of
            them are numbers; `NO_LABEL_FIELD` for no labels.
    """

    image_ext: tuple[str, ...] = ()
    label_field: str | None = None


class Refused(NamedTuple):
    """An image that is no row of the index, or should be none.

    Attributes:
        member: its name in the tar.
        reason: why.
        offset: its first byte.
        size: its bytes.
        digest: xxh3-64 of them; None where there is no image at all.
    """

    member: str
    reason: str
    offset: int
    size: int
    digest: int | None


@dataclass
class ShardTable:
    """What one tar holds.

    Attributes:
        columns: those of the index, with `key_length` in place of `key_start`; "label" is that of .cls or .json, and
            "text" the number in .txt, which is a caption unless `text_is_label` of all tars together.
        size_bytes: length of the tar.
        digest: xxh3-128 of it, hex.
        left_out: images without a readable header, samples without an image.
        undecodable: images that `inspect` refused.
        bad_names: number of members whose name breaks the key contract, with some examples.
        told: samples with an image ("samples"), and how many of them have a label in .cls or .json ("labelled"), in
            .json ("json"), one there that is no whole number ("named"), and a whole number in .txt ("numbers").
        name_examples: some of the labels that are no whole numbers.
        turned: images that an EXIF rotation would turn.
        turned_example: the name of one of them.
        several: extensions of the images in samples that hold several.
    """

    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    size_bytes: int = 0
    digest: str = ""
    left_out: list[Refused] = field(default_factory=list)
    undecodable: list[Refused] = field(default_factory=list)
    bad_names: int = 0
    bad_name_examples: list[str] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    name_examples: list[str] = field(default_factory=list)
    turned: int = 0
    turned_example: str = ""
    several: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.columns.get("offset", ()))


class _Image(NamedTuple):
    extension: str
    member: Member
    digest: int
    size: ImageSize | None
    reason: str
    turned: bool = False


@dataclass
class _Sample:
    key: str
    names: list[str] = field(default_factory=list)
    offset: int = 0  # of its first member
    images: list[_Image] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # whole numbers, by the member that tells them
    named: str = ""  # a label in .json that is no whole number


class _ShardScan:
    """One pass over one tar; see `scan_shard`."""

    def __init__(
        self,
        path: Path,
        settings: ScanSettings,
        known_bad: Mapping[str, tuple[int, str]],
        inspect: Inspect | None,
    ) -> None:
        self._path, self._settings, self._known_bad, self._inspect = path, settings, known_bad, inspect
        self._arrays = {name: array(code) for name, (code, _) in _ARRAYS.items()}
        self._keys = bytearray()
        self._seen: set[str] = set()
        self._sample = _Sample("")
        self.table = ShardTable()

    def run(self, report: Callable[[int], None]) -> ShardTable:
        """Read the tar from end to end."""
        with open_tar_file(self._path) as file:
            tar = TarReader(file, self._path, report, digested=True)
            while member := tar.next_member():
                self._add(tar, member)
            self._end_sample()
            self.table.size_bytes, self.table.digest = tar.size_bytes, tar.digest()
        return self._finished()

    def _finished(self) -> ShardTable:
        table = self.table
        table.columns = {name: np.frombuffer(self._arrays[name], dtype) for name, (_, dtype) in _ARRAYS.items()}
        table.columns["key_bytes"] = np.frombuffer(self._keys, np.uint8)
        return table

    def _add(self, tar: TarReader, member: Member) -> None:
        """Take one member into its sample."""
        key, extension = split_key(member.name)
        if not key or key.endswith("/"):
            return  # a hidden file: readers of WebDataset pass over these, too
        sample = self._sample
        if key != sample.key:
            self._end_sample()
            sample = self._sample = _Sample(key, offset=member.offset)
        if not keeps_contract(key, extension):
            self.table.bad_names += 1
            if len(self.table.bad_name_examples) < _EXAMPLES:
                self.table.bad_name_examples.append(member.name)
            return
        if member.name in sample.names:
            raise self._refused(member, "occurs twice")
        sample.names.append(member.name)
        wanted = self._settings.image_ext
        if extension in wanted if wanted else image_extension(extension):
            sample.images.append(self._image(tar, member, extension))
        if extension in _LABEL_MEMBERS:
            self._add_label(tar, member, extension)

    def _image(self, tar: TarReader, member: Member, extension: str) -> _Image:
        if member.size > MAX_IMAGE_BYTES:
            return _Image(extension, member, 0, None, f"{member.size} bytes, more than {MAX_IMAGE_BYTES}")
        data = tar.read(member)
        digest = image_digest(data)
        known_digest, known_reason = self._known_bad.get(member.name, (None, ""))
        if digest == known_digest:
            return _Image(extension, member, digest, None, known_reason)
        try:
            size = image_size(data)
        except UnusableImage as error:
            return _Image(extension, member, digest, None, str(error))
        reason = self._inspect(data, size) if self._inspect else None
        return _Image(extension, member, digest, size, reason or "", is_turned(data))

    def _add_label(self, tar: TarReader, member: Member, extension: str) -> None:
        """Note what a member tells of its sample's label.

        Raises:
            RefusedMember: it should tell a label, and does not.
        """
        wanted = self._settings.label_field
        if wanted == NO_LABEL_FIELD or (wanted and extension != "json"):
            return
        data = tar.read(member).strip() if member.size <= _MAX_LABEL_BYTES else b""
        if extension != "json":
            number = whole_number(data.decode("ascii", "replace"))
            if number is None and extension == "cls":
                raise self._refused(member, f"holds {data[:20]!r}, not a whole number from 0 on")
        else:
            number = self._number_in_json(member, data, wanted)
        if number is not None:
            self._sample.labels[extension] = number

    def _number_in_json(self, member: Member, data: bytes, wanted: str | None) -> int | None:
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            values = None
        found = values if isinstance(values, dict) else {}
        if wanted is None:
            text = usual_label(found)
            number = whole_number(text)
            self._sample.named = text if number is None else ""
            return number
        value = found.get(wanted)
        number = whole_number(str(value)) if type(value) in (str, int) else None
        if number is None:
            raise self._refused(member, f"has {value!r} in field {wanted!r}, not a whole number from 0 on")
        return number

    def _end_sample(self) -> None:
        """Close the sample that its last member has just ended: a row, or a reason why there is none."""
        sample = self._sample
        self._sample = _Sample("")
        if not sample.names:
            return
        if not sample.images:
            self._without_image(sample)
            return
        if sample.key in self._seen:
            raise self._refused(sample.images[0].member, f"has a key that occurs twice, {sample.key!r}")
        self._seen.add(sample.key)
        self._count_labels(sample)
        if len(sample.images) == 1:
            image = sample.images[0]
        elif self._settings.image_ext:
            image = min(sample.images, key=lambda image: self._settings.image_ext.index(image.extension))
        else:
            self.table.several.update(image.extension for image in sample.images)
            return
        name, offset, size = image.member
        if image.size is None or image.reason:
            refused = Refused(name, image.reason, offset, size, image.digest)
            (self.table.undecodable if image.size else self.table.left_out).append(refused)
            if image.size is None:
                return
        if image.turned:
            self.table.turned += 1
            self.table.turned_example = self.table.turned_example or f"{self._path.name}/{name}"
        self._append(sample, image, image.size)

    def _count_labels(self, sample: _Sample) -> None:
        labels, told = sample.labels, self.table.told
        told.update(samples=1, labelled="cls" in labels or "json" in labels, numbers="txt" in labels)
        if "cls" not in labels:
            told.update(json="json" in labels, named=bool(sample.named))
            if sample.named and len(self.table.name_examples) < _EXAMPLES:
                self.table.name_examples.append(sample.named[:_EXAMPLE_CHARACTERS])

    def _append(self, sample: _Sample, image: _Image, size: ImageSize) -> None:
        key = sample.key.encode("ascii")
        arrays = self._arrays
        arrays["offset"].append(image.member.offset)
        arrays["size"].append(image.member.size)
        arrays["height"].append(size.height)
        arrays["width"].append(size.width)
        arrays["label"].append(sample.labels.get("cls", sample.labels.get("json", NO_LABEL)))
        arrays["text"].append(sample.labels.get("txt", NO_LABEL))
        arrays["key_hash"].append(xxhash.xxh3_64_intdigest(key))
        arrays["digest"].append(image.digest)
        arrays["key_length"].append(len(key))
        self._keys += key

    def _without_image(self, sample: _Sample) -> None:
        extensions = ", ".join(split_key(name)[1] for name in sample.names[:_EXAMPLES])
        first = Member(sample.names[0], sample.offset, 0)
        if sample.key in self._seen:
            raise self._refused(first, "lies apart from the image of its key; `bowstore shards` writes them anew")
        wanted = "image" if not self._settings.image_ext else f"image {' or '.join(self._settings.image_ext)}"
        self.table.left_out.append(Refused(first.name, f"no {wanted} beside {extensions}", first.offset, 0, None))

    def _refused(self, member: Member, what: str) -> RefusedMember:
        return RefusedMember(f"{self._path}: member {member.name!r} at byte {member.offset} {what}").at(
            member.offset, member.name
        )


def scan_shard(
    path: Path,
    settings: ScanSettings,
    report: Callable[[int], None],
    *,
    known_bad: Mapping[str, tuple[int, str]] | None = None,
    inspect: Inspect | None = None,
) -> ShardTable:
    """Samples of one tar from its headers, the headers of its images, and its labels.

    Args:
        path: the tar.
        settings: which member is the image and which the label.
        report: hears the number of further bytes read.
        known_bad: digest and reason of members (by name) that are to be left out.
        inspect: says of an image's bytes what is wrong with them, or None.

    Raises:
        BrokenTar: the tar is cut or damaged.
        RefusedMember: a member that no shard may hold.
    """
    return _ShardScan(path, settings, known_bad or {}, inspect).run(report)
