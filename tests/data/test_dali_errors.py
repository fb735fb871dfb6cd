"""What an error of a graph is taken for: texts of DALI's own, from real failures and from reports of users."""

import io

import numpy as np
import pytest
import torch
from in_memory import Memory
from nvidia.dali import fn
from PIL import Image
from shard_sets import encode_jpeg, textured_image

from bowstore.data import feed as feeding
from bowstore.data.dali_errors import explained, words_of
from bowstore.data.feed import Feed, new_pipeline
from bowstore.data.pipeline import clean_batches
from bowstore.data.views import CleanView
from bowstore.errors import BowstoreError, DataError

GOOD = encode_jpeg(textured_image(1, 48, 40))
ROWS = np.arange(2)


def memory(*images: bytes) -> Memory:
    return Memory([np.frombuffer(image, np.uint8) for image in images])


def error(operator: str, words: str, backend: str = "MIXED") -> RuntimeError:
    """As DALI 2.4 words it: recorded from a real one."""
    return RuntimeError(
        "Critical error in pipeline:\nCritical error in pipeline:\n"
        f"Error in {backend} operator `nvidia.dali.fn.{operator}`,\n"
        "which was used in the pipeline definition with the following traceback:\n\n"
        '  File "bowstore/data/decode.py", line 52, in window\n    return fn.decoders.image_slice(encoded)\n\n'
        f"encountered:\n\n{words}\n" + 2 * "Current pipeline object is no longer valid.\n"
    )


NO_IMAGE = {
    "CUDA allocation failed": "lower the batch",
    "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory": "lower the batch",
    "std::bad_alloc": "lower the batch",
    "nvImageCodec failure: '#5'": "lower the batch",
    "nvImageCodec failure: '#15'": "lower the batch",
    'NVJPEG error "5" : NVJPEG_STATUS_ALLOCATOR_FAILURE\nStacktrace (7 entries):\n[frame 0]: /a': "lower the batch",
    "nvImageCodec failure: '#10'": "install nvidia-nvimgcodec and nvidia-nvjpeg",
    "dlopen libnvjpeg.so failed!. Please install CUDA toolkit": "install nvidia-nvimgcodec and nvidia-nvjpeg",
    "nvImageCodec failure: '#7'": "update the driver",
    "CUDA runtime API error cudaErrorInsufficientDriver (35):\nCUDA driver version": "update the driver",
    "nvImageCodec failure: '#21'": "start the command again",
    "CUDA runtime API error cudaErrorLaunchFailure (719):\nunspecified launch failure": "start the command again",
    "Error in thread 0: nvml error (999): A nvml internal driver error occurred": "start the command again",
}  # fmt: skip


@pytest.mark.parametrize(("words", "remedy"), NO_IMAGE.items())
def test_errors_of_libraries_and_of_the_gpu_blame_no_image(words: str, remedy: str) -> None:
    """Not even where there is an image that cannot be decoded."""
    found = explained(error("decoders.image_slice", words), memory(GOOD, GOOD[:100]), ROWS)
    assert type(found) is BowstoreError
    assert str(found).startswith("DALI failed, and no image is to blame: ")
    assert f"; {remedy}" in str(found)
    assert " (in fn.decoders.image_slice on MIXED)" in str(found)
    assert "\n" not in str(found)
    assert "Stacktrace" not in str(found)
    assert "traceback" not in str(found)


def test_an_internal_error_with_sound_images_is_told_in_the_librarys_words() -> None:
    """What nvImageCodec 0.9.0 is reported to say of windows on an A100."""
    found = explained(error("decoders.image_slice", "nvImageCodec failure: '#8'"), memory(GOOD, GOOD), ROWS)
    assert str(found) == (
        "DALI failed with a batch that Pillow decodes (image '0' and the 1 after it): nvImageCodec failure #8 "
        "(internal error) (in fn.decoders.image_slice on MIXED); make the shards again, or on a GPU use --device cpu"
    )
    assert isinstance(found, DataError)


def test_the_same_error_with_an_image_that_pillow_refuses_names_the_image() -> None:
    found = explained(error("decoders.image", "Failed to decode sample #1 : "), memory(GOOD, GOOD[:100]), ROWS)
    assert isinstance(found, DataError)
    assert str(found).startswith("image '1' cannot be decoded (")


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, MemoryError])
def test_errors_of_building_a_graph_name_no_image(kind: type[Exception]) -> None:
    """What DALI preallocates on a GPU that others have filled is asked for before the first batch."""
    found = explained(kind("Critical error when building pipeline:\nCUDA allocation failed"), memory(GOOD), None)
    assert str(found) == (
        "DALI failed, and no image is to blame: CUDA allocation failed; lower the batch, or end what else holds the "
        "memory"
    )
    found = explained(kind("Critical error when building pipeline:\nsomething else"), memory(GOOD), None)
    assert str(found) == (
        "DALI failed before the first batch: something else; install nvidia-dali again, or on a GPU use --device cpu"
    )


def test_a_real_error_of_another_class_is_explained_too() -> None:
    """DALI raises by what was thrown in C++: here a ValueError."""
    feed: Feed[int] = Feed([lambda: (0, {"encoded": [np.frombuffer(GOOD, np.uint8)] * 2})], ["encoded"])
    pipe = new_pipeline(2, torch.device("cpu"), 1)
    with pipe:
        pipe.set_outputs(fn.resize(feed.declare()["encoded"], size=[2, 2]))
    with pytest.raises(DataError, match=r"DALI failed with a batch that Pillow decodes .* \(in fn\.resize on CPU\)"):
        next(feeding.run(pipe, feed, memory(GOOD, GOOD), lambda _: ROWS))


def run(*images: bytes) -> None:
    view = CleanView(32, 40, False, (0, 0, 0), (1, 1, 1))
    list(clean_batches(memory(*images), view, np.arange(len(images)), batch=4, device=torch.device("cpu"), threads=1))


@pytest.mark.parametrize("bad", [GOOD[:100], GOOD[: len(GOOD) // 2], b"<html>" * 9], ids=["header", "half", "page"])
def test_real_images_that_nobody_decodes(bad: bytes) -> None:
    with pytest.raises(DataError, match="image '1' cannot be decoded"):
        run(GOOD, bad)


def test_a_real_image_that_only_pillow_decodes() -> None:
    buffer = io.BytesIO()
    Image.fromarray(textured_image(1, 48, 40)).save(buffer, "GIF")
    with pytest.raises(DataError, match=r"batch that Pillow decodes .*#4 \(code stream unsupported\)"):
        run(GOOD, buffer.getvalue())


def test_other_errors_of_dali_keep_their_words() -> None:
    text = 'Assert on "x" failed: CUDA is not available.\nStacktrace (9 entries):\n[frame 0]: /usr/lib/libdali.so'
    assert words_of(RuntimeError(text)) == 'Assert on "x" failed: CUDA is not available.'
