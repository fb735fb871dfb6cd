"""The trial run behind `gpu_decode`: what may end the process is tried here, and what came of it is printed.

    python -m bowstore.data.gpu_probe DEVICE [cores | hardware]

DEVICE is the number of a GPU, or cpu. Each answer is a line of JSON as soon as it is there, the riskiest last: how far
whole images are from Pillow's where its cores decode them ("cores"), and where its hardware decoder may, too ("image");
how far windows are from those of whole images ("slice"). With `cores` the hardware decoder is left alone; with
`hardware` the answer is what of it nvJPEG finds. It is a second's work: torch is not loaded.

Legend: N windows, each with its encoded image; H W C pixels of a window.
"""

import ctypes
import io
import json
import resource
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from bowstore.data.dali_errors import words_of
from bowstore.data.decode import Decoder
from bowstore.nvjpeg import nvjpeg_file

if TYPE_CHECKING:
    from bowstore.data.gpu_decode import Way

Window = tuple[int, int, int, int]  # top, left, height, width
_HARDWARE = 3  # NVJPEG_BACKEND_HARDWARE
_NO_HARDWARE = 9  # NVJPEG_STATUS_IMPLEMENTATION_NOT_SUPPORTED
_HYBRID_SIDES = 1100, 1000  # from a million pixels on nvJPEG decodes the Huffman codes on the GPU, too
_SIDES = (96, 128), (97, 131), (333, 501), (17, 301)
_KINDS: Sequence[tuple[str, str, dict[str, Any]]] = (
    ("RGB", "JPEG", {"subsampling": 0}),
    ("RGB", "JPEG", {"subsampling": 1}),
    ("RGB", "JPEG", {"subsampling": 2}),
    ("RGB", "JPEG", {"subsampling": 2, "progressive": True}),
    ("L", "JPEG", {}),
    ("RGB", "PNG", {}),
)


def main(arguments: Sequence[str]) -> None:
    """Print the answers."""
    device, *what = arguments
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer, not something to look into
    number = None if device == "cpu" else int(device)
    if what == ["hardware"]:
        _say(hardware(number))
        return
    encoded_N, windows_N4 = trials()
    expected, loads = pillow(encoded_N, windows_N4), (0.0,) if what else (0.0, 1.0)
    whole = [decoded(encoded_N, windows_N4, number, "image", 0.0)]
    _say({"cores": differences(whole[0], expected)})
    whole += [decoded(encoded_N, windows_N4, number, "image", load) for load in loads[1:]]
    _say({"image": max(differences(found, expected) for found in whole)})
    alone = [decoded(encoded_N, windows_N4, number, "slice", load) for load in loads]
    _say({"slice": max(map(differences, alone, whole))})


def _say(answers: dict[str, Any]) -> None:
    print(json.dumps(answers), flush=True)


def trials() -> tuple[list[NDArray[np.uint8]], NDArray[np.int32]]:
    """Images of several kinds and sizes, and windows of each, many at its edges: encoded (N,), windows (N, 4)."""
    encoded, found = [], []
    for sides in (*_SIDES, _HYBRID_SIDES):
        for mode, name, options in _KINDS[2:3] if sides == _HYBRID_SIDES else _KINDS:
            buffer = io.BytesIO()
            Image.fromarray(picture(*sides)).convert(mode).save(buffer, name, quality=90, **options)
            for window in windows(*sides):
                encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
                found.append(window)
    return encoded, np.array(found, np.int32)


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """Fine in brightness, so that no pixel may be out of place, and smooth in colour: (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    fine = 50 * np.sin(x / 2) * np.cos(y / 3)
    smooth = [40 * np.sin(x / 60), 40 * np.cos(y / 50), 40 * np.sin((x + y) / 70)]
    pixels: NDArray[np.uint8] = np.clip(128 + fine[..., None] + np.stack(smooth, -1), 0, 255).astype(np.uint8)
    return pixels


def windows(height: int, width: int) -> list[Window]:
    """The whole image, its corners and edges, odd places within, and single pixels."""
    h, w = height // 2 + 1, width // 2 + 1
    return [
        (0, 0, height, width), (0, 0, h, w), (height - h, width - w, h, w), (3, 5, h - 3, w - 5), (0, width - 9, h, 9),
        (height - 7, 0, 7, w), (8, 16, 8, 16), (h - 1, w - 1, 1, 1), (height - 1, width - 1, 1, 1),
    ]  # fmt: skip


def decoded(
    encoded_N: list[NDArray[np.uint8]], windows_N4: NDArray[np.int32], device: int | None, way: "Way", hw_load: float
) -> list[NDArray[np.uint8]]:
    """The windows' pixels (H, W, C), as a graph decodes them."""
    pipe = Pipeline(batch_size=len(encoded_N), num_threads=2, device_id=device, seed=0)
    fed = [encoded_N, np.ascontiguousarray(windows_N4[:, :2]), np.ascontiguousarray(windows_N4[:, 2:])]
    decoder = Decoder("cpu" if device is None else "mixed", way, hw_load)
    with pipe:
        inputs = fn.external_source(
            source=iter([fed]), num_outputs=3, dtype=[types.UINT8, types.INT32, types.INT32], ndim=[1, 1, 1]
        )
        pipe.set_outputs(decoder.window(*inputs))
    (output,) = pipe.run()
    images = output if device is None else output.as_cpu()
    return [np.array(images[number], np.uint8) for number in range(len(images))]


def pillow(encoded_N: list[NDArray[np.uint8]], windows_N4: NDArray[np.int32]) -> list[NDArray[np.uint8]]:
    """The windows' pixels (H, W, C), as Pillow decodes them."""
    found = []
    for encoded, (top, left, height, width) in zip(encoded_N, windows_N4.tolist(), strict=True):
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            box = left, top, left + width, top + height
            found.append(np.asarray(image.convert("RGB").crop(box)))
    return found


def differences(ours: list[NDArray[np.uint8]], theirs: list[NDArray[np.uint8]]) -> float:
    """The largest mean absolute difference of a window, of 255; that of black and white where shapes differ."""
    return max(
        float(np.abs(a.astype(int) - b).mean()) if a.shape == b.shape else 255.0
        for a, b in zip(ours, theirs, strict=True)
    )


def hardware(device: int | None) -> dict[str, Any]:
    """How many hardware decoders nvJPEG finds on a GPU ("engines"), or why none ("lack"); prints its version before."""
    if device is None:
        return {"engines": 0, "lack": "there is no GPU"}
    try:
        library = ctypes.CDLL(nvjpeg_file())
        version = _version(library)
        ask = library.nvjpegGetHardwareDecoderInfo
    except (OSError, AttributeError) as error:
        return {"engines": 0, "lack": f"nvJPEG does not tell: {error}"}
    _say({"nvjpeg": version})
    return _engines(library, ask, device)


def _engines(library: ctypes.CDLL, ask: Any, device: int) -> dict[str, Any]:
    try:
        _current(device)
    except OSError:
        return {"engines": 0, "lack": "there is no driver"}
    handle, engines, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    status = library.nvjpegCreateEx(_HARDWARE, None, None, 0, ctypes.byref(handle))
    if status == 0:
        status = ask(handle, ctypes.byref(engines), ctypes.byref(cores))
        library.nvjpegDestroy(handle)
    if status == 0 and engines.value:
        return {"engines": engines.value}
    no_engine = status in (0, _NO_HARDWARE)
    return {"engines": 0, "lack": "the GPU has none" if no_engine else f"nvJPEG's error {status} on asking for one"}


def _version(library: ctypes.CDLL) -> list[int]:
    """Major and minor number of nvJPEG."""
    value, found = ctypes.c_int(), []
    for part in range(2):  # of libraryPropertyType
        library.nvjpegGetProperty(part, ctypes.byref(value))
        found.append(value.value)
    return found


def _current(device: int) -> None:
    """Make a GPU that of the calling thread, for libraries that take no number."""
    driver = ctypes.CDLL("libcuda.so.1")
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(handle), device)
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
    driver.cuCtxSetCurrent(context)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (RuntimeError, ValueError, IndexError, MemoryError) as error:
        sys.exit(words_of(error))  # DALI's own: several lines, the last of which says nothing
