"""Building the index: one pass over all tars, in processes, and one file from what they found.

Every process holds the part of the table that belongs to its tar; this one holds the table and nothing else of the
samples.

Legend: N samples.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from bowstore.data.records import QUARANTINE_FILE, ShardEntry, known_undecodable, read_manifest, written_here
from bowstore.data.scan import ScanSettings, ShardTable, scan_shard
from bowstore.data.sources.base import NO_LABEL_FIELD
from bowstore.data.sources.labels import text_is_label
from bowstore.data.table import COLUMNS, INDEX_FILE, INDEX_VERSION, write_table
from bowstore.data.tar import TARS
from bowstore.data.workers import Report, run_jobs, worker_count
from bowstore.errors import DataError, MismatchError, MissingError
from bowstore.files import atomic_file, check_plain_file
from bowstore.progress import Progress, say

_ALMOST_TAR = re.compile(r"[^.].*\.(tar|tar\.(gz|bz2|xz|zst|lz4|lzma|Z)|t[gbxz]z2?|tzst)", re.IGNORECASE)
_WORTH_BYTES = 1 << 28  # of shards, for one more process
_EXAMPLES = 5


def write_index(root: Path, classes: tuple[str, ...], settings: ScanSettings, workers: int | None) -> None:
    """Scan the tars of `root` and write the index; see `bowstore.data.index.build_index`."""
    paths = find_tars(root)
    own = written_here(root)
    known_bad = {} if own else known_undecodable(root)
    jobs = [_IndexJob(path, settings, known_bad.get(path.name, {})) for path in paths]
    total_bytes = sum(path.stat().st_size for path in paths)
    with Progress("index", total_bytes, "bytes") as progress:
        count = worker_count(workers, len(jobs), total_bytes, _WORTH_BYTES)
        tables = list(run_jobs(_index_shard, jobs, count, progress.advance))
    entries = tuple(
        ShardEntry(path.name, len(table), table.size_bytes, table.digest)
        for path, table in zip(paths, tables, strict=True)
    )
    _refuse_names(root, tables)
    if own:
        _refuse_changed(root, entries, tables)
    else:
        _write_quarantine(root, entries, tables, known_bad)
    _refuse_unusable(root, entries, tables)
    _settle_labels(root, tables)
    _tell_turned(root, tables)
    key_hash_N = np.concatenate([table.columns["key_hash"] for table in tables])
    _refuse_duplicates(key_hash_N, tables)
    fingerprint = xxhash.xxh3_128(key_hash_N.data)
    for entry in entries:
        fingerprint.update(f"{entry.samples} {entry.size_bytes} {entry.digest};".encode())
    meta = {
        "version": INDEX_VERSION,
        "fingerprint": fingerprint.hexdigest(),
        "classes": list(classes),
        "image_ext": list(settings.image_ext),
        "label_field": settings.label_field,
        "shards": [list(entry) for entry in entries],
    }
    write_table(root / INDEX_FILE, meta, _lengths(tables), partial(_pieces, tables))


def find_tars(root: Path) -> list[Path]:
    """The tars of a folder, in the order of their names.

    Raises:
        MissingError: no folder, or no tar in it.
        CorruptError: one of them is no file.
    """
    if not root.is_dir():
        raise MissingError(f"no folder {root}; `bowstore shards SRC OUT` makes shards")
    paths = sorted(root.glob(TARS))
    others = sorted(path.name for path in root.iterdir() if path not in paths and _ALMOST_TAR.fullmatch(path.name))
    if not paths:
        raise MissingError(f"no *.tar file in {root}; {_remedy(others)}")
    if others:
        say(f"{root}: {len(others)} files like {others[0]} are no *.tar and are passed over; {_remedy(others)}")
    for path in paths:
        check_plain_file(path)
        if not path.exists():
            raise MissingError(f"{path} is a link to a file that does not exist; restore the file, or remove the link")
    return paths


def _remedy(others: Sequence[str]) -> str:
    """What to do about files that are shards but for their names or a packing."""
    if not others:
        return "name the folder that holds the shards themselves"
    first = others[0]
    if first.lower().endswith(".tar"):
        return f"rename {first} to {first[:-4]}.tar, and its like, to have them read"
    return f"unpack {first} and its like first, to have them read"


class _IndexJob(NamedTuple):
    path: Path
    settings: ScanSettings
    known_bad: dict[str, tuple[int, str]]


def _index_shard(job: _IndexJob, report: Report) -> ShardTable:
    return scan_shard(job.path, job.settings, report, known_bad=job.known_bad)


def _refuse_names(root: Path, tables: Sequence[ShardTable]) -> None:
    """Refuse names that break the key contract, and samples whose image is not clear; over all shards at once."""
    if count := sum(table.bad_names for table in tables):
        examples = [name for table in tables for name in table.bad_name_examples][:_EXAMPLES]
        raise DataError(
            f"{root}: the names of {count} members are not <key>.<extension> in ASCII without white space and other "
            f"dots, for example {examples}; `bowstore shards {root} OUT` writes them anew under good keys"
        )
    several: Counter[str] = Counter()
    for table in tables:
        several.update(table.several)
    if several:
        choices = ", ".join(f"{extension} ({count})" for extension, count in several.most_common())
        raise DataError(f"{root}: samples hold several images; choose one with --image-ext: {choices}")


def _settle_labels(root: Path, tables: Sequence[ShardTable]) -> None:
    """Take the numbers in .txt for labels or for captions, by all tars together, and say what counts as no label.

    Raises:
        DataError: labels in .json of which some are whole numbers and some are names.
    """
    told: Counter[str] = Counter()
    for table in tables:
        told.update(table.told)
    names = [name for table in tables for name in table.name_examples][:_EXAMPLES]
    remedy = f"`bowstore shards {root} OUT` numbers names"
    if told["named"] and told["json"]:
        raise DataError(
            f"{root}: labels in .json are whole numbers in {told['json']} samples and names in {told['named']}, for "
            f"example {names}; {remedy}, and --label-field {NO_LABEL_FIELD} leaves labels out"
        )
    if told["named"]:
        say(
            f"note: labels in .json are names in {told['named']} samples, for example {names}, and are left out; "
            f"{remedy}"
        )
    as_labels = text_is_label(samples=told["samples"], numbers=told["numbers"], labelled=told["labelled"])
    for table in tables:
        numbers = table.columns.pop("text")
        if as_labels:
            table.columns["label"] = numbers
    if told["numbers"] and not as_labels and not told["labelled"]:
        say(
            f"note: .txt is a whole number in {told['numbers']} of {told['samples']} samples, so it holds captions "
            "and no labels"
        )


def _tell_turned(root: Path, tables: Sequence[ShardTable]) -> None:
    turned = sum(table.turned for table in tables)
    if turned:
        example = next(table.turned_example for table in tables if table.turned)
        say(
            f"note: {turned} images carry an EXIF rotation, which nothing applies, for example {example}: they are "
            f"used as they lie in the file; `bowstore shards {root} OUT` turns them upright"
        )


def _refuse_changed(root: Path, entries: Sequence[ShardEntry], tables: Sequence[ShardTable]) -> None:
    """Refuse to index damage: bowstore's own shards are what their manifest says, and all their images are good."""
    manifest = read_manifest(root)
    if manifest:
        recorded, found = ({entry.name: entry for entry in some} for some in (manifest.shards, entries))
        if changed := sorted({name for name, _ in recorded.items() ^ found.items()}):
            raise MismatchError(
                f"{len(changed)} shards of {root} are not those of its manifest, for example {changed[0]}; "
                f"`bowstore verify {root} --repair` makes good what it can"
            )
    for entry, table in zip(entries, tables, strict=True):
        for refused in table.left_out:
            raise DataError(
                f"{root / entry.name}: image {refused.member!r} has no readable header ({refused.reason}); "
                f"`bowstore verify {root} --repair` makes good what it can"
            )


def _write_quarantine(
    root: Path,
    entries: Sequence[ShardEntry],
    tables: Sequence[ShardTable],
    known_bad: dict[str, dict[str, tuple[int, str]]],
) -> None:
    lines = []
    for entry, table in zip(entries, tables, strict=True):
        for refused in table.left_out:
            line = {"path": f"{entry.name}/{refused.member}", "reason": refused.reason}
            known = known_bad.get(entry.name, {}).get(refused.member)
            if known and known[0] == refused.digest:
                line["digest"] = f"{refused.digest:016x}"
            lines.append(line)
    path = root / QUARANTINE_FILE
    if lines or path.exists():
        with atomic_file(path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    if lines:
        say(f"{len(lines)} images were left out, see {path}; for example {lines[0]['path']}: {lines[0]['reason']}")


def _refuse_unusable(root: Path, entries: Sequence[ShardEntry], tables: Sequence[ShardTable]) -> None:
    if any(len(table) for table in tables):
        return
    for entry, table in zip(entries, tables, strict=True):
        for refused in table.left_out:
            raise DataError(f"{root}: no image can be used; the first, {entry.name}/{refused.member}: {refused.reason}")
    raise DataError(f"{root}: the shards hold no image")


def _refuse_duplicates(key_hash_N: NDArray[np.uint64], tables: Sequence[ShardTable]) -> None:
    ordered_N = np.sort(key_hash_N)
    repeated = np.unique(ordered_N[1:][ordered_N[1:] == ordered_N[:-1]])
    if not len(repeated):
        return
    names: list[str] = []
    for table in tables:
        stops = np.cumsum(table.columns["key_length"], dtype=np.int64)
        for row in np.flatnonzero(np.isin(table.columns["key_hash"], repeated))[: _EXAMPLES - len(names)].tolist():
            start = stops[row] - table.columns["key_length"][row]
            names.append(table.columns["key_bytes"][start : stops[row]].tobytes().decode())
    raise DataError(f"{len(repeated)} keys occur more than once, for example {names}; keys must be unique")


def _lengths(tables: Sequence[ShardTable]) -> dict[str, int]:
    rows = sum(len(table) for table in tables)
    key_bytes = sum(len(table.columns["key_bytes"]) for table in tables)
    return {**dict.fromkeys(COLUMNS, rows), "key_start": rows + 1, "key_bytes": key_bytes}


def _pieces(tables: Sequence[ShardTable], name: str) -> Iterator[NDArray[Any]]:
    """A column of the whole, tar by tar."""
    if name == "key_start":
        start = 0
        yield np.zeros(1, np.int64)
        for table in tables:
            stops = start + np.cumsum(table.columns["key_length"], dtype=np.int64)
            start = int(stops[-1]) if len(stops) else start
            yield stops
        return
    for number, table in enumerate(tables):
        yield np.full(len(table), number, np.int32) if name == "shard" else table.columns[name]
