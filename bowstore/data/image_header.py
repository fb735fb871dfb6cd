"""Height and width of an encoded image from its header alone, without decoding.

Stricter than decoders and quicker than Pillow: a header that two decoders could read differently (two JPEG frames,
bytes between segments) is refused here, because training plans its windows with these numbers. So is one that claims
more pixels than the bytes behind it can hold: decoders make room for all of them, and libjpeg fills them with grey.
"""

import re
import zlib
from typing import NamedTuple

from bowstore.errors import DataError

MAX_IMAGE_BYTES = 1 << 29  # of a file; as much as `MAX_PIXELS` take without any compression
MAX_PIXELS = 178_956_970  # Pillow's own bound for an error: 2^29 bytes of RGB

_JPEG_MARK = b"\xff\xd8\xff"
_PNG_MARK = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_JPEG_SCAN = 0xDA
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those three are tables and extensions
_JPEG_END = b"\xff\xd9"
_JPEG_NEXT_MARK = re.compile(rb"\xff[^\0\xd0-\xd7]")  # no stuffed byte, no restart
_JPEG_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_JPEG_HUFFMAN_DCT = frozenset({0xC0, 0xC1, 0xC2, 0xC5, 0xC6})
_JPEG_CHANNELS = (1, 3, 4)
_TAIL_BYTES = 4096
_READ_AHEAD_BYTES = 16
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_DEFLATE_RATIO = 1032  # the most that deflate can pack: 258 bytes in two bits
_VP8_START = b"\x9d\x01\x2a"
_VP8L_SIGNATURE = 0x2F
_VP8_MACROBLOCK_BITS = 2  # at least, for the modes that even a skipped one has (RFC 6386, 11)
_MAX_DENSE_PIXELS = 1 << 24  # up to here, whatever a header claims costs no more than a large photograph
MAX_PIXELS_PER_BYTE = 32_768  # an empty image as libwebp writes it without loss has 26,000


class UnusableImage(DataError):
    """An image that no shard can hold; the message is the reason, without the file's name."""


class FalseSize(UnusableImage):
    """A header that claims more pixels than anybody decodes, or than the bytes behind it can hold."""


class ImageSize(NamedTuple):
    """Pixels of an image as they lie in the file (no EXIF rotation)."""

    height: int
    width: int


def image_size(data: bytes | memoryview) -> ImageSize:
    """Size of a JPEG, PNG or WebP image from its header.

    Raises:
        UnusableImage: something else, a header that is cut or contradicts itself, no pixels.
        FalseSize: too many pixels, for anybody or for so many bytes.
    """
    start = bytes(data[:16])
    if start.startswith(_JPEG_MARK):
        header = jpeg_header(data)
        height, width, bits = header.height, header.width, _jpeg_bits(data, header)
        held = 8 * (_jpeg_end(data, header) - header.scan)
    elif start == _PNG_MARK:
        if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
            raise UnusableImage("a PNG header that is damaged")
        height, width = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
        bits = height * width * data[24] * _PNG_CHANNELS.get(data[25], 1)
        held = 8 * _DEFLATE_RATIO * len(data)
    elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        height, width = _webp_size(data)
        lossy = data[12:16] == b"VP8 "  # without loss, an image in one colour takes no bits at all
        bits = -(-height // 16) * -(-width // 16) * _VP8_MACROBLOCK_BITS if lossy else 0
        held = 8 * len(data)
    elif not start:
        raise UnusableImage("empty file")
    else:
        raise UnusableImage(f"no JPEG, PNG or WebP image: it starts with {start!r}")
    if not height or not width:
        raise UnusableImage(f"an image of {height} x {width} pixels")
    check_pixels(height, width, len(data))
    if bits > held:
        raise FalseSize(
            f"a header of {height} x {width} pixels before data for {held * height * width // bits} of them at most: "
            "it is wrong, or the data are cut"
        )
    return ImageSize(height, width)


def refuse_false_size(data: bytes | memoryview) -> None:
    """Raise FalseSize where `image_size` does; of other odd headers the decoder is the judge."""
    try:
        image_size(data)
    except FalseSize:
        raise
    except UnusableImage:
        return


def check_before_decoding(data: bytes | memoryview, name: str) -> None:
    """Refuse an image before a decoder makes room for all that its header claims.

    Raises:
        DataError: names it.
    """
    try:
        refuse_false_size(data)
    except FalseSize as error:
        raise DataError(
            f"image {name} cannot be decoded ({error}); remove it, or make the shards again; of shards made elsewhere "
            "`bowstore index` leaves it out"
        ) from error


def check_pixels(height: int, width: int, size_bytes: int, *, per_byte: int = MAX_PIXELS_PER_BYTE) -> None:
    """Refuse sizes that no format may claim: more than `MAX_PIXELS`, or large images in next to no bytes.

    Raises:
        FalseSize: with the value and the bound.
    """
    pixels = height * width
    if pixels > MAX_PIXELS:
        raise FalseSize(f"{height} x {width} pixels, more than {MAX_PIXELS}")
    if pixels > max(_MAX_DENSE_PIXELS, per_byte * size_bytes):
        raise FalseSize(
            f"{height} x {width} pixels in {size_bytes} bytes, more than {per_byte} a byte: the header is "
            "wrong, or the image empty"
        )


class JpegHeader(NamedTuple):
    """What stands before the first scan of a JPEG.

    Attributes:
        height: pixels.
        width: pixels.
        frame: byte of the frame header.
        scan: byte of the header of the first scan.
    """

    height: int
    width: int
    frame: int
    scan: int


def jpeg_header(data: bytes | memoryview) -> JpegHeader:
    """The one frame header that stands before the first scan.

    Raises:
        UnusableImage: no such header, stray bytes, several frames, or a kind that decoders of images do not know.
    """
    position, frame = 2, 0
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            raise UnusableImage(f"a JPEG header with stray bytes at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in _JPEG_FRAMES:
            if frame:
                raise UnusableImage(f"a JPEG header with a second frame at byte {position}")
            frame = position
        elif marker == _JPEG_SCAN:
            if frame:
                height, width = (data[at] << 8 | data[at + 1] for at in (frame + 5, frame + 7))
                return JpegHeader(height, width, frame, position)
            raise UnusableImage("a JPEG header without a frame")
        elif marker < 0xC0:
            raise UnusableImage(f"a JPEG header with stray bytes at byte {position}")
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    raise UnusableImage("a JPEG header that is cut")


def _jpeg_bits(data: bytes | memoryview, header: JpegHeader) -> int:
    """The fewest bits that such an image can take: two a block of 8 x 8 (its DC code, the end of its AC codes).

    In a progressive image the AC codes of many blocks may end together. Nothing is known of arithmetic coding.
    """
    frame = header.frame
    marker, depth, channels = data[frame + 1], data[frame + 4], data[frame + 9]
    if depth != 8 or channels not in _JPEG_CHANNELS:
        raise UnusableImage(f"a JPEG of {channels} channels of {depth} bits")
    factors = [(data[at] & 15, data[at] >> 4) for at in range(frame + 11, frame + 11 + 3 * channels, 3)]
    across, along = max(h for _, h in factors), max(v for v, _ in factors)
    if not all(v and h for v, h in factors):
        raise UnusableImage("a JPEG header that is damaged")
    if marker not in _JPEG_HUFFMAN_DCT:
        return 0
    blocks = sum(-(-header.height * v // (8 * along)) * -(-header.width * h // (8 * across)) for v, h in factors)
    return blocks if marker in _JPEG_PROGRESSIVE else 2 * blocks


def _jpeg_end(data: bytes | memoryview, header: JpegHeader) -> int:
    """Where the image ends: at its last end mark, or with its bytes; padding behind the mark holds no pixels.

    Of a progressive image this is where its first scan ends, which has the DC codes of all blocks.
    """
    frame, scan = header.frame, header.scan
    if data[frame + 1] in _JPEG_PROGRESSIVE and data[scan + 4] == data[frame + 9]:
        next_mark = _JPEG_NEXT_MARK.search(data, scan + 2)
        return next_mark.start() if next_mark else len(data)
    tail = max(scan, len(data) - _TAIL_BYTES)  # a thumbnail in the header has an end mark of its own
    place = bytes(data[tail:]).rfind(_JPEG_END)
    if place < 0 and tail > scan:
        tail, place = scan, bytes(data[scan:]).rfind(_JPEG_END)
    return tail + place if place >= 0 else len(data)


def jpeg_without_end(data: bytes) -> bytes:
    """A JPEG of one scan with a few zeros in place of its end mark and all behind it; any other as it is.

    At an end mark that comes too early libjpeg fills the rest of the image with grey and reports nothing that Pillow
    would hear. Without the mark it waits for more, and Pillow raises "image file is truncated". The zeros are for its
    reading ahead: eight bytes, from the last code on.
    """
    try:
        header = jpeg_header(data)
    except UnusableImage:
        return data
    frame, scan = header.frame, header.scan
    end = data.find(_JPEG_END, scan)
    if data[frame + 1] in (0xC0, 0xC1) and data[scan + 4] == data[frame + 9] and end >= 0:
        return data[:end] + bytes(_READ_AHEAD_BYTES)
    return data


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
