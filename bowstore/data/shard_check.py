"""One tar against its record and its rows of the index.

Legend: n samples of one tar.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bowstore.data.image_header import ImageSize, UnusableImage
from bowstore.data.images import prepare
from bowstore.data.index import Index
from bowstore.data.records import ShardEntry
from bowstore.data.scan import Refused, ScanSettings, ShardTable, scan_shard
from bowstore.data.sources.base import NO_LABEL
from bowstore.data.table import image_digest
from bowstore.data.tar import BLOCK_BYTES, BrokenTar, RefusedMember, header_names, plain_name
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
    rows: Index | None
    settings: ScanSettings
    known_bad: Mapping[str, tuple[int, str]]
    deep: bool
    text_labels: bool = False


@dataclass
class Findings:
    """What is wrong with one tar.

    Attributes:
        path: the tar.
        problems: one line each.
        images: samples found in it.
        damaged: its bytes are not the recorded ones.
        undecodable: intact images that cannot be decoded.
        odd: images that every decoder reads, but not as plain RGB: how many of each kind.
    """

    path: Path
    problems: list[Problem] = field(default_factory=list)
    images: int = 0
    damaged: bool = False
    undecodable: list[Refused] = field(default_factory=list)
    odd: Counter[str] = field(default_factory=Counter)

    def add(
        self, kind: str, what: str, member: str | None = None, first: int | None = None, last: int | None = None
    ) -> None:
        """Note a problem; `what` goes on behind the tar's name."""
        self.problems.append(Problem(f"shard {self.path} {what}", kind, self.path.name, member, first, last))

    @property
    def whose(self) -> str:
        """Kind of a difference between tar and index: where the tar is the recorded one, it is the index's."""
        return "tar" if self.damaged else "index"


def check_shard(job: CheckJob, report: Report) -> Findings:
    """Read one tar and compare it with what is known of it."""
    findings, table, rows = Findings(job.path), ShardTable(), job.rows
    inspect = partial(_inspect, findings.odd) if job.deep else None
    try:
        table = scan_shard(job.path, job.settings, report, known_bad=job.known_bad, inspect=inspect)
        found, wanted = (table.size_bytes, table.digest), job.entry and (job.entry.size_bytes, job.entry.digest)
        findings.damaged = wanted not in (None, found)
    except (BrokenTar, RefusedMember) as error:
        findings.damaged = True
        findings.problems.append(Problem(f"shard {error}", "tar", job.path.name, error.member, error.byte))
    except OSError as error:
        findings.damaged = not is_machine_error(error)
        findings.add("tar" if findings.damaged else UNREAD, f"cannot be read ({error.strerror or error})")
        return findings
    findings.images = len(table)
    if rows is not None:
        _compare(findings, table, rows, text_labels=job.text_labels)
    elif refused := table.bad_names + table.several.total():
        findings.add("tar", f"has {refused} members that `bowstore index` would refuse")
    for image in () if findings.damaged else table.undecodable:
        findings.undecodable.append(image)
        last = image.offset + image.size - 1
        findings.add(
            "image", f"member {image.member!r}, bytes {image.offset} to {last}: {image.reason}", image.member,
            image.offset, last,
        )  # fmt: skip
    if findings.damaged and not findings.problems:
        other = "bytes between members, or of members other than images and labels, changed"
        what = "there is no index to say where" if rows is None else other
        findings.add("tar", f"has {table.size_bytes} bytes and is not the recorded one (digest): {what}")
    return findings


def _inspect(odd: Counter[str], data: bytes, size: ImageSize) -> str | None:
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
        odd[prepared.change] += 1
    return None


def _compare(findings: Findings, table: ShardTable, rows: Index, *, text_labels: bool) -> None:
    """The rows of the index against the tar's bytes at their places, and against what a scan has found in it.

    Of a tar that is cut or damaged the scan has found nothing (an empty table): its rows are then looked at alone.
    """
    columns = table.columns
    if columns and text_labels:
        columns["label"] = np.where(columns["label"] == NO_LABEL, columns["text"], columns["label"])
    if columns and all(np.array_equal(columns[name], getattr(rows, name)) for name in ("offset", *COMPARED)):
        return
    row_at = {int(offset): n for n, offset in enumerate(columns.get("offset", ()))}
    reasons = {refused.offset: refused.reason for refused in table.left_out}
    with open(findings.path, "rb") as file:
        tar = _Bytes(file.fileno(), rows)
        places = rows.offset.tolist()
        if places and not any(tar.names(row) or place in row_at for row, place in enumerate(places)):
            if not findings.problems:
                what = "is unreadable" if findings.damaged else "is not the one of the index"
                findings.add(findings.whose, f"{what}: none of its {len(places)} images is found")
            return
        size_bytes = os.fstat(file.fileno()).st_size
        gone = np.flatnonzero(rows.offset + rows.size > size_bytes).tolist()
        if gone:
            key, first = rows.key(gone[0]), int(rows.offset[gone[0]])
            what = f"has {size_bytes} bytes and has lost {len(gone)} images from byte {first} on, the first is {key!r}"
            findings.add(findings.whose, what, key, first)
        for row in sorted(set(range(len(places))) - set(gone)):
            _compare_row(findings, tar, row, row_at.get(places[row]), columns, reasons)
    if extra := len(row_at.keys() - set(places)):
        findings.add(findings.whose, f"holds {extra} images that the index does not know")


def _compare_row(
    findings: Findings,
    tar: "_Bytes",
    row: int,
    found: int | None,
    columns: Mapping[str, NDArray[Any]],
    reasons: Mapping[int, str],
) -> None:
    """One row; `found` is its place in the columns that the scan has filled, None where no sample begins there."""
    rows = tar.rows
    key, first, last = rows.key(row), int(rows.offset[row]), int(rows.offset[row] + rows.size[row]) - 1
    member = tar.member(row)
    if not tar.names(row) and not (columns and found is None):
        findings.add(findings.whose, f"holds {member!r} at byte {first}, the index says {key!r}", key, first)
    elif image_digest(data := tar.image(row)) != rows.digest[row]:
        what = f"member {member!r}: bytes {first} to {last} are not those that were indexed{_zeroed(data, first)}"
        findings.add(findings.whose, what, member, first, last)
    elif found is not None:
        for name in COMPARED:
            here, there = columns[name][found], getattr(rows, name)[row]
            if here != there:
                what = f"member {member!r} at byte {first} has {name} {here}, the index says {there}"
                findings.add(findings.whose, what, member, first)
    elif columns:
        kind = "image" if first in reasons else findings.whose
        reason = reasons.get(first, "no header names it")
        findings.add(kind, f"holds no image {key!r} at bytes {first} to {last} ({reason})", key, first, last)


def _zeroed(data: bytes, first: int) -> str:
    """Which blocks of an image are zeroed, as the end of a sentence; empty if none."""
    zeroed = [at for at in range(0, len(data), BLOCK_BYTES) if not data[at : at + BLOCK_BYTES].strip(b"\0")]
    if not zeroed:
        return ""
    return f", zeroed from byte {first + zeroed[0]} to {first + min(zeroed[-1] + BLOCK_BYTES, len(data)) - 1}"


class _Bytes(NamedTuple):
    """A tar's bytes at the places of its rows."""

    descriptor: int
    rows: Index

    def image(self, row: int) -> bytes:
        return os.pread(self.descriptor, int(self.rows.size[row]), int(self.rows.offset[row]))

    def header(self, row: int) -> bytes:
        return os.pread(self.descriptor, BLOCK_BYTES, int(self.rows.offset[row]) - BLOCK_BYTES)

    def names(self, row: int) -> bool:
        """Whether the header before a row's image is one of its key."""
        return header_names(self.header(row), self.rows.key(row).encode() + b".")

    def member(self, row: int) -> str:
        """The name in that header, or the row's key where it is no name any more."""
        name = plain_name(self.header(row))
        return name.decode() if name.isascii() and name.decode().isprintable() and name else self.rows.key(row)
