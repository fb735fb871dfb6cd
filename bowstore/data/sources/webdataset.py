"""Shards made elsewhere (webdataset, img2dataset, Hugging Face), to be written anew.

Shards that `bowstore index` takes need not be: this is for nested or odd names, several images a sample, odd
extensions, labels as text or JSON, and images that want a check.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from bowstore.data.sources.arrange import split_folders
from bowstore.data.sources.base import LABEL_FIELDS, SPLIT_NAMES, Kind, Listing, Options, reading, some
from bowstore.data.sources.labels import Draft, finish_splits, text_is_label, whole_number
from bowstore.data.sources.names import split_of, splits_in
from bowstore.data.sources.tars import TarImage, read_tar, total_bytes
from bowstore.data.sources.walk import SYSTEM, holds_image, look
from bowstore.data.tar import split_key
from bowstore.errors import DataError, MissingError
from bowstore.progress import Progress, say

_TAR = ".tar"
_EMPTY_SAMPLES = "samples of tars without an image"


def _recognise(source: Path) -> bool:
    if source.is_file():
        return source.suffix.lower() == _TAR
    splits = list(filter(split_of, look(source).folders))
    if any(_tars_in(source / name) for name in splits):
        return True
    return bool(_tars_in(source)) and not any(holds_image(source, name) for name in splits)


def _tars_in(folder: Path) -> list[Path]:
    """The tars that lie in a folder, sorted; macOS's ._NAME.tar are none."""
    return [folder / name for name in look(folder).others if name.lower().endswith(_TAR)]


def _tars(source: Path, options: Options) -> dict[str, list[Path]]:
    """Tars by split: in train/, val/, test/; or with the split in their names; or all train.

    Raises:
        MissingError: no tar.
        DataError: names of which only some tell the split, or one tells two; tars beside the folders of splits.
    """
    if source.is_file():
        return {"train": [source]}
    loose = _tars_in(source)
    names = [path.name for path in loose]
    folders = split_folders(source, "tars", options.folders, lambda root, name: bool(_tars_in(root / name)), names)
    by_folder = {split: _tars_in(source / name) for split, name in folders.items()}
    found = {split: paths for split, paths in by_folder.items() if paths} or (_by_name(loose) if loose else {})
    if not found:
        raise MissingError(f"no *{_TAR} in {source}; name the folder that holds the shards, uncompressed")
    return found


def _by_name(paths: Sequence[Path]) -> dict[str, list[Path]]:
    told = {path: splits_in(path.stem) for path in paths}
    if not any(told.values()):
        return {"train": list(paths)}
    if unclear := [path.name for path, splits in told.items() if len(splits) != 1]:
        raise DataError(
            f"{len(unclear)} of {len(paths)} tars in {paths[0].parent} do not tell one split by name as the others do: "
            f"{some(unclear)}; put the tars into folders {', '.join(SPLIT_NAMES)}"
        )
    found = {split: [path for path in paths if told[path] == {split}] for split in SPLIT_NAMES}
    return {split: same for split, same in found.items() if same}


def _list_splits(source: Path, options: Options) -> Listing:
    """List the images of all tars; labels come from .cls, the sample's JSON, or a .txt that is a number everywhere.

    Raises:
        MissingError: no tar.
        CorruptError: a tar that is cut or damaged.
        DataError: members that no shard may hold, no image, labels that cannot be read, an archive of class folders.
    """
    tars = _tars(source, options)
    found: dict[str, list[TarImage]] = {}
    empty: list[str] = []
    system = 0
    size_bytes = total_bytes(path for paths in tars.values() for path in paths)
    with Progress("list", size_bytes, "bytes") as progress:
        for split, paths in tars.items():
            found[split] = []
            for path in paths:
                with reading(path):
                    content = read_tar(path, options.label_field, progress.advance)
                found[split] += content.images
                empty += content.empty
                system += content.system
    for split, images in found.items():
        if not images:
            raise DataError(f"no images in the {len(tars[split])} tars of split {split} in {source}; name other tars")
        _refuse_class_folders(source, images)
    everywhere = list(chain.from_iterable(found.values()))
    as_text = text_is_label(
        samples=len(everywhere),
        numbers=sum(whole_number(image.text) is not None for image in everywhere),
        labelled=sum(bool(image.label) for image in everywhere),
    )
    drafts = {split: _drafts(source, images, options, as_text=as_text) for split, images in found.items()}
    splits = finish_splits(drafts, where=source, unlabelled=options.unlabelled)
    _tell(source, drafts, empty, options)
    return Listing(splits, passed_over={_EMPTY_SAMPLES: len(empty), f"{SYSTEM} members of tars": system})


def _drafts(source: Path, found: Sequence[TarImage], options: Options, *, as_text: bool) -> list[Draft]:
    """Drafts with names that differ: a sample's key alone, with the component, or with the tar before it."""
    has_labels = any(image.label for image in found)
    if options.label_field and not options.unlabelled and not has_labels:
        raise DataError(
            f"no sample of {source} has a label in {options.label_field!r}, neither as a member's extension nor in its "
            "JSON; name another --label-field, or none"
        )
    names = ["/".join(filter(None, (image.sample, image.component))) for image in found]
    often = Counter(names)
    drafts = []
    for name, image in zip(names, found, strict=True):
        container = image.tar.name if source.is_file() else image.tar.relative_to(source).as_posix()
        suffix = split_key(image.member.name)[1].rpartition(".")[2]
        drafts.append(
            Draft(
                path=f"{container}/{image.member.name}",
                name=f"{image.tar.stem}/{name}.{suffix}" if often[name] > 1 else f"{name}.{suffix}",
                label=image.text if as_text else image.label,
                size_bytes=image.member.size,
                stamp=image.stamp,
                container=container,
                place=image.member.offset,
            )
        )
    return drafts


def _refuse_class_folders(source: Path, found: Sequence[TarImage]) -> None:
    """A tar of train/CLASS and val/CLASS, or of SET/train and SET/val, would become one split without labels."""
    folders = [image.sample.split("/")[:-1] for image in found]
    shared = [len(set(names)) == 1 for names in zip(*folders, strict=False)]
    around = (*shared, False).index(False)
    splits = sorted({path[around] for path in folders if len(path) > around and split_of(path[around])})
    if len(splits) > 1:
        raise DataError(
            f"{found[0].tar} is an archive of the folders {', '.join(splits)}, not a shard; "
            "extract it (tar -xf) and name the folder"
        )


def _tell(source: Path, drafts: dict[str, list[Draft]], empty: Sequence[str], options: Options) -> None:
    """What the user may not expect, on stderr."""
    if empty:
        say(f"note: {len(empty)} samples of {source} hold no image and are passed over, for example {some(empty)}")
    bare = [split for split, images in drafts.items() if not images[0].label]
    if bare and not options.unlabelled:
        names = [draft.name for split in bare for draft in drafts[split]]
        in_folders = all("/" in draft.path[len(draft.container) + 1 :] for split in bare for draft in drafts[split])
        say(
            f"note: the images of {', '.join(bare)} in {source} have no labels (looked for .cls, for "
            f"{', '.join(LABEL_FIELDS)} in JSON, for numbers in .txt); --label-field names another place"
            + (f", and if their folders are classes ({names[0]}), extract the tars" if in_folders else "")
        )


KIND = Kind(
    name="webdataset",
    expects="*.tar made elsewhere (webdataset, img2dataset, Hugging Face): in train/, val/, test/, with the split in "
    "their names, or all train; labels in .cls, .json or .txt, or where --label-field says",
    example="bowstore shards laion data/shards --label-field class",
    recognise=_recognise,
    list_splits=_list_splits,
    general=True,
    folders=True,
    label_field=True,
)
