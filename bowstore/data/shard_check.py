"""One tar against its record and its rows of the index.

Legend: n samples of one tar.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bowstore.data.image_header import ImageSize, UnusableImage
from bowstore.data.images import prepare
from bowstore.data.records import ShardEntry
from bowstore.data.scan import Fault, Refused, ScanSettings, ShardTable, scan_shard
from bowstore.data.sources.base import NO_LABEL
from bowstore.data.table import image_digest
from bowstore.data.tar import BLOCK_BYTES, plain_name
from bowstore.data.workers import Report
from bowstore.errors import is_machine_error

STRICT_CHANGES = ("unusual-jpeg", "unusual-png")  # Pillow decodes these, DALI or a GPU may not
COMPARED = ("size", "height", "width", "label", "key_hash", "digest")
UNREAD = "unread"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        message: all of it, in one line.
        kind: "manifest", "index", "tar" (bytes of a shard), "image" (intact, but it cannot be decoded), or "unread"
            (the machine could not read the shard, which says nothing about its bytes).
        shard: the tar's name; None where it is about the folder.
        member: name or key of what is damaged in it, as far as that is known.
        first_byte: where in the tar.
        last_byte: end of the damaged range, inclusive.
    """

    message: str
    kind: str
    shard: str | None = None
    member: str | None = None
    first_byte: int | None = None
    last_byte: int | None = None


class Rows(NamedTuple):
    """The rows of the index that belong to one tar, each column (n,)."""

    offset: NDArray[np.int64]
    size: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    label: NDArray[np.int32]
    key_hash: NDArray[np.uint64]
    digest: NDArray[np.uint64]
    key_start: NDArray[np.int64]  # (n + 1,)
    key_bytes: NDArray[np.uint8]

    def key(self, row: int) -> str:
        """Key of a row."""
        return self.key_bytes[self.key_start[row] : self.key_start[row + 1]].tobytes().decode("ascii")


class CheckJob(NamedTuple):
    """One tar to check.

    Attributes:
        path: the tar.
        entry: what is recorded of it; None where nothing is.
        rows: its part of the index; None where that cannot be trusted.
        settings: how image and label of a sample were chosen.
        known_bad: images that are left out of the index, by member.
        deep: decode every image.
        text_labels: numbers in .txt are labels.
    """

    path: Path
    entry: ShardEntry | None
    rows: Rows | None
    settings: ScanSettings
    known_bad: Mapping[str, tuple[int, str]]
    deep: bool
    text_labels: bool = False


@dataclass
class Findings:
    """What is wrong with one tar.

    Attributes:
        problems: one line each.
        images: samples found in it.
        damaged: its bytes are not the recorded ones.
        undecodable: intact images that cannot be decoded.
        odd: images that every decoder reads, but not as plain RGB: how many of each kind.
    """

    problems: list[Problem] = field(default_factory=list)
    images: int = 0
    damaged: bool = False
    undecodable: list[Refused] = field(default_factory=list)
    odd: Counter[str] = field(default_factory=Counter)


def check_shard(job: CheckJob, report: Report) -> Findings:
    """Read one tar and compare it with what is known of it."""
    return _Check(job).run(report)


class _Check:
    """One tar being checked; `findings` fills up."""

    def __init__(self, job: CheckJob) -> None:
        self.job, self.path, self.findings = job, job.path, Findings()

    def run(self, report: Report) -> Findings:
        job, findings = self.job, self.findings
        headers = [] if job.rows is None else (job.rows.offset - BLOCK_BYTES).tolist()
        inspect = self._inspect if job.deep else None
        try:
            table = scan_shard(
                self.path, job.settings, report, known_bad=job.known_bad, resume_at=headers, inspect=inspect
            )
        except OSError as error:
            findings.damaged = not is_machine_error(error)
            self._add("tar" if findings.damaged else UNREAD, f"cannot be read ({error.strerror or error})")
            return findings
        findings.images = len(table)
        if job.entry:
            findings.damaged = (table.size_bytes, table.digest) != (job.entry.size_bytes, job.entry.digest)
        else:
            findings.damaged = bool(table.faults)
        if job.rows is None:
            self._check_alone(table)
        else:
            self._compare(table, job.rows)
        if findings.damaged:
            for odd in table.oddities:
                self._add("tar", f"has {odd.message}", odd.member, odd.byte)
        if findings.damaged and not findings.problems:
            other = "bytes of members other than images and labels, or of extended headers, changed"
            what = "there is no index to say where" if job.rows is None else other
            self._add("tar", f"is not the recorded one (digest): {what}")
        return findings

    @property
    def _kind(self) -> str:
        """Whose fault a difference between tar and index is: where the tar is the recorded one, the index's."""
        return "tar" if self.findings.damaged else "index"

    def _add(
        self, kind: str, what: str, member: str | None = None, first: int | None = None, last: int | None = None
    ) -> None:
        message = f"shard {self.path} {what}"
        self.findings.problems.append(Problem(message, kind, self.path.name, member, first, last))

    def _inspect(self, data: bytes, size: ImageSize) -> str | None:
        """Decode an image; say why training could stumble over it."""
        try:
            prepared = prepare(data)
        except UnusableImage as error:
            return str(error)
        if prepared.change in STRICT_CHANGES:
            return f"{prepared.change}: Pillow decodes it, other decoders may not"
        if prepared.change is None and (prepared.height, prepared.width) != size:
            return f"{prepared.height} x {prepared.width} pixels, {size.height} x {size.width} by its header"
        if prepared.change:
            self.findings.odd[prepared.change] += 1
        return None

    def _check_alone(self, table: ShardTable) -> None:
        """What can be said without rows of an index."""
        for fault in table.faults:
            self._add_fault(fault, fault.member)
        if table.bad_names or table.several:
            self._add(
                "tar", f"has {table.bad_names + table.several.total()} members that `bowstore index` would refuse"
            )
        for refused in () if self.findings.damaged else table.undecodable:
            self._add_undecodable(refused)

    def _compare(self, table: ShardTable, rows: Rows) -> None:
        """The tar's samples against the rows of the index."""
        found_n, place_n = _matched(table, rows)
        if len(rows.offset) and not found_n.any():
            what = f"none of its {len(rows.offset)} images is found"
            first = table.faults[0].message if table.faults else "no header is where it was"
            damaged = self.findings.damaged
            self._add(
                "tar" if damaged else "index",
                f"is unreadable: {what} ({first})" if damaged else f"is not the one of the index: {what}",
            )
            return
        entry = self.job.entry
        if entry and table.size_bytes != entry.size_bytes:
            self._add("tar", f"has {table.size_bytes} bytes, {entry.size_bytes} are recorded")
        told_n = np.zeros(len(rows.offset), bool)
        for fault in table.faults:
            member = fault.member
            if len(rows.offset):
                row = max(0, int(np.searchsorted(rows.offset - BLOCK_BYTES, fault.byte, "right")) - 1)
                told_n[row] = True
                member = member or rows.key(row)
            self._add_fault(fault, member)
        self._compare_lost(table, rows, ~found_n, told_n)
        columns = {name: table.columns[name][place_n] for name in COMPARED}
        if self.job.text_labels:
            unlabelled_n = columns["label"] == NO_LABEL
            columns["label"] = np.where(unlabelled_n, table.columns["text"][place_n], columns["label"])
        self._compare_found(columns, rows, found_n, told_n)
        if extra := len(table) - int(found_n.sum()):
            self._add(self._kind, f"holds {extra} images that the index does not know")
        intact_n = found_n & (columns["digest"] == rows.digest)
        intact = set(rows.offset[intact_n].tolist())
        for refused in table.undecodable:
            if refused.offset in intact:
                self._add_undecodable(refused)

    def _compare_found(
        self, columns: dict[str, NDArray[Any]], rows: Rows, found_n: NDArray[np.bool_], told_n: NDArray[np.bool_]
    ) -> None:
        """What a row's image is by the tar (`columns`) and by the index; of several differences the gravest."""
        same = {name: found_n & (columns[name] == getattr(rows, name)) for name in COMPARED}
        named_n, intact_n = same["key_hash"], same["digest"] & same["size"]
        for row in np.flatnonzero(found_n & ~named_n).tolist():
            key, offset = rows.key(row), int(rows.offset[row])
            what = f"holds {self._member(rows, row)!r} at byte {offset}, the index says {key!r}"
            self._add(self._kind, what, key, offset)
        for row in np.flatnonzero(named_n & ~intact_n).tolist():
            self._add_changed(rows, row)
        for row in np.flatnonzero(named_n & intact_n & ~(same["height"] & same["width"])).tolist():
            member, offset = self._member(rows, row), int(rows.offset[row])
            pixels = f"{columns['height'][row]} x {columns['width'][row]} pixels"
            what = f"member {member!r} at byte {offset} has {pixels}, the index says"
            self._add(self._kind, f"{what} {rows.height[row]} x {rows.width[row]}", member, offset)
        for row in np.flatnonzero(named_n & ~same["label"] & ~told_n).tolist():
            key, offset = rows.key(row), int(rows.offset[row])
            labels = f"label {columns['label'][row]}, the index says {rows.label[row]}"
            self._add(self._kind, f"sample {key!r} at byte {offset} has {labels}", key, offset)

    def _compare_lost(
        self, table: ShardTable, rows: Rows, lost_n: NDArray[np.bool_], told_n: NDArray[np.bool_]
    ) -> None:
        """Rows whose image no header tells of."""
        gone_n = lost_n & (rows.offset + rows.size > table.size_bytes)
        if gone_n.any():
            row = int(np.flatnonzero(gone_n)[0])
            key, first = rows.key(row), int(rows.offset[row])
            what = f"has lost {gone_n.sum()} images from byte {first} on, the first is {key!r}"
            self._add(self._kind, what, key, first)
        reasons = {refused.offset: refused.reason for refused in table.left_out}
        for row in np.flatnonzero(lost_n & ~gone_n).tolist():
            key, offset, size = rows.key(row), int(rows.offset[row]), int(rows.size[row])
            if image_digest(self._read(offset, size)) != rows.digest[row]:
                self._add_changed(rows, row)
            elif not told_n[row]:
                reason = reasons.get(offset, "no header names it")
                last = offset + size - 1
                what = f"holds no image {key!r} at bytes {offset} to {last} ({reason})"
                self._add("image" if offset in reasons else self._kind, what, key, offset, last)

    def _add_fault(self, fault: Fault, member: str | None) -> None:
        message = fault.message if fault.member or not member else f"{fault.message}; it belongs to {member!r}"
        self.findings.problems.append(Problem(f"shard {message}", "tar", self.path.name, member, fault.byte))

    def _add_undecodable(self, refused: Refused) -> None:
        self.findings.undecodable.append(refused)
        name, first, last = refused.member, refused.offset, refused.offset + refused.size - 1
        self._add("image", f"member {name!r}, bytes {first} to {last}: {refused.reason}", name, first, last)

    def _add_changed(self, rows: Rows, row: int) -> None:
        """An image whose bytes are not those that were indexed, with the blocks of it that are zeroed."""
        first, size = int(rows.offset[row]), int(rows.size[row])
        member, data = self._member(rows, row), self._read(first, size)
        what = f"member {member!r}: bytes {first} to {first + size - 1} are not those that were indexed"
        zeroed = [at for at in range(0, size, BLOCK_BYTES) if not data[at : at + BLOCK_BYTES].strip(b"\0")]
        if zeroed:
            end = min(zeroed[-1] + BLOCK_BYTES, size)
            what += f", zeroed from byte {first + zeroed[0]} to {first + end - 1}"
        self._add(self._kind, what, member, first, first + size - 1)

    def _member(self, rows: Rows, row: int) -> str:
        """The name in the tar header before a row's image, or the row's key where that is no name any more."""
        name = plain_name(self._read(int(rows.offset[row]) - BLOCK_BYTES, BLOCK_BYTES))
        return name.decode() if name.isascii() and name.decode().isprintable() and name else rows.key(row)

    def _read(self, offset: int, size: int) -> bytes:
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), max(0, size), max(0, offset))


def _matched(table: ShardTable, rows: Rows) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which rows (n,) lie in the tar at their byte, and as which of its samples."""
    offset = table.columns["offset"]
    if not len(offset):
        return np.zeros(len(rows.offset), bool), np.zeros(len(rows.offset), np.int64)
    place_n = np.searchsorted(offset, rows.offset).clip(max=len(offset) - 1)
    return offset[place_n] == rows.offset, place_n
