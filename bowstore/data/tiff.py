"""TIFF: what the numbers of a grey image mean, which Pillow leaves to its caller.

Legend: H height, W width.
"""

import ctypes
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImagePalette, TiffImagePlugin, _imaging
from PIL.TiffImagePlugin import TiffImageFile

from bowstore.data.image_header import UnusableImage

# Pillow's own way for uncompressed files takes separate planes of 16 bits for 8 bits, forgets WhiteIsZero in them, and
# does not know subsampled YCbCr. libtiff, which it uses for all others, reads those too.
TiffImagePlugin.READ_LIBTIFF = True

_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANES, _COLOUR_MAP, _INK_SET, _SAMPLE_FORMAT = 258, 262, 284, 320, 332, 339
_WHITE_IS_ZERO = 0
_SIGNED = 2
_CMYK_INKS = 1


def check_tiff(image: TiffImageFile) -> None:
    """Look at an opened file before its pixels are decoded, and mend what Pillow made of its palette.

    Raises:
        UnusableImage: pixels whose range is not known, or inks that are not cyan, magenta, yellow and black.
    """
    _silence_libtiff()
    tags = image.tag_v2
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise UnusableImage("signed pixels (SampleFormat 2) have no known range")
    if image.mode == "CMYK" and tags.get(_INK_SET, _CMYK_INKS) != _CMYK_INKS:
        raise UnusableImage(f"inks that are not CMYK (InkSet {tags[_INK_SET]})")
    if image.mode == "La" and tags.get(_PLANES, 1) != 1:
        # Pillow takes a plane of alpha for a second one of grey, and could not divide by it.
        raise UnusableImage("grey multiplied with alpha in planes, which Pillow does not read")
    colours = tags.get(_COLOUR_MAP, ())
    if image.mode in ("P", "PA") and max(colours, default=0) < 256:
        # The map has 16 bits by the standard, of which Pillow takes the upper half; many writers fill in 8. libtiff's
        # own tools tell them by the same mark.
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def grey_levels(image: Image.Image) -> NDArray[np.uint8]:
    """The upper 8 of the bits that a decoded grey image of more than 8 bits has, black as 0; uint8 (H, W).

    Args:
        image: of Pillow's mode I;16 or I with 16 bits; of a TIFF, BitsPerSample says how many there are.
    """
    values_HW = np.asarray(image).astype(np.uint16)
    bits, photometric = 16, None
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2[_BITS_PER_SAMPLE][0]
        photometric = image.tag_v2.get(_PHOTOMETRIC, _WHITE_IS_ZERO)  # as Pillow has it for fewer bits
    grey_HW = (values_HW >> (bits - 8)).astype(np.uint8)
    return ~grey_HW if photometric == _WHITE_IS_ZERO else grey_HW


@cache
def _silence_libtiff() -> None:
    """Take away the handler that prints libtiff's errors to the terminal; Pillow raises them as exceptions too."""
    try:
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
    except (AttributeError, OSError):
        return  # a Pillow that hides its libtiff, which then goes on printing
