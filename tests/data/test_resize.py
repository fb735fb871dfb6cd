"""Resizing on a CPU is torchvision's, to the bit, and strips take no more memory than other images."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms import v2

from bowstore.data.resize import as_slot, centre, resize_into, target


def noise(height: int, width: int) -> torch.Tensor:
    """Pixels without any likeness to their neighbours: the worst case."""
    return torch.from_numpy(np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8))


def oracle(image: torch.Tensor, *transforms: v2.Transform) -> NDArray[np.uint8]:
    made: NDArray[np.uint8] = v2.Compose(transforms)(image.permute(2, 0, 1)).permute(1, 2, 0).numpy()
    return made


class Scratch:
    """Memory that is not zero, and how much was asked for."""

    def __init__(self) -> None:
        self.most = 0

    def __call__(self, *shape: int) -> NDArray[np.uint8]:
        self.most = max(self.most, math.prod(shape))
        return np.full(shape, 77, np.uint8)


SIDES = [(1, 1), (1, 50), (50, 1), (7, 300), (32, 32), (33, 40), (224, 224), (375, 500), (640, 427)]


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("size", [32, 224])
def test_any_image_to_a_square(sides: tuple[int, int], size: int) -> None:
    out = np.full((size, size, 3), 77, np.uint8)
    resize_into(noise(*sides), as_slot(out))
    assert np.array_equal(out, oracle(noise(*sides), v2.Resize((size, size), antialias=True)))


@pytest.mark.parametrize("sides", [*SIDES, (256, 256), (300, 256), (255, 257), (56, 60), (333, 500), (1200, 1600)])
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (224, 224), (40, 32), (257, 224)])
def test_the_centre_is_resize_and_centre_crop(sides: tuple[int, int], resize: int, size: int) -> None:
    image = noise(*sides)
    if max(sides) / min(sides) < 17:  # no strip
        ours = centre(image, resize, size, Scratch())
        assert np.array_equal(ours, oracle(image, v2.Resize(resize, antialias=True), v2.CenterCrop(size)))


@pytest.mark.parametrize("sides", [(9, 400), (400, 9), (3, 1000), (24, 1111), (12, 500), (1, 300)])
def test_the_centre_of_a_strip_is_where_it_is_in_the_whole(sides: tuple[int, int]) -> None:
    """Smooth, as pictures are: noise that is a thirty-second of a pixel off differs by eight levels."""
    tall, wide = np.meshgrid(np.arange(sides[0]), np.arange(sides[1]), indexing="ij")
    waves = [np.sin(tall / 3 + wide / 5 + phase) for phase in (0, 2, 4)]
    image = torch.from_numpy((127 + 120 * np.stack(waves, -1)).astype(np.uint8))
    scratch = Scratch()
    ours = centre(image, 40, 32, scratch).astype(int)
    whole = oracle(image, v2.Resize(40, antialias=True), v2.CenterCrop(32)).astype(int)
    assert np.abs(ours - whole).max() <= 2
    assert np.abs(ours - whole).mean() < 0.4
    assert scratch.most <= 40 * 3 * 10 * 32
    assert math.prod(target(sides, 40)) * 3 > scratch.most


def test_one_line_of_a_million_pixels_takes_no_more_memory_than_another_strip() -> None:
    scratch = Scratch()
    image = torch.arange(1_000_000, dtype=torch.int32).remainder(251).to(torch.uint8)[None, :, None].repeat(1, 1, 3)
    made = centre(image, 256, 224, scratch)
    assert scratch.most < 2_000_000
    assert len(np.unique(made[:, :, 0], axis=0)) == 1
    middle = made[112, 111:113, 0].astype(int)
    assert np.abs(middle - (1_000_000 // 2 % 251)).max() <= 1
