"""The part of the DALI graphs that decodes: whole images and windows of them, on a CPU or a GPU."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nvidia.dali import fn, types

if TYPE_CHECKING:  # a trial's process does without torch
    from bowstore.data.gpu_decode import Way


@dataclass(frozen=True)
class Decoder:
    """How images are decoded.

    Attributes:
        device: DALI's name: "cpu"; or "mixed", a GPU with the help of the CPU.
        way: of a window: "slice" decodes no more than it ("region of interest"), "image" the whole image, which is
            then cut. The pixels are the same.
        hw_load: share of the JPEG images that a GPU's hardware decoder takes, where it has one.
        sides: height and width, pixels, for which the hardware decoder gets memory at once; what is larger, and all
            with 0, makes it wait for more.
    """

    device: Literal["cpu", "mixed"]
    way: "Way"
    hw_load: float
    sides: tuple[int, int] = (0, 0)

    def image(self, encoded: Any) -> Any:
        """Decode whole images: RGB, as they lie in the file (no EXIF rotation)."""
        return fn.decoders.image(encoded, **self._options())

    def window(self, encoded: Any, start: Any, shape: Any) -> Any:
        """Decode windows, which must lie within the images: DALI 2.4 dies of others.

        Args:
            encoded: the files' bytes.
            start: int32, top and left, pixels.
            shape: int32, height and width, pixels.
        """
        if self.way == "slice":
            return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], **self._options())
        return fn.slice(self.image(encoded), start=start, shape=shape, axes=[0, 1])

    def _options(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "output_type": types.RGB,
            "adjust_orientation": False,
            "hw_decoder_load": self.hw_load,
            "preallocate_height_hint": self.sides[0],
            "preallocate_width_hint": self.sides[1],
            # As libjpeg-turbo does on a CPU, whatever this says there, and so Pillow: otherwise a GPU repeats each
            # chroma value of a 4:2:0 image over four pixels.
            "jpeg_fancy_upsampling": True,
        }
