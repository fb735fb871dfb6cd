"""Images on disk to WebDataset tars: shuffled once, each image decoded once; same input, same bytes.

What lies in `OUT/<split>/`, in the order of writing:

    .parts/plan.json           what is being made: source listing, settings, classes
    <split>-000000.tar ...     the shards, each under a temporary name until whole
    .parts/<split>-000000.json the record of a finished shard: size, digest, changes, quarantine
    quarantine.jsonl           one line for each image left out: path below the source, reason
    the index                  see `bowstore.data.index`
    manifest.json              the records summed up; its presence says that the split is complete

A process killed at any moment leaves finished shards with records, and perhaps one temporary file for each
worker; the next run goes on with the shards that have no record, or are not what their record says.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import __version__ as pillow_version

from bowstore import __version__
from bowstore.config import value_differences
from bowstore.data.config import ShardsConfig
from bowstore.data.index import build_index, open_index
from bowstore.data.records import (
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    PARTS_FOLDER,
    PLAN_FILE,
    QUARANTINE_FILE,
    Manifest,
    read_manifest,
)
from bowstore.data.shard_writer import Record, ShardJob, write_shards
from bowstore.data.shards_report import ShardsReport
from bowstore.data.sources import FOLDER, PassedOver, Source, Split, list_source
from bowstore.data.table import INDEX_FILE
from bowstore.data.tar import TARS
from bowstore.errors import DataError, MismatchError, UsageError
from bowstore.files import atomic_file, exclusive_lock, make_folder, read_json, sweep_temporary, write_json
from bowstore.progress import Progress

FORMAT_VERSION = 1


@dataclass(frozen=True)
class _Plan:
    """One split of one run: what it is (`identity`, compared with what lies there) and where it goes."""

    source: Source
    folder: Path
    split: Split
    identity: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(self.identity).encode())

    def jobs(self) -> list[ShardJob]:
        """The shards: all images, shuffled once, in equal pieces."""
        settings = self.identity["settings"]
        order = np.random.Generator(np.random.Philox(settings["seed"])).permutation(len(self.split.images))
        step, fingerprint = settings["per_shard"], self.fingerprint
        return [
            ShardJob(
                self.folder,
                fingerprint,
                f"{self.split.name}-{start // step:06d}.tar",
                [self.split.images[row] for row in order[start : start + step].tolist()],
            )
            for start in range(0, len(order), step)
        ]


def make_shards(
    source: Path,
    out: Path,
    config: ShardsConfig = ShardsConfig(),  # noqa: B008 - frozen
) -> list[ShardsReport]:
    """Write the images of a source as shards, with index and manifest, to `out/<split>`.

    Runs on from where an earlier run was stopped; does nothing where everything lies there already. With more
    than one worker it starts processes, which know nothing of the caller's script.

    Args:
        source: file or folder in one of the layouts of `bowstore.data.sources`.
        out: folder for the splits; made if it is not there.
        config: what the source is, as in `bowstore.data.sources.list_source`, and how it is cut.

    Returns:
        A report for each split, in the order train, val, test.

    Raises:
        UsageError: settings that the source does not take, or `out` is or lies in `source`.
        MissingError: no `source`.
        DataError: a source of no kind or several, nothing to write, classes that differ between splits, files that
            change underneath.
        MismatchError: `out` holds shards of another source or with other settings.
        BusyError: another process writes to `out`.
        BowstoreError: a worker died.
        OSError: the disk is full, or `out` cannot be written.
    """
    found = list_source(
        source, config.source, lists=config.lists, label_field=config.label_field, folders=config.folders
    )
    _check_places(source, out, found.splits)
    settings = {"seed": config.seed, "per_shard": config.per_shard}
    plans = [
        _Plan(found.source, out / split.name, split, _identity(found.source.kind, split, settings))
        for split in found.splits
    ]
    with exclusive_lock(out / ".lock", str(out)):
        for plan in plans:  # refuse before the first hour of work, not after it
            _refuse_other_content(plan)
        reports = []
        for plan in plans:
            reports.append(_make_split(plan, found.passed_over, config.workers or len(os.sched_getaffinity(0))))
    return reports


def _identity(kind: str, split: Split, settings: dict[str, int]) -> dict[str, Any]:
    source: dict[str, Any] = {
        "images": len(split.images),
        "size_bytes": split.size_bytes,
        "listing": split.listing_digest(),
    }
    if kind != FOLDER:  # there, paths and classes say all; and its manifests of before kinds stay valid
        source |= {"kind": kind, "labels": split.label_digest()}
    return {
        "format": MANIFEST_FORMAT,
        "version": FORMAT_VERSION,
        "split": split.name,
        "source": source,
        "settings": settings,
        "classes": list(split.classes),
    }


def _check_places(source: Path, out: Path, splits: Sequence[Split]) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a folder; take another name for the shards")
    real_source, real_out = source.resolve(), out.resolve()
    if real_out.is_relative_to(real_source):
        raise UsageError(f"{out} lies in the source {source}; shards need a folder outside it")
    for split in splits:
        if real_source.is_relative_to(real_out / split.name):
            raise UsageError(f"the source {source} lies in {out / split.name}, where shards would go; take another OUT")


def _refuse_other_content(plan: _Plan) -> None:
    """Refuse a folder that holds other shards than the plan's, saying what differs."""
    tars = sorted(path.name for path in plan.folder.glob(TARS))
    recorded = _recorded_identity(plan.folder)
    if not tars:
        written = (MANIFEST_FILE, QUARANTINE_FILE, INDEX_FILE, f"{PARTS_FOLDER}/{PLAN_FILE}")
        others = [name for name in written if os.path.lexists(plan.folder / name)]
        if others and (recorded is None or recorded.get("format") != plan.identity["format"]):
            raise MismatchError(
                f"{plan.folder / others[0]} is there, and `bowstore shards` did not write it; take another OUT, or "
                f"move it away"
            )
        return
    if recorded is None:
        difference = f"that `bowstore shards` did not write, for example {tars[0]}"
    else:
        difference = _difference(recorded, plan.identity)
    if difference:
        raise MismatchError(
            f"{plan.folder} holds shards {difference}; take another OUT, or remove {plan.folder} to make it anew"
        )


def _recorded_identity(folder: Path) -> dict[str, Any] | None:
    """What a manifest or a plan says that shards are made of; {} for something else, None where there is neither."""
    for path in (folder / MANIFEST_FILE, folder / PARTS_FOLDER / PLAN_FILE):
        if os.path.lexists(path):
            recorded = read_json(path)
            return recorded if isinstance(recorded, dict) else {}
    return None


def _difference(recorded: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What a recorded plan has otherwise, as the end of a sentence; empty if nothing."""
    known = {name: recorded.get(name) for name in wanted}
    if found := value_differences(known, wanted, free=("classes",)):
        return f"of something else ({', '.join(found)})"
    return "" if known["classes"] == wanted["classes"] else f"of other classes, not of these {len(wanted['classes'])}"


def _make_split(plan: _Plan, passed_over: PassedOver, workers: int) -> ShardsReport:
    """Write what is missing of one split, then its index, then its manifest."""
    start = time.monotonic()
    folder = plan.folder
    manifest = _complete_manifest(folder)
    new = manifest is None
    if manifest is None:
        _prepare_folder(plan)
        manifest = _finish(plan, _write_missing(plan, workers))
    counts = manifest.counts
    return ShardsReport(
        split=plan.split.name,
        folder=folder,
        classes=len(plan.split.classes),
        found=counts.found,
        written=counts.written,
        changed=counts.changed,
        quarantined=counts.quarantined,
        without_images=plan.split.classes_without_images(),
        passed_over=passed_over,
        shards=len(manifest.shards),
        new=new,
        seconds=time.monotonic() - start,
    )


def _prepare_folder(plan: _Plan) -> None:
    """Make the folder ready for writing: nothing of dead writers or of another plan, and no manifest."""
    folder = plan.folder
    make_folder(folder)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    make_folder(folder / PARTS_FOLDER)
    if not any(folder.glob(TARS)) and (folder / PARTS_FOLDER / PLAN_FILE).exists():
        for record in (folder / PARTS_FOLDER).glob(f"{plan.split.name}-{'[0-9]' * 6}.json"):
            record.unlink()
    sweep_temporary(folder)
    sweep_temporary(folder / PARTS_FOLDER)
    write_json(folder / PARTS_FOLDER / PLAN_FILE, plan.identity)


def _complete_manifest(folder: Path) -> Manifest | None:
    """The manifest, if index and shards are there as it says, and no shard was written to after it."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    try:
        written = (folder / MANIFEST_FILE).stat().st_mtime_ns
        found = open_index(folder).shards  # compares sizes
        later = any((folder / entry.name).stat().st_mtime_ns > written for entry in found)
    except (FileNotFoundError, DataError):  # MissingError, too
        return None
    return None if later or list(found) != manifest.shards else manifest


def _write_missing(plan: _Plan, workers: int) -> list[Record]:
    """Write the shards that have no record, or are not what it says; return the records of all, in order."""
    jobs = plan.jobs()
    with Progress(f"shards {plan.split.name}", len(plan.split.images)) as progress:
        return list(write_shards(plan.source, jobs, workers, progress.advance))


def _finish(plan: _Plan, records: Sequence[Record]) -> Manifest:
    """Quarantine list, index and manifest of a split whose shards are all there."""
    quarantined = sorted((line for record in records for line in record.quarantined), key=lambda line: line["path"])
    with atomic_file(plan.folder / QUARANTINE_FILE) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in quarantined)
    shards = [record for record in records if record.samples]
    if not shards:
        raise DataError(
            f"all {len(quarantined)} images of split {plan.split.name} in {plan.source.path} were quarantined; "
            f"see {plan.folder / QUARANTINE_FILE} for the reasons"
        )
    build_index(plan.folder, classes=plan.split.classes)
    sweep_temporary(plan.folder)  # workers of a killed run may have been alive still when this one began
    sweep_temporary(plan.folder / PARTS_FOLDER)
    changed: Counter[str] = Counter()
    for record in shards:
        changed.update(record.changed)
    names = {"class_names": list(plan.split.class_names)} if plan.split.class_names else {}  # for people to read
    manifest = (
        plan.identity
        | names
        | {
            "bowstore": __version__,
            "pillow": pillow_version,
            "counts": {
                "found": len(plan.split.images),
                "written": sum(record.samples for record in shards),
                "changed": dict(sorted(changed.items())),
                "quarantined": len(quarantined),
            },
            "shards": [
                {"name": r.name, "samples": r.samples, "size_bytes": r.size_bytes, "digest": r.digest} for r in shards
            ],
        }
    )
    write_json(plan.folder / MANIFEST_FILE, manifest)
    return Manifest.model_validate(manifest)
