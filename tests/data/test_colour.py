"""The fused colour jitter: equal to DALI's `color_twist`, which the GPU graph uses, and to the matrix by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from nvidia.dali import Pipeline, fn

from bowstore.config import ViewConfig
from bowstore.data.colour import apply_matrix, colour_matrices, jitter
from bowstore.data.plan import Plan, generator, perturb

IMAGES = 48


def a_plan(view: ViewConfig) -> Plan:
    side = np.full(IMAGES, 64, np.int32)
    return perturb(np.arange(IMAGES), side, side, generator(0, 0, 1).random((IMAGES, 32)), view)


def always(value: Any) -> Callable[[], Any]:
    return lambda: value


def pixels() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    # Different sizes, and one that is no multiple of a vector register.
    return [rng.integers(0, 256, (30 + n, 41, 3), dtype=np.uint8) for n in range(IMAGES)]


def test_the_matrix_does_what_color_twist_does() -> None:
    plan, images = a_plan(ViewConfig(size=64, resize=64)), pixels()
    assert (plan.saturation == 0).any(), "some images are grey"
    pipe = Pipeline(batch_size=IMAGES, num_threads=2, device_id=None)
    with pipe:
        given = fn.external_source(source=always(images), batch=True, layout="HWC")
        settings = {
            name: fn.external_source(source=always(getattr(plan, name)), batch=True)
            for name in ("brightness", "contrast", "saturation", "hue")
        }
        matrices = fn.external_source(source=always(colour_matrices(plan)), batch=True)
        pipe.set_outputs(fn.color_twist(given, **settings), jitter(given, matrices))
    twisted, ours = pipe.run()
    for number in range(IMAGES):
        difference = np.abs(np.asarray(twisted[number]).astype(int) - np.asarray(ours[number]).astype(int))
        assert difference.max() <= 1, "one grey level of rounding"
        assert difference.mean() < 0.01


def test_the_kernel_is_the_matrix_product_rounded_and_clipped() -> None:
    plan, images = a_plan(ViewConfig(size=64, resize=64, brightness=1.0, contrast=1.0)), pixels()
    image, matrix = images[3][:4, :5].copy(), colour_matrices(plan)[3]
    ours = np.empty_like(image)
    apply_matrix(ours, image, matrix)
    exact = image.astype(np.float64) @ matrix[:, :3].T.astype(np.float64) + matrix[:, 3]
    assert np.abs(ours - np.clip(exact, 0, 255)).max() <= 0.51


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_no_jitter_is_the_identity(name: str) -> None:
    plan = replace(
        a_plan(ViewConfig(size=64, resize=64)),
        **{field: np.ones(IMAGES, np.float32) for field in ("brightness", "contrast", "saturation")},
        hue=np.zeros(IMAGES, np.float32),
    )
    identity = np.concatenate([np.eye(3), np.zeros((3, 1))], axis=1)
    assert np.abs(colour_matrices(plan) - identity).max() < 1e-6
    other = replace(plan, **{name: np.full(IMAGES, 0.5, np.float32)})
    assert np.abs(colour_matrices(other) - identity).max() > 0.1
