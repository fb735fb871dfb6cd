"""Reading lists of images (text or CSV), and finding the files that they name."""

import csv
import os
import posixpath
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bowstore.data.sources.base import reading, some
from bowstore.data.sources.labels import Draft
from bowstore.data.sources.names import split_of
from bowstore.errors import DataError, UsageError
from bowstore.progress import Progress, say

IMAGE_COLUMNS = ("image", "path", "filename", "file_name", "filepath")
LABEL_COLUMNS = ("label", "class", "class_name", "target")
SPLIT_COLUMN = "split"
_SHOW_PROGRESS_IMAGES = 20_000


class Entry(NamedTuple):
    """A line of a list.

    Attributes:
        number: of the line, from 1.
        path: as it stands in the list.
        label: empty where there is none.
        split: train, val or test; empty where the list does not say.
        whole: the line as a path with white space in it, which `path label` may also be; empty where it cannot.
    """

    number: int
    path: str
    label: str
    split: str = ""
    whole: str = ""


def read_list(path: Path, label_field: str | None = None) -> list[Entry]:
    """Read `path` or `path label` lines, or a CSV (or TSV) with a header.

    Args:
        path: the list.
        label_field: CSV column with the label; None for the first of `LABEL_COLUMNS`.

    Raises:
        MissingError: no such file.
        DataError: not UTF-8, no line, lines that cannot be read, no column of images or labels.
    """
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"list {path}: byte {error.start} is not UTF-8; save the list as UTF-8") from error
    lines = text.split("\n")  # names may hold the other characters that `splitlines` breaks at
    first = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if "\t" in first and "," not in first else ","
    header = [name.strip(' "').lower() for name in first.strip().split(delimiter)]
    problems: list[str] = []
    if set(header) & set(IMAGE_COLUMNS):
        entries = list(_read_table(lines, delimiter, path, label_field, problems))
    elif path.suffix.lower() in (".csv", ".tsv") and delimiter in first:
        raise DataError(
            f"list {path} has no column of image files: its header is {first[:80]!r}, "
            f"and one of {', '.join(IMAGE_COLUMNS)} is needed; name the columns in the first line"
        )
    elif label_field:
        raise UsageError(f"list {path} has no header, so no column {label_field!r}; leave --label-field out")
    else:
        entries = list(_read_lines(lines, problems))
    if problems:
        raise DataError(f"list {path}: {len(problems)} lines cannot be read: {some(problems)}; mend or remove them")
    if not entries:
        raise DataError(f"list {path} names no image; fill it, or name another list")
    return entries


def _read_lines(lines: Sequence[str], problems: list[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if "\0" in line:
            problems.append(f"line {number} ({line[:40]!r})")
        elif line:
            head, *tail = line.rsplit(None, 1)
            yield Entry(number, head, tail[0], whole=line) if tail else Entry(number, line, "")


def _read_table(
    lines: Sequence[str], delimiter: str, path: Path, label_field: str | None, problems: list[str]
) -> Iterator[Entry]:
    rows = csv.reader((line + "\n" for line in lines), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] = []
    image, label, split = -1, None, None
    while True:
        start = rows.line_num + 1
        try:
            row = [cell.strip() for cell in next(rows)]
        except StopIteration:
            return
        except csv.Error as error:
            problems.append(f"line {start} ({error})")
            continue
        if not any(row):
            continue
        if not header:
            header = [name.lower() for name in row]
            image, label, split = _columns(header, path, label_field)
        elif len(row) != len(header):
            problems.append(f"line {start} ({len(row)} fields, the header has {len(header)})")
        elif not row[image] or "\0" in row[image]:
            problems.append(f"line {start} (no path)")
        elif split is not None and not split_of(row[split]):
            problems.append(f"line {start} (split {row[split][:20]!r} is none of train, val, test)")
        else:
            name = split_of(row[split]) if split is not None else ""
            yield Entry(start, row[image], row[label] if label is not None else "", name or "")


def _columns(header: Sequence[str], path: Path, label_field: str | None) -> tuple[int, int | None, int | None]:
    """Places of the columns with image, label and split."""
    image = next(header.index(name) for name in IMAGE_COLUMNS if name in header)
    if label_field and label_field.lower() not in header:
        raise DataError(f"list {path} has no column {label_field!r} for the label; its columns: {', '.join(header)}")
    wanted = (label_field.lower(),) if label_field else LABEL_COLUMNS
    label = next((header.index(name) for name in wanted if name in header), None)
    return image, label, header.index(SPLIT_COLUMN) if SPLIT_COLUMN in header else None


def find_files(
    entries: Sequence[Entry], *, source: Path, listed_in: Path, below: str = "", split: str = ""
) -> list[Draft]:
    """Find the files of a list's lines; only names, sizes and times are read.

    Args:
        entries: lines of one split.
        source: folder that the drafts' paths are relative to.
        listed_in: the list, for messages.
        below: folder of the source that the lines' paths are relative to; keys are made of what comes behind it.
        split: for the progress line.

    Raises:
        DataError: paths that climb out of the folder, files that are not there, files named twice; with counts and
            line numbers.
    """
    root = source / below
    climbing: list[str] = []
    missing: list[str] = []
    drafts: list[Draft] = []
    other_code_points = 0
    with Progress(f"list {split}", len(entries), shown=len(entries) >= _SHOW_PROGRESS_IMAGES) as progress:
        for entry in entries:
            readings = [(entry.path, entry.label)] + ([(entry.whole, "")] if entry.whole else [])
            inside = [(path, label) for name, label in readings if (path := _inside(name, root))]
            found = next((draft for path, label in inside if (draft := _draft(root, below, path, label))), None)
            if found:
                drafts.append(found)
                other_code_points += found.name not in (path for path, _ in inside)
            else:
                (missing if inside else climbing).append(f"{entry.path!r} in line {entry.number}")
            progress.advance()
    if climbing:
        raise DataError(
            f"list {listed_in}: {len(climbing)} paths climb out of {root}: {some(climbing)}; "
            "name files inside it, relative to it"
        )
    if missing:
        raise DataError(
            f"list {listed_in}: {len(missing)} of {len(entries)} files are not in {root}: {some(missing)}; "
            + (_meant(root, entries) or "bring them there, or remove the lines")
        )
    if other_code_points:
        say(
            f"note: {other_code_points} names in list {listed_in} are written with other code points (NFC, NFD) than "
            "the files, which look the same"
        )
    _refuse_twice(drafts, entries, listed_in)
    return drafts


def _meant(root: Path, entries: Sequence[Entry]) -> str:
    """What to change where the first file that is not there would be by another reading of its line."""
    line = next(entry for entry in entries if not os.path.isfile(root / entry.path))
    ways = {
        "write / for \\": line.path.replace("\\", "/"),
        "put the path first in a line, and the label behind it": line.label.strip(),
    }
    ways |= {f"write names with their extension, {suffix}": line.path + suffix for suffix in (".jpg", ".JPEG", ".png")}
    return next((what for what, path in ways.items() if path and os.path.isfile(root / path)), "")


def _inside(path: str, root: Path) -> str:
    """The path relative to `root` without detours, or "" where it climbs out."""
    if os.path.isabs(path):
        path = os.path.relpath(path, os.path.abspath(root))
    normal = posixpath.normpath(path)
    return "" if normal in (".", "..") or normal.startswith("../") else normal


def _draft(root: Path, below: str, path: str, label: str) -> Draft | None:
    """The file of that name or, as macOS writes names in its own way, of the one that looks the same."""
    forms = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    for name in [path] if path.isascii() else dict.fromkeys((path, *forms)):
        try:
            status = os.stat(os.path.join(root, name))
        except (OSError, ValueError):  # ValueError: lone surrogates
            continue
        if stat.S_ISREG(status.st_mode):
            full = f"{below}/{name}" if below else name
            return Draft(full, name, label, status.st_size, status.st_mtime_ns)
    return None


def _refuse_twice(drafts: Sequence[Draft], entries: Sequence[Entry], listed_in: Path) -> None:
    lines: dict[str, int] = {}
    twice = []
    for draft, entry in zip(drafts, entries, strict=True):
        if draft.path in lines:
            twice.append(f"{draft.name!r} in lines {lines[draft.path]} and {entry.number}")
        lines.setdefault(draft.path, entry.number)
    if twice:
        raise DataError(
            f"list {listed_in}: {len(twice)} images are named twice: {some(twice)}; remove one line of each"
        )
