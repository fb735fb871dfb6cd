"""Which folders of a source are its splits, and which wrap something else; one rule for images and for tars.

A name alone does not tell a split from a class: bus, car and train are three classes. So folders that are called like
splits are splits only where there is nothing else beside them; otherwise the user says it.
"""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import get_args

from bowstore.data.sources.base import SPLIT_NAMES, Folders, some
from bowstore.data.sources.names import split_of, splits_in
from bowstore.data.sources.walk import holds_image, look
from bowstore.errors import DataError

CLASSES, SPLITS = get_args(Folders)
# Folders that are called by what they hold are no classes, where nothing lies beside them.
_CONTAINERS = frozenset("image images img imgs jpegimages data dataset".split())
_MAX_WRAPPINGS = 4


def split_folders(
    source: Path, what: str, folders: Folders | None, holds: Callable[[Path, str], bool], loose: list[str]
) -> dict[str, str]:
    """The folders of a source that are its splits, by split, in the order train, val, test; none where none is one.

    Args:
        source: the folder.
        what: what the splits hold, for messages: "images", "tars".
        folders: what the user said that folders are.
        holds: whether a folder, named below the source, holds such.
        loose: names of those that lie beside the folders.

    Raises:
        DataError: folders that could be splits or classes; two folders for one split; something beside the splits.
    """
    if folders == CLASSES:
        return {}
    names = look(source).folders
    found: dict[str, list[str]] = {}
    for name in names:
        if split := split_of(name):
            found.setdefault(split, []).append(name)
    parts = {split: told for split, told in _by_parts(source, names, holds).items() if split not in found}
    if folders == SPLITS:
        found |= parts
    elif not found:
        _refuse_parts(source, names, parts)
    if not found:
        return {}
    for split, same in found.items():
        if len(same) > 1:
            raise DataError(
                f"{source} holds {' and '.join(same)}, which by name are the same split, {split}; put what they hold "
                "into one, or move the others away"
            )
    splits = {split: found[split][0] for split in SPLIT_NAMES if split in found}
    if folders != SPLITS:
        others = [name for name in names if name not in splits.values() and holds(source, name)]
        _refuse_others(source, what, list(splits.values()), others, parts)
        if loose:
            raise DataError(
                f"{len(loose)} {what} lie beside the folders {', '.join(splits.values())} of {source}, for example "
                f"{loose[0]}; move them into one of these, or leave them out with --folders {SPLITS}"
            )
    return splits


def _by_parts(source: Path, names: list[str], holds: Callable[[Path, str], bool]) -> dict[str, list[str]]:
    """Folders that tell a split by a part of their name, as train2017 or test_set do, by split."""
    found: dict[str, list[str]] = {}
    for name in names:
        splits = splits_in(name)
        if len(splits) == 1 and not split_of(name) and holds(source, name):
            found.setdefault(splits.pop(), []).append(name)
    return found


def _refuse_parts(source: Path, names: list[str], parts: dict[str, list[str]]) -> None:
    """Refuse folders that tell several splits, or one by a number (train2017); bullet_train alone is a class."""
    told = [name for same in parts.values() for name in same]
    numbered = len(names) > 1 and any(split_of(name.rstrip("0123456789 _-.")) for name in told)
    if len(parts) > 1 or numbered:
        raise DataError(
            f"{source} holds {', '.join(told)}, which may be classes or splits by their names; say which with "
            f"--folders {CLASSES} or --folders {SPLITS}"
        )


def _refuse_others(source: Path, what: str, splits: list[str], others: list[str], parts: dict[str, list[str]]) -> None:
    """Refuse folders beside the splits; where they tell a split that is not there by a part, they may become it."""
    if not others:
        return
    then = [f"{name} is then {split}" for split, told in parts.items() for name in told]
    rest = [name for name in others if not any(name in told for told in parts.values())]
    then += ["the others are then left out"] if len(rest) == len(others) else [f"{some(rest)} left out"] if rest else []
    raise DataError(
        f"{source} holds {', '.join(splits)} beside {len(others)} other folders of {what} ({some(others)}), so they "
        f"may be classes or splits; say which with --folders {CLASSES} or --folders {SPLITS} ({', '.join(then)})"
    )


def wrapped(source: Path, folders: Folders | None) -> list[Path]:
    """The source, and the folders that wrap each other in it: each is alone in the one before.

    A folder wraps something if nothing but it holds images, and it is neither called like a split nor a class: a class
    holds images itself, or is called otherwise than images, data and the like. A name that tells a split by a part
    (imagenetv2-val) is a split's where the user says so.
    """
    levels = [source]
    while len(levels) <= _MAX_WRAPPINGS and (inner := _wrapping(levels[-1], folders)):
        levels.append(inner)
    return levels


def _wrapping(source: Path, said: Folders | None) -> Path | None:
    if not source.is_dir():
        return None
    folders, images, others = look(source)
    if images or any(name.lower().endswith(".tar") for name in others):
        return None
    if len(folders) > 1:  # images/ beside labels/; it is enough to know of two
        folders = list(islice((name for name in folders if holds_image(source, name)), 2))
    if len(folders) != 1 or split_of(folders[0]) or (said == SPLITS and splits_in(folders[0])):
        return None
    inside = look(source / folders[0])
    return None if inside.images and not is_container(folders[0]) else source / folders[0]


def is_container(name: str) -> bool:
    """Whether a folder is called by what it holds."""
    return name.lower() in _CONTAINERS
