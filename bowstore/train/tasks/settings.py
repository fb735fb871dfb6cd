"""The tasks that come with bowstore: their settings and what holds for each. Loads no torch."""

from typing import Literal, Self, TypeVar

from pydantic import Field, model_validator

from bowstore.config import Chosen, Count, ListedPlaces, Positive, Text, ViewConfig, Workspace
from bowstore.errors import UsageError
from bowstore.limits import MAX_WORDS
from bowstore.remote import fetch_store
from bowstore.train.tasks.base import Kind, StartedSettings, TaskSettings

S = TypeVar("S", "WordsSettings", "ClustersSettings", "SupervisedSettings")


def _check_gamma(settings: S) -> S:
    if settings.head == "linear" and settings.gamma != type(settings).model_fields["gamma"].default:
        raise ValueError(f"gamma {settings.gamma:g} is the scale of head cosine; leave it out with head linear")
    return settings


class RotationSettings(TaskSettings):
    """RotNet: which of four rotations an image is in. Its head is one more group of residual blocks (paper, 4)."""

    name: Literal["rotation"] = "rotation"
    head: Literal["block", "linear"] = Field(
        "block", description="block: one more residual group before the linear layer; linear: that layer alone"
    )
    blocks: int | None = Field(
        None, ge=1, le=100, description="residual blocks of head block; null: those of the backbone's last group"
    )

    @model_validator(mode="after")
    def _has_blocks(self) -> Self:
        if self.head == "linear" and self.blocks is not None:
            raise ValueError(f"blocks {self.blocks} are those of head block; leave them out with head linear")
        return self


class LocationSettings(TaskSettings):
    """RelLoc: where a patch lies around the centre one of a 3 x 3 grid (Doersch et al., the paper's Table 3).

    The paper gives no sizes; the defaults are those of its authors' neighbouring code, at a view of 96 pixels.
    """

    name: Literal["location"] = "location"
    patch: int = Field(24, ge=4, le=2048, description="side of a patch, pixels of the view")
    jitter: int = Field(8, ge=0, le=2048, description="pixels by which a patch may lie off its cell's first corner")
    gap: int = Field(0, ge=0, le=2048, description="pixels between the cells of the grid")
    hidden: Count | None = Field(
        None, description="width of the head's hidden layer; null: twice that of the pooled feature"
    )

    @property
    def grid_side(self) -> int:
        """Side of the grid, pixels of the view."""
        return 3 * (self.patch + self.jitter) + 2 * self.gap

    def check_view(self, view: ViewConfig) -> None:
        """The grid fits the view."""
        if self.grid_side > view.size:
            raise ValueError(
                f"view.size {view.size} is too small for task location: three patches of {self.patch} pixels with a "
                f"jitter of {self.jitter} each, and two gaps of {self.gap}, take {self.grid_side}; set view.size to "
                f"{self.grid_side} or more, or lower task.patch"
            )

    def input_side(self, view: ViewConfig) -> int:
        """A patch's."""
        return self.patch


class WordsSettings(TaskSettings):
    """BoWNet: the image's bag of words (paper, Eq. 3 and 4), by the cosine head of Eq. 5."""

    name: Literal["words"] = "words"
    store: ListedPlaces | None = Field(
        None, description="word store, or several under the same vocabulary; null: the workspace's"
    )
    layer: Text | None = Field(None, description="layer of the store; null: its only one")
    layers: Chosen[Text] | None = Field(
        None, description="several layers of the store, predicted jointly, each by a head of its own; beyond the paper"
    )
    form: Literal["count", "binary", "pyramid"] = Field(
        "count", description="count, binary: a bag of the whole image; pyramid: a count bag of each cell of `grids`"
    )
    grids: Chosen[Count] = Field((1, 2), description="cells along each axis, of each grid of form pyramid")
    head: Literal["cosine", "linear"] = Field("cosine", description="cosine: Eq. 5; linear: a linear layer with bias")
    reencoded: bool = Field(
        False, description="the shards hold other encodings of the store's images (resized, compressed anew)"
    )
    gamma: Positive = Field(1.0, description="initial scale of the cosine logits")
    crop_aware: bool = Field(
        False, description="the bag of the cells that the crop window shows, by their area; beyond the paper"
    )

    _gamma_scales_cosines = model_validator(mode="after")(_check_gamma)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.layers is not None and self.layer is not None:
            raise ValueError(f"layer {self.layer} and layers are both set; name all of them in layers")
        if self.form != "pyramid" and self.grids != type(self).model_fields["grids"].default:
            raise ValueError(f"grids {list(self.grids)} are those of form pyramid; leave them out with {self.form}")
        if self.form == "pyramid" and self.crop_aware:
            raise ValueError("crop_aware is of forms count and binary: the cells of a pyramid are the whole image's")
        return self

    def check_map(self, layer: str, grid: tuple[int, int]) -> None:
        """Refuse a word map that the pyramid's grids do not divide.

        Args:
            layer: its name, for the message.
            grid: (h, w) of the map, without the border.
        """
        if self.form != "pyramid" or not (odd := [cells for cells in self.grids if any(n % cells for n in grid)]):
            return
        fitting = [cells for cells in range(1, min(grid) + 1) if not any(n % cells for n in grid)]
        raise UsageError(
            f"task.grids {list(self.grids)}: {odd[0]} x {odd[0]} cells do not divide the {grid[0]} x {grid[1]} words "
            f"of an image in {layer}; take from {', '.join(map(str, fitting))}"
        )


class ClustersSettings(StartedSettings):
    """Deeper Clustering (Caron et al.) as the paper compares it: the image's cluster, and its rotation.

    One level of clusters, of the pooled features of the network as it is, found anew every few epochs.
    """

    name: Literal["clusters"] = "clusters"
    clusters: int = Field(512, ge=2, le=MAX_WORDS, description="of images")
    every_epochs: Count = Field(3, description="epochs after which the images are clustered anew")
    head: Literal["cosine", "linear"] = Field("cosine", description="cosine: Eq. 5; linear: a linear layer with bias")
    gamma: Positive = Field(1.0, description="initial scale of the cosine logits")
    rotation: bool = Field(
        True, description="images in all four rotations, which a second, linear head tells apart; the losses are added"
    )

    _gamma_scales_cosines = model_validator(mode="after")(_check_gamma)

    def check_images(self, images: int) -> None:
        """As many as clusters, at least."""
        if images < self.clusters:
            raise UsageError(
                f"task.clusters {self.clusters} needs as many images, and {images} are used; lower task.clusters, or "
                f"use more images"
            )


class SupervisedSettings(TaskSettings):
    """The image's class: the upper reference of the paper's tables."""

    name: Literal["supervised"] = "supervised"
    head: Literal["linear", "cosine"] = Field(
        "linear", description="linear: with bias; cosine: scaled cosines of features and class weights"
    )
    gamma: Positive = Field(10.0, description="initial scale of the cosine head's logits")

    _gamma_scales_cosines = model_validator(mode="after")(_check_gamma)


class LinearSettings(StartedSettings):
    """Linear classifiers on a frozen network, one for each layer, on images that are augmented afresh."""

    name: Literal["linear"] = "linear"
    layers: Chosen[Text] | None = Field(
        None, description="layers of the network, pooled for its pooled output; null: all stages and pooled"
    )
    norm: Literal["batch", "affine", "none"] = Field(
        "batch",
        description="batch norm of each pooled map; batch: without scale and shift (FAIR); affine: with (VISSL)",
    )


def _in_workspace(settings: WordsSettings, workspace: Workspace) -> WordsSettings:
    """With the workspace's stores, where none is named, and the name of their only layer."""
    from bowstore.words.store.join import layer_of  # Zarr: only where a store is opened
    from bowstore.words.store.store import open_store

    named_stores = settings.store or workspace.store
    stores = [open_store(fetch_store(place, workspace.storage)) for place in named_stores]
    layers = [layer_of(stores, name) for name in settings.layers or (settings.layer,)]
    for layer in layers:
        settings.check_map(layer.name, layer.grid)
    named = None if settings.layers else layers[0].name
    return settings.model_copy(update={"store": named_stores, "layer": named})


ROTATION = Kind(name="rotation", settings=RotationSettings, build="bowstore.train.tasks.rotation:build", mixes=False)
LOCATION = Kind(name="location", settings=LocationSettings, build="bowstore.train.tasks.location:build", mixes=False)
WORDS = Kind(
    name="words",
    settings=WordsSettings,
    build="bowstore.train.tasks.words:build",
    teacher=False,
    mixes=True,
    resolve=_in_workspace,
)
CLUSTERS = Kind(
    name="clusters",
    settings=ClustersSettings,
    build="bowstore.train.tasks.clusters:build",
    teacher=False,
    mixes=True,
)
SUPERVISED = Kind(
    name="supervised",
    settings=SupervisedSettings,
    build="bowstore.train.tasks.supervised:build",
    teacher=False,
    mixes=True,
)
LINEAR = Kind(
    name="linear", settings=LinearSettings, build="bowstore.train.tasks.linear:build", teacher=False, mixes=False
)
