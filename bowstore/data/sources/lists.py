"""A flat folder, or any tree, with a text list or a CSV that names its images."""

from collections import defaultdict
from pathlib import Path

from bowstore.data.sources.base import SPLIT_NAMES, Kind, Listing, Options
from bowstore.data.sources.labels import Draft, finish_splits
from bowstore.data.sources.listing import Entry, find_files, read_list
from bowstore.data.sources.names import split_of
from bowstore.errors import MissingError, UsageError


def _list_splits(source: Path, options: Options) -> Listing:
    """List what the lists name; a list without a split's name and without a column `split` is train.

    Raises:
        UsageError: no list, lists that do not say their splits, `source` is a file.
        MissingError, DataError: as `listing.read_list`, `listing.find_files` and `labels.finish_splits`.
    """
    if not source.is_dir():
        raise UsageError(f"{source} is a file; name the folder that the list's paths are relative to")
    drafts: dict[str, list[Draft]] = {}
    lists = _split_lists(source, options)
    for path, split in lists:
        by_split: dict[str, list[Entry]] = defaultdict(list)
        for entry in read_list(path, None if options.unlabelled else options.label_field):
            by_split[entry.split or split or "train"].append(entry)
            if entry.split and (split or len(lists) > 1):
                raise UsageError(f"list {path} has a column of splits; give it alone, as --list {path}")
        for name, entries in by_split.items():
            drafts[name] = find_files(entries, source=source, listed_in=path, split=name)
    where = " and ".join(str(path) for path, _ in lists)
    return Listing(finish_splits(drafts, where=where, unlabelled=options.unlabelled))


def _split_lists(source: Path, options: Options) -> list[tuple[Path, str]]:
    """Each list with the split that the user gave it, or ""."""
    if not options.lists:
        raise UsageError("source list needs a list of images; give it with --list FILE, or --list train=FILE")
    lists: list[tuple[Path, str]] = []
    for text in options.lists:
        word, equals, rest = text.partition("=")
        split = split_of(word) if equals else None
        path = Path(rest) if split else Path(text)
        if not path.exists() and (source / path).exists():
            raise MissingError(f"no list {path} in the current directory; did you mean {source / path}?")
        if equals and not split and not path.exists() and Path(rest).is_file():
            raise UsageError(
                f"--list {text}: {word!r} is no split, and there is no file {text}; write {', '.join(SPLIT_NAMES)} "
                f"before the ="
            )
        lists.append((path, split or ""))
    names = [split for _, split in lists]
    if len(lists) > 1 and ("" in names or len(set(names)) < len(names)):
        raise UsageError(
            f"{len(lists)} lists for the splits {', '.join(name or '(none named)' for name in names)}; "
            f"give each its own: --list {'=FILE --list '.join(SPLIT_NAMES[:2])}=FILE"
        )
    return lists


KIND = Kind(
    name="list",
    expects="any folder, and --list FILE: lines of `path` or `path label`, or a CSV with a header (columns such as "
    "filename, label, split); --list train=FILE --list val=FILE for a file a split",
    example="bowstore shards photos data/shards --list train=train.txt --list val=val.csv",
    recognise=lambda _source: False,  # only a list makes it one
    list_splits=_list_splits,
    by_choice=True,
    label_field=True,
)
