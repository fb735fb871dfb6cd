"""Sources whose classes are WNIDs: class folders and flat folders to drafts, and drafts to splits.

Keys are WNID/NAME and rows stand in their order, whatever the layout; so the same images make the same shards.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bowstore.data.sources.arrange import is_container
from bowstore.data.sources.base import SPLIT_NAMES, Split, some
from bowstore.data.sources.labels import Draft, finish_splits
from bowstore.data.sources.synsets import WNID, Synsets, Truth
from bowstore.data.sources.walk import FoundFile, holds_image, image_files, look
from bowstore.errors import DataError, MissingError
from bowstore.progress import say

_MAX_ABOVE = 3  # CLS-LOC in Data in ILSVRC
_OF_A_CLASS = re.compile(r"(n\d{8})_")


class Drafts:
    """What has been found of one split: images, and classes without one."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.images: list[Draft] = []
        self.bare: list[str] = []

    def add_class(self, where: object, wnid: str, images: Iterable[Draft]) -> None:
        """Take the images of one class; their names become WNID/NAME.

        Raises:
            DataError: images that are named after another class, or twice.
        """
        before = len(self.images)
        self.images += [image._replace(name=f"{wnid}/{image.name}", label=wnid) for image in images]
        names = [image.name.partition("/")[2] for image in self.images[before:]]
        other = [name for name in names if (known := _OF_A_CLASS.match(name)) and known[1] != wnid]
        if other:
            raise DataError(
                f"{where} holds {len(other)} images that are named after other classes than {wnid}: {some(other)}; "
                "put them where they belong, or fetch it anew"
            )
        _refuse_twice(where, names)
        if not names:
            self.bare.append(wnid)

    def add_flat(self, where: object, images: Sequence[Draft], truth: Truth | None) -> None:
        """Take images that lie together; the truth tells their classes, None that they have none.

        Raises:
            DataError: the truth is about other images; images that are named twice.
        """
        _refuse_twice(where, [image.name for image in images])
        if truth is None:
            self.images += images
            return
        wnid_of = truth.wnids
        stems = [image.name.rpartition(".")[0] or image.name for image in images]
        unknown = [image.name for image, stem in zip(images, stems, strict=True) if stem not in wnid_of]
        absent = sorted(wnid_of.keys() - stems)
        if unknown or absent:
            parts = [f"{len(unknown)} have no label there ({some(unknown)})"] if unknown else []
            parts += [f"{len(absent)} labels have no image ({some(absent)})"] if absent else []
            raise DataError(
                f"{where} holds {len(images)} images, {truth.where} labels {len(wnid_of)}: {', '.join(parts)}; both "
                "must be of the same images, so fetch the one anew that is not whole"
            )
        for image, stem in zip(images, stems, strict=True):
            self.images.append(image._replace(name=f"{wnid_of[stem]}/{image.name}", label=wnid_of[stem]))

    def compare(self, where: object, truth: Truth) -> None:
        """Compare the class folders that images were sorted into with what is known of them.

        Raises:
            DataError: some lie in another class's folder.
        """
        wnids = truth.wnids
        stems = [(image.name.rpartition("/")[2].rpartition(".")[0], image) for image in self.images]
        wrong = [
            f"{image.name}, which is of {wnids[stem]}"
            for stem, image in stems
            if wnids.get(stem, image.label) != image.label
        ]
        if wrong:
            raise DataError(
                f"{where} holds {len(wrong)} of {len(stems)} images in class folders that {truth.where} contradicts: "
                f"{some(wrong)}; sort them anew, or take the folders as they are with --source folder"
            )


def _refuse_twice(where: object, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        raise DataError(f"{where} holds {len(twice)} images twice: {some(twice)}; fetch it anew")


def _in_container(source: Path, below: str) -> str:
    """The folder, or the one in it that alone is called by what it holds and has class folders: val/images/WNID."""
    folders, images, _ = look(source / below)
    inside = f"{below}/{folders[0]}" if len(folders) == 1 and not images and is_container(folders[0]) else below
    return inside if any(WNID.fullmatch(name) for name in look(source / inside).folders) else below


def lies_flat(source: Path, below: str) -> bool:
    """Whether a folder's images lie in no class folders."""
    below = _in_container(source, below)
    return not any(WNID.fullmatch(name) for name in look(source / below).folders) and holds_image(source, below)


def above(source: Path, *names: str) -> str:
    """What to do where one of these files is not in the source but in a folder around it; empty where none is."""
    around = source.absolute().parents[:_MAX_ABOVE]
    found = ((folder, name) for folder in around for name in names if (folder / name).is_file())
    return next((f"{name} is in {folder}, so name that folder" for folder, name in found), "")


def add_folder(drafts: Drafts, source: Path, below: str, truth: Truth | None) -> None:
    """Take the images of a folder: of class folders named by WNIDs, or flat with the truth (None: without labels).

    The truth is compared with class folders, too.

    Raises:
        DataError: other images beside class folders; train without class folders; as `Drafts`.
    """
    below = _in_container(source, below)
    folder = source / below
    level = look(folder)
    classes = [name for name in level.folders if WNID.fullmatch(name)]
    if not classes and drafts.split == "train":
        raise DataError(
            f"{folder} holds no class folders called by WNIDs such as n01440764, so its images have no labels; extract "
            "it again, or take --source folder"
        )
    if not classes:
        drafts.add_flat(folder, [_draft(file, below) for file in image_files(source, below)], truth)
        return
    others = [name for name in level.folders if name not in classes and holds_image(source, f"{below}/{name}")]
    if beside := level.images + others:
        raise DataError(
            f"{len(beside)} images or folders of images lie beside the class folders of {folder}, for example "
            f"{beside[0]}; move them into a class folder or away"
        )
    for wnid in classes:
        inside = f"{below}/{wnid}"
        drafts.add_class(source / inside, wnid, [_draft(file, inside) for file in image_files(source, inside)])
    if truth:
        drafts.compare(folder, truth)


def add_splits(source: Path, below: str, truth: Truth | None, *, no_truth: str) -> list[Drafts]:
    """Take train, val and test of a folder, as far as they are there; the truth labels val, and test has no labels.

    Args:
        source: the folder that was named.
        below: path in it of the folder of train/ and val/, with a slash behind it, or "".
        truth: classes of the images of a flat val; None where it is not at hand.
        no_truth: what is missing then, and where to get it; for the message.

    Raises:
        MissingError: a flat val without its truth.
        DataError: as `add_folder`.
    """
    found = []
    for split in SPLIT_NAMES:
        inside = f"{below}{split}"
        if not (source / inside).is_dir():
            if split != "test":
                say(f"note: there is no {source / inside}, so no split {split}")
            continue
        if split == "val" and truth is None and lies_flat(source, inside):
            raise MissingError(f"the images of {source / inside} have no labels without {no_truth}")
        found.append(Drafts(split))
        add_folder(found[-1], source, inside, truth if split == "val" else None)
    return found


def _draft(file: FoundFile, below: str) -> Draft:
    """An image by its path below a folder; folders that are called by what they hold tell nothing."""
    *folders, leaf = file.path[len(below) + 1 :].split("/")
    name = "/".join([*(folder for folder in folders if not is_container(folder)), leaf])
    return Draft(file.path, name, "", file.size_bytes, file.mtime_ns)


def finish(found: Sequence[Drafts], synsets: Synsets | None, where: object) -> list[Split]:
    """Splits whose classes are the sorted WNIDs: those that are known, or else those of the first labelled split.

    Raises:
        DataError: a split without images; classes that are not known.
    """
    for drafts in found:
        if not drafts.images:
            raise DataError(f"no images in split {drafts.split} of {where}; fetch it anew, or take it away")
    known = tuple(synsets.names) if synsets else ()
    names = synsets.names if synsets else {}
    by_split: Mapping[str, list[Draft]] = {drafts.split: drafts.images for drafts in found}
    splits = finish_splits(by_split, where=where, known=known, known_by=synsets.where if synsets else "", by_name=True)
    bare = {drafts.split: drafts.bare for drafts in found}
    called = tuple(names.values()) if any(names.values()) else ()
    return [
        replace(
            split,
            bare_folders=tuple(sorted(set(bare[split.name]) - set(split.classes))),
            class_names=called if split.classes else (),
        )
        for split in splits
    ]
