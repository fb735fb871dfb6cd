"""Linear segmentation of VOC2012 on one frozen map: BatchNorm, a 1x1 convolution, bilinear upsampling."""

from pydantic import Field

from bowstore.config import Batch, Count, Place, Seed, Side, Strict, Text, Workspace
from bowstore.evaluate.protocol import Kind, Protocol
from bowstore.evaluate.voc_layout import find_devkit


class SegmentationSettings(Strict):
    """What a user sets of linear segmentation; all but the folder, the batch and the seed are in the protocol id."""

    voc: Place | None = Field(None, description="VOC devkit, or its folder VOC2012; null: the workspace's")
    trainaug: bool = Field(False, description="train on the augmented list, trainaug.txt and SegmentationClassAug")
    size: Side = Field(448, description="side of the images, which are squashed to it, pixels")
    stride: Count = Field(32, description="pixels a place of the map; one that the network does not have is refused")
    masks: Side | None = Field(None, description="side of the masks, squashed, pixels; null: that of the images")
    original: bool = Field(False, description="compare with the val masks as they are, not squashed")
    layer: Text | None = Field(None, description="layer whose map is taken; null: the last stage")
    batch: Batch = Field(16, description="images a forward pass of the network; the classifier learns 16 at a time")
    seed: Seed = Field(0, description="of the classifier's weights and the order of training")


def describe(settings: SegmentationSettings) -> Protocol:
    """The id says list, layer, how images are brought to what size, the map's stride, and the masks' size."""
    masks = f"masks{settings.masks or settings.size}" + ("-original" if settings.original else "")
    parts = (
        "segmentation",
        "voc12-trainaug" if settings.trainaug else "voc12",
        *([settings.layer] if settings.layer else ()),
        f"squash{settings.size}-stride{settings.stride}",
        masks,
    )
    return Protocol(
        id="/".join(parts),
        version=1,
        description="VOC12 segmentation, BatchNorm and a 1x1 convolution on one frozen map, logits upsampled",
        headline="miou",
    )


def resolve(settings: SegmentationSettings, workspace: Workspace) -> SegmentationSettings:
    """The workspace's devkit where none is named, and in it the folder of 2012."""
    return settings.model_copy(update={"voc": find_devkit(settings.voc or workspace.voc, 2012)})


KIND = Kind(
    name="segmentation",
    help="Linear segmentation of VOC2012 on one frozen map, 21 classes, mean intersection over union.",
    settings=SegmentationSettings,
    describe=describe,
    resolve=resolve,
    data="bowstore.evaluate.segmentation:data",
    taps="bowstore.evaluate.segmentation:taps",
    score="bowstore.evaluate.segmentation:score",
)
