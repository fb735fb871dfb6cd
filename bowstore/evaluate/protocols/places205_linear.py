"""Linear classifiers on all layers of a frozen network, on freshly augmented Places205 (Table 5): places205-linear."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from bowstore.evaluate.protocol import Kind
from bowstore.evaluate.protocols.imagenet_linear import (
    FAIR,
    POOLED,
    LayerHeadsSettings,
    Recipe,
    data,
    describe,
    resolve,
)
from bowstore.evaluate.trained import StepSchedule


class PlacesSettings(LayerHeadsSettings):
    """What a user sets of the classifiers on Places205."""

    dataset = "places205"
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "bownet": Recipe(source="the paper's", schedule=StepSchedule(length=14, milestones=(5, 10)), weight_decay=1e-4),
        "fair": FAIR,
        "obow": Recipe(
            source="obow",
            schedule=StepSchedule(length=28, milestones=(10, 20)),
            weight_decay=1e-5,
            nesterov=False,
            square_crop=True,
            layers=(POOLED,),
        ),
    }
    schedule: Literal["bownet", "fair", "obow"] = Field(
        "bownet", description="length, lr and augmentation, by whose they are (another id each)"
    )


KIND = Kind(
    name="places205-linear",
    help="Linear classifiers on all layers, trained on freshly augmented Places205 or class folders (the paper's "
    "Table 5).",
    settings=PlacesSettings,
    flags={"layers": "--layer"},
    describe=describe,
    resolve=resolve,
    data=data,
    run="bowstore.evaluate.layer_heads:run",
)
