"""ImageNet (ILSVRC2012) as image-net.org gives it out: archives that are read in place, and what people extract.

Train is a tar of a thousand tars, one a class; val is a flat tar, whose labels are in the devkit. Either may also be
extracted: train to class tars or class folders, val to a flat folder or class folders.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bowstore.data.sources.base import SPLIT_NAMES, Kind, Listing, Options, reading
from bowstore.data.sources.kaggle import SOLUTION
from bowstore.data.sources.labels import Draft
from bowstore.data.sources.names import SIGNATURE_BYTES, has_image_suffix, is_image, is_system_member, split_of
from bowstore.data.sources.synsets import WNID, Synsets, Truth, read_devkit, read_solution
from bowstore.data.sources.tars import total_bytes
from bowstore.data.sources.walk import SYSTEM, holds_image, look
from bowstore.data.sources.wnids import Drafts, above, add_folder, finish, lies_flat
from bowstore.data.tar import BrokenTar, Member, TarReader, open_tar_file
from bowstore.errors import CorruptError, DataError, MissingError, UsageError
from bowstore.progress import Progress, say

ARCHIVES = {split: f"ILSVRC2012_img_{split}.tar" for split in ("train", "val")}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_ARCHIVE = re.compile(r"ilsvrc2012_img_(train|val|test)(_v\d+)?\.tar")
_FOLDER = re.compile(r"ilsvrc2012_img_(train|val|test)(_v\d+)?")
_DEVKIT = re.compile(r"ilsvrc2012_devkit_t12(\.tar|\.tar\.gz|\.tgz)?")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.")
_NUM_CLASSES = 1000
_NO_IMAGES = "members of tars that are no images"
_PACKED, _CLASS_TARS, _EXTRACTED = "archive", "class tars", "folder"

Report = Callable[[int], None]


@dataclass
class _Layout:
    """What of ImageNet lies in a folder.

    Attributes:
        ways: where the images of each split lie, by how: an archive, a folder of class tars ("" for the source itself),
            a folder of class folders or images.
        devkit: its archive, or the folder that it extracts to.
        solution: whether Kaggle's table of val's labels is there.
        loose_val: how many images of val lie in the source itself.
    """

    ways: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: {split: [] for split in SPLIT_NAMES})
    devkit: str | None = None
    solution: bool = False
    loose_val: int = 0


def _look(source: Path) -> _Layout:
    layout = _Layout()
    if not source.is_dir():
        return layout
    level = look(source)
    for name in level.others:
        if found := _ARCHIVE.fullmatch(name.lower()):
            layout.ways[found[1]].append((_PACKED, name))
    if _class_tars(level.others):
        layout.ways["train"].append((_CLASS_TARS, ""))
    for name in level.folders:
        found = _FOLDER.fullmatch(name.lower())
        if split := found[1] if found else split_of(name):
            if _class_tars(look(source / name).others):
                layout.ways[split].append((_CLASS_TARS, name))
            if holds_image(source, name):
                layout.ways[split].append((_EXTRACTED, name))
    layout.devkit = next((name for name in [*level.folders, *level.others] if _DEVKIT.fullmatch(name.lower())), None)
    layout.solution = SOLUTION in level.others
    layout.loose_val = sum(bool(_VAL_IMAGE.match(name)) for name in level.images)
    return layout


def _class_tars(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".tar") and WNID.fullmatch(name.removesuffix(".tar"))]


def _recognise(source: Path) -> bool:
    """By an archive, class tars, val's flat images, or the devkit beside class folders."""
    if source.is_file() and (_ARCHIVE.fullmatch(source.name.lower()) or _DEVKIT.fullmatch(source.name.lower())):
        return True
    layout = _look(source)
    ways = [way for found in layout.ways.values() for way in found]
    if any(how != _EXTRACTED for how, _ in ways) or (layout.devkit and (ways or layout.loose_val)):
        return True
    flat = [source / name for how, name in layout.ways["val"]]
    return any(_VAL_IMAGE.match(name) for folder in flat for name in look(folder).images)


def _list_splits(source: Path, options: Options) -> Listing:
    """List train, val and test, as far as they are there; test has no labels.

    Raises:
        UsageError: the source is one of the archives.
        MissingError: no archive; val without its labels.
        CorruptError: an archive that is cut or damaged.
        DataError: a split that is there twice; images of other classes; as `wnids` and `synsets`.
    """
    if source.is_file():
        raise UsageError(f"{source} is one of ImageNet's archives; name the folder that holds them all")
    layout = _look(source)
    _refuse_loose_val(source, layout)
    if not any(layout.ways.values()):
        raise MissingError(f"{source} has no {' and no '.join(ARCHIVES.values())}; fetch them from image-net.org")
    _refuse_twice(source, layout, named=options.named)
    synsets, truth = _labels(source, layout)
    passed: Counter[str] = Counter()
    found = []
    for split, ways in layout.ways.items():
        if not ways:
            continue
        how, name = ways[0]  # what is packed comes first
        of_val = truth if split == "val" else None
        if split == "val" and truth is None and (how == _PACKED or lies_flat(source, name)):
            _refuse_without_truth(source, name)
        found.append(Drafts(split))
        if how == _EXTRACTED:
            add_folder(found[-1], source, name, of_val)
        else:
            _add_tars(found[-1], source, name, of_val, passed)
    _tell(source, layout, synsets, found)
    used = [name for name in (layout.devkit, SOLUTION if layout.solution else None) if name]
    return Listing(finish(found, synsets, source), tuple(used), passed)


def _refuse_loose_val(source: Path, layout: _Layout) -> None:
    """The tar of val, extracted as it is, scatters its images over the folder."""
    if layout.loose_val and not layout.ways["val"]:
        raise DataError(
            f"{source} holds {layout.loose_val} images of val beside all else; move them (ILSVRC2012_val_*) into "
            f"{source / 'val'}"
        )


def _refuse_twice(source: Path, layout: _Layout, *, named: bool) -> None:
    """Refuse a split that lies there in two ways; where the user named the kind, the packed one is meant."""
    for split, ways in layout.ways.items():
        if len({how for how, _ in ways}) < len(ways) if named else len(ways) > 1:
            names = [f"{name or '.'}/WNID.tar" if how == _CLASS_TARS else name for how, name in ways]
            raise DataError(
                f"{source} holds {split} more than once: {', '.join(names)}; take the archives with --source imagenet, "
                "class folders with --source folder, or move all but one away"
            )


def _labels(source: Path, layout: _Layout) -> tuple[Synsets | None, Truth | None]:
    if layout.devkit:
        return read_devkit(source / layout.devkit)
    return None, read_solution(source / SOLUTION) if layout.solution else None


def _refuse_without_truth(source: Path, where: str) -> None:
    fetch = f"fetch it from image-net.org (or {SOLUTION} from Kaggle), or move {where} away"
    raise MissingError(
        f"the images of {source / where} have no labels without {DEVKIT}, which is not in {source}; "
        + (above(source, DEVKIT, SOLUTION) or fetch)
    )


def _tell(source: Path, layout: _Layout, synsets: Synsets | None, found: list[Drafts]) -> None:
    """Name what is not there."""
    for split, name in ARCHIVES.items():
        if not layout.ways[split]:
            say(f"note: there is no {name} in {source}, so no split {split}")
    if synsets is None:
        say(f"note: there is no {DEVKIT} in {source}, so classes have no names and are not compared with it")
        classes = {image.label for drafts in found for image in drafts.images if image.label}
        if len(classes) != _NUM_CLASSES:
            say(f"note: {source} has images of {len(classes)} classes, ILSVRC2012 has {_NUM_CLASSES}")


def _add_tars(drafts: Drafts, source: Path, name: str, truth: Truth | None, passed: Counter[str]) -> None:
    """Take the images of a split that lies in a tar, or in a folder of class tars."""
    place = source / name
    class_tars = [place / tar for tar in _class_tars(look(place).others)] if place.is_dir() else []
    paths = class_tars or [place]
    with Progress(f"list {drafts.split}", total_bytes(paths), "bytes") as progress:
        for path in paths:
            with reading(path), open_tar_file(path) as file:
                listed = _Listed(path, source, passed, progress.advance)
                tar = TarReader(file, path, lambda _: None)
                if class_tars:
                    drafts.add_class(tar.name, path.stem, listed.images(tar))
                elif drafts.split == "train":
                    listed.add_classes(drafts, tar)
                else:
                    drafts.add_flat(tar.name, list(listed.images(tar)), truth)
                listed.advance(tar.size_bytes)


def _members(tar: TarReader) -> Iterator[Member]:
    try:
        while member := tar.next_member():
            yield member._replace(name=member.name.removeprefix("./"))
    except BrokenTar as error:
        remedy = "" if ";" in str(error) else "; fetch it anew"  # some have their own: unpack it first
        raise CorruptError(f"{error}{remedy}") from error


class _Listed:
    """The listing of one tar on disk."""

    def __init__(self, path: Path, source: Path, passed: Counter[str], report: Report) -> None:
        self._container, self._stamp = path.relative_to(source).as_posix(), path.stat().st_mtime_ns
        self._passed, self._report, self._position = passed, report, 0

    def images(self, tar: TarReader, inside: str = "") -> Iterator[Draft]:
        """Images in a tar, by the last part of their names; `inside` is the tar's path in the file."""
        for member in _members(tar):
            place = tar.start + member.offset
            self.advance(place + member.size)
            if is_system_member(member.name):
                self._passed[f"{SYSTEM} members of tars"] += 1
            elif is_image(member.name, partial(tar.beginning, member, SIGNATURE_BYTES)):
                yield Draft(
                    path=f"{self._container}/{inside}{member.name}",
                    name=member.name.rpartition("/")[2],
                    label="",
                    size_bytes=member.size,
                    stamp=self._stamp,
                    container=self._container,
                    place=place,
                )
            else:
                self._passed[_NO_IMAGES] += 1

    def add_classes(self, drafts: Drafts, tar: TarReader) -> None:
        """Take the images of a tar of class tars."""
        classes: set[str] = set()
        for member in _members(tar):
            wnid = member.name.rpartition("/")[2].removesuffix(".tar")
            if is_system_member(member.name):
                self._passed[f"{SYSTEM} members of tars"] += 1
            elif not member.name.endswith(".tar") and not has_image_suffix(member.name):
                self._passed[_NO_IMAGES] += 1
            elif not WNID.fullmatch(wnid) or wnid in classes:
                raise DataError(
                    f"{tar.name} holds {member.name!r}, which is no class tar called WNID.tar, or a second one; fetch "
                    "it anew"
                )
            else:
                classes.add(wnid)
                drafts.add_class(f"{tar.name}: {member.name}", wnid, self.images(tar.inside(member), f"{member.name}/"))

    def advance(self, position: int) -> None:
        """Report how far the file is read."""
        self._report(position - self._position)
        self._position = position


KIND = Kind(
    name="imagenet",
    expects=f"{ARCHIVES['train']}, {ARCHIVES['val']} and {DEVKIT}, read in place (any of the tars may be extracted: to "
    "train/ with class tars or class folders, to val/); val needs the devkit for its labels, train does without",
    example="bowstore shards ilsvrc2012 data/shards",
    recognise=_recognise,
    list_splits=_list_splits,
)
