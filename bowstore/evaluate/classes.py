"""Lists of classes: those that come with bowstore, files and names, and the classes of shards that they mean."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import xxhash

from bowstore.errors import DataError, UsageError
from bowstore.files import check_plain_file

ALL = "all"
_FOLDER = Path(__file__).parent / "class_lists"
_SHOWN = 25  # classes that a message names


@cache
def class_lists() -> dict[str, tuple[str, ...]]:
    """The lists that come with bowstore, by name."""
    return {path.stem: read_lines(path, "a class") for path in sorted(_FOLDER.glob("*.txt"))}


def read_classes(given: Sequence[str]) -> tuple[str, ...]:
    """The class names that a user means, in alphabetical order; or `ALL` alone.

    Args:
        given: each one `ALL`, the name of a list of `class_lists`, a file with a name a line, or names with commas
            between them.

    Raises:
        UsageError: no name, a name twice, or others beside `ALL`.
        DataError: a file that cannot be read as text.
    """
    names = [name for value in given for name in _expanded(value)]
    if ALL in names and len(names) > 1:
        raise UsageError(f"classes: {ALL!r} stands for all of the split; leave the others out")
    if not names:
        raise UsageError(f"classes: {', '.join(map(repr, given)) or 'the list'} names no class; give one at least")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"classes: {_some(twice)} {'is' if len(twice) == 1 else 'are'} named twice; name each once")
    return in_order(names)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """The names in an order that does not depend on how they are written."""
    return tuple(sorted(names, key=lambda name: (_plain(name), name)))


def _expanded(value: str) -> tuple[str, ...]:
    if value in class_lists():
        return class_lists()[value]
    if os.path.isfile(value):  # no error where the names together are too long for one
        return read_lines(Path(value), "a class")
    return tuple(name for part in value.split(",") if (name := part.strip()))


def read_lines(path: Path, what: str) -> tuple[str, ...]:
    """The lines of a text file, without those that are empty or begin with #.

    Args:
        path: the file.
        what: stands on each line, for messages.

    Raises:
        DataError: a file that cannot be read as text.
    """
    check_plain_file(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a file with {what} a line") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; name a file with {what} a line") from error
    return tuple(name for line in lines if (name := line.strip()) and not name.startswith("#"))


def list_name(names: Sequence[str]) -> str:
    """What stands for the names in a protocol's id: `ALL`, the list that they are, or their number and a digest."""
    plain = sorted(map(_plain, names))
    for name, listed in {ALL: (ALL,), **class_lists()}.items():
        if plain == sorted(map(_plain, listed)):
            return name
    return f"{len(names)}-classes-{xxhash.xxh3_64_hexdigest(' '.join(plain).encode())[:8]}"


def find_classes(names: Sequence[str], there: Sequence[str], where: str, remedy: Callable[[], str]) -> list[int]:
    """The place in `there` of each name: of the class of that name, or of the one that differs in case and signs alone.

    Args:
        names: without `ALL`.
        there: the classes there are.
        where: what messages call what has them.
        remedy: says what to do where some are missing.

    Raises:
        UsageError: names that no class has, or that more than one can be meant by.
    """
    places: list[int] = []
    missing: list[str] = []
    alike: dict[str, list[int]] = {}
    for place, name in enumerate(there):
        alike.setdefault(_plain(name), []).append(place)
    exact = {name: place for place, name in enumerate(there)}
    for name in names:
        found = [exact[name]] if name in exact else alike.get(_plain(name), [])
        if len(found) > 1:
            both = _some([there[place] for place in found])
            raise UsageError(f"class {name!r} can be {both} of {where}; write the one that is meant")
        places += found
        missing += [] if found else [name]
    if missing:
        raise UsageError(f"{where} lacks {len(missing)} of {len(names)} classes: {_some(missing)}; {remedy()}")
    if len(set(places)) < len(places):
        twice = _some([name for name, place in zip(names, places, strict=True) if places.count(place) > 1])
        raise UsageError(f"{twice} are one class of {where}; name each once")
    return places


def has_classes(names: Sequence[str], there: Sequence[str]) -> bool:
    """Whether `find_classes` finds them all."""
    with suppress(UsageError):
        return bool(find_classes(names, there, "", str))
    return False


def _plain(name: str) -> str:
    """A name without what differs between copies of one data set: capitals, spaces, dashes and underscores."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
