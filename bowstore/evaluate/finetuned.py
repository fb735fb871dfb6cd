"""The protocol semisup: the whole network with a linear layer, fine-tuned on few labels (protocols 3.4).

Legend: B batch, C channels, H W pixels.
"""

from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from bowstore.config import dump
from bowstore.data.views import clean_view
from bowstore.evaluate.augmented import augmented
from bowstore.evaluate.fitting import check_features, count_hits, fit, shares
from bowstore.evaluate.protocol import DataSets, Network, Scores, num_classes
from bowstore.evaluate.protocols.semisup import SCHEDULES, SemisupSettings
from bowstore.exact import exact_float32
from bowstore.models.backbone import Backbone
from bowstore.models.heads import LayerHead
from bowstore.models.pooling import POOLED
from bowstore.train.distributed import World
from bowstore.train.tasks.linear import class_losses
from bowstore.train.tasks.task import Network as Trained

_TRUNK_LR, _HEAD_LR, _MOMENTUM = 2e-4, 0.5, 0.9


def run(network: Network, data: DataSets, settings: SemisupSettings, world: World) -> Scores:
    """Fine-tune on the split "train", and test on "test": top1 and, with more than five classes, top5.

    Raises:
        DataError: features that are not finite, or a loss that diverges.
    """
    train, test, seen = data["train"], data["test"], settings.train_view(network.view)
    clean = clean_view(seen)
    classes = num_classes(train)
    optim = SCHEDULES[settings.percent].optim(settings, len(train), lr=1.0, weight_decay=0.0, nesterov=False)
    torch.manual_seed(settings.seed)
    # Its weights begin as those of a layer's classifier do, N(0, 0.01): as obow's.
    head = LayerHead(network.backbone.features, 1, classes, "none")
    tuned = Trained(network.backbone, head, _pooled)
    tuned = tuned.to(world.device).to(memory_format=tuned.memory_format(world.device))
    check_features(network.backbone, POOLED, test, clean, world, batch=optim.batch)
    groups = [
        {"params": tuned.backbone.parameters(), "share": _TRUNK_LR},
        {"params": tuned.head.parameters(), "share": _HEAD_LR},
    ]
    optimizer = torch.optim.SGD(groups, momentum=_MOMENTUM, fused=True)
    tuned.train()
    with exact_float32():
        batches = augmented(train, seen, batch=optim.batch, seed=settings.seed, world=world, steps=optim.epochs)
        passes = fit(
            batches, lambda images_BCHW, label_B: class_losses([tuned(images_BCHW)], label_B), optimizer, optim,
            of_a_pass=len(train) // optim.batch, world=world, what=f"semisup, {settings.percent} %",
        )  # fmt: skip
        tuned.eval()
        (hits_T,) = count_hits(
            lambda images_BCHW: [tuned(images_BCHW)], test, clean, heads=1, classes=classes, batch=optim.batch,
            world=world,
        )  # fmt: skip
    images_K = np.bincount(train.labels, minlength=classes)
    return Scores(
        metrics=shares(hits_T, len(test), classes),
        details={"losses": passes[:, 0].tolist()},
        settings={
            "view": dump(seen),
            "test_view": asdict(clean),
            "probe": dump(optim) | {"lr": {"trunk": _TRUNK_LR, "head": _HEAD_LR}, "momentum": _MOMENTUM},
            "classes": classes,
            "labels": {"key": train.key, "fewest_of_a_class": int(images_K.min()), "most": int(images_K.max())},
        },
    )


def _pooled(backbone: Backbone, images_BCHW: Tensor) -> Tensor:
    """The network's output as a layer's pooled map, (B, C, 1)."""
    feature_BC: Tensor = backbone(images_BCHW)
    return feature_BC[:, :, None]
