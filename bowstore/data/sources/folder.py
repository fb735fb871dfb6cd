"""Class folders: train/, val/ and test/ with a folder for each class, or class folders alone.

Reads names, sizes and times; of files whose names tell nothing, the first bytes too.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from bowstore.data.sources.arrange import CLASSES, SPLITS, is_container, split_folders
from bowstore.data.sources.base import NO_LABEL, NO_LABEL_FIELD, Folders, ImageFile, Kind, Listing, Options, Split, some
from bowstore.data.sources.keys import make_keys
from bowstore.data.sources.labels import same_classes
from bowstore.data.sources.names import IMAGE_SUFFIXES, split_of, splits_in
from bowstore.data.sources.walk import FoundFile, holds_image, image_files, look
from bowstore.errors import DataError, UsageError
from bowstore.progress import say


class _Place(NamedTuple):
    """The images of a split: the folder they lie in, below the source, and each with its path below that folder."""

    below: str
    files: list[tuple[str, FoundFile]]

    def folder(self, source: Path) -> Path:
        return source / self.below if self.below else source


def _recognise(source: Path) -> bool:
    return source.is_dir() and holds_image(source)


def _list_splits(source: Path, options: Options) -> Listing:
    """List the images of a folder.

    `source` holds splits, or class folders, or images; the latter two are then the split train. Below a split lie
    class folders, of any depth inside, or images alone, which then have no labels. Labels count the class names of
    train (without train: of the first split with classes) in sorted order. Where the user wants no labels, folders
    below a split tell nothing.

    Raises:
        UsageError: a place for labels.
        DataError: no images; images beside class folders; folders that may be classes or splits; classes that train
            does not have; a folder that cannot be read.
    """
    if options.label_field and not options.unlabelled:
        raise UsageError(
            f"--label-field is {options.label_field!r}; class folders tell labels, so give {NO_LABEL_FIELD} (all "
            "images without labels), or leave it out"
        )
    loose = look(source).images
    found = split_folders(source, "images", options.folders, holds_image, loose)
    splits: list[Split] = []
    for name, below in (found or {"train": ""}).items():
        labelled = next((split for split in splits if split.classes), None)
        place = _unwrap(source, _place(source, below), labelled)
        if options.folders != CLASSES:
            if not options.unlabelled and not (found and options.folders):
                _refuse_containers(source, place, SPLITS if found else CLASSES)
            if not found:
                _refuse_splits_inside(source, place)
        splits.append(_make_split(name, source, place, labelled, options))
        if splits[-1].classes and not labelled:
            _tell_classes(source, place, splits[-1].classes)
    _tell(source, splits, options)
    return Listing(splits)


def _place(source: Path, below: str) -> _Place:
    """The images below a folder of the source, in order of their paths."""
    start = len(below) + 1 if below else 0
    return _Place(below, [(file.path[start:], file) for file in sorted(image_files(source, below))])


def _unwrap(source: Path, place: _Place, labelled: Split | None) -> _Place:
    """Go into a folder that is alone and called by what it holds, or as a split: train/images, seg_train/seg_train."""
    while place.files and place.below:
        tops = {path.partition("/")[0] if "/" in path else "" for path, _ in place.files}
        top = tops.pop()
        known = labelled.classes if labelled else ()
        again = top == PurePosixPath(place.below).name and bool(splits_in(top))
        if tops or not (is_container(top) or split_of(top) or again) or top in known:
            break
        inner = f"{place.below}/{top}"
        say(f"note: the images of {place.folder(source)} lie in {source / inner}, which is not taken for a class")
        place = _Place(inner, [(path.partition("/")[2], file) for path, file in place.files])
    return place


def _refuse_containers(source: Path, place: _Place, said: Folders) -> None:
    """Refuse a class called images beside others: what lies there are masks, or views of the same images.

    `said` is what the user would say if it is a class.
    """
    tops = sorted({path.partition("/")[0] for path, _ in place.files if "/" in path})
    called = [top for top in tops if is_container(top)]
    if called and len(tops) > 1:
        raise DataError(
            f"{place.folder(source)} holds {called[0]} beside {len(tops) - 1} other folders of images "
            f"({some([top for top in tops if top not in called[:1]])}), so it may hold all images, or be a class; name "
            f"{place.folder(source) / called[0]}, take all for classes with --folders {said}, or all images without "
            f"labels with --label-field {NO_LABEL_FIELD}"
        )


def _refuse_splits_inside(source: Path, place: _Place) -> None:
    """Refuse splits inside of classes: their images would all be train's."""
    inside = sorted({"/".join(path.split("/")[:2]) for path, _ in place.files if path.count("/") > 1})
    splits = [path for path in inside if split_of(path.partition("/")[2])]
    if splits:
        raise DataError(
            f"{source} holds {len(splits)} folders inside of classes that are called as splits ({some(splits)}); name "
            f"one of the folders above them, or take all they hold for train's with --folders {CLASSES}"
        )


def _make_split(name: str, source: Path, place: _Place, labelled: Split | None, options: Options) -> Split:
    """Label and name the files of one split; `labelled` is an earlier split whose classes bind, if any."""
    folder, files = place.folder(source), place.files
    if not files:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"no images in {folder} (looked for {suffixes}); fill it, or name another folder")
    names = [path.partition("/")[0] if "/" in path and not options.unlabelled else "" for path, _ in files]
    found = sorted(set(names) - {""})
    if found and "" in names:
        beside = [path for path, _ in files if "/" not in path]
        raise DataError(
            f"{len(beside)} images lie beside the class folders of {folder}, for example {beside[0]}; "
            f"move them into a class folder or away, or take all without labels with --label-field {NO_LABEL_FIELD}"
        )
    known = (labelled.name, labelled.classes) if labelled else ("", ())
    otherwise = f", or take all images without labels with --label-field {NO_LABEL_FIELD}"
    classes, label_of = same_classes(str(folder), found, *known, otherwise=otherwise) if found else ((), {})
    keys = make_keys([path for path, _ in files])
    images = [
        ImageFile(file.path, key, label_of.get(name, NO_LABEL), file.size_bytes, file.mtime_ns)
        for (_, file), key, name in zip(files, keys, names, strict=True)
    ]
    bare = sorted(set(look(folder).folders) - set(found) - set(classes)) if classes else ()
    return Split(name, classes, images, tuple(bare))


def _tell_classes(source: Path, place: _Place, classes: Sequence[str]) -> None:
    """What may be other classes, or another order, than the user thinks of."""
    folder = place.folder(source)
    if len(classes) == 1:
        say(
            f"note: all images of {folder} lie in one folder, {classes[0]}, which is taken for their class; "
            f"--label-field {NO_LABEL_FIELD} takes them without labels"
        )
    elif all(path.count("/") > 1 and not is_container(path.split("/")[1]) for path, _ in place.files):
        say(
            f"note: no image of {folder} lies in a class folder itself ({place.files[0][0]}); the {len(classes)} outer "
            f"folders are taken for the classes ({some(classes)}), so name another folder if they are not"
        )
    if all(name.isascii() and name.isdecimal() for name in classes) and sorted(classes, key=int) != list(classes):
        label, name = next((n, name) for n, name in enumerate(classes) if int(name) != n)
        say(
            f"note: the classes of {folder} are called by numbers, and labels count their names in sorted order, as "
            f"torchvision does: class {name} has label {label}"
        )


def _tell(source: Path, splits: Sequence[Split], options: Options) -> None:
    bare = [split.name for split in splits if not split.classes]
    if bare and len(bare) < len(splits) and not options.unlabelled:
        say(f"note: the images of {', '.join(bare)} in {source} lie in no class folders, and have no labels")


KIND = Kind(
    name="folder",
    expects="train/CLASS/..., val/CLASS/... or test/CLASS/...; or CLASS/... alone; or images alone, without labels; "
    f"--folders {CLASSES} or --folders {SPLITS} says what folders are that could be both, --label-field "
    f"{NO_LABEL_FIELD} that they are neither",
    example="bowstore shards imagenet data/shards",
    recognise=_recognise,
    list_splits=_list_splits,
    general=True,
    folders=True,
    label_field=True,
)
