"""Paths that are URLs.

A URL that was held as a `pathlib.Path` has lost a slash (`s3:/bucket/train`); here it gets it back.
"""

import re
from pathlib import Path
from urllib.parse import quote

import xxhash

from bowstore.errors import UsageError
from bowstore.limits import text_problem

# Two letters at least, so that a drive letter is no protocol; fsspec's names may hold + - and dots.
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)
_USER = re.compile(r"//[^/@]*@")
WEB = ("http", "https")


def is_remote(path: Path | str) -> bool:
    """Whether a path is a URL, also one that lost a slash as a `Path`."""
    return _URL.fullmatch(str(path)) is not None


def url_of(path: Path | str) -> str:
    """The URL that a path stands for, without a slash at its end.

    A folder's name with two slashes in a row, as object stores allow it, does not survive `Path`.
    """
    match = _URL.fullmatch(str(path))
    if match is None:
        raise ValueError(f"{path} is not a URL")
    name, rest = match.groups()
    return f"{name}://{'/' if name in ('file', 'local') else ''}{rest.rstrip('/')}"


def local_only(path: Path, remedy: str) -> None:
    """Refuse to write on another machine.

    Raises:
        UsageError: `path` is a URL.
    """
    if is_remote(path):
        raise UsageError(f"{shown(url_of(path))} is on another machine; {remedy}")


def protocol(url: str) -> str:
    """What stands before the colon."""
    return url.partition(":")[0]


def below(url: str, name: str) -> str:
    """URL of a file below a folder's URL; what follows a `?` (a signature) stays behind the name."""
    folder, mark, query = url.partition("?")
    return f"{folder}/{quote(name) if protocol(url) in WEB else name}{mark}{query}"


def is_plain(name: object) -> bool:
    """Whether what the other side names is one file or folder, in sight: it must not lead elsewhere."""
    return isinstance(name, str) and not text_problem(name) and name[0] != "." and "/" not in name


def shown(url: str) -> str:
    """A URL for messages and folder names: without user, password and signature."""
    return _USER.sub("//", url.partition("?")[0])


def folder_name(url: str) -> str:
    """A name for a folder's local copy: its last two parts, for people, and 16 hex digits over the URL.

    Signatures do not count: the copies outlive them.
    """
    place = shown(url)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(place.split("/")[-2:])).strip("-.")
    return f"{readable[-80:]}-{xxhash.xxh3_64_hexdigest(place.encode())}"
