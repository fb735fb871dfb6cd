"""The part of `bowstore.data.shards` that writes tars: one job a shard, in this process or in workers.

A shard is written whole under a temporary name, then gets its name, then its record. Only a shard that is
what its record says counts as finished: a run that goes on reads what it finds and compares the digest.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from bowstore.data.image_header import MAX_IMAGE_BYTES, UnusableImage
from bowstore.data.images import Prepared, prepare
from bowstore.data.records import PARTS_FOLDER, LeftOut, read_checked
from bowstore.data.sources import DANGLING, NO_LABEL, ImageFile, Reader, Source, open_source
from bowstore.data.workers import Report, run_jobs
from bowstore.files import atomic_file, file_digest, write_json
from bowstore.progress import say

_USUAL_SUFFIXES = {"jpg": ("jpg", "jpeg", "jpe", "jfif"), "png": ("png", "apng"), "webp": ("webp",)}


class ShardJob(NamedTuple):
    """One shard to write.

    Attributes:
        folder: where the tar goes.
        plan: fingerprint of all that decides the bytes.
        name: the tar's file name.
        images: in the order of writing.
    """

    folder: Path
    plan: str
    name: str
    images: list[ImageFile]

    @property
    def record_path(self) -> Path:
        """Where the record of the finished shard lies."""
        return self.folder / PARTS_FOLDER / f"{Path(self.name).stem}.json"


@dataclass(frozen=True)
class Record:
    """A finished shard.

    Attributes:
        plan: fingerprint of the job it was written for.
        name: the tar's file name; there is no such file where `samples` is 0.
        samples: images in it.
        size_bytes: length of the tar.
        digest: xxh3-128 of the tar, hex.
        changed: images encoded anew or renamed, by kind.
        quarantined: `path` and `reason` of each image left out.
    """

    plan: str
    name: str
    samples: int
    size_bytes: int
    digest: str
    changed: dict[str, int] = field(default_factory=dict)
    quarantined: list[LeftOut] = field(default_factory=list)


def read_record(job: ShardJob) -> Record | None:
    """The record of a finished shard, if it is this job's and the tar still has its length."""
    try:
        record = read_checked(Record, job.record_path)
        size_bytes = (job.folder / job.name).stat().st_size if record.samples else 0
    except (FileNotFoundError, ValueError):  # CorruptError, too
        return None
    return record if record.plan == job.plan and size_bytes == record.size_bytes else None


def write_shards(
    source: Source, jobs: Sequence[ShardJob], workers: int, advance: Callable[[int], None]
) -> Iterator[Record]:
    """Write the shards that are not finished, each with its record; yield the records of all, in order.

    Args:
        source: where the images lie.
        jobs: the shards.
        workers: processes; with 1, or with a single job, all is done in this process.
        advance: hears the number of further images dealt with.

    Raises:
        DataError: a file that cannot be read, or that changed after listing.
        BowstoreError: a worker died.
        OSError: the disk is full, or the folder cannot be written.
    """
    if min(workers, len(jobs)) > 1:
        work = partial(_write_in_worker, source)
        yield from run_jobs(work, jobs, min(workers, len(jobs)), advance, kept="finished shards are kept: ")
        return
    read = open_source(source)  # one for all shards: it may hold a whole archive
    yield from run_jobs(partial(_write_shard, read), jobs, 1, advance)


def _write_in_worker(source: Source, job: ShardJob, report: Report) -> Record:
    return _write_shard(_reader(source), job, report)


@cache
def _reader(source: Source) -> Reader:
    """A worker's reader, kept from shard to shard; it ends with the worker."""
    return open_source(source)


def _write_shard(read: Reader, job: ShardJob, report: Report) -> Record:
    """Write one tar and its record; `report` hears of each image and may raise to stop."""
    if record := _finished(job):
        report(len(job.images))
        return record
    # It brings torch along: two seconds that a run with nothing to do need not wait.
    from webdataset import TarWriter

    path = job.folder / job.name
    changed: Counter[str] = Counter()
    quarantined: list[LeftOut] = []
    with atomic_file(path) as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for image in job.images:
                try:
                    prepared = prepare(_read(read, image))
                except UnusableImage as error:
                    quarantined.append({"path": image.path, "reason": str(error)})
                else:
                    _write_sample(tar, image, prepared)
                    changed.update(_changes(image, prepared))
                report(1)
    samples, digest, size_bytes = len(job.images) - len(quarantined), file_digest(path), path.stat().st_size
    if not samples:
        path.unlink()  # readers stumble over a tar without members
    kinds = dict(sorted(changed.items()))
    record = Record(job.plan, job.name, samples, size_bytes if samples else 0, digest, kinds, quarantined)
    write_json(job.record_path, asdict(record))
    return record


def _finished(job: ShardJob) -> Record | None:
    """The record of a shard that an earlier run finished, if its bytes are still those that were written."""
    record = read_record(job)
    path = job.folder / job.name
    if record is None or not record.samples or file_digest(path) == record.digest:
        return record
    say(f"{path} is damaged (its digest is not the recorded one); it is written again")
    return None


def _read(read: Reader, image: ImageFile) -> bytes:
    if image.size_bytes == DANGLING:
        raise UnusableImage("link to a file that does not exist")
    if image.size_bytes > MAX_IMAGE_BYTES:
        raise UnusableImage(f"{image.size_bytes} bytes, more than {MAX_IMAGE_BYTES}")
    return read(image)


def _write_sample(tar: Any, image: ImageFile, prepared: Prepared) -> None:
    # One call for each member: in one call TarWriter sorts, and the label would come before the image.
    tar.write({"__key__": image.key, prepared.extension: prepared.data})
    if image.label != NO_LABEL:
        tar.write({"__key__": image.key, "cls": str(image.label).encode()})


def _changes(image: ImageFile, prepared: Prepared) -> list[str]:
    if prepared.change:
        return [prepared.change]
    suffix = image.path.rpartition(".")[2].lower()
    return [] if suffix in _USUAL_SUFFIXES[prepared.extension] else ["renamed"]
