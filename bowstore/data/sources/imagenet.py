"""ImageNet (ILSVRC2012) as image-net.org gives it out: archives that are read in place, and what people extract.

Train is a tar of a thousand tars, one a class; val is a flat tar, whose labels are in the devkit. Either may also be
extracted: train to class tars or class folders, val to a flat folder or class folders.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bowstore.data.sources.base import SPLIT_NAMES, Kind, Listing, Options, some
from bowstore.data.sources.kaggle import SOLUTION
from bowstore.data.sources.labels import Draft
from bowstore.data.sources.names import SIGNATURE_BYTES, has_image_suffix, is_image, is_system_member, split_of
from bowstore.data.sources.nested import NestedTar, open_tar
from bowstore.data.sources.synsets import WNID, Synsets, Truth, read_devkit, read_solution
from bowstore.data.sources.tars import total_bytes
from bowstore.data.sources.walk import SYSTEM, holds_image, look
from bowstore.data.sources.wnids import Drafts, above, add_folder, finish, lies_flat
from bowstore.data.tar import Member
from bowstore.errors import DataError, MissingError, UsageError
from bowstore.progress import Progress, say

ARCHIVES = {split: f"ILSVRC2012_img_{split}.tar" for split in ("train", "val")}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_ARCHIVE = re.compile(r"ilsvrc2012_img_(train|val|test)(_v\d+)?\.tar")
_FOLDER = re.compile(r"ilsvrc2012_img_(train|val|test)(_v\d+)?")
_DEVKIT = re.compile(r"ilsvrc2012_devkit_t12(\.tar|\.tar\.gz|\.tgz)?")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.")
_NUM_CLASSES = 1000
_NO_IMAGES = "members of tars that are no images"

Report = Callable[[int], None]


@dataclass
class _Layout:
    """What of ImageNet lies in a folder: names by split, and what tells labels.

    Attributes:
        archives: a tar of images, by split.
        class_tars: folder with WNID.tar files ("" for the source itself), by split.
        folders: folder of class folders, or of images, by split.
        devkit: its archive, or the folder that it extracts to.
        solution: whether Kaggle's table of val's labels is there.
        loose_val: how many images of val lie in the source itself.
        same: two names for one split, and the split.
    """

    archives: dict[str, str] = field(default_factory=dict)
    class_tars: dict[str, str] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    devkit: str | None = None
    solution: bool = False
    loose_val: int = 0
    same: tuple[str, str, str] | None = None

    def put(self, found: dict[str, str], split: str, name: str) -> None:
        """Take the first name of a split, and keep in mind that there is another."""
        if found.setdefault(split, name) != name:
            self.same = self.same or (found[split], name or "class tars", split)

    def ways(self, split: str) -> list[str]:
        """Where the images of a split lie: what is extracted comes last."""
        return [found[split] for found in (self.archives, self.class_tars, self.folders) if split in found]


def _look(source: Path) -> _Layout:
    layout = _Layout()
    if not source.is_dir():
        return layout
    level = look(source)
    for name in level.others:
        if found := _ARCHIVE.fullmatch(name.lower()):
            layout.put(layout.archives, found[1], name)
    for name in [*level.folders, *level.others]:
        if _DEVKIT.fullmatch(name.lower()):
            layout.devkit = layout.devkit or name
    for name in level.folders:
        found = _FOLDER.fullmatch(name.lower())
        if split := found[1] if found else split_of(name):
            if _class_tars(look(source / name).others):
                layout.put(layout.class_tars, split, name)
            if holds_image(source, name):
                layout.put(layout.folders, split, name)
    if _class_tars(level.others):
        layout.put(layout.class_tars, "train", "")
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
    if layout.archives or layout.class_tars:
        return True
    if layout.devkit and (layout.folders or layout.loose_val):
        return True
    val = layout.folders.get("val")
    return val is not None and any(_VAL_IMAGE.match(name) for name in look(source / val).images)


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
    _refuse_nothing(source, layout)
    _refuse_loose_val(source, layout)
    if layout.same:
        one, other, split = layout.same
        raise DataError(f"{source} holds {one} and {other}, which are both {split}; move one of them away")
    if not options.named:
        _refuse_twice(source, layout)
    synsets, truth = _labels(source, layout)
    passed: Counter[str] = Counter()
    found = []
    for split in SPLIT_NAMES:
        if not (ways := layout.ways(split)):
            continue
        if split == "val" and truth is None:
            _refuse_without_truth(source, layout)
        found.append(Drafts(split))
        if split in layout.archives or split in layout.class_tars:
            _add_tars(found[-1], source, layout, truth if split == "val" else None, passed)
        else:
            add_folder(found[-1], source, ways[0], truth if split == "val" else None)
    _tell(source, layout, synsets, found)
    used = [name for name in (layout.devkit, SOLUTION if layout.solution else None) if name]
    return Listing(finish(found, synsets, source), tuple(used), passed)


def _refuse_nothing(source: Path, layout: _Layout) -> None:
    if not layout.loose_val and not any(layout.ways(split) for split in SPLIT_NAMES):
        raise MissingError(f"{source} has no {' and no '.join(ARCHIVES.values())}; fetch them from image-net.org")


def _refuse_loose_val(source: Path, layout: _Layout) -> None:
    """The tar of val, extracted as it is, scatters its images over the folder."""
    if layout.loose_val and not layout.ways("val"):
        raise DataError(
            f"{source} holds {layout.loose_val} images of val beside all else; move them (ILSVRC2012_val_*) into "
            f"{source / 'val'}"
        )


def _refuse_twice(source: Path, layout: _Layout) -> None:
    if "train" in layout.class_tars and "train" in layout.folders:
        _refuse_partly_extracted(source / layout.class_tars["train"], source / layout.folders["train"])
    for split in SPLIT_NAMES:
        ways = layout.ways(split)
        if split in layout.class_tars:
            ways = [*ways, f"{layout.class_tars[split] or '.'}/WNID.tar"]
            ways.remove(layout.class_tars[split])
        if len(ways) > 1:
            raise DataError(
                f"{source} holds {split} more than once: {', '.join(ways)}; take the archives with --source imagenet, "
                "class folders with --source folder, or move all but one away"
            )


def _refuse_partly_extracted(tars: Path, folders: Path) -> None:
    """Class tars and class folders of which neither are all."""
    packed = {name.removesuffix(".tar") for name in _class_tars(look(tars).others)}
    extracted = {name for name in look(folders).folders if WNID.fullmatch(name)}
    if packed - extracted and extracted - packed:
        raise DataError(
            f"train is extracted in part: {tars} has {len(packed - extracted)} class tars without a folder in "
            f"{folders} ({some(sorted(packed - extracted))}), which has {len(extracted - packed)} classes without a "
            "tar; extract these tars, too, and take the folders with --source folder"
        )


def _labels(source: Path, layout: _Layout) -> tuple[Synsets | None, Truth | None]:
    if layout.devkit:
        return read_devkit(source / layout.devkit)
    return None, read_solution(source / SOLUTION) if layout.solution else None


def _refuse_without_truth(source: Path, layout: _Layout) -> None:
    (where, *_) = layout.ways("val")
    if "val" in layout.archives or lies_flat(source, where):
        fetch = f"fetch it from image-net.org (or {SOLUTION} from Kaggle), or move {where} away"
        raise MissingError(
            f"the images of {source / where} have no labels without {DEVKIT}, which is not in {source}; "
            + (above(source, DEVKIT, SOLUTION) or fetch)
        )


def _tell(source: Path, layout: _Layout, synsets: Synsets | None, found: list[Drafts]) -> None:
    """Name what is not there."""
    for split, name in ARCHIVES.items():
        if not layout.ways(split):
            say(f"note: there is no {name} in {source}, so no split {split}")
    if synsets is None:
        say(f"note: there is no {DEVKIT} in {source}, so classes have no names and are not compared with it")
        classes = {image.label for drafts in found for image in drafts.images if image.label}
        if len(classes) != _NUM_CLASSES:
            say(f"note: {source} has images of {len(classes)} classes, ILSVRC2012 has {_NUM_CLASSES}")


def _add_tars(drafts: Drafts, source: Path, layout: _Layout, truth: Truth | None, passed: Counter[str]) -> None:
    """Take the images of a split that lies in tars."""
    split = drafts.split
    name = layout.archives.get(split)
    if name is None:
        below = layout.class_tars[split]
        paths = [source / below / name for name in _class_tars(look(source / below).others)]
    else:
        paths = [source / name]
    with Progress(f"list {split}", total_bytes(paths), "bytes") as progress:
        for path in paths:
            listed = _Listed(path, source, passed, progress.advance)
            with open_tar(path) as tar:
                if name is None:
                    drafts.add_class(tar.name, path.stem, listed.images(tar))
                elif split == "train":
                    listed.add_classes(drafts, tar)
                else:
                    drafts.add_flat(tar.name, list(listed.images(tar)), truth)
            listed.finish()


class _Listed:
    """The listing of one tar on disk."""

    def __init__(self, path: Path, source: Path, passed: Counter[str], report: Report) -> None:
        self._container = path.relative_to(source).as_posix()
        status = path.stat()
        self._stamp, self._size = status.st_mtime_ns, status.st_size
        self._passed, self._report, self._position = passed, report, 0

    def images(self, tar: NestedTar, inside: str = "") -> Iterator[Draft]:
        """Images in a tar, by the last part of their names; `inside` is the tar's path in the file."""
        for member in tar.members():
            self._advance(member.offset + member.size)
            if is_system_member(member.name):
                self._passed[f"{SYSTEM} members of tars"] += 1
            elif is_image(member.name, lambda member=member: tar.first_bytes(member, SIGNATURE_BYTES)):  # type: ignore[misc]
                yield Draft(
                    path=f"{self._container}/{inside}{member.name}",
                    name=member.name.rpartition("/")[2],
                    label="",
                    size_bytes=member.size,
                    stamp=self._stamp,
                    container=self._container,
                    place=member.offset,
                )
            else:
                self._passed[_NO_IMAGES] += 1

    def add_classes(self, drafts: Drafts, tar: NestedTar) -> None:
        """Take the images of a tar of class tars."""
        classes: dict[str, Member] = {}
        odd: list[str] = []
        for member in tar.members():
            wnid = member.name.rpartition("/")[2].removesuffix(".tar")
            if is_system_member(member.name):
                self._passed[f"{SYSTEM} members of tars"] += 1
            elif not member.name.endswith(".tar") and not has_image_suffix(member.name):
                self._passed[_NO_IMAGES] += 1
            elif not WNID.fullmatch(wnid):
                odd.append(member.name)
            elif wnid in classes:
                raise DataError(f"{tar.name} holds {wnid}.tar twice; fetch it anew")
            else:
                classes[wnid] = member
                drafts.add_class(f"{tar.name}: {member.name}", wnid, self.images(tar.inside(member), f"{member.name}/"))
        if odd:
            raise DataError(
                f"{tar.name} holds {len(odd)} members that are no class tars called WNID.tar: {some(odd)}; fetch it "
                "anew"
            )

    def finish(self) -> None:
        """Report what lies behind the last image."""
        self._advance(self._size)

    def _advance(self, position: int) -> None:
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
