"""What one image file really is, and the bytes that a shard keeps of it.

A shard must hold only what every later decoder reads alike: libjpeg, libpng, libwebp, and DALI's stricter
parsers on CPU and GPU, for which one bad image ends the run. So each image is decoded in full here, once.
Plain files are kept byte for byte; whatever a strict decoder might refuse or read differently is encoded
anew; what cannot be decoded is refused with its reason.
"""

import io
import warnings
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from bowstore.beginnings import foreign_kind
from bowstore.data.image_header import (
    MAX_PIXELS,
    MAX_PIXELS_PER_BYTE,
    UnusableImage,
    check_pixels,
    jpeg_header,
    jpeg_without_end,
    refuse_false_size,
)
from bowstore.data.tiff import check_tiff, grey_levels
from bowstore.errors import is_machine_error

JPEG_QUALITY = 95
# Named one by one, so that a hostile file never reaches Pillow's rarer plugins (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # what a shard may hold

_JPEG_SIGNATURE = b"\xff\xd8\xff"
_SIGNATURES = (_JPEG_SIGNATURE, b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_JXL_SIGNATURES = (b"\xff\x0a", b"\0\0\0\x0cJXL ")
_BEGINNING_BYTES = 512
_ORIENTATION_TAG = 0x0112
_ORIENTATION_MARKS = (b"Exif\0\0", b"eXIf", b"EXIF", b"tiff:Orientation")  # of JPEG, PNG, WebP; of XMP in all
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_FRAMES = frozenset({0xC0, 0xC2})  # baseline and progressive, Huffman-coded
_JPEG_NO_FRAME = frozenset({0xC4, 0xC8, 0xCC})  # in the range of the frame markers, but tables and extensions
_JPEG_SCAN = 0xDA
_LUMA_SAMPLING = frozenset({(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)})
_PNG_SIGNATURE_BYTES = 8
_FAX = ("group3", "group4", "tiff_ccitt")  # of TIFF, as Pillow calls them
_BMP_FILE_HEADER_BYTES, _BMP_CORE_HEADER_BYTES = 14, 12
_PNG_GREY, _PNG_RGB, _PNG_PALETTE = 0, 2, 3


class Prepared(NamedTuple):
    """One image as a shard keeps it.

    Attributes:
        data: the encoded image.
        extension: jpg, png or webp, by content.
        height: pixels, in the header and decoded alike.
        width: pixels.
        change: why it was encoded anew (for example "cmyk", "rotated", "gif"); None for bytes kept as is.
    """

    data: bytes
    extension: str
    height: int
    width: int
    change: str | None


def prepare(data: bytes) -> Prepared:
    """Decode an image in full and return the bytes to keep.

    Kept as they are: baseline and progressive JPEG, PNG and still WebP, 8-bit RGB or grey, upright. All else
    becomes RGB: JPEG sources JPEG (quality 95, no chroma subsampling), other sources PNG, without EXIF and
    colour profile, which nothing here or later applies. Alpha is dropped, as `convert("RGB")` drops it; of
    more than 8 bits the upper 8 stay; of an animation the first frame.

    Raises:
        UnusableImage: nothing that can be decoded, pixels whose meaning the file does not tell, or more than
            `MAX_PIXELS` of them.
    """
    if not data:
        raise UnusableImage("empty file")
    with warnings.catch_warnings():
        # What Pillow only warns about is either decided here (size) or does not touch the pixels (EXIF).
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.format in EXTENSIONS:
                    refuse_false_size(data)
                check_pixels(image.height, image.width, len(data), per_byte=_pixels_per_byte(image))
                if image.format != "JPEG":
                    return _prepare(image, data)
                with Image.open(io.BytesIO(jpeg_without_end(data)), formats=("JPEG",)) as whole:
                    return _prepare(whole, data)
        except UnusableImage:
            raise
        except UnidentifiedImageError as error:
            raise UnusableImage(_why_unread(data)) from error
        except Image.DecompressionBombError as error:
            raise UnusableImage(f"more than {MAX_PIXELS} pixels") from error
        except Exception as error:
            # Decoders meet damaged bytes with any exception there is: struct.error, KeyError, SyntaxError...
            if is_machine_error(error):
                raise
            raise UnusableImage(f"cannot be decoded: {error or type(error).__name__}") from error


def _pixels_per_byte(image: Image.Image) -> int:
    """How many pixels a byte may hold; a blank row of a fax takes a single bit."""
    return 8 * image.width if image.info.get("compression") in _FAX else MAX_PIXELS_PER_BYTE


def _why_unread(data: bytes) -> str:
    """What is wrong with a file that no reader of `FORMATS` opens."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "HEIC or HEIF, which Pillow does not read; convert it to JPEG"
    if data.startswith(_JXL_SIGNATURES):
        return "JPEG XL, which Pillow does not read; convert it to JPEG or PNG"
    if not data.startswith(_SIGNATURES):
        return f"not an image: {foreign_kind(data[:_BEGINNING_BYTES]) or f'it starts with {data[:16]!r}'}"
    return "a damaged or cut header, or a layout that Pillow does not read (a JPEG of 12 bits, a TIFF of 10 or 14)"


def _prepare(image: Image.Image, data: bytes) -> Prepared:
    width, height = image.size
    if isinstance(image, TiffImageFile):
        check_tiff(image)
    if isinstance(image, BmpImageFile):
        _check_bmp(image, data)
    image.load()
    orientation = _orientation(image)
    change = _change_needed(image, data, orientation)
    if change is None:
        return Prepared(data, EXTENSIONS[image.format or ""], height, width, None)
    rgb = _to_rgb(image)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info = {}  # `save` would write the profile and the resolution found here
    encoded = io.BytesIO()
    if image.format in ("JPEG", "MPO"):
        rgb.save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return Prepared(encoded.getvalue(), "jpg", rgb.height, rgb.width, change)
    rgb.save(encoded, "PNG")
    return Prepared(encoded.getvalue(), "png", rgb.height, rgb.width, change)


def _check_bmp(image: BmpImageFile, data: bytes) -> None:
    """Refuse palettes of greys whose places have fewer or more bits than Pillow takes them for.

    It drops a palette of black and white, or of all greys in order, and reads the places as 1 or 8 bits.
    """
    start = 0 if image.format == "DIB" else _BMP_FILE_HEADER_BYTES
    short = int.from_bytes(data[start : start + 4], "little") == _BMP_CORE_HEADER_BYTES
    bits = data[start + (10 if short else 14)]
    if bits == 8 and image.mode == "1" and image.tile[0].codec_name == "raw":
        tile = image.tile[0]
        assert isinstance(tile.args, tuple), "rawmode, stride, direction"
        image.tile = [tile._replace(args=("1;8", *tile.args[1:]))]
    elif image.mode in ("1", "L") and bits != (1 if image.mode == "1" else 8):
        raise UnusableImage(f"a BMP of {bits} bits with a palette of greys, which Pillow does not read")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 where there is none."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception as error:
        if is_machine_error(error):
            raise
        return 1
    return value if isinstance(value, int) else 1


def is_turned(data: bytes | memoryview) -> bool:
    """Whether EXIF (or XMP) says that an image is to be turned or mirrored before it is shown.

    Most images have neither, and Pillow is not asked about them.

    Args:
        data: a JPEG, PNG or WebP image that `image_size` takes.
    """
    found = bytes(data[: jpeg_header(data).scan] if bytes(data[:3]) == _JPEG_SIGNATURE else data)
    if not any(mark in found for mark in _ORIENTATION_MARKS):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS)) as image:
                return _orientation(image) in _UPRIGHT
        except Exception:  # noqa: BLE001 - see `prepare`
            return False


def _change_needed(image: Image.Image, data: bytes, orientation: int) -> str | None:
    """Why the bytes cannot be kept, or None."""
    if orientation in _UPRIGHT:
        return "rotated"
    if image.format == "MPO":
        return "animated"
    if image.format not in EXTENSIONS:
        return (image.format or "unknown").lower()
    if getattr(image, "is_animated", False):
        return "animated"
    if image.mode == "CMYK":
        return "cmyk"
    if isinstance(image, JpegImageFile):
        return None if _is_plain_jpeg(image, data) else "unusual-jpeg"
    if image.format == "PNG":
        return _png_change(data)
    return None if image.mode == "RGB" else "alpha"


def _is_plain_jpeg(image: JpegImageFile, data: bytes) -> bool:
    """Whether every decoder reads this JPEG alike.

    DALI's parser wants the header's segments to follow each other without a gap; libjpeg skips over garbage.
    GPU decoders know neither arithmetic coding nor unusual sampling, and take three channels for YCbCr.
    """
    position, frame = 2, 0
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _JPEG_SCAN:
            break
        if not 0xC0 <= marker <= 0xFE:
            return False
        if marker <= 0xCF and marker not in _JPEG_NO_FRAME:
            frame = marker
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    else:
        return False
    return frame in _JPEG_FRAMES and _usual_channels(image)


def _usual_channels(image: JpegImageFile) -> bool:
    """Grey, or YCbCr with the chroma channels alike and no larger than luma."""
    if image.mode == "L":
        return True
    layers = [layer[:3] for layer in image.layer]
    identifiers = tuple(layer[0] for layer in layers)
    luma, *chroma = (layer[1:] for layer in layers)
    return (
        image.mode == "RGB"
        and identifiers in ((1, 2, 3), (0, 1, 2))
        and luma in _LUMA_SAMPLING
        and chroma == [(1, 1), (1, 1)]
        and image.info.get("adobe_transform") != 0
    )


def _png_change(data: bytes) -> str | None:
    """Why a decodable PNG cannot be kept: by its header and its chunks.

    Raises:
        UnusableImage: pixel data that differ from their checksum; Pillow does not look at the last one.
    """
    depth, colour, interlaced = data[24], data[25], data[28]
    kinds = set(_whole_png_chunks(data))
    if colour == _PNG_PALETTE:
        return "palette"
    if colour not in (_PNG_GREY, _PNG_RGB) or b"tRNS" in kinds:
        return "alpha"
    if depth != 8:
        return "16-bit" if depth == 16 else "few-bits"
    # Pillow does without IEND, DALI's parser does not.
    return "unusual-png" if interlaced or b"IEND" not in kinds else None


def _whole_png_chunks(data: bytes) -> Iterator[bytes]:
    """Kinds of chunks, up to IEND or the first that is cut or, being no pixel data, is damaged."""
    position = _PNG_SIGNATURE_BYTES
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if end + 4 > len(data):
            return
        if zlib.crc32(memoryview(data)[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            if kind == b"IDAT":
                raise UnusableImage("damaged: the checksum of a PNG chunk with pixels is wrong")
            return
        yield kind
        if kind == b"IEND":
            return
        position = end + 4


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB pixels; `convert` would clip 16-bit values at 255.

    Raises:
        UnusableImage: pixels whose range is not known (float, 32-bit integers).
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        return Image.fromarray(grey_levels(image)).convert("RGB")
    if image.mode == "La":  # grey with alpha multiplied in, which has no way of its own to RGB
        return image.convert("LA").convert("RGB")
    if image.mode in ("I", "F"):
        raise UnusableImage(f"pixels of Pillow's mode {image.mode} have no known range")
    return image.convert("RGB")
