"""The colour jitter of a CPU: equal to DALI's `color_twist`, which the GPU graph uses, and to the matrix by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from nvidia.dali import Pipeline, fn

from bowstore.config import ViewConfig
from bowstore.data.colour import colour_matrices
from bowstore.data.mix import Mixing, mix
from bowstore.data.plan import Origin, Plan, generator, perturb

IMAGES = 48


def a_plan(view: ViewConfig) -> Plan:
    side = np.full(IMAGES, 64, np.int32)
    return perturb(np.arange(IMAGES), side, side, generator(0, 0, 1).random((IMAGES, 32)), view, Origin(0, 0, 0))


def always(value: Any) -> Callable[[], Any]:
    return lambda: value


def coloured(images: np.ndarray, plan: Plan) -> np.ndarray:
    """The pass of a CPU with colours alone, images (B, S, S, 3) of 255."""
    size = images.shape[1]
    view = ViewConfig(size=size, resize=None, mean=(0, 0, 0), std=(1 / 255,) * 3, flip=False)
    out = np.empty((len(images), size, 3 * size), np.float32)
    for first in range(0, len(images), 4):
        mix(out, images[first : first + 4].reshape(-1, size, 3 * size), first, Mixing.of(plan.unmixed(), view))
    return out.reshape(images.shape)


def pixels() -> np.ndarray:
    # A side that is no multiple of a vector register.
    return np.random.default_rng(0).integers(0, 256, (IMAGES, 41, 41, 3), dtype=np.uint8)


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
        pipe.set_outputs(fn.color_twist(given, **settings))
    (twisted,) = pipe.run()
    difference = np.abs(np.asarray(twisted.as_tensor()) - coloured(images, plan))
    assert difference.max() <= 1, "one grey level of rounding"
    assert difference.mean() < 0.01


def test_the_pass_is_the_matrix_product_rounded_and_clipped() -> None:
    plan, images = a_plan(ViewConfig(size=64, resize=64, brightness=1.0, contrast=1.0)), pixels()
    matrices = colour_matrices(plan).astype(np.float64)
    exact = np.einsum("bhwc,brc->bhwr", images, matrices[:, :, :3]) + matrices[:, None, None, :, 3]
    ours = coloured(images, plan)
    assert (ours == np.rint(ours)).all()
    assert np.abs(ours - np.clip(exact, 0, 255)).max() <= 0.501
    assert (exact < -1).any(), "there is something to clip"
    assert (exact > 256).any()


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
