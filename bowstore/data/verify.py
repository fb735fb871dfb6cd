"""A folder of shards against everything that was recorded of it: what is wrong, and what can be made good.

Every tar is read once. Where its bytes are not the recorded ones, the index says which images changed; where they
are, the index is compared with what the tar says.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from bowstore.config import StorageConfig
from bowstore.data.index import Index, build_index, check_columns, read_index
from bowstore.data.records import (
    MANIFEST_FILE,
    PARTS_FOLDER,
    QUARANTINE_FILE,
    Manifest,
    known_undecodable,
    read_manifest,
    written_here,
)
from bowstore.data.scan import Refused, ScanSettings
from bowstore.data.shard_check import UNREAD, CheckJob, Findings, Problem, check_shard
from bowstore.data.sources.base import NO_LABEL, some
from bowstore.data.table import COLUMNS, INDEX_FILE
from bowstore.data.tar import TARS
from bowstore.data.workers import run_jobs, worker_count
from bowstore.errors import BowstoreError, CorruptError, DataError, MissingError
from bowstore.files import atomic_file, check_plain_file, exclusive_lock
from bowstore.progress import Progress
from bowstore.remote import RemoteFolder

DAMAGED_SUFFIX = ".damaged"
_WORTH_BYTES = 1 << 28  # of shards, for one more process
_WORTH_BYTES_DEEP = 1 << 24


@dataclass
class FolderReport:
    """What was found in a folder of shards.

    Attributes:
        root: the folder.
        images: samples found in the tars.
        shards: tars found.
        own: whether `bowstore shards` wrote them, and so can write them again.
        problems: what is wrong.
        damaged: names of tars that are gone or are not the recorded ones.
        undecodable: tar and image, of intact images that cannot be decoded.
        odd: images that every decoder reads, but not as plain RGB: how many of each kind (deep only).
        repairs: what was done about the problems, in lines.
        left: problems that are still there.
    """

    root: Path
    images: int = 0
    shards: int = 0
    own: bool = False
    problems: list[Problem] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    undecodable: list[tuple[str, Refused]] = field(default_factory=list)
    odd: Counter[str] = field(default_factory=Counter)
    repairs: list[str] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)

    def add(self, kind: str, message: str, shard: str | None = None) -> None:
        """Note a problem that is about the folder or a whole tar."""
        self.problems.append(Problem(message, kind, shard))


def is_shards_folder(folder: Path) -> bool:
    """Whether shards, or records of shards, lie in a folder."""
    return (folder / INDEX_FILE).exists() or any(folder.glob(TARS)) or written_here(folder)


def verify_folder(root: Path, *, deep: bool = False, repair: bool = False, workers: int | None = None) -> FolderReport:
    """Check manifest, sizes, digests, the structure of the tars, and the index against what they hold.

    Args:
        root: folder of shards.
        deep: also decode every image, as strictly as `bowstore shards` does.
        repair: rebuild what is derived from intact tars; set damaged tars of bowstore's own aside, so that
            `bowstore shards` writes them again; leave undecodable images of foreign shards out of the index.
        workers: processes; None for up to one a core, where there is enough to do.

    Raises:
        BusyError: with `repair`: `bowstore shards` is writing to this folder.
    """
    report = FolderReport(root)
    manifest = _check_manifest(report)
    index, trusted = _check_index(report, manifest)
    jobs = _jobs(report, manifest, index, trusted=trusted, deep=deep)
    total_bytes = sum(job.path.stat().st_size for job in jobs)
    count = worker_count(workers, len(jobs), total_bytes, _WORTH_BYTES_DEEP if deep else _WORTH_BYTES)
    with Progress("verify", total_bytes, "bytes") as progress:
        for job, findings in zip(jobs, run_jobs(check_shard, jobs, count, progress.advance), strict=True):
            _take(report, job.path.name, findings)
    report.shards = len(jobs)
    report.left = list(report.problems)
    if repair and report.problems:
        _repair(report, manifest, index)
    return report


def verify_remote(root: Path, storage: StorageConfig, *, deep: bool = False, repair: bool = False) -> FolderReport:
    """Fetch the tars of a remote data set and check the copies against their index, one tar after the other.

    Args:
        root: remote folder of indexed shards.
        storage: where the copies lie, and how many of them at a time.
        deep: also decode every image.
        repair: take damaged copies away, so that they are fetched again.

    Raises:
        BowstoreError: no index there, or no connection.
    """
    remote = RemoteFolder(root, storage)
    remote.fetch(INDEX_FILE)
    index = read_index(remote.folder, remote, storage)
    report = FolderReport(index.root, shards=len(index.shards))
    trusted = _check_columns(report, index)
    text_labels = trusted and bool((index.label != NO_LABEL).all())
    with Progress("verify", sum(entry.size_bytes for entry in index.shards), "bytes") as progress:
        for number, entry in enumerate(index.shards):
            try:
                path = index.tar_path(number)
            except (DataError, MissingError) as error:  # gone, of another length, or other bytes than recorded
                report.add("tar", str(error), entry.name)
                continue
            rows = _rows(index, number) if trusted else None
            job = CheckJob(path, entry, rows, index.settings, {}, deep, text_labels)
            _take(report, entry.name, check_shard(job, progress.advance))
    report.left = list(report.problems)
    if repair and report.damaged:
        for name in report.damaged:
            (index.root / name).unlink(missing_ok=True)
        report.left = [problem for problem in report.problems if problem.shard not in report.damaged]
        report.repairs.append(f"{len(report.damaged)} damaged copies were removed; they are fetched again when needed")
    return report


def _check_manifest(report: FolderReport) -> Manifest | None:
    """The manifest of `bowstore shards`, where it wrote this folder."""
    path = report.root / MANIFEST_FILE
    try:
        manifest = read_manifest(report.root)
    except CorruptError as error:
        report.own = True
        report.add("manifest", str(error))
        return None
    report.own = manifest is not None or written_here(report.root)
    if report.own and manifest is None:
        report.add("manifest", f"{path} is missing: the shards are not complete; run the same `bowstore shards` again")
    return manifest


def _check_index(report: FolderReport, manifest: Manifest | None) -> tuple[Index | None, bool]:
    """The index, where it can be opened, and whether its columns can be trusted."""
    try:
        index = read_index(report.root)
    except BowstoreError as error:
        report.add("index", str(error))
        return None, False
    if manifest and (len(index), list(index.classes)) != (manifest.counts.written, manifest.classes):
        report.add(
            "index",
            f"{report.root / INDEX_FILE} has {len(index)} images of {len(index.classes)} classes, the manifest "
            f"{manifest.counts.written} of {len(manifest.classes)}; `bowstore index {report.root}` makes it anew",
        )
    return index, _check_columns(report, index)


def _check_columns(report: FolderReport, index: Index) -> bool:
    """Whether the columns are those that were written."""
    try:
        check_columns(index)
    except CorruptError as error:
        report.add("index", str(error))
        return False
    return True


def _jobs(
    report: FolderReport, manifest: Manifest | None, index: Index | None, *, trusted: bool, deep: bool
) -> list[CheckJob]:
    """One job for each tar that is there; what is missing or unknown is reported."""
    root = report.root
    known = {entry.name: number for number, entry in enumerate(index.shards)} if index else {}
    entries = manifest.shards if manifest else index.shards if index else ()
    recorded = {entry.name: entry for entry in entries}
    text_labels = bool(index and trusted and (index.label != NO_LABEL).all())  # .txt labels all images or none
    known_bad = {} if report.own else known_undecodable(root)
    here: dict[str, Path] = {}
    for path in sorted(root.glob(TARS)):
        try:
            check_plain_file(path)
        except CorruptError as error:
            report.add("tar", str(error), path.name)
            report.damaged.append(path.name)
        else:
            here |= {path.name: path} if path.exists() else {}
    for name in sorted(recorded.keys() - here.keys() - set(report.damaged)):
        report.damaged.append(name)
        report.add("tar", f"shard {root / name} is missing", name)
    jobs = []
    for name, path in here.items():
        entry, rows = recorded.get(name), None
        if entry is None and recorded:
            report.add(
                "tar", f"shard {path} is in no record; remove it, or run `bowstore index {root}` to use it", name
            )
        if index and entry and (name not in known or index.shards[known[name]] != entry):
            report.add("index", f"shard {path}: index and manifest differ; `bowstore index {root}` makes it anew", name)
        elif index and entry and trusted:
            rows = _rows(index, known[name])
        settings = index.settings if index else ScanSettings()
        jobs.append(CheckJob(path, entry, rows, settings, known_bad.get(name, {}), deep, text_labels))
    return jobs


def _rows(index: Index, shard: int) -> Index:
    """The part of the index that belongs to one tar, in memory of its own, as it goes to a worker."""
    first, last = np.searchsorted(index.shard, [shard, shard + 1]).tolist()
    start = np.asarray(index.key_start[first : last + 1])
    columns: dict[str, Any] = {name: np.asarray(getattr(index, name)[first:last]) for name in COLUMNS}
    columns |= {"key_start": start - start[0], "key_bytes": np.asarray(index.key_bytes[start[0] : start[-1]])}
    return replace(index, folders=(), **columns)


def _take(report: FolderReport, name: str, findings: Findings) -> None:
    report.images += findings.images
    report.problems += findings.problems
    report.undecodable += [(name, refused) for refused in findings.undecodable]
    report.odd += findings.odd
    if findings.damaged:
        report.damaged.append(name)


def _repair(report: FolderReport, manifest: Manifest | None, index: Index | None) -> None:
    """Make good what can be made good without the source, and say what is to be run for the rest."""
    if unread := sorted({str(problem.shard) for problem in report.problems if problem.kind == UNREAD}):
        report.repairs.append(
            f"{report.root}: nothing was repaired: {len(unread)} shards ({some(unread)}) cannot be read now, damaged "
            f"or not; see to the disk, the mount and the permissions, and run the same again"
        )
        return
    if report.own:
        with exclusive_lock(report.root.parent / ".lock", str(report.root.parent)):
            _repair_own(report, manifest)
        return
    if names := sorted({str(problem.shard) for problem in report.problems if problem.kind == "tar"}):
        report.repairs.append(
            f"{report.root}: nothing was repaired: {len(names)} shards ({some(names)}) are not the recorded ones, and "
            f"bowstore did not write them; fetch them again, or run `bowstore index` to take what is there as it is"
        )
        return
    _repair_foreign(report, index)


def _repair_own(report: FolderReport, manifest: Manifest | None) -> None:
    root = report.root
    aside = [root / name for name in report.damaged if (root / name).exists()]
    if manifest is None and (root / MANIFEST_FILE).exists():
        aside.append(root / MANIFEST_FILE)
    for path in aside:
        os.replace(path, _free_name(path))
    for name in report.damaged:
        (root / PARTS_FOLDER / Path(name).with_suffix(".json")).unlink(missing_ok=True)
    if report.damaged or manifest is None:
        names = some([path.name for path in aside])
        renamed = f"{len(aside)} files were set aside as NAME{DAMAGED_SUFFIX} ({names}); " if aside else ""
        report.repairs.append(
            f"{root}: {renamed}run the same `bowstore shards` command again: it writes just what is missing, with the "
            "bytes that it had"
        )
    elif any(problem.kind == "index" for problem in report.problems):
        build_index(root, classes=tuple(manifest.classes))
        report.left = [problem for problem in report.left if problem.kind != "index"]
        report.repairs.append(f"{root}: the index was built anew from the shards, which match their manifest")
    else:
        report.repairs.append(f"{root}: nothing was repaired: the shards are as they were written; make them anew")


def _free_name(path: Path) -> Path:
    """A name for a file that is set aside, which nothing has: what was set aside before stays."""
    place = path.with_name(path.name + DAMAGED_SUFFIX)
    numbers = count(2)
    while os.path.lexists(place):
        place = path.with_name(f"{path.name}{DAMAGED_SUFFIX}-{next(numbers)}")
    return place


def _repair_foreign(report: FolderReport, index: Index | None) -> None:
    """Build the index anew, without the images that cannot be decoded."""
    root = report.root
    if report.undecodable:
        path = root / QUARANTINE_FILE
        lines = path.read_bytes() if path.exists() else b""
        with atomic_file(path) as file:
            file.write(lines)
            for name, refused in report.undecodable:
                line = {
                    "path": f"{name}/{refused.member}",
                    "reason": refused.reason,
                    "digest": f"{refused.digest:016x}",
                }
                file.write(json.dumps(line).encode() + b"\n")
    built = build_index(root, classes=index.classes if index else (), settings=index.settings if index else None)
    report.left = []
    if report.undecodable:
        report.repairs.append(
            f"{root}: {len(report.undecodable)} images were left out of the index and listed in {QUARANTINE_FILE}; the "
            f"fingerprint is now {built.fingerprint}, word stores of these shards stay valid, joined by key"
        )
    else:
        report.repairs.append(f"{root}: the index was built anew from the shards; nothing else is to be done")
