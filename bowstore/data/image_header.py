"""Height and width of an encoded image from its header alone, without decoding.

Stricter than decoders and quicker than Pillow: a header that two decoders could read differently (two JPEG frames,
bytes between segments) is refused here, because training plans its windows with these numbers.
"""

import zlib
from typing import NamedTuple

from bowstore.errors import DataError

MAX_PIXELS = 178_956_970  # Pillow's own bound for an error: 2^29 bytes of RGB
_JPEG_MARK = b"\xff\xd8\xff"
_PNG_MARK = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_JPEG_SCAN = 0xDA
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those three are tables and extensions
_VP8_START = b"\x9d\x01\x2a"
_VP8L_SIGNATURE = 0x2F


class UnusableImage(DataError):
    """An image that no shard can hold; the message is the reason, without the file's name."""


class ImageSize(NamedTuple):
    """Pixels of an image as they lie in the file (no EXIF rotation)."""

    height: int
    width: int


def image_size(data: bytes | memoryview) -> ImageSize:
    """Size of a JPEG, PNG or WebP image from its header.

    Raises:
        UnusableImage: something else, a header that is cut or contradicts itself, no pixels or too many of them.
    """
    start = bytes(data[:16])
    if start.startswith(_JPEG_MARK):
        height, width = _jpeg_size(data)
    elif start == _PNG_MARK:
        if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
            raise UnusableImage("a PNG header that is damaged")
        height, width = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        height, width = _webp_size(data)
    elif not start:
        raise UnusableImage("empty file")
    else:
        raise UnusableImage(f"no JPEG, PNG or WebP image: it starts with {start!r}")
    if not height or not width:
        raise UnusableImage(f"an image of {height} x {width} pixels")
    if height * width > MAX_PIXELS:
        raise UnusableImage(f"{height} x {width} pixels, more than {MAX_PIXELS}")
    return ImageSize(height, width)


def _jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """Height and width from the one frame header that stands before the first scan."""
    position, size = 2, None
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            raise UnusableImage(f"a JPEG header with stray bytes at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in _JPEG_FRAMES:
            if size:
                raise UnusableImage(f"a JPEG header with a second frame at byte {position}")
            size = (
                data[position + 5] << 8 | data[position + 6],
                data[position + 7] << 8 | data[position + 8],
            )
        elif marker == _JPEG_SCAN:
            if size:
                return size
            raise UnusableImage("a JPEG header without a frame")
        elif marker < 0xC0:
            raise UnusableImage(f"a JPEG header with stray bytes at byte {position}")
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    raise UnusableImage("a JPEG header that is cut")


def _webp_size(data: bytes | memoryview) -> tuple[int, int]:
    """Height and width from the canvas, or from the first frame of a file without one."""
    if int.from_bytes(data[4:8], "little") + 8 > len(data) or len(data) < 30:
        raise UnusableImage("a WebP image that is cut")
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if kind == b"VP8 " and data[23:26] == _VP8_START:
        return int.from_bytes(data[28:30], "little") & 0x3FFF, int.from_bytes(data[26:28], "little") & 0x3FFF
    if kind == b"VP8L" and data[20] == _VP8L_SIGNATURE:
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    raise UnusableImage("a WebP header of an unknown kind")
