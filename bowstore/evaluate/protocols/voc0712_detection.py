"""VOC07+12 detection: Faster R-CNN R50-C4, fine-tuned by the schedules of the paper and of the public codes."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bowstore.config import Count, Place, Seed, Strict, Workspace
from bowstore.evaluate.protocol import Kind, Protocol
from bowstore.evaluate.voc_layout import find_devkit
from bowstore.limits import MAX_THREADS

Years = tuple[int, ...]
_WARMUP_START = 1e-3  # of the rate, in the first iteration


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a schedule is: all but the network and the images.

    Attributes:
        id: of the protocol.
        source: whose it is.
        rate: learning rate after the warm-up.
        iterations: how many.
        drops: iterations before which the rate is divided by ten.
        warmup: iterations of linear warm-up.
        frozen: how many of stem, conv2, conv3 and conv4 stay as they are (Detectron2's FREEZE_AT).
        years: of the devkits whose trainval is trained on.
        batch: images an iteration, over all ranks.
        sides: short sides of train images, pixels, each as likely.
        test_side: short side of test images, pixels.
        longest: bound of the long side, pixels.
        anchors: sides of the square ones, pixels; each has three shapes.
        pooled: side of the map that is pooled of a proposal.
        samples: proposals of a train image that the box head is trained on.
        kept_in_training: proposals of an image before and after their suppression.
        kept_in_test: the same.
        precise: train batches over which the statistics of batch norm are taken before the test.
        test_images: how many of the test images are looked at, from the first on, beside one of each class; None: all.
    """

    id: str
    source: str
    rate: float = 0.02
    iterations: int
    drops: tuple[int, ...]
    warmup: int
    frozen: int = 0
    years: Years = (2007, 2012)
    batch: int = 16
    sides: tuple[int, ...] = tuple(range(480, 801, 32))
    test_side: int = 800
    longest: int = 1333
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    pooled: int = 14
    samples: int = 512
    kept_in_training: tuple[int, int] = (12_000, 2000)
    kept_in_test: tuple[int, int] = (6000, 1000)
    precise: int = 200
    test_images: int | None = None

    def rate_at(self, iteration: int) -> float:
        """The learning rate of an iteration, from 0: linear warm-up, then steps."""
        done = min(iteration / self.warmup, 1.0)
        return self.rate * (_WARMUP_START * (1 - done) + done) / 10.0 ** bisect_right(self.drops, iteration)


_MOCO = Schedule(id="voc0712-detection/moco", source="MoCo", iterations=24_000, drops=(18_000, 22_000), warmup=100)
Name = Literal["bownet", "moco", "vissl", "obow", "voc07"]
SCHEDULES: Mapping[Name, Schedule] = {
    "bownet": Schedule(
        id="voc0712-detection/bownet", source="the paper's", iterations=25_000, drops=(17_000,), warmup=1000, frozen=2
    ),
    "moco": _MOCO,
    "vissl": replace(_MOCO, id="voc0712-detection/vissl", source="VISSL", warmup=1000),
    "obow": replace(_MOCO, id="voc0712-detection/obow", source="obow", rate=0.01),
    "voc07": Schedule(
        id="voc07-detection/vissl", source="VISSL", iterations=12_500, drops=(9500,), warmup=100, years=(2007,)
    ),
}
SMALL = Schedule(
    id="voc0712-detection/small",
    source="a check of minutes",
    iterations=100,
    drops=(80,),
    warmup=10,
    frozen=2,
    years=(2007,),
    batch=4,
    sides=(112, 128),
    test_side=128,
    longest=213,
    anchors=(16, 32, 64, 128),
    pooled=7,
    samples=8,
    kept_in_training=(500, 50),
    kept_in_test=(500, 30),
    precise=10,
    test_images=100,
)


class DetectionSettings(Strict):
    """What a user sets of detection."""

    voc: Place | None = Field(None, description="VOCdevkit with VOC2007 and VOC2012; null: the workspace's")
    schedule: Name = Field(
        "bownet",
        description="whose schedule, of 16 images an iteration (another protocol id each); voc07 needs no VOC2012",
    )
    small: bool = Field(
        False, description="4 images of 128 px an iteration, VOC2007 alone, minutes on a CPU (another protocol id)"
    )
    seed: Seed = Field(0, description="of new layers, order, sizes and sampled proposals")
    workers: Annotated[int, Field(ge=0, le=MAX_THREADS)] | None = Field(
        None, description="processes that decode; null: one a core, with small none beside the main one"
    )
    checkpoint_every: Count = Field(500, description="iterations between checkpoints, of which the last is kept")

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if self.small and self.schedule != "bownet":
            raise ValueError(f"small has a schedule of its own, and schedule is {self.schedule}; leave one of them out")
        return self

    @property
    def plan(self) -> Schedule:
        """The schedule itself."""
        return SMALL if self.small else SCHEDULES[self.schedule]


def describe(settings: DetectionSettings) -> Protocol:
    """Each schedule is a protocol."""
    plan = settings.plan
    years = "+".join(f"{year % 100:02d}" for year in plan.years)
    return Protocol(
        id=plan.id,
        version=1,
        description=f"Faster R-CNN C4 fine-tuned on VOC{years} trainval, {plan.iterations} iterations ({plan.source})",
        headline="AP",
    )


def resolve(settings: DetectionSettings, workspace: Workspace) -> DetectionSettings:
    """The workspace's devkit where none is named, and in it the folder of a year, by which the others are found.

    One that is not there before those that are: what looks at the images of a protocol before they are needed sees it.
    """
    folders = [find_devkit(settings.voc or workspace.voc, year) for year in settings.plan.years]
    return settings.model_copy(update={"voc": next((path for path in folders if not path.is_dir()), folders[-1])})


KIND = Kind(
    name="voc0712-detection",
    help="Faster R-CNN (C4) fine-tuned on VOC2007+2012, tested on VOC2007: AP50, AP75, AP (the paper's Table 6).",
    settings=DetectionSettings,
    describe=describe,
    resolve=resolve,
    data="bowstore.evaluate.voc_boxes:data",
    run="bowstore.evaluate.detection:run",
)
