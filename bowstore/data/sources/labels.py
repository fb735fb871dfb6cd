"""From drafts, images with the labels that somebody wrote, to splits with keys and numbered labels."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bowstore.data.sources.base import LABEL_FIELDS, NO_LABEL, NO_LABEL_FIELD, SPLIT_NAMES, ImageFile, Split, some
from bowstore.data.sources.keys import make_keys
from bowstore.errors import DataError

MAX_LABEL_DIGITS = 9  # labels are 32 bits wide
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


class Draft(NamedTuple):
    """An image before its split is known as a whole.

    Attributes:
        path: as in `ImageFile`.
        name: what the key is made of.
        label: a class name or a whole number, as it was written; empty where there is none.
        size_bytes: as in `ImageFile`.
        stamp: as in `ImageFile`.
        container: as in `ImageFile`.
        place: as in `ImageFile`.
    """

    path: str
    name: str
    label: str
    size_bytes: int
    stamp: int
    container: str = ""
    place: int = 0


def whole_number(text: str) -> int | None:
    """A label that is a whole number, as it stands in a tar's .cls, .json or .txt; None for anything else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MAX_LABEL_DIGITS else None


def usual_label(values: Mapping[str, Any]) -> str:
    """The label in a sample's JSON where nobody names its field, as it was written; empty where there is none."""
    # Lists, captions by part and the like are no labels, unless somebody names them.
    found = [values[name] for name in LABEL_FIELDS if type(values.get(name)) in (str, int)]
    return str(found[0]).strip() if found else ""


def text_is_label(*, samples: int, numbers: int, labelled: int) -> bool:
    """Whether the .txt of samples tells their labels, and no captions, some of which are numbers ("2012").

    Args:
        samples: with an image, in all tars of all splits.
        numbers: of these, whose .txt is a whole number.
        labelled: of these, with a label in .cls or .json.
    """
    return 0 < samples == numbers and not labelled


def finish_splits(
    drafts: Mapping[str, Sequence[Draft]],
    *,
    where: object,
    own_classes: bool = False,
    unlabelled: bool = False,
    known: tuple[str, ...] = (),
    known_by: str = "",
    by_name: bool = False,
) -> list[Split]:
    """Name and number the images of all splits; they come out sorted by path, or by what keys are made of.

    Labels are numbers where all of them are whole numbers, and stand as they are; there are no class names then.
    Otherwise they are class names, numbered in sorted order: those of train, which bind the other splits, or
    with `own_classes` those of each split for itself.

    Args:
        drafts: images by split; none of the splits is empty.
        where: file or folder for messages.
        own_classes: the splits share no class list.
        unlabelled: leave out what labels there are.
        known: the classes there are, where something else than the images says so; they bind all splits.
        known_by: what says so, for messages.
        by_name: sort by name.

    Raises:
        DataError: labels for some images of a split only; numbers that are no labels; classes that train does not have.
    """
    names = [name for name in SPLIT_NAMES if name in drafts]
    ordered = {name: sorted(drafts[name], key=_by_name if by_name else None) for name in names}
    if unlabelled:
        ordered = {name: [draft._replace(label="") for draft in found] for name, found in ordered.items()}
    labelled = [name for name in names if _is_labelled(name, ordered[name], where)]
    texts = {name: {draft.label for draft in ordered[name]} for name in labelled}
    numbered = _are_numbers({text for found in texts.values() for text in found}, where)
    splits: list[Split] = []
    shared = (known_by, known)
    for name in names:
        classes: tuple[str, ...] = ()
        label_of: dict[str, int] = {}
        if name in texts and not numbered:
            classes, label_of = same_classes(f"split {name} of {where}", sorted(texts[name]), *shared)
            if not own_classes:
                shared = (shared[0] or name, classes)
        splits.append(Split(name, classes, _images(ordered[name], label_of)))
    return splits


def _by_name(draft: Draft) -> tuple[str, str]:
    return draft.name, draft.path


def _images(drafts: Sequence[Draft], label_of: Mapping[str, int]) -> list[ImageFile]:
    keys = make_keys([draft.name for draft in drafts])
    return [
        ImageFile(
            draft.path,
            key,
            _number(draft.label, label_of),
            draft.size_bytes,
            draft.stamp,
            draft.container,
            draft.place,
        )
        for draft, key in zip(drafts, keys, strict=True)
    ]


def _number(text: str, label_of: Mapping[str, int]) -> int:
    if not text:
        return NO_LABEL
    return label_of[text] if label_of else int(text)


def _is_labelled(split: str, drafts: Sequence[Draft], where: object) -> bool:
    without = [draft.path for draft in drafts if not draft.label]
    if without and len(without) < len(drafts):
        raise DataError(
            f"{len(without)} of {len(drafts)} images in split {split} of {where} have no label, for example "
            f"{some(without)}; label all images of a split, or none, or give --label-field {NO_LABEL_FIELD}"
        )
    return not without


def _are_numbers(texts: set[str], where: object) -> bool:
    """Whether the labels are whole numbers; refuses numbers that no label can be."""
    if not texts or not all(_NUMBER.fullmatch(text) for text in texts):
        return False
    wrong = sorted(text for text in texts if not text.isascii() or not text.isdecimal() or len(text) > MAX_LABEL_DIGITS)
    if wrong:
        raise DataError(
            f"{len(wrong)} labels of {where} are numbers, but not whole ones from 0 to {10**MAX_LABEL_DIGITS - 1}: "
            f"{some(wrong)}; write whole numbers, or class names"
        )
    return True


def same_classes(
    what: str, found: Sequence[str], reference: str, known: Sequence[str], *, otherwise: str = ""
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class list of a split, and the label of each name found in it.

    Names that look the same may be written in two ways (a composed accent or one of its own: NFC and NFD, as macOS
    leaves it); they are one class where two splits differ so.

    Args:
        what: the split, for messages.
        found: its names, sorted.
        reference: the split whose classes bind; empty for none.
        known: its classes.
        otherwise: what else to do about other classes than those.

    Raises:
        DataError: two names in a split that look the same; up to five classes that the reference does not have.
    """
    looks = {unicodedata.normalize("NFC", name): name for name in found}
    if len(looks) < len(found):
        twins = sorted(set(found) - set(looks.values()))
        raise DataError(
            f"{what} has {len(twins)} classes whose names look like another's, written with other code points: "
            f"{some([f'{name} ({name!a})' for name in twins])}; rename one of each two, or put them together"
        )
    classes = tuple(known if reference else found)
    labels = {unicodedata.normalize("NFC", name): label for label, name in enumerate(classes)}
    unknown = [name for look, name in looks.items() if look not in labels]
    if unknown:
        more = ", ..." if len(unknown) > 5 else ""
        raise DataError(
            f"{what} has {len(unknown)} classes that {reference} does not have: {', '.join(unknown[:5])}{more}; "
            f"all splits must share one class list, so rename or remove them{otherwise}"
        )
    return classes, {name: labels[look] for look, name in looks.items()}
