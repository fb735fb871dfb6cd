"""ImageNet's classes by WNID (n01440764): which there are, what people call them, and which images are of which.

They come from the devkit of ILSVRC2012 (meta.mat and the validation's ground truth), or from the tables of Kaggle and
of Tiny-ImageNet.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bowstore.data.sources.base import reading, some
from bowstore.data.sources.packed import read_packed
from bowstore.errors import CorruptError, DataError, is_machine_error

WNID = re.compile(r"n\d{8}")
VAL_NAME = "ILSVRC2012_val_{:08d}"
_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"


class Synsets(NamedTuple):
    """The classes there are.

    Attributes:
        where: the file that says so.
        names: what people call each, by WNID; empty where nobody says.
    """

    where: str
    names: Mapping[str, str]


class Truth(NamedTuple):
    """WNIDs of images.

    Attributes:
        where: the file that says so.
        wnids: by the image's name without its extension.
    """

    where: str
    wnids: Mapping[str, str]


def read_devkit(path: Path) -> tuple[Synsets, Truth]:
    """The classes and the ground truth of the validation images, from the devkit of ILSVRC2012, packed or extracted.

    The ground truth is a line an image with the class's ILSVRC2012_ID; meta.mat tells the WNID of an id. Classes are
    the synsets without children; those above them have ids, too.

    Raises:
        CorruptError: a file of the devkit is missing or damaged.
    """
    files = _devkit_files(path)
    missing = [name for name in (_META, _TRUTH) if name not in files]
    if missing:
        raise CorruptError(f"{path} has no data/{' and no data/'.join(missing)}; fetch it anew")
    wnid_of, names = _read_meta(files[_META], path)
    lines = files[_TRUTH].decode("ascii", "replace").split()
    wrong = [f"{line!r} in line {number}" for number, line in enumerate(lines, start=1) if line not in wnid_of]
    if wrong or not lines:
        what = f"{len(wrong)} ids that {_META} does not have: {some(wrong)}" if lines else "no line"
        raise CorruptError(f"{path}: {_TRUTH} has {what}; fetch the devkit anew")
    truth = {VAL_NAME.format(number): wnid_of[line] for number, line in enumerate(lines, start=1)}
    return Synsets(str(path), names), Truth(f"{_TRUTH} of {path}", truth)


def _devkit_files(path: Path) -> dict[str, bytes]:
    """The devkit's two files by name."""
    if path.is_dir():
        # Some unpackers make a folder of the archive's name around the folder in it.
        inner = path / path.name if (path / path.name).is_dir() else path
        found = [inner / "data" / name for name in (_META, _TRUTH)]
        return {file.name: file.read_bytes() for file in found if file.is_file()}
    return read_packed(path, [f"data/{name}" for name in (_META, _TRUTH)])


def _read_meta(data: bytes, path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """WNIDs by ILSVRC2012_ID, as text, and what people call them by WNID: of the synsets without children."""
    from scipy.io import loadmat  # half a second, for those alone that read the devkit

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True, variable_names=["synsets"])["synsets"])
        rows = [
            (int(synset["ILSVRC2012_ID"]), str(synset["WNID"]), str(synset["words"]))
            for synset in synsets
            if int(synset["num_children"]) == 0
        ]
    except Exception as error:  # a damaged file ends in any exception: MatReadError, KeyError, zlib.error...
        if is_machine_error(error):
            raise
        raise CorruptError(
            f"{path}: {_META} holds no synsets ({' '.join(str(error).split())}); fetch it anew"
        ) from error
    wnid_of = {str(number): wnid for number, wnid, _ in rows}
    names = {wnid: words for _, wnid, words in sorted(rows, key=lambda row: row[1])}
    odd = [wnid for wnid in names if not WNID.fullmatch(wnid)]
    if odd or not rows or not len(rows) == len(wnid_of) == len(names):
        what = f"{some(odd)} for a WNID" if odd else "an id or a WNID twice" if rows else "no class"
        raise CorruptError(f"{path}: {_META} has {what}; fetch it anew")
    return wnid_of, names


def read_names(path: Path, only: Path | None = None) -> Synsets:
    """Classes from lines of a WNID and what people call it, behind white space.

    Args:
        path: LOC_synset_mapping.txt of Kaggle, words.txt of Tiny-ImageNet.
        only: a file that lists the WNIDs which count (wnids.txt); None: all do.

    Raises:
        DataError: a file that cannot be read, a line without a WNID, no line.
    """
    names = dict(_wnid_lines(path)) if path.is_file() else {}
    where, wnids = (path, names) if only is None else (only, dict(_wnid_lines(only)))
    if not wnids:
        raise DataError(f"{where} names no class; fetch it anew, or take it away")
    return Synsets(str(where), {wnid: names.get(wnid, "") for wnid in sorted(wnids)})


def _wnid_lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path), start=1):
        wnid, _, name = line.replace("\t", " ").strip().partition(" ")
        if wnid and not WNID.fullmatch(wnid):
            raise DataError(f"{path}: line {number} begins with {wnid[:20]!r}, not with a WNID; fetch it anew")
        if wnid:
            yield wnid, name.strip()


def read_annotations(path: Path) -> Truth:
    """Tiny-ImageNet's val_annotations.txt: an image, its WNID and its box a line, behind tabs.

    Raises:
        DataError: it cannot be read; a line of another form.
    """
    return _truth(path, ((number, line.split("\t")[:2]) for number, line in enumerate(_lines(path), start=1) if line))


def read_solution(path: Path) -> Truth:
    """Kaggle's LOC_val_solution.csv: an image's name, and a WNID with a box for each of its objects, of one class.

    Raises:
        DataError: it cannot be read; a line of another form.
    """
    rows = csv.reader(_lines(path)[1:])
    return _truth(path, ((rows.line_num + 1, [row[0], *sorted(set(row[1].split()[::5]))]) for row in rows if row[1:]))


def _truth(path: Path, lines: Iterator[tuple[int, list[str]]]) -> Truth:
    wnids: dict[str, str] = {}
    for number, fields in lines:
        if len(fields) != 2 or not WNID.fullmatch(fields[1]):
            raise DataError(f"{path}: line {number} is not an image with one WNID: {fields!r}; fetch it anew")
        name = fields[0].rpartition(".")[0] or fields[0]
        if wnids.setdefault(name, fields[1]) != fields[1]:
            raise DataError(f"{path}: line {number} names {fields[0]!r} again, with another WNID; fetch it anew")
    if not wnids:
        raise DataError(f"{path} names no image; fetch it anew")
    return Truth(str(path), wnids)


def _lines(path: Path) -> list[str]:
    try:
        with reading(path):
            return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; fetch it anew") from error
