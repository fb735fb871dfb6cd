"""Linear SVMs on few images of VOC07: voc07-lowshot/fair and the like."""

from typing import Annotated

from pydantic import Field, model_validator

from bowstore.config import Count, Seed
from bowstore.evaluate.protocol import Kind, Protocol, layers_in_id
from bowstore.evaluate.protocols.voc07 import COSTS, SOURCES, VocSvmSettings, resolve

SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
SAMPLES = 5


class LowShotSettings(VocSvmSettings):
    """What a user sets of low-shot SVMs."""

    shots: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = Field(
        SHOTS, description="positive images a class, more than once for several (others: another protocol id)"
    )
    seed: Seed = Field(0, description="of the samples")

    @model_validator(mode="after")
    def _ascending(self) -> "LowShotSettings":
        if list(self.shots) != sorted(set(self.shots)):
            raise ValueError(f"shots {', '.join(map(str, self.shots))} must ascend; each once, smallest first")
        return self


def describe(settings: LowShotSettings) -> Protocol:
    """Costs, resizing, layers and numbers of shots are in the id, the seed is not: it changes how near the mean is."""
    shots = "-".join(map(str, settings.shots)) + "shot" if settings.shots != SHOTS else ""
    parts = (settings.variant, shots, layers_in_id(settings.layers))
    return Protocol(
        id="/".join(["voc07-lowshot", *filter(None, parts)]),
        version=1,
        description=f"VOC07 classification of few images, {len(COSTS[settings.costs])} costs "
        f"({SOURCES[settings.costs]}), the best by mean test mAP; mean of {SAMPLES} samples",
        headline=metric(settings.shots[-1]),
    )


def metric(shots: int) -> str:
    """Name of the mean average precision of so many positives a class."""
    return f"{shots}-shot"


KIND = Kind(
    name="voc07-lowshot",
    help="Linear SVMs on 1 to 96 positive images a class of VOC2007, mean average precision over five samples.",
    settings=LowShotSettings,
    flags={"layers": "--layer"},
    describe=describe,
    resolve=resolve,
    data="bowstore.evaluate.low_shot:data",
    taps="bowstore.evaluate.voc:taps",
    score="bowstore.evaluate.low_shot:score",
)
