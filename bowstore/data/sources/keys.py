"""The rule for names in shards: paths to keys."""

import os
import re
from collections import Counter
from collections.abc import Sequence

import xxhash

# A member's name has 100 bytes in USTAR; ".webp" and ".jpeg" are the longest extensions.
MAX_KEY_BYTES = 95
_HASH_DIGITS = 16
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_+=,@~-]+")


def make_keys(paths: Sequence[str]) -> list[str]:
    """Keys of images, in the order given.

    A key is the path without its extension, with everything but ASCII letters, digits and a few marks replaced
    by "_". Where that loses something (a mark was replaced, two paths come out the same, more than
    `MAX_KEY_BYTES` bytes were cut), a hash of the path stands behind. So a key depends on its path alone but for
    twins such as a.jpg and a.png, and when one twin is removed the other's key is new, never the lost one's.

    Args:
        paths: below the split's folder.

    Returns:
        Unique keys without dots and white space, at most `MAX_KEY_BYTES` bytes each.
    """
    stems = [_stem(path) for path in paths]
    plain = [_plain_key(stem) for stem in stems]
    often = Counter(plain)
    used: set[str] = set()
    keys = []
    for path, stem, key in zip(paths, stems, plain, strict=True):
        if key != stem or often[key] > 1 or len(key) > MAX_KEY_BYTES:
            salt, candidate = path, _with_hash(key, path)
            while candidate in used or candidate in often:
                salt += "'"
                candidate = _with_hash(key, salt)
            key = candidate
        used.add(key)
        keys.append(key)
    return keys


def _stem(path: str) -> str:
    dot = path.rfind(".")
    return path[:dot] if dot > path.rfind("/") else path


def _plain_key(stem: str) -> str:
    # webdataset passes over names that begin and end with two underscores.
    return "/".join(_NOT_IN_KEYS.sub("_", part).lstrip("_") or "x" for part in stem.split("/"))


def _with_hash(key: str, salt: str) -> str:
    digest = xxhash.xxh3_64_hexdigest(os.fsencode(salt))
    return f"{key[: MAX_KEY_BYTES - _HASH_DIGITS - 1]}-{digest[:_HASH_DIGITS]}"
