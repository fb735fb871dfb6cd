"""A few files out of a compressed tar, read into memory; nothing is extracted."""

import gzip
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path

from bowstore.beginnings import foreign_kind
from bowstore.data.sources.base import reading
from bowstore.errors import CorruptError, DataError
from bowstore.files import check_plain_file

_BEGINNING_BYTES = 512
_MAX_MEMBER_BYTES = 1 << 30  # CIFAR-100's train batch has 155 MB


def read_packed(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """Files of an archive by the last part of their names, as far as they are there.

    Args:
        path: the archive, compressed or not.
        names: the last two parts of each, folder and file.

    Raises:
        CorruptError: it is cut or damaged, or no archive.
        DataError: it cannot be read; one of these is a link or too large.
    """
    check_plain_file(path)
    found = {}
    try:
        with reading(path), tarfile.open(path) as tar:
            for info in tar:
                name = "/".join(info.name.split("/")[-2:])
                if name not in names:
                    continue
                if not info.isreg() or info.size > _MAX_MEMBER_BYTES:
                    raise DataError(
                        f"{path}: member {info.name!r} is no file of at most {_MAX_MEMBER_BYTES} bytes; fetch it anew"
                    )
                file = tar.extractfile(info)
                assert file, "a regular file"
                found[name.rpartition("/")[2]] = file.read()
    except (EOFError, zlib.error, tarfile.TarError, gzip.BadGzipFile) as error:
        with open(path, "rb") as file:
            kind = foreign_kind(file.read(_BEGINNING_BYTES))
        if kind and not kind.startswith("compressed"):  # as it should be
            raise CorruptError(f"{path} is no archive but {kind}") from error
        raise CorruptError(f"{path} is cut or damaged: {' '.join(str(error).split())}; fetch it anew") from error
    return found
