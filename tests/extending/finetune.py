"""A protocol that trains: the whole network with a linear head on augmented images, for a number of steps.

Legend: B batch, C channels, H W pixels, N test images.
"""

import torch
from pydantic import Field
from torch.nn import functional as F

from bowstore.config import Count, Seed
from bowstore.data.views import clean_view
from bowstore.evaluate.augmented import augmented
from bowstore.evaluate.features import Extraction
from bowstore.evaluate.protocol import DataSets, Kind, Network, Protocol, Scores
from bowstore.evaluate.train_test import TrainTestSettings, open_train_test, resolve_train_test
from bowstore.models.pooling import POOLED
from bowstore.train.distributed import World


class FinetuneSettings(TrainTestSettings):
    """What a user sets; an option of `bowstore eval finetune` for each field."""

    steps: Count = Field(100, description="of training, 16 images each (in the protocol id)")
    seed: Seed = Field(0, description="of head, order and augmentation")


def describe(settings: FinetuneSettings) -> Protocol:
    """Id and version; all that changes what the numbers mean is in the id."""
    name = f"finetune/{settings.steps}-steps" + ("-held-out" if settings.held_out else "")
    return Protocol(id=name, version=1, description="the whole network and a linear head", headline="top1")


def run(network: Network, data: DataSets, settings: FinetuneSettings, world: World) -> Scores:
    """Metrics of a network that may be changed: nobody else has it. Runs on every rank."""
    train, test, backbone, losses = data["train"], data["test"], network.backbone, []
    torch.manual_seed(settings.seed)
    head = torch.nn.Linear(backbone.features, len(train.classes)).to(world.device)
    weights = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.01)
    batches = augmented(train, network.view, batch=16, seed=settings.seed, world=world, steps=settings.steps)
    for images_BCHW, label_B in batches:
        loss = F.cross_entropy(head(backbone(images_BCHW.float())), torch.from_numpy(label_B).to(world.device))
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = world.mean(gradient)  # over the ranks, each of which has its part of the batch
        optimizer.step()
        losses.append(loss.item())
    how = Extraction(backbone=backbone, view=clean_view(network.view), taps=POOLED, batch=16, device=world.device)
    predicted_N = head(torch.from_numpy(how.features(test)["pooled"]).to(world.device)).argmax(dim=1).cpu().numpy()
    return Scores(metrics={"top1": float((predicted_N == test.labels).mean())}, details={"losses": losses})


KIND = Kind(
    name="finetune",
    help="Fine-tuning on labels.",
    settings=FinetuneSettings,
    describe=describe,
    resolve=resolve_train_test,
    data=open_train_test,
    run=run,
)
