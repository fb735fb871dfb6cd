"""The protocols imagenet-linear and places205-linear: classifiers of all layers, trained together on one frozen trunk.

The heads are those of the task `linear`. The trunk runs once a batch on each rank's part of the images; what ranks
exchange is the pooled maps and the labels, and each rank takes the same step on the whole batch. That is less than the
heads' gradients would be (a batch of 256 has fewer images than ImageNet has classes), and the result is that of one
process to rounding: batch norms see the whole batch.

Legend: B samples of a rank's batch, C channels, H W pixels, c channels of a layer, n cells of its pooled map.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.config import dump, validate
from bowstore.data.views import clean_view
from bowstore.evaluate.augmented import augmented
from bowstore.evaluate.fitting import check_features, count_hits, fit, shares, wait_for_images
from bowstore.evaluate.protocol import DataSets, Network, Scores, num_classes
from bowstore.evaluate.protocols.imagenet_linear import LayerHeadsSettings
from bowstore.exact import exact_float32
from bowstore.models.pooling import Tap, named_taps, pooled_shapes
from bowstore.train.distributed import World
from bowstore.train.step import build_optimizer
from bowstore.train.tasks.linear import class_losses, frozen_network, head_modes
from bowstore.train.tasks.settings import LinearSettings
from bowstore.train.tasks.task import Network as Trained

_LR = 0.01
_NORM = "batch"


def run(network: Network, data: DataSets, settings: LayerHeadsSettings, world: World) -> Scores:
    """Train the classifiers on the split "train" and test them on "test".

    The metrics are those of each layer, `top1_LAYER`, and the best of the layers without the pooled output,
    `top1_best`; with more than five classes also `top5_LAYER`. Details lie under the layers' names.

    Raises:
        UsageError: a layer that the network does not have, or one twice.
        DataError: features that are not finite, or a loss that diverges.
    """
    train, test, recipe = data["train"], data["test"], settings.recipe
    seen = settings.seen(network.view)
    clean = clean_view(seen)
    how = validate(LinearSettings, {"layers": settings.chosen or None, "norm": _NORM}, "eval")
    taps = named_taps(network.backbone, how.layers, size=seen.size)
    classes = num_classes(train)
    optim = recipe.schedule.optim(
        settings, len(train), lr=_LR, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    torch.manual_seed(settings.seed)
    heads, _ = frozen_network(how, network.backbone, seen.size, classes)
    heads = heads.to(world.device).to(memory_format=heads.memory_format(world.device))
    head_modes(heads)
    check_features(network.backbone, taps, test, clean, world, batch=optim.batch)
    wait_for_images(data, world)
    with exact_float32():
        batches = augmented(
            train, seen, batch=optim.batch, seed=settings.seed, world=world, steps=optim.epochs,
            square_crop=recipe.square_crop, lighting=recipe.lighting,
        )  # fmt: skip
        passes = fit(
            batches, partial(_losses, heads, world), build_optimizer(heads, optim), optim,
            of_a_pass=len(train) // optim.batch, world=world, what=f"{settings.dataset}-linear",
        )  # fmt: skip
        for value in heads.head.state_dict().values():
            world.take_first(value)  # ranks of different processors round differently
        hits_HT = count_hits(
            heads.eval(), test, clean, heads=len(taps), classes=classes, batch=optim.batch // world.size, world=world
        )
    probe = dump(optim) | {"norm": _NORM, "square_crop": recipe.square_crop, "lighting": recipe.lighting}
    dims = [channels * cells for channels, cells in pooled_shapes(network.backbone, taps, seen.size)]
    return Scores(
        metrics=_metrics(hits_HT, taps, len(test), classes),
        details={name: {"losses": losses} for name, losses in zip(taps, passes.T.tolist(), strict=True)},
        settings={
            "view": dump(seen),
            "test_view": asdict(clean),
            "probe": probe,
            "classes": classes,
            "taps": {name: {"of": str(tap), "dims": d} for (name, tap), d in zip(taps.items(), dims, strict=True)},
        },
    )


def _metrics(hits_HT: NDArray[np.int64], taps: Mapping[str, Tap], images: int, classes: int) -> dict[str, float]:
    """Those of each layer, and the best of the maps: the paper's conv* is without its pool5."""
    found: dict[str, float] = {}
    for name, hits_T in zip(taps, hits_HT, strict=True):
        found |= shares(hits_T, images, classes, name)
    metrics = dict(sorted(found.items(), key=lambda item: item[0][: len("top1")]))  # all of top1 first
    if maps := [metrics[f"top1_{name}"] for name, tap in taps.items() if tap.layer]:
        return {"top1_best": max(maps), **metrics}
    return metrics


def _losses(heads: Trained, world: World, images_BCHW: Tensor, label_B: Tensor) -> Tensor:
    """Losses of the classifiers over the batch of all ranks, (classifiers,)."""
    pooled = [torch.cat(world.gathered(pooled_Bcn.contiguous())) for pooled_Bcn in heads.features(images_BCHW)]
    return class_losses(heads.head(pooled), torch.cat(world.gathered(label_B)))
