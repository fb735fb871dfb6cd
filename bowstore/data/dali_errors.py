"""What an error of a DALI graph means: an image that cannot be decoded, or a library or a GPU that failed.

DALI has one class for all of them, and several lines of text around the one that says what happened.
"""

import io
import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from bowstore.errors import BowstoreError, DataError

if TYPE_CHECKING:  # a trial's process does without torch
    from bowstore.data.reader import ImageSource

_FRAME = re.compile(
    r"Critical error (?:in|when building) pipeline:|Current pipeline object is no longer valid\.|C\+\+ context: \[.*?\]"
)
_OPERATOR = re.compile(r"Error in (\w+) operator `([\w.]+)`.*?encountered:\s*", re.DOTALL)
_TRACE = re.compile(r"\s*Stacktrace \(\d+ entries\):.*", re.DOTALL)
_STATUS = re.compile(r"nvImageCodec failure: '#(\d+)'")
_LETTERS = 400
# Names of nvimgcodecStatus_t (nvimgcodec.h of 0.9.0): an error that has only a number tells nobody anything.
_STATUSES = {
    1: "not initialized", 2: "invalid parameter", 3: "bad code stream", 4: "code stream unsupported",
    5: "allocator failure", 6: "execution failed", 7: "arch mismatch", 8: "internal error",
    9: "implementation unsupported", 10: "missed dependencies", 11: "extension not initialized",
    12: "extension: invalid parameter", 13: "extension: bad code stream", 14: "extension: code stream unsupported",
    15: "extension: allocator failure", 16: "extension: arch mismatch", 17: "extension: internal error",
    18: "extension: implementation not supported", 19: "extension: incomplete bitstream",
    20: "extension: execution failed", 21: "extension: CUDA call error",
}  # fmt: skip


# Errors that no image is to blame for, and what to do about them.
_REMEDIES = tuple(
    (re.compile(pattern, re.IGNORECASE), remedy)
    for pattern, remedy in (
        (
            r"out of memory|bad_alloc|memory ?allocation|allocation failed|allocator failure|allocator_failure",
            "lower the batch, or end what else holds the memory",
        ),
        (
            r"dlopen|cannot open shared object|lib[\w-]+\.so|missed dependencies|undefined symbol",
            "install nvidia-nvimgcodec and nvidia-nvjpeg for the CUDA of DALI again",
        ),
        (
            r"arch mismatch|arch_mismatch|no kernel image|insufficient driver|driver version",
            "update the driver, or use --device cpu",
        ),
        (
            r"\bCUDA (runtime|driver) API error|CUDA call error|cudaError\w+|CUDA_ERROR_\w+|launch failure|nvml error",
            "start the command again, it goes on; if it fails again, look for Xid in dmesg, or use --device cpu",
        ),
    )
)


def is_of_graph(error: Exception) -> bool:
    """Whether DALI raised it while it built or ran a graph."""
    return str(error).startswith(("Critical error", "Unknown critical error"))


def words_of(error: BaseException) -> str:
    """The library's own words, in one line; with the names of nvImageCodec's numbers and of the operator."""
    text = str(error)
    operator = _OPERATOR.search(text)
    text = _STATUS.sub(_named, _TRACE.sub("", _FRAME.sub("", _OPERATOR.sub("", text))))
    text = " ".join(text.split()).strip(" :")
    where = f" (in {operator[2].removeprefix('nvidia.dali.')} on {operator[1]})" if operator else ""
    return text[:_LETTERS] + where


def explained(error: Exception, source: "ImageSource", rows: NDArray[np.int64] | None) -> BowstoreError:
    """What to tell of an error in the batch of `rows`; only what Pillow cannot decode either is undecodable.

    Args:
        error: of DALI.
        source: where the images come from.
        rows: of the batch (B,); None where there is none yet.
    """
    words = words_of(error)
    for pattern, remedy in _REMEDIES:
        if pattern.search(words):
            return BowstoreError(f"DALI failed, and no image is to blame: {words}; {remedy}")
    if rows is None:
        return BowstoreError(
            f"DALI failed before the first batch: {words}; install nvidia-dali again, or on a GPU use --device cpu"
        )
    if bad := undecodable(source, rows):
        return DataError(bad)
    return DataError(
        f"DALI failed with a batch that Pillow decodes (image {source.name(int(rows[0]))!r} and the {len(rows) - 1} "
        f"after it): {words}; make the shards again, or on a GPU use --device cpu"
    )


def undecodable(source: "ImageSource", rows: NDArray[np.int64]) -> str | None:
    """Say which of `rows` cannot be decoded, by trying each with Pillow (DALI does not tell)."""
    for row, data in zip(rows.tolist(), source.read(rows), strict=True):
        try:
            with Image.open(io.BytesIO(data.tobytes())) as image:
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            # Pillow names the buffer, an address, of what it does not know.
            why = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
            return f"image {source.name(row)!r} cannot be decoded ({why}); remove it, or make the shards again"
    return None


def _named(match: re.Match[str]) -> str:
    return f"nvImageCodec failure #{match[1]} ({_STATUSES.get(int(match[1]), 'unknown')})"
