"""Linear SVMs on VOC07 classification: voc07-svm/fair, /vissl and /obow, by the public code they follow."""

from collections.abc import Mapping
from typing import Literal, TypeVar

from pydantic import Field

from bowstore.config import Listed, Place, Strict, Text, Threads, Workspace
from bowstore.evaluate.protocol import Kind, Protocol, layers_in_id
from bowstore.evaluate.voc_layout import find_devkit

CostList = Literal["fair", "vissl", "obow"]
Solver = Literal["exact", "liblinear"]
Resize = Literal["antialiased", "opencv"]
_POWERS = tuple(0.5**power for power in range(4, 20))
# In the order in which the public codes try them: of equally good costs the first is taken.
COSTS: Mapping[CostList, tuple[float, ...]] = {
    "fair": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, *_POWERS),
    "vissl": (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0),
    "obow": (0.05, 0.1, 0.3, 0.5, 1.0, 3.0, 5.0, *_POWERS),
}
SOURCES = {"fair": "FAIR self-supervision benchmark; the paper's", "vissl": "VISSL", "obow": "obow"}


class VocSvmSettings(Strict):
    """What a user sets of SVMs on VOC07."""

    voc: Place | None = Field(None, description="VOC devkit, or its folder VOC2007; null: the workspace's")
    costs: CostList = Field("fair", description="cost list, by the code that uses it (another protocol id each)")
    layers: Listed[Text] = Field(
        (), description="layer, more than once for several (another protocol id); null: last two, of obow the last"
    )
    resize: Resize = Field(
        "antialiased", description="opencv: without antialias, as FAIR's code resizes (another protocol id)"
    )
    jobs: Threads | None = Field(None, description="parallel SVM fits; null: one a core")

    @property
    def variant(self) -> str:
        """Part of the id: costs, and how images are resized if not by the rule."""
        return self.costs + ("-opencv" if self.resize == "opencv" else "")


class Voc07Settings(VocSvmSettings):
    """What a user sets of the VOC07 SVMs."""

    solver: Solver = Field("exact", description="liblinear: stops where the public codes do (another protocol id)")


def describe(settings: Voc07Settings) -> Protocol:
    """Each list of costs is a protocol, and obow's has features of its own; so is each choice of layers by name."""
    costs = settings.costs
    liblinear = settings.solver == "liblinear"
    name, layers = settings.variant + "-liblinear" * liblinear, layers_in_id(settings.layers)
    return Protocol(
        id=f"voc07-svm/{name}/{layers}" if layers else f"voc07-svm/{name}",
        # 1: conv1 of a residual network was the map behind its max-pool; 2: liblinear, which has an id of its own now
        version=1 if liblinear else 3,
        description=f"VOC07 classification, one linear SVM a class, {len(COSTS[costs])} costs ({SOURCES[costs]})"
        + (f", best of {', '.join(settings.layers)}" if layers else ""),
        headline="map_best",
    )


S = TypeVar("S", bound=VocSvmSettings)


def resolve(settings: S, workspace: Workspace) -> S:
    """The workspace's devkit where none is named, and in it the folder of 2007."""
    return settings.model_copy(update={"voc": find_devkit(settings.voc or workspace.voc, 2007)})


KIND = Kind(
    name="voc07",
    help="Linear SVMs on frozen features of VOC2007, 20 classes, mean average precision (the paper's Table 4).",
    settings=Voc07Settings,
    flags={"layers": "--layer"},
    describe=describe,
    resolve=resolve,
    data="bowstore.evaluate.voc:data",
    taps="bowstore.evaluate.voc:taps",
    score="bowstore.evaluate.voc:score",
)
