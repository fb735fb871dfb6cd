"""Linear classifiers on a frozen network, one for each layer, on images that are augmented afresh (docs/tasks.md).

The trunk runs once a batch, in eval mode and without gradients: neither its weights nor its running statistics move,
and neither the optimiser nor DDP knows of it. The loss is the sum over the classifiers, which share no parameter: the
gradient of each is that of its own loss.

Legend: B batch, C channels, H W pixels, K classes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bowstore.config import validate
from bowstore.data.views import Batch
from bowstore.errors import MismatchError, MissingError
from bowstore.models.backbone import Backbone
from bowstore.models.heads import LayerHeads
from bowstore.models.pooling import named_taps, tapped
from bowstore.models.saved import load_weights, network_of, newest_checkpoint
from bowstore.progress import say
from bowstore.train.config import TrainConfig
from bowstore.train.tasks.labels import read_labels
from bowstore.train.tasks.settings import LinearSettings
from bowstore.train.tasks.task import Dead, Job, Network, Task


def build(settings: LinearSettings, job: Job) -> Task:
    """The task of a job.

    Raises:
        DataError: as `read_labels`.
        UsageError: a layer that the network does not have, or one twice.
    """
    labels, device = read_labels(job), job.world.device
    network, names = frozen_network(settings, job.backbone, job.config.view.size, labels.num_classes)
    chance = len(names) * labels.chance
    if settings.start is None and job.world.first:
        say("task linear: the frozen network has random weights; task.start names the run whose network it is to be")

    def bring(batch: Batch) -> tuple[Tensor, ...]:
        return batch.images_BCHW, labels.of(batch.plan, device)

    def loss(logits: tuple[Tensor, ...], label_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = class_losses(logits, label_B)
        hits = torch.stack([(logits_BK.detach().argmax(1) == label_B).float().mean() for logits_BK in logits])
        shares = {f"accuracy_{name}": share for name, share in zip(names, hits, strict=True)}
        return losses.sum(), {"accuracy": hits.mean(), **shares}

    return Task(
        network=network,
        bring=bring,
        make=lambda images_BCHW, label_B: (images_BCHW, label_B),
        loss=loss,
        constants={"chance_loss": chance},
        inputs={"shards": job.index.fingerprint, "labels": labels.digest},
        modes=head_modes,
        dead=Dead.at(chance, f"{len(names)} heads that predict the classes' frequencies"),
        lineage={"num_classes": labels.num_classes},
    )


def load_heads(run: Path) -> tuple[Network, list[str]]:
    """A run's frozen network with its trained heads, in eval mode, on the CPU, and its layers in the order of heads.

    Args:
        run: its directory; of a run that is not finished, the heads of its newest checkpoint.

    Raises:
        MissingError: there is no checkpoint.
        MismatchError: it is a run of another task.
        CorruptError: none of its checkpoints is sound.
    """
    state = newest_checkpoint(run)
    if state is None:
        raise MissingError(f"run {run} holds no checkpoint, and heads are in no other file; train it anew")
    config = validate(TrainConfig, state["config"], str(run))
    if not isinstance(config.task, LinearSettings):
        raise MismatchError(f"run {run} is of task {config.task.name}; name one of task linear")
    backbone = network_of(state["config"], str(run)).fresh()
    num_classes = len(state["head"]["0.linear.bias"])
    network, names = frozen_network(config.task, backbone, config.view.size, num_classes)
    load_weights(network.backbone, state["backbone"], str(run))
    load_weights(network.head, state["head"], str(run))
    return network.eval(), names


def class_losses(logits: Sequence[Tensor], label_B: Tensor) -> Tensor:
    """Cross-entropy of each classifier, (classifiers,)."""
    return torch.stack([F.cross_entropy(logits_BK, label_B) for logits_BK in logits])


def frozen_network(
    settings: LinearSettings, backbone: Backbone, size: int, num_classes: int
) -> tuple[Network, list[str]]:
    """A backbone that is frozen, with new classifiers, and the names of its layers in the order of its logits.

    Args:
        settings: which layers, and what norm.
        backbone: whose parameters ask for no gradient from then on.
        size: side of the square images, pixels.
        num_classes: K.

    Raises:
        UsageError: a layer that the network does not have, or one twice.
    """
    backbone.requires_grad_(False)
    taps = named_taps(backbone, settings.layers, size=size)

    def pooled_maps(backbone: Backbone, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(tapped(backbone, images_BCHW, taps).values())

    heads = LayerHeads(backbone, taps, size, num_classes, settings.norm)
    return Network(backbone, heads, pooled_maps), list(taps)


def head_modes(network: Network) -> None:
    """The classifiers learn, and the trunk stays as it is."""
    network.train()
    network.backbone.eval()
