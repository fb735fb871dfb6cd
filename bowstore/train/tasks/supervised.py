"""Classification by labels, the upper reference of the paper's tables.

A label is a bag of one word, the class, so that CutMix and the loss are those of bags.

Legend: B batch, C channels, H W pixels, K classes.
"""

from torch import Tensor

from bowstore.data.views import Batch
from bowstore.models.heads import CosineHead, LinearHead
from bowstore.train.tasks.labels import read_labels
from bowstore.train.tasks.settings import SupervisedSettings
from bowstore.train.tasks.task import Dead, Job, Network, Task, mixing, pooled
from bowstore.words.targets.bags import Bag, bag_of, bow_cross_entropy, mix_bags, weight_at


def build(settings: SupervisedSettings, job: Job) -> Task:
    """The task of a job.

    Raises:
        DataError: as `read_labels`.
    """
    labels, device, features = read_labels(job), job.world.device, job.backbone.features
    chance = labels.chance
    head = (
        LinearHead(features, labels.num_classes)
        if settings.head == "linear"
        else CosineHead(features, labels.num_classes, settings.gamma, normalised=True)
    )

    def bring(batch: Batch) -> tuple[Tensor, ...]:
        return batch.images_BCHW, labels.of(batch.plan, device), *mixing(batch.plan, device)

    return Task(
        network=Network(job.backbone, head, pooled),
        bring=bring,
        make=make_classes,
        loss=class_loss,
        constants={"chance_loss": chance},
        inputs={"shards": job.index.fingerprint, "labels": labels.digest},
        dead=Dead.at(chance, "predicting the classes' frequencies"),
        lineage={"num_classes": labels.num_classes},
    )


def make_classes(images_BCHW: Tensor, label_B: Tensor, *mixed: Tensor) -> tuple[Tensor, Bag]:
    """The images, and the bag of each one's class, mixed where the images are."""
    bag = bag_of(label_B[:, None], "count")
    return images_BCHW, mix_bags(bag, *mixed) if mixed else bag


def class_loss(logits_BK: Tensor, bag: Bag) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy, and accuracy: of a mixed image, the share of the class that was predicted."""
    return bow_cross_entropy(logits_BK, bag), {"accuracy": weight_at(bag, logits_BK.detach().argmax(1))}
