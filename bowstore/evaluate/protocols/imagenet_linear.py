"""Linear classifiers on all layers of a frozen network, on freshly augmented ImageNet (Table 5): imagenet-linear."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from bowstore.config import Listed, Text, ViewConfig, Workspace
from bowstore.evaluate.protocol import DataSets, Kind, Protocol, layers_in_id
from bowstore.evaluate.train_test import open_train_test
from bowstore.evaluate.trained import (
    StepSchedule,
    TrainedSettings,
    check_batch,
    resolve_trained,
    trained_protocol,
)

POOLED = "pooled"  # the network's output among the layers


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the classifiers are trained, by whose code it is; what all have in common is in `layer_heads`.

    Attributes:
        source: who does it so.
        schedule: of the learning rate.
        weight_decay: on weights and biases; batch norms have none.
        nesterov: the kind of momentum.
        view: fields of `ViewConfig` in which the augmentation differs from a random crop and a flip.
        lighting: deviation of the noise along the principal colours (AlexNet's); 0 for none.
        square_crop: a random square of the resized image instead of a crop of random area and ratio.
        layers: those that are taken where none are named; empty for all stages and the pooled output.
    """

    source: str
    schedule: StepSchedule
    weight_decay: float
    nesterov: bool = True
    view: Mapping[str, Any] = field(default_factory=dict)
    lighting: float = 0.0
    square_crop: bool = False
    layers: tuple[str, ...] = ()


FAIR = Recipe(
    source="FAIR self-supervision benchmark",
    schedule=StepSchedule(length=140_000, unit="iterations", milestones=(40_000, 80_000, 120_000)),
    weight_decay=1e-4,
    view={"brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
    lighting=0.1,
)


class LayerHeadsSettings(TrainedSettings):
    """What a user sets of the classifiers."""

    recipes: ClassVar[Mapping[str, Recipe]]
    schedule: str

    layers: Listed[Text] = Field(
        (), description="layer, or pooled for the network's output, more than once for several (another id); null: all"
    )

    @property
    def recipe(self) -> Recipe:
        """The one that `schedule` names."""
        return self.recipes[self.schedule]

    @property
    def chosen(self) -> tuple[str, ...]:
        """The layers, as far as anybody names them."""
        return self.layers or self.recipe.layers

    def seen(self, view: ViewConfig) -> ViewConfig:
        """How the train images are seen by a network that was trained with a view."""
        return self.train_view(view, **self.recipe.view)


class ImageNetSettings(LayerHeadsSettings):
    """What a user sets of the classifiers on ImageNet."""

    dataset = "imagenet"
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "bownet": Recipe(
            source="the paper's",
            schedule=StepSchedule(length=28, milestones=(10, 20)),
            weight_decay=1e-4,
        ),
        "fair": FAIR,
    }
    schedule: Literal["bownet", "fair"] = Field(
        "bownet", description="length, lr and augmentation, by whose they are (another id each)"
    )


def describe(settings: LayerHeadsSettings) -> Protocol:
    """Whose schedule it is, other layers, epochs, batch or images than the published ones: all in the id."""
    recipe, middle = settings.recipe, [settings.schedule]
    if settings.layers:
        middle.append(layers_in_id(settings.layers))
    protocol = Protocol(
        id="/".join([f"{settings.dataset}-linear", *middle]),
        version=1,
        description=f"linear classifiers on layers of about 9k dimensions, augmented images ({recipe.source})",
        headline=f"top1_{POOLED}" if settings.chosen == (POOLED,) else "top1_best",
    )
    return trained_protocol(protocol, settings, recipe.schedule)


def resolve(settings: LayerHeadsSettings, workspace: Workspace) -> LayerHeadsSettings:
    """The workspace's shards, whether they are the published ones, and the batch."""
    return resolve_trained(settings, workspace, open_train_test)


def data(settings: LayerHeadsSettings, workspace: Workspace) -> DataSets:
    """Labelled train and test images of the same classes, a batch of them at least.

    Raises:
        MismatchError, DataError: as `open_train_test` and `check_batch`.
        UsageError: as `check_batch`.
    """
    return check_batch(settings, open_train_test(settings, workspace))


KIND = Kind(
    name="imagenet-linear",
    help="Linear classifiers on all layers, trained on freshly augmented ImageNet or class folders (the paper's "
    "Table 5).",
    settings=ImageNetSettings,
    flags={"layers": "--layer"},
    describe=describe,
    resolve=resolve,
    data=data,
    run="bowstore.evaluate.layer_heads:run",
)
