"""Files that are not what their name says: packed ones, pointers to them, web pages; told by their first bytes."""

import re

_UNPACK = "unpack it first"
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", f"compressed with gzip; {_UNPACK} (gunzip)"),
    (b"\x1f\x9d", f"compressed with compress; {_UNPACK} (uncompress)"),
    (b"BZh", f"compressed with bzip2; {_UNPACK} (bunzip2)"),
    (b"\xfd7zXZ\0", f"compressed with xz; {_UNPACK} (unxz)"),
    (b"LZIP", f"compressed with lzip; {_UNPACK} (lzip -d)"),
    (b"\x28\xb5\x2f\xfd", f"compressed with zstd; {_UNPACK} (unzstd)"),
    (b"\x04\x22\x4d\x18", f"compressed with lz4; {_UNPACK} (unlz4)"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7-Zip archive; {_UNPACK}"),
    (b"Rar!", f"a RAR archive; {_UNPACK}"),
    (b"version https://git-lfs", "a pointer of git-lfs and not the file itself; run `git lfs pull` where it lies"),
    (b"/annex/objects/", "a pointer of git-annex and not the file itself; run `git annex get` where it lies"),
)
_WEB_PAGE = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|\?xml|!--|error\b)", re.IGNORECASE)


def foreign_kind(start: bytes) -> str:
    """What a file is that stands in for another, with the remedy; empty for all others.

    Args:
        start: its first bytes, some hundred or all there are.
    """
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning):
            return kind
    if _WEB_PAGE.match(start):
        return "a web page (of a login, an error, or about the file), not the file itself; take its download link"
    return ""
